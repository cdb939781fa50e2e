"""LightlyTrain 0.18 (distillationv3) against ours: student passes per CPU-second (per second on a GPU), same folder,
batch of views, size and threads.

python benchmarks/versus_lightly.py --lightly-python ENV/bin/python [--student mobilenetv3_small_100] [--images 64]
[--data FOLDER] [--json FILE]

LightlyTrain runs as a program of its own in its own environment (python -m venv ENV; ENV/bin/pip install
lightly-train==0.18.* timm), teacher with local random weights, telemetry off. A student pass is one view through the
student, forward and backward: theirs one an image, ours two an anchor, so a step of theirs on 32 images is one of ours
on 16 anchors. Rates are differences of a long and a short run, so that start-up cancels out. Our decoding and teacher
pass (plain view and four augmented ones), also a difference of two folders, are counted in and spread over 10, 50 and
200 epochs.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic import photo

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
THEIRS = """
import json, sys, lightly_train
asked = json.loads(sys.argv[1])
lightly_train.pretrain(out=asked["out"], data=asked["data"], model="timm/" + asked["student"],
    method="distillationv3", overwrite=True,
    method_args={"teacher": "timm/" + asked["teacher"], "teacher_weights": asked["weights"]}
    if asked["weights"] else {"teacher": "timm/" + asked["teacher"]},
    epochs=asked["epochs"], batch_size=asked["batch"], num_workers=0, devices=1,
    accelerator=asked["device"], precision="32-true",
    transform_args={"image_size": (asked["size"], asked["size"])})
"""
WEIGHTS = """
import sys, timm, torch
torch.manual_seed(0)
torch.save(timm.create_model(sys.argv[1], pretrained=False).state_dict(), sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lightly-python", type=Path)
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--student", default="mobilenetv3_small_100")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32, help="views a step")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument(
        "--data", type=Path, help="folder whose first --images are taken; default: synthetic photos of 500 x 375"
    )
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        half, whole = folders(chosen, here)
        weights = here / "teacher.pth"
        if chosen.lightly_python:  # first, so that an environment that lacks something is known at once
            spent([str(word) for word in (chosen.lightly_python, "-c", WEIGHTS, chosen.teacher, weights)])
        # Ours: 1 and 4 epochs on the whole folder give the training; 1 epoch on half of it gives what decoding and
        # teacher cost an image.
        one, four = (ours(chosen, whole, epochs, here / f"ours{epochs}") for epochs in (1, 4))
        small = ours(chosen, half, 1, here / "ours-half")
        each = (four - one) / (3 * 2 * chosen.images)
        once = ((one - small) - 2 * each * (chosen.images / 2)) / (chosen.images / 2)
        rows = {"ours, training alone": 1 / each}
        for epochs in (10, 50, 200):
            rows[f"ours, with decoding and teacher, {epochs} epochs"] = 2 * epochs / (once + 2 * epochs * each)
        theirs = None
        if chosen.lightly_python:
            short, long = (lightly(chosen, whole, weights, epochs, here / f"theirs{epochs}") for epochs in (1, 3))
            theirs = 2 * chosen.images / (long - short)
    unit = "second" if on_gpu() else "CPU-second"
    print(
        f"{chosen.teacher} -> {chosen.student}, {chosen.size} px, {chosen.batch} views a step, {chosen.images} images:"
        f" student passes per {unit}"
    )
    print(
        f"{'LightlyTrain 0.18, distillationv3':<50}"
        f"{f'{theirs:.2f}' if theirs else 'not measured (--lightly-python)':>10}"
    )
    for name, rate in rows.items():
        print(f"{name:<50}{rate:>10.2f}" + (f"{rate / theirs:>8.2f} x" if theirs else ""))
    print(f"our decoding and teacher pass, once an image: {once:.3f} s; a student pass: {each:.4f} s")
    if chosen.json:
        facts = {key: str(value) for key, value in vars(chosen).items() if key != "json"}
        chosen.json.write_text(
            json.dumps({**facts, "theirs": theirs, "ours": rows, "once_s": once, "pass_s": each}, indent=2) + "\n"
        )


def folders(chosen: argparse.Namespace, here: Path) -> tuple[Path, Path]:
    """(half of the images, all of them), in folders of their own."""
    made = here / "half", here / "whole"
    found = (
        sorted(path for path in chosen.data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[: chosen.images]
        if chosen.data
        else []
    )
    for folder in made:
        folder.mkdir()
    for number in range(chosen.images):
        target = made[1] / f"{number:05d}.jpg"
        if found:
            shutil.copy(found[number], target)
        else:
            photo(number, 500, 375).save(target, quality=90)
        if number < chosen.images // 2:
            shutil.copy(target, made[0] / target.name)
    return made


def ours(chosen: argparse.Namespace, data: Path, epochs: int, out: Path) -> float:
    """Seconds (CPU or wall) of a whole run of the command line."""
    command = [
        sys.executable,
        "-m",
        "bingo_compress",
        "distill",
        "--data",
        data,
        "--out",
        out,
        "--teacher",
        chosen.teacher,
    ]
    command += [
        "--teacher-weights",
        "random",
        "--student",
        chosen.student,
        "--student-weights",
        "random",
        "--epochs",
        epochs,
    ]
    command += [
        "--image-size",
        chosen.size,
        "--teacher-size",
        chosen.size,
        "--batch-size",
        chosen.batch // 2,
        "--threads",
        1,
    ]
    command += ["--set", "hold_out=0", "--set", "save_every_minutes=1000"]
    return spent([str(word) for word in command])


def lightly(chosen: argparse.Namespace, data: Path, weights: Path, epochs: int, out: Path) -> float:
    asked = {
        "out": str(out), "data": str(data), "student": chosen.student,
            "teacher": chosen.teacher, "weights": str(weights), "epochs": epochs,
        "batch": chosen.batch, "size": chosen.size, "device": "gpu" if on_gpu() else "cpu",
    }  # fmt: skip
    return spent([str(chosen.lightly_python), "-c", THEIRS, json.dumps(asked)], cwd=out.parent)


def cpu_of_children() -> float:
    """CPU seconds of all programs that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def spent(command: list[str], cwd: Path | None = None) -> float:
    """Wall seconds on a GPU, else the CPU seconds of the program and of all that it starts. One thread."""
    before, start = cpu_of_children(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **ONE_THREAD})
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]} ...\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - start if on_gpu() else cpu_of_children() - before


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
