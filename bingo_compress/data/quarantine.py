"""Files that are not used: exact copies, and how many may be bad before it is the folder that is wrong."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np

from bingo_compress.data.image_list import ImageList, same_bytes, say_passed, say_splits
from bingo_compress.errors import BingoError
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import atomic
from bingo_compress.sources.listed import NOT_IMAGES

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def copies(folder: ImageList) -> list[tuple[str, str]]:
    """(relative path, the first file of the very same bytes) of every exact copy."""
    first = same_bytes(folder.contents.digests)
    found = (first != np.arange(len(first))).nonzero()[0]
    return [(folder.files[copy], folder.files[kept]) for copy, kept in zip(found, first[found], strict=True)]


def say_copies(found: Sequence[tuple[str, str]], duplicates: str) -> None:
    """One line about exact copies, if there are any."""
    if found:
        fates = {"drop": "left out", "near": "one of each is used an epoch"}
        fate = fates.get(duplicates, "used like others; --set duplicates=drop leaves one of each")
        console.say(
            f"{len(found):,} files are exact copies of another, for example {found[0][0]} of {found[0][1]}: {fate}"
        )


def refuse_bad(folder: ImageList, bad: Sequence[tuple[str, str]], quarantine: Path) -> None:
    """Raise BingoError if more of the folder's files are bad than folder.max_bad allows; all of `bad` is in
    `quarantine` then.
    """
    broken = [(name, reason) for name, reason in bad if Path(name).suffix.lower() not in NOT_IMAGES]
    tried = len(folder.files) + sum(Path(name).suffix.lower() not in NOT_IMAGES for name, _ in folder.bad)
    share = folder.max_bad.removesuffix("%")
    allowed = int(Decimal(share) * tried / 100) if share != folder.max_bad else int(share)
    if len(broken) <= allowed:
        return
    write_quarantine(quarantine, sorted(bad))
    raise BingoError(
        f"--max-bad {folder.max_bad}: expected at most {allowed:,} of {tried:,} files that cannot be used, found"
        f" {len(broken):,} so far ({'; '.join(reasons(broken, 3))}); {quarantine} names each: mend or remove them, or"
        " raise --max-bad"
    )


def report(folder: ImageList, quarantine: Path) -> None:
    """Write `quarantine` and say how many files are in it, and how many were passed over."""
    say_passed(folder)
    say_splits(folder)
    write_quarantine(quarantine, [*folder.bad, *((name, f"exact copy of {first}") for name, first in folder.copies)])
    if folder.bad:
        console.say(
            f"{len(folder.bad):,} files cannot be used and are left out; {quarantine} names each with its reason"
        )


def reasons(bad: Iterable[tuple[str, str]], most: int) -> list[str]:
    """The `most` frequent reasons with their counts; those that differ in a number alone are one."""
    counts = Counter(re.sub(r"\b\d+\b", "N", reason) for _, reason in bad)
    return [f"{count:,} x {reason}" for reason, count in counts.most_common(most)]


def write_quarantine(path: Path, bad: Iterable[tuple[str, str]]) -> None:
    """quarantine.csv: a header, then path and reason of every file that was not used.

    A name that a spreadsheet would take for a formula is written as ./name, which is the same file.
    """
    with (
        atomic(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
    ):
        writer = csv.writer(handle)
        writer.writerow(("path", "reason"))
        writer.writerows((f"./{name}" if name.startswith(FORMULA) else name, reason) for name, reason in bad)
