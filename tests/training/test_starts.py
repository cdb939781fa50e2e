"""How a student learns that knows something already, and what the queue begins with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, encoder, planned, recipe
from test_loop import IMAGES, equal, train

from bingo_compress import unread
from bingo_compress.errors import BingoError
from bingo_compress.features.targets import StoredTargets, TargetSpace
from bingo_compress.recipe import make_recipe
from bingo_compress.training import metrics, plan
from bingo_compress.training.losses import Batch, Bingo


def backbone(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.backbone.state_dict().items()}


def test_the_head_learns_alone_first_and_then_the_student_at_its_own_rate(tmp_path: Path) -> None:
    chosen = recipe(epochs=4, head_first=0.5, backbone_lr=0.1, optimizer="sgd", lr=0.05)
    before = backbone(encoder("test_resnet", 32, seed=5))
    half = train(tmp_path / "half", chosen, stop_after=10)
    assert all(torch.equal(value, before[name]) for name, value in backbone(half.student).items())
    whole = train(tmp_path / "whole", chosen)
    assert not any(
        torch.equal(value, before[name]) for name, value in backbone(whole.student).items() if "conv1.weight" in name
    )
    rate = planned(chosen, IMAGES).schedule.backbone_rate
    assert rate(9) == 0 and rate(10) == pytest.approx(0.005) and rate(15) == pytest.approx(0.0025)


def test_stopped_in_either_part_it_goes_on_to_the_same_student(tmp_path: Path) -> None:
    chosen = recipe(epochs=4, head_first=0.5, backbone_lr=0.1, norms="frozen")
    whole = train(tmp_path / "whole", chosen)
    for stop in (7, 10, 13):
        train(tmp_path / str(stop), chosen, stop_after=stop)
        assert equal(train(tmp_path / str(stop), chosen), whole)


def test_frozen_norms_keep_their_statistics_and_still_learn(tmp_path: Path) -> None:
    before = backbone(encoder("test_resnet", 32, seed=5))
    for norms in ("frozen", "learnt"):
        after = backbone(train(tmp_path / norms, recipe(epochs=2, norms=norms)).student)
        kept = [torch.equal(after[name], value) for name, value in before.items() if "running" in name]
        assert kept and all(kept) == (norms == "frozen") and any(kept) == (norms == "frozen")
        assert not torch.equal(after["bn1.weight"], before["bn1.weight"])


def test_a_queue_that_begins_with_targets_holds_as_many_as_it_can_of_the_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "LOG_SECONDS", 0.0)
    real, held = Bingo.__call__, list[torch.Tensor]()

    def recorded(loss: Any, batch: Batch) -> Any:
        held.append(batch.negatives.argmax(1))  # the target of image i is the unit vector i
        return real(loss, batch)

    monkeypatch.setattr(Bingo, "__call__", recorded)
    source = StoredTargets(torch.eye(IMAGES)[:, None], TargetSpace(None, None), CPU)
    lines = train(tmp_path, recipe(epochs=1, queue_start="targets"), source, IMAGES).lines
    assert sorted(held[0].tolist()) == list(range(IMAGES)) and lines[0]["loss"] > 1
    held.clear()
    train(tmp_path / "short", recipe(epochs=1, queue_start="targets", queue_size=12), source, IMAGES)
    assert len(set(held[0].tolist())) == 12


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("random", (100, 1.0, 0.0, "learnt")),
        ("given", (100, 1.0, 0.0, "learnt")),
        ("pretrained", (10, 0.1, 0.25, "frozen")),
        ("student.safetensors", (10, 0.1, 0.25, "frozen")),
    ],
)
def test_what_a_student_begins_with_decides_what_is_left_open(weights: str, expected: tuple[Any, ...]) -> None:
    keys = ("epochs", "backbone_lr", "head_first", "norms")
    found = plan.settle(make_recipe({"student_weights": weights}, "test"))
    assert tuple(getattr(found, key) for key in keys) == expected
    asked = {"epochs": 7, "backbone_lr": 0.5, "head_first": 0.0, "norms": "learnt"}
    found = plan.settle(make_recipe({"student_weights": weights, **asked}, "test"))
    assert {key: getattr(found, key) for key in keys} == asked


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "targets"),
        ({"variant": "paper"}, "empty"),
        ({"variant": "official"}, "empty"),
        ({"method": "seed"}, "empty"),
        ({"views": "online"}, "empty"),
        ({"method": "seed", "queue_start": "targets"}, "targets"),
    ],
)
def test_the_queue_begins_as_the_method_was_published_but_for_ours(settings: dict[str, Any], expected: str) -> None:
    assert plan.settle(make_recipe(settings, "test")).queue_start == expected


def test_a_queue_of_targets_is_refused_where_there_are_none() -> None:
    for settings in ({"views": "online"}, {"method": "moco"}, {"method": "disco"}, {"method": "simreg"}):
        with pytest.raises(BingoError, match="queue_start"):
            unread.refuse_unread(
                [make_recipe({**settings, "queue_start": "targets"}, "test")], {"queue_start": "targets"}, "t"
            )


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"student_weights": "pretrained", "epochs": 3}, 15 / 50),
        ({"student_weights": "pretrained", "epochs": 10}, 1.0),
        ({"student_weights": "random", "epochs": 3}, 1.0),
    ],
)
def test_few_steps_from_known_weights_are_short_ones(settings: dict[str, Any], share: float) -> None:
    made = planned(recipe(batch_size=10, **settings), 50).schedule
    assert made.peak_lr == pytest.approx(share * 0.003 * (10 / 128) ** 0.5)
    assert planned(recipe(batch_size=10, lr=0.01, **settings), 50).schedule.peak_lr == 0.01
    assert planned(recipe(batch_size=10, optimizer="sgd", **settings), 50).schedule.peak_lr == 0.03 * 10 / 256
