"""Probabilities that mean what they say, and the distance from which on an image is of no known class."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bingo_compress.evaluation import probes

BINS = 15  # of equal width, as Guo et al. 2017
RANGE = (0.005, 20.0)  # temperatures that are tried
GRID, SECTIONS = 40, 20
REFUSED_SHARE = 0.05  # of the known classes' own images that "none of these" may refuse


def temperature(log_shares: Callable[[float], Tensor], labels: Tensor) -> float:
    """The temperature of least negative log-likelihood (Guo et al. 2017): the best of a grid on a log scale, then a
    golden section beside it. log_shares: of a temperature, log probabilities (M, C) of held-out images; labels: (M,).

    Each label counts for its class with 1 - 1/(M + 2) alone (Platt 1999): where a head is right on all M images, no
    temperature would else be too low.
    """
    doubt = 1 / (len(labels) + 2)

    def loss(heat: float) -> float:
        logs = log_shares(heat)
        true = logs.gather(1, labels[:, None])[:, 0]
        others = (logs.sum(1) - true) / max(logs.shape[1] - 1, 1)
        return -float(((1 - doubt) * true + doubt * others).mean())

    tried = torch.linspace(math.log(RANGE[0]), math.log(RANGE[1]), GRID, dtype=torch.float64).tolist()
    losses = [loss(math.exp(each)) for each in tried]
    best = losses.index(min(losses))
    low, high = tried[max(best - 1, 0)], tried[min(best + 1, GRID - 1)]
    inner = (math.sqrt(5) - 1) / 2
    for _ in range(SECTIONS):
        left, right = high - inner * (high - low), low + inner * (high - low)
        low, high = (low, right) if loss(math.exp(left)) <= loss(math.exp(right)) else (left, high)
    return math.exp((low + high) / 2)


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Naeini et al. 2015, Guo et al. 2017): |accuracy - confidence| over BINS of the
    largest probability, each weighted by its share of the images. probabilities: (M, C); labels: (M,).
    """
    sure, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    place = (sure * BINS).ceil().long().clamp(1, BINS) - 1  # a bin holds its upper edge
    surplus = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, right - sure)
    return float(surplus.abs().sum() / len(labels))


def class_means(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean embedding of each class, made length one: (C, D) float32; zeros of a class without images."""
    total = torch.zeros(classes, embeddings.shape[1]).index_add_(0, labels, embeddings.float())
    return probes.normalised(total)


def distances(embeddings: Tensor, means: Tensor) -> Tensor:
    """1 - the largest cosine to the mean of a class. embeddings: (M, D) of length one; means: (C, D). Returns (M,)."""
    return 1 - (embeddings @ means.T).max(1).values


def threshold(embeddings: Tensor, labels: Tensor, classes: int, fold: Tensor) -> float:
    """The distance that REFUSED_SHARE of the images exceed, each measured to class means of the other folds alone.

    embeddings: (N, D) of length one; labels, fold: (N,).
    """
    found = torch.empty(len(labels))
    for number in fold.unique().tolist():
        held = fold == number
        found[held] = distances(embeddings[held], class_means(embeddings[~held], labels[~held], classes))
    return float(found.double().quantile(1 - REFUSED_SHARE))
