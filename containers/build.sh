#!/usr/bin/env bash
# Builds the images and runs each for real, without network, as another user than root, on pictures that it draws:
#
#     containers/build.sh                       both: distil, export and validate in the one, embed in the other
#     containers/build.sh edge [STUDENT.onnx]   the small one alone; with a model file, its self-test and embeddings
#
# With a Docker engine: on BASE (python:3.11-slim), and the images stay, as bingo-compress and bingo-edge. Without one: as root, with buildah and podman, on a base
# made by debootstrap, and nothing stays; on Debian: apt-get install --no-install-recommends buildah debootstrap podman runc
# PIP_INDEX_URL, where it is set, is the package index; it is not stored in the images. hadolint, where it is installed, reads both files first.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-all} model=${2:-}
[[ $what == all || $what == edge ]] || { echo "error: expected all or edge, found $what" >&2; exit 2; }
[[ -z $model || -f $model ]] || { echo "error: expected a model file, found none at $model" >&2; exit 2; }
EDGE_LIMIT=400000000 # bytes, the base included

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
secret=()
if [[ -n ${PIP_INDEX_URL:-} ]]; then
    printf %s "$PIP_INDEX_URL" > "$scratch/index"
    secret=(--secret "id=index,src=$scratch/index")
fi

if docker info > "$scratch/docker" 2>&1; then
    base=${BASE:-python:3.11-slim}
    image_build() { docker build "$@"; }
    # Not root: as oneself, so that what the containers leave can be removed.
    user=()
    [[ $(id -u) == 0 ]] || user=(--user "$(id -u):$(id -g)")
    image_run() { docker run --rm "${user[@]}" "$@"; }
    image_stop() { docker stop --time 30 "$1"; }
    image_size() { docker image inspect --format '{{.Size}}' "$1"; }
elif [[ $(id -u) == 0 ]] && command -v buildah podman debootstrap runc > "$scratch/found"; then
    storage=(--root "$scratch/storage" --runroot "$scratch/run" --storage-driver overlay)
    clean() {
        buildah "${storage[@]}" rm --all > "$scratch/log" 2>&1 || true
        buildah "${storage[@]}" rmi --all --force > "$scratch/log" 2>&1 || true
        while umount "$scratch/storage/overlay" 2> "$scratch/log"; do :; done
        rm -rf "$scratch"
    }
    trap clean EXIT
    # The host's certificates, as the way to the index may need one of its own.
    certificates=/etc/ssl/certs/ca-certificates.crt
    image_build() {
        buildah "${storage[@]}" bud --format docker --isolation chroot --pull-never --volume "$certificates:$certificates:ro" "$@"
    }
    engine() { podman "${storage[@]}" --cgroup-manager cgroupfs --events-backend file --runtime runc "$@"; }
    image_run() {
        engine run --rm --no-healthcheck --cgroups no-conmon \
            --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 "$@"
    }
    image_stop() { engine stop --time 30 "$1"; }
    image_size() { podman "${storage[@]}" image inspect --format '{{.Size}}' "$1"; }
    base=localhost/bingo-base
    echo "== base: debootstrap"
    container=$(buildah "${storage[@]}" from scratch)
    root=$(buildah "${storage[@]}" mount "$container")
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" > "$scratch/log" || { tail "$scratch/log" >&2; exit 1; }
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}
    buildah "${storage[@]}" commit --quiet --rm "$container" "$base" > "$scratch/log"
    echo "$base: $(($(image_size "$base") / 1000000)) MB"
else
    echo "error: expected a Docker engine, or root with buildah, debootstrap, podman and runc; found neither (this script's head says how)" >&2
    exit 2
fi
offline() { image_run --network none "$@"; }
step() { echo; echo "== $* (after $SECONDS s)"; }

if command -v hadolint > "$scratch/found"; then
    step hadolint
    hadolint Dockerfile export/Dockerfile
fi
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' bingo_compress/__init__.py)
stamp=(--build-arg "BASE=$base" --build-arg "VERSION=$version" --build-arg "REVISION=$(git rev-parse HEAD || echo unknown)")

step "build bingo-edge"
image_build "${stamp[@]}" "${secret[@]}" -f export/Dockerfile -t bingo-edge .
step "run bingo-edge"
offline bingo-edge
offline --entrypoint python bingo-edge -c 'import importlib.util, os, sys; sys.exit(os.getuid() == 0 or importlib.util.find_spec("torch") is not None)'

if [[ $what == all ]]; then
    step "build bingo-compress"
    image_build "${stamp[@]}" "${secret[@]}" -t bingo-compress .
    step "run bingo-compress"
    offline bingo-compress
    mkdir -m 1777 "$scratch/photos" "$scratch/runs"
    # One thread: with networks this small more only wait for each other, for minutes where the machine is busy.
    bingo() { offline -e OMP_NUM_THREADS=1 -v "$scratch/photos:/data:ro" -v "$scratch/runs:/work/runs" bingo-compress "$@"; }
    offline -v "$scratch/photos:/data" --entrypoint python bingo-compress -c '
import random
from pathlib import Path
from PIL import Image, ImageDraw
for name in ("round", "square"):
    Path("/data", name).mkdir()
    for number in range(32):
        picture = Image.effect_noise((96, 96), 60).convert("RGB")
        draw = getattr(ImageDraw.Draw(picture), "ellipse" if name == "round" else "rectangle")
        left, top, side = random.randrange(40), random.randrange(40), random.randrange(30, 50)
        draw((left, top, left + side, top + side), fill=tuple(random.randbytes(3)))
        picture.save(f"/data/{name}/{number}.jpg")
'
    small=(--data /data --teacher test_resnet --teacher-weights random --student test_efficientnet --student-weights random
        --image-size 64 --teacher-size 64 --batch-size 16 --bag-size 2)
    bingo distill "${small[@]}" --epochs 1 --out runs/first
    bingo export --run runs/first
    bingo validate --run runs/first --data /data --json runs/proof.json
    test -s "$scratch/runs/proof.json"
    step "stop bingo-compress while it trains, and go on"
    offline --name bingo-stopped -e OMP_NUM_THREADS=1 -v "$scratch/photos:/data:ro" -v "$scratch/runs:/work/runs" bingo-compress \
        distill "${small[@]}" --epochs 200 --out runs/stopped &
    until [[ -s $scratch/runs/stopped/metrics.jsonl ]]; do
        kill -0 $! || { echo "error: expected a run that trains, found it ended" >&2; exit 1; }
        sleep 0.2
    done
    image_stop bingo-stopped
    wait $! && status=0 || status=$?
    echo "exit status $status"
    [[ $status == 143 && -s $scratch/runs/stopped/work/checkpoint.safetensors && ! -e $scratch/runs/stopped/student.safetensors ]] || { echo "error: expected status 143 and a save" >&2; exit 1; }
    bingo distill "${small[@]}" --epochs 200 --out runs/stopped --resume
    test -s "$scratch/runs/stopped/student.safetensors"
    model=$scratch/runs/first/export/student.onnx photos=$scratch/photos
fi

if [[ -n $model ]]; then
    step "run bingo-edge on $model"
    # The strictest way to run it: any user, nothing writable but the folder that is given to it.
    photos=${photos:-${model%.onnx}.golden}
    mkdir -m 1777 "$scratch/index"
    edge() {
        offline --read-only --user 12345:12345 -v "$(realpath "$(dirname "$model")"):/model:ro" -v "$(realpath "$photos"):/data:ro" \
            -v "$scratch/index:/work" bingo-edge "$@"
    }
    edge selftest "/model/$(basename "$model")"
    edge embed "/model/$(basename "$model")" /data --out photos.npz
    test -s "$scratch/index/photos.npz"
fi

step sizes
for name in bingo-edge $([[ $what == all ]] && echo bingo-compress); do
    echo "$name: $(($(image_size "$name") / 1000000)) MB"
done
(($(image_size bingo-edge) < EDGE_LIMIT)) || { echo "error: expected bingo-edge under $EDGE_LIMIT bytes" >&2; exit 1; }
