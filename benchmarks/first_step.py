"""Seconds from the command to the first training step with pixels and teacher embeddings already stored, on synthetic
photos.

python benchmarks/first_step.py [--images 3000] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos, out = Path(folder) / "photos", Path(folder) / "run"
        photos.mkdir()
        rng = np.random.default_rng(0)
        for index in range(chosen.images):
            small = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
            small.resize((360, 240)).save(photos / f"{index:05d}.jpg", quality=90)
        command = [
            sys.executable,
            "-m",
            "bingo_compress",
            "distill",
            "--data",
            str(photos),
            "--out",
            str(out),
            "--overwrite",
        ]
        command += [
            "--teacher",
            "resnet18",
            "--teacher-weights",
            "random",
            "--student",
            "mobilenetv3_small_050",
            "--student-weights",
            "random",
        ]
        command += [
            "--teacher-size",
            "128",
            "--image-size",
            "96",
            "--views",
            "1",
            "--epochs",
            "1",
            "--set",
            "save_every_minutes=1000",
        ]
        cold, warm = (seconds_to_first_step(command, out / "metrics.jsonl") for _ in range(2))
    print(
        f"{'':<34}{'seconds':>10}\n{'nothing stored':<34}{cold:>10.1f}\n"
        f"{'pixels and embeddings stored':<34}{warm:>10.1f}\n{'ratio':<34}{warm / cold:>10.2f}"
    )
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"images": chosen.images, "cold_s": cold, "warm_s": warm, "ratio": warm / cold}) + "\n"
        )


def seconds_to_first_step(command: list[str], metrics: Path) -> float:
    """From the start of the process to the end of its first step: the first line's time of writing less the seconds
    that the loop had run, plus one step.
    """
    start = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    first = json.loads(metrics.read_text().splitlines()[0])
    # A line is written at the latest LOG_SECONDS after the loop began; its own clock starts with the loop.
    return float(first["time"] - start - first["seconds"] + first["seconds"] / first["step"])


if __name__ == "__main__":
    main()
