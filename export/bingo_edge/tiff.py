"""What a TIFF says of its numbers, where Pillow passes on less than that: bits a sample, bands, which end is white, and
whether it is a camera's raw file, of which Pillow would read the thumbnail.
"""

from collections.abc import Iterable
from os import PathLike
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

# Tags by their numbers in the standard, TIFF 6.0; the last one is DNG's.
REDUCED, WIDTH, HEIGHT, BITS, COMPRESSION, MEANING, FILL = 254, 256, 257, 258, 259, 262, 266
STRIPS, BANDS, STRIP_BYTES, PLANES, TILES, EXTRA, KIND, DNG = 273, 277, 279, 284, 322, 338, 339, 50706
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK, MOSAIC, LINEAR_RAW = 0, 1, 2, 5, 32803, 34892
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, CMYK: 4}  # bands that are seen; all others are extra
CANON = b"\x10\0\0\0CR\2"  # where a CR2 has its first directory, and its mark
ALPHA = (1, 2, 999)  # an extra band that is one, associated or not; the last is Corel's
PACKED = (10, 12, 14)  # bits a sample, without a gap between samples
RAW = "a camera's raw file: only its thumbnail can be read; develop it first"
PAGES = 4  # looked at for one that counts
MOST = 1 << 26  # pixels of a packed picture, which is held twice
MOST_SAMPLES = 1 << 28  # of a picture that bands are picked from
Bands = tuple[int, ...]


class Samples(NamedTuple):
    """How the numbers of a picture are meant. largest: the one that is white; white_is_zero: that it is black instead;
    alpha: that a last band beyond the colours is transparency.
    """

    largest: int = 65535
    white_is_zero: bool = False
    alpha: bool = True


def samples(opened: TiffImageFile) -> Samples:
    """Of a picture that Pillow has opened. Pillow itself turns the 8-bit ones whose zero is white."""
    tags = opened.tag_v2
    bits = _first(tags, BITS, 1)
    wide = opened.mode.startswith("I;16")
    colours = COLOURS.get(_first(tags, MEANING, -1), 99)
    return Samples(
        largest=(1 << bits) - 1 if wide and bits in PACKED else 65535,
        white_is_zero=wide and _first(tags, MEANING, BLACK_IS_ZERO) == WHITE_IS_ZERO,
        alpha=_first(tags, BANDS, 1) <= colours or _has_alpha(tags),
    )


def several(opened: TiffImageFile) -> bool:
    """Whether one of the next pages is a picture of its own, no smaller copy of another and no mask. What is damaged
    there is not needed, and counts as none.
    """
    file, tags = opened.fp, opened.tag_v2
    assert file is not None
    place = file.tell()
    try:
        file.seek(0)
        head = file.read(8)
        for _ in range(PAGES):
            start = tags.next
            if not start:
                return False
            tags = ImageFileDirectory_v2(head)
            file.seek(start)
            tags.load(file)
            if WIDTH in tags and not _first(tags, REDUCED, 0) & (1 | 4):
                return True
    except Exception:  # of a damaged directory, struct's, Pillow's and Python's own
        return False
    finally:
        file.seek(place)
    return False


def unusable(tags: Any, magic: bytes, bands: Bands = ()) -> str:
    """Why a TIFF with these tags of its first picture is left out, or "". magic: the file's first 16 bytes; bands: of
    pictures that are `unsaid`, the numbers of red, green and blue, from 1.
    """
    meaning, count = _first(tags, MEANING, -1), _first(tags, BANDS, 1)
    if DNG in tags or _first(tags, REDUCED, 0) & 1 or magic[4:11] == CANON or meaning in (MOSAIC, LINEAR_RAW):
        return RAW
    if unsaid(tags) and max(bands, default=count + 1) > count:
        way = f", and has no number {max(bands)}" if bands else "; the setting bands can"
        return f"a TIFF of {count} bands that does not say which are red, green and blue{way}"
    return ""


def unsaid(tags: Any) -> bool:
    """Whether a picture has bands of which nothing says which are red, green and blue."""
    colours, count = COLOURS.get(_first(tags, MEANING, -1)), _first(tags, BANDS, 1)
    if colours is None:
        return False
    return count > colours + 1 or (colours == 1 and count == 2 and not _has_alpha(tags))


def unpacked(source: str | PathLike[str] | IO[bytes], bands: Bands = ()) -> tuple[NDArray[np.uint8], int] | str:
    """A TIFF that Pillow does not know, uncompressed, its numbers scaled by their bits: grey of 10, 12 or 14 bits a
    sample as uint8 (height, width), or `bands` of one that is `unsaid` as uint8 (height, width, 3); and the largest
    number of 16 bits, 0 for others. Else why not, in a few words, or "" for what is no TIFF.
    """
    if isinstance(source, (str, PathLike)):
        with open(source, "rb") as file:
            return _unpacked(file, bands)
    source.seek(0)
    return _unpacked(source, bands)


def _unpacked(file: IO[bytes], chosen: Bands) -> tuple[NDArray[np.uint8], int] | str:
    magic = file.read(16)
    if magic[:4] not in (b"II*\0", b"MM\0*"):
        return ""
    tags = ImageFileDirectory_v2(magic[:8])
    file.seek(tags.next)
    tags.load(file)
    if why := unusable(tags, magic, chosen):
        return why
    if unsaid(tags):
        return _picked(file, tags, chosen, "<" if magic[:1] == b"I" else ">")
    bits, bands, meaning = _first(tags, BITS, 1), _first(tags, BANDS, 1), _first(tags, MEANING, -1)
    width, height = _first(tags, WIDTH, 0), _first(tags, HEIGHT, 0)
    if bits not in PACKED or bands > 1 or meaning not in (WHITE_IS_ZERO, BLACK_IS_ZERO) or width * height > MOST:
        return f"a TIFF of {bits} bits a sample in {bands} {'bands' if bands > 1 else 'band'}, which cannot be read"
    if _first(tags, COMPRESSION, 1) != 1 or TILES in tags or _first(tags, FILL, 1) != 1:
        return f"a TIFF of {bits} bits a sample that is compressed or in tiles; save it with 16 bits"
    line = (width * bits + 7) // 8
    raw = _joined(file, zip(tags[STRIPS], tags[STRIP_BYTES], strict=True), line * height)
    if not width or len(raw) < line * height:
        return "a truncated TIFF"
    rows = np.unpackbits(np.frombuffer(raw, np.uint8, line * height).reshape(height, line), axis=1)
    numbers = rows[:, : width * bits].reshape(height, width, bits) @ (1 << np.arange(bits)[::-1]).astype(np.uint32)
    grey = scaled(numbers, (1 << bits) - 1)
    return (255 - grey if meaning == WHITE_IS_ZERO else grey), 0


def _picked(file: IO[bytes], tags: Any, chosen: Bands, order: str) -> tuple[NDArray[np.uint8], int] | str:
    """Three bands, as red, green and blue, of a picture of 8 or 16 bits a sample. order: of its bytes."""
    bits, count = _first(tags, BITS, 1), _first(tags, BANDS, 1)
    width, height, planes = _first(tags, WIDTH, 0), _first(tags, HEIGHT, 0), _first(tags, PLANES, 1) == 2
    kinds = {bits, *tags.get(BITS, ())}, {1, *tags.get(KIND, ())}
    if kinds not in (({8}, {1}), ({16}, {1})):
        return f"a TIFF of {count} bands whose samples are no whole numbers of 8 or 16 bits"
    if _first(tags, COMPRESSION, 1) != 1 or TILES in tags:
        return f"a TIFF of {count} bands that is compressed or in tiles; save it without"
    if width * height * (len(chosen) if planes else count) > MOST_SAMPLES:
        return f"a TIFF of {count} bands with more pixels than can be picked from; cut it up"
    strips = list(zip(tags[STRIPS], tags[STRIP_BYTES], strict=True))
    each = len(strips) // count  # where every band has strips of its own
    parts = [strips[each * (number - 1) : each * number] for number in chosen] if planes else [strips]
    kind = np.dtype(f"{order}u{bits // 8}")
    samples = width * height * (1 if planes else count)
    raw = [_joined(file, part, samples * kind.itemsize) for part in parts]
    if not samples or min(map(len, raw)) < samples * kind.itemsize:
        return "a truncated TIFF"
    found = [np.frombuffer(one, kind, samples).reshape(height, width, -1) for one in raw]
    picked = np.concatenate(found, axis=2) if planes else found[0][:, :, [number - 1 for number in chosen]]
    numbers = np.ascontiguousarray(picked)
    white_is_zero = _first(tags, MEANING, BLACK_IS_ZERO) == WHITE_IS_ZERO
    seen = numbers.astype(np.uint8) if bits == 8 else scaled(numbers, 65535)
    return (255 - seen if white_is_zero else seen), int(numbers.max()) if bits == 16 else 0


def scaled(numbers: NDArray[Any], largest: int) -> NDArray[np.uint8]:
    """Whole numbers of 0 to `largest` as 0 to 255, to the nearest."""
    wide = numbers.astype(np.uint32)
    wide *= 255  # in place: a large picture is in memory once
    wide += largest // 2
    wide //= largest
    return wide.astype(np.uint8)


def without_extra(image: Image.Image) -> Image.Image:
    """The colours alone of a picture whose last band is no transparency."""
    return image.convert("L" if image.mode in ("LA", "La") else "RGB")


def _has_alpha(tags: Any) -> bool:
    return any(one in ALPHA for one in tags.get(EXTRA, ()))


def _joined(file: IO[bytes], strips: Iterable[tuple[int, int]], most: int) -> bytes:
    """What is in the strips, each (place, bytes), up to so many bytes: a file may claim any number of strips."""
    found = bytearray()
    for place, count in strips:
        if len(found) >= most:
            break
        file.seek(place)
        found += file.read(min(count, most - len(found)))
    return bytes(found)


def _first(tags: Any, tag: int, default: int) -> int:
    value = tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)
