"""The pixel store: the right pixels in the right order, found again without decoding, and the same after any interruption."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bingo_compress import images, pixels
from bingo_compress.errors import BingoError
from bingo_compress.images import Folder, list_folder
from bingo_compress.pixels import PixelStore, build, store_side

CPU = torch.device("cpu")
SIDE = 24


@pytest.fixture
def mixed(photos: Path) -> Path:
    """Eight good photos with three bad files among them: at 2, 5 and 10 of 0..10."""
    (photos / "cats" / "2.jpg").rename(photos / "cats" / "1b.jpg")
    (photos / "cats" / "2.jpg").write_text("text")
    half = (photos / "cats" / "6.jpg").read_bytes()
    (photos / "cats" / "8.jpg").write_bytes(half[: len(half) // 2])
    (photos / "dogs" / "9.jpg").write_bytes(b"\xff\xd8\xff")
    return photos


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def expected(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def contents(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(work.iterdir())}


def count_decoding(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """The indices decoded from now on; KeyboardInterrupt instead of number `stop_after`."""
    seen: list[int] = []

    def decode(folder: Folder, indices: Iterable[int], use: Callable[..., Any]) -> Iterator[tuple[int, Any]]:
        for index, result in images.decode_all(folder, indices, use):
            if len(seen) == stop_after:
                raise KeyboardInterrupt
            seen.append(index)
            yield index, result

    monkeypatch.setattr(pixels, "decode_all", decode)
    return seen


# ---------------------------------------------------------------- contents


def test_the_store_is_each_photo_squeezed_by_pillow(photos: Path, work: Path) -> None:
    store, folder = build(list_folder(photos), SIDE, work, CPU)
    assert len(store) == len(folder.files) == 8
    assert store.nbytes == 8 * SIDE * SIDE * 3
    batch = store.batch(torch.arange(8))
    assert (batch.shape, batch.dtype) == ((8, SIDE, SIDE, 3), torch.uint8)
    for index in range(8):
        np.testing.assert_array_equal(batch[index].numpy(), expected(folder.path(index)))
    assert len({row.numpy().tobytes() for row in batch}) == 8


def test_a_batch_has_the_rows_asked_for(photos: Path, work: Path) -> None:
    store, folder = build(list_folder(photos), SIDE, work, CPU)
    order = torch.tensor([6, 1, 1, 3])
    for row, index in zip(store.batch(order), order.tolist(), strict=True):
        np.testing.assert_array_equal(row.numpy(), expected(folder.path(index)))


def test_a_batch_is_a_copy(photos: Path, work: Path) -> None:
    store, _ = build(list_folder(photos), SIDE, work, CPU)
    before = store.batch(torch.tensor([0])).clone()
    store.batch(torch.tensor([0])).zero_()
    assert torch.equal(store.batch(torch.tensor([0])), before)


def test_aspect_is_width_over_height(photos: Path, work: Path) -> None:
    store, folder = build(list_folder(photos), SIDE, work, CPU)
    sizes = [Image.open(folder.path(index)).size for index in range(8)]
    assert store.aspect.dtype == torch.float32
    torch.testing.assert_close(store.aspect, torch.tensor([width / height for width, height in sizes]))
    assert store.aspect.min() == pytest.approx(1 / 40)


def test_bad_files_leave_no_hole(mixed: Path, work: Path) -> None:
    found = list_folder(mixed)
    store, folder = build(found, SIDE, work, CPU)
    assert len(found.files) == 11
    assert folder.files == tuple(name for name in found.files if name not in ("cats/2.jpg", "cats/8.jpg", "dogs/9.jpg"))
    reasons = dict(folder.bad)
    assert list(reasons) == ["cats/2.jpg", "cats/8.jpg", "dogs/9.jpg"]
    assert reasons["cats/2.jpg"] == "not an image that Pillow can read"
    assert "truncated" in reasons["cats/8.jpg"].lower()
    for index in range(8):
        np.testing.assert_array_equal(store.batch(torch.tensor([index]))[0].numpy(), expected(folder.path(index)))


def test_what_the_scan_refused_stays_named(mixed: Path, work: Path) -> None:
    (mixed / "notes.txt").write_text("x")
    _, folder = build(list_folder(mixed), SIDE, work, CPU)
    assert folder.bad[0] == ("notes.txt", "not an image (its name ends in .txt)")
    assert len(folder.bad) == 4


def test_no_image_at_all_is_an_error(tmp_path: Path, work: Path) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    for name in ("a.jpg", "b.jpg", "c.txt"):
        (root / name).write_text("x")
    for _ in range(2):  # the second time the store is found
        with pytest.raises(BingoError, match="none that can be decoded among 3 files"):
            build(list_folder(root), SIDE, work, CPU)


# ---------------------------------------------------------------- interruption and reuse


@pytest.mark.parametrize("stop_after", [0, 3, 4, 5, 7, 9, 10])
def test_an_interrupted_build_goes_on_and_ends_the_same(mixed: Path, work: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    whole = work.with_name("whole")
    whole.mkdir()
    build(list_folder(mixed), SIDE, whole, CPU)

    monkeypatch.setattr(pixels, "CHUNK", 4)
    with monkeypatch.context() as patch:
        count_decoding(patch, stop_after)
        with pytest.raises(KeyboardInterrupt):
            build(list_folder(mixed), SIDE, work, CPU)
    seen = count_decoding(monkeypatch)
    store, folder = build(list_folder(mixed), SIDE, work, CPU)
    assert seen == list(range(stop_after // 4 * 4, 11))
    assert contents(work) == contents(whole)
    assert len(store) == len(folder.files) == 8 and len(folder.bad) == 3


def test_a_build_interrupted_twice_ends_the_same(mixed: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = work.with_name("whole")
    whole.mkdir()
    build(list_folder(mixed), SIDE, whole, CPU)
    monkeypatch.setattr(pixels, "CHUNK", 2)
    for stop_after in (3, 5):
        with monkeypatch.context() as patch:
            count_decoding(patch, stop_after)
            with pytest.raises(KeyboardInterrupt):
                build(list_folder(mixed), SIDE, work, CPU)
    seen = count_decoding(monkeypatch)
    build(list_folder(mixed), SIDE, work, CPU)
    assert seen == list(range(6, 11))
    assert contents(work) == contents(whole)


def test_pixels_written_after_the_last_save_are_dropped(mixed: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(list_folder(mixed), SIDE, work, CPU)
    whole = contents(work)
    data, state = next(work.glob("*.u8")), next(work.glob("*.json"))
    saved = json.loads(state.read_text())
    # As a kill between two saves leaves it: the state of 4 tries (3 good), and rubbish behind their pixels.
    state.write_text(json.dumps({"tried": 4, "good": saved["good"][:3], "aspect": saved["aspect"][:3], "bad": saved["bad"][:1]}))
    data.write_bytes(data.read_bytes()[: 3 * SIDE * SIDE * 3] + b"\x07" * 1000)
    seen = count_decoding(monkeypatch)
    build(list_folder(mixed), SIDE, work, CPU)
    assert seen == list(range(4, 11))
    assert contents(work) == whole


def test_the_store_is_found_again_without_decoding(mixed: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, folder = build(list_folder(mixed), SIDE, work, CPU)
    files = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}

    def decode(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(pixels, "decode_all", decode)
    again, folder_again = build(list_folder(mixed), SIDE, work, CPU)
    assert folder_again == folder
    assert torch.equal(again.batch(torch.arange(8)), first.batch(torch.arange(8)))
    assert torch.equal(again.aspect, first.aspect)
    assert {path.name: path.stat().st_mtime_ns for path in work.iterdir()} == files


def test_another_side_or_another_folder_is_another_store(photos: Path, work: Path, make_photo: Callable[..., Path]) -> None:
    build(list_folder(photos), SIDE, work, CPU)
    first = contents(work)
    store, _ = build(list_folder(photos), 16, work, CPU)
    second = contents(work)
    assert store.batch(torch.tensor([0])).shape == (1, 16, 16, 3)
    make_photo(photos / "new.jpg", 3)
    assert len(build(list_folder(photos), 16, work, CPU)[0]) == 9
    third = contents(work)
    assert len(first) == len(second) == len(third) == 2  # the stale ones are deleted
    assert not first.keys() & second.keys() and not second.keys() & third.keys()


def test_a_store_whose_pixels_are_gone_is_made_anew(photos: Path, work: Path) -> None:
    build(list_folder(photos), SIDE, work, CPU)
    whole = contents(work)
    next(work.glob("*.u8")).unlink()
    build(list_folder(photos), SIDE, work, CPU)
    assert contents(work) == whole


def test_a_disk_too_small_is_said_before_anything_is_decoded(photos: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=8 * SIDE * SIDE * 3))
    seen = count_decoding(monkeypatch)
    with pytest.raises(BingoError, match=r"no space: the pixel store needs .* GB"):
        build(list_folder(photos), SIDE, work, CPU)
    assert seen == [] and contents(work) == {}


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("image_size", "teacher_size", "side"), [(224, 224, 256), (96, 128, 144), (128, 96, 144), (224, 260, 296), (64, 64, 72), (32, 16, 40)]
)
def test_store_side(image_size: int, teacher_size: int, side: int) -> None:
    """The least multiple of 8 that is 9/8 of the larger size or more: 224 -> 252 -> 256, 32 -> 36 -> 40."""
    assert store_side(image_size, teacher_size) == side


def test_store_side_is_a_multiple_of_eight_above_the_crop() -> None:
    for size in range(8, 600):
        side = store_side(size, 8)
        assert side % 8 == 0 and 9 / 8 * size <= side < 9 / 8 * size + 8


def test_a_store_in_memory_reads_like_one_on_disk() -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    store = PixelStore(array, torch.ones(5), CPU)
    np.testing.assert_array_equal(store.batch(torch.tensor([4, 0])).numpy(), array[[4, 0]])
