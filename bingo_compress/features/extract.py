"""Encoders over images: plain embeddings for the proof, and the targets that a student is trained towards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from bingo_edge.image import ImageError, Pixels, preprocess
from torch import Tensor

from bingo_compress.data.decode import decode_all
from bingo_compress.data.image_list import ImageList
from bingo_compress.data.pixel_store import PixelStore
from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import Encoder, Preprocessing, evaluating
from bingo_compress.runtime import checkpoint, console, distributed
from bingo_compress.runtime.made_of import MadeOf, hash_seed, made_of

BATCH = 64
PART = 8  # batches of plain embeddings in a file

# A batch of one model's input, uint8 (B, S, S, 3), to features (B, width).
Embed = Callable[[Tensor], Tensor]


def on(encoder: Encoder, device: torch.device) -> Encoder:
    """The encoder, on `device`, channels last in memory."""
    moved: Encoder = encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def as_embed(encoder: Encoder, device: torch.device) -> tuple[Preprocessing, Embed]:
    """An encoder as a function of uint8 batches, in inference mode on `device`."""
    on(encoder, device)

    def run(batch: Tensor) -> Tensor:
        with torch.inference_mode(), evaluating(encoder), exact(device):
            features: Tensor = encoder(to_float(batch.to(device)))
            return features.float().cpu()

    return encoder.preprocessing, run


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No TF32 on a GPU: figures are those of the numbers that a device would compute with, not of a tenth of their
    digits.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def to_float(pixels: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S) in 0..1, channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)


@dataclass(frozen=True)
class Keep:
    """Where `plain` keeps finished parts of a stage `stem`. models: digests of the models' weights or files, by the
    names that `plain` has for them.
    """

    work: Path
    stem: str
    models: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Of these models alone, whatever the images."""
        return self.work / f"{self.stem}-{made_of('embeddings', models=dict(self.models)).key}"


def plain(
    models: Mapping[str, tuple[Preprocessing, Embed]],
    folder: ImageList,
    indices: Sequence[int],
    what: str,
    keep: Keep | None = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """Plain-view features of several models from one decoding of each image, with the device's own preprocessing.

    Returns (features (n, width) by model, the n indices that could be decoded, in their order). Several processes share
    the images and each gets all. keep: for finished parts, of these models and images alone: interrupted, the same call
    goes on after the last. Raises BingoError where no image can be decoded, and for an image that a model makes no
    finite numbers of.
    """
    # Batches of places in `indices`, not of good images: they are the same, and so is their rounding, whatever the
    # number of processes.
    starts = distributed.stretch(range(0, len(indices), BATCH))
    batches = {start: indices[start : start + BATCH] for start in starts}

    def parts() -> Iterator[list[Tensor]]:
        with console.bar(what, sum(map(len, batches.values()))) as advance:
            if keep is None or len(starts) <= PART:
                yield from _batched(models, folder, list(batches.values()), advance)
                return
            looks = {name: [keep.models[name], asdict(preprocessing)] for name, (preprocessing, _) in models.items()}
            whole = made_of("embeddings", models=looks, images=folder.fingerprint(), places=str(hash_seed(*indices)))
            home = keep.folder / whole.key
            home.mkdir(parents=True, exist_ok=True)
            for mine in (starts[first : first + PART] for first in range(0, len(starts), PART)):
                file = home / f"{mine[0]:012d}-{mine[-1]:012d}.safetensors"
                spans = [batches[start] for start in mine]
                made = _still_good(file, whole, folder, spans)
                if made is None:
                    made = [torch.cat(kind) for kind in zip(*_batched(models, folder, spans, advance), strict=True)]
                    checkpoint.save(file, {str(number): kind for number, kind in enumerate(made)}, whole)
                else:
                    advance(sum(map(len, spans)))
                if made:
                    yield made

    found = distributed.joined(parts())
    if not found:
        raise BingoError(
            f"expected images in {folder.where}, found none that can be decoded; `bingo-compress check --data"
            f" {folder.where}` says why"
        )
    return dict(zip(models, found[1:], strict=True)), found[0].tolist()


def _batched(
    models: Mapping[str, tuple[Preprocessing, Embed]],
    folder: ImageList,
    spans: Sequence[Sequence[int]],
    advance: console.Advance,
) -> Iterator[list[Tensor]]:
    """[indices (n,), features (n, width) of each model] of what can be decoded of each of `spans`."""
    geometries = {name: model[0].geometry() for name, model in models.items()}
    distinct = [dict(items) for items in {tuple(geometry.items()) for geometry in geometries.values()}]

    def views(pixels: Pixels) -> list[Pixels]:
        return [preprocess(pixels, **geometry) for geometry in distinct]

    decoded = decode_all(folder, chain(*spans), views)
    for span in spans:
        good = [(index, seen) for index, seen in islice(decoded, len(span)) if not isinstance(seen, ImageError)]
        if good:
            stacks = [torch.from_numpy(np.stack(seen)) for seen in zip(*(seen for _, seen in good), strict=True)]
            places = [index for index, _ in good]
            features = {name: run(stacks[distinct.index(geometries[name])]) for name, (_, run) in models.items()}
            for name, rows in features.items():
                _refuse_no_numbers(rows, name, folder, places)
            yield [torch.tensor(places), *features.values()]
        advance(len(span))


def _still_good(file: Path, whole: MadeOf, folder: ImageList, spans: Sequence[Sequence[int]]) -> list[Tensor] | None:
    """The part in `file`, made of `whole`; None where there is none, or where an image that could not be decoded when
    it was kept can be now.
    """
    if not checkpoint.is_sound(file, whole):
        return None
    kinds = checkpoint.load(file)[0]
    bad = sorted({*chain(*spans)} - set(kinds["0"].tolist() if kinds else []))
    if any(not isinstance(result, ImageError) for _, result in decode_all(folder, bad, lambda pixels: None)):
        return None
    return [kinds[str(number)] for number in range(len(kinds))]


def _refuse_no_numbers(rows: Tensor, name: str, folder: ImageList, places: Sequence[int]) -> None:
    """Raise BingoError if a row of `rows` (n, ...), what a model makes of the images `places`, is not finite."""
    bad = rows.reshape(len(rows), -1).isfinite().all(1).logical_not().nonzero()[:, 0].tolist()
    if bad:
        raise BingoError(
            f"{name}: expected finite features, found infinite ones or NaN for {folder.place(places[bad[0]])}; are the"
            " model's weights whole?"
        )


def pixels_of(preprocessing: Preprocessing, folder: ImageList, order: Sequence[int], count: int) -> Tensor:
    """The first `count` images in `order` that can be decoded, as a model's input: uint8 (n, S, S, 3). Raises
    BingoError where there is none.
    """
    geometry = preprocessing.geometry()
    found: list[Tensor] = []
    for _, result in decode_all(folder, order, lambda picture: preprocess(picture, **geometry)):
        if not isinstance(result, ImageError):
            found.append(torch.from_numpy(result))
        if len(found) == count:
            break
    if not found:
        raise BingoError(
            f"expected images in {folder.where}, found none that can be decoded; `bingo-compress check --data"
            f" {folder.where}` says why"
        )
    return torch.stack(found)


@torch.inference_mode()
def store_features(encoder: Encoder, pixels: PixelStore, indices: Tensor, device: torch.device) -> Tensor:
    """Features (n, width), on the CPU, of `plain_views` of the pixel store: close to those of the plain view, and
    nothing is decoded.

    Several processes share the images and each gets all.
    """

    def features(rows: Tensor) -> Tensor:
        views = plain_views(pixels, rows, encoder.preprocessing).float().div_(255)
        found: Tensor = encoder(views.contiguous(memory_format=torch.channels_last))
        return found.float().cpu()

    with evaluating(encoder):
        (found,) = distributed.joined([features(rows)] for rows in distributed.stretch(indices.split(BATCH)))
    return found


def plain_views(pixels: PixelStore, indices: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What a model sees of images (B,), cut from the pixel store with its own crop: uint8 (B, 3, size, size)."""
    aspect = pixels.aspect[indices]
    share = torch.stack((1 / aspect, aspect), dim=1).clamp(max=1) * preprocessing.crop_pct  # of width and height
    share = torch.ones_like(share) if preprocessing.crop_mode == "squash" else share.clamp(max=1)
    return pixels.crops(indices, torch.cat((1 - share, 1 + share), dim=1) / 2, preprocessing.size)
