"""Photos made of smooth noise, for benchmarks: the same every time, and nobody's."""

import numpy as np
import torch
from PIL import Image

from bingo_compress.data import pixel_store


def photo(number: int, width: int, height: int) -> Image.Image:
    """A picture with large shapes and fine grain, about as hard to decode as a photo."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (8, 12, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = random.normal(0, 6, (height, width, 1))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def store_of(count: int, size: int, device: torch.device) -> pixel_store.PixelStore:
    """A pixel store of `count` pictures for crops of `size` px, on the GPU or in memory; a hundred pictures, again and
    again.
    """
    side = pixel_store.store_side(size, 0)
    hundred = [np.array(photo(number, side * 4 // 3, side)) for number in range(min(count, 100))]
    store = pixel_store.store_of(
        [hundred[number % 100] for number in range(count)], torch.full((count,), 4 / 3), device
    )
    if device.type == "cuda":
        return pixel_store.PixelStore(store.pictures, device, "gpu")
    return store
