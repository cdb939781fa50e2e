"""A finished run to a file for the device."""

import json
from pathlib import Path

import torch

from bingo_compress import __version__, embed, images, run_dir, screen
from bingo_compress.errors import BingoError
from bingo_compress.exporters.onnx import EXPORTERS, IMAGES
from bingo_compress.pipeline import load_student, saved_recipe


def export(run_path: Path, out: Path | None = None, data: Path | None = None, fmt: str = "onnx") -> Path:
    """Export the student of a run, proven on IMAGES of the user's own images (all of them where there are fewer). Returns the file.

    out: folder, default RUN/export; data: where the images are now, default where they were. Raises BingoError.
    """
    run = run_dir.open_finished(run_path)
    recipe = saved_recipe(run)
    student = load_student(recipe, run.student)
    folder = images.list_folder(data or Path(recipe.data))
    order = torch.randperm(len(folder.files), generator=torch.Generator().manual_seed(0)).tolist()
    pixels = embed.pixels_of(student.preprocessing, folder, order, IMAGES)
    if len(pixels) < IMAGES:
        screen.say(f"parity is checked on {len(pixels)} images: there are no more")
    summary = json.loads(run.summary.read_text(encoding="utf-8")) if run.summary.exists() else {}
    facts = {"version": __version__, "run_id": summary.get("run_id", ""), "student": recipe.student, "teacher": recipe.teacher}
    screen.say(f"exporting {recipe.student} ({recipe.image_size} px) to ONNX ...")
    target = (out or run.export) / "student.onnx"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BingoError(f"--out: {target.parent} cannot be made ({error.strerror}); name a folder you may write to") from None
    contract = EXPORTERS[fmt](student, pixels, target, facts)
    parity, onnx = contract["parity"], contract["onnx"]
    screen.say(
        f"onnxruntime equals torch on {parity['images']} of your images: largest difference {parity['max_difference']:.1g}, smallest cosine {parity['min_cosine']:.6f}"
    )
    screen.say(
        f"{target}: {screen.size(onnx['bytes'])}, opset {onnx['opset']}, IR {onnx['ir_version']}, dynamic batch, uint8 in; {target.with_suffix('.json')} says the rest"
    )
    screen.say(f"next: bingo-edge embed {target} PHOTOS   (or bingo-compress validate --run {run.path} --data LABELLED_FOLDER)")
    return target
