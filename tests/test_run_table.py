"""`runs`: every run in a folder with its figures, best first, and what is no run left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Ran, untrained_run
from test_cli import one_error

from bingo_compress import run_table
from bingo_compress.models import exported
from bingo_compress.runtime.run_dir import RunDir


def known(folder: Path, linear: float | None, recall: float | None) -> RunDir:
    """A run that says of itself what it is given."""
    run = untrained_run(folder, 1)
    run.resolved.write_bytes(run.recipe.read_bytes())
    told: dict[str, Any] = {"run_id": "abc"}
    if recall is not None:
        told["neighbour_recall"] = {"student": recall, "start": 0.1}
    run.summary.write_text(json.dumps(told))
    if linear is not None:
        student = {"name": "student", "weights": exported.weights_digest(run.student), "linear": linear, "knn": 0.5}
        student |= {"linear_interval": [linear - 0.1, linear + 0.1], "knn_interval": [0.4, 0.6]}
        run.validation.write_text(json.dumps({"protocol": {"test": "t"}, "rows": [student]}))
    return run


def test_runs_are_listed_best_first_and_what_is_none_is_not(
    tmp_path: Path, bingo: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    known(tmp_path / "a", 0.6, 0.3)
    known(tmp_path / "b", 0.8, None)
    known(tmp_path / "c", None, 0.9)
    known(tmp_path / "d", None, None).summary.unlink()
    (tmp_path / "holiday").mkdir()
    ran = bingo("runs", tmp_path, "--json", tmp_path / "runs.json")
    assert ran.status == 0, ran.err
    rows = json.loads((tmp_path / "runs.json").read_text())
    assert [(row["run"], row["state"]) for row in rows] == [
        ("b/run", "finished"),
        ("a/run", "finished"),
        ("c/run", "finished"),
        ("d/run", "not finished"),
    ]
    assert "0.800 [0.700, 0.900]" in ran.out and "0.300, 0.100" in ran.out
    assert "figures of different images do not compare" in ran.out
    assert run_table.runs(tmp_path / "a" / "run")[0]["run"] == "run"


def test_a_folder_without_runs_is_one_line(tmp_path: Path, bingo: Callable[..., Ran]) -> None:
    one_error(bingo("runs", tmp_path), "expected a folder with runs of distill in it")
    one_error(bingo("runs", tmp_path / "gone"), "found none")
