"""What losses ask of the queue: the energy of a student's embedding, and the key that a teacher's embedding expects. On
a GPU by one kernel.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bingo_compress.runtime import console

MASKED = -1e9  # finite, so that a row whose every negative is masked has a gradient of zero, not NaN
WORTH = 4096  # negatives from which on the kernel is used: below, a step is bound by its launches


def similarities(query: Tensor, negatives: Tensor, masked: Tensor | None, temperature: float) -> Tensor:
    """query . q / tau for every q of the queue, (B, Q). query: (B, D); negatives: (Q, D); masked: (B, Q) left out."""
    logits = query @ negatives.T / temperature
    return logits if masked is None else logits.masked_fill(masked, MASKED)


def negatives_energy(query: Tensor, negatives: Tensor, masked: Tensor | None, temperature: float) -> Tensor:
    """log of the sum over the queue of exp(query . q / tau). Arguments as in `similarities`. Returns (B,)."""
    if not len(negatives):
        return torch.full_like(query[:, 0], MASKED)
    if _by_kernel(negatives):
        energy: Tensor = _Energy.apply(query, negatives, masked, temperature)
        return energy
    return similarities(query, negatives, masked, temperature).logsumexp(dim=1)


def expected_key(target: Tensor, negatives: Tensor, masked: Tensor | None, temperature: float) -> Tensor:
    """The mean (B, D) of [target; queue], weighed by softmax of the target's similarities to them. Arguments as in
    `similarities`.
    """
    own = (target * target).sum(1) / temperature
    if not len(negatives):
        return target
    if _by_kernel(negatives):
        energy, mean = _attended(target, negatives, masked, temperature)
        total = torch.logaddexp(own, energy)
        return (own - total).exp()[:, None] * target + (energy - total).exp()[:, None] * mean
    logits = similarities(target, negatives, masked, temperature)
    total = torch.logaddexp(own, logits.logsumexp(dim=1))
    weights = (logits - total[:, None]).exp()
    return (own - total).exp()[:, None] * target + weights @ negatives


class _Energy(torch.autograd.Function):
    """The energy's gradient is the negatives' weighed mean over tau, which the kernel finds on the way."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, negatives: Tensor, masked: Tensor | None, temperature: float) -> Tensor:
        energy, mean = _attended(query, negatives, masked, temperature)
        ctx.save_for_backward(mean)
        ctx.temperature = temperature
        return energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (mean,) = ctx.saved_tensors
        return gradient[:, None] * mean / ctx.temperature, None, None, None


def _attended(rows: Tensor, negatives: Tensor, masked: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    from bingo_compress.kernels import attention

    tile = _tile(negatives.device, negatives.shape[1])
    return attention.attended(rows, negatives, masked, temperature, MASKED, tile)


def _by_kernel(negatives: Tensor) -> bool:
    return negatives.is_cuda and len(negatives) >= WORTH and _tile(negatives.device, negatives.shape[1]) is not None


@lru_cache
def _tile(device: torch.device, width: int) -> Any:
    """The first of attention.TILES that embeddings of that width fit with on that GPU; None where there is none, which
    is said once if it is a fault.
    """
    reason = ""
    try:
        from bingo_compress.kernels import attention

        if width > attention.WIDEST:
            return None
        rows, masked = torch.zeros(2, width, device=device), torch.zeros(2, 2, dtype=torch.bool, device=device)
        for tile in attention.TILES:
            try:
                attention.attended(rows, rows, masked, 1.0, MASKED, tile)
                return tile
            except Exception as error:  # Whatever the compiler raises.
                reason = str(error)
    except Exception as error:
        reason = str(error)
    console.say(
        f"warning: Triton cannot be used ({(reason.splitlines() or [''])[0][:120]}); the loss is computed step by step,"
        " which takes longer"
    )
    return None
