"""Images by number: their names, contents and labels, whatever they lie in."""

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from bingo_compress.errors import BingoError
from bingo_compress.runtime import console
from bingo_compress.runtime.machine import in_threads
from bingo_compress.runtime.made_of import file_digest
from bingo_compress.sources.listed import SPLITS, Names, Opened, Stamp, Tree, stamp_of

MANY = 20_000  # files whose reading is worth a bar
UNREADABLE = "0" * 64
NAMED = 5  # folders in a message


@dataclass(frozen=True)
class Contents:
    """What was in the N files of a folder when they were read. digests: (N, 32) uint8, sha256, zeros for a file that
    cannot be read; stamps: (N,) int64, hashes of `ImageList.stamp`, by which a later change is noticed.
    """

    digests: NDArray[np.uint8]
    stamps: NDArray[np.int64]


@dataclass(frozen=True)
class ImageList:
    """Images of one source or several: `files` to be tried as images, by stable names (in a folder `root` relative
    paths, sorted), `bad` as (name, reason).

    copies: exact copies that were left out as asked for, as (relative path, the file that is kept). max_bad: share or
    number of files that may be bad. passed: hidden and system files and folders, and folders of this program, that were
    passed over. bands: as in `load_image`.
    """

    root: Path
    files: Sequence[str]
    bad: tuple[tuple[str, str], ...]
    copies: tuple[tuple[str, str], ...] = ()
    max_bad: str = "100%"
    passed: int = 0
    bands: tuple[int, ...] = ()
    opened: Opened | None = field(default=None, repr=False, compare=False)
    rows: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)  # of `opened`; None: all
    read: Contents | None = field(default=None, repr=False, compare=False)  # use `contents`

    @property
    def where(self) -> str:
        """What the images are in, in words."""
        return self.opened.where if self.opened else str(self.root)

    def place(self, index: int) -> str:
        """Where image number `index` lies, in words."""
        return str(self.root / self.files[index]) if self.plain else self.files[index]

    @property
    def plain(self) -> bool:
        """Whether the images are files below `root`."""
        return self.opened is None or self.opened.plain

    def read_raw(self, index: int) -> Path | bytes:
        """The file of image number `index`, or its bytes where it lies in an archive. Raises OSError."""
        return self.opened.read(self._row(index)) if self.opened else self.root / self.files[index]

    def stamp(self, index: int) -> Stamp:
        """What changes when image number `index` does."""
        return self.opened.stamp(self._row(index)) if self.opened else stamp_of(self.root / self.files[index])

    def labels(self) -> list[str]:
        """A class name an image, "" where there is none."""
        if self.opened is None:
            return [name.split(os.sep, 1)[0] if os.sep in name else "" for name in self.files]
        found = self.opened.labels
        return found if self.rows is None else [found[row] for row in self.rows.tolist()]

    def _row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])

    @property
    def contents(self) -> Contents:
        """Digests of all files, read when they are first asked for, once; by `hashed`, several processes share that."""
        if self.read is None:
            object.__setattr__(self, "read", read_contents(self, range(len(self.files))))
        assert self.read is not None and len(self.read.digests) == len(self.files)
        return self.read

    @property
    def digests(self) -> list[str]:
        """sha256 of each file's bytes, in hex; UNREADABLE where it cannot be read."""
        return [bytes(row).hex() for row in self.contents.digests]

    def fingerprint(self) -> str:
        """A hash of names and contents, wherever the folder lies: differs when any file does, or how one is read."""
        digest = self.hash_of_names()
        digest.update(self.contents.digests.tobytes())
        digest.update(repr(self.bands).encode() if self.bands else b"")  # a satellite has more than 255
        return digest.hexdigest()

    def hash_of_names(self) -> "hashlib._Hash":
        """sha256 of the names alone, one by one: joined they would be there a second time."""
        digest, between = hashlib.sha256(), ""
        for name in self.files:
            digest.update(f"{between}{name}".encode("utf-8", "surrogateescape"))
            between = "\0"
        return digest

    def only(self, indices: Sequence[int] | NDArray[np.int64]) -> "ImageList":
        """The folder with only these of its files; what was read of them is not read again."""
        rows = np.asarray(indices, dtype=np.int64)
        if np.array_equal(rows, np.arange(len(self.files))):
            return self
        read = Contents(self.read.digests[rows], self.read.stamps[rows]) if self.read else None
        files = Names(self.files[index] for index in indices)
        return replace(self, files=files, rows=rows if self.rows is None else self.rows[rows], read=read)

    def refuse_changed(self, index: int) -> None:
        """Raise BingoError if image number `index` is another one than when its contents were read; call it after
        reading the file.
        """
        if self.read is None:
            return
        if (
            hash(self.stamp(index)) == self.read.stamps[index]
            or _digest(self, index) == bytes(self.read.digests[index]).hex()
        ):
            return
        raise BingoError(
            f"{self.place(index)} changed while the command was running; start it again, with nothing else writing to"
            f" {self.where}"
        )


def read_contents(folder: ImageList, rows: Sequence[int]) -> Contents:
    """The contents of the files number `rows` alone, in their order, read now."""

    def one(index: int) -> tuple[str, int]:
        # The stamp first: a change after it shows, one before it is in the digest.
        stamp = hash(folder.stamp(index))
        return _digest(folder, index), stamp

    count = len(rows)
    digests, stamps = np.zeros((count, 32), np.uint8), np.zeros(count, np.int64)
    with console.bar("read files", count) if count > MANY else nullcontext() as advance:
        for place, (_, (digest, stamp)) in enumerate(in_threads(one, rows)):
            digests[place], stamps[place] = np.frombuffer(bytes.fromhex(digest), np.uint8), stamp
            if advance:
                advance(1)
    return Contents(digests, stamps)


def _digest(folder: ImageList, index: int) -> str:
    try:
        raw = folder.read_raw(index)
        if isinstance(raw, bytes):
            return hashlib.sha256(raw).hexdigest()
        return file_digest(raw) if raw.is_file() else UNREADABLE  # a pipe would be waited for
    except OSError:  # whoever reads it will say so
        return UNREADABLE


def same_bytes(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The first file of the very same bytes as each, by digests (N, 32): itself where it cannot be read."""
    whole = np.ascontiguousarray(digests).view("S32")[:, 0]  # all 32 bytes are compared, zeros too
    order = whole.argsort(kind="stable")
    begins = np.ones(len(order), dtype=bool)
    ordered = whole[order]
    begins[1:] = ordered[1:] != ordered[:-1]
    begins |= ordered == b""  # UNREADABLE
    del ordered
    first = np.empty_like(order)
    first[order] = order[begins][begins.cumsum() - 1]
    return first


def keep(work: Path, *folders: ImageList | None) -> None:
    """Write to a run's work folder what took long to find of these images: the indexes of tar files."""
    for folder in folders:
        for part in folder.opened.parts if folder and folder.opened else ():
            part.keep(work)


def say_passed(folder: ImageList) -> None:
    """One line about what was passed over, and one about what a list repeats, if there is any."""
    if folder.passed:
        console.say(
            f"{folder.passed:,} hidden or system files and folders, and folders of this program, passed over in"
            f" {folder.where}"
        )
    if repeated := sum(part.repeated for part in folder.opened.parts) if folder.opened else 0:
        console.say(f"{repeated:,} lines of {folder.where} name an image again; each is taken once")


def say_splits(folder: ImageList) -> None:
    """One line about splits that the names of archives tell apart, if they do."""
    for line in folder.opened.splits if folder.opened else ():
        console.say(line)


def labels_of(folder: ImageList) -> tuple[list[str], list[int]]:
    """Classes and one class index an image: in a folder the first one below it, elsewhere what the source says. Raises
    BingoError where there are no such.
    """
    names = folder.labels()
    hint = other_root(folder)
    if "" in names or len(set(names)) < 2 or hint:
        if not folder.plain:
            raise BingoError(
                f"labels: expected a label for each image of {folder.where} (a folder a class, a column label, or"
                f" NAME.cls beside NAME.jpg), found {len(set(names) - {''})} classes and {names.count('')} images"
                f" without; {hint or 'see --label-column'}"
            )
        raise BingoError(
            f"labels: expected one folder a class in {folder.root} (class_a/1.jpg, class_b/2.jpg, ...), "
            f"found {len(set(names) - {''})} such folders and {names.count('')} images outside of them"
            + (f"; {hint}" if hint else "")
        )
    classes = sorted(set(names))
    place = {name: index for index, name in enumerate(classes)}
    return classes, [place[name] for name in names]


def other_root(folder: ImageList) -> str:
    """A word on which folders were meant, where the first ones are no classes but hold them, or may not be; else "".
    Raises BingoError where labels cannot be read.
    """
    trees = folder.opened.trees if folder.opened else []
    return next(filter(None, [_wrapped(trees), *map(_parted, trees), _deeper(trees), *map(_packed, trees)]), "")


def _wrapped(trees: Sequence[Tree]) -> str:
    """In each place one folder holds all the others."""
    held: dict[Path, set[str]] = {}
    for tree in trees:
        if len(tree.classes) != 1:
            return ""
        ((name, inner),) = tree.classes.items()
        if "" in {name, *inner}:
            return ""
        held[tree.place / name] = inner
    if len(held) == 1:
        ((path, inner),) = held.items()
        return f"{path.name} holds {len(inner)} folders: did you mean {path}?" if len(inner) > 1 else ""
    if not _share(held.values()):
        return ""
    return (
        f"{_some(map(str, held))} hold folders of the same names and may be the classes, or hold them"
        f" ({_some(sorted(set().union(*held.values())))}): in the first case give one folder with all of them in it; in"
        " the second give these"
    )


def _parted(tree: Tree) -> str:
    """The first folders are train, val and test."""
    below = tree.classes
    if any("" in {name, *inner} or name.lower() not in SPLITS for name, inner in below.items()):
        return ""
    if len(below) < 2 or not set.intersection(*below.values()):
        return ""
    given = sorted(below, key=lambda name: (not name.lower().startswith("train"), -len(below[name]), name))
    hint = f"{' and '.join(sorted(below))} hold folders of the same names, which look like the classes: give"
    if tree.folder:
        return f"{hint} {tree.place / given[0]}, and {tree.place / given[1]} as --test"
    part = PurePath(tree.outer, given[0])
    return f"{hint} {part} of {tree.place} as a folder, list or archive of its own, and {given[1]} as --test"


def _deeper(trees: Sequence[Tree]) -> str:
    """A folder holds no images but folders that are called as classes elsewhere are."""
    classes = set().union(*(tree.classes for tree in trees))
    below: dict[str, set[str]] = {}
    for name, inner in (pair for tree in trees for pair in tree.classes.items()):
        below.setdefault(name, set()).update(inner)
    for tree in trees:
        beside = set().union(*(other.classes for other in trees if other is not tree))
        if (outer := PurePath(tree.outer).name) and outer in beside:
            return f"{outer} is a class, and in {tree.place} a folder about classes: bring all classes to one level"
        for name, inner in tree.classes.items():
            # Not where those hold folders that are called as classes are, too: sessions of persons, both by numbers.
            alike = {other for other in inner & classes if not below[other] & classes}
            if "" not in {name, *inner} and alike:
                return (
                    f"{name} of {tree.place} holds no images but folders that are called as classes are"
                    f" ({_some(sorted(alike))}): bring all classes to one level"
                )
    return ""


def _packed(tree: Tree) -> str:
    """Several archives may be the classes, or what is in them: each holds one folder with folders in it, which has the
    archive's name or others of which have folders of the same names; or their names are words, and they hold folders of
    the same names.
    """
    if tree.folder or len(tree.below) < 2:
        return ""
    held = {PurePath(archive): below for archive, below in tree.below.items() if below}
    stems = [str(archive.with_suffix("")) for archive in held]
    named = all([*below] == [archive.stem] for archive, below in held.items())
    outer = all(len(below) == 1 for below in held.values()) and len(tree.classes) > 1
    inner = [set().union(*below.values()) if outer else set(below) for below in held.values()]
    folders = sorted(set().union(*inner))
    doubtful = named or (_share(inner) and (outer or (not any(map(_numbered, stems)) and not _lettered(stems))))
    if "" in folders or len(folders) < 2 or not doubtful:
        return ""
    return (
        f"{_some(map(str, held))} may be the classes, or the folders in them ({_some(folders)}): in the first case"
        " unpack each into a folder of its name, all in one folder; in the second give each by an option of its own"
    )


def _numbered(stem: str) -> bool:
    """Whether the name of an archive is a shard's or a split's."""
    return bool(re.search(r"\d", stem) or SPLITS & set(re.split("[-_./]", stem.lower())))


def _lettered(stems: Sequence[str]) -> bool:
    """Whether names differ in their last two letters at most, as of shards: part-aa, part-ab."""
    shared = next((place for place, letters in enumerate(zip(*stems, strict=False)) if len(set(letters)) > 1), 0)
    return shared >= 3 and {len(stem) for stem in stems} <= {shared + 1, shared + 2}


def _share(held: Collection[set[str]]) -> bool:
    """Whether two of them have a name in common, and there are others."""
    return sum(map(len, held)) > len(set().union(*held)) > 1


def _some(names: Iterable[str]) -> str:
    first = [*islice(names, NAMED + 1)]
    return ", ".join(first[:NAMED]) + (", ..." if len(first) > NAMED else "")


def refuse_other_classes(bank: ImageList, test: ImageList, option: str) -> None:
    """Raise BingoError if `test` (--test) has classes that `bank` (given by `option`) does not have."""
    known = labels_of(bank)[0]
    unknown = sorted(set(labels_of(test)[0]) - set(known))
    if unknown:
        raise BingoError(
            f"--test: expected the classes of {option} ({', '.join(known[:10])}), found others:"
            f" {', '.join(unknown[:10])}"
        )
