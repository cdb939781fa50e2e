"""The test images that a run's student took for another class, the surest first: kept by `validate` for the page."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bingo_edge.image import ImageError, preprocess
from PIL import Image
from torch import Tensor

from bingo_compress.data.decode import decode_all
from bingo_compress.data.image_list import ImageList
from bingo_compress.html_report.looks import LARGE, joined, parted, webp
from bingo_compress.runtime import checkpoint
from bingo_compress.runtime.made_of import MadeOf, made_of
from bingo_compress.runtime.run_dir import RunDir, made_by

SHOWN = 24


def save(
    run: RunDir, row: Mapping[str, Any], images: ImageList, logits: Tensor, labels: Tensor, classes: Sequence[str]
) -> None:
    """Keep SHOWN wrong answers of the student's linear probe with small pictures. row: the student's in the proof;
    images: the M that were tested; logits: (M, C); labels: (M,) positions in classes.
    """
    sure, taken = logits.softmax(1).max(1)
    wrong = (taken != labels).nonzero()[:, 0]
    wrong = wrong[sure[wrong].argsort(descending=True, stable=True)][:SHOWN]
    found: list[dict[str, Any]] = []
    pictures: list[bytes] = []
    square: dict[str, Any] = {"size": LARGE, "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "center"}
    for index, pixels in decode_all(images, wrong.tolist(), lambda picture: preprocess(picture, **square)):
        if not isinstance(pixels, ImageError):
            answer = {"is": classes[int(labels[index])], "taken_for": classes[int(taken[index])]}
            found.append({"image": index, "name": images.files[index], "sure": float(sure[index])} | answer)
            pictures.append(webp(Image.fromarray(pixels)))
    lengths = torch.tensor([len(picture) for picture in pictures], dtype=torch.int64)
    checkpoint.save(run.mistakes, {"pictures": joined(pictures), "lengths": lengths}, _made(row), wrong=found)


def load(run: RunDir, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `save` kept for just this row of a proof, each with its "picture"; [] where there is nothing. Raises
    BingoError.
    """
    if not run.mistakes.is_file() or checkpoint.made_of(run.mistakes) != _made(row):
        return []
    tensors, facts = checkpoint.load(run.mistakes)
    with made_by("validate", run.mistakes):
        wrong = facts["wrong"]
        assert isinstance(wrong, list)
        for each, raw in zip(wrong, parted(tensors["pictures"], tensors["lengths"].tolist()), strict=True):
            each["picture"] = raw
        return wrong


def _made(row: Mapping[str, Any]) -> MadeOf:
    return made_of("mistakes", proof=hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest())
