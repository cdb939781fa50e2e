"""Every kind of file that a folder may hold, through every reader: used as it should be seen, or named with its reason;
nothing crashes, nothing hangs.
"""

import os
import re
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import corpus
import corpus_bytes
import numpy as np
import pytest
import torch
from bingo_edge.image import ImageError, load_image
from corpus import KINDS, Kind
from helpers import Ran
from PIL import AvifImagePlugin

from bingo_compress.data import decode, image_list, listing, pixel_store
from bingo_compress.errors import BingoError

CPU = torch.device("cpu")
SIDE = 32
MORE = ("folder.jpg/inside.png", "folder.jpg/round", "near the limit")
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(name in corpus.NO_PERMISSION and not os.geteuid(), reason="root"))
    for name in KINDS
]
NAMES += list(MORE)


class World(NamedTuple):
    """The corpus on disk: kinds by relative path, its listing, and what decoding it gave, both by relative path."""

    root: Path
    kinds: dict[str, Kind]
    folder: image_list.ImageList
    decoded: dict[str, np.ndarray | ImageError]

    def path(self, name: str) -> str:
        return corpus.near_limit(self.root) if name == "near the limit" else name


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A reader that waits for ever is stopped, and is then a failure."""

    def stop(*_: object) -> None:
        raise TimeoutError("still reading")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world") / "photos"
    kinds = corpus.make(root)
    folder = listing.list_images(root)
    decoded = {
        folder.files[index]: result
        for index, result in decode.decode_all(folder, range(len(folder.files)), lambda seen: seen)
    }
    return World(root, kinds, folder, decoded)


@pytest.fixture(scope="module", params=["memory", "stream"])
def stored(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pixel_store.PixelStore, image_list.ImageList]:
    work = tmp_path_factory.mktemp("run") / "work"
    work.mkdir()
    return pixel_store.build(world.folder, SIDE, work, CPU, request.param)


def as_expected(kind: Kind, found: np.ndarray) -> None:
    assert found.dtype == np.uint8 and found.ndim == 3
    if kind.pixels is not None:
        assert found.shape == kind.pixels.shape
        assert np.abs(found.astype(int) - kind.pixels).max() <= kind.within
    else:
        assert found.shape == (kind.size[1], kind.size[0], 3)
        assert np.abs(found.reshape(-1, 3).mean(0) - kind.colour).max() <= kind.within


def test_the_corpus_is_large_enough_and_tells_pictures_apart() -> None:
    assert len(KINDS) >= 40
    upright = [kind.pixels for name, kind in KINDS.items() if name.startswith("exif") and kind.pixels is not None]
    assert len({picture.tobytes() + bytes(picture.shape[:1]) for picture in upright}) == 8
    assert len(os.fsencode(Path("/x") / corpus.near_limit(Path("/x")))) == corpus.NEAR_LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_one_file_by_load_image(world: World, name: str) -> None:
    kind = world.kinds[world.path(name)]
    if kind.reason:
        with pytest.raises(ImageError, match=kind.reason):
            load_image(world.root / world.path(name))
    elif not kind.listed:
        as_expected(kind, load_image(world.root / world.path(name)))


@pytest.mark.parametrize("name", NAMES)
def test_in_a_listed_and_decoded_folder(world: World, name: str) -> None:
    name = world.path(name)
    kind, found = world.kinds[name], world.decoded.get(name)
    if kind.listed:
        assert found is None
        assert re.search(kind.listed, dict(world.folder.bad)[name])
    elif kind.used:
        assert isinstance(found, np.ndarray)
        as_expected(kind, found)
    else:
        assert re.search(kind.reason, str(found)) and isinstance(found, ImageError)


@pytest.mark.parametrize("name", NAMES)
def test_in_the_pixel_store(
    world: World, stored: tuple[pixel_store.PixelStore, image_list.ImageList], name: str
) -> None:
    store, kept = stored
    name = world.path(name)
    kind = world.kinds[name]
    if not kind.used:
        assert name not in kept.files
        assert re.search(kind.listed or kind.reason, dict(kept.bad)[name])
        return
    place = kept.files.index(name)
    size = int(store.height[place]), int(store.width[place])
    whole = kind.size[::-1] if kind.pixels is None else kind.pixels.shape[:2]
    mean = np.array(kind.colour) if kind.pixels is None else kind.pixels.reshape(-1, 3).mean(0)
    assert float(store.aspect[place]) == pytest.approx(whole[1] / whole[0])
    assert size == pixel_store.kept_size(*whole, SIDE)
    assert np.abs(store.pictures.read(place, 0, size[0]).numpy().reshape(-1, 3).mean(0) - mean).max() <= kind.within + 3


def test_every_file_is_met_once(world: World) -> None:
    both = [*world.folder.files, *(name for name, _ in world.folder.bad)]
    assert len(set(both)) == len(both)
    assert set(both) == set(world.kinds) - {"folder.jpg/up"}


def test_check_names_all_that_cannot_be_used(world: World, bingo: Callable[..., Ran]) -> None:
    ran = bingo("check", "--data", world.root)
    assert ran.status == 0
    good = sum(kind.used for kind in world.kinds.values())
    assert f"{len(world.kinds) - good} files cannot be used" in ran.out
    assert f"{good} usable images in" in ran.out
    copies = sum(kind.make == corpus_bytes.encoded(corpus.PICTURE, "PNG") for kind in world.kinds.values()) - 1
    assert f"{copies} files are exact copies of another" in ran.out
    assert "\x1b" not in ran.out


# ---------------------------------------------------------------- decoders, memory, and files that change


def test_avif_without_a_decoder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "good.avif" not in KINDS:
        pytest.skip("no AVIF decoder to take away")
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    (tmp_path / "a.avif").write_bytes(KINDS["good.avif"].make)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"HEIC or AVIF: .*no decoder"):
        load_image(tmp_path / "a.avif")


def test_heic_with_a_decoder(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    kind = Kind(
        corpus_bytes.encoded(corpus_bytes.plain(corpus_bytes.RED), "HEIF", quality=95), (32, 24), corpus_bytes.RED, 8
    )
    (tmp_path / "a.jpg").write_bytes(kind.make)  # type: ignore[arg-type]
    as_expected(kind, load_image(tmp_path / "a.jpg"))


@pytest.mark.parametrize(
    "name", ["bomb.png", "declared_20000x20000.png", "declared_65500x65500.jpg", "zipped_text.png"]
)
def test_a_bomb_is_refused_before_memory_is_taken_for_it(world: World, name: str) -> None:
    tracemalloc.start()
    with pytest.raises(ImageError):
        load_image(world.root / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_sixteen_bits_take_few_bytes_a_pixel(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(corpus_bytes.wide_png(np.zeros((500, 800), np.uint16)))
    tracemalloc.start()
    load_image(tmp_path / "a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 500 * 800


def test_a_file_larger_than_any_picture_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.webp").open("wb") as handle:
        handle.write(corpus.TRUNCATED["webp"])
        handle.truncate(1 << 40)  # sparse
    with pytest.raises(ImageError, match="larger than any picture"):
        load_image(tmp_path / "a.webp")


def test_a_path_that_is_too_long_says_so(tmp_path: Path) -> None:
    parent = (tmp_path / corpus.near_limit(tmp_path)).parent
    parent.mkdir(parents=True)
    handle = os.open(parent, os.O_RDONLY)
    for name in ("g" * 200, "g" * 200 + ".tar"):
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=handle))
    os.close(handle)
    assert [reason for _, reason in listing.list_images(tmp_path).bad] == ["File name too long"] * 2


def test_files_deleted_or_broken_after_the_listing_are_bad_files(tmp_path: Path, photos: Path) -> None:
    folder = listing.list_images(photos)
    gone, broken = folder.files[1], folder.files[4]
    (photos / gone).unlink()
    (photos / broken).write_text("words")
    (tmp_path / "work").mkdir()
    store, kept = pixel_store.build(folder, SIDE, tmp_path / "work", CPU)
    assert len(store) == len(folder.files) - 2
    assert dict(kept.bad) == {gone: "No such file or directory", broken: "not an image that Pillow can read"}


@pytest.mark.parametrize("change", ["deleted", "cut", "another picture", "a pipe"])
def test_a_file_that_changes_while_it_is_streamed_ends_the_run_by_name(
    tmp_path: Path, photos: Path, change: str
) -> None:
    (tmp_path / "work").mkdir()
    store, kept = pixel_store.build(listing.list_images(photos), SIDE, tmp_path / "work", CPU, "stream")
    path = kept.read_raw(1)
    raw = path.read_bytes()
    path.unlink()
    if change == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif change == "another picture":
        path.write_bytes(corpus_bytes.encoded(corpus_bytes.plain(corpus_bytes.RED, size=(10, 10)), "PNG"))
    elif change == "a pipe":
        os.mkfifo(path)
    with pytest.raises(BingoError, match=rf"{path.name} changed while the command was running"):
        store.crops(torch.tensor([0, 1]), torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), 16)
