"""`runs`: what lies in a folder of runs, best first."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bingo_compress.errors import BingoError
from bingo_compress.html_report import facts
from bingo_compress.models import exported
from bingo_compress.presenting.markdown import shown
from bingo_compress.recipe import Recipe, load_recipe
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import RunDir, refuse_no_file, write_text

HEADER = ("run", "student", "teacher", "epochs", "linear", "kNN", "recall, before", "file", "p50 ms")
DEEP = 3  # folders below the one that is named


def runs(folder: Path, json_file: Path | None = None) -> list[dict[str, Any]]:
    """Print a table of the runs in a folder, at most DEEP folders down, and return its rows, which go to `json_file`
    too: run, student, teacher, epochs, state, of (the images it was measured on), and, of a finished run as far as it
    has them, linear, knn, recall, recall_before, file, bytes and p50_ms of the smallest exported file.

    Best first: those that were validated by the linear probe, then those that were not by neighbour recall, then what
    is not finished. Raises BingoError where there is no run, or one that is not as `distill` wrote it.
    """
    refuse_no_file(json_file, "--json")
    found = [RunDir(path) for path in _paths(folder)]
    if not found:
        raise BingoError(f"DIR: expected a folder with runs of distill in it, found none in {folder}; name another")
    rows = sorted((_row(run, folder) for run in found), key=_rank)
    console.table(f"{folder}: {len(rows):,} runs, best first", HEADER, [_cells(row) for row in rows])
    if len({row["of"] for row in rows if row["of"]}) > 1:
        console.say("not all were measured on the same images: figures of different images do not compare")
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
    smallest = min(known.files, key=lambda contract: int(contract["bytes"]), default={})
    figures = {
        "linear": student.get("linear"),
        "knn": student.get("knn"),
        "recall": recall.get("student"),
        "recall_before": recall.get("start"),
        "bytes": smallest.get("bytes"),
        "file": smallest.get("file"),
        "p50_ms": known.timing(smallest).get("p50_ms") if smallest else None,
    }
    of = f"{known.proof.get('protocol', {}).get('test', '')} {_data(recipe)}".strip()
    told = {key: value for key, value in figures.items() if value is not None}
    told |= {f"{key}_interval": student[f"{key}_interval"] for key in ("linear", "knn") if f"{key}_interval" in student}
    return row | told | {"state": "finished", "of": of}


def _data(recipe: Recipe) -> str:
    return " ".join(map(str, recipe.data)) if isinstance(recipe.data, list | tuple) else str(recipe.data)


def _rank(row: Mapping[str, Any]) -> tuple[int, float, str]:
    for place, key in enumerate(("linear", "recall")):
        if key in row:
            return place, -row[key], row["run"]
    return (2 if row["state"] == "finished" else 3), 0.0, row["run"]


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["run"],
        row["student"],
        row["teacher"],
        f"{row['epochs']:,}" if row["state"] == "finished" else row["state"],
        *(shown(row, key) if key in row else "-" for key in ("linear", "knn")),
        f"{row['recall']:.3f}, {row['recall_before']:.3f}" if "recall_before" in row else "-",
        f"{row['file'].removeprefix(exported.STEM)[1:]} {console.size(row['bytes'])}" if "bytes" in row else "-",
        f"{row['p50_ms']:.1f}" if "p50_ms" in row else "-",
    ]
