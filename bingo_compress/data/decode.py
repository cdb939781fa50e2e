"""Files to pictures: by many threads, and for a store that streams plain JPEGs on a GPU, with the spoken way back to
the CPU's decoder.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from bingo_edge.image import Decoded, ImageError, Pixels
from bingo_edge.image import decode as decode_file
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from bingo_compress.data.image_list import ImageList
from bingo_compress.errors import BingoError
from bingo_compress.runtime import console
from bingo_compress.runtime.machine import Result, in_threads

AT_ONCE = 16  # pictures of full size on the GPU
LARGEST = 1 << 24  # pixels of a picture: AT_ONCE of them are 0.8 GB
# torch's antialiased resize holds its weights in a GPU's shared memory, which is full at a factor of 45; the long side
# is kept at 2 `side`
STRETCH = 64
DARK = 4096  # a sixteenth of what 16 bits hold: numbers of a sensor of 12 bits
Crops = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
Oddity = tuple[bool, int]  # `several` and `peak` of `Decoded`


def picture(folder: ImageList, index: int, at_least: int = 0) -> Decoded:
    """Image number `index`; at_least: as in `load_image`. Raises ImageError."""
    try:
        raw = folder.read_raw(index)
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from None
    return decode_file(io.BytesIO(raw) if isinstance(raw, bytes) else raw, at_least, folder.bands)


def plain_jpeg(raw: Path | bytes, side: int) -> int:
    """Bytes of an image that nvJPEG decodes as Pillow does: an upright JPEG in grey or YCbCr, not too large for
    pictures of short side `side`. Otherwise 0.
    """
    try:
        with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw) as opened:
            plain = (
                isinstance(opened, JpegImageFile)
                and opened.format == "JPEG"  # MPO, several pictures in a file, is a subclass
                and opened.mode in ("L", "RGB")
                and [component[0] for component in opened.layer] in ([1], [1, 2, 3])  # other names may mean RGB,
                and opened.info.get("adobe_transform", 1) != 0  # and so does this: nvJPEG would take it for YCbCr
                and opened.getexif().get(ExifTags.Base.Orientation, 1) == 1
                and opened.width * opened.height <= LARGEST
                and max(opened.size) <= STRETCH * side
            )
            return (len(raw) if isinstance(raw, bytes) else raw.stat().st_size) if plain else 0
    except OSError:
        return 0  # it has changed since it was checked; the CPU's decoder will say so


def on_gpu(device: torch.device) -> bool:
    """Whether JPEGs are to be decoded on the device."""
    return device.type == "cuda"


def crops_of(
    folder: ImageList, sizes: NDArray[np.int64], kept: NDArray[np.int32], side: int, device: torch.device
) -> Crops:
    """A function that crops the images of `folder` that nvJPEG decodes. sizes: (N,) `plain_jpeg` of each; kept: (N,
    2) height and width of each in a store of `side`.

    It takes indices (B,), boxes (B, 4) in shares of the image and a size, and returns (done, views): which images it
    decoded, bool (B,), and the antialiased bilinear crops, uint8 (B, 3, size, size) on `device`, not filled where not
    done. A picture is shrunk as a store's before it is cropped, so that views do not depend on who decodes: half a
    level away on average, a few at sharp edges. The first refusal of nvJPEG is said on screen; from then on nothing is
    done. Raises BingoError for a file that has changed since its size was taken.
    """
    bytes_of = torch.from_numpy(sizes)

    def read(image: int) -> Tensor:
        try:
            raw = folder.read_raw(image)
            content = np.fromfile(raw, np.uint8) if isinstance(raw, Path) else np.frombuffer(bytearray(raw), np.uint8)
        except OSError as error:
            folder.refuse_changed(image)
            raise changed(folder.place(image), error.strerror or str(error)) from None
        folder.refuse_changed(image)  # nvJPEG may pass half of a picture as whole
        return torch.from_numpy(content)

    def crops(indices: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
        views = torch.empty((len(indices), 3, size, size), dtype=torch.uint8, device=device)
        done = bytes_of[indices] > 0
        files = in_threads(read, indices[done].tolist())
        for rows in done.nonzero()[:, 0].split(AT_ONCE) if done.any() else ():
            raw = [file for _, file in islice(files, len(rows))]
            try:
                pictures = zip(nvjpeg(raw, device), indices[rows].tolist(), strict=True)
                small = [_shrunk(picture, tuple(kept[image].tolist()), side) for picture, image in pictures]
                for row, view in zip(rows.tolist(), _cropped(small, boxes[rows], size), strict=True):
                    views[row] = view
            except (RuntimeError, ImportError) as error:
                console.say(
                    f"warning: nvJPEG cannot be used ({str(error).partition(chr(10))[0]}); the CPU decodes the JPEGs"
                    " from here on"
                )
                bytes_of.zero_()
                return torch.zeros_like(done), views
        return done, views

    return crops


def nvjpeg(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """Pictures, each uint8 (3, height, width) on `device`, of JPEG files, each uint8 (bytes,) on the CPU. Raises
    RuntimeError or ImportError when refused.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # deprecated: may be gone one day

    # It writes at once into memory that torch counts as free only after this stream's work (pytorch/vision#9606).
    torch.cuda.current_stream(device).synchronize()
    return cast(list[Tensor], decode_jpeg(files, ImageReadMode.RGB, device=device))


def _shrunk(picture: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """A picture, uint8 (3, height, width), as the store keeps it: at `size`, float32 of whole levels."""
    height, width = picture.shape[1:]
    planes = picture[None].float()
    # Libjpeg decodes at 1/2, 1/4 or 1/8, by means of blocks, as `load_image` and Pillow ask it to.
    if min(height, width) > side:
        scale = side / min(height, width)
        times = min(height // math.ceil(height * scale), width // math.ceil(width * scale))
        planes = avg_pool2d(planes, next(step for step in (8, 4, 2, 1) if times >= step), ceil_mode=True).round_()
    if planes.shape[2:] != size:
        planes = interpolate(planes, size, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return planes[0]


def _cropped(pictures: list[Tensor], boxes: Tensor, size: int) -> list[Tensor]:
    """Crops (3, size, size) of pictures of float32 (3, height, width)."""
    height, width = (torch.tensor([picture.shape[axis] for picture in pictures]) for axis in (1, 2))
    low, high = window(boxes, height, width)
    pieces = (
        picture[None, :, top:bottom, left:right]
        for picture, (left, top), (right, bottom) in zip(pictures, low.tolist(), high.tolist(), strict=True)
    )
    return [interpolate(piece, (size, size), mode="bilinear", antialias=True)[0].round_() for piece in pieces]


def changed(place: str, why: str) -> BingoError:
    """The error of a file that was whole when the run began."""
    return BingoError(f"{place} changed while the run was reading it ({why}); start the command again")


def window(box: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """(left, top) and (right, bottom), each (B, 2) int64: the whole pixels that boxes (B, 4), in shares, mean in
    pictures of height and width (B,).
    """
    sides = torch.stack((width, height), dim=1)
    low = torch.minimum((box[:, :2] * sides).round().long().clamp(min=0), sides - 1)
    return low, torch.maximum(torch.minimum((box[:, 2:] * sides).round().long(), sides), low + 1)


def decode_all(
    folder: ImageList,
    indices: Iterable[int],
    use: Callable[[Pixels], Result],
    at_least: int = 0,
    oddities: list[Oddity] | None = None,
) -> Iterator[tuple[int, Result | ImageError]]:
    """Decode the images `indices` of `folder` in threads, in order: (index, use(pixels)), or (index, ImageError) for a
    bad file.

    at_least: as in `load_image`. pixels: uint8 (height, width, 3); oddities: where these are put. A bounded number is
    in flight, so memory does not grow with the folder. Raises BingoError for a file that changed since the folder's
    contents were read.
    """

    def job(index: int) -> Result | ImageError:
        try:
            found: Decoded | ImageError = picture(folder, index, at_least)
        except ImageError as error:
            found = error
        folder.refuse_changed(index)
        if isinstance(found, ImageError):
            return found
        if oddities is not None and (found.several or found.peak):
            oddities.append((found.several, found.peak))
        return use(found.pixels)

    yield from in_threads(job, indices)


def say_oddities(found: Sequence[Oddity]) -> None:
    """One line about files of several pages, and one where all that have 16 bits a sample use a few of them."""
    several = sum(one for one, _ in found)
    if several:
        console.say(f"{several:,} files hold several pages or frames; the first of each is used")
    peaks = [peak for _, peak in found if peak]
    if peaks and max(peaks) < DARK:
        bits = max(8, max(peaks).bit_length())
        console.say(
            f"warning: {len(peaks):,} files have 16 bits a sample and none passes {max(peaks):,} of 65,535: numbers of"
            f" {bits} bits, which are seen as nearly black; multiply them by {65536 >> bits} and save them again"
        )
