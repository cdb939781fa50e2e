"""The proof, on frozen embeddings: weighted kNN, a linear probe, and, with no labels at all, neighbour recall."""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bingo_compress.errors import BingoError
from bingo_compress.evaluation import logistic
from bingo_compress.evaluation.intervals import ranks, rows_by_class
from bingo_compress.features.neighbours import RECALL_SHARE, nearest_neighbours, recall_k

KNN_K = 20
KNN_TEMPERATURE = 0.07
L2_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = KNN_K) -> Tensor:
    """DINO's weighted vote: each of the k most cosine-similar bank rows votes exp(cos / 0.07). bank (N, D), labels
    (N,). Returns (M,).
    """
    similar, indices = nearest_neighbours(queries, bank, min(k, len(bank)))
    votes = torch.zeros(len(queries), classes).scatter_add_(1, labels[indices], torch.exp(similar / KNN_TEMPERATURE))
    return votes.argmax(1)


@dataclass(frozen=True)
class LinearHead:
    """logits = features @ weight.T + bias on raw features. weight: (C, D); bias: (C,); strength: the L2 penalty that
    was chosen.
    """

    weight: Tensor
    bias: Tensor
    strength: float

    def logits(self, features: Tensor) -> Tensor:
        """(M, D) -> (M, C) float64, as on the device: sums in float32 would depend on the number of threads."""
        return features.double() @ self.weight.double().T + self.bias.double()

    def predict(self, features: Tensor) -> Tensor:
        """(M, D) -> class index (M,)."""
        return self.logits(features).argmax(1)


def fit_linear(
    features: Tensor, labels: Tensor, classes: int, seed: int = 0, groups: Tensor | None = None
) -> LinearHead:
    """Multinomial logistic regression on standardised features; its L2 strength by `choose_strength`, then all rows are
    used.

    features: (N, D) raw; labels: (N,); groups: as in `folds`. The test set is not seen here, so it cannot be chosen on.
    Fitted in float64, then rounded to float32: what is judged is what a device gets.
    """
    rows, mean, scale = _standardised(features)
    strength = choose_strength(rows, labels, classes, folds(labels, FOLDS, groups, seed))
    fitted = logistic.fit(rows.z, rows.spread, labels, classes, strength)
    weight = fitted[:, :-1] @ rows.turn.T / scale
    return LinearHead(weight.float(), (fitted[:, -1] - weight @ mean).float(), strength)


def _standardised(features: Tensor) -> tuple[logistic.Rows, Tensor, Tensor]:
    """(features (N, D) of mean 0 and spread 1, their means (D,), their spreads (D,))."""
    raw = features.double()
    mean = raw.mean(0)
    # A dead feature has no spread: the floor leaves it at zero instead of dividing by it.
    scale = raw.std(0).clamp(min=1e-6 * float(raw.std()) + 1e-12)
    return logistic.rows((raw - mean) / scale), mean, scale


def held_out_logits(features: Tensor, labels: Tensor, classes: int, strength: float, fold: Tensor) -> Tensor:
    """Logits (N, C) float64 of each row, by a head of that L2 strength fitted on the rows of the other folds.

    features: (N, D) raw; labels, fold: (N,). Features are standardised by all rows, which no label has told.
    """
    rows, _, _ = _standardised(features)
    logits = torch.zeros(len(labels), classes, dtype=torch.float64)
    for number in fold.unique().tolist():
        kept, held = fold != number, fold == number
        fitted = logistic.fit(rows.z[kept], rows.spread, labels[kept], classes, strength, exact=False)
        logits[held] = rows.z[held] @ fitted.T
    return logits


def choose_strength(rows: logistic.Rows, labels: Tensor, classes: int, fold: Tensor) -> float:
    """The strongest L2 penalty whose cross-validated accuracy is within one standard error of the best (Breiman et al.
    1984, the one-SE rule).

    labels, fold: (N,). From strong to weak, each fit from the last one's solution, until two in a row have not gained a
    standard error on the best.
    """
    found: dict[float, float] = {}
    starts: dict[int, Tensor] = {}
    best = error = idle = 0.0
    for strength in sorted(L2_STRENGTHS, reverse=True):
        right = 0
        for number in fold.unique().tolist():
            kept, held = fold != number, fold == number
            if kept.any():  # of a single row there is nothing to choose by
                starts[number] = logistic.fit(
                    rows.z[kept], rows.spread, labels[kept], classes, strength, starts.get(number), exact=False
                )
                right += int(((rows.z[held] @ starts[number].T).argmax(1) == labels[held]).sum())
        found[strength] = share = right / len(labels)
        idle = 0 if share > best + error else idle + 1
        best = max(best, share)
        error = math.sqrt(best * (1 - best) / len(labels))
        if idle == 2:
            break
    return max(strength for strength, share in found.items() if share >= best - error)


def grid_end(strength: float) -> str:
    """ "strongest" or "weakest" where a chosen penalty is the last of the grid on that side, so that one beyond it
    might have done better; else "".
    """
    return {max(L2_STRENGTHS): "strongest", min(L2_STRENGTHS): "weakest"}.get(strength, "")


def folds(labels: Tensor, count: int, groups: Tensor | None = None, seed: int = 0) -> Tensor:
    """Fold (N,), 0 to count - 1, of each row: each class spread as evenly as it can be, rows of one group (copies of
    one picture) together.

    labels, groups: (N,); groups None: every row for itself. The same rows give the same folds.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    named, of = labels.tolist(), (torch.arange(len(labels)) if groups is None else groups).tolist()
    members: dict[int, list[int]] = {}
    for row in order:
        members.setdefault(of[row], []).append(row)
    fold = torch.zeros(len(labels), dtype=torch.int64)
    held, total = [Counter[int]() for _ in range(count)], [0] * count
    for together in members.values():
        label = named[together[0]]
        number = min(range(count), key=lambda each: (held[each][label], total[each]))
        fold[together] = number
        held[number].update(named[row] for row in together)
        total[number] += len(together)
    return fold


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal entries."""
    return float((predicted == labels).double().mean())


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes present in `labels` of the share found: a rare class counts as much as a common one."""
    right = (predicted == labels).double()
    return float(torch.stack([right[rows].mean() for rows in rows_by_class(labels)]).mean())


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: how often a positive outscores a negative, ties half. scores: (N,); positive: (N,)
    bool.
    """
    rank = ranks(scores)
    many, few = int(positive.sum()), int((~positive).sum())
    if not many or not few:
        return float("nan")
    return float((rank[positive].sum() - many * (many + 1) / 2) / (many * few))


def neighbour_recall(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], k: int = 0) -> float:
    """Share of the teacher's k nearest gallery images of each query that are also the student's. Each argument:
    (queries (M, D), gallery (N, D)).

    k: 0 for `recall_k`. Raises BingoError where the gallery is too small for one.
    """
    return float(neighbour_recalls(teacher, student, k).mean())


def neighbour_recalls(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], k: int = 0) -> Tensor:
    """`neighbour_recall` of each query, (M,)."""
    k = k or recall_k(len(teacher[1]))
    if not 0 < k <= len(teacher[1]):
        raise BingoError(
            f"neighbour recall: expected a gallery of {max(k, RECALL_SHARE)} images or more, found {len(teacher[1])};"
            " add images"
        )
    wanted, found = (nearest_neighbours(*pair, k)[1] for pair in (teacher, student))
    return (wanted[:, :, None] == found[:, None, :]).any(2).double().mean(1)


def gap_closed(low: float, value: float, high: float) -> float:
    """How far `value` got from `low` (random weights) towards `high` (teacher), as a share; NaN where there is no
    gap.
    """
    return (value - low) / (high - low) if high != low else float("nan")


def normalised(features: Tensor) -> Tensor:
    """Rows of length one, as the exported file's `embedding` output."""
    return normalize(features.float(), dim=1)
