"""All that is known of a run when its page is written, read from its folder: whatever is not there is empty."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bingo_compress.html_report import mistakes
from bingo_compress.html_report.looks import Looks
from bingo_compress.models import exported
from bingo_compress.presenting import timing_table
from bingo_compress.recipe import Recipe, load_recipe
from bingo_compress.runtime.run_dir import RunDir, made_by, read_json
from bingo_compress.training.metrics import seconds_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """name: what the page calls the run; lines: of metrics.jsonl; seconds: of training; proof: of validation.json, {}
    where it is of another student; wrong: as `mistakes.load` gives it; files: contracts of the exported files; timed:
    rows of their latencies, those of files that are there; bad: (name, reason) of files that were not used; looks: None
    where the run's images are not there any more.
    """

    name: str
    path: str
    recipe: Recipe
    summary: dict[str, Any]
    lines: Sequence[Row]
    seconds: float
    proof: dict[str, Any]
    wrong: Sequence[Row]
    files: Sequence[Row]
    timed: Sequence[Row]
    bad: Sequence[tuple[str, str]]
    looks: Looks | None

    def row(self, name: str) -> Row:
        """A model's figures in the proof, {} where it has none."""
        return next((row for row in self.proof.get("rows", ()) if row["name"] == name), {})

    def proven(self, contract: Row) -> Row:
        """A file's figures in the proof, {} where it has none."""
        return next((row for row in self.proof.get("rows", ()) if row.get("sha256") == contract["sha256"]), {})

    def timing(self, contract: Row) -> Row:
        """A file's latency with one thread, {} where it was not timed."""
        return next((row for row in self.timed if row["sha256"] == contract["sha256"] and row["threads"] == 1), {})


def read(run: RunDir, name: str, looks: Looks | None) -> Facts:
    """Read a finished run. Raises BingoError for a file that is not what a command wrote."""
    summary = read_json("distill", run.summary)
    proof = read_json("validate", run.validation)
    with made_by("validate", run.validation):
        student: Row = next((row for row in proof.get("rows", ()) if row["name"] == "student"), {})
        if student.get("weights") != exported.weights_digest(run.student):
            proof, student = {}, {}
    files = [exported.contract(file) for file in exported.files(run.export).values()]
    there = {contract["sha256"] for contract in files}
    with made_by("export", run.export / exported.LATENCY):
        rows = read_json("export", run.export / exported.LATENCY).get("rows", [])
        timed = [row for row in rows if row.get("sha256") in there]
    with made_by("distill", run.metrics):
        lines, seconds = (_lines(run), seconds_of(run.metrics)) if run.metrics.is_file() else ([], 0.0)
    return Facts(
        name,
        str(run.path.resolve()),
        load_recipe(run.as_run),
        summary,
        lines,
        seconds,
        proof,
        mistakes.load(run, student) if student else [],
        files,
        timed,
        _bad(run),
        looks,
    )


def proven_on(facts: Facts) -> tuple[str, ...]:
    """What labelled runs must share for their figures to compare: the same images, however their place was spelt."""
    of = facts.proof["protocol"]
    images = (of.get(f"{part}_digest", of.get(part)) for part in ("bank", "test"))
    return tuple(map(str, (*images, *(of.get(key) for key in ("test_images", "bank_images", "classes")))))


def recalled_on(facts: Facts) -> tuple[str, ...]:
    """What runs must share for their neighbour recalls to compare."""
    recall, recipe = facts.summary["neighbour_recall"], facts.recipe
    counts = (recall[key] for key in ("k", "queries", "gallery"))
    return tuple(map(str, (recipe.data, recipe.teacher, recipe.teacher_weights, *counts)))


def timed_on(facts: Facts) -> str:
    """What runs must share for the times of their files to compare, in words; "" where none was timed."""
    return timing_table.where(facts.timed[0]) if facts.timed else ""


def grouped(runs: Sequence[Facts], key: Callable[[Facts], Any]) -> list[list[Facts]]:
    """The runs that share a key together, in the order of the page."""
    groups: dict[Any, list[Facts]] = {}
    for facts in runs:
        groups.setdefault(key(facts), []).append(facts)
    return list(groups.values())


def called(runs: Sequence[Facts]) -> str:
    """The names of runs."""
    return ", ".join(facts.name for facts in runs)


def measured_on(runs: Sequence[Facts]) -> str:
    """What the figures of labelled runs are of; where they differ in `proven_on`, that they do not compare."""
    return _each(grouped(runs, proven_on), _measured, "They were measured on different images or with different banks")


def sought_on(runs: Sequence[Facts]) -> str:
    """The same of neighbour recalls, by `recalled_on`."""
    return _each(grouped(runs, recalled_on), _sought, "Their images, neighbours or teachers are different")


def _measured(facts: Facts) -> str:
    of = facts.proof["protocol"]
    return f"{of['test_images']:,} test images, a bank of {of['bank_images']:,}, {len(of['classes']):,} classes."


def _sought(facts: Facts) -> str:
    recall = facts.summary["neighbour_recall"]
    return (
        f"{recall['queries']:,} held-out images, each sought among {recall['gallery']:,}; by chance"
        f" {recall['k'] / recall['gallery']:.3f}."
    )


def apart(runs: Sequence[Facts]) -> list[str]:
    """Where the exported files of runs were timed, and what of times and figures does not compare."""
    timed = grouped([facts for facts in runs if facts.timed], timed_on)
    said = [f"Timed on {timed_on(timed[0][0])}."] if len(timed) == 1 else []
    if len(timed) > 1:
        said = [f"{called(group)}: timed on {timed_on(group[0])}." for group in timed]
        said.append("Times of different machines or batches do not compare.")
    if len(grouped([facts for facts in runs if facts.files and facts.proof], proven_on)) > 1:
        said.append("kNN and linear are of different images, as above, and do not compare either.")
    return said


def _each(groups: Sequence[Sequence[Facts]], words: Callable[[Facts], str], apart: str) -> str:
    if len(groups) == 1:
        return words(groups[0][0])
    each = " ".join(f"{called(group)}: {words(group[0])}" for group in groups)
    return f"{each} {apart}: figures of one chart do not compare with those of another."


def _lines(run: RunDir) -> list[Row]:
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if float(line["step"]) >= 0 and float(line["seconds"]) >= 0]


def _bad(run: RunDir) -> list[tuple[str, str]]:
    if not run.quarantine.is_file():
        return []
    with (
        made_by("distill", run.quarantine),
        run.quarantine.open(newline="", encoding="utf-8", errors="replace") as file,
    ):
        rows = csv.reader(file)
        next(rows)
        return [(name, reason) for name, reason in rows]
