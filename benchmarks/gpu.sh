#!/usr/bin/env bash
# Everything to be measured on a GPU, in one go: correctness first, then speed, then one real distillation. Tables and JSON land in $OUT.
# OUT=folder PYTHON=python3 CLOTHING=../shared/data/clothing WEIGHTS=efficientnet-lite2-9656183e.pth benchmarks/gpu.sh
# Written where no GPU was at hand: it has not been run on one yet.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-results} python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/export:$PWD/benchmarks

try() { # a name, then a command: one that fails is said and does not end the others
    local name=$1
    shift
    echo "== $name: $*"
    "$@" > "$out/$name.txt" 2>&1 || echo "FAILED with $?: $name"
    tail -n 20 "$out/$name.txt"
}

nvidia-smi > "$out/machine.txt"
try correctness "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_decoding.py
for student in resnet18 mobilenetv3_large_100; do
    try "step-$student" "$python" benchmarks/step.py --student $student --batch 256 --steps 30 --images 4096 --json "$out/step-$student.json"
done
try official_step "$python" benchmarks/official_step.py --batch 64 --steps 10 --json "$out/official_step.json"
try bagging "$python" benchmarks/bagging.py --json "$out/bagging.json"
try pixels "$python" benchmarks/pixels.py --json "$out/pixels.json"
if [ -d "${CLOTHING:-}" ] && [ -f "${WEIGHTS:-}" ]; then
    try distill "$python" -m bingo_compress distill --recipe quick_cpu --data "$CLOTHING/train" --teacher-weights "$WEIGHTS" --overwrite --out "$out/run" --profile
    try validate "$python" -m bingo_compress validate --run "$out/run" --data "$CLOTHING/train" --test "$CLOTHING/test" --json "$out/validation.json"
fi
