"""The students of export_models.py as files for devices, in every toolchain: a table students x toolchains.

python benchmarks/toolchains.py [--models NAME,NAME] [--with NAME,NAME] [--environments FOLDER] [--json FILE]

No weights are needed: random ones, and BatchNorm's statistics of drawn pictures, as values may otherwise grow or shrink
by twenty orders of magnitude on their way through a network, which no half precision holds. Each toolchain is installed
into an environment of its own, FOLDER/NAME, where it is not yet: they cannot all be in one. What is in FILE already is
not made again.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bingo_edge.image import load_image, preprocess
from export_models import MODELS
from torch import Tensor, nn

from bingo_compress.errors import BingoError
from bingo_compress.exporters.golden import drawn, write_golden
from bingo_compress.exporters.onnx import PROFILES, export_onnx
from bingo_compress.models.encoder import Encoder, build
from bingo_compress.models.exported import runner_by_name
from bingo_compress.toolchains.bench import verify

# NAME or NAME-VERSION: what pip is asked for, one call after another.
PACKAGES = {
    "openvino": ["openvino"],
    "opencv": ["opencv-python-headless"],
    "opencv-4.10": ["opencv-python-headless==4.10.*"],
    "opencv-4.13": ["opencv-python-headless==4.13.*"],
    "tract": ["tract numpy"],
    "ncnn": ["ncnn numpy", "--no-deps pnnx"],  # pnnx asks for torch, and uses it for torch's own files alone
    "mnn": ["mnn"],
    "tflite": ["onnx2tf tensorflow"],
    "rknn": ["rknn-toolkit2 setuptools<81"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS.split()))
    parser.add_argument("--with", dest="toolchains", default=",".join(PACKAGES))
    parser.add_argument("--environments", type=Path, default=Path("runs/toolchains"))
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--json", type=Path, default=Path("runs/toolchains.json"))
    chosen = parser.parse_args()
    pythons = {name: installed(name, chosen.environments) for name in chosen.toolchains.split(",")}
    rows = json.loads(chosen.json.read_text()) if chosen.json.is_file() else []
    for name in chosen.models.split(","):
        done = {row["environment"] for row in rows if row["student"] == name}
        wanted = {key: python for key, python in pythons.items() if key not in done}
        if wanted:
            with tempfile.TemporaryDirectory() as folder:
                rows += tried(name, Path(folder, "student.onnx"), wanted, chosen.seconds)
            chosen.json.parent.mkdir(parents=True, exist_ok=True)
            chosen.json.write_text(json.dumps(rows, indent=2) + "\n")
    names = list(dict.fromkeys(row["environment"] for row in rows))
    found = {(row["student"], row["environment"]): row for row in rows}
    print(f"\n| student | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for student in dict.fromkeys(row["student"] for row in rows):
        print(f"| {student} | {' | '.join(cell(found.get((student, name))) for name in names)} |")


def installed(name: str, environments: Path) -> str:
    """The Python of a toolchain's environment, which is made where it is not there."""
    python = environments.resolve() / name / "bin" / "python"
    if not python.is_file():
        print(f"installing {name} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        for words in PACKAGES[name]:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *words.split()], check=True)
    return str(python)


def tried(name: str, path: Path, pythons: dict[str, str], seconds: float) -> list[dict[str, Any]]:
    """A student's rows: one a toolchain, or one a toolchain that says why there is no file."""
    torch.manual_seed(0)
    try:
        student = build(name, 0, "random", "--models")
        pixels = pictures(student)
        settle(student, pixels)
        contract = export_onnx(student, pixels, path, {}, PROFILES["edge"])
        write_golden(path, contract, runner_by_name(path))
    except BingoError as error:
        return [{"student": name, "environment": key, "verdict": "no file", "cause": str(error)} for key in pythons]
    rows = []
    for key, python in pythons.items():
        toolchain = key.partition("-")[0]
        told = path.with_suffix(".out.json")
        try:
            verify(path, toolchain, [f"{toolchain}={python}"], seconds, told)
        except BingoError as error:
            print(error, flush=True)
        rows.append({"student": name, "environment": key, **json.loads(told.read_text())["rows"][0]})
        told.unlink()
    return rows


def pictures(student: Encoder) -> Tensor:
    """The drawn pictures as uint8 (8, S, S, 3)."""
    rule = student.preprocessing.geometry()
    seen = [preprocess(load_image(io.BytesIO(picture)), **rule) for picture in drawn().values()]
    return torch.from_numpy(np.stack(seen))


def settle(student: Encoder, pixels: Tensor) -> None:
    """Give every BatchNorm the statistics of pictures (n, S, S, 3)."""
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = 1.0
    student.train()
    with torch.no_grad():
        student(pixels.permute(0, 3, 1, 2).float() / 255)
    student.eval()


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    if "min_cosine" in row:
        return f"{row['verdict']} {row['min_cosine']:.6f}, {row['max_of_spread']:.0e}"
    return f"{row['verdict']}: {row['cause'][:60]}"


if __name__ == "__main__":
    main()
