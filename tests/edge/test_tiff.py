"""TIFFs whose numbers Pillow alone would misread: bits, bands, which end is white, and raw files."""

import io
import logging
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bingo_edge.image import ImageError, load_image
from PIL import Image

WIDTH, HEIGHT = 13, 7  # so that no line of 10 or 14 bits ends with a byte
RAMP = np.linspace(0, 1, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
LONG = {254, 256, 257, 273, 279}


def tiff(raw: bytes, bits: tuple[int, ...], meaning: int, order: str = "<", **more: tuple[int, ...]) -> bytes:
    """An uncompressed TIFF of one strip. bits: of each band; more: tags by number, as t338=(0,)."""
    tags = {256: (WIDTH,), 257: (HEIGHT,), 258: bits, 259: (1,), 262: (meaning,), 273: (8,), 277: (len(bits),)}
    tags |= {278: (HEIGHT,), 279: (len(raw),)} | {int(name[1:]): value for name, value in more.items()}
    raw += b"\0" * (len(raw) % 2)
    place = 8 + len(raw)
    beyond = place + 2 + 12 * len(tags) + 4
    entries, rest = b"", b""
    for tag, values in sorted(tags.items()):
        kind, size = (4, "I") if tag in LONG else (3, "H")
        packed = struct.pack(f"{order}{len(values)}{size}", *values)
        if len(packed) > 4:
            field, rest = struct.pack(f"{order}I", beyond + len(rest)), rest + packed
        else:
            field = packed.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + field
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", place)
    return head + raw + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0) + rest


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of whole numbers of so many bits, each row from a byte of its own."""
    return b"".join(
        int("".join(f"{value:0{bits}b}" for value in row).ljust(-(-len(row) * bits // 8) * 8, "0"), 2).to_bytes(
            -(-len(row) * bits // 8), "big"
        )
        for row in values.tolist()
    )


def loaded(raw: bytes) -> np.ndarray:
    return load_image(io.BytesIO(raw))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("meaning", [0, 1])
def test_grey_is_scaled_by_its_own_bits(bits: int, meaning: int, order: str) -> None:
    values = np.rint(RAMP * ((1 << bits) - 1)).astype(int)
    seen = loaded(tiff(packed(values, bits), (bits,), meaning, order))
    right = np.rint(values / ((1 << bits) - 1) * 255)
    assert seen.shape == (HEIGHT, WIDTH, 3) and seen.min() == 0 and seen.max() == 255
    assert np.abs(seen[..., 0] - (255 - right if meaning == 0 else right)).max() <= 0
    assert (seen == seen[..., :1]).all()


@pytest.mark.parametrize("meaning", [0, 1])
def test_white_is_white_in_8_and_16_bits(meaning: int) -> None:
    white8, white16 = (np.full((HEIGHT, WIDTH), 0 if meaning == 0 else top) for top in (255, 65535))
    assert loaded(tiff(white8.astype("u1").tobytes(), (8,), meaning)).min() == 255
    assert loaded(tiff(white16.astype("<u2").tobytes(), (16,), meaning)).min() == 255


def bands(count: int, kind: str = "u1") -> bytes:
    return np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, count)).astype(kind).tobytes()


@pytest.mark.parametrize(
    ("count", "bits", "meaning"),
    [(3, 8, 1), (4, 8, 1), (5, 8, 1), (5, 16, 1), (8, 8, 1), (5, 8, 2), (8, 8, 2), (2, 8, 1)],
)
def test_bands_that_are_no_colours_are_left_out_with_their_number(count: int, bits: int, meaning: int) -> None:
    raw = tiff(
        bands(count, f"<u{bits // 8}"), (bits,) * count, meaning, t338=(0,) * (count - (3 if meaning == 2 else 1))
    )
    with pytest.raises(ImageError, match=f"a TIFF of {count} bands that does not say which are red, green and blue"):
        loaded(raw)


@pytest.mark.parametrize("extra", [{"t338": (0,)}, {}])
def test_a_fourth_band_without_an_alpha_tag_is_not_transparency(extra: dict[str, tuple[int, ...]]) -> None:
    raw = bands(4)
    colours = np.frombuffer(raw, np.uint8).reshape(HEIGHT, WIDTH, 4)[..., :3]
    assert (loaded(tiff(raw, (8,) * 4, 2, **extra)) == colours).all()
    over_white = loaded(tiff(raw, (8,) * 4, 2, t338=(2,)))
    assert (over_white != colours).any() and (over_white >= colours).all()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (tiff(packed(np.zeros((HEIGHT, WIDTH), int), 10)[:-9], (10,), 1), "a truncated TIFF"),
        (tiff(b"0" * 99, (10,), 1, t259=(5,)), "10 bits a sample that is compressed"),
        (tiff(b"0" * 999, (12,) * 3, 2), "a TIFF of 12 bits a sample in 3 bands"),
        (tiff(b"0" * 99, (8,), 1, t254=(1,)), "a camera's raw file: only its thumbnail can be read"),
        (tiff(b"0" * 999, (16,), 32803), "a camera's raw file: only its thumbnail can be read"),
    ],
)
def test_what_cannot_be_read_is_named(raw: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        loaded(raw)


def test_a_grey_picture_that_begins_like_a_canon_is_a_picture() -> None:
    raw = np.zeros((HEIGHT, WIDTH), np.uint8)
    raw[0, :3] = list(b"CR\2")
    assert (loaded(tiff(raw.tobytes(), (8,), 1))[..., 0] == raw).all()


@pytest.mark.slow
def test_a_folder_of_them_is_one_line_a_reason_and_no_line_of_a_library(tmp_path: Path) -> None:
    (tmp_path / "eight.tif").write_bytes(tiff(bands(8), (8,) * 8, 2, t338=(0,) * 5))
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    words = [sys.executable, "-m", "bingo_compress", "check", "--data", str(tmp_path)]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ran.stderr == "" and "8 bands" in ran.stdout and "More samples" not in ran.stdout


def test_an_application_that_logs_still_hears_pillow(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "PIL"):
        loaded(tiff(bands(3), (8,) * 3, 2))
    assert any(record.name.startswith("PIL") for record in caplog.records)
