"""Target spaces against numpy, and the two sources of targets."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, seeded, unit
from torch.nn.functional import normalize

from bingo_compress.data import augment, pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.features import targets as targets_file
from bingo_compress.features.memmap import Rows
from bingo_compress.features.targets import OnlineTargets, StoredTargets, TargetSpace, target_space
from bingo_compress.models.encoder import Encoder

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
    rows = torch.randn(80, 6, generator=seeded(0)) * torch.tensor([5, 0.1, 3, 0.1, 0.1, 0.2]) + 1
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


def test_stored_targets_draw_every_view_and_nothing_else() -> None:
    views = unit(12, 4, 16)
    space = target_space(views[:, 0], "centred", 16)
    targets = StoredTargets(views.half(), space, CPU)
    indices, stream, drawn = torch.tensor([3, 3, 11, 0]), seeded(0), []
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
    indices, generator = torch.tensor([4, 0, 4]), seeded(0)
    expected = normalize(views.mean(1), dim=-1)[indices]
    for _ in range(3):
        found = targets(indices, generator, torch.arange(3))
        assert torch.allclose(found, expected, atol=2e-3) and torch.allclose(
            found.norm(dim=1), torch.ones(3), atol=1e-5
        )


@pytest.mark.parametrize("mean", [True, False])
def test_targets_filled_in_part_by_part_are_those_put_together(mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets_file, "ROWS", 4)
    views, space = unit(10, 3, 8).half(), target_space(unit(10, 8, seed=1), "pca", 5)
    parts = [space(rows) for rows in views.split(4)]
    whole = torch.cat([(part.mean(1, keepdim=True) if mean else part).half() for part in parts])
    assert torch.equal(StoredTargets(views, space, CPU, mean=mean)._views, whole)


@pytest.mark.parametrize("mean", [True, False])
def test_targets_on_disk_are_those_in_memory_and_leave_nothing(
    mean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views, space = unit(10, 3, 8).half(), target_space(unit(10, 8, seed=1), "pca", 5)
    kept = StoredTargets(views, space, CPU, mean=mean, work=tmp_path)
    assert torch.equal(kept._views, StoredTargets(views, space, CPU, mean=mean)._views)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 99))
    with pytest.raises(BingoError, match="no space: the file of targets needs"):
        StoredTargets(views, space, CPU, mean=mean, work=tmp_path)


def test_stored_targets_depend_on_the_generator_alone() -> None:
    targets = StoredTargets(unit(6, 5, 8), TargetSpace(None, None), CPU)
    indices = torch.arange(6)
    assert torch.equal(
        targets(indices, seeded(1), torch.arange(len(indices))),
        targets(indices, seeded(1), torch.arange(len(indices))),
    )
    assert not torch.equal(
        targets(indices, seeded(1), torch.arange(len(indices))),
        targets(indices, seeded(2), torch.arange(len(indices))),
    )


def test_online_targets_are_the_teacher_on_a_fresh_view(store: pixel_store.PixelStore, teacher: Encoder) -> None:
    space = target_space(unit(30, teacher.width), "pca", 10)
    targets = OnlineTargets(teacher, store, space, 0.3, CPU)
    indices = torch.tensor([2, 9, 5])
    found = targets(indices, seeded(4), torch.arange(len(indices)))
    drawn = augment.draw(store.aspect[indices], seeded(4), 0.3)
    with torch.no_grad():
        expected = space(teacher(augment.apply(store.crops(indices, drawn.box, 32), drawn)))
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.shape == (3, 10) and found.dtype == torch.float32
    assert found.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    assert not torch.equal(found, targets(indices, seeded(5), torch.arange(len(indices))))


@pytest.mark.parametrize("kind", ["stored", "online"])
def test_targets_carry_no_gradient_and_can_be_trained_against(
    kind: str, store: pixel_store.PixelStore, teacher: Encoder
) -> None:
    space = TargetSpace(None, None)
    targets = (
        StoredTargets(unit(18, 2, teacher.width), space, CPU)
        if kind == "stored"
        else OnlineTargets(teacher, store, space, 0.2, CPU)
    )
    found = targets(torch.arange(4), seeded(0), torch.arange(4))
    query = unit(4, teacher.width, seed=8).requires_grad_()
    (query * found).sum().backward()
    assert not found.requires_grad
    assert query.grad is not None and torch.equal(query.grad, found)
    assert all(parameter.grad is None for parameter in teacher.parameters())
