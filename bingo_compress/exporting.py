"""A finished run to files for the device."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo_compress import __version__, converting
from bingo_compress.data import image_list, listing
from bingo_compress.errors import BingoError
from bingo_compress.exporters import calibration_set, fp16, timing
from bingo_compress.exporters.golden import write_golden
from bingo_compress.exporters.head import Classes, publish_with_head
from bingo_compress.exporters.onnx import IMAGES, OUTPUTS, REFUSED, Form, Making, export_onnx, form, publish, published
from bingo_compress.features import extract
from bingo_compress.heads import fitting
from bingo_compress.int8 import gate, int8_file, quantization_aware
from bingo_compress.int8.ladder import CALIBRATION
from bingo_compress.models import exported
from bingo_compress.models.encoder import Encoder
from bingo_compress.models.exported import runner_by_name
from bingo_compress.models.trained import NOTHING_GIVEN, Given, load_student
from bingo_compress.presenting import model_card
from bingo_compress.recipe import Recipe, load_recipe
from bingo_compress.runtime import console, run_dir
from bingo_compress.sources.opened import Data, numbers, of_recipe

# What is made of the float file, "onnx", and judged against it: how, by its row in a proof.
FORMATS: dict[str, Callable[[Making], Path]] = {"onnx-fp16": fp16.make, "onnx-int8": int8_file.make}
GALLERY = 512  # images that an int8 file is judged on
LEAST_JUDGED = 12  # images, calibration and gallery together
COPIES, COPIES_JUDGED = 4, 9  # of the weights that are on the disk at once, at most
HALF_HOLDS = (1e-3, 256.0)  # lengths whose squares float16 can hold
TIMED = 100  # runs of each file, for the model card


@dataclass(frozen=True)
class Shape:
    """The form of an exported file: a profile, what is to be other than in it, and another input size than the run's
    (pixels a side). taken: one of onnx.INPUTS; outputs: some of onnx.OUTPUTS with commas between.
    """

    profile: str = "modern"
    batch: str | None = None
    opset: int | None = None
    image_size: int | None = None
    taken: str | None = None
    outputs: str | None = None
    pythons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Int8:
    """How an int8 file is judged and mended. labels, test: labelled folders on which it may lose at most `max_loss`
    points against float; finetune: train it where no way of quantising passes; calibration_set: a folder for the
    images that its ranges are found on.
    """

    labels: Data | None = None
    test: Data | None = None
    max_loss: float = gate.MAX_LOSS
    finetune: bool = False
    calibration_set: Path | None = None


MODERN, PLAIN_INT8 = Shape(), Int8()


def export(
    run_path: Path,
    out: Path | None = None,
    data: Data | None = None,
    fmt: str = "onnx",
    *,
    shape: Shape = MODERN,
    int8: Int8 = PLAIN_INT8,
    given: Given = NOTHING_GIVEN,
    head: str = "",
) -> list[Path]:
    """Export the student of a run: student.onnx, proven on IMAGES of the user's own images, and what FORMATS makes of
    it, judged on GALLERY others. Returns the files. Raises BingoError; exit status 3: a file is refused, not there.

    fmt: "all" (of ONNX), or some of "onnx", FORMATS and, made of student.onnx, exported.CONVERTED with commas between;
    out: default RUN/export; data: where the images are now, default where they were; given: the user's own module that
    the student is; head: of fitting.KINDS, fitted on int8.labels, or a file of a head. Of another export nothing stays.
    """
    wanted = form(shape.profile, shape.batch, shape.opset, shape.taken, shape.outputs)
    rows = _rows(fmt, int8, head, wanted)
    toolchains = converting.opened(rows, shape.pythons, wanted)
    labelled = _open_labelled(int8, run_path)
    run = run_dir.open_finished(run_path)
    held = _hold(run, out)
    recipe = _recipe(run, shape)
    student = load_student(recipe, run.student, given.student)
    folder = listing.list_images(data or of_recipe(recipe), work=run.work)
    if held:
        image_list.keep(run.work, folder, *(labelled or ()))
    judged = [row for row in rows if row in FORMATS]
    most = CALIBRATION + GALLERY if judged or int8.calibration_set else IMAGES
    order, pixels = _pixels(student, folder, fmt if judged else "", most, halved=int8.finetune)
    calibration, gallery = pixels.tensor_split([min(CALIBRATION, len(pixels) // 3)])
    target = _target(out or run.export, student, COPIES_JUDGED if judged or toolchains else COPIES)
    facts = _facts(run, recipe)
    beside = _head_beside(head, facts, student)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder_name:
        work = Path(folder_name)
        whole = _export_float(student, pixels[:IMAGES], work / "whole.onnx", facts, wanted)
        classes = _classes(head, beside, whole, labelled, int8, student, pixels) if head else None
        put = partial(publish_with_head, classes=classes) if classes else publish
        float_file = published(whole, work / target.name, wanted, put)
        if "onnx" in rows:
            float_file = _put(float_file, target)
        if int8.calibration_set:
            calibration_set.write(int8.calibration_set, calibration, exported.contract(float_file))
        if judged:
            known = _known(float_file, classes)
            judges = gate.make_gate(whole, gallery, student.preprocessing, labelled, int8.max_loss, known)

            def tuned() -> Path:
                apart = {*folder.only(order).digests, *judges.labelled}
                better = quantization_aware.finetune(recipe, student, folder, _made(work / "finetune"), apart)
                return _export_float(better, pixels[:IMAGES], work / "tuned.onnx", facts, wanted)

            making = Making(whole, float_file, calibration, wanted, work, judges, tuned if int8.finetune else None, put)
            _put_judged(judged, making, run, target.parent)
        for place, version in toolchains:
            converting.convert(target, place, version, pixels[:IMAGES])
    return _finish(rows, target.parent, run, "classify" if head else "embed")


def _open_labelled(int8: Int8, run_path: Path) -> gate.Labels | None:
    if not int8.labels:
        return None
    return gate.open_labelled(int8.labels, int8.test, run_dir.RunDir(run_path).work)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _hold(run: run_dir.RunDir, out: Path | None) -> bool:
    """Whether the files go into the run's own folder, which is held then."""
    held = out is None or out.resolve() == run.export.resolve()
    if held:
        run_dir.hold(run.path, "--run")
    return held


def _recipe(run: run_dir.RunDir, shape: Shape) -> Recipe:
    recipe = load_recipe(run.as_run)
    return recipe.model_copy(update={"image_size": shape.image_size or recipe.image_size})


def _finish(rows: list[str], folder: Path, run: run_dir.RunDir, use: str) -> list[Path]:
    """The files of an export, timed and with their card; says what to do with the last of ONNX."""
    _close(run, folder)
    last = folder / [exported.name(row) for row in rows if row in exported.ROWS][-1]
    console.say(
        f"next: bingo-edge selftest {last}; bingo-edge {use} {last} PHOTOS   (or bingo-compress validate --run"
        f" {run.path} --data LABELLED_FOLDER)"
    )
    return [folder / exported.name(row) for row in rows]


def _head_beside(head: str, facts: dict[str, Any], student: Encoder) -> fitting.Made | None:
    """The head of a file that was exported before; None where one is to be fitted, or none is wanted."""
    if head in ("", *fitting.KINDS):
        return None
    return fitting.read(Path(head), facts["student_weights"], student.preprocessing.geometry())


def _classes(
    head: str,
    beside: fitting.Made | None,
    whole: Path,
    labelled: gate.Labels | None,
    int8: Int8,
    student: Encoder,
    pixels: Tensor,
) -> Classes:
    """What every file's head is made of. Raises BingoError where a head knows other classes than the labelled
    images.
    """
    sides = gate.sides_of(whole, student.preprocessing, labelled) if labelled else None
    if sides and beside and beside.head.classes.tolist() != sides.classes:
        raise BingoError(
            f"--head: expected a head of the classes of --labels, {', '.join(sides.classes[:5])} ..., found one of"
            f" {', '.join(beside.head.classes[:5])} ...; give the head, or the labels, of the same classes"
        )
    # What a head from a file was fitted on nobody knows: only a folder of test images is new to it.
    tested = beside is None or int8.test is not None
    return Classes("" if beside else head, beside, sides, tested, student.preprocessing, pixels[:IMAGES])


def _known(float_file: Path, classes: Classes | None) -> gate.Known | None:
    """What the gate may know of the classes of the float file."""
    return gate.Known(fitting.of(float_file), classes.sides) if classes else None


def _rows(fmt: str, int8: Int8, head: str, wanted: Form) -> list[str]:
    """The files that `fmt` names, by their rows in a proof. Raises BingoError for words that do not go together."""
    known = ["onnx", *FORMATS]
    words = [word.strip() for word in fmt.split(",")]
    if not set(words) <= {*known, "all", *exported.CONVERTED}:
        every = ", ".join((*known, "all", *exported.CONVERTED))
        raise BingoError(f"--format: expected {every}, or some with commas between, found {fmt!r}")
    converted = [row for row in exported.CONVERTED if row in words]
    rows = [row for row in known if {row, "all"} & set(words) or (row == "onnx" and converted)]
    if "onnx-int8" not in rows and int8.finetune:
        raise BingoError(f"--finetune: expected --format onnx-int8 or all beside it, found {fmt}")
    if "onnx-int8" not in rows and int8.labels and not head:
        raise BingoError(f"--labels: expected --format onnx-int8 or all, or --head, beside it, found {fmt}")
    if int8.max_loss != gate.MAX_LOSS and not (int8.labels and "onnx-int8" in rows):
        raise BingoError(
            f"--max-loss: expected --labels and --format onnx-int8 or all beside it, found {fmt}"
            f"{'' if int8.labels else ' and no labels'}"
        )
    if head in fitting.KINDS and not int8.labels:
        raise BingoError(f"--head {head}: expected --labels beside it, images to fit it on, found none")
    if not {"embedding", "features"} & set(wanted.outputs) or ("scores" in wanted.outputs) < bool(head):
        raise BingoError(
            f"--outputs: expected embedding or features, and with --head scores, found {','.join(wanted.outputs)}"
        )
    if int8.test and not int8.labels:
        raise BingoError("--test: expected --labels beside it, found none")
    if int8.calibration_set:
        calibration_set.refuse_foreign(int8.calibration_set)
    return rows + converted


def _pixels(
    student: Encoder, folder: image_list.ImageList, judged: str, most: int, *, halved: bool
) -> tuple[list[int], Tensor]:
    """(which images of the folder may be looked at, those that are, at most `most`: uint8 (n, S, S, 3)). judged: the
    formats that are judged by them, "" for none; halved: at least half of the images are left to train on. Raises
    BingoError where there are too few.
    """
    order = torch.randperm(len(folder.files), generator=torch.Generator().manual_seed(0)).tolist()
    if halved:
        order = order[: min(CALIBRATION + GALLERY, len(order) // 2)]
    pixels = extract.pixels_of(student.preprocessing, folder, order, most)
    if judged and len(pixels) < LEAST_JUDGED:
        more = " (half of the folder, the other is for --finetune)" if halved else ""
        raise BingoError(
            f"--format {judged}: expected at least {LEAST_JUDGED} images to quantise and judge by, found"
            f" {len(pixels)}{more}; add images"
        )
    return order, pixels


def _target(folder: Path, student: Encoder, copies: int) -> Path:
    """The float file's place. Raises BingoError where the folder cannot be made, or cannot hold so many copies of the
    weights.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BingoError(f"--out: {folder} cannot be made ({error.strerror}); name a folder you may write to") from None
    weights = sum(value.nbytes for value in student.backbone.state_dict().values())
    run_dir.need_space(folder, copies * weights, "the export with its working files")
    return folder / exported.name("onnx")


def _facts(run: run_dir.RunDir, recipe: Recipe) -> dict[str, Any]:
    """Whose file it is."""
    return {
        "version": __version__,
        "run_id": run_dir.read_json("distill", run.summary).get("run_id", ""),
        "student": recipe.student,
        "teacher": recipe.teacher,
        "student_weights": exported.weights_digest(run.student),
        **({"bands": list(numbers(recipe.bands))} if recipe.bands else {}),
    }


def _put_judged(rows: list[str], making: Making, run: run_dir.RunDir, folder: Path) -> None:
    """Publish what is made of the float file. Raises BingoError where it is refused; then no older one is left."""
    for row in rows:
        target = folder / exported.name(row)
        try:
            _put(FORMATS[row](making), target)
        except BingoError as error:
            if error.exit_status == REFUSED:
                exported.drop(target, "what was to take its place is refused")
            _close(run, folder)
            raise


def _close(run: run_dir.RunDir, folder: Path) -> None:
    """Time all files in the folder of an export, and say in a card what they are."""
    files = list(exported.files(folder).values())
    if files:
        timing.latency(files, [1], TIMED, TIMED // 10, folder / exported.LATENCY)
        console.say(f"{model_card.renew(run, folder)} says what it is and how to use it")


def _export_float(student: Encoder, pixels: Tensor, target: Path, facts: dict[str, Any], wanted: Form) -> Path:
    """With all outputs that a student has."""
    if len(pixels) < IMAGES:
        console.say(f"parity is checked on {len(pixels)} images: there are no more")
    console.say(f"exporting {facts['student']} ({student.preprocessing.size} px) to ONNX ...")
    parity = export_onnx(student, pixels, target, facts, replace(wanted, outputs=OUTPUTS))["parity"]
    console.say(
        f"onnxruntime equals torch on {parity['images']} of your images: largest difference"
        f" {parity['max_difference']:.1g}, smallest cosine {parity['min_cosine']:.6f}"
    )
    least, most = parity["feature_norms"]
    if least < HALF_HOLDS[0] or most > HALF_HOLDS[1]:
        console.say(
            f"not for half precision: the features of your images have lengths of {least:.2g} to {most:.2g}, and their"
            f" squares are lost outside {HALF_HOLDS[0]:g} to {HALF_HOLDS[1]:g}; on RKNN and GPUs of 16 bits take"
            " --outputs features and normalise there"
        )
    return target


def _put(made: Path, target: Path) -> Path:
    """Publish a file with its golden pictures, in place of an older one. Returns `target`."""
    contract = json.loads(made.with_suffix(exported.CONTRACT).read_text(encoding="utf-8"))
    write_golden(made, contract, runner_by_name(made))
    exported.keep_pair(exported.put(made, target))
    _say_file(target, contract)
    return target


def _say_file(target: Path, contract: dict[str, Any]) -> None:
    onnx, given = contract["onnx"], contract["input"]
    batch = "dynamic batch" if onnx["batch"] == "dynamic" else f"batch {onnx['batch']}"
    console.say(
        f"{target}: {console.size(contract['bytes'])}, opset {onnx['opset']}, IR {onnx['ir_version']}, {batch},"
        f" {given['dtype']} {given['layout']} in; {target.with_suffix(exported.CONTRACT)} says the rest"
    )
