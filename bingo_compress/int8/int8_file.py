"""The int8 file: the first on the ladder that is the model that its float file is."""

import json
from pathlib import Path
from typing import Any

from bingo_compress.errors import BingoError
from bingo_compress.exporters.onnx import REFUSED, Making
from bingo_compress.features import neighbours
from bingo_compress.int8.ladder import LadderEnds, quantise
from bingo_compress.models import exported
from bingo_compress.runtime import console

OPENCV_5 = (
    "in OpenCV 5 read it with cv2.dnn.ENGINE_CLASSIC; its new engine gives int8 files other answers without a word"
)
WAYS = (
    "try --finetune, a larger --image-size, or a student that quantises well (EfficientNet-Lite, MobileNetV4-conv,"
    " ResNet)"
)


def make(making: Making) -> Path:
    """The first int8 file on the ladder that passes the gate; where there is `making.tuned`, then on the ladder of the
    float file that it makes.

    A file that was chosen is asked once more, by the test images, which have chosen nothing. Below the gate there it is
    refused and no further one is tried: that one would be chosen on them. Raises BingoError (exit status 3).
    """
    float_file, tuned, choose = making.float_file, making.tuned, making.gate.choose
    try:
        file, rung, tried = quantise(making.whole, making.calibration, making.form, _folder(making, "ladder"), choose)
    except LadderEnds as error:
        _table(error.tried, float_file)
        if tuned is None:
            raise BingoError(f"{error}; {WAYS}", REFUSED) from None
        try:
            file, rung, tried = quantise(
                tuned(), making.calibration, making.form, _folder(making, "tuned"), choose, "fine-tuned, "
            )
        except LadderEnds as again:
            _table(again.tried, float_file)
            raise BingoError(f"{again}; {WAYS}", REFUSED) from None
    _table(tried, float_file)
    reported, missed = making.gate.report(file)
    if missed:
        raise BingoError(
            f"export refused, no int8 file written: {rung.name} passed where it was chosen, but on the test images"
            f" misses {', '.join(missed)}; {WAYS}",
            REFUSED,
        )
    chosen = {key: value for key, value in tried[-1].items() if key not in ("rung", "missed", "bytes", "knn", "linear")}
    contract = json.loads(float_file.with_suffix(exported.CONTRACT).read_text(encoding="utf-8"))
    contract["precision"] = "int8"
    contract["int8"] = {
        "rung": rung.name,
        "left_in_float": list(rung.left),
        "gate": chosen | reported,
        **{f"float_{key}": contract.pop(key) for key in ("sha256", "bytes", "parity")},
    }
    target = making.work / exported.name("onnx-int8")
    classes = contract.get("head", {})
    contract = making.put(file, target, contract, making.form)
    if lost := making.gate.lost(classes, contract.get("head", {})):
        raise BingoError(f"export refused, no int8 file written: {rung.name} misses {lost}; {WAYS}", REFUSED)
    console.say(
        f"{target.name}: {contract['bytes'] / float_file.stat().st_size:.2f} of the float file's size; rung:"
        f" {rung.name}"
    )
    if making.form.plain:
        console.say(f"{target.name}: {OPENCV_5}")
    return target


def _table(tried: list[dict[str, Any]], float_file: Path) -> None:
    """Every rung with what it gave."""
    names = [name for name in ("knn", "linear") if name in tried[0]]
    header = (
        "int8",
        "mean cosine",
        "smallest",
        neighbours.recall_title(tried[0]["images"] - 1),
        *(["same class"] if "same_class" in tried[0] else []),
        *(f"{name} lost" for name in names),
        "of float's size",
        "",
    )
    rows = []
    for row in tried:
        lost = [f"{100 * (row[name]['float'] - row[name]['int8']):+.2f}" for name in names]
        size = f"{row['bytes'] / float_file.stat().st_size:.2f}"
        recall = f"{row['recall']:.3f}" if "recall" in row else "-"
        rows.append(
            (
                row["rung"],
                f"{row['mean_cosine']:.4f}",
                f"{row['min_cosine']:.4f}",
                recall,
                *([f"{row['same_class']:.3f}"] if "same_class" in row else []),
                *lost,
                size,
                "below the gate" if row["missed"] else "passes",
            )
        )
    title = "int8 against the float file (lost: points of accuracy on the part of --labels that it is chosen by)"
    console.table(title if names else "int8 against the float file", header, rows)


def _folder(making: Making, name: str) -> Path:
    (making.work / name).mkdir()
    return making.work / name
