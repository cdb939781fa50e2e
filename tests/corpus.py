"""Pictures as the world has them: for every kind a file by formula, and what must come of it. `make` writes all of them
into a folder.
"""

import io
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus_bytes import (
    BLUE,
    GREEN,
    RED,
    WHITE,
    Colour,
    animated,
    bomb,
    by_frequency,
    closed_early,
    encoded,
    heic,
    many_scans,
    mean_of,
    palette_with_alpha,
    plain,
    png,
    quarters,
    textured,
    turned,
    wide_png,
    wide_tiff,
    ycck,
    zipped_text,
)
from PIL import Image, features

NEAR_LIMIT = 4090  # bytes of a path; Linux takes 4,095


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


def between_scans() -> bytes:
    """A progressive JPEG that ends before its fourth scan: every scan is whole, but what they began to send bit by bit
    is not.
    """
    raw = TRUNCATED["progressive.jpg"]
    place = -1
    for _ in range(4):
        place = raw.index(b"\xff\xda", place + 1)
    return raw[: raw.rindex(b"\xff\xc4", 0, place)] + b"\xff\xd9"


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
    parts = ["d" * 199] * ((left - 51) // 200)  # so that the last folder has 1 to 200 letters
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
