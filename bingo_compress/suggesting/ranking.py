"""What was measured, within a budget, best first by one rule."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bingo_compress.errors import BingoError
from bingo_compress.suggesting.cached import Size
from bingo_compress.suggesting.students import AUTHORS, STUDENTS, TIMMS, estimated

RULE = (
    "best first: the ImageNet top-1 that is stated for a student's pretrained weights, less what MobileNetV2 loses when"
    " it is trained at this input size instead of the stated one; an estimate, since on your images only training tells"
    " (--data D --teacher T); a student of which nothing is stated comes after those, the larger first"
)
SOURCES = f"stated: {TIMMS}; what is newer: {AUTHORS}"
MB = 1e6


class Budget(NamedTuple):
    """At most so many milliseconds (median) and megabytes of float file; None: any."""

    latency_ms: float | None
    size_mb: float | None

    def describe(self) -> str:
        """Words for a sentence: within 10 ms and 5 MB."""
        parts = [f"{value:g} {unit}" for value, unit in ((self.latency_ms, "ms"), (self.size_mb, "MB")) if value]
        return f"within {' and '.join(parts)}" if parts else "of any size"

    def holds(self, row: "Row") -> bool:
        """Whether a student is within it."""
        return self._small(row) and (self.latency_ms is None or row.p50_ms <= self.latency_ms)

    def _small(self, row: "Row") -> bool:
        return self.size_mb is None or row.bytes <= self.size_mb * MB

    def refuse(self, rows: Sequence["Row"]) -> BingoError:
        """The error where no row is within it: what is nearest."""
        small = [row for row in rows if self._small(row)]
        if small:
            best = min(small, key=lambda row: row.p50_ms)
            found = f"the fastest is {best.student} at {best.px} px with {best.p50_ms:.3g} ms"
            way = f"raise --latency-ms to {_above(best.p50_ms)}"
            return BingoError(f"--latency-ms: expected a student {self.describe()}, found none: {found}; {way}")
        best = min(rows, key=lambda row: row.bytes)
        found = f"the smallest is {best.student} with {best.bytes / MB:.3g} MB"
        way = f"raise --size-mb to {_above(best.bytes / MB)} (int8 takes about a quarter: export --format onnx-int8)"
        return BingoError(f"--size-mb: expected a student {self.describe()}, found none: {found}; {way}")


class Row(NamedTuple):
    """A student at an input size as it was measured. stated: ImageNet top-1 in percent at stated_px; estimate: at px;
    None where nothing is stated.
    """

    student: str
    px: int
    p50_ms: float
    p90_ms: float
    bytes: int
    parameters: int
    stated: float | None
    stated_px: int | None
    estimate: float | None

    @property
    def name(self) -> str:
        """One word, also for a file."""
        return f"{self.student}-{self.px}"


def read_profile(file: Path) -> dict[str, Any]:
    """What `bingo-edge measure` wrote. Raises BingoError for anything else."""
    expected = "--on: expected the profile.json that `bingo-edge measure` wrote, found"
    if not file.is_file():
        raise BingoError(f"{expected} no file at {file}; check the path")
    try:
        profile = json.loads(file.read_text(encoding="utf-8"))
        sound = profile["format"] == 1 and isinstance(profile["machine"]["name"], str) and profile["runtime"]
        sound = sound and profile["threads"] > 0 and profile["files"]
        for times in profile["files"].values():
            sound = sound and isinstance(times["sha256"], str)
            sound = sound and all(0 < times[key] < math.inf for key in ("p50_ms", "p90_ms"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BingoError(
            f"{expected} something else in {file} ({type(error).__name__}: {error}); measure again"
        ) from None
    if not sound:
        raise BingoError(f"{expected} values in {file} that it does not write; measure again")
    return dict(profile)


def measured(sizes: Sequence[Size], profile: dict[str, Any], where: str) -> list[Row]:
    """A row for each size that the profile has times of. where: the profile, for messages. Raises BingoError where it
    was made from other files.
    """
    times = {size: profile["files"][size.file] for size in sizes if size.file in profile["files"]}
    other = [size.file for size, found in times.items() if found["sha256"] != size.sha256]
    if other or not times:
        found = f"{len(other)} that are others, first {other[0]}" if other else "none of them"
        raise BingoError(
            f"--on: expected times of the {len(sizes)} files of these versions of timm, torch and onnx in {where},"
            f" found {found}; write them anew (suggest --files FOLDER) and measure again"
        )
    rows = []
    for size, found in times.items():
        stated = STUDENTS.get(size.student)
        about = (stated.top1, stated.px, estimated(size.student, size.px)) if stated else (None, None, None)
        rows.append(Row(size.student, size.px, found["p50_ms"], found["p90_ms"], size.bytes, size.parameters, *about))
    return rows


def ranked(rows: Sequence[Row], budget: Budget) -> list[Row]:
    """One row a student, its best within the budget, best first by RULE; of equal ones the faster. Raises BingoError
    where there is none.
    """
    within = sorted(filter(budget.holds, rows), key=_order)
    if not within:
        raise budget.refuse(rows)
    best: dict[str, Row] = {}
    for row in within:
        best.setdefault(row.student, row)
    return list(best.values())


def _order(row: Row) -> tuple[float, ...]:
    if row.estimate is None:
        return (math.inf, -row.parameters, -row.px)
    return (-round(row.estimate, 3), row.p50_ms)


def _above(value: float) -> str:
    """A number of two digits that is not below `value`."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step) * step:.2g}"
