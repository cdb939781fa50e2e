"""What a source of images gives, and what is no photo wherever it lies."""

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import NamedTuple, overload

# Refused by name without a look inside: nobody means these to be images, and there may be millions of them.
NOT_IMAGES = frozenset(
    [
        ".txt",
        ".csv",
        ".tsv",
        ".json",
        ".xml",
        ".md",
        ".py",
        ".yaml",
        ".yml",
        ".html",
        ".zip",
        ".tar",
        ".gz",
        ".parquet",
        ".mp4",
        ".mov",
        ".avi",
        ".db",
        ".npz",
        ".npy",
        ".pt",
        ".pth",
        ".onnx",
    ]
)

# Never photos, never labels, and nobody's fault: what systems and programs leave in folders, beside hidden names.
SYSTEM_FOLDERS = frozenset(
    ["__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"]
)
SYSTEM_FILES = frozenset(["thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"])
ABOUT = frozenset(["readme", "license", "licence", "copying", "notice", "changelog", "authors", "citation"])

# What people, and the hubs, call the parts of a set.
SPLITS = frozenset(["train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"])

LARGEST = 1 << 30  # bytes of one member of an archive; more is no photo

Stamp = tuple[int, ...]


class Columns(NamedTuple):
    """The names of a table's columns, or of a JSON file's keys: image is its path or its bytes; "": found by name."""

    image: str = ""
    label: str = ""


NO_COLUMNS = Columns()


class Names(Sequence[str]):
    """N names one behind the other in memory: each takes 8 bytes beside its letters, as a string of its own 57."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._letters, self._ends = bytearray(), array("Q", [0])
        for name in names:
            self.append(name)

    @classmethod
    def of(cls, letters: bytes, ends: Iterable[int]) -> "Names":
        """Those whose letters, one behind the other, are `letters`, with the N places where each ends."""
        found = cls()
        found._letters += letters
        found._ends.extend(ends)
        return found

    @property
    def parts(self) -> tuple[bytearray, "array[int]"]:
        """What `of` takes."""
        return self._letters, self._ends[1:]

    def append(self, name: str) -> None:
        """Add a name at the end; only who makes them does."""
        self._letters += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._letters))

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> "Names": ...
    def __getitem__(self, which: int | slice) -> "str | Names":
        places = range(len(self))[which]
        return self._at(places) if isinstance(places, int) else Names(map(self._at, places))

    def __iter__(self) -> Iterator[str]:
        return map(self._at, range(len(self)))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Names | tuple):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def _at(self, place: int) -> str:
        return self._letters[self._ends[place] : self._ends[place + 1]].decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Listed:
    """What is in one source: N `names`, stable and each there once, to be tried as images, and `bad` as (name, reason).

    read: a file, or the bytes of a member of an archive, by position; raises OSError. stamp: what changes when the
    image does. labels: N class names that something other than folders tells, "" where there is none, or None; read
    when they are asked for, raises BingoError. passed: hidden and system files and folders, and folders of this
    program, that were passed over. keep: writes to a run's work folder what of this took long to find, for the next
    command (`open_sources`). repeated: lines of a list that name an image again. wrapped: a folder about all of it is
    no class, as archives and lists are often made of one.
    """

    names: Names
    bad: tuple[tuple[str, str], ...]
    read: Callable[[int], Path | bytes]
    stamp: Callable[[int], Stamp]
    labels: Callable[[], Sequence[str] | None]
    passed: int = 0
    keep: Callable[[Path], None] = lambda work: None
    repeated: int = 0
    wrapped: bool = False


class Tree(NamedTuple):
    """The folders of one place, where they name the classes. outer: of an archive or a list, the folders about all of
    it, which name none; folder: whether the place is none of these; below: by part, the folders in each class, ""
    among them where images lie in the class itself.
    """

    place: Path
    outer: str
    folder: bool
    below: Mapping[str, Mapping[str, set[str]]]

    @property
    def classes(self) -> dict[str, set[str]]:
        """`below` of all parts as one."""
        found: dict[str, set[str]] = {}
        for part in self.below.values():
            for name, inner in part.items():
                found.setdefault(name, set()).update(inner)
        return found


@dataclass(frozen=True)
class Opened:
    """All sources as one. where: of people's words; names: of N images, `source!member` unless there is but a folder;
    bad: (name, reason); passed: as in `Listed`; places: each that was given, and how many of the parts are of it;
    splits: a line for each place whose archives' names tell some apart.
    """

    where: str
    parts: tuple[Listed, ...]
    prefixes: tuple[str, ...]
    places: tuple[tuple[Path, int], ...]
    splits: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return self.places[0][0]

    @property
    def names(self) -> Names:
        if self.plain:
            return self.parts[0].names
        return Names(
            f"{prefix}{name}" for prefix, part in zip(self.prefixes, self.parts, strict=True) for name in part.names
        )

    @property
    def bad(self) -> tuple[tuple[str, str], ...]:
        return tuple(
            (f"{prefix}{name}", reason)
            for prefix, part in zip(self.prefixes, self.parts, strict=True)
            for name, reason in part.bad
        )

    @property
    def passed(self) -> int:
        return sum(part.passed for part in self.parts)

    @property
    def plain(self) -> bool:
        """Whether it is one folder, whose images are files below `root`."""
        return self.prefixes == ("",)

    def read(self, row: int) -> Path | bytes:
        """The file, or the bytes, of image number `row`. Raises OSError."""
        part, index = self._at(row)
        return part.read(index)

    def stamp(self, row: int) -> Stamp:
        """What changes when image number `row` does."""
        part, index = self._at(row)
        return part.stamp(index)

    @property
    def labels(self) -> list[str]:
        """A class name an image, "" where there is none; read once, when they are asked for. Raises BingoError."""
        return self._classes[0]

    @property
    def trees(self) -> list[Tree]:
        """Of each place whose labels are the names of folders. Raises BingoError."""
        return self._classes[1]

    @cached_property
    def _classes(self) -> tuple[list[str], list[Tree]]:
        labels: list[str] = []
        trees: list[Tree] = []
        numbers = iter(range(len(self.parts)))
        for place, count in self.places:
            inside = {self.prefixes[number].rstrip("!"): self.parts[number] for number in islice(numbers, count)}
            told = [part.labels() for part in inside.values()]
            if any(each is not None for each in told):
                for part, each in zip(inside.values(), told, strict=True):
                    labels += [""] * len(part.names) if each is None else each
                continue
            wrapped = all(part.wrapped for part in inside.values())
            outer = outer_folders(chain.from_iterable(part.names for part in inside.values())) if wrapped else []
            below: dict[str, dict[str, set[str]]] = {}
            for source, part in inside.items():
                held = below.setdefault(source, {})
                for name in part.names:
                    first, second = [*_folders(name)[len(outer) :], "", ""][:2]
                    held.setdefault(first, set()).add(second)
                    labels.append(first)
            trees.append(Tree(place, "/".join(outer), not wrapped, below))
        return labels, trees

    def _at(self, row: int) -> tuple[Listed, int]:
        number = bisect_right(self._starts, row) - 1
        return self.parts[number], row - self._starts[number]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(part.names) for part in self.parts)][:-1]


def stamp_of(path: str | Path) -> Stamp:
    """Size, time of change of the contents, and of anything (ns); -1 where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1, -1
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_system_file(name: str) -> bool:
    """Whether a file of this name, without folders, is no photo in anybody's folder."""
    stem, _, suffix = name.lower().partition(".")
    about = stem in ABOUT and suffix in ("", "md", "txt", "rst", "html", "pdf", "cff")
    return name.startswith(".") or name.lower() in SYSTEM_FILES or about


def is_system_folder(name: str) -> bool:
    """Whether nothing in a folder of this name is a photo."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def refusal(name: str) -> str:
    """Why a file is not even tried, by its name; "" if it is to be tried."""
    suffix = Path(name).suffix.lower()
    if suffix in (".tar", ".zip", ".parquet"):
        return f"an archive (its name ends in {suffix}): give it as --data of its own"
    return f"not an image (its name ends in {suffix})" if suffix in NOT_IMAGES else ""


def in_order(name: str) -> tuple[tuple[bool, str], ...]:
    """A key that sorts members of an archive as a walk through their folder would: files first, then folders."""
    *folders, file = name.split("/")
    return (*((True, folder) for folder in folders), (False, file))


def outer_folders(names: Iterable[str]) -> list[str]:
    """The folders that all names begin with and that are no class: an archive is often made of a folder that holds the
    classes. Where one folder holds all images, it is one.
    """
    shared: list[str] | None = None
    depth = 0
    for folders in map(_folders, names):
        shared = folders if shared is None else shared
        while folders[: len(shared)] != shared:
            shared = shared[:-1]
        depth = max(depth, len(folders))
    shared = shared or []
    return shared[:-1] if depth == len(shared) else shared


def _folders(name: str) -> list[str]:
    return name.replace(os.sep, "/").split("/")[:-1]
