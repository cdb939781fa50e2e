"""All methods in the loop: learning, stopping, going on, mates, keeping the best."""

import math
from pathlib import Path

import pytest
import torch
from helpers import CPU, Trained, encoder, filled_store, kind_targets, planned, recipe

from bingo_compress.features.bagging import knn
from bingo_compress.features.targets import StoredTargets, TargetSpace
from bingo_compress.models.encoder import Encoder
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import checkpoint
from bingo_compress.training import loop, metrics, plan
from bingo_compress.training.loader import Lessons, pick_mates
from bingo_compress.training.losses import LOSSES

IMAGES = 40
STORE = filled_store(IMAGES)
TARGETS = kind_targets(IMAGES, 3, 16)
BAGS = knn(TARGETS[:, 0], 3)[0]
METHODS = ["bingo", *(pytest.param(method, marks=pytest.mark.slow) for method in sorted(set(LOSSES) - {"bingo"}))]
TERMS = {
    "bingo": {"intra", "inter"},
    "compress": {"distribution"},
    "coss": {"feature", "space"},
    "disco": {"contrast", "distance"},
    "moco": {"contrast"},
    "seed": {"distribution"},
    "self": {"intra", "inter"},
    "simreg": {"distance"},
}


def train(folder: Path, settings: Recipe, stop_after: int | None = None, check: loop.Check | None = None) -> Trained:
    """The tiny problem of test_distill; a method without teacher gets no targets at all."""
    folder.mkdir(exist_ok=True)
    loss = plan.loss_of(settings)
    run = Trained(encoder("test_resnet", 32, seed=5), folder / "metrics.jsonl", folder / "checkpoint.safetensors")
    source = StoredTargets(TARGETS, TargetSpace(None, None), CPU, lengths=loss.lengths) if loss.teacher else None
    files = (run.metrics, run.saved)
    lessons = Lessons(STORE, torch.arange(IMAGES), BAGS, source)
    loop.distill(planned(settings, IMAGES), run.student, lessons, *files, check=check, stop_after=stop_after)
    return run


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_own_loss(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LOG_SECONDS", math.inf)  # a line an epoch, however slow the machine is
    settings = recipe(
        method=method,
        epochs=8,
        batch_size=20,
        lr=0.003,
        average=0.9,
        crop_scale_min=0.8,
        mask_mates=False,
        rebag_epochs=2,
    )
    run = train(tmp_path, settings)
    losses = [line["loss"] for line in run.lines]
    assert len(losses) == 8 and all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) / 3 < losses[1] * 0.94  # the queue fills in the first epoch
    assert not run.student.training
    terms = set(run.lines[0]) - {"step", "epoch", "loss", "lr", "images_per_s", "memory", "seconds", "time"}
    terms = {term for term in terms if not term.startswith("share_")}
    assert terms == TERMS[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_inside_an_epoch_and_gone_on_with_equals_the_whole_bit_for_bit(
    method: str, tmp_path: Path
) -> None:
    settings = recipe(method=method, rebag_epochs=1, batch_size=12, epochs=3)
    whole = train(tmp_path / "whole", settings)
    # Of 10; bags of `self` were rebuilt before the fifth, for the first epoch ended within the fourth.
    part = train(tmp_path / "parts", settings, stop_after=7)
    assert not same(part.weights, whole.weights)
    parts = train(tmp_path / "parts", settings)
    assert same(parts.weights, whole.weights)
    saved = [checkpoint.load(run.saved)[0] for run in (whole, parts)]
    assert same(*saved)
    assert ("bags.now" in saved[0]) == (method in ("disco", "moco", "self"))  # those with a moving average
    if method == "self":
        assert saved[0]["bags.now"].shape == BAGS.shape and not torch.equal(saved[0]["bags.now"], BAGS)


def test_the_average_of_a_run_keeps_the_share_that_is_set(tmp_path: Path) -> None:
    run = train(tmp_path, recipe(method="moco", average=0.999, lr=0.01, epochs=1))
    saved = checkpoint.load(run.saved)[0]
    name = next(name for name, _ in run.student.backbone.named_parameters())
    start = encoder("test_resnet", 32, seed=5).backbone.state_dict()[name]
    moved, gone = (float((saved[f"{role}.{name}"] - start).norm()) for role in ("average", "student"))
    assert gone > 0.01 and 0 < moved < 5 * 0.001 * 1.5 * gone  # five steps, each of a thousandth of the way


def test_mates_are_drawn_uniformly_from_the_valid_places_only() -> None:
    bags = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1], [7, -1, -1, -1], [-1, -1, -1, -1]])
    draws = 8000
    anchors = torch.arange(4).repeat(draws)
    picked = pick_mates(bags, anchors, torch.Generator().manual_seed(0)).view(draws, 4)
    for anchor, row in enumerate(bags.tolist()):
        valid = [image for image in row if image >= 0] or [anchor]
        values, counts = picked[:, anchor].unique(return_counts=True)
        assert values.tolist() == valid
        deviation = math.sqrt(draws / len(valid) * (1 - 1 / len(valid)))
        assert all(abs(count - draws / len(valid)) <= 4 * deviation for count in counts.tolist())


def test_a_bag_of_no_places_gives_the_anchor_itself_and_the_same_seed_the_same_mates() -> None:
    anchors = torch.tensor([3, 0, 2, 2])
    assert torch.equal(pick_mates(torch.empty(5, 0, dtype=torch.int64), anchors, torch.Generator()), anchors)
    assert torch.equal(pick_mates(torch.full((5, 3), -1), anchors, torch.Generator()), anchors)
    one, two, other = (
        pick_mates(BAGS, torch.arange(IMAGES), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert all(mate in bag for mate, bag in zip(one.tolist(), BAGS.tolist(), strict=True))


# ---------------------------------------------------------------- the best check


class Checked:
    """A check that gives chosen scores and keeps what it saw."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.seen = list(scores), list[dict[str, torch.Tensor]]()

    def __call__(self, student: Encoder) -> float:
        self.seen.append({name: value.clone() for name, value in student.backbone.state_dict().items()})
        return self.scores[len(self.seen) - 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scores", "best"), [((0.3, 0.9, 0.5, 0.8), 1), ((0.1, 0.2, 0.3, 0.4), 3), ((0.0, 0.0, 0.0, 0.0), 0)]
)
def test_the_loop_leaves_the_weights_of_the_highest_score(scores: tuple[float, ...], best: int, tmp_path: Path) -> None:
    check = Checked(*scores)
    run = train(tmp_path, recipe(epochs=4, check_every=1, keep_best=True), check=check)
    assert len(check.seen) == 4 and not same(check.seen[0], check.seen[1])
    assert [same(run.weights, seen) for seen in check.seen] == [number == best for number in range(4)]


@pytest.mark.slow
def test_the_best_student_outlives_interruptions(tmp_path: Path) -> None:
    settings = recipe(epochs=3, check_every=1, keep_best=True)
    whole = Checked(0.3, 0.9, 0.5)
    left = train(tmp_path / "whole", settings, check=whole)
    for stop in (3, 13):  # before the first check; after the best one
        part = train(tmp_path / "parts", settings, stop_after=stop, check=Checked(*whole.scores))
    assert not same(part.weights, whole.seen[1])  # it would have gone on with the latest
    run = train(tmp_path / "parts", settings, check=Checked(0.5))
    assert same(run.weights, left.weights) and same(run.weights, whole.seen[1])


@pytest.mark.slow
def test_checks_come_when_they_are_due_and_change_nothing_where_the_best_is_not_kept(tmp_path: Path) -> None:
    check = Checked(0.9, 0.1)
    run = train(tmp_path / "checked", recipe(epochs=3, check_every=2), check=check)
    assert [line["epoch"] for line in run.lines if "neighbour_recall" in line] == [1, 2]
    assert same(run.weights, check.seen[1])
    assert same(run.weights, train(tmp_path / "plain", recipe(epochs=3)).weights)
