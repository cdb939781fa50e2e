"""Encoders over images: the teacher's one resumable pass, and plain embeddings for bags and validation."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from bingo_edge.image import ImageError, Pixels, preprocess
from torch import Tensor
from torch.nn.functional import normalize

from bingo_compress import augment, checkpoint, distributed, screen
from bingo_compress.encoder import Encoder, Preprocessing
from bingo_compress.errors import BingoError
from bingo_compress.images import Folder, decode_all
from bingo_compress.matrices import Matrix, Stored, blocks
from bingo_compress.pixels import PixelStore
from bingo_compress.run_dir import drop_stale, need_space, stage_key
from bingo_compress.transfer import sent

SHARD = 1024
BATCH = 64
PART = 8  # batches of plain embeddings in a file
LARGE = 512  # images that the teacher is given at once on a GPU; halved until they fit
ROWS = 8192  # rows of a stored pass held in memory at once

# A batch of one model's input, uint8 (B, S, S, 3), to features (B, width).
Embed = Callable[[Tensor], Tensor]
# Images (B,), the step's generator, and which rows of the batch are wanted (b,), to targets (b, D).
TargetOf = Callable[[Tensor, torch.Generator, Tensor], Tensor]


def as_embed(encoder: Encoder, device: torch.device) -> tuple[Preprocessing, Embed]:
    """An encoder as a function of uint8 batches, in inference mode on `device`."""
    encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def run(batch: Tensor) -> Tensor:
        features: Tensor = encoder(to_float(batch.to(device)))
        return features.float().cpu()

    return encoder.preprocessing, run


def to_float(pixels: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S) in 0..1, channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)


def plain(
    models: Mapping[str, tuple[Preprocessing, Embed]], folder: Folder, indices: Sequence[int], what: str, keep: Path | None = None
) -> tuple[dict[str, Tensor], list[int]]:
    """Plain-view features of several models from one decoding of each image, with the device's own preprocessing.

    Returns (features (n, width) by model, the n indices that could be decoded, in their order). Several processes share the images and each gets all.
    keep: a folder for finished parts, of these models and images alone: interrupted, the same call goes on after the last. Raises BingoError where no image
    can be decoded.
    """
    geometries = {name: model[0].geometry() for name, model in models.items()}
    distinct = [dict(items) for items in {tuple(geometry.items()) for geometry in geometries.values()}]

    def views(pixels: Pixels) -> list[Pixels]:
        return [preprocess(pixels, **geometry) for geometry in distinct]

    # Batches of places in `indices`, not of good images: they are the same, and so is their rounding, whatever the number of processes.
    starts = distributed.stretch(range(0, len(indices), BATCH))
    spans = {start: indices[start : start + BATCH] for start in starts}

    def batches(mine: Sequence[int], advance: screen.Advance) -> Iterator[list[Tensor]]:
        decoded = decode_all(folder, chain(*(spans[start] for start in mine)), views)
        for start in mine:
            good = [(index, result) for index, result in islice(decoded, len(spans[start])) if not isinstance(result, ImageError)]
            if good:
                stacks = [torch.from_numpy(np.stack(seen)) for seen in zip(*(result for _, result in good), strict=True)]
                features = [run(stacks[distinct.index(geometries[name])]) for name, (_, run) in models.items()]
                yield [torch.tensor([index for index, _ in good]), *features]
            advance(len(spans[start]))

    def parts() -> Iterator[list[Tensor]]:
        with screen.bar(what, sum(map(len, spans.values()))) as advance:
            if keep is None or len(starts) <= PART:
                yield from batches(starts, advance)
                return
            keep.mkdir(parents=True, exist_ok=True)
            for mine in (starts[first : first + PART] for first in range(0, len(starts), PART)):
                file = keep / f"{mine[0]:012d}-{mine[-1]:012d}.safetensors"
                if checkpoint.is_sound(file):
                    kinds = checkpoint.load(file)[0]
                    made = [kinds[str(number)] for number in range(len(kinds))]
                    advance(sum(len(spans[start]) for start in mine))
                else:
                    made = [torch.cat(kind) for kind in zip(*batches(mine, advance), strict=True)]
                    checkpoint.save(file, {str(number): kind for number, kind in enumerate(made)})
                if made:
                    yield made

    found = distributed.joined(parts())
    if not found:
        raise BingoError(
            f"expected images in {folder.root}, found none that can be decoded; `bingo-compress check --data {folder.root}` says why"
        )
    return dict(zip(models, found[1:], strict=True)), found[0].tolist()


def pixels_of(preprocessing: Preprocessing, folder: Folder, order: Sequence[int], count: int) -> Tensor:
    """The first `count` images in `order` that can be decoded, as a model's input: uint8 (n, S, S, 3). Raises BingoError where there is none."""
    geometry = preprocessing.geometry()
    found: list[Tensor] = []
    for _, result in decode_all(folder, order, lambda picture: preprocess(picture, **geometry)):
        if not isinstance(result, ImageError):
            found.append(torch.from_numpy(result))
        if len(found) == count:
            break
    if not found:
        raise BingoError(
            f"expected images in {folder.root}, found none that can be decoded; `bingo-compress check --data {folder.root}` says why"
        )
    return torch.stack(found)


@dataclass(frozen=True)
class TeacherPass:
    """What one pass of the teacher gave. features: (N, width) plain view, float16; embeddings: (N, D) plain view; views: (N, V, D), V may be 0.

    All are read from disk as they are used. key: of what the pass was made from.
    """

    features: Tensor
    embeddings: Tensor
    views: Tensor
    key: str


def teacher_pass(
    teacher: Encoder,
    folder: Folder,
    pixels: PixelStore,
    views: int,
    scale_min: float,
    work: Path,
    device: torch.device,
    *,
    of_features: bool = False,
) -> TeacherPass:
    """Embed the plain view and `views` augmented views of every image of `folder`, by shards of rows in work/teacher-KEY that are never made twice.

    Several processes share the shards.
    folder and pixels hold the same images in the same order. View v of an image is the same whatever `views` and the run's seed are, so that runs
    share them. of_features: views are backbone features, not embeddings. Raises BingoError when the disk is too small.
    """
    key = stage_key(
        images=folder.fingerprint(),
        teacher=weights_digest(teacher),
        preprocessing=asdict(teacher.preprocessing),
        scale_min=scale_min,
        of_features=of_features and teacher.projection is not None,
        layout=3,
    )
    stem = "teacher_features" if of_features and teacher.projection is not None else "teacher"
    shards = work / f"{stem}-{key}"
    distributed.from_first(lambda: drop_stale(work, stem, {shards.name}))
    shards.mkdir(exist_ok=True)
    count, width = len(folder.files), embedding_width(teacher)
    features, embeddings = Stored(shards / "features.f16", teacher.width), Stored(shards / "embeddings.f16", width)
    # View by view, so that more views go on at the end: (V, N, width).
    viewed = Stored(shards / "views.f16", teacher.width if of_features else width)

    def sound(rows: range, view: int) -> bool:
        if view < 0:
            return features.sound(rows.start, len(rows)) and embeddings.sound(rows.start, len(rows))
        return viewed.sound(view * count + rows.start, len(rows))

    ranges = [range(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]
    wanted = [(rows, view) for view in range(-1, views) for rows in ranges]
    lacking = set(chain(*distributed.exchange([shard for shard in distributed.mine(wanted) if not sound(*shard)])))
    missing = [shard for shard in wanted if shard in lacking]
    if missing:
        size = sum(len(rows) * 2 * (teacher.width + width if view < 0 else viewed.width) for rows, view in missing)
        distributed.from_first(lambda: need_space(work, size, "the teacher's embeddings"))
        for part, high in ((features, count), (embeddings, count), (viewed, views * count)):
            part.reserve(high)
        teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        fit = _Fit(LARGE if device.type == "cuda" else BATCH)
        mine = distributed.mine(missing)
        with screen.bar(f"teacher, {views + 1} views", sum(len(rows) for rows, _ in mine)) as advance:
            for rows, view in mine:
                if view < 0:
                    batches = _plain_shard(teacher, folder, rows, device)
                    for part, made in zip((features, embeddings), _embedded(teacher, batches, fit, advance), strict=True):
                        part.write(rows.start, made.half())
                else:
                    batches = _view_shard(teacher, pixels, rows, view, scale_min)
                    found = _embedded(teacher, batches, fit, advance)
                    viewed.write(view * count + rows.start, normalize(found[0], dim=1) if of_features else found[1])
    distributed.barrier()
    views_seen = viewed.read(views, count, viewed.width).transpose(0, 1) if views else torch.empty(count, 0, width, dtype=torch.float16)
    return TeacherPass(features.read(count, teacher.width), embeddings.read(count, width), views_seen, key)


@torch.inference_mode()
def embedding_width(teacher: Encoder) -> int:
    """Dimensions of the embedding that targets are made of."""
    if teacher.projection is None:
        return teacher.width
    size, device = teacher.preprocessing.size, next(teacher.parameters()).device
    return teacher.embed(torch.zeros(1, 3, size, size, device=device))[1].shape[1]


def _plain_shard(teacher: Encoder, folder: Folder, rows: range, device: torch.device) -> Iterator[Tensor]:
    """The plain view of the images `rows`, BATCH at a time: (B, 3, S, S)."""
    geometry = teacher.preprocessing.geometry()
    decoded = decode_all(folder, rows, lambda picture: preprocess(picture, **geometry))
    for start in range(rows.start, rows.stop, BATCH):
        batch = []
        for index in range(start, min(start + BATCH, rows.stop)):
            result = next(decoded)[1]
            if isinstance(result, ImageError):
                raise BingoError(f"{folder.path(index)} changed while the run was reading it ({result}); start the command again")
            batch.append(torch.from_numpy(result))
        yield to_float(torch.stack(batch).to(device))


def _view_shard(teacher: Encoder, pixels: PixelStore, rows: range, view: int, scale_min: float) -> Iterator[Tensor]:
    """An augmented view of the images `rows`, BATCH at a time: (B, 3, S, S)."""
    for start in range(rows.start, rows.stop, BATCH):
        indices = torch.arange(start, min(start + BATCH, rows.stop))
        # One generator a batch and view: the views do not depend on where the pass was interrupted, nor on what the teacher takes at once.
        generator = torch.Generator().manual_seed(hash_seed("view", view, start))
        drawn = augment.draw(pixels.aspect[indices], generator, scale_min)
        yield augment.apply(pixels.crops(indices, drawn.box, teacher.preprocessing.size), drawn)


@torch.inference_mode()
def _embedded(teacher: Encoder, batches: Iterator[Tensor], fit: "_Fit", advance: screen.Advance) -> tuple[Tensor, Tensor]:
    """(features (n, width) float32, embeddings (n, D) float16 of length one) of all images in `batches`, on the CPU."""
    found = []
    while group := list(islice(batches, max(fit.images // BATCH, 1))):
        found.append(fit(teacher, torch.cat(group)))
        advance(len(found[-1][0]))
    return torch.cat([features for features, _ in found]), torch.cat([embeddings for _, embeddings in found])


@dataclass
class _Fit:
    """How many images the teacher takes at once; halved whenever a GPU's memory does not suffice for them."""

    images: int

    def __call__(self, teacher: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
        while True:
            try:
                found = [_both(teacher, part) for part in images.split(self.images)]
                return torch.cat([features for features, _ in found]), torch.cat([embeddings for _, embeddings in found])
            except torch.cuda.OutOfMemoryError:
                if self.images == 1:
                    raise
                self.images //= 2
            torch.cuda.empty_cache()


def _both(teacher: Encoder, batch: Tensor) -> tuple[Tensor, Tensor]:
    """(features float32, embeddings float16 of length one), on the CPU."""
    features, embeddings = teacher.embed(batch.contiguous(memory_format=torch.channels_last))
    return features.float().cpu(), normalize(embeddings.float(), dim=1).half().cpu()


@dataclass(frozen=True)
class TargetSpace:
    """Where targets live: normalise, subtract `mean` (D,), project on `basis` (D, d), normalise. None leaves that step out."""

    mean: Tensor | None
    basis: Tensor | None

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(..., D) -> (..., d) float32, L2-normalised."""
        return normalize(self.project(embeddings), dim=-1)

    def project(self, embeddings: Tensor) -> Tensor:
        """The same without the last normalisation: (..., D) -> (..., d) float32."""
        points = normalize(embeddings.float(), dim=-1)
        if self.mean is not None:
            points = points - self.mean.to(points.device)
        return points if self.basis is None else points @ self.basis.to(points.device)


def target_space(embeddings: Matrix, target: str, dim: int) -> TargetSpace:
    """Fit on the plain-view embeddings (N, D). target: raw, centred, pca (at most `dim` dimensions kept) or whitened (the same, each scaled to variance 1)."""
    if target == "raw":
        return TargetSpace(None, None)
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


class StoredTargets:
    """Targets from stored views: one of an image's V views, drawn anew each time, or (mean) the mean of all, always the same.

    views: (N, V, D). lengths: not normalised at the end.
    """

    def __init__(self, views: Tensor, space: TargetSpace, device: torch.device, *, lengths: bool = False, mean: bool = False) -> None:
        self._lengths = lengths
        parts = (space.project(rows) if lengths else space(rows) for rows in views.split(ROWS))
        self._views = torch.cat([(part.mean(1, keepdim=True) if mean else part).half() for part in parts])
        if device.type == "cuda" and self._views.nbytes < 0.2 * torch.cuda.mem_get_info(device)[0]:
            self._views = self._views.to(device)
        self._device = device
        self.dim = self._views.shape[2]

    def __call__(self, indices: Tensor, generator: torch.Generator, mine: Tensor) -> Tensor:
        """Targets (b, dim), float32, L2-normalised (unless `lengths`), of the images indices[mine]; drawn for all of `indices` (B,)."""
        view = torch.randint(self._views.shape[1], (len(indices),), generator=generator)[mine]
        rows = (sent(positions, self._views.device) for positions in (indices[mine], view))
        drawn = sent(self._views[tuple(rows)], self._device).float()
        return drawn if self._lengths else normalize(drawn, dim=1)


class OnlineTargets:
    """Targets from the teacher itself, run on a fresh view of each image. lengths: not normalised at the end."""

    def __init__(
        self,
        teacher: Encoder,
        pixels: PixelStore,
        space: TargetSpace,
        scale_min: float,
        device: torch.device,
        dim: int,
        *,
        features: bool = False,
        lengths: bool = False,
    ) -> None:
        self._teacher = teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._pixels, self._scale_min = pixels, scale_min
        self._project = space.project if lengths else space.__call__
        self._which = 0 if features else 1
        self.dim = dim

    @torch.no_grad()
    def __call__(self, indices: Tensor, generator: torch.Generator, mine: Tensor) -> Tensor:
        """Targets (b, dim), float32, L2-normalised (unless `lengths`), of the images indices[mine]; drawn for all of `indices` (B,)."""
        drawn = augment.rows(augment.draw(self._pixels.aspect[indices], generator, self._scale_min), mine)
        indices = indices[mine]
        images = augment.apply(self._pixels.crops(indices, drawn.box, self._teacher.preprocessing.size), drawn)
        return self._project(self._teacher.embed(images.contiguous(memory_format=torch.channels_last))[self._which])


@torch.inference_mode()
def store_features(encoder: Encoder, pixels: PixelStore, indices: Tensor, device: torch.device) -> Tensor:
    """Features (n, width), on the CPU, of whole images of the pixel store, resized without crop: close to the plain view, and nothing is decoded.

    Several processes share the images and each gets all.
    """
    was_training = encoder.training
    encoder.eval()

    def features(rows: Tensor) -> Tensor:
        views = whole_images(pixels, rows, encoder.preprocessing.size).float().div_(255)
        found: Tensor = encoder(views.contiguous(memory_format=torch.channels_last))
        return found.float().cpu()

    (found,) = distributed.joined([features(rows)] for rows in distributed.stretch(indices.split(BATCH)))
    encoder.train(was_training)
    return found


def whole_images(pixels: PixelStore, indices: Tensor, size: int) -> Tensor:
    """Whole images (B,) of the pixel store, resized without crop: uint8 (B, 3, size, size)."""
    return pixels.crops(indices, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(indices), 4), size)


def hash_seed(*parts: object) -> int:
    """A 63-bit seed from anything: streams with different parts are independent."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def weights_digest(encoder: Encoder) -> str:
    """A hash of the encoder's name and weights."""
    digest = hashlib.sha256(encoder.name.encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {checkpoint.tensor_digest(tensor)}".encode())
    return digest.hexdigest()
