"""Embeddings: plain features, target spaces and the two sources of targets."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bingo_edge.image import ImageError, load_image, preprocess
from helpers import CPU, bad_files, encoder, photos, unit
from PIL import Image
from torch.nn.functional import normalize

from bingo_compress.data import augment, decode, image_folder, pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.features import extract
from bingo_compress.features.memmap import Rows
from bingo_compress.features.targets import OnlineTargets, StoredTargets, TargetSpace, target_space
from bingo_compress.models.encoder import Encoder, weights_digest
from bingo_compress.runtime.made_of import hash_seed

COUNT = 18


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> image_folder.Folder:
    return image_folder.list_folder(photos(tmp_path_factory.mktemp("photos"), COUNT // 3))


@pytest.fixture(scope="module")
def store(folder: image_folder.Folder, tmp_path_factory: pytest.TempPathFactory) -> pixel_store.PixelStore:
    return pixel_store.build(folder, 40, tmp_path_factory.mktemp("work"), CPU)[0]


@pytest.fixture(scope="module")
def teacher() -> Encoder:
    return encoder()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "BATCH", 4)


def one_by_one(model: Encoder, folder: image_folder.Folder, index: int) -> torch.Tensor:
    """Features of one image, without the code under test: decode, crop, normalise, backbone."""
    settings = model.preprocessing
    seen = preprocess(load_image(folder.path(index)), **settings.geometry())
    scaled = (seen.astype(np.float64) / 255 - np.array(settings.mean)) / np.array(settings.std)
    with torch.inference_mode():
        features: torch.Tensor = model.backbone(torch.from_numpy(scaled.transpose(2, 0, 1)[None]).float())[0]
    return features


# ---------------------------------------------------------------- plain


def test_plain_features_are_those_of_each_image_alone(folder: image_folder.Folder, teacher: Encoder) -> None:
    found, good = extract.plain({"a": extract.as_embed(teacher, CPU)}, folder, [4, 0, 17, 9, 3, 11], "test")
    assert good == [4, 0, 17, 9, 3, 11]
    expected = torch.stack([one_by_one(teacher, folder, index) for index in good])
    assert torch.allclose(found["a"], expected, atol=1e-5 * float(expected.abs().max()))
    assert float((expected[0] - expected[1]).abs().max()) > 1e-2 * float(expected.abs().max())  # images do differ


def test_several_models_share_one_decoding(
    folder: image_folder.Folder, teacher: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    real = decode.load_image

    def counted(path: Any, at_least: int = 0) -> Any:
        decoded.append(Path(path).name)
        return real(path, at_least)

    monkeypatch.setattr("bingo_compress.data.decode.load_image", counted)
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
    stop: int, folder: image_folder.Folder, teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        found, good = extract.plain(
            {"a": extract.as_embed(model, CPU)}, image_folder.list_folder(root), order, "test", keep
        )
        expected, _ = extract.plain({"a": extract.as_embed(model, CPU)}, image_folder.list_folder(root), order, "test")
        assert torch.equal(found["a"], expected["a"])
        return found["a"], good

    first, _ = embedded(teacher, [0, 1, 2, 3])
    embedded(encoder(seed=4), [0, 1, 2, 3])
    embedded(encoder(size=48), [0, 1, 2, 3])
    embedded(teacher.normalised_by((0.1, 0.2, 0.3), teacher.preprocessing.std), [0, 1, 2, 3])
    assert embedded(teacher, [3, 2, 1, 0])[1] == [3, 2, 1, 0]
    one, other = (image_folder.list_folder(root).path(place) for place in (0, 5))
    status = one.stat()
    one.write_bytes(other.read_bytes())
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not torch.equal(embedded(teacher, [0, 1, 2, 3])[0][0], first[0])


def test_a_kept_part_is_made_again_when_what_it_left_out_can_be_used(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "BATCH", 2)
    monkeypatch.setattr(extract, "PART", 1)
    listed = image_folder.list_folder(photos(tmp_path / "photos", 2))
    keep = extract.Keep(tmp_path, "keep", {"a": ""})
    real = decode.load_image

    def refused(path: Path, at_least: int = 0) -> Any:
        if path == listed.path(2):
            raise ImageError("Permission denied")
        return real(path, at_least)

    preprocessing, run = extract.as_embed(teacher, CPU)
    with monkeypatch.context() as patch:
        patch.setattr("bingo_compress.data.decode.load_image", refused)
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
    value: float, folder: image_folder.Folder, teacher: Encoder
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


def test_a_model_in_training_is_judged_in_eval_mode_and_goes_on_training(folder: image_folder.Folder) -> None:
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
    listed = image_folder.list_folder(tmp_path / "photos")
    store = pixel_store.build(listed, 40, tmp_path, CPU)[0]
    preprocessing = replace(teacher.preprocessing, **changes)
    found = extract.plain_views(store, torch.arange(4), preprocessing).permute(0, 2, 3, 1).int()
    wanted = extract.pixels_of(preprocessing, listed, range(4), 4).int()
    assert (found - wanted).abs().float().mean((1, 2, 3)).max() < 2


def test_plain_leaves_out_what_cannot_be_decoded(tmp_path: Path, teacher: Encoder) -> None:
    photos(tmp_path, 2)
    bad_files(tmp_path)
    mixed = image_folder.list_folder(tmp_path)
    found, good = extract.plain({"a": extract.as_embed(teacher, CPU)}, mixed, range(len(mixed.files)), "test")
    assert [mixed.files[index] for index in good] == [name for name in mixed.files if name.startswith("kind")]
    assert len(found["a"]) == 6
    with pytest.raises(BingoError, match="found none"):
        extract.plain({"a": extract.as_embed(teacher, CPU)}, mixed, [mixed.files.index("words.jpg")], "test")


def test_pixels_of_skips_bad_files_and_stops_at_the_count(tmp_path: Path, teacher: Encoder) -> None:
    photos(tmp_path, 2)
    bad_files(tmp_path)
    mixed = image_folder.list_folder(tmp_path)
    order = [mixed.files.index("words.jpg"), mixed.files.index("kind1/000.png"), mixed.files.index("kind0/001.png"), 0]
    found = extract.pixels_of(teacher.preprocessing, mixed, order, 2)
    assert found.dtype == torch.uint8 and found.shape == (2, 32, 32, 3)
    assert np.array_equal(
        found[0].numpy(), preprocess(load_image(tmp_path / "kind1/000.png"), **teacher.preprocessing.geometry())
    )
    with pytest.raises(BingoError, match="found none"):
        extract.pixels_of(teacher.preprocessing, mixed, order[:1], 2)


# ---------------------------------------------------------------- target spaces


def cosines(rows: torch.Tensor) -> torch.Tensor:
    rows = normalize(rows.double(), dim=-1)
    return rows @ rows.T


def test_raw_only_normalises() -> None:
    rows = unit(20, 8) * 7
    assert torch.allclose(target_space(rows, "raw", 4)(rows), rows / 7, atol=1e-6)


def test_centred_subtracts_the_mean_of_the_normalised_rows() -> None:
    rows = unit(20, 8) * torch.linspace(1, 9, 20)[:, None] + 0.3
    points = rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1)[:, None]
    expected = points - points.mean(0)
    expected /= np.linalg.norm(expected, axis=1)[:, None]
    assert target_space(rows, "centred", 4)(rows).numpy() == pytest.approx(expected, abs=1e-5)


def test_pca_with_every_dimension_keeps_the_centred_cosines() -> None:
    rows = unit(60, 8) + 0.4
    full = target_space(rows, "pca", 8)(rows)
    assert full.shape == (60, 8)
    assert torch.allclose(cosines(full), cosines(target_space(rows, "centred", 8)(rows)), atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "width", "dim", "kept"), [(60, 8, 3, 3), (60, 8, 100, 8), (5, 8, 8, 4), (6, 20, 3, 3)]
)
def test_pca_keeps_no_more_dimensions_than_asked_than_there_are_and_than_rows_span(
    rows: int, width: int, dim: int, kept: int
) -> None:
    made = unit(rows, width)
    found = target_space(made, "pca", dim)(made)
    assert found.shape == (rows, kept)
    assert found.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)


def test_pca_keeps_the_directions_of_most_variance() -> None:
    rows = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 0.1, 3, 0.1, 0.1, 0.2]) + 1
    points = normalize(rows.double(), dim=1).numpy()
    basis = np.linalg.svd(points - points.mean(0))[2][:2]
    found = target_space(rows, "pca", 2).basis
    assert found is not None
    assert np.linalg.norm(basis @ found.double().numpy()) == pytest.approx(np.sqrt(2), abs=1e-4)  # the same plane


def test_a_space_fitted_by_blocks_equals_the_whole_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (unit(70, 12) * torch.linspace(0.5, 9, 70)[:, None] + 0.2).half()
    points = normalize(rows.double(), dim=1)
    values, vectors = np.linalg.eigh(np.cov(points.numpy().T, bias=True))
    monkeypatch.setattr("bingo_compress.features.targets.ROWS", 9)
    space = target_space(Rows(rows, torch.arange(70)), "whitened", 4)
    assert space.mean is not None and space.basis is not None
    assert space.mean.numpy() == pytest.approx(points.mean(0).numpy(), abs=1e-6)
    assert np.abs(space.basis.numpy()) == pytest.approx(
        np.abs(vectors[:, -4:] / np.sqrt(values[-4:])), rel=1e-3, abs=1e-3
    )


def test_a_space_takes_views_of_any_shape() -> None:
    rows = unit(20, 3, 8)
    space = target_space(rows[:, 0], "pca", 5)
    assert torch.allclose(space(rows)[7, 2], space(rows[7:8, 2])[0], atol=1e-6)


# ---------------------------------------------------------------- targets


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_stored_targets_draw_every_view_and_nothing_else() -> None:
    views = unit(12, 4, 16)
    space = target_space(views[:, 0], "centred", 16)
    targets = StoredTargets(views.half(), space, CPU)
    indices, stream, drawn = torch.tensor([3, 3, 11, 0]), generator(), []
    for _ in range(60):
        found = targets(indices, stream, torch.arange(len(indices)))
        assert found.dtype == torch.float32
        assert found.norm(dim=1).numpy() == pytest.approx(1, abs=1e-6)
        near = (found[:, None] - space(views[indices])).norm(dim=2)  # to each of the image's views
        assert float(near.min(dim=1).values.max()) < 3e-3
        drawn.append(near.argmin(dim=1))
    counts = torch.stack(drawn).T
    assert all(set(row.tolist()) == {0, 1, 2, 3} for row in counts)
    assert not torch.equal(counts[0], counts[1])  # the same image twice in a batch draws twice


def test_the_mean_of_an_images_views_is_its_target_and_never_another() -> None:
    views = unit(6, 5, 8)
    targets = StoredTargets(views, TargetSpace(None, None), CPU, mean=True)
    indices, generator = torch.tensor([4, 0, 4]), torch.Generator().manual_seed(0)
    expected = normalize(views.mean(1), dim=-1)[indices]
    for _ in range(3):
        found = targets(indices, generator, torch.arange(3))
        assert torch.allclose(found, expected, atol=2e-3) and torch.allclose(
            found.norm(dim=1), torch.ones(3), atol=1e-5
        )


def test_stored_targets_depend_on_the_generator_alone() -> None:
    targets = StoredTargets(unit(6, 5, 8), TargetSpace(None, None), CPU)
    indices = torch.arange(6)
    assert torch.equal(
        targets(indices, generator(1), torch.arange(len(indices))),
        targets(indices, generator(1), torch.arange(len(indices))),
    )
    assert not torch.equal(
        targets(indices, generator(1), torch.arange(len(indices))),
        targets(indices, generator(2), torch.arange(len(indices))),
    )


def test_online_targets_are_the_teacher_on_a_fresh_view(store: pixel_store.PixelStore, teacher: Encoder) -> None:
    space = target_space(unit(30, teacher.width), "pca", 10)
    targets = OnlineTargets(teacher, store, space, 0.3, CPU)
    indices = torch.tensor([2, 9, 5])
    found = targets(indices, generator(4), torch.arange(len(indices)))
    drawn = augment.draw(store.aspect[indices], generator(4), 0.3)
    with torch.no_grad():
        expected = space(teacher(augment.apply(store.crops(indices, drawn.box, 32), drawn)))
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.shape == (3, 10) and found.dtype == torch.float32
    assert found.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    assert not torch.equal(found, targets(indices, generator(5), torch.arange(len(indices))))


@pytest.mark.parametrize("kind", ["stored", "online"])
def test_targets_carry_no_gradient_and_can_be_trained_against(
    kind: str, store: pixel_store.PixelStore, teacher: Encoder
) -> None:
    space = TargetSpace(None, None)
    targets = (
        StoredTargets(unit(COUNT, 2, teacher.width), space, CPU)
        if kind == "stored"
        else OnlineTargets(teacher, store, space, 0.2, CPU)
    )
    found = targets(torch.arange(4), generator(), torch.arange(4))
    query = unit(4, teacher.width, seed=8).requires_grad_()
    (query * found).sum().backward()
    assert not found.requires_grad
    assert query.grad is not None and torch.equal(query.grad, found)
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---------------------------------------------------------------- seeds and digests


def test_seeds_of_other_streams_differ_and_fit_torch() -> None:
    seeds = {hash_seed(0, "view", view, start) for view in range(10) for start in range(10)} | {
        hash_seed("0", "view", 0, 0)
    }
    assert len(seeds) == 101
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_digest_sees_every_weight() -> None:
    one, two = encoder(), encoder()
    assert weights_digest(one) == weights_digest(two)
    with torch.no_grad():
        next(two.parameters()).view(-1)[0] += 1e-6
    assert weights_digest(one) != weights_digest(two)


def test_half_made_photos_of_one_pixel_can_be_embedded(tmp_path: Path, teacher: Encoder) -> None:
    Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "dot.png")
    Image.new("RGB", (300, 1), (9, 200, 9)).save(tmp_path / "line.png")
    found, good = extract.plain(
        {"a": extract.as_embed(teacher, CPU)}, image_folder.list_folder(tmp_path), range(2), "test"
    )
    assert good == [0, 1] and bool(found["a"].isfinite().all())
