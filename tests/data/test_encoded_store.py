"""The store of pictures that are encoded again: near to the raw ones, any rows of them alone, and never mixed with raw
ones without a word.
"""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import interrupted_at, picture, recipe
from helpers import photos as photos_of
from PIL import Image
from test_cli import one_error

from bingo_compress import dry_run, pipeline
from bingo_compress.data import augment, pixel_store, shards
from bingo_compress.data.listing import list_images
from bingo_compress.data.pixel_store import build, choose, guess, kind_of
from bingo_compress.errors import BingoError
from bingo_compress.features import teacher_pass
from bingo_compress.recipe import deciding, load_recipe
from bingo_compress.runtime import checkpoint, console, distributed
from bingo_compress.runtime.run_dir import RunDir

CPU = torch.device("cpu")
SIDE = 24


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("decoder", ["torchvision", "Pillow"])
def test_rows_of_a_jpeg_are_those_of_the_whole_bit_for_bit(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    # Noise is larger as JPEG than Pillow expects; nine units of rows, so that restarts are counted past eight.
    for height, width in ((1, 1), (15, 3), (16, 40), (17, 33), (32, 341), (144, 20), (150, 57)):
        for pixels in (
            random.integers(0, 256, (height, width, 3), dtype=np.uint8),
            np.array(picture(height, width, height)),
        ):
            raw = shards.as_jpeg(pixels)
            with Image.open(io.BytesIO(raw)) as opened:
                whole = torch.from_numpy(np.array(opened.convert("RGB")))
            if decoder == "Pillow":
                monkeypatch.setattr(shards, "DECODE_JPEG", None)
            edges = sorted({0, 1, height // 3, height // 2, 15, 16, 17, 31, 32, 127, 128, 129, height - 1, height})
            for top in (edge for edge in edges if edge < height):
                for bottom in (edge for edge in edges if top < edge <= height):
                    assert torch.equal(shards.jpeg_rows(raw, height, top, bottom), whole[top:bottom]), (top, bottom)


def test_crops_are_near_those_of_the_raw_store_and_what_is_made_of_them_says_so(tmp_path: Path, work: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        picture(number, 300 - 20 * number, 200).save(folder / f"{number}.png")
    raw, _ = build(list_images(folder), 160, work, CPU, "disk")
    size = sum(file.stat().st_size for file in work.rglob("*.u8"))
    indices = torch.tensor([5, 1, 1, 3, 0])
    boxes = augment.draw(raw.aspect[indices], torch.Generator().manual_seed(0)).box
    wanted = raw.crops(indices, boxes, 48)
    encoded, _ = build(list_images(folder), 160, work, CPU, "encoded")
    assert encoded.where == "encoded" and encoded.made_of != raw.made_of and encoded.nbytes == raw.nbytes == size
    assert sum(file.stat().st_size for file in work.rglob("*.u8")) * 7 < size
    found = encoded.crops(indices, boxes, 48)
    off = (found.int() - wanted.int()).abs().float()
    assert found.shape == wanted.shape and 0 < off.mean() < 1
    assert torch.equal(found, encoded.crops(indices, boxes, 48))


def test_a_codec_of_another_quality_is_another_store(photos: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(list_images(photos), SIDE, work, CPU, "encoded")[0].made_of
    monkeypatch.setitem(shards.CODEC, "quality", 80)
    second = build(list_images(photos), SIDE, work, CPU, "encoded")[0].made_of
    assert first != second and [path.name for path in work.iterdir()] == [f"pixels-{second}"]


def test_processes_share_an_encoded_store_and_one_alone_makes_the_same(
    photos: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_store, "SHARD", 3)
    listed = list_images(photos)
    for mine in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "mine", lambda ranges, mine=mine: ranges[mine::2])
            if mine == 0:
                with pytest.raises(FileNotFoundError):  # the other's, which is not waited for here
                    build(listed, SIDE, work, CPU, "encoded")
            else:
                shared = build(listed, SIDE, work, CPU, "encoded")[0]
    (work.parent / "alone").mkdir()
    alone = build(listed, SIDE, work.parent / "alone", CPU, "encoded")[0]
    names = [{path.name: path.read_bytes() for path in place.rglob("*.*")} for place in (work, work.parent / "alone")]
    assert names[0] == names[1] and len(names[0]) == 6 and shared.made_of == alone.made_of


def test_bytes_that_are_damaged_while_they_are_read_are_one_error(photos: Path, work: Path) -> None:
    store, _ = build(list_images(photos), SIDE, work, CPU, "encoded")
    file = next(work.rglob("*.u8"))
    size = file.stat().st_size
    for content in (b"", bytes(size), b"\xff\xd8" + b"\xff\xda" * (size // 2)):
        file.write_bytes(content)
        with pytest.raises(BingoError, match="damaged while it was read; start the command again"):
            store.crops(torch.arange(8), torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(8, 4), 16)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=size))


def test_auto_takes_an_encoded_store_where_no_raw_one_fits(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, encoded = (guess(1000, 256, kind) for kind in ("raw", "encoded"))
    assert encoded / 1000 < 40_000 and raw > 7 * encoded and guess(1000, 256, "streamed") == 0
    for room, chosen, kind in (
        (round((raw + 500) * 1.02), "auto", "raw"),
        (round((raw + 500) * 1.02) - 1, "encoded", "encoded"),
        (round((encoded + 500) * 1.02) - 1, "auto", "streamed"),
    ):
        free(monkeypatch, room)
        assert choose(1000, 256, work / "not" / "there", 500) == chosen
        assert kind_of(chosen, 1000, 256, work) == kind
    free(monkeypatch, raw // 2)
    (work / "pixels-1").mkdir()
    with (work / "pixels-1" / "000000000.u8").open("wb") as file:
        file.truncate(raw)  # what stands is used again
    assert choose(1000, 256, work, 500) == "auto"
    assert kind_of("auto", 1000, 256, work) == "streamed"  # crops as of a raw store


@pytest.mark.slow
def test_a_run_keeps_to_its_kind_of_pixels(
    tmp_path: Path, bingo: Any, monkeypatch: pytest.MonkeyPatch, printed: Any
) -> None:
    """Begun by auto on a short disk, killed, and gone on with; neither it nor a raw run becomes the other."""
    data, run = photos_of(tmp_path / "photos", 4), tmp_path / "run"
    asked = recipe(data=str(data), epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(pixel_store, "guess", lambda count, side, kind="raw": {"raw": 10**18}.get(kind, 0))
        rows: dict[str, str] = {}
        patch.setattr(console, "table", lambda title, head, cells: rows.update({row[0]: row[1] for row in cells}))
        dry_run.estimate(asked, run)
        assert rows["pixel store, encoded"] == console.size(0)
        with interrupted_at(patch, teacher_pass, "_view_shard", 1), pytest.raises(KeyboardInterrupt):
            pipeline.run_distill(asked, run)
    assert "pixels: encoded: the disk has no room for about" in printed.getvalue()
    assert load_recipe(run / "recipe.yaml").pixels == load_recipe(RunDir(run).resolved).pixels == "encoded"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.u8")}
    for other in ("disk", "stream"):
        one_error(bingo("distill", "--out", run, "--resume", "--pixels", other), f"(pixels: encoded -> {other})")
    pipeline.run_distill(asked, run, resume=True)  # auto, with room for a raw store
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.u8")} == before
    pipeline.run_distill(asked.model_copy(update={"pixels": "encoded"}), tmp_path / "whole")
    one, two = (checkpoint.load(folder / "student.safetensors")[0] for folder in (run, tmp_path / "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_raw_run_does_not_go_on_with_an_encoded_store(tmp_path: Path, bingo: Any) -> None:
    data, run = photos_of(tmp_path / "photos", 4), tmp_path / "run"
    pipeline.run_distill(recipe(data=str(data), epochs=1), run)
    one_error(bingo("distill", "--out", run, "--resume", "--pixels", "encoded"), "(pixels: auto -> encoded)")


def test_only_a_setting_that_changes_crops_decides() -> None:
    assert all("pixels" not in deciding(recipe(pixels=place)) for place in ("auto", "memory", "disk", "stream"))
    assert deciding(recipe(pixels="encoded"))["pixels"] == "encoded"
