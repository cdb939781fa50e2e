"""The proof, on frozen embeddings: weighted kNN, a linear probe, and, with no labels at all, neighbour recall."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bingo_compress.evidence import ranks
from bingo_compress.neighbours import nearest_neighbours

KNN_K = 20
KNN_TEMPERATURE = 0.07
RECALL_K = 20
L2_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = KNN_K) -> Tensor:
    """DINO's weighted vote: each of the k most cosine-similar bank rows votes exp(cos / 0.07). bank (N, D), labels (N,). Returns (M,)."""
    similar, indices = nearest_neighbours(queries, bank, min(k, len(bank)))
    votes = torch.zeros(len(queries), classes).scatter_add_(1, labels[indices], torch.exp(similar / KNN_TEMPERATURE))
    return votes.argmax(1)


@dataclass(frozen=True)
class LinearHead:
    """logits = features @ weight.T + bias on raw features. weight: (C, D); bias: (C,); strength: the L2 penalty that was chosen."""

    weight: Tensor
    bias: Tensor
    strength: float

    def predict(self, features: Tensor) -> Tensor:
        """(M, D) -> class index (M,)."""
        return (features @ self.weight.T + self.bias).argmax(1)

    def scores(self, features: Tensor) -> Tensor:
        """(M, D) -> class probabilities (M, C)."""
        return (features @ self.weight.T + self.bias).softmax(1)


def fit_linear(features: Tensor, labels: Tensor, classes: int, seed: int = 0) -> LinearHead:
    """Multinomial logistic regression by L-BFGS on standardised features; its L2 strength is chosen on a fifth of the rows held out, then all rows are used.

    features: (N, D) raw; labels: (N,). The test set is not seen here, so it cannot be chosen on.
    """
    mean = features.mean(0)
    # A dead feature has no spread: the floor leaves it at zero instead of dividing by it.
    scale = features.std(0).clamp(min=1e-6 * float(features.std()) + 1e-12)
    standard = (features - mean) / scale
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    best, best_accuracy, start = L2_STRENGTHS[-1], -1.0, None
    for strength in reversed(L2_STRENGTHS):  # strong to weak, each from the last one's solution; a tie keeps the stronger
        start = _logistic(standard[kept], labels[kept], classes, strength, start)
        accuracy = float(((standard[held] @ start[0].T + start[1]).argmax(1) == labels[held]).float().mean()) if len(held) else 0.0
        if accuracy > best_accuracy:
            best, best_accuracy = strength, accuracy
    weight, bias = _logistic(standard, labels, classes, best, None)
    weight = weight / scale
    return LinearHead(weight, bias - weight @ mean, best)


def _logistic(x: Tensor, y: Tensor, classes: int, strength: float, start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    weight = (start[0].clone() if start else torch.zeros(classes, x.shape[1])).requires_grad_()
    bias = (start[1].clone() if start else torch.zeros(classes)).requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5, tolerance_change=1e-8
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, y) + 0.5 * strength * weight.square().sum() / classes
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach(), bias.detach()


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal entries."""
    return float((predicted == labels).double().mean())


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes present in `labels` of the share found: a rare class counts as much as a common one."""
    return float(torch.stack([(predicted[labels == c] == c).double().mean() for c in labels.unique()]).mean())


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: how often a positive outscores a negative, ties half. scores: (N,); positive: (N,) bool."""
    rank = ranks(scores)
    many, few = int(positive.sum()), int((~positive).sum())
    if not many or not few:
        return float("nan")
    return float((rank[positive].sum() - many * (many + 1) / 2) / (many * few))


def neighbour_recall(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], k: int = RECALL_K) -> float:
    """Share of the teacher's k nearest gallery images of each query that are also the student's. Each argument: (queries (M, D), gallery (N, D))."""
    return float(neighbour_recalls(teacher, student, k).mean())


def neighbour_recalls(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], k: int = RECALL_K) -> Tensor:
    """`neighbour_recall` of each query, (M,)."""
    k = min(k, len(teacher[1]))
    wanted, found = (nearest_neighbours(*pair, k)[1] for pair in (teacher, student))
    return (wanted[:, :, None] == found[:, None, :]).any(2).double().mean(1)


def gap_closed(low: float, value: float, high: float) -> float:
    """How far `value` got from `low` (random weights) towards `high` (teacher), as a share; NaN where there is no gap."""
    return (value - low) / (high - low) if high != low else float("nan")


def normalised(features: Tensor) -> Tensor:
    """Rows of length one, as the exported file's `embedding` output."""
    return normalize(features.float(), dim=1)
