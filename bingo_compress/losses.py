"""The losses: pure functions of tensors. A method is one dataclass whose call gives {name: scalar}, and one line in LOSSES."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

MASKED = -1e9  # finite, so that a row whose every negative is masked has a gradient of zero, not NaN


@dataclass(frozen=True)
class Queries:
    """Student embeddings of one batch, each (B, D), L2-normalised: anchor, bag mate, and (official) the CutMix of both with its share."""

    anchor: Tensor
    mate: Tensor
    mixed: Tensor | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Targets:
    """Teacher embeddings (B, D), L2-normalised, of the anchors and (official) of their bag mates."""

    anchor: Tensor
    mate: Tensor | None = None


def negatives_energy(query: Tensor, negatives: Tensor, masked: Tensor | None, temperature: float) -> Tensor:
    """log of the sum over the queue of exp(query . q / tau). query: (B, D); negatives: (Q, D); masked: (B, Q) left out. Returns (B,)."""
    logits = query @ negatives.T / temperature
    if masked is not None:
        logits = logits.masked_fill(masked, MASKED)
    return logits.logsumexp(dim=1) if len(negatives) else torch.full_like(query[:, 0], MASKED)


def info_nce(query: Tensor, target: Tensor, energy: Tensor, temperature: float) -> Tensor:
    """-log( e^(s.k/tau) / (e^(s.k/tau) + sum of e^(s.q/tau)) ), mean over the batch; `energy` (B,) is `negatives_energy` of the query."""
    return softplus(energy - (query * target).sum(1) / temperature).mean()


@dataclass(frozen=True)
class Bingo:
    """BINGO (arXiv 2107.01691). variant "paper": its equations; "official": what the published code computes (CutMix, two targets)."""

    temperature: float
    variant: str
    switch_epoch: int

    @property
    def official(self) -> bool:
        """Whether a mixed student view and the mate's target are needed."""
        return self.variant == "official"

    def __call__(self, queries: Queries, targets: Targets, negatives: Tensor, masked: Tensor | None, epoch: int) -> dict[str, Tensor]:
        """The terms whose sum is the loss. negatives: (Q, D); masked: (B, Q) rows that are no negatives for that anchor, or None."""
        tau = self.temperature
        anchor_energy = negatives_energy(queries.anchor, negatives, masked, tau)
        mate_energy = negatives_energy(queries.mate, negatives, masked, tau)
        if not self.official:
            return {
                "intra": info_nce(queries.anchor, targets.anchor, anchor_energy, tau),
                "inter": info_nce(queries.mate, targets.anchor, mate_energy, tau),
            }
        assert queries.mixed is not None and targets.mate is not None
        own, other = (1.0, 0.0) if epoch < self.switch_epoch else (0.5, 0.5)
        mixed_energy = negatives_energy(queries.mixed, negatives, masked, tau)
        share = queries.share
        intra = info_nce(queries.anchor, targets.anchor, anchor_energy, tau) + info_nce(queries.mate, targets.mate, mate_energy, tau)
        inter = info_nce(queries.anchor, targets.mate, anchor_energy, tau) + info_nce(queries.mate, targets.anchor, mate_energy, tau)
        mixed = share * info_nce(queries.mixed, targets.anchor, mixed_energy, tau)
        mixed = mixed + (1 - share) * info_nce(queries.mixed, targets.mate, mixed_energy, tau)
        return {"intra": own * intra / 3, "inter": other * inter / 3, "mixed": mixed / 3}


LOSSES = {"bingo": Bingo}
