"""Our crop and augmentation against torchvision v2's on tensors and on PIL images: MoCo-v2's list, the same stored
pictures, one thread.

python benchmarks/augment.py [--sizes 64,224] [--images 256] [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from synthetic import photo
from torchvision.transforms import v2

from bingo_compress.data import augment, pixel_store
from bingo_compress.runtime.machine import keep_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="64,224")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    rows = []
    print(
        "images per CPU-second, median of"
        f" {chosen.rounds}\n{'px':<6}{'ours':>10}{'v2 tensor':>12}{'v2 PIL':>10}{'ours/tensor':>13}{'ours/PIL':>10}"
    )
    for size in map(int, chosen.sizes.split(",")):
        side = pixel_store.store_side(size, 0)
        pictures = [photo(number % 64, side * 4 // 3, side) for number in range(chosen.images)]
        rates = measure({"ours": ours(pictures, size), **theirs(pictures, size)}, chosen.images, chosen.rounds)
        row = {
            "size": size,
            **rates,
            "against_tensor": rates["ours"] / rates["tensor"],
            "against_pil": rates["ours"] / rates["pil"],
        }
        print(
            f"{size:<6}{row['ours']:>10.0f}{row['tensor']:>12.0f}{row['pil']:>10.0f}{row['against_tensor']:>13.2f}{row['against_pil']:>10.2f}"
        )
        rows.append(row)
    if chosen.json:
        chosen.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


def ours(pictures: list[Image.Image], size: int) -> Callable[[], object]:
    store = pixel_store.store_of([np.asarray(picture).copy() for picture in pictures],
                            torch.tensor([p.width / p.height for p in pictures]), torch.device("cpu"))  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def work() -> None:
        for rows in torch.arange(len(pictures)).split(64):
            drawn = augment.draw(store.aspect[rows], generator)
            augment.apply(store.crops(rows, drawn.box, size), drawn).contiguous(memory_format=torch.channels_last)

    return work


def theirs(pictures: list[Image.Image], size: int) -> dict[str, Callable[[], object]]:
    """MoCo-v2's list of torchvision v2, image by image as its users run it. The blur's kernel reaches three sigma of
    the largest sigma, as ours does.
    """
    sigma = (0.1 * size / 224, 2.0 * size / 224)
    kernel = 2 * round(3 * sigma[1]) + 1
    steps = [
        v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(kernel, sigma)], p=0.5),
        v2.RandomHorizontalFlip(),
    ]
    tensors = [v2.functional.pil_to_tensor(picture) for picture in pictures]
    on_tensors = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])
    on_pil = v2.Compose([*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    return {
        "tensor": lambda: torch.stack([on_tensors(tensor) for tensor in tensors]),
        "pil": lambda: torch.stack([on_pil(picture) for picture in pictures]),
    }


def measure(works: dict[str, Callable[[], object]], count: int, rounds: int) -> dict[str, float]:
    """Images per CPU-second of each, in turn, so that a busy moment hits all."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if number:
                spent[name].append(time.process_time() - start)
    return {name: count / statistics.median(times) for name, times in spent.items()}


if __name__ == "__main__":
    main()
