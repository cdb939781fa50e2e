"""The files of a pixel store: shards of pixels and their facts, found again only where they are whole."""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bingo_compress.data.image_list import ImageList
from bingo_compress.runtime import console

Read = Callable[[int, int, int], Tensor]  # (image, top, bottom) to its rows, uint8 (bottom - top, width, 3)


def data_file(shards: Path, rows: range) -> Path:
    return shards / f"{rows.start:09d}.u8"


def facts_file(shards: Path, rows: range) -> Path:
    return shards / f"{rows.start:09d}.json"


def read_facts(shards: Path, rows: range) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(facts_file(shards, rows).read_text())
    return facts


def bad(folder: ImageList, found: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """All that is known to be bad once the shards of `found` were made."""
    return folder.bad + tuple((folder.files[index], why) for facts in found for index, why in facts["bad"])


def is_there(shards: Path, rows: range, streamed: bool) -> bool:
    """Whether a shard is there, as long as its facts say; its checksum is not looked at."""
    try:
        facts = read_facts(shards, rows)
        return _fits(facts, rows, streamed) and (
            streamed or data_file(shards, rows).stat().st_size == sum(_sizes(facts))
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False  # not there, cut short by a kill, or not ours


def _sizes(facts: dict[str, Any]) -> list[int]:
    return [height * width * 3 for height, width in zip(facts["height"], facts["width"], strict=True)]


def is_whole(shards: Path, rows: range, streamed: bool) -> bool:
    """Whether a shard is there and its checksum holds; a damaged one is said and made again."""
    try:
        facts = read_facts(shards, rows)
        if not _fits(facts, rows, streamed):
            return False
        if streamed:
            return True
        checksum, total = 0, sum(_sizes(facts))
        with data_file(shards, rows).open("rb") as handle:
            while piece := handle.read(1 << 24):
                checksum = zlib.crc32(piece, checksum)
        if checksum == facts["crc32"] and data_file(shards, rows).stat().st_size == total:
            return True
        console.say(f"warning: {data_file(shards, rows)} is damaged; its {len(rows):,} images are decoded again")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # not there, cut short by a kill, or not ours
    return False


def _fits(facts: dict[str, Any], rows: range, streamed: bool) -> bool:
    """Whether facts are of these images, each once, and of as many sizes as there are good ones."""
    good, sizes = facts["good"], [*facts["height"], *facts["width"]]
    tried = sorted([*good, *(index for index, _ in facts["bad"])])
    lists = [facts[name] for name in ("height", "width", "aspect", *(("jpeg",) if streamed else ()))]
    return (
        facts["tried"] == len(rows)
        and tried == list(rows)
        and all(len(values) == len(good) for values in lists)
        and all(isinstance(several, bool) and isinstance(peak, int) for several, peak in facts["oddities"])
        and all(isinstance(size, int) and size > 0 for size in sizes)
        and all(isinstance(aspect, float) and aspect > 0 for aspect in facts["aspect"])
    )


def reader(shards: Path, ranges: Sequence[range], found: Sequence[dict[str, Any]], *, mapped: bool) -> Read:
    """Rows of images out of the shards: mapped into memory, or (not mapped) read from the file, so that they never
    count as this process's memory.
    """
    files: list[int] = []
    starts: list[int] = []
    widths: list[int] = []
    maps: list[Any] = []
    for number, (rows, facts) in enumerate(zip(ranges, found, strict=True)):
        sizes = _sizes(facts)
        starts += [0, *accumulate(sizes)][: len(sizes)]
        files += [number] * len(sizes)
        widths += facts["width"]
        maps.append(_open(data_file(shards, rows), sum(sizes), mapped))

    def read(image: int, top: int, bottom: int) -> Tensor:
        width, source = widths[image], maps[files[image]]
        start, end = (starts[image] + row * width * 3 for row in (top, bottom))
        if mapped:
            raw = torch.from_numpy(source[start:end])
        else:
            raw = torch.frombuffer(bytearray(os.pread(source.fileno(), end - start, start)), dtype=torch.uint8)
        return raw.view(bottom - top, width, 3)

    return read


def _open(path: Path, size: int, mapped: bool) -> Any:
    if not mapped:
        return path.open("rb", buffering=0)
    # "c": torch wants writable memory.
    return np.memmap(path, np.uint8, "c", shape=(size,)) if size else np.empty(0, np.uint8)
