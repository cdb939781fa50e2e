"""Intervals, paired tests and rank correlation against closed forms and slow, plain references."""

import math
import statistics

import numpy as np
import pytest
import torch

from bingo_compress.errors import BingoError
from bingo_compress.evaluation import intervals, probes
from bingo_compress.evaluation.intervals import (
    FEW,
    area_interval,
    bounded_interval,
    confusion,
    interval,
    mean_and_spread,
    mean_interval,
    mean_share_interval,
    paired,
    seeds_interval,
    share_interval,
    spearman,
    wilson,
)


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
    monkeypatch.setattr(intervals, "AT_ONCE", 170)
    assert mean_interval(values, draws=333) == whole


def test_draws_without_a_figure_are_left_out() -> None:
    low, high = interval(lambda drawn: float("nan") if 0 in drawn else 0.5, 5)
    assert (low, high) == (0.5, 0.5)


def test_no_width_where_all_agree_and_no_interval_without_queries() -> None:
    assert mean_interval(answers(9, 0)) == (1, 1)
    for make in (lambda: mean_interval(torch.zeros(0)), lambda: interval(lambda _: 0.0, 0)):
        with pytest.raises(BingoError, match="at least one query"):
            make()


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (7, 20, 0.1812, 0.5671), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval_is_that_of_the_literature(right: int, count: int, low: float, high: float) -> None:
    """The last two after Newcombe 1998; the first two are z^2 / (n + z^2)."""
    assert wilson(right, count) == pytest.approx((low, high), abs=2e-4)


def test_few_queries_and_full_agreement_get_wilsons_interval() -> None:
    assert share_interval(answers(20, 10)) == wilson(20, 30)
    assert share_interval(answers(900, 0)) == wilson(900, 900)
    assert share_interval(answers(0, 900))[1] == pytest.approx(0.0042, abs=2e-4)
    assert share_interval(answers(90, 60)) == mean_interval(answers(90, 60))
    with pytest.raises(BingoError, match="at least one query"):
        share_interval(answers(0, 0))


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("count", [8, 30, 99])
def test_shares_of_few_queries_are_covered(share: float, count: int) -> None:
    """Exactly, over all outcomes; the bootstrap's coverage at 8 queries and a share of 0.97 is 0.22."""
    covered = 0.0
    for right in range(count + 1):
        low, high = share_interval(answers(right, count - right))
        covered += math.comb(count, right) * share**right * (1 - share) ** (count - right) * (low <= share <= high)
    assert covered >= 0.92


@pytest.mark.parametrize("count", [3, 5, 10, 40, 150])
def test_what_two_equal_students_gained_over_few_images_is_seldom_called_something(count: int) -> None:
    """Recalls in twentieths; by the bootstrap, three images called one of seven pairs different."""
    generator = torch.Generator().manual_seed(count)
    one, other = ((torch.rand(1000, count, generator=generator) * 8 + 4).round() / 20 for _ in range(2))
    called = [bounded_interval(gain, -1) for gain in one - other]
    assert sum(low > 0 or high < 0 for low, high in called) / 1000 <= 0.07


def test_a_mean_of_few_that_all_agree_is_not_certain() -> None:
    low, high = bounded_interval(torch.full((3,), 0.85))
    assert low < 0.6 and 0.85 < high < 1
    low, high = bounded_interval(torch.zeros(4), -1)
    assert low == pytest.approx(-high) and high > 0.5
    assert bounded_interval(torch.ones(200))[0] > 0.98
    values = torch.rand(FEW, generator=torch.Generator().manual_seed(0))
    assert bounded_interval(values) == mean_interval(values)
    with pytest.raises(BingoError):
        bounded_interval(torch.zeros(0))


@pytest.mark.slow
def test_the_balanced_accuracy_is_covered_with_rare_classes() -> None:
    generator = torch.Generator().manual_seed(4)
    labels, found = torch.tensor([0] * 80 + [1] * 12 + [2] * 5), torch.tensor([0.9, 0.7, 0.97], dtype=torch.float64)
    held = 0
    for _ in range(1000):
        right = torch.rand(97, generator=generator, dtype=torch.float64) < found[labels]
        low, high = mean_share_interval(right, labels)
        held += low <= float(found.mean()) <= high
    assert 0.93 <= held / 1000 <= 0.99
    low, high = mean_share_interval(torch.ones(97, dtype=torch.bool), labels)
    assert high == 1 and 0.8 < low < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("distance", [0.0, 1.0, 3.0])
def test_the_area_under_the_curve_is_covered(distance: float) -> None:
    """Two normal clouds `distance` apart: the area is Phi(distance / sqrt 2)."""
    truth = statistics.NormalDist().cdf(distance / math.sqrt(2))
    generator, held = torch.Generator().manual_seed(5), 0
    positive = torch.arange(50) < 15
    for _ in range(1000):
        area = probes.auc(torch.randn(50, generator=generator) + distance * positive, positive)
        low, high = area_interval(area, 15, 35)
        assert 0 <= low <= area <= high <= 1
        held += low <= truth <= high
    assert 0.92 <= held / 1000 <= 0.99


def test_a_perfect_area_is_not_certain_and_one_kind_has_none() -> None:
    low, high = area_interval(1.0, 10, 10)
    assert high == 1 and 0.75 < low < 0.9
    assert area_interval(1.0, 1000, 1000)[0] > 0.995
    assert all(math.isnan(end) for end in area_interval(float("nan"), 5, 0))


# ---------------------------------------------------------------- two arms over seeds


def of_two_arms(
    seeds: int, images: int, spread: float, generator: torch.Generator, better: float = 0.0, own: float = 0.0
) -> tuple[torch.Tensor, float]:
    """(difference of right answers (S, M) of two arms, its true mean): accuracies about 0.6 with a standard deviation
    of `spread` over seeds.

    Right where ability + ease of the image + chance > 0, all normal. better: ability of the first arm above the
    other's; own: ease that an image has for one of the arms alone.
    """
    normal, width = statistics.NormalDist(), math.sqrt(2 + own**2)
    at = normal.inv_cdf(0.6)
    of_seed = spread * width / normal.pdf(at)
    ease = torch.randn(images, generator=generator)
    right = []
    for ability in (better, 0.0):
        seed = at * width + ability + of_seed * torch.randn(seeds, 1, generator=generator)
        right.append(
            seed
            + ease
            + own * torch.randn(images, generator=generator)
            + torch.randn(seeds, images, generator=generator)
            > 0
        )
    whole = math.sqrt(width**2 + of_seed**2)
    truth = normal.cdf((at * width + better) / whole) - normal.cdf(at * width / whole)
    return right[0].double() - right[1].double(), truth


@pytest.mark.slow
@pytest.mark.parametrize("own", [0.0, 0.7])
@pytest.mark.parametrize("images", [100, 400])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.04])
def test_equal_arms_of_three_seeds_are_seldom_called_different(spread: float, images: int, own: float) -> None:
    """A bootstrap over images calls 39% different at a spread of 4 points and 400 images. 5% and two standard errors of
    600 draws are 6.8%.
    """
    generator, wrong, held = torch.Generator().manual_seed(8), 0, 0
    for _ in range(600):
        found, _ = of_two_arms(3, images, spread, generator, own=own)
        low, high = seeds_interval(found)
        wrong += low > 0 or high < 0
        found, truth = of_two_arms(3, images, spread, generator, better=0.3, own=own)
        low, high = seeds_interval(found)
        held += low <= truth <= high
    assert wrong / 600 <= 0.068
    assert held / 600 >= 0.932


@pytest.mark.slow
def test_unlike_arms_are_called_different() -> None:
    generator = torch.Generator().manual_seed(9)
    found = [seeds_interval(of_two_arms(5, 400, 0.01, generator, better=0.5)[0]) for _ in range(100)]
    assert sum(low > 0 for low, _ in found) >= 95


def test_the_interval_over_seeds_is_students_where_images_say_nothing() -> None:
    """Three seeds that differ alike on every image: the t interval of three numbers."""
    each = torch.tensor([0.01, 0.03, 0.08], dtype=torch.float64)
    low, high = seeds_interval(each[:, None].expand(3, 50))
    half = 4.302653 * float(each.std()) / math.sqrt(3)
    assert (low, high) == pytest.approx((0.04 - half, 0.04 + half), abs=1e-5)
    assert seeds_interval(torch.zeros(3, 50)) == (0, 0)
    alone = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    assert seeds_interval(alone) == mean_interval(alone[0])


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (29, 2.04523), (399, 1.96593), (10**6, 1.95996)]
)
def test_students_quantile_is_that_of_the_tables(freedom: int, expected: float) -> None:
    assert intervals.student(freedom) == pytest.approx(expected, rel=2e-4)


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
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(count + 1)
    ]
    observed = logs[one]
    # All outcomes at most as likely.
    expected = min(1.0, math.fsum(math.exp(value) for value in logs if value <= observed + 1e-9))
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


# ---------------------------------------------------------------- seeds and ranks


def test_mean_and_spread_over_seeds() -> None:
    assert mean_and_spread([0.2, 0.5, 0.8]) == (pytest.approx(0.5), pytest.approx(0.3))
    assert mean_and_spread([0.7]) == (0.7, 0)


def slow_ranks(values: list[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


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


def test_a_patched_number_of_draws_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a default argument, bound before any patch: tests that wanted few draws made a thousand."""
    monkeypatch.setattr(intervals, "DRAWS", 7)
    drawn = list[int]()
    interval(lambda rows: float(drawn.append(len(rows)) or 0.0), 5)
    assert drawn == [5] * 7
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.5
    few = {made(values) for made in (mean_interval, share_interval)}
    assert few == {mean_interval(values, draws=7)} != {mean_interval(values, draws=1000)}
