"""TIFFs of many bands: three are picked where a setting says which, by trainer and device alike."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bingo_edge.errors import EdgeError
from bingo_edge.image import ImageError, decode, load_image
from bingo_edge.model import Embedder, read_contract
from helpers import Ran, flags, photo
from PIL import Image
from test_tiff import HEIGHT, WIDTH, bands, tiff

from bingo_compress.data.decode import picture
from bingo_compress.data.listing import list_images
from bingo_compress.errors import BingoError
from bingo_compress.recipe import make_recipe
from bingo_compress.sources.opened import Asked

PICK = (3, 2, 1)


def numbers(count: int, kind: str) -> np.ndarray:
    top = 256 if kind.endswith("1") else 65536
    return np.random.default_rng(count).integers(0, top, (HEIGHT, WIDTH, count)).astype(kind)


def seen(values: np.ndarray) -> np.ndarray:
    """Three bands as 8 bits."""
    return values.astype(np.uint8) if values.dtype.itemsize == 1 else np.rint(values / 65535 * 255).astype(np.uint8)


@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("count", "meaning"), [(3, 1), (4, 1), (5, 1), (8, 1), (5, 2), (13, 2)])
def test_three_bands_are_picked(count: int, meaning: int, size: int, order: str, planar: int) -> None:
    values = numbers(count, f"{order}u{size}")
    raw = np.moveaxis(values, 2, 0).tobytes() if planar == 2 else values.tobytes()
    more = {"t284": (planar,)}
    if planar == 2:  # a strip a band
        each = len(raw) // count
        more |= {"t273": tuple(8 + each * band for band in range(count)), "t279": (each,) * count}
    file = tiff(raw, (8 * size,) * count, meaning, order, **more)
    found = decode(io.BytesIO(file), bands=PICK)
    assert (found.pixels == seen(values[:, :, [2, 1, 0]])).all() and found.pixels.flags.c_contiguous
    assert found.peak == (int(values[:, :, :3].max()) if size == 2 else 0)
    assert (load_image(io.BytesIO(file), bands=(1, 1, count)) == seen(values[:, :, [0, 0, count - 1]])).all()


def test_files_that_say_what_their_bands_are_stay_as_they_are(tmp_path: Path) -> None:
    Image.fromarray(photo(1, 1)).save(tmp_path / "a.png")
    (tmp_path / "rgb.tif").write_bytes(tiff(bands(3), (8,) * 3, 2))
    (tmp_path / "extra.tif").write_bytes(tiff(bands(4), (8,) * 4, 2))
    Image.fromarray(photo(1, 1)[:, :, 0]).save(tmp_path / "grey.tif")
    for file in tmp_path.iterdir():
        assert (load_image(file, bands=PICK) == load_image(file)).all()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (tiff(bands(5), (8,) * 5, 1), "5 bands that does not say .*, and has no number 7"),
        (tiff(bands(8)[:-99], (8,) * 8, 1), "a truncated TIFF"),
        (tiff(bands(8), (8,) * 8, 1, t259=(5,)), "8 bands that is compressed or in tiles"),
        (tiff(bands(8) * 4, (32,) * 8, 1), "8 bands whose samples are no whole numbers of 8 or 16 bits"),
        (tiff(bands(8) * 2, (16,) * 8, 1, t339=(3,) * 8), "8 bands whose samples are no whole numbers of 8 or 16 bits"),
        (tiff(bands(8), (8,) * 8, 1, t256=(1 << 20,), t257=(1 << 20,)), "more pixels than can be picked from"),
    ],
)
def test_what_cannot_be_picked_from_is_named(raw: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        load_image(io.BytesIO(raw), bands=(3, 2, 7))


# ---------------------------------------------------------------- one value, from the recipe to the device


def multispectral(folder: Path, count: int) -> Path:
    """Files of five bands, of which 4, 3, 2 are a photo's red, green and blue."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        colours = photo(number % 3, number, HEIGHT, WIDTH)
        other = np.full((HEIGHT, WIDTH, 1), 200, np.uint8)
        values = np.concatenate((other, colours[:, :, ::-1], other), axis=2)
        (folder / f"{number:02d}.tif").write_bytes(tiff(values.tobytes(), (8,) * 5, 1, t338=(0,) * 4))
    return folder


@pytest.mark.parametrize("value", ["3,2", "0,1,2", "3;2;1", "a,b,c", "1,2,3,4"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(BingoError, match=r"bands: .*for example 3,2,1"):
        make_recipe({"bands": value}, "here")


def test_a_list_means_the_same() -> None:
    assert make_recipe({"bands": [4, 3, 2]}, "here").bands == "4,3,2"


def test_check_reads_them(bingo: Callable[..., Ran], tmp_path: Path) -> None:
    folder = multispectral(tmp_path / "m", 3)
    assert bingo("check", "--data", folder).status == 2
    ran = bingo("check", "--data", folder, "--bands", "4,3,2")
    assert ran.status == 0 and "3 usable images" in ran.out
    assert bingo("check", "--data", folder, "--bands", "4").status == 2


def test_other_bands_are_other_pictures(tmp_path: Path) -> None:
    folder = multispectral(tmp_path / "m", 2)
    plain, one, other = (list_images(Asked((str(folder),), bands=bands)) for bands in ("", "4,3,2", "1,1,1"))
    assert len({each.fingerprint() for each in (plain, one, other)}) == 3
    assert plain.fingerprint() == list_images(folder).fingerprint()
    assert (picture(one.only([1]), 0).pixels == photo(1, 1, HEIGHT, WIDTH)).all()


@pytest.mark.slow
def test_the_device_sees_what_the_trainer_saw(bingo: Callable[..., Ran], tmp_path: Path) -> None:
    folder, run = multispectral(tmp_path / "m", 16), tmp_path / "run"
    labelled = tmp_path / "labelled"
    for number, file in enumerate(sorted(folder.iterdir())):
        place = labelled / "ab"[number % 2] / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    ran = bingo("distill", *flags(data=folder, bands="4,3,2", epochs=1), "--out", run)
    assert ran.status == 0 and "images: 16 files" in ran.out, ran.err
    assert bingo("export", "--run", run).status == 0
    assert bingo("validate", "--run", run, "--data", labelled).status == 0
    contract = json.loads((run / "export" / "student.json").read_text())
    assert contract["bands"] == [4, 3, 2]
    for number in range(3):
        Image.fromarray(photo(number % 3, number, HEIGHT, WIDTH)).save(tmp_path / f"{number}.png")
    embedder = Embedder(run / "export" / "student.onnx")
    many = embedder.embed(str(file) for file in sorted(folder.iterdir())[:3])
    plain = embedder.embed(str(tmp_path / f"{number}.png") for number in range(3))
    assert not many.skipped and (many.embeddings == plain.embeddings).all()
    for wrong in ([1, 2], [0, 1, 2], ["1", "2", "3"], 3):
        with pytest.raises(EdgeError, match=r"preprocessing rule that this version knows|whole contract"):
            read_contract(json.dumps(contract | {"bands": wrong}), "file")
