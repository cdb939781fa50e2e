"""A tar file: an index of where each member lies, made once and kept in the run, and members read from there in any
order.
"""

import io
import json
import os
import tarfile
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from bingo_compress.errors import BingoError
from bingo_compress.runtime.made_of import made_of
from bingo_compress.runtime.run_dir import stage_key, write_text
from bingo_compress.sources import members
from bingo_compress.sources.listed import Columns, Listed, Names, Stamp, stamp_of

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
Place = tuple[int, int]  # (where a member begins, bytes)


class Index:
    """Where N members lie, each a name, where it begins and its bytes, by name: 24 bytes a member beside its letters, a
    tenth of what a dict of tuples takes.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        ordered = sorted(places)
        self._names = Names(ordered)
        self._starts, self._sizes = (array("Q", (places[name][part] for name in ordered)) for part in (0, 1))

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        return zip(self._names, self._starts, self._sizes, strict=True)

    def place(self, name: str) -> Place:
        """Of a member that is there."""
        row = bisect_left(self._names, name)
        return self._starts[row], self._sizes[row]


def matches(path: Path) -> bool:
    """Whether it is a tar file by its name."""
    return path.name.lower().endswith((".tar", *PACKED)) and os.path.isfile(path)


def listed(path: Path, columns: Columns) -> Listed:
    """Images of a tar file, and their labels where it has some. Raises BingoError."""
    if path.name.lower().endswith(PACKED):
        raise BingoError(
            f"expected a tar file that can be read in any order, found a packed one: {path}; unpack it (gunzip"
            f" {path.name}), or unpack it into a folder"
        )
    stamp = stamp_of(path)
    index = index_of(path, stamp)

    def sizes() -> dict[str, int]:
        return {name: size for name, start, size in index if start + size <= stamp[0]}

    found = members.listed(sizes, partial(_read, path, index), path, columns)
    cut = tuple((name, "cut short with its archive") for name, start, size in index if start + size > stamp[0])
    return replace(found, bad=found.bad + cut, keep=partial(_keep, path, stamp, index))


_known: dict[Path, tuple[Stamp, Index]] = {}  # a command lists its images more than once


def index_of(path: Path, stamp: Stamp) -> Index:
    """Where the regular files of a tar file lie; a later one of the same name takes an earlier one's place, as when it
    is unpacked. stamp: the file's, so that a changed one is read anew. Raises BingoError.
    """
    if path not in _known or _known[path][0] != stamp:
        _known[path] = stamp, _walked(path)
    return _known[path][1]


def recall(path: Path, work: Path) -> None:
    """Know the index of a tar file as a command before kept it in `work`, unless one of the two files is another one
    since.
    """
    stamp = stamp_of(path)
    if path in _known and _known[path][0] == stamp:
        return
    with suppress(OSError, ValueError, TypeError):  # nothing was kept, or not by us
        header, _, body = _place(path, work).read_bytes().partition(b"\n")
        if header == _header(path, stamp, body):
            names, starts, sizes = json.loads(body)
            _known[path] = stamp, Index(dict(zip(names, zip(starts, sizes, strict=True), strict=True)))


def _keep(path: Path, stamp: Stamp, index: Index, work: Path) -> None:
    """Write the index where `recall` finds it, if it is not there yet."""
    body = json.dumps([list(part) for part in zip(*index, strict=True)] or [[], [], []])
    whole = f"{_header(path, stamp, body.encode()).decode()}\n{body}"
    if not (file := _place(path, work)).is_file() or file.read_bytes() != whole.encode():
        write_text(file, whole)


def _place(path: Path, work: Path) -> Path:
    return work / f"index-{stage_key(archive=str(path.resolve()))}.json"


def _header(path: Path, stamp: Stamp, body: bytes) -> bytes:
    """What an index is of, and its checksum: a damaged one would lead to another member's bytes."""
    made = made_of("index", archive=str(path.resolve()), stamp=stamp)
    return json.dumps(made.told() | {"crc32": zlib.crc32(body)}).encode()


def _walked(path: Path) -> Index:
    places: dict[str, Place] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    places[member.name.removeprefix("./")] = member.offset_data, member.size
                archive.members = []  # type: ignore[attr-defined]  # it would keep all, a kilobyte each
    except tarfile.ReadError as error:
        if not places:
            raise BingoError(f"expected a tar file, found something else: {path} ({error})") from None
    except (OSError, UnicodeError) as error:
        raise BingoError(f"{path} cannot be read ({error})") from None
    return Index(places)


@lru_cache(maxsize=256)
def _opened(path: Path, stamp: Stamp) -> io.FileIO:
    return io.FileIO(path)  # closed when nobody reads it any more


def _read(path: Path, index: Index, name: str) -> bytes:
    start, size = index.place(name)
    file = _opened(path, stamp_of(path))  # held, or another thread's opening might close it
    found = os.pread(file.fileno(), size, start)
    if len(found) < size:
        raise OSError(f"{path} is cut short")
    return found
