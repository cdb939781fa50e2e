"""The pictures' part of tests/soak.py: a million decodes in one process, and what one bad file in a hundred costs."""

import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bingo_edge.image import ImageError, load_image
from helpers import CPU, photo, photos
from PIL import Image

from bingo_compress.data import pixel_store
from bingo_compress.data.listing import list_images
from bingo_compress.runtime import machine

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
            resident.append(machine.resident())
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
        "peak_mb": round(machine.peak_resident() / 1e6, 1),
    }


def throughput(home: Path) -> dict[str, Any]:
    """The pixel stage on 3,000 photos of 320 x 240, all whole, and with one in a hundred cut, in turn: files a second,
    each way's best of ROUNDS, and their ratio.
    """
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
            store, _ = pixel_store.build(list_images(folder), 64, work, CPU, "memory")
            best[name] = max(best[name], SPEED_FILES / (time.monotonic() - began))
            assert len(store) == SPEED_FILES - (name != "whole") * SPEED_FILES // 100
            shutil.rmtree(work)
    return {
        **{name: round(value) for name, value in best.items()},
        "ratio": round(best["one_percent_bad"] / best["whole"], 3),
    }


def closed_early(count: int) -> dict[str, int]:
    """`count` drawn photos as JPEGs of several kinds, whole, and cut at a random place and closed with an end marker:
    how many of which were refused.

    A progressive one is cut before its last scan: see docs/reliability.md.
    """
    random = np.random.default_rng(0)
    kinds = ({}, {"restart_marker_rows": 1}, {"subsampling": 0}, {"quality": 40}, {"progressive": True})
    told = {"whole": 0, "whole_refused": 0, "cut": 0, "cut_refused": 0}

    def refused(raw: bytes) -> bool:
        try:
            load_image(io.BytesIO(raw), int(random.choice([0, 32])))
        except ImageError:
            return True
        return False

    for number in range(count):
        picture = Image.fromarray(photo(number, number, *random.integers(60, 300, 2)))
        file = io.BytesIO()
        kind = kinds[number % len(kinds)]
        (picture.convert("L") if number % 7 == 6 else picture).save(file, "JPEG", **kind)
        raw = file.getvalue()
        told["whole"] += 1
        told["whole_refused"] += refused(raw)
        first, last = raw.index(b"\xff\xda"), raw.rindex(b"\xff\xda")
        cut = int(random.integers(first + 20, last if "progressive" in kind else len(raw) - 4))
        told["cut"] += 1
        told["cut_refused"] += refused(raw[:cut] + b"\xff\xd9")
    return told
