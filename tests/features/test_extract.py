"""Embeddings: the plain features of each image."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bingo_edge.image import ImageError, load_image, preprocess
from helpers import CPU, bad_files, encoder, photos
from PIL import Image

from bingo_compress.data import decode, image_list, listing, pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.features import extract
from bingo_compress.models.encoder import Encoder, weights_digest

COUNT = 18


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "BATCH", 4)


def one_by_one(model: Encoder, folder: image_list.ImageList, index: int) -> torch.Tensor:
    """Features of one image, without the code under test: decode, crop, normalise, backbone."""
    settings = model.preprocessing
    seen = preprocess(load_image(folder.read_raw(index)), **settings.geometry())
    scaled = (seen.astype(np.float64) / 255 - np.array(settings.mean)) / np.array(settings.std)
    with torch.inference_mode():
        features: torch.Tensor = model.backbone(torch.from_numpy(scaled.transpose(2, 0, 1)[None]).float())[0]
    return features


def test_plain_features_are_those_of_each_image_alone(folder: image_list.ImageList, teacher: Encoder) -> None:
    found, good = extract.plain({"a": extract.as_embed(teacher, CPU)}, folder, [4, 0, 17, 9, 3, 11], "test")
    assert good == [4, 0, 17, 9, 3, 11]
    expected = torch.stack([one_by_one(teacher, folder, index) for index in good])
    assert torch.allclose(found["a"], expected, atol=1e-5 * float(expected.abs().max()))
    assert float((expected[0] - expected[1]).abs().max()) > 1e-2 * float(expected.abs().max())  # images do differ


def test_several_models_share_one_decoding(
    folder: image_list.ImageList, teacher: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    real = decode.decode_file

    def counted(path: Any, at_least: int = 0, bands: Any = ()) -> Any:
        decoded.append(Path(path).name)
        return real(path, at_least)

    monkeypatch.setattr("bingo_compress.data.decode.decode_file", counted)
    models = {"a": teacher, "b": encoder("test_efficientnet", 48, seed=1), "c": encoder("test_resnet", 32, seed=2)}
    found, good = extract.plain(
        {name: extract.as_embed(model, CPU) for name, model in models.items()}, folder, range(COUNT), "test"
    )
    assert len(decoded) == COUNT
    assert good == list(range(COUNT))
    for name, model in models.items():
        assert found[name].shape == (COUNT, model.width)
        alone = one_by_one(model, folder, 7)
        assert torch.allclose(found[name][7], alone, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("stop", [1, 4, 7, 9])
def test_plain_goes_on_after_the_last_finished_part(
    stop: int, folder: image_list.ImageList, teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "BATCH", 2)
    monkeypatch.setattr(extract, "PART", 2)
    preprocessing, run = extract.as_embed(teacher, CPU)
    runs: list[int] = []

    def counted(batch: torch.Tensor) -> torch.Tensor:
        runs.append(len(batch))
        if len(runs) == stop:
            raise KeyboardInterrupt
        return run(batch)

    expected = extract.plain({"a": (preprocessing, run)}, folder, range(COUNT), "test")
    keep = extract.Keep(tmp_path, "keep", {"a": weights_digest(teacher)})
    with pytest.raises(KeyboardInterrupt):
        extract.plain({"a": (preprocessing, counted)}, folder, range(COUNT), "test", keep)
    whole = sorted(keep.folder.glob("*/*"))
    assert len(whole) == (stop - 1) // 2
    if whole:
        whole.pop().write_bytes(b"damaged")
    runs, stop = [], 0
    found = extract.plain({"a": (preprocessing, counted)}, folder, range(COUNT), "test", keep)
    assert found[1] == expected[1] and torch.equal(found[0]["a"], expected[0]["a"])
    assert len(runs) == COUNT // 2 - 2 * len(whole)


def test_parts_of_other_models_images_or_preprocessing_are_not_taken(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "BATCH", 2)
    monkeypatch.setattr(extract, "PART", 1)
    root = photos(tmp_path / "photos", 2)

    def embedded(model: Encoder, order: list[int]) -> tuple[torch.Tensor, list[int]]:
        keep = extract.Keep(tmp_path, "keep", {"a": weights_digest(model)})
        found, good = extract.plain({"a": extract.as_embed(model, CPU)}, listing.list_images(root), order, "test", keep)
        expected, _ = extract.plain({"a": extract.as_embed(model, CPU)}, listing.list_images(root), order, "test")
        assert torch.equal(found["a"], expected["a"])
        return found["a"], good

    first, _ = embedded(teacher, [0, 1, 2, 3])
    embedded(encoder(seed=4), [0, 1, 2, 3])
    embedded(encoder(size=48), [0, 1, 2, 3])
    embedded(teacher.normalised_by((0.1, 0.2, 0.3), teacher.preprocessing.std), [0, 1, 2, 3])
    assert embedded(teacher, [3, 2, 1, 0])[1] == [3, 2, 1, 0]
    one, other = (listing.list_images(root).read_raw(place) for place in (0, 5))
    status = one.stat()
    one.write_bytes(other.read_bytes())
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not torch.equal(embedded(teacher, [0, 1, 2, 3])[0][0], first[0])


def test_a_kept_part_is_made_again_when_what_it_left_out_can_be_used(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "BATCH", 2)
    monkeypatch.setattr(extract, "PART", 1)
    listed = listing.list_images(photos(tmp_path / "photos", 2))
    keep = extract.Keep(tmp_path, "keep", {"a": ""})
    real = decode.decode_file

    def refused(path: Path, at_least: int = 0, bands: Any = ()) -> Any:
        if path == listed.read_raw(2):
            raise ImageError("Permission denied")
        return real(path, at_least)

    preprocessing, run = extract.as_embed(teacher, CPU)
    with monkeypatch.context() as patch:
        patch.setattr("bingo_compress.data.decode.decode_file", refused)
        assert extract.plain({"a": (preprocessing, run)}, listed, range(6), "test", keep)[1] == [0, 1, 3, 4, 5]
    runs: list[int] = []

    def counted(batch: torch.Tensor) -> torch.Tensor:
        runs.append(len(batch))
        return run(batch)

    found, good = extract.plain({"a": (preprocessing, counted)}, listed, range(6), "test", keep)
    assert good == [0, 1, 2, 3, 4, 5] and runs == [2]
    assert torch.equal(found["a"], extract.plain({"a": (preprocessing, run)}, listed, range(6), "test")[0]["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_a_model_makes_no_numbers_of_is_named(
    value: float, folder: image_list.ImageList, teacher: Encoder
) -> None:
    preprocessing, run = extract.as_embed(teacher, CPU)

    def broken(batch: torch.Tensor) -> torch.Tensor:
        features = run(batch).clone()
        features[1, 3] = value
        return features

    with pytest.raises(
        BingoError, match=rf"^student: expected finite features, found .* for .*{Path(folder.files[9]).name}; are"
    ):
        extract.plain({"student": (preprocessing, broken)}, folder, [4, 9, 1], "test")


def test_a_model_in_training_is_judged_in_eval_mode_and_goes_on_training(folder: image_list.ImageList) -> None:
    model = encoder()
    expected, _ = extract.plain({"a": extract.as_embed(model, CPU)}, folder, [0, 1, 2], "test")
    found, _ = extract.plain({"a": extract.as_embed(model.train(), CPU)}, folder, [0, 1, 2], "test")
    assert torch.equal(found["a"], expected["a"]) and all(module.training for module in model.modules())


@pytest.mark.parametrize("changes", [{"crop_pct": 1.0}, {"crop_pct": 0.875}, {"crop_mode": "squash"}])
def test_views_of_the_store_are_close_to_the_plain_view_in_any_shape(
    changes: dict[str, Any], tmp_path: Path, teacher: Encoder
) -> None:
    (tmp_path / "photos").mkdir()
    rows, columns = np.mgrid[:160, :160]
    picture = np.stack((rows, columns, (rows + columns) // 2), axis=2).astype(np.uint8)
    for number, (height, width) in enumerate(((160, 60), (60, 160), (90, 91), (160, 40))):
        Image.fromarray(picture[:height, :width]).save(tmp_path / "photos" / f"{number}.png")
    listed = listing.list_images(tmp_path / "photos")
    store = pixel_store.build(listed, 40, tmp_path, CPU)[0]
    preprocessing = replace(teacher.preprocessing, **changes)
    found = extract.plain_views(store, torch.arange(4), preprocessing).permute(0, 2, 3, 1).int()
    wanted = extract.pixels_of(preprocessing, listed, range(4), 4).int()
    assert (found - wanted).abs().float().mean((1, 2, 3)).max() < 2


def test_plain_leaves_out_what_cannot_be_decoded(tmp_path: Path, teacher: Encoder) -> None:
    photos(tmp_path, 2)
    bad_files(tmp_path)
    mixed = listing.list_images(tmp_path)
    found, good = extract.plain({"a": extract.as_embed(teacher, CPU)}, mixed, range(len(mixed.files)), "test")
    assert [mixed.files[index] for index in good] == [name for name in mixed.files if name.startswith("kind")]
    assert len(found["a"]) == 6
    with pytest.raises(BingoError, match="found none"):
        extract.plain({"a": extract.as_embed(teacher, CPU)}, mixed, [mixed.files.index("words.jpg")], "test")


def test_pixels_of_skips_bad_files_and_stops_at_the_count(tmp_path: Path, teacher: Encoder) -> None:
    photos(tmp_path, 2)
    bad_files(tmp_path)
    mixed = listing.list_images(tmp_path)
    order = [mixed.files.index("words.jpg"), mixed.files.index("kind1/000.png"), mixed.files.index("kind0/001.png"), 0]
    found = extract.pixels_of(teacher.preprocessing, mixed, order, 2)
    assert found.dtype == torch.uint8 and found.shape == (2, 32, 32, 3)
    assert np.array_equal(
        found[0].numpy(), preprocess(load_image(tmp_path / "kind1/000.png"), **teacher.preprocessing.geometry())
    )
    with pytest.raises(BingoError, match="found none"):
        extract.pixels_of(teacher.preprocessing, mixed, order[:1], 2)


def test_the_digest_sees_every_weight() -> None:
    one, two = encoder(), encoder()
    assert weights_digest(one) == weights_digest(two)
    with torch.no_grad():
        next(two.parameters()).view(-1)[0] += 1e-6
    assert weights_digest(one) != weights_digest(two)


def test_half_made_photos_of_one_pixel_can_be_embedded(tmp_path: Path, teacher: Encoder) -> None:
    Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "dot.png")
    Image.new("RGB", (300, 1), (9, 200, 9)).save(tmp_path / "line.png")
    found, good = extract.plain({"a": extract.as_embed(teacher, CPU)}, listing.list_images(tmp_path), range(2), "test")
    assert good == [0, 1] and bool(found["a"].isfinite().all())
