"""The edge kit's pixels: decoding to upright RGB, and the crop and resize, against numbers worked out here."""

import io
from pathlib import Path

import numpy as np
import pytest
from bingo_edge import ImageError, load_image, preprocess
from PIL import Image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def pattern(height: int, width: int) -> np.ndarray:
    """A picture by integer formula: the same on every machine, and every pixel of a small one is different."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(y * 37 + x * 11) % 256, (y * 5 + x * 91 + 60) % 256, (y * x * 7 + 130) % 256], axis=2).astype(
        np.uint8
    )


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.rint(np.stack([255 * x, 255 * y, 127 + 120 * np.sin(5 * x + 3 * y)], axis=2)).astype(np.uint8)


def plain(color: tuple[int, int, int], height: int = 6, width: int = 9) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    file.seek(0)
    return file


# ---------------------------------------------------------------- load_image


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(turn: int) -> None:
    stored = pattern(4, 6)
    flipped, turned = stored[:, ::-1], stored[::-1, ::-1]
    swap = (1, 0, 2)
    upright = [
        stored,
        flipped,
        turned,
        stored[::-1],
        stored.transpose(swap),
        np.rot90(stored, -1),
        turned.transpose(swap),
        np.rot90(stored),
    ]
    exif = Image.Exif()
    exif[0x0112] = turn
    np.testing.assert_array_equal(load_image(encoded(stored, exif=exif)), upright[turn - 1])


def test_every_mode_becomes_rgb() -> None:
    one = Image.new
    palette = one("P", (5, 3), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    cases = {
        "grey": (encoded(one("L", (5, 3), 77)), (77, 77, 77)),
        "one bit": (encoded(one("1", (5, 3), 1)), (255, 255, 255)),
        "palette": (encoded(palette), (200, 100, 50)),
        "palette, clear": (encoded(palette, transparency=1), (255, 255, 255)),
        "half red over white": (encoded(one("RGBA", (5, 3), (255, 0, 0, 128))), (255, 127, 127)),
        "clear black": (encoded(one("RGBA", (5, 3), (0, 0, 0, 0))), (255, 255, 255)),
        "grey and alpha": (encoded(one("LA", (5, 3), (0, 51))), (204, 204, 204)),
        "GIF's first frame": (
            encoded(one("RGB", (5, 3), RED), "GIF", save_all=True, append_images=[one("RGB", (5, 3), BLUE)]),
            RED,
        ),
    }
    for name, (file, color) in cases.items():
        np.testing.assert_array_equal(load_image(file), plain(color, 3, 5), err_msg=name)
    cmyk = load_image(encoded(one("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - plain(RED, 16, 16)).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    wide = np.array([[0, 200, 300], [128 * 257, 40000, 65535]], np.uint16)
    expected = [[0, 1, 1], [128, 156, 255]]  # 200 / 257 = 0.78; 300 / 257 = 1.17; 40000 / 257 = 155.6
    pixels = load_image(encoded(wide))
    for channel in range(3):
        np.testing.assert_array_equal(pixels[:, :, channel], expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (2000, 1), (48, 64)])
def test_png_of_any_shape_is_exact(shape: tuple[int, int]) -> None:
    np.testing.assert_array_equal(load_image(encoded(pattern(*shape))), pattern(*shape))


def test_unusable_pictures_say_why(tmp_path: Path) -> None:
    jpeg = encoded(pattern(64, 64), "JPEG").getvalue()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    cases = {
        "text.jpg": "not an image",
        "empty.jpg": "not an image",
        "cut.jpg": "truncated",
        "none.jpg": "No such file",
        "": "directory",
    }
    for name, reason in cases.items():
        with pytest.raises(ImageError, match=reason):
            load_image(tmp_path / name)
    assert load_image(io.BytesIO(jpeg)).shape == (64, 64, 3)


# ---------------------------------------------------------------- preprocess


def taps(length: int, start: float, side: float, size: int, kind: str) -> np.ndarray:
    """Weights (size, length) for antialiased resampling of the span [start, start + side), by the textbook and in
    float64.
    """
    step = side / size
    stretch = max(step, 1.0)
    centre = start + (np.arange(size)[:, None] + 0.5) * step
    x = np.abs((np.arange(length)[None] + 0.5 - centre) / stretch)
    cubic = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    weights = cubic if kind == "bicubic" else np.maximum(1 - x, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def gaps(found: np.ndarray, pixels: np.ndarray, crop: float | None, kind: str) -> np.ndarray:
    """|found - reference|, whichever pass comes first: Pillow 13 and later shrink a tall picture down before across,
    older ones never do.

    After each pass there are bytes, and an exact half may round either way in Pillow's fixed point: one level at most.
    """
    size, (height, width) = len(found), pixels.shape[:2]
    side = (height, width) if crop is None else (min(height, width) * crop,) * 2
    down = "yh,hwc->ywc", taps(height, (height - side[0]) / 2, side[0], size, kind)
    across = "xw,hwc->hxc", taps(width, (width - side[1]) / 2, side[1], size, kind)
    both = []
    for passes in ((across, down), (down, across)):
        rounded = pixels.astype(np.float64)
        for axes, weights in passes:
            rounded = np.floor(np.clip(np.einsum(axes, weights, rounded), 0, 255) + 0.5)
        both.append(np.abs(found - rounded))
    return min(both, key=np.max)


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(60, 100), (97, 33), (5, 7), (1, 300), (1, 1)])
def test_preprocess_matches_an_independent_resampler(shape: tuple[int, int], kind: str) -> None:
    for make, crop in ((smooth, 0.875), (smooth, None), (smooth, 1.0), (pattern, 0.9)):
        pixels = make(*shape)
        mode = {"crop_mode": "squash"} if crop is None else {}
        found = preprocess(pixels, size=24, crop_pct=crop or 0.5, interpolation=kind, **mode)
        assert found.shape == (24, 24, 3)
        assert found.dtype == np.uint8
        gap = gaps(found, pixels, crop, kind)
        assert gap.max() <= 1 and gap.mean() < 0.05, (make, crop, gap.max(), gap.mean())


@pytest.mark.parametrize("shape", [(200, 300), (333, 180)])
def test_preprocess_is_resize_then_centre_crop(shape: tuple[int, int]) -> None:
    pixels = smooth(*shape)
    height, width = shape
    scale = 110 / min(shape)  # 96 / 0.875 = 109.7
    resized = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 96) // 2, (resized.height - 96) // 2
    cropped = np.asarray(resized.crop((left, top, left + 96, top + 96))).astype(int)
    found = preprocess(pixels, size=96, crop_pct=0.875, interpolation="bicubic")
    assert np.abs(found - cropped).mean() < 2
    assert np.abs(found[::-1] - cropped).mean() > 10  # the measure sees a wrong picture


def test_preprocess_golden_colours() -> None:
    """Quarters of one colour: far from the seams every pixel is exactly that colour, and the outer eighth is cut
    away.
    """
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:40, :60], pixels[:40, 60:], pixels[40:, :60], pixels[40:, 60:] = RED, GREEN, BLUE, (10, 128, 250)
    pixels[:4] = 255  # wholly outside the centre crop, whose side is 64 of 80
    found = preprocess(pixels, size=16, crop_pct=0.8, interpolation="bicubic")
    for corner, color in (
        (found[1:6, :6], RED),
        (found[1:6, 10:], GREEN),
        (found[10:, :6], BLUE),
        (found[10:, 10:], (10, 128, 250)),
    ):
        assert (corner == color).all()
