#!/usr/bin/env bash
# What is to be seen of a GPU before its figures go into docs/PERFORMANCE.md, in less than eight minutes on an H200.
#
#     benchmarks/gpu.sh [--out DIR] [--python PYTHON]            on a machine with a GPU
#     benchmarks/gpu.sh --device cpu [--out DIR]                 tiny sizes: does each command start and end?
#     benchmarks/gpu.sh --dry-run                                only the commands
#
# Random weights and drawn photos: no hub is asked and no data set is needed. Every step has a log of its own in DIR, and
# summary.txt says how long each took and what it found. A step that fails does not keep the others from being run; then
# the script ends with 1.
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda
out=runs/gpu
python=python
dry=""
while [ $# -gt 0 ]; do
    case "$1" in
        --device) device="$2"; shift 2 ;;
        --out) out="$2"; shift 2 ;;
        --python) python="$2"; shift 2 ;;
        --dry-run) dry=yes; shift ;;
        *) echo "Unknown option $1. Valid: --device cuda|cpu, --out DIR, --python PYTHON, --dry-run." >&2; exit 2 ;;
    esac
done
quick=() more=()
case "$device" in
    cuda)
        vit=ViT-B-32/random vits="$vit,ViT-L-14/random"
        images=2000 few=64 batch=64 pairs=3 matrices=8192 limit=180 # seconds a step may take
        ;;
    cpu)
        vit=local-dir:src/finealign/demo/weights vits="$vit"
        images=12 few=12 batch=4 pairs=1 matrices=64 limit=1500 quick=(--quick)
        more=(--set training.epochs=1 --set training.anchor_steps=2 --set views.crops=2 --set training.batch_size=4)
        ;;
    *) echo "--device: found $device. Valid: cuda, or cpu to see that the commands run." >&2; exit 2 ;;
esac

failed=0
# step NAME COMMAND...: run it, keep what it says, and note how long it took.
step() {
    local name="$1" began=$SECONDS code=0
    shift
    if [ -n "$dry" ]; then
        printf '%s: %s\n' "$name" "$*"
        return
    fi
    timeout "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
    [ "$code" = 0 ] || failed=1
    printf '%4d s  %-18s %s\n' "$((SECONDS - began))" "$name" "$([ "$code" = 0 ] && echo "done" || echo "FAILED ($code)")" |
        tee -a "$out/summary.txt"
    tail -n 12 "$out/$name.log" | sed 's/^/        /' >> "$out/summary.txt"
}

if [ -z "$dry" ]; then
    mkdir -p "$out"
    : > "$out/summary.txt"
fi
export OMP_WAIT_POLICY=PASSIVE
step machine "$python" -m finealign doctor --json
step tests "$python" -m pytest -q tests/gpu --device "$device"
step steps "$python" benchmarks/step.py --backbones "$vits" --batch "$batch" --pairs "$pairs" --matrices "$matrices" \
    --device "$device" --json
step stages "$python" benchmarks/stages.py --images "$images" --backbone "$vit" --device "$device" "${more[@]}"
step stages-thread "$python" benchmarks/stages.py --images "$images" --backbone "$vit" --device "$device" --workers 0 \
    "${more[@]}"
step predict "$python" benchmarks/encode.py --images "$images" --backbones "$vit" --pairs "$pairs" --device "$device"
step twice "$python" benchmarks/gpu_checks.py twice --out "$out/twice" --images "$few" --backbone "$vit" \
    --device "$device" "${more[@]}"
step demo-cpu "$python" -m finealign demo "${quick[@]}" --out "$out/demo-cpu" --overwrite --device cpu --json
step demo "$python" -m finealign demo "${quick[@]}" --out "$out/demo" --overwrite --device "$device" --json
step alike "$python" benchmarks/gpu_checks.py alike "$out/demo-cpu" "$out/demo"
exit "$failed"
