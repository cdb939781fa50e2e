"""What a folder is told once: files of several pages, and 16-bit files with the numbers of 12 bits."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bingo_edge.image import decode
from helpers import CPU, Ran, flags, photos
from PIL import Image

from bingo_compress.data import pixel_store
from bingo_compress.data.listing import list_images

Save = Callable[[Path], None]
FRAMES = [Image.fromarray(np.full((9, 12), number, np.uint8)) for number in (40, 200, 90)]


def frames(**options: Any) -> Save:
    return lambda file: FRAMES[0].save(file, save_all=True, append_images=FRAMES[1:], **options)


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.png", "a.webp"])
def test_pages_beyond_the_first_are_noticed_and_the_first_is_used(name: str, tmp_path: Path) -> None:
    frames(lossless=True)(tmp_path / name)
    found = decode(tmp_path / name)
    assert found.several and (found.pixels == 40).all()
    FRAMES[0].save(tmp_path / f"one-{name}")
    assert not decode(tmp_path / f"one-{name}").several


def test_the_second_picture_of_a_phones_photo_is_no_page(tmp_path: Path) -> None:
    FRAMES[0].convert("RGB").save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[FRAMES[1].convert("RGB")])
    assert not decode(tmp_path / "a.jpg").several


@pytest.mark.parametrize("kind", [1, 4])
def test_a_smaller_copy_or_a_mask_is_no_page(kind: int, tmp_path: Path) -> None:
    frames()(tmp_path / "a.tif")
    raw = bytearray((tmp_path / "a.tif").read_bytes())
    place, seen = struct.unpack_from("<I", raw, 4)[0], 0
    while place:  # every directory but the first says that it is one
        count = struct.unpack_from("<H", raw, place)[0]
        if seen:
            tags = [struct.unpack_from("<H", raw, place + 2 + 12 * number)[0] for number in range(count)]
            entry = (
                place + 2 + 12 * min(number for number in range(count) if tags[number] > 259 and tags[number] != 262)
            )
            raw[entry : entry + 12] = struct.pack("<HHII", 254, 4, 1, kind)
        seen += 1
        place = struct.unpack_from("<I", raw, place + 2 + 12 * count)[0]
    (tmp_path / "a.tif").write_bytes(raw)
    assert seen == 3 and not decode(tmp_path / "a.tif").several


def wide(folder: Path, count: int, top: int, name: str = "png") -> Path:
    """`count` grey files of 16 bits a sample, none above `top`, one at it."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        numbers = np.random.default_rng(number).integers(0, top + 1 - number, (20, 24))
        numbers[0, 0] = top - number
        Image.fromarray(numbers.astype(np.uint16)).save(folder / f"{number}.{name}")
    return folder


def rgb16(file: Path, top: int) -> None:
    """An uncompressed TIFF of three bands of 16 bits."""
    from test_tiff import HEIGHT, WIDTH, tiff

    numbers = np.random.default_rng(0).integers(0, top, (HEIGHT, WIDTH, 3))
    numbers[0, 0] = top
    file.write_bytes(tiff(numbers.astype("<u2").tobytes(), (16,) * 3, 2))


@pytest.mark.parametrize("name", ["png", "tif"])
def test_the_largest_number_of_16_bits_is_known(name: str, tmp_path: Path) -> None:
    folder = wide(tmp_path / "w", 1, 3000, name)
    assert decode(folder / f"0.{name}").peak == 3000
    FRAMES[0].save(tmp_path / "eight.png")
    FRAMES[0].convert("RGB").save(tmp_path / "eight.bmp")
    Image.new("RGB", (5, 4), (9, 9, 9)).save(tmp_path / "narrow.bmp")  # whose rows are 16 bytes
    assert [decode(tmp_path / file).peak for file in ("eight.png", "eight.bmp", "narrow.bmp")] == [0, 0, 0]


def test_of_colour_the_high_bytes_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "edge"))
    for top, told in ((4095, 4095), (4096, 4351), (65535, 65535)):
        rgb16(tmp_path / "a.tif", top)
        assert decode(tmp_path / "a.tif").peak == told


@pytest.mark.parametrize(("top", "bits", "times"), [(4095, 12, 16), (1000, 10, 64), (4000, 12, 16), (200, 8, 256)])
def test_numbers_of_fewer_bits_are_told_once_with_what_to_do(
    top: int, bits: int, times: int, bingo: Callable[..., Ran], tmp_path: Path
) -> None:
    shown = " ".join(bingo("check", "--data", wide(tmp_path / "w", 3, top)).out.split())
    said = f"3 files have 16 bits a sample and none passes {top:,} of 65,535: numbers of {bits} bits"
    assert shown.count(said) == 1 and f"multiply them by {times} and save them again" in shown


@pytest.mark.parametrize("top", [4096, 65535])
def test_one_brighter_file_is_enough_to_say_nothing(top: int, bingo: Callable[..., Ran], tmp_path: Path) -> None:
    folder = wide(tmp_path / "w", 3, 900)
    Image.fromarray(np.full((9, 9), top, np.uint16)).save(folder / "bright.png")
    assert "16 bits a sample" not in bingo("check", "--data", folder).out


def test_check_counts_files_of_several_pages(bingo: Callable[..., Ran], tmp_path: Path) -> None:
    photos(tmp_path, 2)
    for number in range(3):
        frames()(tmp_path / f"{number}.tif")
    shown = " ".join(bingo("check", "--data", tmp_path).out.split())
    assert shown.count("3 files hold several pages or frames; the first of each is used") == 1
    assert "9 usable images" in shown and "16 bits" not in shown


@pytest.mark.parametrize("where", ["memory", "stream"])
def test_a_store_tells_it_when_it_is_made_and_when_it_is_found(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = wide(tmp_path / "w", 4, 4000)
    frames()(folder / "pages.tif")
    (tmp_path / "work").mkdir()
    for _ in range(2):
        pixel_store.build(list_images(folder), 16, tmp_path / "work", CPU, where)
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.count("4 files have 16 bits") == 1 and shown.count("1 files hold several pages") == 1
    facts = json.loads(next((tmp_path / "work").rglob("*.json")).read_text())
    assert facts["oddities"] == [[False, top] for top in (3997, 3998, 3999, 4000)] + [[True, 0]]


def test_a_store_of_an_earlier_version_is_made_again(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 2)
    (tmp_path / "work").mkdir()
    pixel_store.build(list_images(folder), 16, tmp_path / "work", CPU, "memory")
    file = next((tmp_path / "work").rglob("*.json"))
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in facts.items() if key != "oddities"}))
    pixel_store.build(list_images(folder), 16, tmp_path / "work", CPU, "memory")
    assert json.loads(file.read_text()) == facts


def test_distill_says_it(bingo: Callable[..., Ran], tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 4)
    for number in range(2):
        frames()(folder / f"{number}.tif")
    ran = bingo("distill", *flags(data=folder, epochs=1), "--out", tmp_path / "run")
    assert ran.status == 0, ran.err
    assert " ".join(ran.out.split()).count("2 files hold several pages or frames; the first of each is used") == 1
