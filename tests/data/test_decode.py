"""JPEGs decoded on a GPU while streaming: which files go there, the same crops, and the spoken way back. torchvision's
CPU decoder stands in for nvJPEG.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bingo_edge.image import load_image
from helpers import picture
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from bingo_compress.data import augment, decode
from bingo_compress.data.decode import plain_jpeg
from bingo_compress.data.listing import list_images
from bingo_compress.data.pixel_store import PixelStore, build
from bingo_compress.errors import BingoError

CPU = torch.device("cpu")
SIDE = 64
TURNED, UPRIGHT = Image.Exif(), Image.Exif()
TURNED[0x0112], UPRIGHT[0x0112] = 6, 1
PLAIN = {"a_grey.jpg", "b_progressive.jpg", "c_upright.jpg", "d_422.jpg", "e_no_suffix"}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Ten files: those in PLAIN, and five that only the CPU's decoder reads as they are meant."""
    root = tmp_path / "mixed"
    root.mkdir()
    photo = picture(3, 300, 200)
    photo.convert("L").save(root / "a_grey.jpg", quality=95)
    photo.save(root / "b_progressive.jpg", quality=95, progressive=True)
    photo.save(root / "c_upright.jpg", quality=95, exif=UPRIGHT)
    photo.save(root / "d_422.jpg", quality=95, subsampling="4:2:2")
    photo.save(root / "e_no_suffix", "JPEG", quality=95)
    photo.save(root / "m_turned.jpg", quality=95, exif=TURNED)
    photo.convert("CMYK").save(root / "n_cmyk.jpg", quality=95)
    photo.save(root / "o.png")
    photo.save(root / "p_rgb.jpg", quality=95, keep_rgb=True)
    photo.save(root / "q_two.mpo", save_all=True, append_images=[photo])
    (tmp_path / "work").mkdir()
    return root


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many files each call of the device's decoder was given, from now on; `build` decodes JPEGs on the device."""
    counts: list[int] = []

    def decoded(files: list[Tensor], device: torch.device) -> list[Tensor]:
        counts.append(len(files))
        return decode_jpeg(files, ImageReadMode.RGB, device=device)

    monkeypatch.setattr(decode, "on_gpu", lambda device: True)
    monkeypatch.setattr(decode, "nvjpeg", decoded)
    return counts


def streamed(root: Path) -> PixelStore:
    return build(list_images(root), SIDE, root.parent / "work", CPU, "stream")[0]


def crops(store: PixelStore, size: int = 48, count: int = 40) -> Tensor:
    indices = torch.arange(count) % len(store)
    return store.crops(indices, augment.draw(store.aspect[indices], torch.Generator().manual_seed(0)).box, size)


def test_plain_jpegs_alone_go_to_the_gpu(mixed: Path, asked: list[int], printed: io.StringIO) -> None:
    assert {path.name for path in mixed.iterdir() if plain_jpeg(path, SIDE)} == PLAIN
    assert plain_jpeg(mixed / "a_grey.jpg", SIDE) == (mixed / "a_grey.jpg").stat().st_size
    assert plain_jpeg(mixed / "gone.jpg", SIDE) == 0
    crops(streamed(mixed))
    assert asked == [decode.AT_ONCE, 4]  # 20 of 40 crops
    assert "stream (the files are decoded again for every crop, 5 of them by nvJPEG)" in printed.getvalue()


def test_a_very_large_jpeg_stays_with_the_cpu(
    tmp_path: Path, make_photo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_photo(tmp_path / "a.jpg", 0, 640, 10)
    assert plain_jpeg(path, 10) > 0 == plain_jpeg(path, 9)  # a factor of 64, and of 71
    monkeypatch.setattr(decode, "LARGEST", 6399)
    assert plain_jpeg(path, 10) == 0


def test_crops_are_those_of_the_cpu(mixed: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = crops(streamed(mixed))
    monkeypatch.setattr(decode, "on_gpu", lambda device: False)
    asked.clear()
    wanted = crops(streamed(mixed))
    assert asked == [] and found.dtype == wanted.dtype and found.shape == wanted.shape
    for image in range(10):
        away = (found[image::10].int() - wanted[image::10].int()).abs().float()
        if image >= len(PLAIN):
            assert away.max() == 0
        assert away.mean() < 1 and away.quantile(0.99) < 4, image


@pytest.mark.parametrize("size", [(300, 200), (150, 140), (70, 66), (64, 64), (700, 90)])
def test_a_small_crop_has_the_detail_of_the_stores_and_not_the_files(
    size: tuple[int, int], tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "noise"
    root.mkdir()
    (tmp_path / "work").mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (size[1] // 2, size[0] // 2, 3), dtype=np.uint8)
    # 4:4:4: of colours at half the size libjpeg makes finer ones of a small picture than of a whole one.
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(root / "a.jpg", quality=95, subsampling=0)
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.3, 0.0, 0.9, 0.6], [0.0, 0.0, 1.0, 1.0]])
    found = streamed(root).crops(torch.zeros(3, dtype=torch.int64), boxes, 56).float()
    assert asked == [3]
    monkeypatch.setattr(decode, "on_gpu", lambda device: False)
    wanted = streamed(root).crops(torch.zeros(3, dtype=torch.int64), boxes, 56).float()

    def energy(views: Tensor) -> Tensor:
        return views.diff(dim=2).square().mean((1, 2, 3)) + views.diff(dim=3).square().mean((1, 2, 3))

    assert ((energy(found) / energy(wanted)) - 1).abs().max() < 0.02
    assert (found - wanted).abs().mean() < 1


def test_crops_of_fine_stripes_are_antialiased(tmp_path: Path, asked: list[int]) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "stripes").mkdir()
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes" / "a.jpg", quality=100)
    view = streamed(tmp_path / "stripes").crops(torch.tensor([0]), torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 32)
    assert asked == [1]
    assert (view[..., 1:-1].int() - 127).abs().max() <= 2


@pytest.mark.parametrize("error", [RuntimeError("not compiled with nvJPEG\nat line 7"), ImportError("no decode_jpeg")])
def test_a_refusal_is_said_once_and_the_cpu_goes_on(
    error: Exception, mixed: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, printed: io.StringIO
) -> None:
    store = streamed(mixed)
    calls = 0

    def refuse(files: list[Tensor], device: torch.device) -> list[Tensor]:
        nonlocal calls
        calls += 1
        raise error

    monkeypatch.setattr(decode, "nvjpeg", refuse)
    found = [crops(store), crops(store)]
    assert calls == 1
    text = printed.getvalue()
    assert text.count("warning: nvJPEG cannot be used (") == 1 and "at line 7" not in text
    assert f"({str(error).splitlines()[0]}); the CPU decodes the JPEGs from here on" in text
    monkeypatch.setattr(decode, "on_gpu", lambda device: False)
    assert all(torch.equal(one, crops(streamed(mixed))) for one in found)


def test_here_nvjpeg_itself_is_refused(mixed: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(RuntimeError):
        decode.nvjpeg(
            [torch.frombuffer(bytearray((mixed / "d_422.jpg").read_bytes()), dtype=torch.uint8)], torch.device("cuda")
        )


@pytest.mark.parametrize("nvjpeg", [True, False])
@pytest.mark.parametrize("harm", ["cut", "gone", "replaced"])
def test_a_file_that_changes_under_a_run_ends_it(
    harm: str, nvjpeg: bool, mixed: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "on_gpu", lambda device: nvjpeg)
    store = streamed(mixed)
    path = mixed / "d_422.jpg"
    raw = path.read_bytes()
    if harm == "cut":
        path.write_bytes(raw[:-100])
    elif harm == "gone":
        path.unlink()
    else:  # another picture of as many bytes, pixels and the same time of change
        other = io.BytesIO()
        picture(4, 300, 200).save(other, "JPEG", quality=60, subsampling="4:2:2")
        status = path.stat()
        path.write_bytes(other.getvalue().ljust(len(raw), b"\0"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
    with pytest.raises(BingoError, match=r"d_422\.jpg changed while the command was running; start it again"):
        crops(store)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nvJPEG needs a GPU")
def test_nvjpeg_gives_the_crops_of_the_cpu(mixed: Path, printed: io.StringIO) -> None:
    root, cuda = mixed, torch.device("cuda")
    store = build(list_images(root), SIDE, root.parent / "work", cuda, "stream")[0]
    away = (crops(store).cpu().int() - crops(streamed(root)).int()).abs().float()
    assert "warning" not in printed.getvalue()
    assert away.mean() < 2 and away.quantile(0.99) < 12


def test_a_large_jpeg_is_decoded_small_and_is_never_under_the_side_asked_for(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:900, :1300]
    picture = np.stack((rows // 4, columns // 6, (rows + columns) // 9), axis=2).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95)
    upright = load_image(tmp_path / "a.jpg")
    shapes = {at_least: load_image(tmp_path / "a.jpg", at_least).shape for at_least in (0, 100, 113, 226, 451, 900)}
    assert shapes == {
        0: (900, 1300, 3),
        100: (113, 163, 3),
        113: (225, 325, 3),
        226: (450, 650, 3),
        451: (900, 1300, 3),
        900: (900, 1300, 3),
    }
    small = load_image(tmp_path / "a.jpg", 112).astype(int)
    wanted = np.asarray(Image.fromarray(upright).resize((163, 113), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - wanted).mean() < 2
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(picture).save(tmp_path / "b.jpg", exif=exif)
    assert load_image(tmp_path / "b.jpg", 112).shape == (163, 113, 3)
    raw = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "c.jpg").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(Exception, match="truncated"):
        load_image(tmp_path / "c.jpg", 113)
