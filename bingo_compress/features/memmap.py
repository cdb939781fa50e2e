"""Matrices that need not fit into memory: rows of a raw file of numbers, and some rows of another matrix."""

import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import need_space, write_text

READ = 1 << 24  # bytes read at once for a checksum


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix, read when they are asked for and never copied as a whole. matrix: (M, D); which: (N,)
    int64 positions in it.
    """

    matrix: Tensor
    which: Tensor

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self.matrix[self.which[rows]]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.which), self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype


Matrix = Tensor | Rows


def scratch(shape: tuple[int, ...], kind: torch.dtype, folder: Path | None, what: str) -> Tensor:
    """A tensor of anything, in a file of `folder` that is gone with the process: how much of it is in memory is the
    system's affair. In memory without a folder. what: it is, for the error. Raises BingoError when the disk is too
    small.
    """
    if folder is None:
        return torch.empty(shape, dtype=kind)
    size = kind.itemsize * math.prod(shape)
    need_space(folder, size, what)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # not on macOS; a disk that fills up later would kill at the first write
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_numpy(np.memmap(file, torch.empty(0, dtype=kind).numpy().dtype, "r+", shape=shape))


def blocks(matrix: Matrix, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, the rows) of `matrix`, `rows` at a time."""
    for start in range(0, len(matrix), rows):
        yield start, matrix[start : start + rows]


@dataclass(frozen=True)
class Stored:
    """A matrix of `width` columns of numbers of the type `kind` in the raw file `path`, written by ranges of rows, in
    any order and by several processes.

    A range that is done has a marker beside the file, with the checksum of its rows.
    """

    path: Path
    width: int
    kind: torch.dtype = torch.float16

    def reserve(self, rows: int) -> None:
        """Make it at least `rows` rows long; what is in it stays."""
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as handle:
            if handle.seek(0, os.SEEK_END) < self.size(rows):
                handle.truncate(self.size(rows))

    def write(self, first: int, rows: Tensor) -> None:
        """Put `rows` (n, width) at row `first`; on the disk, with their marker, when this returns."""
        content = rows.to(self.kind).contiguous().numpy().tobytes()
        with self.path.open("r+b") as handle:
            handle.seek(self.size(first))
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())  # before the marker says so
        write_text(self._marker(first), json.dumps({"rows": len(rows), "crc32": zlib.crc32(content)}))

    def there(self, first: int) -> bool:
        """Whether rows from `first` were written."""
        return self._marker(first).exists()

    def sound(self, first: int, rows: int) -> bool:
        """Whether the `rows` rows from `first` are there as they were written; says so when they were written and are
        not.
        """
        if not self.there(first):
            return False
        try:
            told = json.loads(self._marker(first).read_text(encoding="utf-8"))
            whole = bool(told == {"rows": rows, "crc32": self._checksum(first, rows)})
        except (OSError, ValueError, RecursionError):
            whole = False
        if not whole:
            console.say(f"rows {first:,} to {first + rows - 1:,} of {self.path} are damaged and are made again")
        return whole

    def read(self, *shape: int, first: int = 0) -> Tensor:
        """The rows from `first` as a tensor of this shape, read from disk as they are used. Writing to it changes
        memory alone, never the file.
        """
        kind = torch.empty(0, dtype=self.kind).numpy().dtype
        return torch.from_numpy(np.memmap(self.path, kind, "c", self.size(first), shape))

    def drop(self) -> None:
        """Delete the file and its markers, where they are there."""
        for marker in self.path.parent.glob(f"{self.path.stem}-*.json"):
            marker.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def size(self, rows: int) -> int:
        """Bytes of so many rows."""
        return rows * self.width * self.kind.itemsize

    def _marker(self, first: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{first:012d}.json")

    def _checksum(self, first: int, rows: int) -> int:
        found, left = 0, self.size(rows)
        with self.path.open("rb") as handle:
            handle.seek(self.size(first))
            while left and (content := handle.read(min(READ, left))):
                found = zlib.crc32(content, found)
                left -= len(content)
        return found


@dataclass(frozen=True)
class TeacherPass:
    """What one pass of the teacher gave. features: (N, width) plain view; embeddings: (N, D) plain view; views: (N, V,
    D), V may be 0.

    Float16, every row of length one: no method uses lengths, and float16 ends at 65504. All are read from disk as they
    are used. key: of what the pass was made from; projected: embeddings and views went through a projection head, the
    features did not; home: the folder that it is in. close: None, or (N, V), float32, what `closeness` gives; then
    views are (N, V, d + 2), int8, what `targets.packed` gives of them in the target space.
    """

    features: Tensor
    embeddings: Tensor
    views: Tensor
    key: str
    projected: bool = False
    home: Path = Path()
    close: Tensor | None = None

    def closeness(self, rows: Tensor) -> Tensor:
        """Cosines (n, V), float32, of the images `rows` (n,) with their own views, as the teacher gave them."""
        if self.close is not None:
            return self.close[rows]
        return torch.einsum("nd,nvd->nv", self.embeddings[rows].float(), self.views[rows].float())
