"""How sure a figure is: bootstrap intervals, spread over seeds, rank correlation."""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

DRAWS = 1000


def mean_interval(values: Tensor, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap of the mean of per-query values (M,)."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([values.double()[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(draws)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties averaged; NaN where either has no spread."""
    ranks = []
    for values in (x, y):
        row = torch.tensor(values, dtype=torch.float64)
        ranks.append((row[:, None] > row[None]).double().sum(1) + ((row[:, None] == row[None]).double().sum(1) - 1) / 2)
    a, b = (row - row.mean() for row in ranks)
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else float("nan")
