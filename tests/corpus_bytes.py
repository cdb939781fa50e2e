"""Picture files by formula, byte by byte where Pillow writes no such file: what tests/corpus.py lists."""

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)

Colour = tuple[int, int, int]


def textured(height: int = 90, width: int = 120) -> np.ndarray:
    """uint8 (height, width, 3) that compresses badly, so that half of a file is half of a picture."""
    noise = np.random.default_rng(5).integers(0, 90, (height, width, 3))
    rows, columns = np.mgrid[:height, :width]
    return (np.stack([rows, columns, rows + columns], 2) * 160 // (height + width) + noise).astype(np.uint8)


def quarters(height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (height, width, 3): red, green, blue, white; it tells every way up from every other."""
    picture = np.zeros((height, width, 3), np.uint8)
    for place, colour in enumerate((RED, GREEN, BLUE, WHITE)):
        row, column = place // 2 * height // 2, place % 2 * width // 2
        picture[row : row + height // 2, column : column + width // 2] = colour
    return picture


def plain(colour: object, mode: str = "RGB", size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def mean_of(raw: bytes) -> Colour:
    """Mean colour as Pillow alone decodes it."""
    red, green, blue = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).reshape(-1, 3).mean(0)
    return red, green, blue


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, raw: bytes, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG whose `raw` are the filtered rows; Pillow writes neither 16-bit colour nor a picture that is not there."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )


def wide_png(values: np.ndarray) -> bytes:
    """A 16-bit PNG: grey (height, width), with alpha (height, width, 2) or RGB (height, width, 3)."""
    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1)
    return png(
        width,
        height,
        b"".join(b"\0" + row.tobytes() for row in rows),
        16,
        {2: 0, 3: {2: 4, 3: 2}.get(values.shape[-1], 2)}[values.ndim],
    )


def wide_tiff(values: np.ndarray) -> bytes:
    """An uncompressed little-endian RGB TIFF of 16 bits, (height, width, 3)."""
    height, width = values.shape[:2]
    body = values.astype("<u2").tobytes()
    shorts = [(256, width), (257, height), (259, 1), (262, 2), (277, 3), (278, height)]
    bits = 8 + 2 + 12 * 9 + 4
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in shorts]
    entries += [
        struct.pack("<HHII", 258, 3, 3, bits),
        struct.pack("<HHII", 273, 4, 1, bits + 6),
        struct.pack("<HHII", 279, 4, 1, len(body)),
    ]
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", 9)
        + b"".join(sorted(entries, key=lambda e: e[:2][::-1]))
        + bytes(4)
        + struct.pack("<3H", 16, 16, 16)
        + body
    )


def ycck() -> bytes:
    """Red, as Adobe writes it: YCC of the inverted colours, K, and a marker that says so. Pillow writes CMYK only; the
    bytes differ in the marker alone.
    """
    y, cb, cr = (
        round(value)
        for value in (
            0.587 * 255 + 0.114 * 255,
            128 - 0.331264 * 255 + 0.5 * 255,
            128 - 0.418688 * 255 - 0.081312 * 255,
        )
    )
    raw = bytearray(encoded(plain((255 - y, 255 - cb, 255 - max(cr, 0), 0), "CMYK"), "JPEG", quality=98, subsampling=0))
    raw[raw.index(b"Adobe") + 11] = 2
    return bytes(raw)


def turned(turn: int) -> tuple[bytes, np.ndarray]:
    """(a JPEG with EXIF orientation `turn`, how it is to be seen)."""
    stored, swap = quarters(), (1, 0, 2)
    upright = (
        stored,
        stored[:, ::-1],
        stored[::-1, ::-1],
        stored[::-1],
        stored.transpose(swap),
        np.rot90(stored, -1),
        stored[::-1, ::-1].transpose(swap),
        np.rot90(stored),
    )
    exif = Image.Exif()
    exif[0x0112] = turn
    return encoded(stored, "JPEG", quality=95, subsampling=0, exif=exif), np.ascontiguousarray(upright[turn - 1])


def animated(kind: str, **options: object) -> bytes:
    return encoded(plain(RED), kind, save_all=True, append_images=[plain(BLUE), plain(GREEN)], duration=50, **options)


def many_scans() -> bytes:
    """A progressive JPEG that repeats its last scan 200 times: a few bytes each, and each a pass over the picture."""
    raw = encoded(textured(), "JPEG", progressive=True)
    last = raw.rindex(b"\xff\xda")
    return raw[:last] + raw[last:-2] * 200 + raw[-2:]


def closed_early(raw: bytes, share: int) -> bytes:
    """A JPEG cut at `share` percent of its scans and then closed with an end marker, as some cameras and proxies do: a
    decoder makes up the rest.
    """
    start = raw.index(b"\xff\xda")
    return raw[: start + (len(raw) - start) * share // 100] + b"\xff\xd9"


def by_frequency() -> bytes:
    """A progressive JPEG whose last scan holds most of the detail, which Pillow does not write: `jpegtran -scans` on a
    piece of PICTURE, with "0: 0-0, 0, 0; 0: 1-5, 0, 0; 0: 6-63, 0, 0;".
    """
    return base64.b64decode(
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//wgALCAAY"
        "ACABAREA/8QAGAAAAwEBAAAAAAAAAAAAAAAAAQIDBAb/2gAIAQEAAAAA4u7GNBXNV2//xAAYEAEBAQEBAAAAAAAAAAAAAAACAQMSE//aAAgBAQABBQCZI0QTLinIC9lU"
        "5HsgCe2ZjpuchvNhisMR/8QAJhABAAEDAwMDBQAAAAAAAAAAAREAAiESMUFhcYEDMvCRobHR8f/aAAgBAQAGPwBu995IOYnv8++bbRbrnEap42z16YhoENWQVkxMue/8"
        "4hEB3jz06lSXMq6ZQk5p024hcqYPxtSZDZjkrVddbFii2yTvz84q4H2EgM7H0out1a22WX5ntWTVBs4xtg8VqfUstFVYGYTjz+6//9k="
    )


def zipped_text() -> bytes:
    """A PNG whose comment alone unpacks to 4 MB."""
    squeezer = zlib.compressobj(9)
    text = b"".join(squeezer.compress(bytes(1 << 20)) for _ in range(4)) + squeezer.flush()
    return png(2, 2, bytes(14), extra=chunk(b"zTXt", b"Comment\0\0" + text))


def bomb(side: int = 20_000) -> bytes:
    """A whole 1-bit PNG of side x side pixels, which would take 1.2 GB as RGB."""
    return png(side, side, bytes((side // 8 + 1) * side), 1, 0)


def palette_with_alpha() -> bytes:
    image = plain(1, "P")
    image.putpalette([10, 20, 30, 255, 0, 0])
    return encoded(image, "PNG", transparency=bytes([255, 128]))


def heic() -> bytes:
    brands = b"heic\0\0\0\0mif1heic"
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(200)
