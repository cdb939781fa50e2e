"""How large kept pictures are, and where there is room for them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bingo_compress.data import listing, pixel_store
from bingo_compress.data.pixel_store import kept_size, place, store_side
from bingo_compress.errors import BingoError
from bingo_compress.runtime import machine

CPU = torch.device("cpu")


def test_sizes_as_kept() -> None:
    assert kept_size(480, 640, 256) == (256, 341)
    assert kept_size(100, 90, 256) == (100, 90)  # never enlarged
    assert kept_size(1000, 10_000, 256) == (256, 512)  # a panorama is squeezed
    assert kept_size(5000, 1, 256) == (512, 1)


def test_auto_takes_memory_where_there_is_room_and_the_disk_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "resident", lambda: 10**9)
    monkeypatch.setattr(machine, "free_memory", lambda: 10 * 10**9)
    limit = 3 * 10**9
    room = limit - 10**9 - pixel_store.WORK
    assert place(room, CPU, "auto", limit)[0] == "memory" and place(room + 1, CPU, "auto", limit)[0] == "disk"
    assert place(5 * 10**9, CPU, "auto", 0)[0] == "memory" and place(7 * 10**9, CPU, "auto", 0)[0] == "disk"
    assert place(7 * 10**9, CPU, "memory", 0) == ("memory", "as asked for")
    with pytest.raises(BingoError, match="--pixels gpu: expected a CUDA GPU"):
        place(1, CPU, "gpu", 0)


def test_auto_keeps_to_the_store_that_has_taken_half_of_the_disk(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, work = listing.list_images(photos), tmp_path / "work"
    work.mkdir()
    pixel_store.build(folder, 40, work, CPU)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=8 * 40 * 40))
    assert pixel_store.build(folder, 40, work, CPU)[0].where != "stream"
    assert pixel_store.build(folder, 48, work, CPU)[0].where == "stream"


@pytest.mark.parametrize(
    ("text", "size"), [("", 0), ("4GB", 4 * 10**9), ("1.5g", 15 * 10**8), (" 800 MB ", 8 * 10**8), ("12", 12)]
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert machine.parse_memory(text) == size


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(BingoError, match="--memory: expected a size such as 4GB, found 'much'"):
        machine.parse_memory("much")


@pytest.mark.parametrize(
    ("image_size", "teacher_size", "side"),
    [(224, 224, 256), (96, 128, 144), (128, 96, 144), (224, 260, 296), (64, 64, 72), (32, 16, 40)],
)
def test_store_side(image_size: int, teacher_size: int, side: int) -> None:
    """The least multiple of 8 that is 9/8 of the larger size or more: 224 -> 252 -> 256, 32 -> 36 -> 40."""
    assert store_side(image_size, teacher_size) == side


def test_store_side_is_a_multiple_of_eight_above_the_crop() -> None:
    for size in range(8, 600):
        side = store_side(size, 8)
        assert side % 8 == 0 and 9 / 8 * size <= side < 9 / 8 * size + 8
