"""What to do with embeddings: the nearest ones, and classes from a linear or a nearest-neighbour head."""

import os
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bingo_edge.errors import EdgeError
from bingo_edge.files import read_npz, unit_rows
from bingo_edge.model import Embedded, Embedder

CHUNK = 4_000_000  # similarities held at once: 16 MB


class LinearHead(NamedTuple):
    """weight float32 (C, D) and bias float32 (C,) on raw features; classes unicode (C,).

    means: float32 (C, D) of length one, of the embeddings of each class; threshold: the distance to the nearest of them
    above which a picture is of none of the classes; both None where the head does not know them.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    classes: NDArray[np.str_]
    means: NDArray[np.float32] | None = None
    threshold: float | None = None


class BankHead(NamedTuple):
    """embeddings float32 (N, D) L2-normalised, labels int (N,) into classes unicode (C,), k neighbours, temperature of
    the vote; means and threshold as in `LinearHead`.
    """

    embeddings: NDArray[np.float32]
    labels: NDArray[np.integer[Any]]
    classes: NDArray[np.str_]
    k: int
    temperature: float
    means: NDArray[np.float32] | None = None
    threshold: float | None = None


Head = LinearHead | BankHead
NONE_OF_THESE = ("means", "threshold")
KEYS = {"linear head": ("weight", "bias", "classes"), "bank": ("embeddings", "labels", "classes", "k", "temperature")}


def load_head(path: str | PathLike[str], model: Embedder) -> Head:
    """Open the linear.npz or bank.npz of an open model; which of the two it is shows in its keys. Raises EdgeError, for
    another model file's head too.
    """
    todo = f"give {os.path.splitext(model.path)[0]}.linear.npz or .bank.npz, or run bingo-compress validate again"
    kind, held = read_npz(path, "a head", KEYS, model.sha256, todo)
    classes = held["classes"]
    try:
        good = classes.ndim == 1 and classes.dtype.kind == "U" and len(classes) > 0
        if kind == "linear head":
            weight, bias = held["weight"], held["bias"]
            good = good and weight.ndim == 2 and bias.shape == classes.shape == weight.shape[:1]
            if good and np.isfinite(weight).all() and np.isfinite(bias).all():
                none_of_these = _none_of_these(held, weight.shape)
                return LinearHead(weight.astype(np.float32), bias.astype(np.float32), classes, *none_of_these)
        else:
            rows, labels = unit_rows(held["embeddings"], path), held["labels"]
            k, temperature = int(held["k"]), float(held["temperature"])
            good = (
                good
                and labels.shape == (len(rows),)
                and labels.dtype.kind in "iu"
                and k > 0
                and 0 < temperature < np.inf
            )
            if good and labels.min() >= 0 and labels.max() < len(classes):
                none_of_these = _none_of_these(held, (len(classes), rows.shape[1]))
                return BankHead(rows, labels, classes, k, temperature, *none_of_these)
    except (TypeError, ValueError):
        pass  # the arrays are not even numbers: the same refusal
    keys = (*KEYS[kind], *(key for key in NONE_OF_THESE if key in held))
    shapes = ", ".join(f"{key} {held[key].dtype} {held[key].shape}" for key in keys)
    raise EdgeError(f"a sound {kind}", f"{shapes} in {os.fspath(path)}", "run bingo-compress validate again")


def _none_of_these(
    held: dict[str, NDArray[Any]], shape: tuple[int, ...]
) -> tuple[NDArray[np.float32] | None, float | None]:
    """(means, threshold) of a head, or None, None where it has neither. Raises ValueError for others than such."""
    if not set(NONE_OF_THESE) & held.keys():
        return None, None
    means, threshold = (held.get(key, np.array("")) for key in NONE_OF_THESE)
    if means.shape != shape or threshold.shape != () or means.dtype.kind != "f" or threshold.dtype.kind != "f":
        raise ValueError
    if not (np.isfinite(means).all() and 0 <= threshold <= 2):
        raise ValueError
    return means.astype(np.float32), float(threshold)


def classify(
    head: Head, embeddings: NDArray[Any], features: NDArray[Any]
) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
    """Classes of n pictures, from their embeddings (n, D) and features (n, D); a linear head reads the features, a bank
    the embeddings.

    Returns the most likely class of each, unicode (n,), and the probabilities float64 (n, C) in the order of
    head.classes: a softmax for a linear head; for a bank each class's share of the votes exp(cosine / temperature) of
    the k most similar rows. Raises EdgeError when D is not the head's.
    """
    rows, table = (features, head.weight) if isinstance(head, LinearHead) else (embeddings, head.embeddings)
    if rows.ndim != 2 or rows.shape[1] != table.shape[1]:
        raise EdgeError(
            f"rows of {table.shape[1]} values, as in the head",
            f"shape {rows.shape}",
            "use the head made for this model",
        )
    if isinstance(head, LinearHead):
        scores = rows.astype(np.float64) @ table.T.astype(np.float64) + head.bias
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    else:
        places, cosines = nearest(rows, table, head.k)
        # Less the best cosine: the shares are the same, none overflows.
        votes = np.exp((cosines - cosines[:, :1]) / head.temperature)
        shares = np.zeros((len(rows), len(head.classes)))
        np.add.at(shares, (np.arange(len(rows))[:, None], head.labels[places]), votes)
    probabilities = shares / shares.sum(axis=1, keepdims=True)
    return head.classes[probabilities.argmax(axis=1)], probabilities


class Answer(NamedTuple):
    """What a picture is taken for: the most likely class, its probability, and whether the picture is near enough to a
    class to be of one; distance is None, and known true, where neither head nor file knows how near that is.
    """

    label: str
    probability: float
    known: bool
    distance: float | None


def named(model: Embedder, found: Embedded, head: Head | None = None) -> list[Answer]:
    """The class of each picture that was embedded, by a head, or without one by the classes in the file. Raises
    EdgeError where there are none.
    """
    distances: NDArray[Any] | None = None
    threshold = model.threshold if head is None else head.threshold
    if head is not None:
        labels, probabilities = classify(head, found.embeddings, found.features)
        distances = None if head.means is None else 1 - (found.embeddings @ head.means.T).max(axis=1)
    elif found.scores is not None:
        probabilities = found.scores.astype(np.float64)
        labels = np.array(model.classes)[probabilities.argmax(axis=1)]
        distances = found.distances
    else:
        raise EdgeError("a model with classes in it, or a head", model.path, "give a head")
    answers = zip(labels.tolist(), probabilities.max(axis=1).tolist(), strict=True)
    if distances is None or threshold is None:
        return [Answer(label, probability, True, None) for label, probability in answers]
    return [
        Answer(label, probability, distance <= threshold, distance)
        for (label, probability), distance in zip(answers, distances.tolist(), strict=True)
    ]


def nearest(queries: NDArray[Any], bank: NDArray[np.float32], k: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The min(k, N) rows of bank (N, D) most similar to each of queries (n, D), all L2-normalised, best first, ties in
    bank order.

    Returns places in the bank and cosines, each (n, min(k, N)).
    """
    k = min(k, len(bank))
    places, cosines = np.empty((len(queries), k), np.intp), np.empty((len(queries), k))
    step = max(1, CHUNK // len(bank))
    for start in range(0, len(queries), step):
        for offset, row in enumerate(queries[start : start + step].astype(np.float32) @ bank.T):
            # At least k: a whole sort of a large bank would be slow.
            close = np.flatnonzero(row >= np.partition(row, -k)[-k])
            best = close[np.argsort(-row[close], kind="stable")][:k]
            places[start + offset], cosines[start + offset] = best, row[best]
    return places, cosines


def load_index(path: str | PathLike[str], model: Embedder) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Embeddings float32 (N, D) and paths unicode (N,) that an open model made: a file from `embed --out`, or a
    bank.npz. Raises EdgeError, for another model file's index too.
    """
    _, held = read_npz(
        path, "an index", {"index": ("paths", "embeddings")}, model.sha256, "make it again with this model"
    )
    rows, paths = unit_rows(held["embeddings"], path), held["paths"]
    if paths.shape != (len(rows),) or paths.dtype.kind != "U":
        raise EdgeError(
            f"{len(rows)} paths", f"{paths.dtype} {paths.shape} in {os.fspath(path)}", "make the index again"
        )
    return rows, paths
