"""What a student is trained towards: the teacher's stored or fresh embeddings, in the space that a recipe asks for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bingo_compress.data import augment
from bingo_compress.data.pixel_store import PixelStore
from bingo_compress.features.memmap import Matrix, blocks, scratch
from bingo_compress.models.encoder import Encoder
from bingo_compress.runtime.machine import sent

ROWS = 8192  # rows of a stored pass held in memory at once
STEPS = 127  # of an int8, from zero on
# Images (B,), the step's generator, and which rows of the batch are wanted (b,), to targets (b, D).
TargetOf = Callable[[Tensor, torch.Generator, Tensor], Tensor]


@dataclass(frozen=True)
class TargetSpace:
    """Where targets live: normalise, subtract `mean` (D,), project on `basis` (D, d), normalise. None leaves that step
    out.
    """

    mean: Tensor | None = None
    basis: Tensor | None = None

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(..., D) -> (..., d) float32, L2-normalised."""
        return normalize(self.project(embeddings), dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        return {name: part for name, part in (("mean", self.mean), ("basis", self.basis)) if part is not None}

    def project(self, embeddings: Tensor) -> Tensor:
        """The same without the last normalisation: (..., D) -> (..., d) float32."""
        points = normalize(embeddings.float(), dim=-1)
        if self.mean is not None:
            points = points - self.mean.to(points.device)
        return points if self.basis is None else points @ self.basis.to(points.device)


RAW = TargetSpace()


def target_space(embeddings: Matrix, target: str, dim: int) -> TargetSpace:
    """Fit on the plain-view embeddings (N, D). target: raw, centred, pca (at most `dim` dimensions kept) or whitened
    (the same, each scaled to variance 1).
    """
    if target == "raw":
        return RAW
    count, width = embeddings.shape
    mean = torch.zeros(width, dtype=torch.float64)
    for _, rows in blocks(embeddings, ROWS):
        mean += normalize(rows.float(), dim=1).double().sum(0) / count
    if target == "centred":
        return TargetSpace(mean.float(), None)
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for _, rows in blocks(embeddings, ROWS):
        centred = normalize(rows.float(), dim=1).double() - mean
        covariance += centred.T @ centred / count
    keep = min(dim, width, count - 1)
    values, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -keep:]
    if target == "whitened":
        # The floor keeps directions without spread (fewer images than dimensions) from being blown up to noise.
        basis = basis / values[-keep:].clamp(min=1e-6 * float(values[-1])).sqrt()
    return TargetSpace(mean.float(), basis.float())


def packed(rows: Tensor) -> Tensor:
    """Rows (..., d) in a byte a number: int8 (..., d + 2). A number is in steps of a 127th of its row's largest; the
    last two bytes are the step, as bfloat16: of float16's range small rows would fall out.
    """
    step = (rows.abs().amax(-1, keepdim=True) / STEPS).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    codes = (rows / step.float()).round().clamp(-STEPS, STEPS).to(torch.int8)
    return torch.cat([codes, step.view(torch.int8)], -1)


def unpacked(rows: Tensor) -> Tensor:
    """What `packed` was given, (..., d), float32; no number is off by more than a 253rd of its row's largest."""
    step = rows[..., -2:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    return rows[..., :-2].float() * step.float()


def _at_hand(rows: Tensor, device: torch.device) -> Tensor:
    """The rows on the GPU, where they take little of what is free there; else where they are."""
    small = device.type == "cuda" and rows.nbytes < 0.2 * torch.cuda.mem_get_info(device)[0]
    return rows.to(device) if small else rows


class StoredTargets:
    """Targets from stored views: one of an image's V views, drawn anew each time, or (mean) the mean of all, always the
    same.

    views: (N, V, D). lengths: not normalised at the end. work: a folder for them; without one they are in memory.
    Raises BingoError when its disk is too small.
    """

    def __init__(
        self,
        views: Tensor,
        space: TargetSpace,
        device: torch.device,
        *,
        lengths: bool = False,
        mean: bool = False,
        work: Path | None = None,
    ) -> None:
        self._lengths = lengths
        project = space.project if lengths else space
        shape = (len(views), 1 if mean else views.shape[1], project(views[:1]).shape[-1])
        made = scratch(shape, torch.float16, work, "the file of targets")
        for rows, part in zip(made.split(ROWS), views.split(ROWS), strict=True):
            rows.copy_(project(part).mean(1, keepdim=True) if mean else project(part))
        self._views, self._device = _at_hand(made, device), device

    def __call__(self, indices: Tensor, generator: torch.Generator, mine: Tensor) -> Tensor:
        """Targets (b, dim), float32, L2-normalised (unless `lengths`), of the images indices[mine]; drawn for all of
        `indices` (B,).
        """
        view = torch.randint(self._views.shape[1], (len(indices),), generator=generator)[mine]
        rows = (sent(positions, self._views.device) for positions in (indices[mine], view))
        drawn = sent(self._views[tuple(rows)], self._device).float()
        return drawn if self._lengths else normalize(drawn, dim=1)


class PackedTargets:
    """The same from views that are in the target space already, and `packed`: read from disk as they are used, and
    never held as a whole in another form.

    views: (N, V, d + 2). lengths: not normalised at the end, as they were not when they were packed.
    """

    def __init__(self, views: Tensor, device: torch.device, *, lengths: bool = False, mean: bool = False) -> None:
        self._views, self._device = _at_hand(views, device), device
        self._lengths, self._mean = lengths, mean

    def __call__(self, indices: Tensor, generator: torch.Generator, mine: Tensor) -> Tensor:
        """Targets (b, dim), float32, L2-normalised (unless `lengths`), of the images indices[mine]; drawn for all of
        `indices` (B,), as `StoredTargets` draws.
        """
        count = self._views.shape[1]
        drawn = torch.randint(count, (len(indices),), generator=generator)[mine]
        wanted = [torch.full_like(drawn, view) for view in range(count)] if self._mean else [drawn]
        mean = torch.stack([self._rows(indices[mine], view) for view in wanted]).mean(0)
        return mean if self._lengths else normalize(mean, dim=1)

    def _rows(self, images: Tensor, view: Tensor) -> Tensor:
        places = (sent(positions, self._views.device) for positions in (images, view))
        return unpacked(sent(self._views[tuple(places)], self._device))


class OnlineTargets:
    """Targets from the teacher itself, run on a fresh view of each image. lengths: not normalised at the end."""

    def __init__(
        self,
        teacher: Encoder,
        pixels: PixelStore,
        space: TargetSpace,
        scale_min: float,
        device: torch.device,
        *,
        features: bool = False,
        lengths: bool = False,
    ) -> None:
        self._teacher = teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._pixels, self._scale_min = pixels, scale_min
        self._project = space.project if lengths else space.__call__
        self._which = 0 if features else 1

    @torch.no_grad()
    def __call__(self, indices: Tensor, generator: torch.Generator, mine: Tensor) -> Tensor:
        """Targets (b, dim), float32, L2-normalised (unless `lengths`), of the images indices[mine]; drawn for all of
        `indices` (B,).
        """
        drawn = augment.rows(augment.draw(self._pixels.aspect[indices], generator, self._scale_min), mine)
        indices = indices[mine]
        images = augment.apply(self._pixels.crops(indices, drawn.box, self._teacher.preprocessing.size), drawn)
        return self._project(self._teacher.embed(images.contiguous(memory_format=torch.channels_last))[self._which])
