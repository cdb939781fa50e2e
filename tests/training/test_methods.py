"""Every method but bingo against float64 references in plain Python loops; all methods in the loop: learning, stopping,
going on, keeping the best.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, Trained, encoder, filled_store, kind_targets, planned, recipe, unit

from bingo_compress.features.bagging import knn
from bingo_compress.features.targets import StoredTargets, TargetSpace
from bingo_compress.models.encoder import Encoder, ProjectionHead, RegressionHead
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import checkpoint
from bingo_compress.training import loop, plan
from bingo_compress.training.loader import Lessons, pick_mates
from bingo_compress.training.losses import LOSSES, Batch, Loss, Queries, Targets, make_loss
from bingo_compress.training.state import Average, make_head

BATCH, DIM, QUEUE = 4, 6, 9
OTHERS = sorted(set(LOSSES) - {"bingo"})
CONTRASTIVE = sorted(set(OTHERS) - {"simreg", "coss"})  # those that look at the queue
Rows = list[list[float]]


# ---------------------------------------------------------------- references, from the equations


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    parts = [math.exp(value - top) for value in logits]
    return [part / sum(parts) for part in parts]


@dataclass
class Arrays:
    """One batch as lists: queries, targets of the teacher, keys of the moving average, and each anchor's own
    negatives.
    """

    q: dict[str, Rows]
    t: dict[str, Rows]
    k: dict[str, Rows]
    negatives: list[Rows]

    def info_nce(self, queries: Rows, keys: Rows, tau: float) -> float:
        """Mean of -log( e^(q.k/tau) / (e^(q.k/tau) + sum over n of e^(q.n/tau)) )."""
        losses = []
        for query, key, negatives in zip(queries, keys, self.negatives, strict=True):
            own = math.exp(dot(query, key) / tau)
            losses.append(-math.log(own / (own + sum(math.exp(dot(query, negative) / tau) for negative in negatives))))
        return sum(losses) / len(losses)

    def moco(self, tau: float) -> float:
        return (
            self.info_nce(self.q["anchor"], self.k["mate"], tau) + self.info_nce(self.q["mate"], self.k["anchor"], tau)
        ) / 2

    def itself(self, tau: float) -> float:
        return self.info_nce(self.q["anchor"], self.k["anchor"], tau) + self.info_nce(
            self.q["mate"], self.k["anchor"], tau
        )

    def distance(self, view: str) -> float:
        """Mean squared Euclidean distance of query and target."""
        return (
            sum(
                sum((a - b) ** 2 for a, b in zip(q, t, strict=True))
                for q, t in zip(self.q[view], self.t[view], strict=True)
            )
            / BATCH
        )

    def seed(self, tau: float, teacher_tau: float) -> float:
        """Cross-entropy of the softmaxes over [own target; queue], mean over batch and views."""
        total = 0.0
        for view in ("anchor", "mate"):
            for query, target, negatives in zip(self.q[view], self.t[view], self.negatives, strict=True):
                wanted = softmax([dot(target, row) / teacher_tau for row in [target, *negatives]])
                found = softmax([dot(query, row) / tau for row in [target, *negatives]])
                total -= sum(p * math.log(s) for p, s in zip(wanted, found, strict=True))
        return total / (2 * BATCH)

    def compress(self, tau: float) -> float:
        """KL(teacher || student) over the queue alone, mean over batch and views."""
        total = 0.0
        for view in ("anchor", "mate"):
            for query, target, negatives in zip(self.q[view], self.t[view], self.negatives, strict=True):
                if negatives:
                    wanted = softmax([dot(target, row) / tau for row in negatives])
                    found = softmax([dot(query, row) / tau for row in negatives])
                    total += sum(p * math.log(p / s) for p, s in zip(wanted, found, strict=True))
        return total / (2 * BATCH)

    def coss(self) -> tuple[float, float]:
        """1 - cosine of each embedding, mean; 1 - cosine of each dimension as a vector over the whole batch, mean."""
        queries, targets = self.q["anchor"] + self.q["mate"], self.t["anchor"] + self.t["mate"]

        def apart(one: Rows, other: Rows) -> float:
            return sum(1 - dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for a, b in zip(one, other, strict=True)) / len(
                one
            )

        return apart(queries, targets), apart(
            [list(c) for c in zip(*queries, strict=True)], [list(c) for c in zip(*targets, strict=True)]
        )


REFERENCES: dict[str, Callable[[Arrays, float, float], dict[str, float]]] = {
    "seed": lambda a, tau, teacher_tau: {"distribution": a.seed(tau, teacher_tau)},
    "disco": lambda a, tau, _: {"contrast": a.moco(tau), "distance": a.distance("anchor") + a.distance("mate")},
    "compress": lambda a, tau, _: {"distribution": a.compress(tau)},
    "simreg": lambda a, *_: {"distance": (a.distance("anchor") + a.distance("mate")) / 2},
    "coss": lambda a, *_: dict(zip(("feature", "space"), a.coss(), strict=True)),
    "moco": lambda a, tau, _: {"contrast": a.moco(tau)},
    "self": lambda a, tau, _: {
        "intra": a.info_nce(a.q["anchor"], a.k["anchor"], tau),
        "inter": a.itself(tau) - a.info_nce(a.q["anchor"], a.k["anchor"], tau),
    },
}


class Case:
    """One batch with only what the method says that it needs: what it does not ask for is None."""

    def __init__(self, method: str, negatives: str = "all", seed: int = 0) -> None:
        kind = LOSSES[method]
        made = unit(6, BATCH, DIM, seed=seed, dtype=torch.float64)
        if kind.lengths:
            made = made * torch.linspace(0.3, 4, 6 * BATCH, dtype=torch.float64).view(6, BATCH, 1)
        queue = unit(0 if negatives == "empty" else QUEUE, DIM, seed=seed + 1, dtype=torch.float64)
        masked = (
            torch.rand(BATCH, len(queue), generator=torch.Generator().manual_seed(seed + 2)) < 0.4
            if negatives == "masked"
            else None
        )
        if negatives == "none left":
            masked = torch.ones(BATCH, QUEUE, dtype=torch.bool)
        self.leaves = [made[0].clone().requires_grad_(), made[1].clone().requires_grad_()]
        self.targets = Targets(made[2], made[3] if kind.both else None) if kind.teacher else None
        self.keys = Targets(made[4], made[5] if kind.momentum == "views" else None) if kind.momentum else None
        self.queue, self.masked = queue, masked
        names = ("anchor", "mate")
        lists = made.tolist()
        left = masked if masked is not None else torch.zeros(BATCH, len(queue), dtype=torch.bool)
        self.arrays = Arrays(
            dict(zip(names, lists[:2], strict=True)),
            dict(zip(names, lists[2:4], strict=True)),
            dict(zip(names, lists[4:], strict=True)),
            [queue[~row].tolist() for row in left],
        )

    def batch(self, *leaves: torch.Tensor) -> Batch:
        return Batch(Queries(*(leaves or self.leaves)), self.targets, self.keys, self.queue, self.masked, 0)


def make(method: str, tau: float = 0.2, teacher_tau: float = 0.05) -> Loss:
    return make_loss(method, {"temperature": tau, "teacher_temperature": teacher_tau})


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("negatives", ["all", "masked", "empty", "none left"])
@pytest.mark.parametrize(("tau", "teacher_tau"), [(0.2, 0.05), (0.1, 0.3)])
def test_a_method_equals_its_equations(method: str, negatives: str, tau: float, teacher_tau: float) -> None:
    for seed in (0, 5):
        case = Case(method, negatives, seed)
        terms = make(method, tau, teacher_tau)(case.batch())
        assert {name: float(value.detach()) for name, value in terms.items()} == pytest.approx(
            REFERENCES[method](case.arrays, tau, teacher_tau), rel=1e-11, abs=1e-12
        )


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("negatives", ["all", "masked", "empty"])
def test_gradients_equal_finite_differences(method: str, negatives: str) -> None:
    case = Case(method, negatives)
    assert torch.autograd.gradcheck(lambda *leaves: total(make(method)(case.batch(*leaves))), case.leaves)


@pytest.mark.parametrize("method", OTHERS)
def test_every_query_learns_and_targets_and_keys_need_no_gradient(method: str) -> None:
    case = Case(method, "masked")
    total(make(method)(case.batch())).backward()
    for leaf in case.leaves:
        assert leaf.grad is not None
        assert float(leaf.grad.norm(dim=1).min()) > 1e-4


@pytest.mark.parametrize("method", CONTRASTIVE)
def test_without_any_negative_gradients_are_finite(method: str) -> None:
    for negatives in ("empty", "none left"):
        case = Case(method, negatives)
        loss = total(make(method)(case.batch()))
        loss.backward()
        pulled = sum(float(leaf.grad.abs().sum()) for leaf in case.leaves if leaf.grad is not None)
        assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in case.leaves)
        if method == "disco":  # its distance to the teacher is left
            assert (
                float(loss.detach()) == pytest.approx(case.arrays.distance("anchor") + case.arrays.distance("mate"))
                and pulled > 0.1
            )
        else:
            assert abs(float(loss.detach())) < 1e-12 and pulled < 1e-12


@pytest.mark.parametrize("method", OTHERS)
def test_the_temperature_is_used_where_there_is_a_softmax(method: str) -> None:
    case = Case(method)
    values = {round(float(total(make(method, tau)(case.batch())).detach()), 6) for tau in (0.04, 0.2, 1.0)}
    assert len(values) == (3 if method in CONTRASTIVE else 1)


def test_seeds_teacher_temperature_is_used() -> None:
    case = Case("seed")
    assert (
        len(
            {round(float(make("seed", 0.2, tau)(case.batch())["distribution"].detach()), 4) for tau in (0.01, 0.1, 1.0)}
        )
        == 3
    )


@pytest.mark.parametrize("method", [*CONTRASTIVE, "bingo"])
def test_temperature_zero_is_the_methods_own_and_any_other_is_taken(method: str) -> None:
    own = 0.04 if method == "compress" else 0.2
    found = [
        make_loss(method, given).temperature
        for given in ({"temperature": 0.0}, {}, recipe(method=method).model_dump(), {"temperature": 0.13})
    ]
    assert found == [own, own, own, 0.13]


def test_settings_reach_the_methods_fields() -> None:
    loss: Any = plan.loss_of(recipe(method="seed", teacher_temperature=0.03))
    assert (loss.teacher_temperature, plan.loss_of(recipe(variant="official")).official) == (0.03, True)
    heads = [type(make_head(planned(recipe(method=method), IMAGES), 24)) for method in ("bingo", "simreg")]
    assert heads == [ProjectionHead, RegressionHead]


# ---------------------------------------------------------------- the loop

IMAGES = 40
STORE = filled_store(IMAGES)
TARGETS = kind_targets(IMAGES, 3, 16)
BAGS = knn(TARGETS[:, 0], 3)[0]


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


@pytest.mark.parametrize("method", sorted(LOSSES))
def test_every_method_lowers_its_own_loss(method: str, tmp_path: Path) -> None:
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
    assert terms == set(REFERENCES[method](Case(method).arrays, 0.2, 0.1) if method != "bingo" else ("intra", "inter"))


@pytest.mark.parametrize("method", sorted(LOSSES))
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


# ---------------------------------------------------------------- the moving average, the mates


def test_the_average_follows_weights_and_buffers_exactly_and_stays_in_eval_mode() -> None:
    student, head = encoder("test_resnet", 32, seed=1), RegressionHead(8, 12, 4)
    average = Average(student, head)
    before = {
        key: value.clone() for model in (average.student, average.head) for key, value in model.state_dict().items()
    }
    other, other_head = encoder("test_resnet", 32, seed=2), RegressionHead(8, 12, 4)
    for module in [*other.modules(), *other_head.modules()]:
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.fill_(17)
    other.train()
    other_head.train()
    average.follow(other, other_head, 0.75)
    now = {key: value for model in (average.student, average.head) for key, value in model.state_dict().items()}
    new = {key: value for model in (other, other_head) for key, value in model.state_dict().items()}
    assert any(key.endswith("running_var") for key in now) and len(now) == len(new)
    for key, value in now.items():
        if key.endswith("num_batches_tracked"):
            assert int(value) == 17
        else:
            expected = 0.75 * before[key].double() + 0.25 * new[key].double()
            assert torch.allclose(value.double(), expected, rtol=0, atol=1e-6), key
    assert not any(module.training for model in (average.student, average.head) for module in model.modules())
    assert same(student.state_dict(), encoder("test_resnet", 32, seed=1).state_dict())  # the average is a copy
    average.follow(other, other_head, 0.0)
    assert all(torch.equal(value, new[key]) for key, value in now.items())


def test_keys_have_length_one_no_gradient_and_nothing_of_the_batch_around_them() -> None:
    student = encoder("test_resnet", 32, seed=1).train()
    average = Average(student, ProjectionHead(student.width, 32, 16).train())
    views = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    keys = average(views)
    assert not keys.requires_grad
    assert keys.norm(dim=1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    assert torch.allclose(average(views[:2]), keys[:2], atol=1e-5)
    assert student.training and not average.student.training


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


@pytest.mark.parametrize(
    ("scores", "best"), [((0.3, 0.9, 0.5, 0.8), 1), ((0.1, 0.2, 0.3, 0.4), 3), ((0.0, 0.0, 0.0, 0.0), 0)]
)
def test_the_loop_leaves_the_weights_of_the_highest_score(scores: tuple[float, ...], best: int, tmp_path: Path) -> None:
    check = Checked(*scores)
    run = train(tmp_path, recipe(epochs=4, check_every=1, keep_best=True), check=check)
    assert len(check.seen) == 4 and not same(check.seen[0], check.seen[1])
    assert [same(run.weights, seen) for seen in check.seen] == [number == best for number in range(4)]


def test_the_best_student_outlives_interruptions(tmp_path: Path) -> None:
    settings = recipe(epochs=3, check_every=1, keep_best=True)
    whole = Checked(0.3, 0.9, 0.5)
    left = train(tmp_path / "whole", settings, check=whole)
    for stop in (3, 13):  # before the first check; after the best one
        part = train(tmp_path / "parts", settings, stop_after=stop, check=Checked(*whole.scores))
    assert not same(part.weights, whole.seen[1])  # it would have gone on with the latest
    run = train(tmp_path / "parts", settings, check=Checked(0.5))
    assert same(run.weights, left.weights) and same(run.weights, whole.seen[1])


def test_checks_come_when_they_are_due_and_change_nothing_where_the_best_is_not_kept(tmp_path: Path) -> None:
    check = Checked(0.9, 0.1)
    run = train(tmp_path / "checked", recipe(epochs=3, check_every=2), check=check)
    assert [line["epoch"] for line in run.lines if "neighbour_recall" in line] == [1, 2]
    assert same(run.weights, check.seen[1])
    assert same(run.weights, train(tmp_path / "plain", recipe(epochs=3)).weights)
