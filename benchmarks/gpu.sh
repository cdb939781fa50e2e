#!/usr/bin/env bash
# What is to be known of a GPU, in one go of some six minutes: correctness, speed, one real distillation to its proof, a million neighbours.
# make gpu-pack here; then there, in the repository's root: OUT=folder benchmarks/gpu.sh [part ...]
# Three files land in $OUT as it goes: report.txt, the tables; logs.txt, all that was printed; results.json. QUICK=1: a trial of the script itself, on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-results} python=${PYTHON:-python3} pack=$PWD/gpu-pack
work=$(mktemp -d)
mkdir -p "$out"
: > "$out/report.txt"; : > "$out/logs.txt"
if [ -z "${PYTHON:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" "$pack"/wheels/*.whl || exit
    export PYTHONPATH=$work/site
fi
here=$PWD:$PWD/export:$PWD/benchmarks
export PYTHONPATH=$here:${PYTHONPATH:-} PYTHONUNBUFFERED=1
# Tests look for photos beside the repository.
[ -e ../shared/data/clothing ] || { mkdir -p ../shared/data && ln -s "$pack/clothing" ../shared/data/clothing; }
weights=$(echo "$pack"/weights/efficientnet-lite2*.pth)

say() { echo "$@" | tee -a "$out/report.txt"; }

part() { # name, seconds, lines of it to report, command: one that fails is said and does not end the others
    local name=$1 most=$2 lines=$3 status=0 began=$SECONDS
    shift 3
    say "== $name: $*"
    timeout --kill-after=5 "$most" "$@" > "$work/$name.txt" 2>&1 || status=$?
    { echo "== $name: $*"; cat "$work/$name.txt"; } >> "$out/logs.txt"
    tail -n "$lines" "$work/$name.txt" | tee -a "$out/report.txt"
    say "-- $name: exit status $status after $((SECONDS - began)) s"
    "$python" - "$work" "$out/results.json" <<'PYTHON'
import json, pathlib, sys
found = {}
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    try:
        found[file.stem] = json.loads(file.read_text())
    except ValueError:
        pass
pathlib.Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n")
PYTHON
}

if [ -n "${QUICK:-}" ]; then
    students=test_resnet batches=8 size=64 step=(--steps 2 --rounds 1 --images 32) epochs=1 seeds=0 million=(--queries-share 0.0005)
else
    students="resnet18 mobilenetv3_large_100 vit_tiny_patch16_224" batches="256 1024" size=224 step=(--seconds 1 --rounds 2 --images 512 --queue 65536)
    epochs=35 seeds="0 1 2" million=()
fi

distilled() { # name, seed, program: the quick recipe on the photos of the pack, and its proof
    local run=$work/$1
    "$python" $3 distill --recipe quick_cpu --set "epochs=$epochs" --data "$pack/clothing/train" --teacher-weights "$weights" --seed "$2" \
        --overwrite --out "$run" &&
        "$python" $3 validate --run "$run" --data "$pack/clothing/train" --test "$pack/clothing/test" --json "$work/validation-$1.json"
    tail -n 1 "$run/metrics.jsonl"
}

side_by_side() { # all seeds, as it is and with every product in float32
    export OMP_NUM_THREADS=2
    for seed in $seeds; do
        distilled "bf16-$seed" "$seed" "-m bingo_compress" > "$work/log-bf16-$seed" 2>&1 &
        distilled "float32-$seed" "$seed" benchmarks/gpu_float32.py > "$work/log-float32-$seed" 2>&1 &
    done
    wait
    cat "$work"/log-*
    for log in "$work"/log-*; do
        echo "$(basename "$log" | cut -c5-): $(grep "distil: .* in " "$log" | tail -n 1 | cut -c1-130)"
        grep "student (distilled)  *│ .*\[.*\].*│.*│.*│" "$log"
        tail -n 1 "$log"
    done
}
export -f distilled side_by_side
export python pack weights work epochs seeds

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
    "$python" -c 'import torch, torchvision, timm, onnxruntime, pydantic, typer; [print(m.__name__, m.__version__) for m in (torch, torchvision, timm, onnxruntime, pydantic, typer)]; print(torch.version.cuda, torch.cuda.is_available())'
    nproc
}

for wanted in ${*:-machine correctness steps distil million official}; do
    case $wanted in
        machine) machine 2>&1 | tee -a "$out/report.txt" ;;
        # An earlier commit beside this one: mkdir gpu-pack/before; git archive COMMIT bingo_compress export | tar x -C gpu-pack/before
        # shellcheck disable=SC2086
        before) part before 60 20 env "PYTHONPATH=$pack/before:$pack/before/export:$PYTHONPATH" "$python" benchmarks/step.py --student resnet18 --batch 256 --size "$size" "${step[@]}" --json "$work/before.json" ;;
        # shellcheck disable=SC2086
        steps) part steps 150 20 "$python" benchmarks/step.py --student $students --batch $batches --size "$size" "${step[@]}" --json "$work/steps.json" ;;
        correctness) part correctness 100 30 "$python" -m pytest -q -p no:cacheprovider --durations=5 -rPfE tests/test_gpu.py tests/data/test_decode.py ;;
        distil) part distil 170 24 bash -c side_by_side ;;
        million) part million 120 6 "$python" benchmarks/bagging.py --million --dim 256 "${million[@]}" --json "$work/million.json" ;;
        official) part official 60 8 "$python" benchmarks/official_step.py --batch 128 --steps 10 --rounds 1 --json "$work/official.json" ;;
    esac
done
