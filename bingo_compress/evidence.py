"""How sure a figure is: bootstrap intervals, a paired test of two models, confusion, spread over seeds, rank correlation."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bingo_compress.errors import BingoError

DRAWS = 1000
AT_ONCE = 4_000_000  # resampled values in memory


def interval(figure: Callable[[Tensor], float], count: int, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap of any figure of `count` queries (Efron 1979).

    figure: takes positions (count,), drawn with replacement, and gives the figure of those queries; a NaN (a class that was not drawn) is left out.
    Returns (low, high). Raises BingoError without queries.
    """
    generator = _generator(count, seed)
    return _middle(torch.tensor([figure(torch.randint(count, (count,), generator=generator)) for _ in range(draws)], dtype=torch.float64))


def mean_interval(values: Tensor, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap of the mean of per-query values (M,): `interval` of the mean, many draws at once. Raises BingoError without queries."""
    count = len(values)
    generator = _generator(count, seed)
    rows = max(1, AT_ONCE // count)
    means = [
        values.double()[torch.randint(count, (min(rows, draws - start), count), generator=generator)].mean(1)
        for start in range(0, draws, rows)
    ]
    return _middle(torch.cat(means))


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

    only_a, only_b: queries that one alone got right; p_value: the exact two-sided McNemar test of the two being equally likely.
    """

    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p_value: float


def paired(a: Tensor, b: Tensor, draws: int = DRAWS, seed: int = 0) -> Paired:
    """Compare per-query correctness a, b (M,) bool of two models on the same queries. Raises BingoError where they are not the same queries."""
    if a.shape != b.shape:
        raise BingoError(f"a paired test: expected the same queries for both models, found {len(a)} and {len(b)}; test both on one folder")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    difference = a.double() - b.double()
    return Paired(float(difference.mean()), *mean_interval(difference, draws, seed), only_a, only_b, _sign_test(only_a, only_b))


def _sign_test(one: int, other: int) -> float:
    """Two-sided binomial test of `one` against `other` with p = 1/2, in whole numbers: exact whatever the counts."""
    count, fewer = one + other, min(one, other)
    terms = itertools.accumulate(range(fewer), lambda term, k: term * (count - k) // (k + 1), initial=1)
    return min(1.0, 2 * sum(terms) / (1 << count))


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (C, C) int64 of predicted, labels (M,): row the true class, column the predicted one."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def per_class(confusion: Tensor) -> list[float | None]:
    """Share found of each class of a confusion matrix (C, C); None for a class without queries."""
    counts = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True)
    return [found / count if count else None for found, count in counts]


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
