"""Intervals, paired tests and rank correlation against closed forms and slow, plain references."""

import math

import numpy as np
import pytest
import torch

from bingo_compress import evidence
from bingo_compress.errors import BingoError
from bingo_compress.evidence import confusion, interval, mean_and_spread, mean_interval, paired, per_class, spearman


def answers(right: int, wrong: int) -> torch.Tensor:
    return torch.tensor([True] * right + [False] * wrong, dtype=torch.bool)


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(("right", "count"), [(50, 100), (340, 400), (30, 372)])
def test_the_interval_of_a_share_is_that_of_the_binomial(right: int, count: int) -> None:
    low, high = mean_interval(answers(right, count - right), draws=4000)
    share = right / count
    error = math.sqrt(share * (1 - share) / count)
    assert low == pytest.approx(share - 1.96 * error, abs=0.15 * error + 1 / count)
    assert high == pytest.approx(share + 1.96 * error, abs=0.15 * error + 1 / count)


def test_the_interval_of_a_mean_is_that_of_numpys_bootstrap() -> None:
    values = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    random = np.random.default_rng(1)
    means = random.choice(values.numpy(), (20000, 60)).mean(1)
    assert mean_interval(values, draws=20000) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.003)


def test_any_figure_and_the_fast_path_for_means_agree() -> None:
    values = torch.randn(80, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slow = interval(lambda drawn: float(values[drawn].mean()), 80, draws=4000)
    assert slow == pytest.approx(mean_interval(values, draws=4000), abs=0.02)


def test_the_interval_of_a_median_holds_the_median_and_narrows_with_the_number_of_queries() -> None:
    widths = []
    for count in (50, 800):
        values = torch.randn(count, generator=torch.Generator().manual_seed(3))
        low, high = interval(lambda drawn, values=values: float(values[drawn].median()), count)
        assert low < float(values.median()) < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.5)  # the square root of 16


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    generator = torch.Generator().manual_seed(4)
    held = 0
    for _ in range(300):
        low, high = mean_interval(torch.rand(150, generator=generator) < 0.7, draws=300)
        held += low <= 0.7 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_an_interval_is_the_same_each_time_and_another_with_another_seed() -> None:
    values = answers(30, 20).double() * torch.arange(50)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) != mean_interval(values, seed=1)
    figure = lambda drawn: float(values[drawn].mean())  # noqa: E731
    assert interval(figure, 50) == interval(figure, 50)


def test_the_fast_path_does_not_depend_on_how_much_it_does_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(40.0) ** 2
    whole = mean_interval(values, draws=333)
    monkeypatch.setattr(evidence, "AT_ONCE", 170)
    assert mean_interval(values, draws=333) == whole


def test_draws_without_a_figure_are_left_out() -> None:
    low, high = interval(lambda drawn: float("nan") if 0 in drawn else 0.5, 5)
    assert (low, high) == (0.5, 0.5)


def test_no_width_where_all_agree_and_no_interval_without_queries() -> None:
    assert mean_interval(answers(9, 0)) == (1, 1)
    for make in (lambda: mean_interval(torch.zeros(0)), lambda: interval(lambda _: 0.0, 0)):
        with pytest.raises(BingoError, match="at least one query"):
            make()


# ---------------------------------------------------------------- two models


def test_mcnemar_counts_and_the_exact_binomial() -> None:
    a = torch.tensor([True] * 10 + [True] * 8 + [False] * 2 + [False] * 5)
    b = torch.tensor([True] * 10 + [False] * 8 + [True] * 2 + [False] * 5)
    found = paired(a, b)
    assert (found.only_a, found.only_b) == (8, 2)
    assert found.difference == pytest.approx(6 / 25)
    assert found.p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert found.low < 6 / 25 < found.high
    turned = paired(b, a)
    assert (turned.difference, turned.p_value) == (-found.difference, found.p_value)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (1, 0), (3, 3), (0, 9), (17, 31), (120, 180), (1500, 1700)])
def test_the_p_value_against_sums_of_logarithms(one: int, other: int) -> None:
    count = one + other
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2) for k in range(count + 1)]
    observed = logs[one]
    expected = min(1.0, math.fsum(math.exp(value) for value in logs if value <= observed + 1e-9))  # all outcomes at most as likely
    both = answers(5, 0)
    found = paired(torch.cat((both, answers(one, other))), torch.cat((both, ~answers(one, other))))
    assert found.p_value == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow  # importing scipy
def test_the_p_value_equals_scipys() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for one, other in ((4, 11), (60, 33), (400, 470)):
        expected = stats.binomtest(one, one + other).pvalue
        assert paired(answers(one, other), ~answers(one, other)).p_value == pytest.approx(expected, rel=1e-9)


def test_pairing_makes_the_interval_of_alike_models_narrow() -> None:
    generator = torch.Generator().manual_seed(6)
    a = torch.rand(400, generator=generator) < 0.6
    b = a.clone()
    b[:8] = ~b[:8]
    found = paired(a, b)
    unpaired = mean_interval(a)
    assert found.high - found.low < (unpaired[1] - unpaired[0]) / 3
    assert paired(a, a).p_value == 1 and paired(a, a).low == paired(a, a).high == 0


def test_a_pair_needs_the_same_queries() -> None:
    with pytest.raises(BingoError, match="found 3 and 4"):
        paired(answers(3, 0), answers(2, 2))


# ---------------------------------------------------------------- classes


def test_confusion_has_the_truth_in_its_rows() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 2, 2, 1, 0, 3])
    counts = confusion(predicted, labels, 4)
    assert counts.tolist() == [[1, 0, 2, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert counts.dtype == torch.int64
    assert per_class(counts) == [pytest.approx(1 / 3), 0.5, None, 1.0]


# ---------------------------------------------------------------- seeds and ranks


def test_mean_and_spread_over_seeds() -> None:
    assert mean_and_spread([0.2, 0.5, 0.8]) == (pytest.approx(0.5), pytest.approx(0.3))
    assert mean_and_spread([0.7]) == (0.7, 0)


def slow_ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values]


def test_rank_correlation_with_ties() -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        x, y = random.integers(0, 6, 30).tolist(), random.integers(0, 9, 30).tolist()
        expected = np.corrcoef(slow_ranks(x), slow_ranks(y))[0, 1]
        assert spearman(x, y) == pytest.approx(expected, abs=1e-12)
        assert spearman(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_at_its_ends() -> None:
    x = [0.1, 0.4, 2.0, 300.0]
    assert spearman(x, [math.exp(value / 100) for value in x]) == pytest.approx(1)
    assert spearman(x, [-value for value in x]) == pytest.approx(-1)
    assert math.isnan(spearman(x, [1.0] * 4))
