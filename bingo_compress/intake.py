"""Which files of a folder a run takes: exact copies, and how many files may be bad before it is the folder that is wrong."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from bingo_compress import distributed, screen
from bingo_compress.errors import BingoError
from bingo_compress.images import NOT_IMAGES, Folder, in_threads, list_folder, write_quarantine
from bingo_compress.recipe import Recipe

END = 4096  # bytes at a file's end, where two pictures of one size differ


def take(recipe: Recipe) -> Folder:
    """The files of recipe.data, exact copies counted on screen and dropped where the recipe says so, with the recipe's limit on bad files. Raises BingoError."""
    folder = list_folder(Path(recipe.data))
    found = distributed.from_first(lambda: copies(folder))
    say_copies(found, recipe.duplicates)
    if recipe.duplicates == "drop":
        left_out = {name for name, _ in found}
        folder = replace(folder, files=tuple(name for name in folder.files if name not in left_out), copies=tuple(found))
    return replace(folder, max_bad=recipe.max_bad)


def copies(folder: Folder) -> list[tuple[str, str]]:
    """(relative path, the first file of the very same bytes) of every exact copy. Files are read only as far as their sizes and then their ends agree."""
    groups = [list(range(len(folder.files)))]
    for key in (_size, _end, _whole):
        groups = _split(folder, groups, key)
    return sorted((folder.files[other], folder.files[first]) for first, *others in groups for other in others)


def say_copies(found: Sequence[tuple[str, str]], duplicates: str) -> None:
    """One line about exact copies, if there are any."""
    if found:
        fate = "left out" if duplicates == "drop" else "used like others; --set duplicates=drop leaves one of each"
        screen.say(f"{len(found):,} files are exact copies of another, for example {found[0][0]} of {found[0][1]}: {fate}")


def refuse_bad(folder: Folder, bad: Sequence[tuple[str, str]], quarantine: Path) -> None:
    """Raise BingoError if more of the folder's files are bad than folder.max_bad allows; all of `bad` is in `quarantine` then."""
    broken = [(name, reason) for name, reason in bad if Path(name).suffix.lower() not in NOT_IMAGES]
    tried = len(folder.files) + sum(Path(name).suffix.lower() not in NOT_IMAGES for name, _ in folder.bad)
    share = folder.max_bad.removesuffix("%")
    allowed = int(Decimal(share) * tried / 100) if share != folder.max_bad else int(share)
    if len(broken) <= allowed:
        return
    write_quarantine(quarantine, sorted(bad))
    raise BingoError(
        f"--max-bad {folder.max_bad}: expected at most {allowed:,} of {tried:,} files that cannot be used, found {len(broken):,} so far "
        f"({'; '.join(reasons(broken, 3))}); {quarantine} names each: mend or remove them, or raise --max-bad"
    )


def report(folder: Folder, quarantine: Path) -> None:
    """Write `quarantine` and say how many files are in it."""
    write_quarantine(quarantine, [*folder.bad, *((name, f"exact copy of {first}") for name, first in folder.copies)])
    if folder.bad:
        screen.say(f"{len(folder.bad):,} files cannot be used and are left out; {quarantine} names each with its reason")


def reasons(bad: Iterable[tuple[str, str]], most: int) -> list[str]:
    """The `most` frequent reasons with their counts; those that differ in a number alone are one."""
    counts = Counter(re.sub(r"\b\d+\b", "N", reason) for _, reason in bad)
    return [f"{count:,} x {reason}" for reason, count in counts.most_common(most)]


def _split(folder: Folder, groups: list[list[int]], key: Callable[[Path], object]) -> list[list[int]]:
    """Each group parted by `key`, without what is then alone and without files that can no longer be read."""
    parts: defaultdict[tuple[int, object], list[int]] = defaultdict(list)

    def of(member: tuple[int, int]) -> object:
        try:
            return key(folder.path(member[1]))
        except OSError:
            return None

    for (number, index), value in in_threads(of, ((number, index) for number, group in enumerate(groups) for index in group)):
        if value is not None:
            parts[number, value].append(index)
    return [part for part in parts.values() if len(part) > 1]


def _size(path: Path) -> int:
    return os.stat(path).st_size


def _end(path: Path) -> bytes:
    with path.open("rb") as handle:
        handle.seek(-min(END, os.fstat(handle.fileno()).st_size), os.SEEK_END)
        return hashlib.sha256(handle.read()).digest()


def _whole(path: Path) -> bytes:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
