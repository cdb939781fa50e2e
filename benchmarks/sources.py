"""Listing and opening images: a folder, a list, tar shards, a zip and a Parquet file of the same photos, in turn.

python benchmarks/sources.py --images 1000 --work /tmp/sources
"""

import argparse
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from bingo_compress.data.decode import decode_all
from bingo_compress.data.listing import list_images

SHARD = 1000  # images
ROUNDS = 3
OPENED = 2000  # images of each round


def make(count: int, work: Path) -> dict[str, Path]:
    """`count` JPEGs of 320 x 240 in folders of SHARD, and all else made of them; what is there is not made again."""
    generator = np.random.default_rng(0)
    folder, shards = work / "folder", work / "shards"
    if not (work / "made").exists():
        for start in range(0, count, SHARD):
            names = [f"{start // SHARD:04d}/{number:07d}.jpg" for number in range(start, min(start + SHARD, count))]
            (folder / names[0]).parent.mkdir(parents=True, exist_ok=True)
            shards.mkdir(exist_ok=True)
            with tarfile.open(shards / f"{start // SHARD:04d}.tar", "w") as archive:
                for name in names:
                    small = generator.integers(0, 255, (12, 16, 3), np.uint8)
                    Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(folder / name, quality=90)
                    archive.add(folder / name, name)
        files = sorted(folder.rglob("*.jpg"))
        (work / "list.txt").write_text("\n".join(map(str, files)))
        with zipfile.ZipFile(work / "all.zip", "w") as packed:
            for file in files:
                packed.write(file, file.relative_to(folder))
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        schema = pyarrow.schema([("image", kind)])
        with pyarrow.parquet.ParquetWriter(work / "all.parquet", schema) as writer:
            for start in range(0, count, 100):
                rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files[start : start + 100]]
                writer.write_table(pyarrow.table({"image": rows}, schema=schema), row_group_size=100)
        (work / "made").touch()
    return {
        "folder": folder,
        "list": work / "list.txt",
        "tar shards": shards,
        "zip": work / "all.zip",
        "parquet": work / "all.parquet",
    }


def measure(place: Path, opened: int) -> tuple[float, float, float]:
    """(seconds to list, bytes read a second, images decoded a second), the last two over the first `opened` images."""
    began = time.perf_counter()
    found = list_images(place)
    listed = time.perf_counter() - began
    count = min(opened, len(found.files))
    began = time.perf_counter()
    for index in range(count):
        raw = found.read_raw(index)
        _ = raw if isinstance(raw, bytes) else raw.read_bytes()
    read = count / (time.perf_counter() - began)
    began = time.perf_counter()
    for _ in decode_all(found, range(count), lambda pixels: pixels.shape):
        pass
    return listed, read, count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--work", type=Path, required=True)
    chosen = parser.parse_args()
    places = make(chosen.images, chosen.work)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in places}
    for _ in range(ROUNDS):
        for name, place in places.items():
            found[name].append(measure(place, OPENED))
    middle = {name: [float(np.median(column)) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    print(f"{chosen.images:,} images, median of {ROUNDS} rounds in turn")
    print(f"{'':12}{'list, s':>10}{'read, images/s':>18}{'decoded, images/s':>20}{'of the folder':>16}")
    for name, (listed, read, decoded) in middle.items():
        print(f"{name:12}{listed:10.2f}{read:18,.0f}{decoded:20,.0f}{decoded / middle['folder'][2]:16.2f}")


if __name__ == "__main__":
    main()
