"""Pictures as the world has them: for every kind a file by formula, and what must come of it. `make` writes all of them
into a folder.
"""

import base64
import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, features

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
NEAR_LIMIT = 4090  # bytes of a path; Linux takes 4,095
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Kind:
    """A kind of file. Used: `size` (width, height) and mean `colour`, within `within` levels; or all `pixels`. Else
    `reason`, a regular expression.

    listed: the reason that the listing of a folder gives, where the file is not even tried. make: its bytes, or a
    function that makes it at a path.
    """

    make: bytes | Callable[[Path], object]
    size: tuple[int, int] = (0, 0)
    colour: Colour = (0, 0, 0)
    within: int = 0
    pixels: np.ndarray | None = None
    reason: str = ""
    listed: str = ""

    @property
    def used(self) -> bool:
        return not (self.reason or self.listed)


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


def between_scans() -> bytes:
    """A progressive JPEG that ends before its fourth scan: every scan is whole, but what they began to send bit by bit
    is not.
    """
    raw = TRUNCATED["progressive.jpg"]
    place = -1
    for _ in range(4):
        place = raw.index(b"\xff\xda", place + 1)
    return raw[: raw.rindex(b"\xff\xc4", 0, place)] + b"\xff\xd9"


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


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def _linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _locked(path: Path) -> None:
    path.write_bytes(GOOD)
    path.chmod(0)


GOOD = encoded(textured(), "JPEG", quality=95)
PICTURE = textured()
MIDDLE = (128, 128, 128)  # what libjpeg makes up
CLOSED = {
    "baseline": GOOD,
    "progressive": encoded(PICTURE, "JPEG", progressive=True),
    "intervals": encoded(PICTURE, "JPEG", restart_marker_rows=1),
    "frequency": by_frequency(),
    "grey": encoded(Image.fromarray(PICTURE).convert("L"), "JPEG"),
    "cmyk": encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"),
    "thumbnail": (
        GOOD[:2]
        + b"\xff\xe1"
        + struct.pack(">H", 2 + 6 + len(encoded(plain(RED), "JPEG")))
        + b"Exif\0\0"
        + encoded(plain(RED), "JPEG")
        + GOOD[2:]
    ),
}
GREY16 = np.array([[0, 200, 300], [128 * 257, 40000, 65535]], np.uint16)
# 200 / 257 = 0.78, 300 / 257 = 1.17, 40000 / 257 = 155.6.
SCALED = np.repeat(np.array([[0, 1, 1], [128, 156, 255]], np.uint8)[:, :, None], 3, 2)
RGB16 = np.full((24, 32, 3), (60000, 300 * 257 // 3, 1000), np.uint16)
UNKNOWN, CUT = (
    "^not an image that Pillow can read$",
    "truncated|Truncated|broken data|could not create decoder|not enough image data|not an image|damaged",
)
TRUNCATED = {
    "jpg": GOOD,
    "progressive.jpg": encoded(PICTURE, "JPEG", progressive=True),
    "png": encoded(PICTURE, "PNG"),
    "gif": encoded(PICTURE, "GIF"),
    "webp": encoded(PICTURE, "WEBP"),
    "tiff": encoded(PICTURE, "TIFF"),
    "bmp": encoded(PICTURE, "BMP"),
}
if features.check("avif"):
    TRUNCATED["avif"] = encoded(PICTURE, "AVIF")
STRANGE = (
    "été ☃ 写真.jpg",
    "two\nlines.jpg",
    os.fsdecode(b"caf\xe9.jpg"),
    "-rf.jpg",
    "=1+1.jpg",
    "@x.jpg",
    "[bold]x[/].jpg",
    "esc\x1b[2J.jpg",
)

# All but last bits of detail is there.
KINDS: dict[str, Kind] = {
    "empty.jpg": Kind(b"", reason=UNKNOWN, listed="^empty file$"),
    "header_only.jpg": Kind(GOOD[:20], reason="not an image|Truncated|truncated"),
    "header_only.png": Kind(TRUNCATED["png"][:33], reason="truncated|not an image"),
    "page.jpg": Kind(b"<!DOCTYPE html><html><body>404 not found</body></html>", reason=UNKNOWN),
    "words.jpg": Kind(b"these are words\n", reason=UNKNOWN),
    "object.png": Kind(b'{"error": "no such key"}', reason=UNKNOWN),
    "noise.jpg": Kind(np.random.default_rng(0).bytes(2000), reason=UNKNOWN),
    "program.jpg": Kind(encoded(quarters(), "EPS"), reason="PostScript"),
    "is_png.jpg": Kind(encoded(PICTURE, "PNG"), pixels=PICTURE),
    "is_jpeg.png": Kind(encoded(plain(RED), "JPEG", quality=95), (32, 24), RED, 2),
    "no_suffix": Kind(encoded(PICTURE, "PNG"), pixels=PICTURE),
    "UPPER.PNG": Kind(encoded(PICTURE, "PNG"), pixels=PICTURE),
    "is_jpeg.txt": Kind(GOOD, listed=r"^not an image \(its name ends in .txt\)$"),
    "bomb.png": Kind(bomb(), reason="safety limit"),
    "declared_20000x20000.png": Kind(png(20_000, 20_000, b""), reason="safety limit"),
    "declared_65500x65500.jpg": Kind(
        GOOD.replace(struct.pack(">HH", 90, 120), struct.pack(">HH", 65500, 65500), 1), reason="safety limit"
    ),
    "declared_9000x9000.png": Kind(png(9000, 9000, b""), reason="truncated|cannot be decoded"),
    "zipped_text.png": Kind(zipped_text(), reason="cannot be decoded|not an image"),
    "scans.jpg": Kind(many_scans(), reason="scans"),
    "1x1.png": Kind(encoded(plain(BLUE, size=(1, 1)), "PNG"), (1, 1), BLUE),
    "1x20000.png": Kind(encoded(plain(RED, size=(1, 20_000)), "PNG"), (1, 20_000), RED),
    "20000x1.jpg": Kind(encoded(plain(GREEN, size=(20_000, 1)), "JPEG", quality=95), (20_000, 1), GREEN, 3),
    "cmyk.jpg": Kind(encoded(plain((0, 255, 255, 0), "CMYK"), "JPEG", quality=95), (32, 24), RED, 3),
    "ycck.jpg": Kind(ycck(), (32, 24), RED, 4),
    "grey.jpg": Kind(encoded(plain(77, "L"), "JPEG"), (32, 24), (77, 77, 77), 1),
    "grey16.png": Kind(wide_png(GREY16), pixels=SCALED),
    "grey16.tiff": Kind(encoded(Image.fromarray(GREY16), "TIFF"), pixels=SCALED),
    "grey16_alpha.png": Kind(wide_png(np.full((24, 32, 2), (0, 128 * 257), np.uint16)), (32, 24), (127, 127, 127), 1),
    "rgb16.png": Kind(wide_png(RGB16), (32, 24), (233, 100, 4), 1),
    "rgb16.tiff": Kind(wide_tiff(RGB16), (32, 24), (233, 100, 4), 1),
    "integers.tiff": Kind(encoded(Image.fromarray(GREY16.astype(np.int32)), "TIFF"), pixels=SCALED),
    "integers_too_large.tiff": Kind(
        encoded(Image.fromarray(np.full((8, 8), 70_000, np.int32)), "TIFF"), reason="scale is unknown"
    ),
    "integers_negative.tiff": Kind(
        encoded(Image.fromarray(np.full((8, 8), -1, np.int32)), "TIFF"), reason="scale is unknown"
    ),
    "float.tiff": Kind(encoded(Image.fromarray(np.full((24, 32), 0.4, np.float32)), "TIFF"), (32, 24), (102, 102, 102)),
    "float_too_large.tiff": Kind(
        encoded(Image.fromarray(np.full((8, 8), 255, np.float32)), "TIFF"), reason="scale is unknown"
    ),
    "float_nan.tiff": Kind(
        encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"), reason="scale is unknown"
    ),
    "palette_alpha.png": Kind(palette_with_alpha(), (32, 24), (255, 127, 127)),
    "alpha.png": Kind(encoded(plain((255, 0, 0, 128), "RGBA"), "PNG"), (32, 24), (255, 127, 127)),
    "clear.gif": Kind(encoded(plain(0, "P"), "GIF", transparency=0), (32, 24), WHITE),
    "animated.gif": Kind(animated("GIF"), (32, 24), RED),
    "animated.webp": Kind(animated("WEBP", lossless=True), (32, 24), RED),
    "animated.png": Kind(animated("PNG"), (32, 24), RED),
    "exif_broken.jpg": Kind(
        encoded(plain(RED), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(9)), (32, 24), RED, 2
    ),
    "exif_no_tiff.jpg": Kind(
        encoded(plain(RED), "JPEG", quality=95, exif=b"Exif\0\0garbage and more"), (32, 24), RED, 2
    ),
    "icc_broken.jpg": Kind(encoded(plain(RED), "JPEG", quality=95, icc_profile=b"no profile" * 9), (32, 24), RED, 2),
    "progressive.jpg": Kind(encoded(plain(BLUE), "JPEG", quality=95, progressive=True), (32, 24), BLUE, 3),
    "middle_grey.jpg": Kind(encoded(plain(MIDDLE), "JPEG"), (32, 24), MIDDLE),
    "middle_grey_two.jpg": Kind(
        encoded(plain(MIDDLE), "MPO", save_all=True, append_images=[plain(RED)]), (32, 24), MIDDLE
    ),
    "middle_grey_progressive.jpg": Kind(encoded(plain(MIDDLE), "JPEG", progressive=True), (32, 24), MIDDLE),
    "between_scans.jpg": Kind(between_scans(), reason="truncated"),
    "phone.heic": Kind(heic(), reason="HEIC or AVIF: .* no decoder|cannot be decoded|not an image"),
    "pipe.jpg": Kind(os.mkfifo, reason="not a regular file", listed="^not a regular file$"),
    "socket.jpg": Kind(_socket, reason="not a regular file", listed="^not a regular file$"),
    "dangling.jpg": Kind(_linked("nowhere.jpg"), reason="No such file", listed="^link that leads nowhere$"),
    "itself.jpg": Kind(
        _linked("itself.jpg"), reason="cannot be decoded|symbolic links", listed="^link that leads nowhere$"
    ),
    "locked.jpg": Kind(_locked, reason="Permission denied"),
    **{name: Kind(encoded(PICTURE, "PNG"), pixels=PICTURE) for name in STRANGE},
    **{
        f"cut{share}.{end}": Kind(raw[: len(raw) * share // 100], reason=CUT)
        for end, raw in TRUNCATED.items()
        for share in (10, 50, 90)
    },
    **{
        f"closed{share}_{name}.jpg": Kind(closed_early(raw, share), reason=CUT)
        for name, raw in CLOSED.items()
        for share in (10, 50)
    },
    **{
        f"closed90_{name}.jpg": Kind(closed_early(raw, 90), reason=CUT)
        for name, raw in CLOSED.items()
        if name != "progressive"
    },
    "closed90_progressive.jpg": Kind(closed_early(CLOSED["progressive"], 90), (120, 90), mean_of(GOOD), 2),
    **{
        f"whole_{name}.jpg": Kind(raw, Image.open(io.BytesIO(raw)).size, mean_of(raw), 2)
        for name, raw in CLOSED.items()
    },
    **{f"exif{turn}.jpg": Kind(turned(turn)[0], pixels=turned(turn)[1], within=12) for turn in range(1, 9)},
}
if features.check("avif"):
    KINDS["good.avif"] = Kind(encoded(plain(RED), "AVIF", quality=95), (32, 24), RED, 6)
NO_PERMISSION = {"locked.jpg"}  # root may read it


def near_limit(root: Path) -> str:
    """The relative path of a file whose absolute path has NEAR_LIMIT bytes."""
    left = NEAR_LIMIT - len(os.fsencode(root)) - 1
    parts = ["d" * 199] * (left // 200 - 1)
    return "/".join([*parts, "d" * (left - 200 * len(parts) - 50), "f" * 45 + ".png"])


def make(root: Path) -> dict[str, Kind]:
    """Write one file of every kind into `root`, a folder named x.jpg, links in a loop, second names and a path of
    NEAR_LIMIT bytes. Returns all by relative path.
    """
    root.mkdir(parents=True)
    kinds = {name: kind for name, kind in KINDS.items() if name not in NO_PERMISSION or os.geteuid()}
    good = Kind(encoded(PICTURE, "PNG"), pixels=PICTURE)
    kinds |= {"folder.jpg/inside.png": good, near_limit(root): good}
    for name, kind in kinds.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(kind.make, bytes):
            path.write_bytes(kind.make)
        else:
            kind.make(path)
    (root / "folder.jpg" / "up").symlink_to("..")
    (root / "folder.jpg" / "round").symlink_to("round")
    (root / "z_second_name.png").hardlink_to(root / "UPPER.PNG")
    (root / "z_link.png").symlink_to("UPPER.PNG")
    return kinds | {
        "folder.jpg/round": Kind(b"", reason="symbolic links|cannot be decoded", listed="^link that leads nowhere$")
    }
