"""The pixel store: the right pixels in the right order, found again without decoding, and the same after any
interruption.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bingo_edge.image import ImageError, load_image
from bingo_edge.image import decode as decode_file
from PIL import Image
from torch import Tensor

from bingo_compress.data import augment, pixel_store
from bingo_compress.data.decode import decode_all
from bingo_compress.data.image_list import ImageList
from bingo_compress.data.listing import list_images
from bingo_compress.data.pixel_store import build, kept_size, store_of
from bingo_compress.errors import BingoError
from bingo_compress.runtime.made_of import FORMATS

CPU = torch.device("cpu")
SIDE = 24
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


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


def assert_kept(found: Tensor, path: Path) -> None:
    """That the picture is as the store is to keep it: as Pillow would shrink it, but for one level of rounding."""
    pixels_ = load_image(path, SIDE)
    small = kept_size(*pixels_.shape[:2], SIDE)
    wanted = np.asarray(Image.fromarray(pixels_).resize(small[::-1], Image.Resampling.BICUBIC))
    assert tuple(found.shape) == wanted.shape
    assert np.abs(found.numpy().astype(int) - wanted).max() <= 1


def whole(store: pixel_store.PixelStore) -> list[Tensor]:
    """Every picture as it is kept, read by the store's own crops (a crop of everything at its own size changes nothing;
    squares only).
    """
    return [store.pictures.read(image, 0, int(store.height[image])) for image in range(len(store))]


def contents(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(work.rglob("*")) if path.is_file()}


def count_decoding(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """The indices decoded from now on; KeyboardInterrupt instead of number `stop_after`."""
    seen: list[int] = []

    def decode(
        folder: ImageList, indices: Iterable[int], use: Callable[..., Any], at_least: int = 0, *rest: Any
    ) -> Iterator[tuple[int, Any]]:
        for index, result in decode_all(folder, indices, use, at_least, *rest):
            if len(seen) == stop_after:
                raise KeyboardInterrupt
            seen.append(index)
            yield index, result

    monkeypatch.setattr(pixel_store, "decode_all", decode)
    return seen


# ---------------------------------------------------------------- contents


@pytest.mark.parametrize("where", ["memory", "disk", "stream"])
def test_the_store_is_each_photo_shrunk_in_its_proportions_wherever_it_is_kept(
    where: str, photos: Path, work: Path
) -> None:
    store, folder = build(list_images(photos), SIDE, work, CPU, where)
    assert (len(store), store.where) == (len(folder.files), where) == (8, where)
    for index, found in enumerate(whole(store)):
        assert tuple(found.shape[:2]) == (int(store.height[index]), int(store.width[index]))
        assert_kept(found, folder.read_raw(index))
    assert store.nbytes == sum(found.numel() for found in whole(store))
    assert len({found.numpy().tobytes() for found in whole(store)}) == 8
    assert any(work.rglob("*.u8")) and (
        where == "stream" or sum(path.stat().st_size for path in work.rglob("*.u8")) == store.nbytes
    )


def test_crops_are_the_same_wherever_the_pixels_are(photos: Path, work: Path) -> None:
    indices = torch.tensor([6, 1, 1, 3, 0])
    drawn = augment.draw(torch.ones(5), torch.Generator().manual_seed(0))
    found = [
        build(list_images(photos), SIDE, work, CPU, where)[0].crops(indices, drawn.box, 16)
        for where in ("memory", "disk", "stream")
    ]
    assert (found[0].shape, found[0].dtype) == ((5, 3, 16, 16), torch.uint8)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_crops_of_ragged_pictures_are_the_crops_a_gpu_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    pictures = [
        random.integers(0, 256, (high, wide, 3), dtype=np.uint8)
        for high, wide in ((30, 40), (41, 25), (25, 50), (9, 7))
    ]
    store = store_of(pictures, torch.tensor([picture.shape[1] / picture.shape[0] for picture in pictures]), CPU)
    # Its arithmetic, on the CPU.
    flat = pixel_store.PixelStore(store.pictures, CPU, "gpu")
    indices = torch.randint(4, (90,), generator=torch.Generator().manual_seed(1))
    boxes = augment.draw(store.aspect[indices], torch.Generator().manual_seed(2)).box
    for size in (8, 24, 60):
        one, two = store.crops(indices, boxes, size), flat.crops(indices, boxes, size)
        assert (one.int() - two.int()).abs().max() <= 1


def test_a_crop_is_the_crop_of_the_original_and_every_corner_can_be_reached(tmp_path: Path, work: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    rows, columns = np.mgrid[:120, :200]
    original = np.stack((rows * 2, columns, (rows + columns) // 2), axis=2).astype(np.uint8)
    Image.fromarray(original).save(folder / "a.png")
    store, _ = build(list_images(folder), 48, work, CPU)
    assert (int(store.height[0]), int(store.width[0])) == (48, 80)
    for box in ([0.0, 0.0, 0.25, 0.5], [0.75, 0.5, 1.0, 1.0], [0.5, 0.0, 1.0, 1.0]):
        found = store.crops(torch.tensor([0]), torch.tensor([box]), 20)[0].permute(1, 2, 0).numpy()
        left, top, right, bottom = (round(share * side) for share, side in zip(box, (200, 120, 200, 120), strict=True))
        wanted = np.asarray(
            Image.fromarray(original[top:bottom, left:right]).resize((20, 20), Image.Resampling.BILINEAR)
        )
        assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 5


@pytest.mark.parametrize("vectors", [True, False])
def test_a_picture_is_shrunk_alike_with_and_without_vector_code(vectors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_store, "VECTORS", vectors)
    random = np.random.default_rng(0)
    for shape in ((120, 150), (61, 500), (70, 1), (1, 900), (40, 40)):
        noise = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        small, aspect = pixel_store._shrink(noise, 40)
        wanted = np.asarray(Image.fromarray(noise).resize(kept_size(*shape, 40)[::-1], Image.Resampling.BICUBIC))
        assert small.shape == wanted.shape and small.flags.c_contiguous and aspect == shape[1] / shape[0]
        # Pillow's quick way (reducing_gap) is a little off on noise.
        assert np.abs(small.astype(int) - wanted).max() <= (1 if vectors else 30)


def test_aspect_is_the_originals_width_over_height(photos: Path, work: Path) -> None:
    store, folder = build(list_images(photos), SIDE, work, CPU)
    sizes = [Image.open(folder.read_raw(index)).size for index in range(8)]
    # Of a JPEG that was decoded small.
    torch.testing.assert_close(
        store.aspect, torch.tensor([width / height for width, height in sizes]), rtol=0.03, atol=0
    )
    assert store.aspect.min() == pytest.approx(1 / 40)


def test_bad_files_leave_no_hole(mixed: Path, work: Path) -> None:
    (mixed / "notes.txt").write_text("x")
    found = list_images(mixed)
    store, folder = build(found, SIDE, work, CPU)
    assert len(found.files) == 11
    assert folder.files == tuple(name for name in found.files if name not in ("cats/2.jpg", "cats/8.jpg", "dogs/9.jpg"))
    assert folder.bad[0] == ("notes.txt", "not an image (its name ends in .txt)")
    reasons = dict(folder.bad[1:])
    assert list(reasons) == ["cats/2.jpg", "cats/8.jpg", "dogs/9.jpg"]
    assert reasons["cats/2.jpg"] == "not an image that Pillow can read"
    assert "truncated" in reasons["cats/8.jpg"].lower()
    for index, kept in enumerate(whole(store)):
        assert_kept(kept, folder.read_raw(index))


def test_no_image_at_all_is_an_error(tmp_path: Path, work: Path) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    for name in ("a.jpg", "b.jpg", "c.txt"):
        (root / name).write_text("x")
    for _ in range(2):  # the second time the store is found
        with pytest.raises(BingoError, match="none that can be decoded among 3 files"):
            build(list_images(root), SIDE, work, CPU)


# ---------------------------------------------------------------- interruption and reuse


@pytest.mark.parametrize("where", ["auto", "encoded"])
@pytest.mark.parametrize("stop_after", [0, 3, 4, 5, 7, 9, 10])
def test_an_interrupted_build_goes_on_and_ends_the_same(
    mixed: Path, work: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, where: str
) -> None:
    monkeypatch.setattr(pixel_store, "SHARD", 4)
    other = work.with_name("whole")
    other.mkdir()
    build(list_images(mixed), SIDE, other, CPU, where)
    with monkeypatch.context() as patch:
        count_decoding(patch, stop_after)
        with pytest.raises(KeyboardInterrupt):
            build(list_images(mixed), SIDE, work, CPU, where)
    seen = count_decoding(monkeypatch)
    store, folder = build(list_images(mixed), SIDE, work, CPU, where)
    finished = stop_after // 4 * 4
    # Bad ones are tried again.
    assert seen == [index for index in (2, 5, 10) if index < finished] + list(range(finished, 11))
    assert contents(work) == contents(other)
    assert len(store) == len(folder.files) == 8 and len(folder.bad) == 3
    for index, kept in enumerate(whole(store)):
        if where == "auto":
            assert_kept(kept, folder.read_raw(index))


@pytest.mark.parametrize("where", ["auto", "encoded"])
@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "facts"])
def test_a_damaged_shard_is_decoded_again(
    harm: str, where: str, photos: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pixel_store, "SHARD", 3)
    build(list_images(photos), SIDE, work, CPU, where)
    before = contents(work)
    data, facts = sorted(work.rglob("*.u8"))[1], sorted(work.rglob("*.json"))[1]
    raw = bytearray(data.read_bytes())
    raw[100] ^= 1
    {
        "flip": lambda: data.write_bytes(raw),
        "cut": lambda: data.write_bytes(raw[:-1]),
        "gone": data.unlink,
        "facts": lambda: facts.write_text('{"tried": 3'),
    }[harm]()
    seen = count_decoding(monkeypatch)
    capsys.readouterr()
    build(list_images(photos), SIDE, work, CPU, where)
    assert seen == [3, 4, 5]
    assert contents(work) == before
    assert ("is damaged; its 3 images are decoded again" in capsys.readouterr().out) == (harm in ("flip", "cut"))


def test_the_store_is_found_again_without_decoding(mixed: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, folder = build(list_images(mixed), SIDE, work, CPU)
    files = {path: path.stat().st_mtime_ns for path in work.rglob("*.*")}
    seen = count_decoding(monkeypatch)
    again, folder_again = build(list_images(mixed), SIDE, work, CPU)
    assert folder_again == folder and seen == [2, 5, 10]  # the bad ones are tried, and are bad
    assert all(torch.equal(one, two) for one, two in zip(whole(again), whole(first), strict=True))
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.*")} == files


@pytest.mark.parametrize("where", ["memory", "stream"])
def test_what_could_not_be_used_is_tried_again_at_each_start(
    where: str, photos: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pixel_store, "SHARD", 3)
    # In the first two of three shards.
    fails: dict[str, str] = {
        "2.jpg": "Permission denied",
        "6.jpg": "no decoder is installed",
    }

    def load(path: Path, at_least: int = 0, bands: Any = ()) -> Any:
        if path.name in fails:
            raise ImageError(fails[path.name])
        return decode_file(path, at_least)

    monkeypatch.setattr("bingo_compress.data.decode.decode_file", load)
    listed = list_images(photos)
    assert [reason for _, reason in build(listed, SIDE, work, CPU, where)[1].bad] == [
        "Permission denied",
        "no decoder is installed",
    ]
    fails["2.jpg"] = "another reason"
    for _ in range(2):  # found as it is, today's reason told
        assert dict(build(listed, SIDE, work, CPU, where)[1].bad)["cats/2.jpg"] == "another reason"
    fails.clear()
    seen = count_decoding(monkeypatch)
    capsys.readouterr()
    store, folder = build(listed, SIDE, work, CPU, where)
    assert folder.files == listed.files and folder.bad == () and len(store) == 8
    assert seen == [1, 3, 0, 1, 2, 3, 4, 5]  # the shards of the two, and no other
    assert (
        "1 files that could not be used can be now, for example cats/2.jpg: 3 images are decoded again"
        in capsys.readouterr().out
    )
    for index, kept in enumerate(whole(store)):
        assert_kept(kept, folder.read_raw(index))


def test_a_stricter_rule_drops_what_was_good(photos: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a later version of the program, whose number for the store is another one."""
    listed = list_images(photos)
    assert len(build(listed, SIDE, work, CPU)[0]) == 8

    def strict(path: Path, at_least: int = 0, bands: Any = ()) -> Any:
        if path.name == "4.jpg":
            raise ImageError("one pixel thin")
        return decode_file(path, at_least)

    monkeypatch.setattr("bingo_compress.data.decode.decode_file", strict)
    monkeypatch.setitem(FORMATS, "pixels", FORMATS["pixels"] + 1)
    store, folder = build(listed, SIDE, work, CPU)
    assert len(store) == 7 and folder.bad == (("cats/4.jpg", "one pixel thin"),)
    assert [path.name for path in work.iterdir()] == [f"pixels-{store.made_of}"]


def test_another_side_or_another_folder_is_another_store(
    photos: Path, work: Path, make_photo: Callable[..., Path]
) -> None:
    build(list_images(photos), SIDE, work, CPU)
    store, _ = build(list_images(photos), 16, work, CPU)
    assert int(torch.minimum(store.height, store.width).max()) == 16
    make_photo(photos / "new.jpg", 3)
    assert len(build(list_images(photos), 16, work, CPU)[0]) == 9
    assert len(list(work.iterdir())) == 1  # the stale ones are deleted


# ---------------------------------------------------------------- where


def test_a_disk_too_small_means_streaming_and_is_refused_where_a_store_was_asked_for(
    photos: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=8 * SIDE * SIDE * 3))
    with pytest.raises(BingoError, match=r"no space: the pixel store needs .* bytes"):
        build(list_images(photos), SIDE, work, CPU, "memory")
    store, _ = build(list_images(photos), SIDE, work, CPU)
    assert store.where == "stream"
    assert "8 images, stream (the files are decoded again for every crop)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak can be reset on Linux only")
def test_a_store_on_disk_never_counts_as_this_process_memory(tmp_path: Path) -> None:
    """200 MB read in random order through 150 images' crops: on disk the peak hardly moves, mapped it grows by the
    store.
    """
    (tmp_path / "work").mkdir()
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (700, 640, 3), dtype=np.uint8)
    for number in range(150):
        Image.fromarray(np.roll(picture, number, axis=0)).save(tmp_path / "photos" / f"{number}.bmp")
    # Decoded here: what that takes would count as the peak of the process that is measured.
    build(list_images(tmp_path / "photos"), 640, tmp_path / "work", CPU, "disk")
    code = """if True:
        import sys, torch
        from pathlib import Path
        from bingo_compress.data import listing, pixel_store
        work, photos = Path(sys.argv[1]), Path(sys.argv[2])
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        def crops(rows): store.crops(rows, whole.expand(len(rows), 4), 32)
        def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        for where in ("disk", "memory"):
            store, _ = pixel_store.build(listing.list_images(photos), 640, work, torch.device("cpu"), where)
            crops(torch.arange(10))
            open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
            before = peak()
            for rows in torch.randperm(150).split(10): crops(rows)
            print("GREW", where, peak() - before, store.nbytes)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "work"), str(tmp_path / "photos")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    told = [line.split()[1:] for line in shown.splitlines() if line.startswith("GREW")]
    grew, size = {where: int(kib) * 1024 for where, kib, _ in told}, int(told[0][2])
    assert size > 150e6
    assert grew["disk"] < 0.1 * size < 0.7 * size < grew["memory"]


def test_the_facts_of_a_shard_are_plain_json(photos: Path, work: Path) -> None:
    build(list_images(photos), SIDE, work, CPU)
    facts = json.loads(next(work.rglob("*.json")).read_text())
    assert (
        set(facts) == {"tried", "good", "height", "width", "aspect", "jpeg", "bad", "oddities", "crc32"}
        and facts["tried"] == 8
    )


def test_sizes_in_arrays_are_those_that_the_facts_name(
    mixed: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_store, "SHARD", 4)
    store, kept = build(list_images(mixed), SIDE, work, CPU, "disk")
    facts = [json.loads(file.read_text()) for file in sorted(work.glob("pixels-*/*.json"))]
    for name in ("height", "width", "aspect"):
        told = torch.tensor([value for part in facts for value in part[name]])
        assert torch.equal(getattr(store, name).to(told.dtype), told), name
    assert kept.files == tuple(list_images(mixed).files[index] for part in facts for index in part["good"])
