"""The pixel store: every image decoded once, kept as one uint8 array of equal squares on disk, read through memory or held by the GPU."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bingo_edge.image import ImageError, Pixels
from numpy.typing import NDArray
from PIL import Image

from bingo_compress import screen
from bingo_compress.errors import BingoError
from bingo_compress.images import Folder, decode_all
from bingo_compress.run_dir import drop_stale, need_space, stage_key, write_text

CHUNK = 512  # images between two saves, more in a large folder: the state file grows with what is done


class PixelStore:
    """N images as uint8 (N, S, S, 3), each squeezed to a square; `aspect` (N,) is width / height of the original.

    Crops are drawn in the original's proportions and mapped into the square, so no corner is lost and the array has one shape.
    """

    def __init__(self, array: NDArray[np.uint8], aspect: torch.Tensor, device: torch.device) -> None:
        self.aspect = aspect
        self._array = array
        self._resident: torch.Tensor | None = None
        if device.type == "cuda" and array.nbytes < 0.4 * torch.cuda.mem_get_info(device)[0]:
            self._resident = torch.from_numpy(np.ascontiguousarray(array)).to(device)
        self._device = device

    def __len__(self) -> int:
        return len(self._array)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return int(self._array.nbytes)

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Pixels of the images `indices` (B,), uint8 (B, S, S, 3) on the run's device."""
        if self._resident is not None:
            return self._resident[indices.to(self._device)]
        return torch.from_numpy(self._array[indices.numpy()]).to(self._device)


def store_side(image_size: int, teacher_size: int) -> int:
    """Pixels a side of the store: a little over the largest crop, a multiple of 8."""
    return -(-max(image_size, teacher_size) * 9 // 64) * 8


def build(folder: Folder, side: int, work: Path, device: torch.device) -> tuple[PixelStore, Folder]:
    """Decode `folder` into work/pixels-KEY.u8 (or find it there). Returns the store and the folder without the files that could not be decoded.

    Chunks are written as they finish; an interrupted build goes on after the last one. Raises BingoError when the disk is too small.
    """
    key = stage_key(images=folder.fingerprint(), side=side, layout=1)
    data, state = work / f"pixels-{key}.u8", work / f"pixels-{key}.json"
    drop_stale(work, "pixels", {data.name, state.name})
    done: dict[str, Any] = (
        json.loads(state.read_text()) if state.exists() and data.exists() else {"tried": 0, "good": [], "aspect": [], "bad": []}
    )
    each = side * side * 3
    if not data.exists() or data.stat().st_size < each * len(done["good"]):  # cut short: what the state says is not there
        done = {"tried": 0, "good": [], "aspect": [], "bad": []}
    if done["tried"] < len(folder.files):
        need_space(work, each * (len(folder.files) - done["tried"]), "the pixel store")
        _fill(folder, side, data, state, done)
    if not done["good"]:
        raise BingoError(
            f"--data: expected images, found none that can be decoded among {len(folder.files) + len(folder.bad)} files in {folder.root}"
        )
    array = np.memmap(data, np.uint8, "r", shape=(len(done["good"]), side, side, 3))
    good = Folder(
        folder.root, tuple(folder.files[i] for i in done["good"]), folder.bad + tuple((folder.files[i], why) for i, why in done["bad"])
    )
    return PixelStore(array, torch.tensor(done["aspect"]), device), good


def _fill(folder: Folder, side: int, data: Path, state: Path, done: dict[str, Any]) -> None:
    def shrink(pixels: Pixels) -> tuple[Pixels, float]:
        height, width = pixels.shape[:2]
        return np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)), width / height

    chunk = max(CHUNK, len(folder.files) // 50)
    with data.open("r+b" if done["tried"] else "wb") as handle, screen.bar("decode images", len(folder.files)) as advance:
        handle.truncate(len(done["good"]) * side * side * 3)
        handle.seek(0, 2)
        advance(done["tried"])
        for index, result in decode_all(folder, range(done["tried"], len(folder.files)), shrink):
            done["tried"] += 1
            if isinstance(result, ImageError):
                done["bad"].append((index, str(result)))
            else:
                handle.write(result[0].tobytes())
                done["good"].append(index)
                done["aspect"].append(result[1])
            advance(1, note=f"{len(done['bad'])} bad" if done["bad"] else None)
            if done["tried"] % chunk == 0 or done["tried"] == len(folder.files):
                handle.flush()
                os.fsync(handle.fileno())  # before the state says so
                write_text(state, json.dumps(done))
