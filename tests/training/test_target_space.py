"""A run learns towards the targets that it began with, wherever it goes on: the space that they are in is kept."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import interrupted_at, photos, recipe, turned

from bingo_compress import pipeline
from bingo_compress.errors import BingoError
from bingo_compress.features import targets
from bingo_compress.runtime import checkpoint
from bingo_compress.training import loop

KINDS: list[dict[str, Any]] = [{}, {"stored_as": "int8"}, {"views": "online"}, {"method": "coss"}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos"), 6)


def begun(data: Path, out: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe of a run in `out` with a save, that stopped after it."""
    chosen = recipe(data=str(data), save_every_steps=1, **changes)
    with interrupted_at(monkeypatch, loop, "train_step", 4), pytest.raises(KeyboardInterrupt):
        pipeline.run_distill(chosen, out)
    return chosen


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_run_that_goes_on_elsewhere_keeps_its_target_space(
    changes: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = begun(data, tmp_path / "parts", changes, monkeypatch)
    whole = checkpoint.load(pipeline.run_distill(chosen, tmp_path / "whole").student)[0]
    monkeypatch.setattr(targets, "target_space", turned(targets.target_space))
    parts = checkpoint.load(pipeline.run_distill(chosen, tmp_path / "parts", resume=True).student)[0]
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_run_whose_target_space_is_lost_goes_on_if_the_same_one_is_fitted(
    changes: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = begun(data, tmp_path / "run", changes, monkeypatch)
    (home,) = tmp_path.glob("run/work/teacher-*/targets-*")
    shutil.rmtree(home)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(targets, "target_space", turned(targets.target_space))
        with pytest.raises(BingoError, match="is of another run; what differs: target space"):
            pipeline.run_distill(chosen, tmp_path / "run", resume=True)
    shutil.rmtree(home)
    pipeline.run_distill(chosen, tmp_path / "run", resume=True)
