"""What a tracker is told of a run: every line of metrics.jsonl once and in order, pictures of bags, and no word that
stops the run.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import photos

from bingo_compress import distill, loggers
from bingo_compress.errors import BingoError
from bingo_compress.runtime.run_dir import RunDir

PIXELS = np.zeros((4, 5, 3), np.uint8)


class Told(SimpleNamespace):
    """A client that keeps what it is told."""

    def client(self, run: RunDir) -> loggers.Client:
        self.lines, self.pictures, self.closed = [], [], 0

        def close() -> None:
            self.closed += 1

        return loggers.Client(
            lambda figures, step: self.lines.append((step, figures)),
            lambda title, pixels: self.pictures.append((title, pixels.shape)),
            close,
        )


def line(step: int) -> str:
    return (
        json.dumps({"step": step, "loss": 1 / step, "share_student": 0.9, "memory": 5, "lr": None, "time": 1.0}) + "\n"
    )


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(loggers, "_open", lambda name, run: told.client(run))
    monkeypatch.setattr(loggers, "SECONDS", 0.01)
    return told


def test_every_line_is_told_once_in_order_and_half_a_line_never(tmp_path: Path, told: Told) -> None:
    run = RunDir(tmp_path)
    run.metrics.write_text(line(1))
    with loggers.following("tensorboard", run) as picture:
        picture("bag", PIXELS)
        with run.metrics.open("a") as handle:
            handle.write(line(2) + line(3)[:9])
    assert [step for step, _ in told.lines] == [1, 2]
    assert told.lines[0][1] == {"train/loss": 1.0, "time/student": 0.9, "run/memory": 5}
    assert told.pictures == [("bag", (4, 5, 3))] and told.closed == 1


@pytest.mark.parametrize("when", ["it is opened", "it is told"])
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*words: Any) -> None:
        raise OSError("no such host")

    monkeypatch.setattr(
        loggers, "_open", fail if when == "it is opened" else lambda name, run: loggers.Client(fail, fail, fail)
    )
    monkeypatch.setattr(loggers, "SECONDS", 0.01)
    run = RunDir(tmp_path)
    run.metrics.write_text(line(1) + line(2))
    with loggers.following("wandb", run) as picture:
        picture("bag", PIXELS)
    out, err = capsys.readouterr()
    assert err.count("no such host") == 1 and "loss" not in out


@pytest.mark.parametrize(
    ("name", "said"), [("tensorbord", "expected tensorboard, wandb, mlflow"), ("wandb", r"\[wandb\]")]
)
def test_what_is_not_there_is_refused_before_the_run(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    data, weights = photos(tmp_path / "photos", 1), {"teacher_weights": "random", "student_weights": "random"}
    with pytest.raises(BingoError, match=said):
        distill(data=data, teacher="test_resnet", student="test_vit", out=tmp_path / "run", logger=name, **weights)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tensorboard_reads_what_it_was_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir(tmp_path)
    run.metrics.write_text(line(1) + line(2))
    for _ in range(2):  # a run that goes on tells all again, and nothing stands there twice
        with loggers.following("tensorboard", run) as picture:
            picture("bag", PIXELS)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert found.Tags()["images"] == ["bag"]
