"""Every method but bingo against float64 references in plain Python loops."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import planned, recipe, unit

from bingo_compress.models.encoder import ProjectionHead, RegressionHead
from bingo_compress.training import plan
from bingo_compress.training.losses import LOSSES, Batch, Loss, Queries, Targets, make_loss
from bingo_compress.training.state import make_head

BATCH, DIM, QUEUE = 4, 6, 9
OTHERS = sorted(set(LOSSES) - {"bingo"})
CONTRASTIVE = sorted(set(OTHERS) - {"simreg", "coss"})  # those that look at the queue
Rows = list[list[float]]


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
    heads = [type(make_head(planned(recipe(method=method), 36), 24)) for method in ("bingo", "simreg")]
    assert heads == [ProjectionHead, RegressionHead]
