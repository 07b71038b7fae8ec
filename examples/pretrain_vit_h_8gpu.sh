#!/usr/bin/env bash
# Pretrains ViT-H (631.6M) with Table 8's four stages on the GPUs of one node. Run it again and it goes on
# where it stopped. More settings go at the end: examples/pretrain_vit_h_8gpu.sh --train.global-batch 256
# Transformer Engine is taken where it is installed (extra gpu); FP8=delayed takes its FP8: docs/fp8.md
set -euo pipefail
if ! command -v torchrun >/dev/null; then
    echo "$0: no torchrun; in the clone: bash scripts/install.sh train && . .venv/bin/activate" >&2
    exit 1
fi

DATA=${DATA:-data/manifest}                       # written by tools/build_manifest.py
VALIDATION=${VALIDATION:-data/manifest_val}
VA_VAE=${VA_VAE-weights/va_vae.pt}                # LightningDiT's VA-VAE, f16d32; VA_VAE= : pixels
STATISTICS=${STATISTICS:-weights/latents_stats.pt}
OUT=${OUT:-runs/vit_h}
GPUS=${GPUS:-8}
MICRO_BATCH=${MICRO_BATCH-}                       # clips of a GPU in one pass; empty: the recipe's, for 80 GB
FP8=${FP8-}                                       # delayed: the four networks in FP8; empty: bf16

target=(--target.checkpoint "$VA_VAE" --target.statistics "$STATISTICS")
if [ -z "$VA_VAE" ]; then target=(--target.kind pixels); fi
speed=()
if [ -n "$MICRO_BATCH" ]; then speed+=(--train.micro-batch "$MICRO_BATCH"); fi
if [ -n "$FP8" ]; then speed+=(--fp8.all "$FP8"); fi
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}

torchrun --standalone --nproc-per-node "$GPUS" \
    -m nextvid_mcore.pretrain vit_h \
    --out "$OUT" \
    --data.manifest "$DATA" \
    --data.eval-manifest "$VALIDATION" \
    "${target[@]}" \
    "${speed[@]}" \
    --eval.every 1000 \
    "$@"
