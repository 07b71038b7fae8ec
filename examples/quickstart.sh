#!/usr/bin/env bash
# The whole way on a laptop's CPU: install, real clips, pretraining, plain PyTorch. Run it again and
# what is there is used. Everything stays in this clone: .venv, data/demo, runs/quickstart.
set -euo pipefail
if [ $# -gt 0 ]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" && echo "It takes no arguments."
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One thread for each of the two processes: with more threads than cores they wait for each other.
export OMP_NUM_THREADS=1
# The demonstration is for a CPU; it does the same where there happens to be a GPU.
export CUDA_VISIBLE_DEVICES=""
RUN=runs/quickstart

title() { printf '\n[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

title "1 of 5: dependencies, in .venv"
bash scripts/install.sh train,demo
python=.venv/bin/python

title "2 of 5: clips and images that ship in packages, in data/demo"
written_by=$(sha256sum <tools/demo_data.py)
if [ "$(cat data/demo/written-by 2>/dev/null)" = "$written_by" ]; then
    echo "data/demo is there."
else
    $python tools/demo_data.py --out data/demo
    echo "$written_by" >data/demo/written-by
fi

title "3 of 5: pretraining recipe tiny on 2 processes (tensor parallel), in $RUN"
$python -m torch.distributed.run --standalone --nproc-per-node 2 -m nextvid_mcore.pretrain tiny \
    --out $RUN --parallel.encoder.tensor 2

title "4 of 5: to plain PyTorch, in $RUN/encoder, and a picture of what it generates"
$python tools/convert_to_torch.py $RUN --out $RUN/encoder --all --force
$python tools/generate.py $RUN

title "5 of 5: the encoder in a fresh process"
$python - $RUN/encoder <<'PY'
import sys

import torch

from nextvid_mcore.hub import load_config, load_encoder

config, encoder = load_config(sys.argv[1]), load_encoder(sys.argv[1])
video = torch.rand(1, 3, config["frames"], config["image_size"], config["image_size"]) * 2 - 1
with torch.no_grad():
    features = encoder(video)
assert "megatron" not in sys.modules
millions = sum(p.numel() for p in encoder.parameters()) / 1e6
print(f"video {list(video.shape)} -> features {list(features.shape)}; {millions:.2f}M parameters; no megatron")
PY

title "done; what lies where:"
cat <<END
  data/demo/                  clips, images and their manifests
  $RUN/            metrics.jsonl (a line a step), config.json, checkpoints
  $RUN/plots/      loss.png, and generated.png: next frames generated from masked clips
  $RUN/encoder/    the encoder for nextvid_mcore.hub.load_encoder("$RUN/encoder")

What to try next:
  . .venv/bin/activate
  python -m nextvid_mcore.pretrain tiny --help                       every setting
  python -m nextvid_mcore.pretrain vit_g --dry-run --world-size 96   the plan of the paper's run
  python tools/build_manifest.py --help                              your own clips
  examples/pretrain_vit_l_8gpu.sh                                    ViT-L on 8 GPUs
END
