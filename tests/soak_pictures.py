"""The pictures' part of tests/soak.py: a million decodes in one process, and what one bad file in a hundred costs."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bingo_edge.image import ImageError, load_image
from helpers import CPU, photos
from PIL import Image

from bingo_compress import meter, pixels
from bingo_compress.images import list_folder

SPEED_FILES, ROUNDS = 3000, 5


def decodes(count: int, home: Path, over: Callable[[], bool]) -> dict[str, Any]:
    """`count` pictures decoded in this process, one in a hundred cut; resident memory after each tenth."""
    made = photos(home / "decodes", 33)
    files = sorted(made.rglob("*.png"))
    cut = made / "cut.png"
    cut.write_bytes(files[0].read_bytes()[:300])
    files = [*files[:99], cut]
    resident, bad, done, began = [], 0, 0, time.monotonic()
    for number in range(count):
        try:
            load_image(files[number % len(files)], 32)
        except ImageError:
            bad += 1
        done = number + 1
        if done % (count // 10) == 0:
            resident.append(pixels.resident())
            if over():
                break
    # The first tenth fills the allocator's own stores.
    steady = resident[1:] or resident
    return {
        "decodes": done,
        "bad": bad,
        "images_per_second": round(done / (time.monotonic() - began)),
        "resident_mb": [round(value / 1e6, 1) for value in resident],
        "growth": round(max(steady) / steady[0] - 1, 4),
        "peak_mb": round(meter.peak_memory(CPU) / 1e6, 1),
    }


def throughput(home: Path) -> dict[str, Any]:
    """The pixel stage on 3,000 photos of 320 x 240, all whole, and with one in a hundred cut, in turn: files a second, each way's best of ROUNDS, and their ratio."""
    folders = {name: home / "speed" / name for name in ("whole", "one_percent_bad")}
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        for number in range(SPEED_FILES):
            Image.fromarray(np.roll(noise, number, 1)).resize((320, 240)).save(folder / f"{number:05d}.jpg")
            if name != "whole" and number % 100 == 50:
                raw = (folder / f"{number:05d}.jpg").read_bytes()
                (folder / f"{number:05d}.jpg").write_bytes(raw[: len(raw) // 2])
    best = dict.fromkeys(folders, 0.0)
    for turn in range(ROUNDS):
        for name, folder in folders.items():
            work = home / f"speed-{turn}-{name}"
            work.mkdir()
            began = time.monotonic()
            store, _ = pixels.build(list_folder(folder), 64, work, CPU, "memory")
            best[name] = max(best[name], SPEED_FILES / (time.monotonic() - began))
            assert len(store) == SPEED_FILES - (name != "whole") * SPEED_FILES // 100
            shutil.rmtree(work)
    return {**{name: round(value) for name, value in best.items()}, "ratio": round(best["one_percent_bad"] / best["whole"], 3)}
