"""The probes against slow, plain references."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import unit

from bingo_compress.errors import BingoError
from bingo_compress.evaluation import logistic, probes
from bingo_compress.evaluation.probes import (
    L2_STRENGTHS,
    accuracy,
    auc,
    balanced_accuracy,
    fit_linear,
    folds,
    gap_closed,
    knn_predict,
    neighbour_recall,
    normalised,
)
from bingo_compress.features.neighbours import (
    recall_facts,
    recall_k,
    recall_title,
)


def clusters(
    count: int, classes: int = 3, dim: int = 8, seed: int = 0, spread: float = 0.9
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds: features (count, dim), labels (count,)."""
    labels = torch.arange(count) % classes
    centres = unit(classes, dim, seed=50)
    noise = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + spread * noise / math.sqrt(dim) * 1.5, labels


# ---------------------------------------------------------------- kNN


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_knn_is_the_vote_of_dino(k: int) -> None:
    bank, labels = clusters(90)
    queries, _ = clusters(40, seed=1)
    b, q = (rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1)[:, None] for rows in (bank, queries))
    expected = []
    for query in q:
        cosines = b @ query
        votes = np.zeros(3)
        for index in np.argsort(-cosines)[:k]:
            votes[int(labels[index])] += math.exp(cosines[index] / 0.07)
        expected.append(int(votes.argmax()))
    assert knn_predict(bank, labels, queries, 3, k).tolist() == expected


def test_knn_weighs_votes_by_similarity() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    # E^14 against 2 e^8.6.
    assert knn_predict(bank, torch.tensor([0, 1, 1]), torch.tensor([[3.0, 0.0]]), 2, k=3).tolist() == [0]


# ---------------------------------------------------------------- linear probe


def probabilities(head: probes.LinearHead, features: torch.Tensor) -> np.ndarray:
    logits = features.double().numpy() @ head.weight.double().numpy().T + head.bias.double().numpy()
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def test_the_fit_is_where_the_gradient_of_its_objective_vanishes() -> None:
    features, labels = clusters(150)
    head = fit_linear(features, labels, 3)
    mean, scale = features.double().numpy().mean(0), features.double().numpy().std(0, ddof=1)
    standard = (features.double().numpy() - mean) / scale
    weight = head.weight.double().numpy() * scale
    error = probabilities(head, features) - np.eye(3)[labels.numpy()]
    assert np.abs(error.T @ standard / 150 + head.strength * weight / 3).max() < 1e-7
    assert np.abs(error.mean(0)).max() < 1e-7


@pytest.mark.slow  # importing scikit-learn
@pytest.mark.parametrize("count", [40, 150])
def test_the_fit_equals_scikit_learn(count: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    features, labels = clusters(count, dim=60)
    head = fit_linear(features, labels, 3)
    raw = features.double().numpy()
    standard = (raw - raw.mean(0)) / raw.std(0, ddof=1)
    model = linear_model.LogisticRegression(C=3 / (head.strength * count), max_iter=5000, tol=1e-9).fit(
        standard, labels.numpy()
    )
    assert probabilities(head, features) == pytest.approx(model.predict_proba(standard), abs=1e-5)
    assert head.predict(features).tolist() == model.predict(standard).tolist()


@pytest.mark.parametrize(("count", "dim"), [(150, 8), (30, 70)])  # more rows than features, and fewer
def test_the_fit_equals_plain_gradient_descent(count: int, dim: int) -> None:
    features, labels = clusters(count, dim=dim)
    x, truth = features.double(), torch.eye(3, dtype=torch.float64)[labels]
    rows = logistic.rows(x)
    assert (rows.z[:, :-1] @ rows.turn.T).numpy() == pytest.approx(x.numpy(), abs=1e-10)
    found = logistic.fit(rows.z, rows.spread, labels, 3, 1.0)
    weight, bias = torch.zeros(3, dim, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(4000):
        error = ((x @ weight.T + bias).softmax(1) - truth) / count
        weight, bias = weight - (error.T @ x + weight / 3), bias - error.sum(0)
    assert (found[:, :-1] @ rows.turn.T).numpy() == pytest.approx(weight.numpy(), abs=1e-8)
    assert found[:, -1].numpy() == pytest.approx(bias.numpy(), abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "dim"), [(240, 60), (50, 90)])
def test_the_number_of_threads_changes_nothing(count: int, dim: int) -> None:
    features, labels = clusters(count, dim=dim, spread=2.0)
    asked, _ = clusters(300, dim=dim, seed=3, spread=2.0)
    heads, weights, before = [], [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rows = logistic.rows(features.double())
            fitted = logistic.fit(rows.z, rows.spread, labels, 3, 1e-2)
            weights.append(torch.cat((fitted[:, :-1] @ rows.turn.T, fitted[:, -1:]), 1))
            heads.append(fit_linear(features, labels, 3))
    finally:
        torch.set_num_threads(before)
    assert weights[0].numpy() == pytest.approx(weights[1].numpy(), abs=1e-9)
    assert heads[0].strength == heads[1].strength
    assert heads[0].weight.numpy() == pytest.approx(heads[1].weight.numpy(), rel=2e-7, abs=1e-9)
    assert torch.equal(heads[0].predict(asked), heads[1].predict(asked))


@pytest.mark.slow
def test_the_strongest_penalty_within_a_standard_error_of_the_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: every strength on every fold, from nothing and to the end."""
    monkeypatch.setattr(logistic, "ROUGH", 1e-9)
    for seed, spread in ((0, 0.9), (1, 2.0), (2, 1.4)):
        features, labels = clusters(100, seed=seed, spread=spread)
        head = fit_linear(features, labels, 3)
        standard = (features.double() - features.double().mean(0)) / features.double().std(0)
        rows, fold, shares = logistic.rows(standard), folds(labels, 5), {}
        for strength in L2_STRENGTHS:
            right = 0
            for number in range(5):
                kept = fold != number
                weight = logistic.fit(rows.z[kept], rows.spread, labels[kept], 3, strength)
                right += int(((rows.z[~kept] @ weight.T).argmax(1) == labels[~kept]).sum())
            shares[strength] = right / 100
        best = max(shares.values())
        least = best - math.sqrt(best * (1 - best) / 100)
        assert head.strength == max(strength for strength, share in shares.items() if share >= least)
        assert shares[10.0] < least or head.strength == 10


def test_weaker_penalties_are_tried_until_two_have_gained_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, float]] = []
    real = logistic.fit

    def recorded(z: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        tried.append((len(z), given[3]))
        return real(z, *given, **named)

    monkeypatch.setattr(logistic, "fit", recorded)
    head = fit_linear(*clusters(100, spread=0.1), 3)  # any penalty will do
    assert [strength for _, strength in tried] == [10.0] * 5 + [1.0] * 5 + [0.1] * 5 + [10.0]
    assert {size for size, _ in tried[:15]} <= {79, 80, 81} and tried[15][0] == 100  # a fifth held out, then all rows
    assert head.strength == 10 and probes.grid_end(10.0) == "strongest"
    assert (probes.grid_end(1e-5), probes.grid_end(0.1), probes.grid_end(0.0)) == ("weakest", "", "")


def test_folds_are_stratified_and_keep_copies_together() -> None:
    labels = torch.tensor([0] * 23 + [1] * 50 + [2] * 3 + [3])
    fold = folds(labels, 5)
    for label, count in ((0, 23), (1, 50), (2, 3), (3, 1)):
        each = fold[labels == label].bincount(minlength=5)
        assert int(each.max()) - int(each.min()) <= 1 and int(each.sum()) == count
    assert int(fold.bincount().max()) - int(fold.bincount().min()) <= 2
    groups = torch.arange(77)
    groups[10:20] = 10
    groups[30:33] = groups[73] = 30  # one picture under two labels
    together = folds(labels, 5, groups)
    for group in (10, 30):
        assert len(together[groups == group].unique()) == 1
    assert torch.equal(folds(labels, 5), fold) and not torch.equal(folds(labels, 5, seed=1), fold)


def test_one_row_a_class_is_fitted_with_the_strongest_penalty() -> None:
    features, labels = clusters(3)
    head = fit_linear(features, labels, 3)
    assert head.strength == max(L2_STRENGTHS) and head.predict(features).tolist() == [0, 1, 2]


def test_labels_that_are_noise_get_more_penalty_than_labels_that_are_clear() -> None:
    features, labels = clusters(120, dim=60, spread=0.3)
    noise = torch.randint(3, (120,), generator=torch.Generator().manual_seed(5))
    assert accuracy(fit_linear(features, labels, 3).predict(features), labels) > 0.95
    strengths = [fit_linear(features, noise, 3, seed=seed).strength for seed in range(3)]
    assert min(strengths) >= 1


def test_weights_fold_the_standardisation_so_that_scale_and_offset_do_not_matter() -> None:
    features, labels = clusters(120)
    scale, offset = torch.logspace(-2, 3, 8), torch.linspace(-50, 20, 8)
    plain, stretched = fit_linear(features, labels, 3), fit_linear(features * scale + offset, labels, 3)
    assert stretched.strength == plain.strength
    assert stretched.logits(features * scale + offset).numpy() == pytest.approx(
        plain.logits(features).numpy(), abs=5e-3
    )


def test_a_dead_feature_does_no_harm() -> None:
    features, labels = clusters(120)
    dead = torch.cat((features, torch.full((120, 1), 3.7), torch.zeros(120, 1)), dim=1)
    head = fit_linear(dead, labels, 3)
    assert bool(head.weight.isfinite().all()) and bool(head.bias.isfinite().all())
    assert head.logits(dead).numpy() == pytest.approx(
        fit_linear(features, labels, 3).logits(features).numpy(), abs=1e-4
    )


def test_the_same_rows_give_the_same_head_bit_for_bit() -> None:
    one, two = (fit_linear(*clusters(80), 3) for _ in range(2))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)


def test_a_class_that_no_row_has_is_never_predicted() -> None:
    features, labels = clusters(90, classes=2)
    assert int(fit_linear(features, labels, 3).predict(features).max()) < 2


# ---------------------------------------------------------------- figures


def test_balanced_accuracy_counts_each_class_the_same() -> None:
    labels = torch.tensor([0] * 8 + [1] * 2 + [3] * 4)
    predicted = torch.tensor([0] * 8 + [0, 1] + [3, 0, 0, 0])
    assert accuracy(predicted, labels) == pytest.approx(10 / 14)
    assert balanced_accuracy(predicted, labels) == pytest.approx((1 + 0.5 + 0.25) / 3)


def test_auc_counts_pairs_with_ties_half() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        scores = torch.randint(6, (40,), generator=generator).float() / 5
        positive = torch.rand(40, generator=generator) < 0.4
        pairs = [
            (1.0 if p > n else 0.5 if p == n else 0.0)
            for p in scores[positive].tolist()
            for n in scores[~positive].tolist()
        ]
        assert auc(scores, positive) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auc_of_logits_where_a_softmax_is_full() -> None:
    """All these softmaxes are 1 in float32: their order is in the logits alone."""
    logits, positive = torch.tensor([200.0, 150.0, 120.0, 60.0]), torch.tensor([True, True, False, False])
    assert len(torch.stack((logits, torch.zeros(4)), 1).softmax(1)[:, 0].unique()) == 1
    head = probes.LinearHead(torch.tensor([[1.0], [0.0]]), torch.zeros(2), 1.0)
    found = head.logits(logits[:, None])
    assert auc(found[:, 0] - found[:, 1], positive) == 1


def test_auc_at_its_ends() -> None:
    scores, positive = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([False, False, True, True])
    assert auc(scores, positive) == 1
    assert auc(-scores, positive) == 0
    assert auc(torch.zeros(4), positive) == 0.5
    assert math.isnan(auc(scores, torch.ones(4, dtype=torch.bool)))


def test_neighbour_recall_equals_brute_force() -> None:
    teacher, student = (unit(30, 6, seed=1), unit(80, 6, seed=2)), (unit(30, 9, seed=3), unit(80, 9, seed=4))
    shares = []
    for row in range(30):
        best = [
            set(np.argsort(-(gallery.numpy() @ queries[row].numpy()))[:7].tolist())
            for queries, gallery in (teacher, student)
        ]
        shares.append(len(best[0] & best[1]) / 7)
    assert neighbour_recall(teacher, student, 7) == pytest.approx(np.mean(shares), abs=1e-6)


def test_neighbour_recall_is_one_for_the_same_space_and_chance_for_a_strange_one() -> None:
    queries, gallery = unit(200, 10, seed=1), unit(100, 10, seed=2)
    assert neighbour_recall((queries, gallery), (queries * 3, gallery * 0.2)) == 1
    strange = (unit(200, 10, seed=3), unit(100, 10, seed=4))
    assert neighbour_recall((queries, gallery), strange, 20) == pytest.approx(20 / 100, abs=0.03)
    assert neighbour_recall((queries, gallery), strange) == pytest.approx(10 / 100, abs=0.03)


@pytest.mark.parametrize(("gallery", "k"), [(0, 0), (9, 0), (10, 1), (30, 3), (199, 19), (200, 20), (20_000, 20)])
def test_recall_asks_for_a_tenth_of_the_gallery_at_most(gallery: int, k: int) -> None:
    assert recall_k(gallery) == k
    facts = recall_facts(gallery)
    assert facts == {"k": k, "gallery": gallery, "chance": k / gallery if k else 1.0}
    assert k == 0 or facts["chance"] <= 0.1
    assert recall_title(gallery) == (f"recall@{k} (chance {k / gallery:.3f})" if k else "recall")


def test_a_gallery_that_is_too_small_is_no_recall_of_one() -> None:
    small = (unit(4, 6), unit(9, 6))
    with pytest.raises(BingoError, match="expected a gallery of 10 images or more, found 9"):
        neighbour_recall(small, small)
    with pytest.raises(BingoError, match="expected a gallery of 20 images or more, found 9"):
        neighbour_recall(small, small, 20)


def test_gap_closed() -> None:
    assert gap_closed(0.2, 0.5, 0.8) == pytest.approx(0.5)
    assert gap_closed(0.2, 0.1, 0.7) == pytest.approx(-0.2)
    assert math.isnan(gap_closed(0.4, 0.5, 0.4))


def test_normalised_rows_have_length_one() -> None:
    assert normalised(unit(5, 4).half() * 30).norm(dim=1).tolist() == pytest.approx([1] * 5, abs=1e-6)
