"""`runs`: what lies in a folder of runs, best first among those whose figures compare."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bingo_compress.errors import BingoError
from bingo_compress.html_report import facts
from bingo_compress.models import exported
from bingo_compress.presenting import caveats, timing_table
from bingo_compress.presenting.markdown import shown
from bingo_compress.recipe import Recipe, load_recipe
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import RunDir, made_by, refuse_no_file, write_text

HEADER = ("run", "student", "teacher", "epochs", "linear", "kNN", "recall, before", "file", "ms a picture")
DEEP = 3  # folders below the one that is named
RANKED = {"linear": "best linear probe first", "recall": "best neighbour recall first"}


def runs(folder: Path, json_file: Path | None = None) -> list[dict[str, Any]]:
    """Print the runs in a folder, at most DEEP folders down, a table for those whose figures compare, and return its
    rows, which go to `json_file` too: run, student, teacher, epochs, state, of (what it was measured on), and, of a
    finished run as far as it has them, linear, knn, recall, recall_before, recall_of (what it was measured on), caveats
    of its figures, file and bytes of the smallest exported file, its p50_ms (a picture: of a fixed batch its share) and
    timed_on (machine and batch).

    First those that were validated, a table for each test set and bank, by the linear probe; then those that were not,
    a table for each set of images held out and teacher, by neighbour recall; then what has no figures or is not
    finished. Raises BingoError where there is no run, or one that is not as `distill` wrote it.
    """
    refuse_no_file(json_file, "--json")
    found = [RunDir(path) for path in _paths(folder)]
    if not found:
        raise BingoError(f"DIR: expected a folder with runs of distill in it, found none in {folder}; name another")
    rows = sorted((_row(run, folder) for run in found), key=_rank)
    groups = [list(group) for _, group in itertools.groupby(rows, key=_group)]
    for group in groups:
        console.table(_title(folder, group), HEADER, [_cells(row) for row in group])
    for line in (*_apart(groups), *(f"{row['run']}: {caveat}" for row in rows for caveat in row.get("caveats", ()))):
        console.say(line)
    if json_file:
        write_text(json_file, json.dumps(rows, indent=2) + "\n")
    return rows


def _paths(folder: Path) -> list[Path]:
    """Folders with a recipe and a place for checkpoints or a student: what `distill` begins."""
    depths = [folder, *(path for deep in range(1, DEEP + 1) for path in sorted(folder.glob("/".join("*" * deep))))]
    return [path for path in depths if (path / "recipe.yaml").is_file() and (path / "resolved.yaml").is_file()]


def _row(run: RunDir, folder: Path) -> dict[str, Any]:
    recipe = load_recipe(run.as_run)
    name = str(run.path.relative_to(folder)) if run.path != folder else run.path.name
    row: dict[str, Any] = {"run": name, "student": recipe.student, "teacher": recipe.teacher, "epochs": recipe.epochs}
    if not (run.summary.is_file() and run.student.is_file()):
        return row | {"state": "not finished", "of": ""}
    known = facts.read(run, name, None)
    recall, student = known.summary.get("neighbour_recall") or {}, known.row("student")
    with made_by("distill", run.summary):
        of = {"recall_of": _recalled(recall, recipe)} if recall else {}
    with made_by("validate", run.validation):
        of["of"] = _proven(known.proof["protocol"]) if student else of.get("recall_of", "")
        if student:
            of["images"] = " ".join(facts.proven_on(known))
    smallest = min(known.files, key=lambda contract: int(contract["bytes"]), default={})
    time = known.timing(smallest) if smallest else {}
    with made_by("export", run.export / exported.LATENCY):
        timed = {"p50_ms": timing_table.picture_ms(time), "timed_on": timing_table.where(time)} if time else {}
    figures = {
        "linear": student.get("linear"),
        "knn": student.get("knn"),
        "recall": recall.get("student"),
        "recall_before": recall.get("start"),
        "bytes": smallest.get("bytes"),
        "file": smallest.get("file"),
        "caveats": caveats.near_copies(known.proof["protocol"]) if student else None,
    }
    told = {key: value for key, value in figures.items() if value is not None}
    told |= {f"{key}_interval": student[f"{key}_interval"] for key in ("linear", "knn") if f"{key}_interval" in student}
    return row | told | timed | of | {"state": "finished"}


def _proven(of: Mapping[str, Any]) -> str:
    """What labelled runs must share for their figures to compare. of: a protocol."""
    return (
        f"tested on {of['test']} ({of['test_images']:,} images of {len(of['classes']):,} classes), bank {of['bank']}"
        f" ({of['bank_images']:,})"
    )


def _recalled(recall: Mapping[str, Any], recipe: Recipe) -> str:
    """The same for neighbour recalls."""
    data = " ".join(map(str, recipe.data)) if isinstance(recipe.data, list | tuple) else str(recipe.data)
    return (
        f"{recall['queries']:,} images held out of {data}, {recall['k']:,} neighbours among {recall['gallery']:,},"
        f" teacher {recipe.teacher} ({recipe.teacher_weights})"
    )


def _group(row: Mapping[str, Any]) -> tuple[int, str]:
    place = next((place for place, key in enumerate(RANKED) if key in row), len(RANKED))
    return place, row.get("images", row["of"]) if place < len(RANKED) else ""


def _rank(row: Mapping[str, Any]) -> tuple[Any, ...]:
    figure = next((row[key] for key in RANKED if key in row), 0.0)
    return *_group(row), -figure, row["state"] != "finished", row["run"]


def _title(folder: Path, group: Sequence[Mapping[str, Any]]) -> str:
    count = f"{folder}: {len(group):,} run{'s' if len(group) > 1 else ''}"
    best = next((words for key, words in RANKED.items() if key in group[0]), "")
    return f"{count}, {best}: {group[0]['of']}" if best else f"{count} without figures"


def _apart(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """What of the tables does not compare."""
    said = []
    if len([group for group in groups if group[0]["of"]]) > 1:
        said.append("figures of different images or banks do not compare; those of one table do")
    if any(len({row["recall_of"] for row in group if "recall_of" in row}) > 1 for group in groups):
        said.append(
            "recall of different images held out, or different teachers, does not compare, not in one table either"
        )
    timed: dict[str, list[str]] = {}
    for row in itertools.chain(*groups):
        if "timed_on" in row:
            timed.setdefault(row["timed_on"], []).append(row["run"])
    if len(timed) > 1:
        each = "; ".join(f"{', '.join(names)} on {where}" for where, names in timed.items())
        said.append(f"times of different machines or batches do not compare: {each}")
    return said


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["run"],
        row["student"],
        row["teacher"],
        f"{row['epochs']:,}" if row["state"] == "finished" else row["state"],
        *(shown(row, key) if key in row else "-" for key in ("linear", "knn")),
        f"{row['recall']:.3f}, {row['recall_before']:.3f}" if "recall_before" in row else "-",
        f"{row['file'].removeprefix(exported.STEM)[1:]} {console.size(row['bytes'])}" if "bytes" in row else "-",
        timing_table.milliseconds(row["p50_ms"]) if "p50_ms" in row else "-",
    ]
