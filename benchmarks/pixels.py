"""JPEGs decoded to a store's size against the usual decoders, and crops out of each place that pixels are kept in: one
thread, no network.

python benchmarks/pixels.py [--images 64] [--rounds 7] [--data FOLDER] [--json FILE]

Decoders are timed by CPU-seconds, from bytes in memory: to an array whose short side is 256 px or more, and on to the
store's own size, Pillow's row by Pillow's resizing, the others by ours. Crops are of 500 x 375 JPEGs, drawn ones or
out of --data; without a GPU they too are timed by CPU-seconds, with one by the clock, and `gpu` and `stream, nvJPEG`
are added. simplejpeg has its row where it is installed.
"""

import argparse
import importlib.util
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from bingo_edge.image import load_image
from PIL import Image
from synthetic import photo
from torchvision.io import ImageReadMode, decode_jpeg

from bingo_compress.data import augment, pixel_store
from bingo_compress.data.listing import list_images
from bingo_compress.runtime.machine import keep_memory

Decoder = Callable[[bytes, int], np.ndarray]
Clock = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data", type=Path, help="crops of these images, instead of 500 x 375 drawn ones")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for size in ((500, 375), (1600, 1200)) for row in decoders(size, chosen.images, chosen.rounds)]
    rows += [row for size in (224, 96) for row in places(size, chosen, device)]
    if chosen.json:
        versions = {"torch": torch.__version__, "pillow": PIL.__version__, "device": device.type}
        chosen.json.write_text(json.dumps({**versions, "rows": rows}, indent=2) + "\n")


def decoders(size: tuple[int, int], count: int, rounds: int) -> list[dict[str, object]]:
    """Images per CPU-second of each decoder, and how many times ours that is."""
    side = pixel_store.store_side(224, 0)
    files = [as_jpeg(photo(number, *size)) for number in range(max(8, count * 500 // size[0]))]
    kinds: dict[str, Decoder | None] = {
        "ours": ours,
        "pillow, whole": whole,
        "torchvision": torchvision,
        "simplejpeg": simple(),
    }
    works: dict[tuple[str, str], Callable[[], object]] = {}
    for name, decode in kinds.items():
        if decode:
            shrink = pillows_shrink if decode is whole else pixel_store._shrink
            works[name, "decoded"] = partial(decoded, files, side, decode)
            works[name, "kept"] = partial(kept, files, side, decode, shrink)
    rates = measure(works, len(files), rounds, time.process_time)
    print(
        f"\n{size[0]} x {size[1]} JPEG, images per CPU-second (to"
        f" ours)\n{'':<18}{'decoded to >= ' + str(side):>22}{'in the store size':>22}"
    )
    rows: list[dict[str, object]] = []
    for name, decode in kinds.items():
        row: dict[str, object] = {"work": "decode", "size": f"{size[0]}x{size[1]}", "by": name}
        for kind in ("decoded", "kept") if decode else ():
            row |= {kind: rates[name, kind], f"{kind}_to_ours": rates[name, kind] / rates["ours", kind]}
        cells = (
            [f"{row[kind]:.0f} ({row[f'{kind}_to_ours']:.2f})" for kind in ("decoded", "kept")]
            if decode
            else ["not installed"]
        )
        print(f"{name:<18}" + "".join(f"{cell:>22}" for cell in cells))
        rows.append(row)
    return rows


def as_jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def decoded(files: list[bytes], side: int, decode: Decoder) -> None:
    for file in files:
        decode(file, side)


def kept(files: list[bytes], side: int, decode: Decoder, shrink: Callable[[np.ndarray, int], object]) -> None:
    for file in files:
        shrink(decode(file, side), side)


def ours(file: bytes, side: int) -> np.ndarray:
    return load_image(io.BytesIO(file), side)


def whole(file: bytes, side: int) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(file)).convert("RGB"))


def pillows_shrink(picture: np.ndarray, side: int) -> np.ndarray:
    height, width = pixel_store.kept_size(picture.shape[0], picture.shape[1], side)
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def torchvision(file: bytes, side: int) -> np.ndarray:
    planes = decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.RGB)
    return np.asarray(planes.permute(1, 2, 0))


def simple() -> Decoder | None:
    if importlib.util.find_spec("simplejpeg") is None:
        return None
    import simplejpeg

    def decode(file: bytes, side: int) -> np.ndarray:
        height, width = simplejpeg.decode_jpeg_header(file)[:2]
        high, wide = (-(-length * side // min(height, width)) for length in (height, width))
        return np.asarray(simplejpeg.decode_jpeg(file, min_height=high, min_width=wide))

    return decode


def places(size: int, chosen: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """Crops per second out of each place, how many times those out of memory and off the disk that is, and bytes."""
    count = chosen.images
    with tempfile.TemporaryDirectory() as temporary:
        work, folder = Path(temporary, "work"), Path(temporary, "photos")
        work.mkdir()
        folder.mkdir()
        found = list_images(chosen.data).files if chosen.data else ()
        count = min(count, len(found)) or count
        for number in range(count):
            source = chosen.data / found[number * len(found) // count] if found else None
            jpeg = source.read_bytes() if source else as_jpeg(photo(number, 500, 375))
            (folder / f"{number:05d}.jpg").write_bytes(jpeg)
        side = pixel_store.store_side(size, 0)

        def store(where: str) -> pixel_store.PixelStore:
            return pixel_store.build(list_images(folder), side, work, device, where)[0]

        kinds = ["memory", "disk", "gpu"] if device.type == "cuda" else ["memory", "disk"]
        stores = {where: store(where) for where in kinds}
        raw = stored_bytes(work)
        stores["encoded"] = store("encoded")  # deletes the raw store's files, which those above have open
        sizes = {"encoded": stored_bytes(work)} | dict.fromkeys(kinds, raw)
        if device.type == "cuda":
            stores["stream, nvJPEG"] = store("stream")
        stores["stream"] = store("stream")
        stores["stream"]._by_gpu = None
        generator = torch.Generator().manual_seed(0)

        def crop(store: pixel_store.PixelStore) -> None:
            for rows in torch.randperm(count, generator=generator).split(64):
                store.crops(rows, augment.draw(store.aspect[rows], generator).box, size)
            if device.type == "cuda":
                torch.cuda.synchronize()

        clock = time.perf_counter if device.type == "cuda" else time.process_time
        rates = measure(
            {(name, ""): partial(crop, store) for name, store in stores.items()}, count, chosen.rounds, clock
        )
    per = "second" if device.type == "cuda" else "CPU-second"
    print(f"\n{size} px crops per {per} (to memory)\n{'':<18}{'':>22}{'to disk':>10}{'kB an image':>14}")
    rows: list[dict[str, object]] = []
    for (name, _), rate in rates.items():
        ratio, to_disk, each = rate / rates["memory", ""], rate / rates["disk", ""], sizes.get(name, 0) / count
        print(f"{name:<18}{f'{rate:.0f} ({ratio:.3f})':>22}{to_disk:>10.2f}{each / 1000:>14.1f}")
        row = {"rate": rate, "to_memory": ratio, "to_disk": to_disk, "bytes_an_image": each}
        rows.append({"work": "crop", "size": size, "by": name, **row})
    return rows


def stored_bytes(work: Path) -> int:
    return sum(file.stat().st_size for file in work.glob("pixels-*/*.u8"))


def measure(
    works: dict[tuple[str, str], Callable[[], object]], count: int, rounds: int, clock: Clock
) -> dict[tuple[str, str], float]:
    """Images per second of each, in turn, so that a busy moment hits all."""
    spent: dict[tuple[str, str], list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = clock()
            work()
            if number:
                spent[name].append(clock() - start)
    return {name: count / statistics.median(times) for name, times in spent.items()}


if __name__ == "__main__":
    main()
