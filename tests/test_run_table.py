"""`runs`: every run in a folder with its figures, best first, and what is no run left out."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from helpers import Ran, untrained_run
from test_cli import one_error

from bingo_compress import run_table
from bingo_compress.html_report import facts
from bingo_compress.html_report.facts import Facts
from bingo_compress.models import exported
from bingo_compress.runtime.run_dir import RunDir

RECALL = {"start": 0.1, "k": 20, "queries": 50, "gallery": 900}
PROVEN = {"test": "t", "test_images": 40, "bank": "b", "bank_images": 60, "classes": ["x", "y"]}
MACHINE = {"processor": "Some CPU", "cores": 2, "system": "Linux", "onnxruntime": "1.0", "int8": "AVX2 only"}


def known(folder: Path, linear: float | None, recall: float | None, **of: Any) -> RunDir:
    """A run that says of itself what it is given. of: what its proof was made on, where not as PROVEN."""
    run = untrained_run(folder, 1)
    run.resolved.write_bytes(run.recipe.read_bytes())
    told: dict[str, Any] = {"run_id": "abc"}
    if recall is not None:
        told["neighbour_recall"] = {**RECALL, "student": recall}
    run.summary.write_text(json.dumps(told))
    if linear is not None:
        student = {"name": "student", "weights": exported.weights_digest(run.student), "linear": linear, "knn": 0.5}
        student |= {"linear_interval": [linear - 0.1, linear + 0.1], "knn_interval": [0.4, 0.6]}
        run.validation.write_text(json.dumps({"protocol": PROVEN | of, "rows": [student]}))
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
    assert "figures of different images or banks do not compare" in ran.out
    assert run_table.runs(tmp_path / "a" / "run")[0]["run"] == "run"


def test_runs_that_were_proven_otherwise_are_not_ranked_in_one_table(tmp_path: Path, printed: Any) -> None:
    near = {"test_images_near_bank": 9, "test_share_near_bank": 0.225}
    for name, linear, of in (
        ("a", 0.6, {}),
        ("b", 0.9, {"bank": "other"}),
        ("c", 0.7, {}),
        ("d", 1.0, {"bank_images": 70, "near_copies": near}),
        ("e", 0.8, {"test": "s"}),
    ):
        known(tmp_path / name, linear, 0.3, **of)
    found = run_table.runs(tmp_path)
    assert [[row["run"][0] for row in rows] for _, rows in groupby(found, key=lambda row: row["of"])] == [
        ["e"],
        ["c", "a"],
        ["d"],
        ["b"],
    ]
    said = " ".join(printed.getvalue().split())
    assert said.count("best linear probe first") == 4 and "figures of different images or banks do not compare" in said
    assert "d/run: 9 of the 40 test images (22.5%) have a near-copy in the bank" in said
    assert "recall of different images held out" in said  # of a and c, each its own photos


def test_recall_is_ranked_among_runs_of_the_same_images_and_teacher(tmp_path: Path, printed: Any) -> None:
    for name, recall in (("a", 0.4), ("b", 0.5), ("c", 0.9)):
        run = known(tmp_path / name, None, recall)
        text = re.sub("data: .*", "data: photos", run.resolved.read_text())
        run.resolved.write_text(text.replace("test_resnet", "test_vit") if name == "c" else text)
    assert [row["run"][0] for row in run_table.runs(tmp_path)] == ["b", "a", "c"]
    said = " ".join(printed.getvalue().split())
    assert "2 runs, best neighbour recall first" in said and "teacher test_vit (random)" in said


def test_times_are_a_picture_s_and_those_of_other_machines_are_told(
    tmp_path: Path, printed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = {"sha256": "s", "bytes": 10**6, "file": "student.onnx"}
    real = facts.read

    def timed(run: RunDir, name: str, looks: None) -> Facts:
        batch = {"a/run": 1, "b/run": 8}[name]
        row = {"sha256": "s", "threads": 1, "p50_ms": 40.0, "batch": batch, "machine": MACHINE}
        return replace(real(run, name, looks), files=[contract], timed=[row])

    monkeypatch.setattr(facts, "read", timed)
    for name in "ab":
        known(tmp_path / name, 0.5, None)
    assert [row["p50_ms"] for row in run_table.runs(tmp_path)] == [40.0, 5.0]
    said = " ".join(printed.getvalue().split())
    assert "a/run on Some CPU" in said and "b/run on Some CPU, 2 cores" in said and "in batches of 8" in said
    assert "times of different machines or batches do not compare" in said


def test_a_folder_without_runs_is_one_line(tmp_path: Path, bingo: Callable[..., Ran]) -> None:
    one_error(bingo("runs", tmp_path), "expected a folder with runs of distill in it")
    one_error(bingo("runs", tmp_path / "gone"), "found none")
