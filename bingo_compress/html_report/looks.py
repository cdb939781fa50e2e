"""What the page shows of a run's images, as it is kept in work/: made once, by looking.py, of just this student."""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bingo_compress.models import exported
from bingo_compress.runtime import checkpoint
from bingo_compress.runtime.made_of import MadeOf, made_of
from bingo_compress.runtime.run_dir import RunDir, made_by

SMALL, LARGE = 56, 96  # pixels a side: in the map, and in sheets
QUALITY = {SMALL: 45, LARGE: 60}  # of WebP


@dataclass(frozen=True)
class Looks:
    """facts: "images": the n images looked at, by their numbers; "names": of all that have a picture, by number;
    "bags", "changed", "scenes": see looking.py; places: (n, 2) by "teacher" and "student", and (m, 2) of
    "others" in the teacher's map; nothing in it where there are too few images; pictures: WebP by size and number.
    """

    facts: dict[str, Any]
    places: dict[str, Tensor]
    pictures: dict[int, dict[int, bytes]]


def made(run: RunDir) -> MadeOf:
    """What the looks of a run are made of: its student, and all that this is made of."""
    source = checkpoint.made_of(run.student)
    return made_of("looks", student=exported.weights_digest(run.student), **(source.inputs if source else {}))


def webp(picture: Image.Image, quality: int = QUALITY[LARGE]) -> bytes:
    """A picture as WebP."""
    with io.BytesIO() as target:
        picture.save(target, "WEBP", quality=quality, method=4)
        return target.getvalue()


def joined(pictures: Iterable[bytes]) -> Tensor:
    """Pictures one after the other as bytes, uint8 (n,): of none a single byte, as no tensor in a file is empty."""
    return torch.frombuffer(bytearray(b"".join(pictures) or b"\0"), dtype=torch.uint8)


def parted(raw: Tensor, lengths: Sequence[int]) -> list[bytes]:
    """What `joined` has made one, by the length of each picture."""
    data, ends = raw.numpy().tobytes(), list(itertools.accumulate(lengths, initial=0))
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def save(looks: Looks, run: RunDir) -> None:
    """Keep looks in the run's work folder. Raises BingoError when the disk is too small."""
    tensors = {f"places.{name}": places for name, places in looks.places.items()}
    for side, pictures in looks.pictures.items():
        tensors[f"pictures.{side}"] = joined(pictures.values())
        tensors[f"images.{side}"] = torch.tensor([[image, len(raw)] for image, raw in pictures.items()]).view(-1, 2)
    checkpoint.save(run.looks, tensors, made(run), **looks.facts)


def load(run: RunDir) -> Looks | None:
    """The looks of just this run's student; None where there are none, or another student's (says so). Raises
    BingoError.
    """
    if not checkpoint.is_sound(run.looks, made(run)):
        return None
    tensors, facts = checkpoint.load(run.looks)
    with made_by("report", run.looks):
        places = checkpoint.under(tensors, "places")
        pictures: dict[int, dict[int, bytes]] = {}
        for side in (SMALL, LARGE):
            images, lengths = tensors[f"images.{side}"].unbind(1)
            raws = parted(tensors[f"pictures.{side}"], lengths.tolist())
            pictures[side] = dict(zip(images.tolist(), raws, strict=True))
        count = len(facts["images"])  # type: ignore[arg-type]
        assert all(tuple(places[name].shape) == (count, 2) for name in places if name != "others")
        return Looks(dict(facts), places, pictures)


def sheets(seen: Looks) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(title, pixels (LARGE, LARGE x (1 + K), 3)) of the bags that are shown: the anchor, then its mates."""
    for kind in ("best", "typical", "doubtful"):
        for number, bag in enumerate(seen.facts["bags"].get(kind, ()), 1):
            row = [Image.open(io.BytesIO(seen.pictures[LARGE][at])) for at in (bag["anchor"], *bag["mates"])]
            squares = [np.asarray(one.convert("RGB").resize((LARGE, LARGE)), np.uint8) for one in row]
            yield f"bags/{kind}-{number}", np.concatenate(squares, axis=1)
