"""A finished run to files for the device."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo_compress import __version__, embed, gate, images, latency, model_card, probes, quantaware, run_dir, screen
from bingo_compress.encoder import Encoder
from bingo_compress.errors import BingoError
from bingo_compress.exporters.onnx import IMAGES, REFUSED, Form, export_onnx, form, onnx_runner, publish
from bingo_compress.exporters.onnx_int8 import CALIBRATION, LadderEnds, Rung, quantise
from bingo_compress.golden import write_golden
from bingo_compress.pipeline import saved_recipe
from bingo_compress.trained import load_student

FORMATS = ("onnx", "onnx-int8", "all")
GALLERY = 512  # images that an int8 file is judged on
GALLERY_LEAST = 256
COPIES, COPIES_INT8 = 3, 8  # of the weights that are on the disk at once, at most
TIMED = 100  # runs of each file, for the model card
WAYS = "try --finetune, a larger --image-size, or a student that quantises well (EfficientNet-Lite, MobileNetV4-conv, ResNet)"


def export(
    run_path: Path,
    out: Path | None = None,
    data: Path | None = None,
    fmt: str = "onnx",
    *,
    profile: str = "modern",
    batch: str | None = None,
    opset: int | None = None,
    image_size: int | None = None,
    labels: Path | None = None,
    test: Path | None = None,
    max_loss: float = gate.MAX_LOSS,
    finetune: bool = False,
) -> list[Path]:
    """Export the student of a run: student.onnx, proven on IMAGES of the user's own images, and student-int8.onnx, judged on GALLERY others. Returns the files.

    out: folder, default RUN/export; data: where the images are now, default where they were; labels, test: labelled folders on which int8 may lose at most
    `max_loss` points against float. Raises BingoError; with exit status 3 where a file is not the same model, and then it is not there.
    """
    wanted = form(profile, batch, opset)
    if fmt not in FORMATS:
        raise BingoError(f"--format: expected {', '.join(FORMATS)}, found {fmt!r}")
    if fmt == "onnx" and (labels or finetune):
        raise BingoError(f"{'--labels' if labels else '--finetune'}: expected --format onnx-int8 or all beside it, found onnx")
    if test and not labels:
        raise BingoError("--test: expected --labels beside it, found none")
    run = run_dir.open_finished(run_path)
    if out is None:
        run_dir.hold(run.path, "--run")
    recipe = saved_recipe(run)
    recipe = recipe.model_copy(update={"image_size": image_size or recipe.image_size})
    student = load_student(recipe, run.student)
    folder = images.list_folder(data or Path(recipe.data))
    order = torch.randperm(len(folder.files), generator=torch.Generator().manual_seed(0)).tolist()
    pixels = embed.pixels_of(student.preprocessing, folder, order, IMAGES if fmt == "onnx" else CALIBRATION + GALLERY)
    target = (out or run.export) / "student.onnx"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BingoError(f"--out: {target.parent} cannot be made ({error.strerror}); name a folder you may write to") from None
    weights = sum(value.nbytes for value in student.backbone.state_dict().values())
    run_dir.need_space(target.parent, (COPIES if fmt == "onnx" else COPIES_INT8) * weights, "the export with its working files")
    summary = run_dir.read_json("distill", run.summary)
    facts = {"version": __version__, "run_id": summary.get("run_id", ""), "student": recipe.student, "teacher": recipe.teacher}
    files = []
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder_name:
        work = Path(folder_name)
        float_file = target if fmt != "onnx-int8" else work / "student.onnx"
        _export_float(student, pixels[:IMAGES], float_file, facts, wanted)
        if fmt != "onnx-int8":
            files.append(_with_golden(target))
        if fmt != "onnx":
            judge = gate.make_judge(float_file, _gallery(pixels), student.preprocessing, labels, test, max_loss)
            try:
                found = quantise(float_file, _calibrating(pixels), wanted, _folder(work, "ladder"), judge)
            except LadderEnds as error:
                _table(error.tried, float_file)
                if not finetune:
                    raise BingoError(f"{error}; {WAYS}", REFUSED) from None
                tuned = quantaware.finetune(recipe, student, folder, _folder(work, "finetune"))
                tuned_file = work / "tuned.onnx"
                export_onnx(tuned, pixels[:IMAGES], tuned_file, facts, wanted)
                try:
                    found = quantise(tuned_file, _calibrating(pixels), wanted, _folder(work, "tuned"), judge, "fine-tuned, ")
                except LadderEnds as again:
                    _table(again.tried, float_file)
                    raise BingoError(f"{again}; {WAYS}", REFUSED) from None
            files.append(_with_golden(_publish_int8(found, float_file, target.with_name("student-int8.onnx"), wanted)))
    latency.latency(files, [1], TIMED, TIMED // 10, target.with_name("latency.json"))
    screen.say(f"{model_card.renew(run, target.parent)} says what it is and how to use it")
    screen.say(
        f"next: bingo-edge selftest {files[-1]}; bingo-edge embed {files[-1]} PHOTOS   (or bingo-compress validate --run {run.path} --data LABELLED_FOLDER)"
    )
    return files


def _export_float(student: Encoder, pixels: Tensor, target: Path, facts: dict[str, Any], wanted: Form) -> None:
    if len(pixels) < IMAGES:
        screen.say(f"parity is checked on {len(pixels)} images: there are no more")
    screen.say(f"exporting {facts['student']} ({student.preprocessing.size} px) to ONNX ...")
    contract = export_onnx(student, pixels, target, facts, wanted)
    parity, onnx = contract["parity"], contract["onnx"]
    screen.say(
        f"onnxruntime equals torch on {parity['images']} of your images: largest difference {parity['max_difference']:.1g}, smallest cosine {parity['min_cosine']:.6f}"
    )
    _say_file(target, onnx)


def _with_golden(file: Path) -> Path:
    write_golden(file, json.loads(file.with_suffix(".json").read_text(encoding="utf-8")), onnx_runner(file))
    return file


def _say_file(target: Path, onnx: dict[str, Any]) -> None:
    batch = "dynamic batch" if onnx["batch"] == "dynamic" else f"batch {onnx['batch']}"
    screen.say(
        f"{target}: {screen.size(onnx['bytes'])}, opset {onnx['opset']}, IR {onnx['ir_version']}, {batch}, uint8 in; {target.with_suffix('.json')} says the rest"
    )


def _calibrating(pixels: Tensor) -> Tensor:
    """The images that ranges are found on."""
    return pixels[: min(CALIBRATION, len(pixels) // 3)]


def _gallery(pixels: Tensor) -> Tensor:
    """The images that an int8 file is judged on: none that its ranges are found on."""
    rest = pixels[len(_calibrating(pixels)) :]
    if len(rest) < GALLERY_LEAST:
        screen.say(f"int8 is judged on {len(rest)} images: there are no more (expected {GALLERY_LEAST} or more)")
    return rest


def _folder(work: Path, name: str) -> Path:
    (work / name).mkdir()
    return work / name


def _publish_int8(found: tuple[Path, Rung, list[dict[str, Any]]], float_file: Path, target: Path, wanted: Form) -> Path:
    file, rung, tried = found
    _table(tried, float_file)
    contract = json.loads(float_file.with_suffix(".json").read_text(encoding="utf-8"))
    contract["precision"] = "int8"
    contract["int8"] = {
        "rung": rung.name,
        "left_in_float": list(rung.left),
        "gate": {key: value for key, value in tried[-1].items() if key not in ("rung", "missed", "bytes")},
        "float_sha256": contract.pop("sha256"),
        "float_bytes": float_file.stat().st_size,
    }
    contract = publish(file, target, contract, wanted)
    _say_file(target, contract["onnx"])
    screen.say(f"{target.name}: {contract['onnx']['bytes'] / float_file.stat().st_size:.2f} of the float file's size; rung: {rung.name}")
    return target


def _table(tried: list[dict[str, Any]], float_file: Path) -> None:
    """Every rung with what it gave."""
    names = [name for name in ("knn", "linear") if name in tried[0]]
    header = (
        "int8",
        "mean cosine",
        probes.recall_title(tried[0]["images"] - 1),
        *(f"{name} lost" for name in names),
        "of float's size",
        "",
    )
    rows = []
    for row in tried:
        lost = [f"{100 * (row[name]['float'] - row[name]['int8']):+.2f}" for name in names]
        size = f"{row['bytes'] / float_file.stat().st_size:.2f}"
        recall = f"{row['recall']:.3f}" if "recall" in row else "-"
        rows.append((row["rung"], f"{row['mean_cosine']:.4f}", recall, *lost, size, "below the gate" if row["missed"] else "passes"))
    screen.table("int8 against the float file (lost: points of accuracy)" if names else "int8 against the float file", header, rows)
