#!/usr/bin/env bash
# Pretraining on moving digits, then pictures of what the model generates and a look at its features. A few
# minutes on a GPU, hours on a laptop's CPU; run again, it goes on. Needs the extra `tools`
# (scripts/install.sh train,demo,tools). Everything lies in $RUN; flags are pretrain's:
#     bash examples/digits.sh [--train.steps 200 ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RECIPE=${RECIPE:-digits_film} # digits_32: the full model of docs/results.md
RUN=${RUN:-runs/$RECIPE}
PICTURES=${PICTURES:-1}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
plots=$RUN/plots

if [ "$PICTURES" = 1 ]; then # before the training, not after it
    "$python" -c '
import importlib.util, sys
lacking = [name for name in ("matplotlib", "sklearn", "mnist") if importlib.util.find_spec(name) is None]
if lacking:
    sys.exit(f"examples/digits.sh: {sys.executable} lacks {chr(44).join(lacking)}; run scripts/install.sh train,demo,tools")
'
fi
"$python" -m nextvid_mcore.pretrain "$RECIPE" --out "$RUN" "$@"
"$python" tools/convert_to_torch.py "$RUN" --out "$RUN/encoder" --all --force
if [ "$PICTURES" = 1 ]; then
    "$python" tools/generate.py "$RUN" --clips 3                                      # Figure 5
    "$python" tools/generate.py "$RUN" --mode autoregressive --clips 3 --start 2 --length 6
    for task in digit direction; do                                                   # Figure 7
        "$python" tools/tsne.py "$RUN/encoder" --data moving_digits --task $task --items 1000 --out "$plots/tsne_$task.png"
    done
    "$python" tools/pca.py "$RUN/encoder" --data moving_digits --clips 3
    "$python" tools/plot_run.py "$RUN" --out "$plots/run.png"                         # Figure 6
    for of in "" random; do                                                           # and of fresh weights
        "$python" tools/probe.py "${of:+$of:}$RUN/encoder" --dataset moving_digits --method knn \
            --train-items 4000 --val-items 2000 --out "$RUN/knn$of" --no-progress
    done
fi
