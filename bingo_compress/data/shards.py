"""The files of a pixel store: shards of pictures and their facts, found again only where they are whole.

A shard's pictures are kept raw (their pixels), encoded (a JPEG each) or, of a store that streams, not at all.
"""

import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torchvision  # noqa: F401 - puts its decoders into torch.ops.image
from bingo_edge.image import Pixels
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bingo_compress.data.image_list import ImageList
from bingo_compress.errors import BingoError
from bingo_compress.runtime import console

# How an encoded store keeps pictures, by what was measured: docs/performance.md. Half the colour's rows and columns.
CODEC: dict[str, str | int] = {"codec": "JPEG", "quality": 90, "subsampling": "4:2:0"}
UNIT = 16  # rows that a JPEG of 4:2:0 codes together
RESTARTS = [bytes((0xFF, 0xD0 + number)) for number in range(8)]
START_OF_FRAME, START_OF_SCAN, END = 0xC0, 0xDA, b"\xff\xd9"
# What torchvision.io.decode_jpeg calls, without its warning each time that it may be gone one day.
DECODE_JPEG = getattr(torch.ops.image, "decode_jpeg", None)
RGB = 3  # the number of a kind of picture to torchvision
Read = Callable[[int, int, int], Tensor]  # (image, top, bottom) to its rows, uint8 (bottom - top, width, 3)
Kind = Literal["raw", "encoded", "streamed"]
SIDES = ("height", "width")
# What facts hold of each good picture: in an array 4 or 8 bytes, as a Python number 36.
COLUMNS = {
    "good": np.int64,
    "height": np.int32,
    "width": np.int32,
    "aspect": np.float32,
    "encoded": np.int32,
    "jpeg": np.int64,
}
KINDS: tuple[Kind, ...] = ("raw", "encoded", "streamed")
LISTS: dict[Kind, tuple[str, ...]] = {"raw": (), "encoded": ("encoded",), "streamed": ("jpeg",)}


def data_file(shards: Path, rows: range) -> Path:
    return shards / f"{rows.start:09d}.u8"


def facts_file(shards: Path, rows: range) -> Path:
    return shards / f"{rows.start:09d}.json"


def read_facts(shards: Path, rows: range) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(facts_file(shards, rows).read_text())
    return facts


def read_columns(shards: Path, rows: range) -> dict[str, Any]:
    """The facts of a shard that fits, with arrays in place of its lists of numbers."""
    facts = read_facts(shards, rows)
    return facts | {name: np.array(facts[name], kind) for name, kind in COLUMNS.items() if name in facts}


def column(found: Sequence[dict[str, Any]], name: str) -> NDArray[Any]:
    """One of COLUMNS of all shards, one after the other."""
    return np.concatenate([np.empty(0, COLUMNS[name]), *(facts[name] for facts in found)])


def bad(folder: ImageList, found: Iterable[Sequence[tuple[int, str]]]) -> tuple[tuple[str, str], ...]:
    """All that is known to be bad once shards with these bad files were made."""
    return folder.bad + tuple((folder.files[index], why) for several in found for index, why in several)


def sizes(facts: dict[str, Any]) -> NDArray[np.int64]:
    """Bytes of each good picture in a shard's file."""
    if "encoded" in facts:
        return np.asarray(facts["encoded"], np.int64)
    height, width = (np.asarray(facts[name], np.int64) for name in SIDES)
    return height * width * 3


def is_there(shards: Path, rows: range, kind: Kind) -> bool:
    """Whether a shard is there, as long as its facts say; its checksum is not looked at."""
    try:
        facts = read_facts(shards, rows)
        fits = _fits(facts, rows, kind)
        return fits and (kind == "streamed" or data_file(shards, rows).stat().st_size == sizes(facts).sum())
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False  # not there, cut short by a kill, or not ours


def is_whole(shards: Path, rows: range, kind: Kind) -> bool:
    """Whether a shard is there and its checksum holds; a damaged one is said and made again."""
    try:
        facts = read_facts(shards, rows)
        if not _fits(facts, rows, kind):
            return False
        if kind == "streamed":
            return True
        checksum, total = 0, int(sizes(facts).sum())
        with data_file(shards, rows).open("rb") as handle:
            while piece := handle.read(1 << 24):
                checksum = zlib.crc32(piece, checksum)
        if checksum == facts["crc32"] and data_file(shards, rows).stat().st_size == total:
            return True
        console.say(f"warning: {data_file(shards, rows)} is damaged; its {len(rows):,} images are decoded again")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass  # not there, cut short by a kill, or not ours
    return False


def _fits(facts: dict[str, Any], rows: range, kind: Kind) -> bool:
    """Whether facts are of these images, each once, and of as many sizes as there are good ones."""
    good, sides = facts["good"], [*facts["height"], *facts["width"], *facts.get("encoded", ())]
    tried = sorted([*good, *(index for index, _ in facts["bad"])])
    lists = [facts[name] for name in ("height", "width", "aspect", *LISTS[kind])]
    return (
        facts["tried"] == len(rows)
        and tried == list(rows)
        and all(len(values) == len(good) for values in lists)
        and all(isinstance(several, bool) and isinstance(peak, int) for several, peak in facts["oddities"])
        and all(isinstance(size, int) and size > 0 for size in sides)
        and all(isinstance(aspect, float) and aspect > 0 for aspect in facts["aspect"])
    )


def reader(shards: Path, ranges: Sequence[range], found: Sequence[dict[str, Any]], *, mapped: bool) -> Read:
    """Rows of images out of the shards: raw ones mapped into memory, or (not mapped) read from the file, so that they
    never count as this process's memory; encoded ones read and decoded, which raises BingoError where a file was
    damaged since it was looked at.
    """
    start = np.concatenate([(each := sizes(facts)).cumsum() - each for facts in found])
    number = np.repeat(np.arange(len(found), dtype=np.int16), [len(facts["good"]) for facts in found])
    height, width = (column(found, name) for name in SIDES)
    encoded = any("encoded" in facts for facts in found)
    length = column(found, "encoded") if encoded else np.empty(0)
    paths = [data_file(shards, rows) for rows in ranges]
    opened = [
        _open(path, int(sizes(facts).sum()), mapped and not encoded) for path, facts in zip(paths, found, strict=True)
    ]

    def rows_of_jpeg(image: int, top: int, bottom: int) -> Tensor:
        path, source = paths[number[image]], opened[number[image]]
        try:
            raw = os.pread(source.fileno(), int(length[image]), int(start[image]))
            rows = jpeg_rows(raw, int(height[image]), top, bottom)
            assert rows.shape == (bottom - top, width[image], 3)
        except (AssertionError, IndexError, OSError, RuntimeError, ValueError):
            raise BingoError(f"{path} was damaged while it was read; start the command again") from None
        return rows

    def rows_of_pixels(image: int, top: int, bottom: int) -> Tensor:
        source, wide = opened[number[image]], int(width[image])
        first, last = (int(start[image]) + row * wide * 3 for row in (top, bottom))
        if mapped:
            raw = torch.from_numpy(source[first:last])
        else:
            raw = torch.frombuffer(bytearray(os.pread(source.fileno(), last - first, first)), dtype=torch.uint8)
        return raw.view(bottom - top, wide, 3)

    return rows_of_jpeg if encoded else rows_of_pixels


def as_jpeg(pixels: Pixels) -> bytes:
    """A picture as an encoded store keeps it: a JPEG that can be entered at each UNIT of rows.

    Huffman tables of its own (optimize) would save 5%; Pillow fails to write them for noise.
    """
    file = io.BytesIO()
    how = {"quality": CODEC["quality"], "subsampling": CODEC["subsampling"]}
    Image.fromarray(pixels).save(file, "JPEG", restart_marker_rows=1, **how)
    return file.getvalue()


def jpeg_rows(raw: bytes, height: int, top: int, bottom: int) -> Tensor:
    """Rows `top` to `bottom` of a picture of `height` rows out of `as_jpeg`: uint8 (bottom - top, width, 3), those of
    the whole picture bit for bit. Raises RuntimeError, OSError, ValueError or IndexError for bytes that are no such
    JPEG.
    """
    frame, start = 0, 2
    while (marker := raw[start + 1]) != START_OF_SCAN:
        frame = start if marker == START_OF_FRAME else frame
        start += 2 + int.from_bytes(raw[start + 2 : start + 4], "big")
    start += 2 + int.from_bytes(raw[start + 2 : start + 4], "big")
    # Units of rows, with a row more on each side, which colour is interpolated from.
    units, first, last = -(-height // UNIT), max(top - 1, 0) // UNIT, -(-min(bottom + 1, height) // UNIT)
    cuts = [start]
    for unit in range(min(last, units - 1)):
        cuts.append(raw.index(RESTARTS[unit % 8], cuts[-1]) + 2)
    part = bytearray(raw[:start] + raw[cuts[first] : cuts[last] if last < units else len(raw)])
    part[frame + 5 : frame + 7] = (min(height, last * UNIT) - first * UNIT).to_bytes(2, "big")
    for number, cut in enumerate(cuts[first + 1 : last]):
        part[start + cut - cuts[first] - 1] = RESTARTS[number % 8][1]  # they are counted from the first that is there
    part[-2:] = END
    return _decoded(part)[top - first * UNIT : bottom - first * UNIT]


def _decoded(jpeg: bytearray) -> Tensor:
    """uint8 (height, width, 3), the same by either decoder: torchvision's takes two thirds of the time."""
    if DECODE_JPEG is None:
        return torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg))))
    return cast(Tensor, DECODE_JPEG(torch.frombuffer(jpeg, dtype=torch.uint8), RGB, False)).permute(1, 2, 0)


def _open(path: Path, size: int, mapped: bool) -> Any:
    if not mapped:
        return path.open("rb", buffering=0)
    # "c": torch wants writable memory.
    return np.memmap(path, np.uint8, "c", shape=(size,)) if size else np.empty(0, np.uint8)
