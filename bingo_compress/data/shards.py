"""The files of a pixel store: shards of pixels and their facts, found again only where they are whole."""

import json
import zlib
from pathlib import Path
from typing import Any

from bingo_compress.data.image_list import ImageList
from bingo_compress.runtime import console


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


def is_whole(shards: Path, rows: range, streamed: bool) -> bool:
    """Whether a shard is there and its checksum holds; a damaged one is said and made again."""
    try:
        facts = read_facts(shards, rows)
        if not _fits(facts, rows, streamed):
            return False
        if streamed:
            return True
        checksum, total = (
            0,
            sum(height * width * 3 for height, width in zip(facts["height"], facts["width"], strict=True)),
        )
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
