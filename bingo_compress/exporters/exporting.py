"""A finished run to files for the device."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo_compress import __version__
from bingo_compress.data import image_folder
from bingo_compress.errors import BingoError
from bingo_compress.exporters import gate, quantization_aware, timing
from bingo_compress.exporters.golden import write_golden
from bingo_compress.exporters.int8 import CALIBRATION, LadderEnds, quantise
from bingo_compress.exporters.onnx import IMAGES, REFUSED, Form, export_onnx, form, publish
from bingo_compress.features import extract, neighbours
from bingo_compress.models import exported
from bingo_compress.models.encoder import Encoder
from bingo_compress.models.exported import onnx_runner
from bingo_compress.models.trained import NOTHING_GIVEN, Given, load_student
from bingo_compress.report import model_card
from bingo_compress.runtime import console, run_dir
from bingo_compress.runtime.run_dir import saved_recipe

FORMATS = ("onnx", "onnx-int8", "all")
GALLERY = 512  # images that an int8 file is judged on
GALLERY_LEAST = 256
LEAST_INT8 = 12  # images, calibration and gallery together
COPIES, COPIES_INT8 = 3, 8  # of the weights that are on the disk at once, at most
TIMED = 100  # runs of each file, for the model card
WAYS = (
    "try --finetune, a larger --image-size, or a student that quantises well (EfficientNet-Lite, MobileNetV4-conv,"
    " ResNet)"
)


@dataclass(frozen=True)
class Shape:
    """The form of an exported file: a profile, what is to be other than in it, and another input size than the run's
    (pixels a side).
    """

    profile: str = "modern"
    batch: str | None = None
    opset: int | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class Int8:
    """How an int8 file is judged and mended. labels, test: labelled folders on which it may lose at most `max_loss`
    points against float; finetune: train it where no way of quantising passes.
    """

    labels: Path | None = None
    test: Path | None = None
    max_loss: float = gate.MAX_LOSS
    finetune: bool = False


MODERN, PLAIN_INT8 = Shape(), Int8()


def export(
    run_path: Path,
    out: Path | None = None,
    data: Path | None = None,
    fmt: str = "onnx",
    *,
    shape: Shape = MODERN,
    int8: Int8 = PLAIN_INT8,
    given: Given = NOTHING_GIVEN,
) -> list[Path]:
    """Export the student of a run: student.onnx, proven on IMAGES of the user's own images, and student-int8.onnx,
    judged on GALLERY others. Returns the files.

    out: folder, default RUN/export; data: where the images are now, default where they were; given: the module of the
    user's own that the run's student is. What is in the folder of another export is
    removed: a file with what belongs to it, and an int8 file that was made of another float file than the one that is
    there, or is refused. Raises BingoError; with exit status 3 where a file is not the same model, and then it is not
    there.
    """
    wanted = form(shape.profile, shape.batch, shape.opset)
    if fmt not in FORMATS:
        raise BingoError(f"--format: expected {', '.join(FORMATS)}, found {fmt!r}")
    if fmt == "onnx" and (int8.labels or int8.finetune):
        raise BingoError(
            f"{'--labels' if int8.labels else '--finetune'}: expected --format onnx-int8 or all beside it, found onnx"
        )
    if int8.test and not int8.labels:
        raise BingoError("--test: expected --labels beside it, found none")
    labelled = gate.open_labelled(int8.labels, int8.test) if int8.labels else None
    run = run_dir.open_finished(run_path)
    if out is None or out.resolve() == run.export.resolve():
        run_dir.hold(run.path, "--run")
    recipe = saved_recipe(run)
    recipe = recipe.model_copy(update={"image_size": shape.image_size or recipe.image_size})
    student = load_student(recipe, run.student, given.student)
    folder = image_folder.list_folder(data or Path(recipe.data))
    order = torch.randperm(len(folder.files), generator=torch.Generator().manual_seed(0)).tolist()
    if int8.finetune:  # at least half of the images are left to train on
        order = order[: min(CALIBRATION + GALLERY, len(order) // 2)]
    pixels = extract.pixels_of(student.preprocessing, folder, order, IMAGES if fmt == "onnx" else CALIBRATION + GALLERY)
    if fmt != "onnx" and len(pixels) < LEAST_INT8:
        more = " (half of the folder, the other is for --finetune)" if int8.finetune else ""
        raise BingoError(
            f"--format {fmt}: expected at least {LEAST_INT8} images to quantise and judge by, found"
            f" {len(pixels)}{more}; add images"
        )
    target = (out or run.export) / exported.NAMES["onnx"]
    int8_target = target.with_name(exported.NAMES["onnx-int8"])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BingoError(
            f"--out: {target.parent} cannot be made ({error.strerror}); name a folder you may write to"
        ) from None
    weights = sum(value.nbytes for value in student.backbone.state_dict().values())
    run_dir.need_space(
        target.parent, (COPIES if fmt == "onnx" else COPIES_INT8) * weights, "the export with its working files"
    )
    summary = run_dir.read_json("distill", run.summary)
    facts = {
        "version": __version__,
        "run_id": summary.get("run_id", ""),
        "student": recipe.student,
        "teacher": recipe.teacher,
    }
    facts["student_weights"] = exported.weights_digest(run.student)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder_name:
        work = Path(folder_name)
        float_file = _export_float(student, pixels[:IMAGES], work / target.name, facts, wanted)
        if fmt != "onnx-int8":
            float_file = _put(float_file, target)
        if fmt != "onnx":
            judges = gate.make_gate(float_file, _gallery(pixels), student.preprocessing, labelled, int8.max_loss)

            def tuned() -> Path:
                apart = {*folder.only(order).digests, *judges.labelled}
                better = quantization_aware.finetune(recipe, student, folder, _folder(work, "finetune"), apart)
                export_onnx(better, pixels[:IMAGES], work / "tuned.onnx", facts, wanted)
                return work / "tuned.onnx"

            try:
                _put(
                    _int8(float_file, _calibrating(pixels), wanted, work, judges, tuned if int8.finetune else None),
                    int8_target,
                )
            except BingoError as error:
                if error.exit_status == REFUSED:
                    exported.drop(int8_target, "what was to take its place is refused")
                _close(run, target.parent)
                raise
    _close(run, target.parent)
    files = {"onnx": [target], "onnx-int8": [int8_target], "all": [target, int8_target]}[fmt]
    console.say(
        f"next: bingo-edge selftest {files[-1]}; bingo-edge embed {files[-1]} PHOTOS   (or bingo-compress validate"
        f" --run {run.path} --data LABELLED_FOLDER)"
    )
    return files


def _close(run: run_dir.RunDir, folder: Path) -> None:
    """Time all files in the folder of an export, and say in a card what they are."""
    files = list(exported.files(folder).values())
    if files:
        timing.latency(files, [1], TIMED, TIMED // 10, folder / exported.LATENCY)
        console.say(f"{model_card.renew(run, folder)} says what it is and how to use it")


def _export_float(student: Encoder, pixels: Tensor, target: Path, facts: dict[str, Any], wanted: Form) -> Path:
    if len(pixels) < IMAGES:
        console.say(f"parity is checked on {len(pixels)} images: there are no more")
    console.say(f"exporting {facts['student']} ({student.preprocessing.size} px) to ONNX ...")
    parity = export_onnx(student, pixels, target, facts, wanted)["parity"]
    console.say(
        f"onnxruntime equals torch on {parity['images']} of your images: largest difference"
        f" {parity['max_difference']:.1g}, smallest cosine {parity['min_cosine']:.6f}"
    )
    return target


def _put(made: Path, target: Path) -> Path:
    """Publish a file with its golden pictures, in place of an older one. Returns `target`."""
    contract = json.loads(made.with_suffix(exported.CONTRACT).read_text(encoding="utf-8"))
    write_golden(made, contract, onnx_runner(made))
    exported.keep_pair(exported.put(made, target))
    _say_file(target, contract)
    return target


def _say_file(target: Path, contract: dict[str, Any]) -> None:
    onnx = contract["onnx"]
    batch = "dynamic batch" if onnx["batch"] == "dynamic" else f"batch {onnx['batch']}"
    console.say(
        f"{target}: {console.size(contract['bytes'])}, opset {onnx['opset']}, IR {onnx['ir_version']}, {batch}, uint8"
        f" in; {target.with_suffix(exported.CONTRACT)} says the rest"
    )


def _calibrating(pixels: Tensor) -> Tensor:
    """The images that ranges are found on."""
    return pixels[: min(CALIBRATION, len(pixels) // 3)]


def _gallery(pixels: Tensor) -> Tensor:
    """The images that an int8 file is judged on: none that its ranges are found on."""
    rest = pixels[len(_calibrating(pixels)) :]
    if len(rest) < GALLERY_LEAST:
        console.say(
            f"int8 is judged on {len(rest)} images (expected {GALLERY_LEAST} or more): there are no more to spare"
        )
    return rest


def _folder(work: Path, name: str) -> Path:
    (work / name).mkdir()
    return work / name


def _int8(
    float_file: Path, calibration: Tensor, wanted: Form, work: Path, judges: gate.Gate, tuned: Callable[[], Path] | None
) -> Path:
    """The first int8 file on the ladder that passes the gate, in `work`; with `tuned`, then on the ladder of the float
    file that it makes.

    A file that was chosen is asked once more, by the test images, which have chosen nothing. Below the gate there it is
    refused and no further one is tried: that one would be chosen on them. Raises BingoError (exit status 3).
    """
    try:
        file, rung, tried = quantise(float_file, calibration, wanted, _folder(work, "ladder"), judges.choose)
    except LadderEnds as error:
        _table(error.tried, float_file)
        if tuned is None:
            raise BingoError(f"{error}; {WAYS}", REFUSED) from None
        try:
            file, rung, tried = quantise(
                tuned(), calibration, wanted, _folder(work, "tuned"), judges.choose, "fine-tuned, "
            )
        except LadderEnds as again:
            _table(again.tried, float_file)
            raise BingoError(f"{again}; {WAYS}", REFUSED) from None
    _table(tried, float_file)
    reported, missed = judges.report(file)
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
    target = work / exported.NAMES["onnx-int8"]
    contract = publish(file, target, contract, wanted)
    console.say(
        f"{target.name}: {contract['bytes'] / float_file.stat().st_size:.2f} of the float file's size; rung:"
        f" {rung.name}"
    )
    return target


def _table(tried: list[dict[str, Any]], float_file: Path) -> None:
    """Every rung with what it gave."""
    names = [name for name in ("knn", "linear") if name in tried[0]]
    header = (
        "int8",
        "mean cosine",
        neighbours.recall_title(tried[0]["images"] - 1),
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
                recall,
                *lost,
                size,
                "below the gate" if row["missed"] else "passes",
            )
        )
    title = "int8 against the float file (lost: points of accuracy on the part of --labels that it is chosen by)"
    console.table(title if names else "int8 against the float file", header, rows)
