"""How sure a figure is: intervals, a paired test of two models, differences over seeds, confusion, rank correlation."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bingo_compress.errors import BingoError

DRAWS = 1000  # where a caller names no other number
AT_ONCE = 4_000_000  # resampled values in memory
FEW = 100  # queries under which a bootstrap is too narrow
Z = statistics.NormalDist().inv_cdf(0.975)


def interval(figure: Callable[[Tensor], float], count: int, draws: int = 0, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap of any figure of `count` queries (Efron 1979).

    figure: takes positions (count,), drawn with replacement, and gives the figure of those queries; a NaN (a class that
    was not drawn) is left out. Returns (low, high). Raises BingoError without queries.
    """
    generator = _generator(count, seed)
    return _middle(
        torch.tensor(
            [figure(torch.randint(count, (count,), generator=generator)) for _ in range(draws or DRAWS)],
            dtype=torch.float64,
        )
    )


def mean_interval(values: Tensor, draws: int = 0, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap of the mean of per-query values (M,): `interval` of the mean, many draws at once. Raises
    BingoError without queries.
    """
    count, draws = len(values), draws or DRAWS
    generator = _generator(count, seed)
    rows = max(1, AT_ONCE // count)
    means = [
        values.double()[torch.randint(count, (min(rows, draws - start), count), generator=generator)].mean(1)
        for start in range(0, draws, rows)
    ]
    return _middle(torch.cat(means))


def share_interval(values: Tensor, draws: int = 0, seed: int = 0) -> tuple[float, float]:
    """95% interval of a share, the mean of votes (M,) in 0-1: `mean_interval`, and Wilson's under FEW queries or where
    all agree, which a bootstrap takes for certainty. Raises BingoError without queries.
    """
    if len(values) >= FEW and bool((values != values[0]).any()):
        return mean_interval(values, draws, seed)
    return wilson(float(values.double().sum()), len(values))


def bounded_interval(values: Tensor, least: float = 0.0) -> tuple[float, float]:
    """95% interval of the mean of per-query values (M,) between `least` and 1, such as recalls or what they gained:
    `mean_interval`; Student's under FEW queries, for which a bootstrap is too narrow; and Wilson's, the widest for such
    values, where all agree. Raises BingoError without queries.
    """
    values = values.double()
    if len(values) < 2 or bool((values == values[0]).all()):
        span = 1 - least
        low, high = wilson(float((values - least).sum()) / span, len(values))
        return least + span * low, least + span * high
    if len(values) >= FEW:
        return mean_interval(values)
    middle, half = float(values.mean()), student(len(values) - 1) * float(values.std()) / math.sqrt(len(values))
    return max(least, middle - half), min(1.0, middle + half)


def wilson(found: float, count: int) -> tuple[float, float]:
    """95% score interval of the share found / count (Wilson 1927). Raises BingoError for a count of 0."""
    _generator(count, 0)
    share, shrink = found / count, 1 + Z**2 / count
    middle = (share + Z**2 / (2 * count)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def rows_by_class(labels: Tensor) -> tuple[Tensor, ...]:
    """The rows, ascending, of each class that is in labels (N,), by class: one pass for thousands of classes."""
    found: tuple[Tensor, ...] = labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist())
    return found


def mean_share_interval(right: Tensor, labels: Tensor) -> tuple[float, float]:
    """95% interval of the mean over classes of the share found, of right, labels (M,): `wilson` of each class, combined
    as MOVER does (Zou and Donner 2008).
    """
    low = high = mean = 0.0
    classes = rows_by_class(labels)
    for rows in classes:
        votes = right[rows].double()
        share = float(votes.mean())
        bottom, top = wilson(float(votes.sum()), len(votes))
        mean, low, high = mean + share, low + (share - bottom) ** 2, high + (top - share) ** 2
    count = len(classes)
    return max(0.0, (mean - math.sqrt(low)) / count), min(1.0, (mean + math.sqrt(high)) / count)


def area_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """95% score interval of an area under the ROC curve (Newcombe 2006, method 5, on the variance of Hanley and McNeil
    1982). NaN without both kinds.
    """
    if not positives or not negatives:
        return float("nan"), float("nan")

    def error(truth: float) -> float:
        pairs = (positives + negatives) / 2 - 1
        variance = (
            truth
            * (1 - truth)
            * (1 + pairs * ((1 - truth) / (2 - truth) + truth / (1 + truth)))
            / (positives * negatives)
        )
        return Z * math.sqrt(max(variance, 0.0))

    def end(outer: float) -> float:
        inner = area
        for _ in range(60):  # the outermost area that would still allow the one found
            middle = (inner + outer) / 2
            inner, outer = (middle, outer) if abs(area - middle) <= error(middle) else (inner, middle)
        return inner

    return end(0.0), end(1.0)


def _generator(count: int, seed: int) -> torch.Generator:
    if not count:
        raise BingoError("an interval: expected the values of at least one query, found none; give test images")
    return torch.Generator().manual_seed(seed)


def _middle(drawn: Tensor) -> tuple[float, float]:
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@dataclass(frozen=True)
class Paired:
    """Two models on the same queries. difference: accuracy of a minus b; low, high: its 95% paired bootstrap interval.

    only_a, only_b: queries that one alone got right; p_value: the exact two-sided McNemar test of the two being equally
    likely.
    """

    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p_value: float


def paired(a: Tensor, b: Tensor, draws: int = 0, seed: int = 0) -> Paired:
    """Compare per-query correctness a, b (M,) bool of two models on the same queries. Raises BingoError where they are
    not the same queries.
    """
    if a.shape != b.shape:
        raise BingoError(
            f"a paired test: expected the same queries for both models, found {len(a)} and {len(b)}; test both on one"
            " folder"
        )
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    difference = a.double() - b.double()
    return Paired(
        float(difference.mean()), *mean_interval(difference, draws, seed), only_a, only_b, _sign_test(only_a, only_b)
    )


def _sign_test(one: int, other: int) -> float:
    """Two-sided binomial test of `one` against `other` with p = 1/2, in whole numbers: exact whatever the counts."""
    count, fewer = one + other, min(one, other)
    terms = itertools.accumulate(range(fewer), lambda term, k: term * (count - k) // (k + 1), initial=1)
    return min(1.0, 2 * sum(terms) / (1 << count))


def seeds_interval(differences: Tensor) -> tuple[float, float]:
    """95% interval of the mean of differences (S, M) of S seeds on M test images, for other seeds and other images of
    their kind.

    Seeds and images are two crossed random effects. The seeds' part of the mean's variance, which holds the chance of
    each single answer too, is known to S - 1 degrees of freedom; what images add beyond that chance to M - 1: each has
    its own quantile of t, and their half widths add as squares do (the modified large-sample interval of Graybill and
    Wang 1980). A bootstrap of three seeds would be too narrow, or too wide where seeds are alike. One seed:
    `mean_interval` over images, which cannot know how far another seed would land. Raises BingoError without images.
    """
    seeds, images = differences.shape
    values = differences.double()
    if seeds == 1 or images < 2:
        return mean_interval(values.mean(0))
    mean = float(values.mean())
    by_seed, by_image = values.mean(1) - mean, values.mean(0) - mean
    chance = float((values - mean - by_seed[:, None] - by_image).square().sum()) / ((seeds - 1) * (images - 1))
    of_seeds = images * float(by_seed.square().sum()) / (seeds - 1)
    of_images = max(seeds * float(by_image.square().sum()) / (images - 1) - chance, 0.0)
    half = math.sqrt((student(seeds - 1) ** 2 * of_seeds + student(images - 1) ** 2 * of_images) / (seeds * images))
    return mean - half, mean + half


@cache
def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t: with t = sqrt(freedom) tan x, the share inside +-t is that of cos(x)^(freedom
    - 1) up to x.
    """
    if freedom > 10_000:
        return Z
    x = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    share = torch.cumulative_trapezoid(x.cos() ** (freedom - 1), x)
    return math.sqrt(freedom) * math.tan(float(x[1:][torch.searchsorted(share, 0.95 * share[-1])]))


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (C, C) int64 of predicted, labels (M,): row the true class, column the predicted one."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spearman(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> float:
    """Rank correlation (Spearman 1904) of x, y (n,), ties averaged; NaN where either has no spread."""
    a, b = (rank - rank.mean() for rank in (ranks(torch.as_tensor(values, dtype=torch.float64)) for values in (x, y)))
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else float("nan")


def ranks(values: Tensor) -> Tensor:
    """Ranks (n,) float64 from 1, equal values sharing theirs."""
    _, where, count = values.unique(return_inverse=True, return_counts=True)
    shared: Tensor = (count.cumsum(0).double() - (count - 1) / 2)[where]
    return shared
