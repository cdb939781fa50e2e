"""Pictures to the exact pixels the network sees. The trainer imports this very file, so that device and trainer cannot
differ.
"""

import io
import logging
import math
import os
import stat
import warnings
from contextlib import suppress
from os import PathLike
from threading import Lock
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from bingo_edge import tiff

Pixels = NDArray[np.uint8]

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bytes: some decoders read a file whole before they look at it, and no picture within Pillow's limit needs more.
LARGEST_FILE = 1 << 30
# of a progressive JPEG, which has about 10: each costs a pass over the picture, and an empty one next to no bytes
MOST_SCANS = 100
ARITHMETIC = (b"\xc9", b"\xca")  # frames of JPEGs with arithmetic coding
SCAN = b"\xff\xda"
MORE = bytes(range(255))  # what a picture that was cut takes for its own
RESTARTS = tuple(b"\xff" + bytes([number]) for number in range(0xD0, 0xD8))
LARGE = 1 << 26  # pixels: larger pictures are decoded one at a time, or a folder of them would take gigabytes a thread
_ONE_AT_A_TIME = Lock()

# Pillow's own lines on odd files would stand between ours; an application that sets up logging still gets them.
logging.getLogger("PIL").addHandler(logging.NullHandler())
# Pillow warns at half of the size at which it refuses; the refusal alone is what we act on.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
with suppress(ImportError):
    import pillow_heif  # type: ignore[import-not-found,unused-ignore]  # not needed, but with it phones' HEIC can be read

    pillow_heif.register_heif_opener()


PAGED = ("TIFF", "GIF", "WEBP", "PNG")  # not a phone's MPO, whose second picture is a preview or a depth map


class ImageError(Exception):
    """A picture that cannot be used; the message says why in a few words."""


class Decoded(NamedTuple):
    """A picture, uint8 (height, width, 3), and what its file was. several: that it holds more pages or frames, of which
    this is the first; peak: of 16 bits a sample, the largest number, where it may be up to 65,535; 0 for other files.
    """

    pixels: Pixels
    several: bool
    peak: int


def load_image(source: str | PathLike[str] | IO[bytes], at_least: int = 0, bands: tiff.Bands = ()) -> Pixels:
    """Decode a picture to upright 8-bit RGB.

    source: a path or a binary file. at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, its short side not
    under this (0: at its size). bands: of a TIFF of many bands that does not say which are red, green and blue, their
    numbers, from 1; without them such a file cannot be used. Returns uint8 (height, width, 3), EXIF rotation applied,
    the first frame of an animation, transparency laid over white, 16-bit values scaled (never clipped) to 8. Raises
    ImageError for anything that is not wholly decodable: a truncated file is an error, never half an image.
    """
    return decode(source, at_least, bands).pixels


def decode(source: str | PathLike[str] | IO[bytes], at_least: int = 0, bands: tiff.Bands = ()) -> Decoded:
    """The same, with what a folder of such files is to be told about."""
    try:
        _refuse_file(source)
        with Image.open(source) as opened:
            if opened.format == "EPS":
                raise ImageError("PostScript, which would be run as a program")
            if isinstance(opened, TiffImageFile):
                if why := tiff.unusable(opened.tag_v2, _start(source), bands):
                    raise ImageError(why)
                if tiff.unsaid(opened.tag_v2):
                    return _unidentified(source, bands)
            if opened.info.get("progressive"):
                _refuse_scans(opened)
            _reduce(opened, at_least)
            if opened.width * opened.height <= LARGE:
                return _upright(opened, source, at_least)
            with _ONE_AT_A_TIME:
                return _upright(opened, source, at_least)
    except ImageError:
        raise
    except UnidentifiedImageError:
        return _unidentified(source, bands)
    except Image.DecompressionBombError:
        raise ImageError("more pixels than Pillow's safety limit") from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ImageError(error.strerror or type(error).__name__) from None
    except Exception as error:  # Pillow's plugins let struct, zlib, Syntax and Value errors out of a damaged file.
        raise ImageError(f"cannot be decoded: {error or type(error).__name__}") from None


def _refuse_file(source: str | PathLike[str] | IO[bytes]) -> None:
    """Raise ImageError for a path that would be waited for or that no picture needs. Folders are left to open(), which
    says so.
    """
    if not isinstance(source, str | PathLike):
        return
    status = os.stat(source)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ImageError("not a regular file")
    if status.st_size > LARGEST_FILE:
        raise ImageError(f"{status.st_size:,} bytes: larger than any picture")


def _refuse_scans(opened: Any) -> None:
    place = opened.fp.tell()
    opened.fp.seek(0)
    scans = opened.fp.read().count(SCAN)
    opened.fp.seek(place)
    if scans > MOST_SCANS:
        raise ImageError(f"a JPEG of {scans:,} scans: made to take long")


def _reduce(opened: Image.Image, at_least: int) -> None:
    if at_least and opened.format == "JPEG" and min(opened.size) > at_least:
        scale = at_least / min(opened.size)
        opened.draft(None, (math.ceil(opened.width * scale), math.ceil(opened.height * scale)))


def _refuse_closed_early(opened: JpegImageFile, source: str | PathLike[str] | IO[bytes], at_least: int) -> None:
    """Raise ImageError for a JPEG that was cut and then closed with an end marker: libjpeg makes up the rest and says
    nothing that Pillow passes on.

    Asked of pictures that may be such: what is made up is mid-grey, or, in a progressive one, detail. Bytes before the
    marker change nothing in a whole picture, which has taken all it needs; a cut one takes them for its own. What is
    not noticed: a cut within the last block of pixels, and one within a last scan that only refines.
    """
    progressive = "progressive" in opened.info
    if not (progressive or opened.mode == "CMYK" or _ends_in_mid_grey(opened)):
        return
    if isinstance(source, str | PathLike):
        with open(source, "rb") as file:
            raw = file.read()
    else:
        source.seek(0)
        raw = source.read()
    start, end = _scans(raw)
    if end < 0:
        return
    cut = ImageError("a truncated JPEG with an end marker")
    if progressive:
        if _has_scans_missing(raw[start:end]):
            raise cut
        if _refines(raw[start:end]):
            return
        at_least = 0
    # A cut in a restart marker may leave half of it; a picture in intervals that was cut at an interval's end waits for
    # the marker of the next.
    given = raw[:end].rstrip(b"\xff")
    place = max(given.rfind(restart, start) for restart in RESTARTS)
    following = RESTARTS[(given[place + 1] - 0xD0 + 1) % len(RESTARTS)] if place >= 0 else RESTARTS[0]
    with (
        JpegImageFile(io.BytesIO(raw)) as whole,
        JpegImageFile(io.BytesIO(given + MORE + following + MORE + raw[end:])) as fed,
    ):
        _reduce(whole, at_least)
        _reduce(fed, at_least)
        whole.load()
        try:
            fed.load()
        except OSError:  # the bytes made no sense; a whole picture does not look at them
            raise cut from None
        if ImageChops.difference(whole, fed).getbbox():
            raise cut


def _ends_in_mid_grey(opened: Image.Image) -> bool:
    last: Any = opened.getpixel((opened.width - 1, opened.height - 1))
    red, green, blue = (last, last, last) if opened.mode == "L" else last
    # In luma: a neighbour's colour runs into the last pixel.
    return bool(abs(0.299 * red + 0.587 * green + 0.114 * blue - 128) <= 1)


def _scans(raw: bytes) -> tuple[int, int]:
    """Where a JPEG's first scan and its end marker are, not those of a thumbnail or of a second picture; the end is -1
    in a file of unusual layout.
    """
    place = 2
    while raw[place : place + 1] == b"\xff" and raw[place : place + 2] != SCAN:
        if raw[place + 1 : place + 2] in ARITHMETIC:  # its decoder may read on past a scan that is whole
            return 0, -1
        place += 2 + int.from_bytes(raw[place + 2 : place + 4], "big")
    return place, raw.find(b"\xff\xd9", place) if raw[place : place + 1] == b"\xff" else -1


def _has_scans_missing(scans: bytes) -> bool:
    """Whether a progressive JPEG does not send all of its first component, or begins to send a coefficient bit by bit
    and does not send the last bit.
    """
    never = 255
    left: dict[int, bytearray] = {}  # of each component: for every coefficient how many bits are still to come
    place = 0
    while place >= 0:
        parts = place + 5 + 2 * scans[place + 4]
        first, last, bits = scans[parts : parts + 3]
        for part in scans[place + 5 : parts : 2]:
            left.setdefault(part, bytearray([never]) * 64)[first : last + 1] = bytes([bits & 15]) * (last + 1 - first)
        place = scans.find(SCAN, parts)
    return any(left[scans[5]]) or any(set(bits) - {0, never} for bits in left.values())


def _refines(scans: bytes) -> bool:
    """Whether the last scan of a progressive JPEG sends only last bits of coefficients whose other bits are there."""
    last = scans.rindex(SCAN)
    return scans[last + 5 + 2 * scans[last + 4] + 2] >> 4 > 0


def _start(source: str | PathLike[str] | IO[bytes]) -> bytes:
    """The first 16 bytes of a file."""
    if isinstance(source, str | PathLike):
        with open(source, "rb") as file:
            return file.read(16)
    place = source.tell()
    source.seek(0)
    start = source.read(16)
    source.seek(place)
    return start


def _unidentified(source: str | PathLike[str] | IO[bytes], bands: tiff.Bands) -> Decoded:
    """A picture that Pillow does not know: a TIFF of 10, 12 or 14 bits, or of many bands. Raises ImageError for all
    others.
    """
    try:
        found = tiff.unpacked(source, bands)
    except Exception as error:  # as of Pillow's own plugins: a damaged file
        raise ImageError(f"a damaged TIFF: {error or type(error).__name__}") from None
    if isinstance(found, str):
        raise ImageError(found or _unknown(source))
    pixels, peak = found
    return Decoded(pixels if pixels.ndim == 3 else _grey_to_rgb(pixels), several=False, peak=peak)


def _unknown(source: str | PathLike[str] | IO[bytes]) -> str:
    """What to say of a file that is no picture to Pillow: a phone's HEIC is one all the same."""
    with suppress(OSError, ValueError):
        start = _start(source)[:12]
        if start[4:8] == b"ftyp" and start[8:] in (
            b"heic",
            b"heix",
            b"heim",
            b"heis",
            b"hevc",
            b"hevx",
            b"mif1",
            b"msf1",
            b"avif",
            b"avis",
        ):
            return "HEIC or AVIF: damaged, or no decoder is installed (pip install pillow-heif, or convert it)"
    return "not an image that Pillow can read"


def _upright(opened: Image.Image, source: str | PathLike[str] | IO[bytes], at_least: int) -> Decoded:
    several = opened.format in PAGED and _holds_several(opened)
    high_bytes = opened.format in ("PNG", "TIFF") and _has_16_bits(opened)  # in colour Pillow reads those alone
    opened.load()
    if isinstance(opened, JpegImageFile):
        _refuse_closed_early(opened, source, at_least)
    try:
        turn = TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block turns nothing; the picture is whole
        turn = None
    meant = tiff.samples(opened) if isinstance(opened, TiffImageFile) else tiff.Samples()
    pixels, peak = _to_rgb(opened if turn is None else opened.transpose(turn), meant)
    if high_bytes and opened.mode == "RGB":
        peak = int(pixels.max()) << 8 | 255
    return Decoded(pixels, several, peak)


def _has_16_bits(opened: Any) -> bool:
    how = opened.tile[0][3] if opened.tile else ""
    return ";16" in str(how if isinstance(how, str) else how[0])


def _holds_several(opened: Any) -> bool:
    return tiff.several(opened) if isinstance(opened, TiffImageFile) else getattr(opened, "is_animated", False)


def _to_rgb(image: Image.Image, meant: tiff.Samples) -> tuple[Pixels, int]:
    """(a picture as 8-bit RGB, `Decoded.peak`)."""
    if image.width == 0 or image.height == 0:
        raise ImageError("no pixels")
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageError("integer pixels outside 0..65535: the scale is unknown")
        grey = tiff.scaled(wide, meant.largest)
        peak = int(wide.max()) if meant.largest == 65535 else 0
        return _grey_to_rgb(255 - grey if meant.white_is_zero else grey), peak
    if image.mode == "F":
        real = np.asarray(image)
        if not np.isfinite(real).all() or real.min() < 0 or real.max() > 1:
            raise ImageError("float pixels outside 0..1: the scale is unknown")
        return _grey_to_rgb(np.rint(real * 255).astype(np.uint8)), 0
    if not meant.alpha:
        image = tiff.without_extra(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image if image.mode == "RGB" else image.convert("RGB")), 0  # convert would copy


def _grey_to_rgb(grey: Pixels) -> Pixels:
    return np.repeat(grey[:, :, None], 3, axis=2)


def preprocess(pixels: Pixels, *, size: int, crop_pct: float, interpolation: str, crop_mode: str = "center") -> Pixels:
    """The network's input: the centred square of side crop_pct x the shorter side, resized with antialiasing to size x
    size.

    pixels: uint8 (height, width, 3). Returns uint8 (size, size, 3). With crop_mode "squash" the whole picture is
    resized, aspect not kept. It is timm's and torchvision's "resize, then centre crop" done in one step, so memory
    stays bounded for a 1 x 20,000 picture too.
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
