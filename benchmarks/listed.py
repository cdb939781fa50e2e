"""Bytes of memory an image that stages hold beside pixels: at their peak, and of what they give.

python benchmarks/listed.py [--images 200000] [--work FOLDER] [--stage NAME]

The images are simulated: names, digests, and a store's facts beside empty files of full length. Each stage runs in a
process of its own. In an archive a member beside each image names its class. Near-copies: 16 pairs an image are asked
for and none found, the worst case; their pictures are not compared. Counted is the process's own memory (RssAnon),
looked at every millisecond; what is mapped from files is not.
"""

import argparse
import ctypes
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bingo_compress.data import pixel_store, quarantine
from bingo_compress.data import shards as shard_files
from bingo_compress.data.image_list import Contents, ImageList
from bingo_compress.data.listing import list_images
from bingo_compress.features import bagging, near_copies, neighbours, targets
from bingo_compress.runtime import console
from bingo_compress.sources.listed import Names

SIDES = (288, 384)
CPU = torch.device("cpu")
NO_PIXELS: Any = None
Stage = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--stage", choices=STAGES, help="this one alone, in this process")
    chosen = parser.parse_args()
    if chosen.stage:
        console.say = lambda *_: None
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(dir=chosen.work) as work:
            peak, held = measured(STAGES[chosen.stage](chosen.images, Path(work)))
        print(f"{chosen.stage:<28}{peak / chosen.images:>8.0f}{held / chosen.images:>8.0f}", flush=True)
        return
    print(f"{chosen.images:,} images{'peak':>22}{'held':>8}   bytes an image", flush=True)
    where = ["--work", str(chosen.work)] if chosen.work else []
    for stage in STAGES:
        command = [sys.executable, __file__, "--images", str(chosen.images), "--stage", stage, *where]
        subprocess.run(command, check=True)


def measured(stage: Stage) -> tuple[int, int]:
    """Bytes that a stage took at most, and that what it gave takes."""
    ctypes.CDLL(None).malloc_trim(0)
    before, seen, done = own(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(own())

    watching = threading.Thread(target=watch)
    watching.start()
    given = stage()
    done.set()
    watching.join()
    ctypes.CDLL(None).malloc_trim(0)
    held = own() - before
    del given
    return max(seen) - before, held


def own() -> int:
    """Bytes of this process's own memory."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def listed(images: int) -> ImageList:
    files = Names(f"train/n{number % 1000:08d}/n{number:08d}.JPEG" for number in range(images))
    digests = np.random.default_rng(0).integers(0, 256, (images, 32), np.uint8)
    return ImageList(Path("photos"), files, (), read=Contents(digests, np.zeros(images, np.int64)))


def folder(images: int, work: Path) -> Stage:
    for number in range(1000):
        (work / "photos" / "train" / f"n{number:08d}").mkdir(parents=True)
    for name in listed(images).files:
        (work / "photos" / name).write_bytes(b"x")
    return lambda: list_images(work / "photos")


def archives(images: int, work: Path, each: int, kind: str) -> Stage:
    """Archives of `each` images, as WebDataset lays them out: beside each a member that names its class."""
    home = work / "archives"
    home.mkdir()
    names = [name.replace("/", "_") for name in listed(images).files]
    for start in range(0, images, each):
        members = [(name, b"x") for name in names[start : start + each]]
        members += [(f"{Path(name).stem}.cls", b"7") for name, _ in members]
        if kind == "zip":
            with zipfile.ZipFile(home / f"{start:09d}.zip", "w") as packed:
                for name, content in members:
                    packed.writestr(name, content)
            continue
        with tarfile.open(home / f"{start:09d}.tar", "w") as archive:
            for name, content in sorted(members):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return lambda: list_images(home)


def bags(images: int, work: Path) -> Stage:
    folder, found = listed(images), torch.zeros(images, 5, dtype=torch.int64)
    return lambda: bagging.save(work / "bags.safetensors", found, folder)


def copies(images: int, work: Path) -> Stage:
    folder = listed(images)
    return lambda: quarantine.copies(folder)


def stored(folder: ImageList, work: Path) -> None:
    """The shards of a raw store, with holes for pixels."""
    count = len(folder.files)
    each = max(pixel_store.SHARD, -(-count // pixel_store.SHARDS_AT_MOST))
    ranges = [range(start, min(start + each, count)) for start in range(0, count, each)]
    shards = pixel_store._place_of_shards(folder, ranges, 256, work, "disk")[1]
    for rows in ranges:
        columns: dict[str, list[Any]] = {
            "height": [SIDES[0]],
            "width": [SIDES[1]],
            "aspect": [SIDES[1] / SIDES[0]],
            "jpeg": [0],
        }
        facts = {name: values * len(rows) for name, values in columns.items()}
        told = {"tried": len(rows), "crc32": 0, "good": list(rows), "bad": [], "oddities": []} | facts
        shard_files.facts_file(shards, rows).write_text(json.dumps(told))
        with shard_files.data_file(shards, rows).open("wb") as file:
            file.truncate(SIDES[0] * SIDES[1] * 3 * len(rows))


def store(images: int, work: Path) -> Stage:
    folder = listed(images)
    stored(folder, work)
    shard_files.is_whole = shard_files.is_there  # a checksum of holes takes long
    return lambda: pixel_store.build(folder, 256, work, CPU, "disk")


def same_bytes(images: int, work: Path) -> Stage:
    folder = listed(images)
    return lambda: near_copies.find(
        near_copies.of_store(torch.empty(images, 0), folder, NO_PIXELS), near_copies.Limits(-2, 2)
    )


def scenes(images: int, work: Path, how: str) -> Stage:
    folder = listed(images)
    shape, random = (images, 8), torch.Generator().manual_seed(0)
    features = torch.from_numpy(np.memmap(work / "features", np.float16, "w+", shape=shape))
    features.copy_(torch.nn.functional.normalize(torch.randn(shape, generator=random), dim=1))
    if how == "exact":  # which neighbours they are is no matter

        def nearest(queries: torch.Tensor, gallery: Any, count: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones(len(queries), count), torch.randint(images, (len(queries), count))

        neighbours._nearest = nearest
    near_copies._are_copies = lambda look, pairs, alike: torch.zeros(pairs.shape[1], dtype=torch.bool)
    search = neighbours.Search(how, CPU, work / "near-copies")
    photos = near_copies.of_store(features, folder, NO_PIXELS)
    return lambda: near_copies.find(photos, near_copies.Limits(-2, 1), search)


def mean_targets(images: int, work: Path) -> Stage:
    views = torch.from_numpy(np.memmap(work / "views", np.float16, "w+", shape=(images, 2, 256)))
    space = targets.TargetSpace(None, None)
    return lambda: targets.StoredTargets(views, space, CPU, mean=True, work=work)


STAGES: dict[str, Callable[[int, Path], Stage]] = {
    "a folder, listed": folder,
    "tar files of 1,000, listed": lambda images, work: archives(images, work, 1000, "tar"),
    "one tar file, listed": lambda images, work: archives(images, work, images, "tar"),
    "one zip file, listed": lambda images, work: archives(images, work, images, "zip"),
    "exact copies, counted": copies,
    "exact copies, as scenes": same_bytes,
    "pixel store": store,
    "near-copies, exact": lambda images, work: scenes(images, work, "exact"),
    "near-copies, by lists": lambda images, work: scenes(images, work, "ivf"),
    "bags, saved": bags,
    "mean of views, 256 numbers": mean_targets,
}

if __name__ == "__main__":
    main()
