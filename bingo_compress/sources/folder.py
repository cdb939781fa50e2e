"""A folder, searched to any depth."""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bingo_compress.runtime import console
from bingo_compress.sources.listed import Columns, Listed, Names, is_system_file, is_system_folder, refusal, stamp_of


def matches(path: Path) -> bool:
    """Whether it is a folder."""
    return path.is_dir()


def walked(root: Path, unreadable: Callable[[OSError], None]) -> Iterator[tuple[str, list[str], int]]:
    """Each folder below `root`, links followed, each real one once: (where it is, its files that are no system's, how
    many files and folders in it were passed over). unreadable: is told of those that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    above = {(status.st_dev, status.st_ino) for status in map(os.stat, root.resolve().parents)}
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
            folders.clear()
            yield folder, [], 1
            continue
        files = sorted(name for name in names if not is_system_file(name))
        searched = [name for name in folders if not is_system_folder(name)]
        passed = len(names) - len(files) + len(folders) - len(searched)
        folders[:] = sorted(searched)
        yield folder, files, passed


def listed(root: Path, columns: Columns) -> Listed:
    """Every regular file below `root`, links followed, each real file once. Its folders are the labels."""
    files = Names()
    bad: list[tuple[str, str]] = []
    seen: set[int] = set()
    passed = 0

    def unreadable(error: OSError) -> None:
        bad.append((os.path.relpath(str(error.filename), root), "folder cannot be read"))

    for folder, names, others in walked(root, unreadable):
        passed += others
        for name in names:
            relative = os.path.relpath(os.path.join(folder, name), root)
            reason = _unusable(os.path.join(folder, name), seen)
            if reason is None:
                files.append(relative)
            elif reason:
                bad.append((relative, reason))

    def labels() -> None:
        if columns.label:
            console.say(f"--label-column {columns.label}: not of {root}, whose labels are the names of its folders")

    return Listed(
        files,
        tuple(bad),
        lambda index: root / files[index],
        lambda index: stamp_of(root / files[index]),
        labels,
        passed,
    )


def _is_ours(names: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether a folder of these files and folders is a run, a comparison, exported files or their golden pictures."""
    run = "recipe.yaml" in names and ("work" in folders or "metrics.jsonl" in names)
    comparison = "table.json" in names and "runs" in folders
    exported = any(name.endswith(".onnx") and f"{name[:-5]}.json" in names for name in names)
    return run or comparison or exported or "golden.json" in names


def _unusable(path: str, seen: set[int]) -> str | None:
    """Why a file is not even tried; None if it is to be tried, "" if it was seen under another name. seen: device and
    inode of those, as one number: a pair of two takes three times as much memory.
    """
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
    identity = status.st_dev << 64 | status.st_ino
    if identity in seen:
        return ""
    if status.st_size == 0:
        return "empty file"
    if reason := refusal(path):
        return reason
    seen.add(identity)  # of every file, not of links alone: a link may come after the file that it leads to
    return None
