"""A tar file: an index of where each member lies, made once, and members read from there in any order."""

import io
import os
import tarfile
from functools import lru_cache, partial
from pathlib import Path

from bingo_compress.errors import BingoError
from bingo_compress.sources import members
from bingo_compress.sources.listed import Columns, Listed, Stamp, stamp_of

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
Index = dict[str, tuple[int, int]]  # (where a member begins, bytes)


def matches(path: Path) -> bool:
    """Whether it is a tar file by its name."""
    return path.is_file() and path.name.lower().endswith((".tar", *PACKED))


def listed(path: Path, columns: Columns) -> Listed:
    """Images of a tar file, and their labels where it has some. Raises BingoError."""
    if path.name.lower().endswith(PACKED):
        raise BingoError(
            f"expected a tar file that can be read in any order, found a packed one: {path}; unpack it (gunzip"
            f" {path.name}), or unpack it into a folder"
        )
    stamp = stamp_of(path)
    index = index_of(path, stamp)
    whole = {name: size for name, (start, size) in index.items() if start + size <= stamp[0]}
    found = members.listed(whole, partial(_read, path, index), partial(stamp_of, path), columns)
    cut = tuple((name, "cut short with its archive") for name in index if name not in whole)
    return Listed(found.names, found.bad + cut, found.read, found.stamp, found.labels, found.passed)


@lru_cache(maxsize=4096)
def index_of(path: Path, stamp: Stamp) -> Index:
    """Where the regular files of a tar file lie; a later one of the same name takes an earlier one's place, as when it
    is unpacked. stamp: the file's, so that a changed one is read anew. Raises BingoError.
    """
    index: Index = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    index[member.name.removeprefix("./")] = member.offset_data, member.size
                archive.members = []  # type: ignore[attr-defined]  # it would keep all, a kilobyte each
    except tarfile.ReadError as error:
        if not index:
            raise BingoError(f"expected a tar file, found something else: {path} ({error})") from None
    except (OSError, UnicodeError) as error:
        raise BingoError(f"{path} cannot be read ({error})") from None
    return index


@lru_cache(maxsize=256)
def _opened(path: Path, stamp: Stamp) -> io.FileIO:
    return io.FileIO(path)  # closed when nobody reads it any more


def _read(path: Path, index: Index, name: str) -> bytes:
    start, size = index[name]
    file = _opened(path, stamp_of(path))  # held, or another thread's opening might close it
    found = os.pread(file.fileno(), size, start)
    if len(found) < size:
        raise OSError(f"{path} is cut short")
    return found
