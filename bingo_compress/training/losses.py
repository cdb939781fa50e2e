"""The losses: pure functions of tensors. A method is one dataclass whose call gives {name: scalar}, and one line in
LOSSES.

What a method needs from the loop stands beside its equation: `mates` (its second view shows a bag mate, else the anchor
again), `teacher`, `momentum` (embeddings of the student's own moving average: "views" of both student views, "fresh" of
one more view of the anchor), `lengths` (embeddings come as they are, not of length one), `negatives` (the queue),
`regression` (a deeper head onto the teacher's own features), `whole` (an equation over the rows of a batch together:
several processes bring theirs). Its fields are the settings of the recipe that its equation reads; `variant` in a
field's metadata: in that variant alone.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus

from bingo_compress.kernels.negatives import expected_key, negatives_energy, similarities


@dataclass(frozen=True)
class Queries:
    """Student embeddings of one batch, each (B, D): the anchor, the second view (see `mates`), and (official) the
    CutMix of both with its share.
    """

    anchor: Tensor
    mate: Tensor
    mixed: Tensor | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Targets:
    """Embeddings (B, D) of the anchors and, where a method asks for them, of what the second view shows; views of their
    own.
    """

    anchor: Tensor
    mate: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """All that a loss may look at. keys: by the student's moving average; negatives: (Q, D) earlier targets (keys where
    there are no targets); masked: (B, Q) rows that are no negatives for that anchor, or None.
    """

    queries: Queries
    targets: Targets | None
    keys: Targets | None
    negatives: Tensor
    masked: Tensor | None
    epoch: int

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each student view with the target of the image it shows."""
        assert self.targets is not None and self.targets.mate is not None
        return [(self.queries.anchor, self.targets.anchor), (self.queries.mate, self.targets.mate)]


class Loss(Protocol):
    """A method: what it needs, and its equation."""

    mates: ClassVar[bool]
    teacher: ClassVar[bool]
    momentum: ClassVar[str]
    lengths: ClassVar[bool]
    negatives: ClassVar[bool]
    regression: ClassVar[bool]
    whole: ClassVar[bool]

    @property
    def official(self) -> bool:
        """Whether a mixed student view is needed."""

    @property
    def both(self) -> bool:
        """Whether the second view needs a target of its own."""

    @property
    def averaged(self) -> bool:
        """Whether a target is the mean of an image's stored views, unless the recipe says otherwise."""

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The terms whose sum is the loss."""


def info_nce(query: Tensor, target: Tensor, energy: Tensor, temperature: float) -> Tensor:
    """-log( e^(s.k/tau) / (e^(s.k/tau) + sum of e^(s.q/tau)) ), mean over the batch; `energy` (B,) is
    `negatives_energy` of the query.
    """
    return softplus(energy - (query * target).sum(1) / temperature).mean()


def soft_nce(query: Tensor, target: Tensor, energy: Tensor, expected: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between softmax of the target's and of the query's similarities to [target; queue], mean over the
    batch (SEED, equation 3).

    It is linear in the query but for the logarithm of the sum, so `energy` (B,), `negatives_energy` of the query, and
    `expected` (B, D), `expected_key` of the target, are all it needs of the queue: both serve every pair that the query
    or the target is in.
    """
    total = torch.logaddexp((query * target).sum(1) / temperature, energy)
    return (total - (query * expected).sum(1) / temperature).mean()


@dataclass(frozen=True)
class _Method:
    """What most methods share: a teacher, both views of the anchor, embeddings of length one."""

    mates: ClassVar[bool] = False
    teacher: ClassVar[bool] = True
    momentum: ClassVar[str] = ""
    lengths: ClassVar[bool] = False
    negatives: ClassVar[bool] = False
    regression: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    official: ClassVar[bool] = False
    both: ClassVar[bool] = True
    averaged: ClassVar[bool] = False


@dataclass(frozen=True)
class _Contrast(_Method):
    """A softmax over similarities to the queue."""

    temperature: float = 0.2
    negatives: ClassVar[bool] = True

    def _contrast(self, query: Tensor, key: Tensor, batch: Batch) -> Tensor:
        energy = negatives_energy(query, batch.negatives, batch.masked, self.temperature)
        return info_nce(query, key, energy, self.temperature)


@dataclass(frozen=True)
class Bingo(_Contrast):
    """BINGO (arXiv 2107.01691). variant "paper": its equations; "official": what the published code computes (CutMix,
    two targets); "soft": ours, both views against both images' targets, each target as the teacher's distribution over
    [target; queue] (SEED's) in place of the one right answer; inter_weight weighs a view against the other image's
    target.
    """

    variant: str = "soft"
    switch_epoch: int = field(default=11, metadata={"variant": "official"})
    teacher_temperature: float = field(default=0.1, metadata={"variant": "soft"})
    inter_weight: float = field(default=0.5, metadata={"variant": "soft"})
    mates: ClassVar[bool] = True

    @property
    def official(self) -> bool:  # type: ignore[override]
        """Whether a mixed student view is needed."""
        return self.variant == "official"

    @property
    def both(self) -> bool:  # type: ignore[override]
        """Whether the mate's target is needed."""
        return self.variant != "paper"

    @property
    def averaged(self) -> bool:  # type: ignore[override]
        """Whether a target is the mean of the stored views."""
        return self.variant == "soft"

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """intra + inter (+ mixed)."""
        assert batch.targets is not None
        queries, targets, tau = batch.queries, batch.targets, self.temperature
        if self.variant == "paper":
            return {
                "intra": self._contrast(queries.anchor, targets.anchor, batch),
                "inter": self._contrast(queries.mate, targets.anchor, batch),
            }
        assert targets.mate is not None
        if self.variant == "soft":
            views = [
                (query, negatives_energy(query, batch.negatives, batch.masked, tau))
                for query in (queries.anchor, queries.mate)
            ]
            images = [
                (target, expected_key(target, batch.negatives, batch.masked, self.teacher_temperature))
                for target in (targets.anchor, targets.mate)
            ]

            def soft(view: int, image: int) -> Tensor:
                (query, energy), (target, expected) = views[view], images[image]
                return soft_nce(query, target, energy, expected, tau)

            return {"intra": soft(0, 0) + soft(1, 1), "inter": self.inter_weight * (soft(0, 1) + soft(1, 0))}
        assert queries.mixed is not None
        now, later = (1.0, 0.0) if batch.epoch < self.switch_epoch else (0.5, 0.5)
        anchor_energy, mate_energy, mixed_energy = (
            negatives_energy(query, batch.negatives, batch.masked, tau)
            for query in (queries.anchor, queries.mate, queries.mixed)
        )
        share = queries.share
        intra = info_nce(queries.anchor, targets.anchor, anchor_energy, tau) + info_nce(
            queries.mate, targets.mate, mate_energy, tau
        )
        inter = info_nce(queries.anchor, targets.mate, anchor_energy, tau) + info_nce(
            queries.mate, targets.anchor, mate_energy, tau
        )
        mixed = share * info_nce(queries.mixed, targets.anchor, mixed_energy, tau)
        mixed = mixed + (1 - share) * info_nce(queries.mixed, targets.mate, mixed_energy, tau)
        return {"intra": now * intra / 3, "inter": later * inter / 3, "mixed": mixed / 3}


@dataclass(frozen=True)
class Itself(_Contrast):
    """BINGO's equations with the student's own moving average as teacher (the paper's future work); bags are rebuilt
    from it every few epochs.
    """

    mates: ClassVar[bool] = True
    teacher: ClassVar[bool] = False
    momentum: ClassVar[str] = "fresh"
    both: ClassVar[bool] = False

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """intra + inter."""
        assert batch.keys is not None
        key = batch.keys.anchor
        return {
            "intra": self._contrast(batch.queries.anchor, key, batch),
            "inter": self._contrast(batch.queries.mate, key, batch),
        }


@dataclass(frozen=True)
class Moco(_Contrast):
    """MoCo-v2 (arXiv 2003.04297), no teacher: InfoNCE of each view against the other's key by the moving average, mean
    of both directions.
    """

    teacher: ClassVar[bool] = False
    momentum: ClassVar[str] = "views"

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """contrast."""
        assert batch.keys is not None and batch.keys.mate is not None
        queries, keys = batch.queries, batch.keys
        return {
            "contrast": (
                (
                    self._contrast(queries.anchor, batch.keys.mate, batch)
                    + self._contrast(queries.mate, keys.anchor, batch)
                )
                / 2
            )
        }


@dataclass(frozen=True)
class Disco(_Contrast):
    """DisCo (arXiv 2104.09124): MoCo-v2's loss and, for each view, the squared distance of the normalised embeddings of
    student and teacher.
    """

    momentum: ClassVar[str] = "views"

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """contrast + one distance a view, weights 1/1/1."""
        distances = [(query - target).square().sum(1).mean() for query, target in batch.pairs]
        return {**Moco(self.temperature)(batch), "distance": distances[0] + distances[1]}


@dataclass(frozen=True)
class Seed(_Contrast):
    """SEED (arXiv 2101.04731): cross-entropy between teacher's and student's softmax over [own target; queue].
    temperature is the student's.
    """

    teacher_temperature: float = 0.01

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """distribution: mean of both views."""
        return {"distribution": torch.stack([self._one(query, target, batch) for query, target in batch.pairs]).mean()}

    def _one(self, query: Tensor, target: Tensor, batch: Batch) -> Tensor:
        energy = negatives_energy(query, batch.negatives, batch.masked, self.temperature)
        expected = expected_key(target, batch.negatives, batch.masked, self.teacher_temperature)
        return soft_nce(query, target, energy, expected, self.temperature)


@dataclass(frozen=True)
class Compress(_Contrast):
    """CompRess, 1q (arXiv 2010.14713): KL between the teacher's and the student's softmax over one queue of teacher
    embeddings.
    """

    temperature: float = 0.04

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """distribution: mean of both views."""
        return {"distribution": torch.stack([self._one(query, target, batch) for query, target in batch.pairs]).mean()}

    def _one(self, query: Tensor, target: Tensor, batch: Batch) -> Tensor:
        if not len(batch.negatives):
            return query.sum() * 0
        wanted, found = (
            similarities(rows, batch.negatives, batch.masked, self.temperature).log_softmax(1)
            for rows in (target, query)
        )
        return (wanted.exp() * (wanted - found)).sum(1).mean()


@dataclass(frozen=True)
class Simreg(_Method):
    """SimReg (arXiv 2201.05131): squared distance of the normalised output of a four-layer head to the teacher's
    normalised features.
    """

    regression: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """distance: mean of both views."""
        return {
            "distance": torch.stack([(query - target).square().sum(1).mean() for query, target in batch.pairs]).mean()
        }


@dataclass(frozen=True)
class Coss(_Method):
    """CoSS (arXiv 2409.13939): cosine distance of each embedding, and of each dimension over a batch that is enriched
    with neighbours.
    """

    mates: ClassVar[bool] = True
    lengths: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """feature + space."""
        queries, targets = (torch.cat(rows) for rows in zip(*batch.pairs, strict=True))
        return {
            "feature": (1 - cosine_similarity(queries, targets, dim=1)).mean(),
            "space": (1 - cosine_similarity(queries, targets, dim=0)).mean(),
        }


LOSSES: dict[str, Any] = {
    "bingo": Bingo,
    "seed": Seed,
    "disco": Disco,
    "compress": Compress,
    "simreg": Simreg,
    "coss": Coss,
    "moco": Moco,
    "self": Itself,
}


def make_loss(method: str, settings: dict[str, Any]) -> Loss:
    """The method with those of its fields that are in `settings`; a temperature of 0 means the method's own."""
    kind = LOSSES[method]
    values = {field.name: settings[field.name] for field in fields(kind) if field.name in settings}
    made: Loss = kind(**{name: value for name, value in values.items() if value or not name.endswith("temperature")})
    return made


def settled(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The method's fields with their values as `make_loss` takes them."""
    made = make_loss(method, settings)
    return {field.name: getattr(made, field.name) for field in fields(LOSSES[method])}


def readers() -> dict[str, dict[str, str]]:
    """Each setting that an equation reads: the methods that do, and the variant in which alone they do, "" for any."""
    found: dict[str, dict[str, str]] = {}
    for method, kind in LOSSES.items():
        for each in fields(kind):
            found.setdefault(each.name, {})[method] = each.metadata.get("variant", "")
    return found
