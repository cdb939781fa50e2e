"""A zip file, its members read in any order."""

import os
import zipfile
import zlib
from functools import lru_cache, partial
from pathlib import Path

from bingo_compress.errors import BingoError
from bingo_compress.sources import members
from bingo_compress.sources.listed import Columns, Listed, Stamp, stamp_of

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError)


def matches(path: Path) -> bool:
    """Whether it is a zip file by its name."""
    return path.name.lower().endswith(".zip") and os.path.isfile(path)


def listed(path: Path, columns: Columns) -> Listed:
    """Images of a zip file, and their labels where it has some. Raises BingoError."""
    try:
        entries = _opened(path, stamp_of(path)).infolist()
    except (OSError, *DAMAGED) as error:
        raise BingoError(f"expected a zip file, found something else: {path} ({error})") from None

    def sizes() -> dict[str, int]:
        return {entry.filename: entry.file_size for entry in entries if _is_file(entry)}

    return members.listed(sizes, partial(_read, path), path, columns)


def _is_file(entry: zipfile.ZipInfo) -> bool:
    kind = entry.external_attr >> 28  # of Unix: 10 is a link
    return not entry.is_dir() and kind != 10


@lru_cache(maxsize=64)
def _opened(path: Path, stamp: Stamp) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # several threads may read from one


def _read(path: Path, name: str) -> bytes:
    try:
        return _opened(path, stamp_of(path)).read(name)
    except DAMAGED as error:
        raise OSError(f"damaged in its archive, or locked ({error})") from None
