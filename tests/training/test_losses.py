"""The losses against references written from the paper's equations (method.md, section 3) in plain float64 numpy
loops.
"""

import math

import numpy as np
import pytest
import torch
from helpers import unit

from bingo_compress.training.losses import Batch, Bingo, Queries, Targets, info_nce, negatives_energy

BATCH, DIM, QUEUE = 5, 12, 17
SHARE = 0.37


def reference_ce(queries: np.ndarray, keys: np.ndarray, queue: np.ndarray, left_out: np.ndarray, tau: float) -> float:
    """Mean over the batch of -log( e^(s.k/tau) / (e^(s.k/tau) + sum over q of e^(s.q/tau)) ), left_out (B, Q) being no
    negatives.
    """
    losses = []
    for row, (query, key) in enumerate(zip(queries, keys, strict=True)):
        own = math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / tau)
        others = 0.0
        for column, negative in enumerate(queue):
            if not left_out[row, column]:
                others += math.exp(sum(a * b for a, b in zip(query, negative, strict=True)) / tau)
        losses.append(-math.log(own / (own + others)))
    return sum(losses) / len(losses)


def reference_paper(q: dict[str, np.ndarray], queue: np.ndarray, left_out: np.ndarray, tau: float) -> float:
    return reference_ce(q["anchor"], q["k_a"], queue, left_out, tau) + reference_ce(
        q["mate"], q["k_a"], queue, left_out, tau
    )


def reference_official(
    q: dict[str, np.ndarray], queue: np.ndarray, left_out: np.ndarray, tau: float, lam: float, epoch: int
) -> float:
    """1/3 [ w0 CE(q,k_a) + w1 CE(q,k_p) + w1 CE(q',k_a) + w0 CE(q',k_p) + lam CE(m,k_a) + (1-lam) CE(m,k_p) ]; (1,0) in
    epochs 0..10.
    """
    w0, w1 = (1.0, 0.0) if epoch <= 10 else (0.5, 0.5)

    def ce(query: str, key: str) -> float:
        return reference_ce(q[query], q[key], queue, left_out, tau)

    total = w0 * ce("anchor", "k_a") + w1 * ce("anchor", "k_p") + w1 * ce("mate", "k_a") + w0 * ce("mate", "k_p")
    return (total + lam * ce("mixed", "k_a") + (1 - lam) * ce("mixed", "k_p")) / 3


def reference_soft(
    q: dict[str, np.ndarray], queue: np.ndarray, left_out: np.ndarray, tau: float, teacher_tau: float, weight: float
) -> tuple[float, float]:
    """(intra, inter): cross-entropy of teacher's and student's softmaxes over [target; queue], of each view with its
    own and the other image's target.
    """

    def softmax(logits: list[float]) -> list[float]:
        parts = [math.exp(value) for value in logits]
        return [part / sum(parts) for part in parts]

    def ce(query: str, key: str) -> float:
        losses = []
        for row, (student, target) in enumerate(zip(q[query], q[key], strict=True)):
            rows = [target, *(negative for column, negative in enumerate(queue) if not left_out[row, column])]
            wanted = softmax([float(target @ other) / teacher_tau for other in rows])
            found = softmax([float(student @ other) / tau for other in rows])
            losses.append(-sum(w * math.log(f) for w, f in zip(wanted, found, strict=True)))
        return sum(losses) / len(losses)

    return ce("anchor", "k_a") + ce("mate", "k_p"), weight * (ce("anchor", "k_p") + ce("mate", "k_a"))


class Case:
    """One batch as float64 tensors with gradients, and the same as arrays."""

    def __init__(self, masked: bool, queue: int = QUEUE, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        made = unit(5, BATCH, DIM, seed=seed, dtype=dtype)
        self.arrays = {
            name: rows.double().numpy()
            for name, rows in zip(("anchor", "mate", "mixed", "k_a", "k_p"), made, strict=True)
        }
        self.leaves = [made[row].clone().requires_grad_() for row in range(3)]
        self.queries = Queries(*self.leaves, share=SHARE)
        self.targets = Targets(made[3], made[4])
        self.queue = unit(queue, DIM, seed=seed + 1, dtype=dtype)
        draw = torch.rand(BATCH, queue, generator=torch.Generator().manual_seed(seed)) < 0.3
        self.masked = draw if masked else None
        self.left_out = draw.numpy() if masked else np.zeros((BATCH, queue), bool)


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize("tau", [0.2, 0.07])
@pytest.mark.parametrize("masked", [False, True])
def test_paper_equals_its_equations(masked: bool, tau: float) -> None:
    case = Case(masked)
    terms = Bingo(tau, "paper", 11)(Batch(case.queries, case.targets, None, case.queue, case.masked, 0))
    queue = case.queue.numpy()
    assert set(terms) == {"intra", "inter"}
    assert float(terms["intra"]) == pytest.approx(
        reference_ce(case.arrays["anchor"], case.arrays["k_a"], queue, case.left_out, tau), rel=1e-12
    )
    assert float(terms["inter"]) == pytest.approx(
        reference_ce(case.arrays["mate"], case.arrays["k_a"], queue, case.left_out, tau), rel=1e-12
    )
    assert float(total(terms)) == pytest.approx(reference_paper(case.arrays, queue, case.left_out, tau), rel=1e-12)


@pytest.mark.parametrize(("tau", "teacher_tau", "weight"), [(0.2, 0.1, 0.5), (0.1, 0.3, 2.0)])
@pytest.mark.parametrize("masked", [False, True])
def test_soft_equals_its_equations(masked: bool, tau: float, teacher_tau: float, weight: float) -> None:
    case = Case(masked)
    loss = Bingo(tau, "soft", 11, teacher_tau, weight)
    terms = loss(Batch(case.queries, case.targets, None, case.queue, case.masked, 0))
    expected = reference_soft(case.arrays, case.queue.numpy(), case.left_out, tau, teacher_tau, weight)
    assert (float(terms["intra"]), float(terms["inter"])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epoch", [0, 10, 11, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_official_equals_its_equations_before_and_after_the_switch(masked: bool, epoch: int) -> None:
    case = Case(masked)
    terms = Bingo(0.2, "official", 11)(Batch(case.queries, case.targets, None, case.queue, case.masked, epoch))
    expected = reference_official(case.arrays, case.queue.numpy(), case.left_out, 0.2, SHARE, epoch)
    assert float(total(terms)) == pytest.approx(expected, rel=1e-12)
    assert (float(terms["inter"]) == 0) == (epoch <= 10)


def test_official_weights_differ_across_the_switch_so_the_reference_can_tell() -> None:
    case = Case(False)
    loss = Bingo(0.2, "official", 11)
    before, after = (
        float(total(loss(Batch(case.queries, case.targets, None, case.queue, None, epoch)))) for epoch in (10, 11)
    )
    assert abs(before - after) > 1e-3


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_cutmix_share_moves_the_mixed_term_from_mate_to_anchor(share: float) -> None:
    case = Case(False)
    queries = Queries(*case.leaves, share=share)
    mixed = float(Bingo(0.2, "official", 11)(Batch(queries, case.targets, None, case.queue, None, 0))["mixed"])
    key = "k_a" if share == 1 else "k_p"
    assert mixed == pytest.approx(
        reference_ce(case.arrays["mixed"], case.arrays[key], case.queue.numpy(), case.left_out, 0.2) / 3, rel=1e-12
    )


def test_float32_at_a_low_temperature_keeps_its_digits() -> None:
    case = Case(True, dtype=torch.float32)
    tau = 0.01  # exponents up to 100: e^100 overflows float32
    terms = Bingo(tau, "paper", 11)(Batch(case.queries, case.targets, None, case.queue, case.masked, 0))
    assert float(total(terms)) == pytest.approx(
        reference_paper(case.arrays, case.queue.double().numpy(), case.left_out, tau), rel=1e-5
    )


def test_masked_negatives_change_the_loss_and_carry_no_weight() -> None:
    case = Case(True)
    assert case.masked is not None
    loss = Bingo(0.2, "paper", 11)
    with_mask = total(loss(Batch(case.queries, case.targets, None, case.queue, case.masked, 0)))
    assert float(with_mask) < float(total(loss(Batch(case.queries, case.targets, None, case.queue, None, 0)))) - 1e-3
    other = torch.where(case.masked[0][:, None], unit(QUEUE, DIM, seed=9, dtype=torch.float64), case.queue)
    first = Queries(case.leaves[0][:1], case.leaves[1][:1])
    target = Targets(case.targets.anchor[:1])
    values = [
        float(total(loss(Batch(first, target, None, queue, case.masked[:1], 0)))) for queue in (case.queue, other)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-14)


@pytest.mark.parametrize("variant", ["soft", "paper", "official"])
@pytest.mark.parametrize("negatives", ["empty queue", "all masked"])
def test_without_negatives_the_loss_is_zero_and_gradients_are_finite_zeros(variant: str, negatives: str) -> None:
    case = Case(False, queue=0 if negatives == "empty queue" else QUEUE)
    masked = torch.ones(BATCH, QUEUE, dtype=torch.bool) if negatives == "all masked" else None
    terms = Bingo(0.2, variant, 0)(Batch(case.queries, case.targets, None, case.queue, masked, 0))
    loss = total(terms)
    loss.backward()
    assert float(loss) == 0
    for leaf in case.leaves[: 3 if variant == "official" else 2]:
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("variant", ["soft", "paper", "official"])
@pytest.mark.parametrize("epoch", [0, 20])
def test_every_variant_gives_finite_scalars_and_gradients_to_every_query(variant: str, epoch: int) -> None:
    case = Case(True, dtype=torch.float32)
    terms = Bingo(0.2, variant, 11)(Batch(case.queries, case.targets, None, case.queue, case.masked, epoch))
    assert terms
    assert all(value.shape == () and bool(value.isfinite()) for value in terms.values())
    total(terms).backward()
    for leaf in case.leaves[: 3 if variant == "official" else 2]:
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
        assert float(leaf.grad.norm(dim=1).min()) > 1e-4  # every row of the batch learns


def test_the_temperature_is_used() -> None:
    case = Case(False)
    values = [
        float(total(Bingo(tau, "paper", 11)(Batch(case.queries, case.targets, None, case.queue, None, 0))))
        for tau in (0.05, 0.2, 1.0)
    ]
    assert len({round(value, 6) for value in values}) == 3


@pytest.mark.parametrize("variant", ["soft", "paper", "official"])
def test_gradients_equal_finite_differences(variant: str) -> None:
    case = Case(True)

    def value(*leaves: torch.Tensor) -> torch.Tensor:
        terms = Bingo(0.2, variant, 0)(
            Batch(Queries(*leaves, share=SHARE), case.targets, None, case.queue, case.masked, 0)
        )
        return total(terms)

    assert torch.autograd.gradcheck(value, case.leaves)


def test_a_step_against_the_gradient_brings_the_query_to_its_target() -> None:
    case = Case(False)
    query = case.leaves[0]
    info_nce(query, case.targets.anchor, negatives_energy(query, case.queue, None, 0.2), 0.2).backward()
    moved = (query - 0.05 * query.grad).detach()  # type: ignore[operator]
    before, after = (float((rows * case.targets.anchor).sum(1).mean()) for rows in (query, moved))
    assert after > before + 1e-3


def test_energy_of_one_negative_is_its_similarity_over_tau() -> None:
    query, negative = unit(1, DIM, seed=3, dtype=torch.float64), unit(1, DIM, seed=4, dtype=torch.float64)
    assert float(negatives_energy(query, negative, None, 0.25)) == pytest.approx(
        float(query @ negative.T) / 0.25, rel=1e-12
    )
