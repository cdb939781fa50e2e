"""What the functions of api.py return."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A measured value with the ends of its 95% interval; shares in 0..1, not percent."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Distilled:
    """A finished run: its folder, the student's weights, `timm`: a folder that timm.create_model reads (None for a
    student that timm does not know), and, without labels, how many of the teacher's neighbours models keep, with
    intervals.
    """

    run: Path
    student: Path
    timm: Path | None
    run_id: str
    neighbour_recall: Mapping[str, Any]


@dataclass(frozen=True)
class Embedded:
    """What an array job left in the folder of a run: whether the images of all jobs are decoded, and whether they are
    embedded too, so that `distill` with resume=True goes on there.
    """

    run: Path
    decoded: bool
    embedded: bool


@dataclass(frozen=True)
class Validation:
    """A proof: `figures[model][name]` of teacher, student, start, random, onnx, onnx-fp16, onnx-int8 and against;
    `protocol`: how each was measured; `rows`: all that is in `file`, RUN/validation.json.
    """

    file: Path
    figures: Mapping[str, Mapping[str, Figure]]
    protocol: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Exported:
    """The files of an export, and the card that says what they are."""

    files: tuple[Path, ...]
    card: Path


@dataclass(frozen=True)
class Comparison:
    """A table of methods: its folder, with table.txt, .json, .csv and .svg, and what is in table.json."""

    out: Path
    table: Mapping[str, Any]


@dataclass(frozen=True)
class Suggestion:
    """A student at an input size: milliseconds (median), bytes of its float file, parameters, ImageNet top-1 in percent
    as it is stated (None: not) and estimated at this size, and, where it was tried, neighbour recall by passes.
    """

    student: str
    image_size: int
    p50_ms: float
    bytes: int
    parameters: int
    stated: float | None
    estimate: float | None
    neighbour_recall: Mapping[float, float]


@dataclass(frozen=True)
class Timing:
    """What a file takes with a count of threads: milliseconds, bytes, and its p50 as a multiple of the first file's,
    with least and most over parts of the runs.
    """

    file: str
    threads: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p50_ratio: Figure
    load_ms: float
    peak_bytes: int
    bytes: int


@dataclass(frozen=True)
class Verified:
    """What a toolchain made of a file: verdict is right, wrong, cannot run it, crashed, too slow or not installed;
    min_cosine, max_difference (of an output's largest value) and max_of_spread (the largest error, of the distance of
    pictures from their mean): over golden pictures and outputs, None where none came.
    """

    toolchain: str
    version: str
    verdict: str
    cause: str
    min_cosine: float | None = None
    max_difference: float | None = None
    max_of_spread: float | None = None
