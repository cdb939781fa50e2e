"""Peak memory of a whole run (pixels, teacher, bags, training, closing check) whose pixel store is larger than --memory
allows.

python benchmarks/memory.py [--memory 2GB] [--images 10000] [--teacher-size 224] [--json FILE]

The photos are synthetic, 340 x 255, a few pictures under many names; teacher and student are timm's tiny test models,
so that pixels are most of it. The same run without a limit, pixels in memory, stands beside it. Peak: the most that was
resident, pages of mapped files included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from synthetic import photo

from bingo_compress.data import pixel_store
from bingo_compress.runtime import machine

DIFFERENT = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--teacher-size", type=int, default=224, help="decides the size of the stored pixels")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    limit = machine.parse_memory(chosen.memory)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "photos"
        data.mkdir()
        for number in range(min(DIFFERENT, chosen.images)):
            photo(number, 340, 255).save(data / f"{number:06d}.jpg", quality=90)
        for number in range(DIFFERENT, chosen.images):
            (data / f"{number:06d}.jpg").write_bytes((data / f"{number % DIFFERENT:06d}.jpg").read_bytes())
        for name, options in (("limited", ["--memory", chosen.memory]), ("in memory", ["--pixels", "memory"])):
            said, peak = run(data, Path(scratch) / name.replace(" ", "-"), chosen.teacher_size, options)
            rows.append({"run": name, "peak_bytes": peak, "said": said})
    store = chosen.images * pixel_store.store_side(chosen.teacher_size, 0) ** 2 * 4
    print(f"{chosen.images:,} images, pixels about {store / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB\n")
    print(f"{'run':<12}{'peak GB':>10}{'peak/limit':>12}   where")
    for row in rows:
        print(f"{row['run']:<12}{row['peak_bytes'] / 1e9:>10.2f}{row['peak_bytes'] / limit:>12.2f}   {row['said']}")
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"images": chosen.images, "store_bytes": store, "limit_bytes": limit, "rows": rows}, indent=2)
            + "\n"
        )


def run(data: Path, out: Path, size: int, options: list[str]) -> tuple[str, int]:
    """(what the run said about its pixels, bytes of its peak)."""
    command = [
        sys.executable,
        "-m",
        "bingo_compress",
        "distill",
        "--data",
        data,
        "--out",
        out,
        "--epochs",
        1,
        "--threads",
        1,
        *options,
    ]
    command += [
        "--teacher",
        "test_resnet",
        "--teacher-weights",
        "random",
        "--student",
        "test_resnet",
        "--student-weights",
        "random",
    ]
    command += ["--image-size", 64, "--teacher-size", size, "--views", 1]
    # A small process of its own starts the run, so that the peak is that run's alone.
    watched = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); print('PEAK',"
        " resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )
    done = subprocess.run([sys.executable, "-c", watched, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    lines = done.stdout.splitlines()
    unit = 1 if sys.platform == "darwin" else 1024
    return next(line for line in lines if line.startswith("pixels:")), int(lines[-1].split()[1]) * unit


if __name__ == "__main__":
    main()
