"""Pictures to the exact pixels the network sees. The trainer imports this very file, so that device and trainer cannot differ."""

import math
import warnings
from os import PathLike
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Pillow warns at half of the size at which it refuses; the refusal alone is what we act on.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(Exception):
    """A picture that cannot be used; the message says why in a few words."""


def load_image(source: str | PathLike[str] | IO[bytes], at_least: int = 0) -> Pixels:
    """Decode a picture to upright 8-bit RGB.

    source: a path or a binary file. at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, its short side not under this (0: at its size).
    Returns uint8 (height, width, 3), EXIF rotation applied, the first frame of an animation,
    transparency laid over white, 16-bit values scaled (never clipped) to 8.
    Raises ImageError for anything that is not wholly decodable: a truncated file is an error, never half an image.
    """
    try:
        with Image.open(source) as opened:
            if at_least and opened.format == "JPEG" and min(opened.size) > at_least:
                scale = at_least / min(opened.size)
                opened.draft(None, (math.ceil(opened.width * scale), math.ceil(opened.height * scale)))
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            return _to_rgb(opened)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise ImageError("more pixels than Pillow's safety limit") from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ImageError(error.strerror or type(error).__name__) from None
    except Exception as error:  # Pillow's plugins let struct, zlib, Syntax and Value errors out of a damaged file.
        raise ImageError(f"cannot be decoded: {error or type(error).__name__}") from None


def _to_rgb(image: Image.Image) -> Pixels:
    if image.width == 0 or image.height == 0:
        raise ImageError("no pixels")
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageError("integer pixels outside 0..65535: the scale is unknown")
        return _grey_to_rgb(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        real = np.asarray(image)
        if not np.isfinite(real).all() or real.min() < 0 or real.max() > 1:
            raise ImageError("float pixels outside 0..1: the scale is unknown")
        return _grey_to_rgb(np.rint(real * 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # convert would copy


def _grey_to_rgb(grey: Pixels) -> Pixels:
    return np.repeat(grey[:, :, None], 3, axis=2)


def preprocess(pixels: Pixels, *, size: int, crop_pct: float, interpolation: str, crop_mode: str = "center") -> Pixels:
    """The network's input: the centred square of side crop_pct x the shorter side, resized with antialiasing to size x size.

    pixels: uint8 (height, width, 3). Returns uint8 (size, size, 3). With crop_mode "squash" the whole picture is resized, aspect not kept.
    It is timm's and torchvision's "resize, then centre crop" done in one step, so memory stays bounded for a 1 x 20,000 picture too.
    """
    height, width = pixels.shape[:2]
    box: tuple[float, float, float, float]
    if crop_mode == "squash":
        box = (0.0, 0.0, float(width), float(height))
    else:
        side = min(width, height) * crop_pct
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    left, top, right, bottom = box
    # Across, then down, as two calls: which pass Pillow does first by itself depends on its version.
    across = Image.fromarray(pixels).resize((size, height), RESAMPLING[interpolation], box=(left, 0, right, height))
    return np.array(across.resize((size, size), RESAMPLING[interpolation], box=(0, top, size, bottom)))


def preprocess_from(contract: dict[str, Any], pixels: Pixels) -> Pixels:
    """`preprocess` with the settings of a student.json (or of the ONNX file's metadata)."""
    return preprocess(pixels, size=int(contract["input"]["size"]), **contract["preprocess"])
