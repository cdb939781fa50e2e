"""Multinomial logistic regression to the last bit that matters: Newton's method in float64, so that the number of
threads changes nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NEWTON, CONJUGATE = 100, 500  # steps at most
EXACT = 1e-12  # largest entry of the gradient of a head that is kept
ROUGH = 0.01  # the same of one that only votes on its penalty, as a share of that at its start


@dataclass(frozen=True)
class Rows:
    """Standardised rows x, turned to where the objective is nearly round: x = z @ turn.T, the columns of z
    uncorrelated.

    z: (N, r + 1) float64, r = min(N, D), the last column ones; spread: (r + 1,) mean square of each column; turn: (D,
    r).
    """

    z: Tensor
    spread: Tensor
    turn: Tensor


def rows(x: Tensor) -> Rows:
    """The `Rows` of x (N, D) float64."""
    basis = torch.eye(x.shape[1], dtype=x.dtype)
    if len(x) < x.shape[1]:  # the solution lies in the space that the rows span
        basis, small = torch.linalg.qr(x.T)
        x = small.T
    spread, turn = torch.linalg.eigh(x.T @ x / len(x))
    ones = x.new_ones(len(x), 1)
    return Rows(torch.cat((x @ turn, ones), 1), torch.cat((spread.clamp(min=0), ones[0])), basis @ turn)


def fit(
    z: Tensor, spread: Tensor, y: Tensor, classes: int, strength: float, start: Tensor | None = None, exact: bool = True
) -> Tensor:
    """Weights (C, r + 1) that minimise mean cross entropy + strength / 2C * their squares, the last one of each class
    (its bias) left out.

    z, spread: as in `Rows` or some of its rows; y: (n,). Truncated Newton: conjugate gradients on the Hessian, as
    LIBLINEAR's trust region (Lin, Weng and Keerthi 2008), here with a line search and the rows' spread as
    preconditioner.
    """
    weight = z.new_zeros(classes, z.shape[1]) if start is None else start
    penalty = torch.full_like(spread, strength / classes)
    penalty[-1] = 0
    truth = torch.zeros(len(z), classes, dtype=z.dtype).scatter_(1, y[:, None], 1.0)

    def at(weight: Tensor) -> tuple[Tensor, float]:
        logs = (z @ weight.T).log_softmax(1)
        return logs.exp(), float(0.5 * (penalty * weight.square()).sum() - logs.gather(1, y[:, None]).mean())

    shares, loss = at(weight)
    enough = EXACT
    for number in range(NEWTON):
        gradient = (shares - truth).T @ z / len(z) + penalty * weight
        largest = float(gradient.abs().max())
        if number == 0 and not exact:
            enough = max(ROUGH * largest, EXACT)
        if largest < enough:
            break
        step = _newton_step(z, spread, shares, penalty, gradient, tolerance=min(0.06, largest) if exact else 0.25)
        slope, length = float((gradient * step).sum()), 1.0
        while True:
            moved = at(weight + length * step)
            if moved[1] <= loss + 1e-4 * length * slope + 1e-14 or length < 1e-6:
                break
            length /= 2
        weight, (shares, loss) = weight + length * step, moved
    return weight


def _newton_step(
    z: Tensor, spread: Tensor, shares: Tensor, penalty: Tensor, gradient: Tensor, tolerance: float
) -> Tensor:
    """-H^-1 gradient by preconditioned conjugate gradients, until the residual's square is `tolerance` of the first."""
    scale = 1 / (float((shares * (1 - shares)).mean()) * spread + penalty).clamp(min=1e-300)
    step, residual = torch.zeros_like(gradient), -gradient
    direction = residual * scale
    size = first = float((residual * direction).sum())
    for _ in range(CONJUGATE):
        along = z @ direction.T
        bent = (shares * (along - (shares * along).sum(1, keepdim=True))).T @ z / len(z) + penalty * direction
        curvature = float((direction * bent).sum())
        if curvature <= 0:  # flat to the last bit
            break
        step = step + size / curvature * direction
        residual = residual - size / curvature * bent
        before, size = size, float((residual.square() * scale).sum())
        if size <= tolerance * first:
            break
        direction = residual * scale + size / before * direction
    return step
