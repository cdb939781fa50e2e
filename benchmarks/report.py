"""What a page on a run costs: made of synthetic embeddings of so many images, then drawn by Chromium from the disk.

    python benchmarks/report.py --images 100000 --out /tmp/page.html

With --run RUN the page of a finished run is drawn instead. Prints seconds, bytes, peak memory, milliseconds until all
is drawn, and what Chromium complained of; ends with status 1 where something is beyond --most-bytes or --most-ms.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bingo_compress.data.pixel_store import Pictures, PixelStore
from bingo_compress.html_report import looking, looks, page
from bingo_compress.html_report.facts import Facts
from bingo_compress.html_report.sections import View
from bingo_compress.recipe import make_recipe

SIDE, WIDTH, KINDS, MATES = 128, 512, 40, 5


def synthetic(images: int) -> looks.Looks:
    """Looks of a run on images of KINDS kinds, whose student sees a little otherwise than its teacher."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(KINDS, (images,), generator=generator)
    centres = torch.randn(KINDS, WIDTH, generator=generator)
    features = torch.empty(images, WIDTH, dtype=torch.float16)
    for rows in torch.arange(images).split(8192):
        noise = torch.randn(len(rows), WIDTH, generator=generator)
        features[rows] = normalize(centres[kind[rows]] + 0.8 * noise, dim=1).half()

    def read(image: int, top: int, bottom: int) -> Tensor:
        noise = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(image), dtype=torch.uint8)
        large: Tensor = noise.repeat_interleave(SIDE // 8, 0)[top:bottom].repeat_interleave(SIDE // 8, 1)
        return large

    sizes = torch.full((images,), SIDE)
    store = PixelStore(Pictures(sizes, sizes, torch.ones(images), read), torch.device("cpu"))
    bags = torch.randint(images, (images, MATES), generator=generator)
    every = torch.arange(images)
    left = looking.Left(store, features, every, every, bags, [""] * images)

    def see(name: str, which: Tensor) -> Tensor:
        spread = {"start": 1.2, "student": 0.6}[name] / WIDTH**0.5
        seen: Tensor = features[which].float() + spread * torch.randn(len(which), WIDTH, generator=generator)
        return seen

    return looking.look(left, see, 0)


def made(images: int, target: Path) -> dict[str, float]:
    """Write the page of a synthetic run; what it took."""
    began = time.monotonic()
    found = synthetic(images)
    recall = {"k": 20, "gallery": 20_000, "queries": 1000, "start": 0.3, "student": 0.4}
    summary = {"images": {"training": images, "held_out": 0, "scenes": images}, "neighbour_recall": recall}
    lines = [{"step": step, "epoch": 0, "loss": 1 / step, "lr": 0.1, "seconds": float(step)} for step in range(1, 5000)]
    recipe = make_recipe({"teacher": "teacher", "student": "student"}, "benchmark")
    facts = Facts("This run", "", recipe, summary, lines, 5000.0, {}, [], [], [], [], found)
    target.write_text(page.render([facts], View()), encoding="utf-8")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time(), "peak_bytes": peak}


def drawn(file: Path, chromium: str) -> tuple[int, list[str]]:
    """(milliseconds from the page's beginning until all charts stand, what Chromium complained of)."""
    with tempfile.TemporaryDirectory() as profile:
        words = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        words += ["--enable-logging=stderr", "--window-size=1280,900", "--dump-dom", file.resolve().as_uri()]
        ran = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'<html[^>]* data-drawn="(\d+)"', ran.stdout)
    return int(found[1]) if found else -1, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


def main() -> None:
    """Make, draw, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--run", type=Path, help="draw this run's report.html instead")
    parser.add_argument("--out", type=Path, default=Path("report-benchmark.html"))
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--most-bytes", type=float, default=10e6)
    parser.add_argument("--most-ms", type=float, default=4000)
    given = parser.parse_args()
    file = given.run / "report.html" if given.run else given.out
    found = {} if given.run else made(given.images, file)
    milliseconds, complaints = drawn(file, given.chromium)
    told = {**found, "bytes": file.stat().st_size, "drawn_ms": milliseconds, "complaints": complaints}
    print(json.dumps(told, indent=2))
    sys.exit(int(told["bytes"] > given.most_bytes or not 0 <= milliseconds <= given.most_ms or bool(complaints)))


if __name__ == "__main__":
    main()
