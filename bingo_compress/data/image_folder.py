"""A folder to a list of images, with every file that cannot be used named together with its reason."""

import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bingo_compress.errors import BingoError
from bingo_compress.runtime import console
from bingo_compress.runtime.machine import in_threads
from bingo_compress.runtime.made_of import file_digest

MANY = 20_000  # files whose reading is worth a bar
UNREADABLE = "0" * 64

# Refused by name without a look inside: nobody means these to be images, and there may be millions of them.
NOT_IMAGES = frozenset(
    [
        ".txt",
        ".csv",
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
SPLITS = frozenset(["train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"])


@dataclass(frozen=True)
class Contents:
    """What was in the N files of a folder when they were read. digests: (N, 32) uint8, sha256, zeros for a file that
    cannot be read; stamps: (N, 3) int64 size, time of change of the contents, and of anything (ns), by which a later
    change is noticed.
    """

    digests: NDArray[np.uint8]
    stamps: NDArray[np.int64]


@dataclass(frozen=True)
class Folder:
    """Files found under `root`: `files` to be tried as images (relative paths, sorted), `bad` as (relative path,
    reason).

    copies: exact copies that were left out as asked for, as (relative path, the file that is kept). max_bad: share or
    number of files that may be bad. passed: hidden and system files and folders, and folders of this program, that were
    passed over.
    """

    root: Path
    files: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]
    copies: tuple[tuple[str, str], ...] = ()
    max_bad: str = "100%"
    passed: int = 0
    read: Contents | None = field(default=None, repr=False, compare=False)  # use `contents`

    def path(self, index: int) -> Path:
        """Where image number `index` lies."""
        return self.root / self.files[index]

    @property
    def contents(self) -> Contents:
        """Digests of all files, read when they are first asked for, once."""
        if self.read is None:
            object.__setattr__(self, "read", _read_contents(self))
        assert self.read is not None and len(self.read.digests) == len(self.files)
        return self.read

    @property
    def digests(self) -> list[str]:
        """sha256 of each file's bytes, in hex; UNREADABLE where it cannot be read."""
        return [bytes(row).hex() for row in self.contents.digests]

    def fingerprint(self) -> str:
        """A hash of names and contents, wherever the folder lies: differs when any file does."""
        digest = hashlib.sha256("\0".join(self.files).encode("utf-8", "surrogateescape"))
        digest.update(self.contents.digests.tobytes())
        return digest.hexdigest()

    def only(self, indices: Sequence[int]) -> "Folder":
        """The folder with only these of its files; what was read of them is not read again."""
        rows = np.asarray(indices, dtype=np.int64)
        read = Contents(self.read.digests[rows], self.read.stamps[rows]) if self.read else None
        return replace(self, files=tuple(self.files[index] for index in indices), read=read)

    def refuse_changed(self, index: int) -> None:
        """Raise BingoError if image number `index` is another one than when its contents were read; call it after
        reading the file.
        """
        if self.read is None:
            return
        path = self.path(index)
        if (
            _stamp(path) == tuple(self.read.stamps[index].tolist())
            or _digest(path) == bytes(self.read.digests[index]).hex()
        ):
            return
        raise BingoError(
            f"{path} changed while the command was running; start it again, with nothing else writing to {self.root}"
        )


def _read_contents(folder: Folder) -> Contents:
    def one(index: int) -> tuple[str, tuple[int, ...]]:
        # The stamp first: a change after it shows, one before it is in the digest.
        stamp = _stamp(folder.path(index))
        return _digest(folder.path(index)), stamp

    count = len(folder.files)
    digests, stamps = np.zeros((count, 32), np.uint8), np.zeros((count, 3), np.int64)
    with console.bar("read files", count) if count > MANY else nullcontext() as advance:
        for index, (digest, stamp) in in_threads(one, range(count)):
            digests[index], stamps[index] = np.frombuffer(bytes.fromhex(digest), np.uint8), stamp
            if advance:
                advance(1)
    return Contents(digests, stamps)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1, -1
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest(path: Path) -> str:
    try:
        return file_digest(path) if path.is_file() else UNREADABLE  # a pipe would be waited for
    except OSError:  # whoever reads it will say so
        return UNREADABLE


def list_folder(root: Path, option: str = "--data") -> Folder:
    """Every regular file below `root`, links followed, each real file once. Raises BingoError for a folder that is not
    one.
    """
    if not root.exists():
        raise BingoError(f"{option}: expected a folder of images, found nothing at {root}; check the path")
    if not root.is_dir():
        raise BingoError(f"{option}: expected a folder of images, found a file: {root}; name its folder")
    files: list[str] = []
    bad: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    anything, passed = False, 0
    above = {(status.st_dev, status.st_ino) for status in map(os.stat, root.resolve().parents)}

    def unreadable(error: OSError) -> None:
        bad.append((_relative(str(error.filename), root), "folder cannot be read"))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        try:
            here = os.stat(folder)
        except OSError as error:  # deleted while it was listed
            unreadable(error)
            continue
        if (here.st_dev, here.st_ino) in seen or (here.st_dev, here.st_ino) in above:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        if Path(folder) != root and _is_ours(names, folders):
            passed += 1
            folders.clear()
            continue
        photos = [name for name in names if not _is_system_file(name)]
        searched = [name for name in folders if not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS]
        passed += len(names) - len(photos) + len(folders) - len(searched)
        folders[:] = sorted(searched)
        for name in sorted(photos):
            anything = True
            relative = _relative(os.path.join(folder, name), root)
            reason = _unusable(os.path.join(folder, name), seen)
            if reason is None:
                files.append(relative)
            elif reason:
                bad.append((relative, reason))
    if not anything:
        raise BingoError(
            f"{option}: expected images, found an empty folder: {root}; put photos in it or name another folder"
        )
    return Folder(root, tuple(files), tuple(bad), passed=passed)


def _is_system_file(name: str) -> bool:
    stem, _, suffix = name.lower().partition(".")
    about = stem in ABOUT and suffix in ("", "md", "txt", "rst", "html", "pdf", "cff")
    return name.startswith(".") or name.lower() in SYSTEM_FILES or about


def _is_ours(names: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether a folder of these files and folders is a run, a comparison, exported files or their golden pictures."""
    run = "recipe.yaml" in names and ("work" in folders or "metrics.jsonl" in names)
    comparison = "table.json" in names and "runs" in folders
    exported = any(name.endswith(".onnx") and f"{name[:-5]}.json" in names for name in names)
    return run or comparison or exported or "golden.json" in names


def say_passed(folder: Folder) -> None:
    """One line about what was passed over, if anything was."""
    if folder.passed:
        console.say(
            f"{folder.passed:,} hidden or system files and folders, and folders of this program, passed over in"
            f" {folder.root}"
        )


def _relative(path: str, root: Path) -> str:
    return os.path.relpath(path, root)


def _unusable(path: str, seen: set[tuple[int, int]]) -> str | None:
    """Why a file is not even tried; None if it is to be tried, "" if it was seen under another name."""
    try:
        status = os.stat(path)
    except OSError as error:
        return (
            "link that leads nowhere"
            if error.errno in (errno.ENOENT, errno.ELOOP)
            else error.strerror or type(error).__name__
        )
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return ""
    if status.st_size == 0:
        return "empty file"
    if Path(path).suffix.lower() in NOT_IMAGES:
        return f"not an image (its name ends in {Path(path).suffix.lower()})"
    seen.add(identity)  # of every file, not of links alone: a link may come after the file that it leads to
    return None


def labels_of(folder: Folder) -> tuple[list[str], list[int]]:
    """Classes and one class index an image, from the first folder below the root. Raises BingoError where there are no
    such folders.
    """
    names = [name.split(os.sep, 1)[0] if os.sep in name else "" for name in folder.files]
    hint = other_root(folder)
    if "" in names or len(set(names)) < 2 or hint:
        raise BingoError(
            f"labels: expected one folder a class in {folder.root} (class_a/1.jpg, class_b/2.jpg, ...), "
            f"found {len(set(names) - {''})} such folders and {names.count('')} images outside of them"
            + (f"; {hint}" if hint else "")
        )
    classes = sorted(set(names))
    place = {name: index for index, name in enumerate(classes)}
    return classes, [place[name] for name in names]


def other_root(folder: Folder) -> str:
    """A word on which folder was meant, where the first folders are no classes but hold them: one folder about all, or
    train, val and test; else "".
    """
    parts = [name.split(os.sep, 2) for name in folder.files]
    if not parts or any(len(part) < 3 for part in parts):
        return ""
    below: dict[str, set[str]] = {}
    for part in parts:
        below.setdefault(part[0], set()).add(part[1])
    if len(below) == 1:
        ((outer, inner),) = below.items()
        return f"{outer} holds {len(inner)} folders: did you mean {folder.root / outer}?" if len(inner) > 1 else ""
    if not all(name.lower() in SPLITS for name in below) or not set.intersection(*below.values()):
        return ""
    given = sorted(below, key=lambda name: (not name.lower().startswith("train"), -len(below[name]), name))
    held = " and ".join(sorted(below))
    return (
        f"{held} hold folders of the same names, which look like the classes: give {folder.root / given[0]}, and"
        f" {folder.root / given[1]} as --test"
    )


def refuse_other_classes(bank: Folder, test: Folder, option: str) -> None:
    """Raise BingoError if `test` (--test) has classes that `bank` (given by `option`) does not have."""
    known, unknown = labels_of(bank)[0], sorted(set(labels_of(test)[0]) - set(labels_of(bank)[0]))
    if unknown:
        raise BingoError(
            f"--test: expected the classes of {option} ({', '.join(known[:10])}), found others:"
            f" {', '.join(unknown[:10])}"
        )
