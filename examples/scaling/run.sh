#!/usr/bin/env bash
# A ladder of encoders and lengths on moving digits, and the scaling law of it (tools/scaling_laws.py). Every run
# has its own schedule to the end, since a law of runs that are cut off before their cool-down is another one.
#     bash examples/scaling/run.sh [flags of pretrain ...]
# PARALLEL runs at a time share a GPU (start CUDA MPS first: nvidia-cuda-mps-control -d). Run again, it goes on.
# Needs the extras train, demo and tools. Two minutes on an H100 with PARALLEL=16. To see it work on a laptop:
#     WIDTHS="32 64 96" STEPS="10 20 40" bash examples/scaling/run.sh --train.global-batch 8 --eval.samples 32
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${OUT:-runs/scaling}
WIDTHS=${WIDTHS:-64 128 256 384} # of the encoder, multiples of 32
STEPS=${STEPS:-150 300 600 1200}
PARALLEL=${PARALLEL:-1}
export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export OUT OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

one() { # width steps flags...
    local width=$1 steps=$2 run=$OUT/w$1_s$2
    shift 2
    local up=$((steps / 5)) down=$((steps * 3 / 10))
    mkdir -p "$run"
    if ! "$PYTHON" -m nextvid_mcore.pretrain digits_32 --out "$run" \
        --model.encoder.width "$width" --model.encoder.heads $((width / 32)) --model.encoder.mlp $((width * 4)) \
        --stages.0.steps "$up" --stages.1.steps $((steps - up - down)) --stages.2.steps "$down" \
        --eval.every "$steps" --eval.samples 512 --eval.knn-every 0 --checkpoint.every "$steps" \
        "$@" >"$run/log.txt" 2>&1; then
        echo "$run failed; the end of $run/log.txt:" >&2
        tail -n 3 "$run/log.txt" >&2
        return 1
    fi
    echo "$run is there"
}
export -f one

status=0
for steps in $(printf '%s\n' $STEPS | sort -rn); do # the longest first, so that none is left alone at the end
    for width in $(printf '%s\n' $WIDTHS | sort -rn); do echo "$width $steps"; done
done | xargs -P "$PARALLEL" -L 1 bash -c 'one "${@: -2}" "${@:1:$#-2}"' one "$@" || status=$?
runs=()
for width in $WIDTHS; do
    for steps in $STEPS; do
        run=$OUT/w${width}_s$steps
        if [ -f "$run/config.json" ]; then runs+=("$run"); fi
    done
done
"$PYTHON" tools/scaling_laws.py "${runs[@]}" --out "$OUT/scaling.png" --json "$OUT/law.json"
exit "$status"
