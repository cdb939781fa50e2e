"""Stored views in the target space, a byte a number: against the float16 pass, interrupted, and in a bag's making."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CPU, encoder, interrupted_at, seeded, unit
from torch.nn.functional import cosine_similarity, normalize

from bingo_compress.data import augment, image_list, pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.features import bagging, extract, teacher_pass
from bingo_compress.features.memmap import TeacherPass
from bingo_compress.features.targets import (
    PackedTargets,
    StoredTargets,
    TargetSpace,
    packed,
    target_space,
    unpacked,
)
from bingo_compress.models.encoder import Encoder

COUNT, DIM = 18, 12


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_pass, "SHARD", 8)
    monkeypatch.setattr(extract, "BATCH", 4)


@pytest.fixture(scope="session")
def whole(
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> TeacherPass:
    """The float16 pass of three views."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_pass, "SHARD", 8)
        patch.setattr(extract, "BATCH", 4)
        return teacher_pass.run(teacher, folder, store, 3, 0.2, tmp_path_factory.mktemp("whole"), CPU)


class Packing:
    """The packed pass of one folder, teacher and target space, by the teacher and not from stored views."""

    def __init__(self, teacher: Encoder, folder: image_list.ImageList, store: pixel_store.PixelStore) -> None:
        self.viewing = teacher_pass.Viewing(teacher, folder, store, 0.2, CPU, of_features=False)

    def __call__(self, seen: TeacherPass, space: TargetSpace, home: Path, views: int = 2) -> TeacherPass:
        home.mkdir(exist_ok=True)
        return teacher_pass.with_packed_views(replace(seen, home=home), self.viewing, views, space, home)


@pytest.fixture
def packing(teacher: Encoder, folder: image_list.ImageList, store: pixel_store.PixelStore) -> Packing:
    return Packing(teacher, folder, store)


@pytest.fixture
def space(whole: TeacherPass) -> TargetSpace:
    return target_space(whole.embeddings, "pca", DIM)


def by_shards(space: TargetSpace, views: torch.Tensor) -> torch.Tensor:
    """What the packed pass is to hold of float16 views (N, V, D), projected as it projects: by shard and view."""
    columns = [torch.cat([packed(space(rows)) for rows in column.split(8)]) for column in views.unbind(1)]
    return torch.stack(columns, 1)


# ---------------------------------------------------------------- a byte a number


@pytest.mark.parametrize("length", [1.0, 1e-9, 3e5])
def test_no_number_is_off_by_more_than_a_253rd_of_its_rows_largest(length: float) -> None:
    rows = unit(40, 3, 64) * length * torch.linspace(0.1, 2, 40)[:, None, None]
    kept = packed(rows)
    assert kept.dtype == torch.int8 and kept.shape == (40, 3, 66)
    off = (unpacked(kept) - rows).abs() / rows.abs().amax(-1, keepdim=True)
    assert 1 / 400 < float(off.max()) <= 1 / 253
    # A row at an odd byte of a file, as most are.
    assert torch.equal(unpacked(kept[7:8, 1]), unpacked(kept)[7:8, 1])


def test_a_row_of_zeros_stays_one() -> None:
    assert torch.equal(unpacked(packed(torch.zeros(2, 5))), torch.zeros(2, 5))


def test_unit_rows_of_the_usual_width_keep_their_direction() -> None:
    rows = normalize(unit(500, 256) * torch.linspace(4, 0.2, 256), dim=1)  # as pca's: the first are the largest
    assert float(cosine_similarity(unpacked(packed(rows)), rows).min()) > 0.9995


# ---------------------------------------------------------------- the pass


def test_packed_views_are_the_float16_views_in_the_target_space(
    whole: TeacherPass, packing: Packing, space: TargetSpace, tmp_path: Path
) -> None:
    found = packing(whole, space, tmp_path)
    assert torch.equal(found.views, by_shards(space, whole.views[:, :2]))
    rows = torch.tensor([17, 0, 9])
    assert torch.allclose(found.closeness(rows), whole.closeness(rows)[:, :2], atol=1e-6)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir() if file.suffix != ".json"}
    assert sizes == {"views.i8": COUNT * 2 * (DIM + 2), "close.f32": COUNT * 2 * 4}


@pytest.mark.parametrize("at", [1, 3, 8])
def test_a_packed_pass_interrupted_and_started_again_equals_the_whole(
    at: int, whole: TeacherPass, packing: Packing, space: TargetSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_at(monkeypatch, augment, "apply", at), pytest.raises(KeyboardInterrupt):
        packing(whole, space, tmp_path)
    # A view's shards of 8 are two batches, the last one of 2 is one.
    assert len(list(tmp_path.glob("views-*.json"))) == {1: 0, 3: 1, 8: 4}[at]
    found = packing(whole, space, tmp_path)
    assert torch.equal(found.views, by_shards(space, whole.views[:, :2]))
    monkeypatch.setattr(teacher_pass, "_view_shard", lambda *_: pytest.fail("embedded again"))
    again = packing(whole, space, tmp_path)
    assert torch.equal(again.views, found.views) and torch.equal(again.close, found.close)


def test_more_views_add_to_those_that_are_there_and_a_damaged_shard_is_made_again(
    whole: TeacherPass, packing: Packing, space: TargetSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing(whole, space, tmp_path)
    content = bytearray((tmp_path / "views.i8").read_bytes())
    content[(COUNT + 9) * (DIM + 2)] ^= 1  # row 9 of view 1
    (tmp_path / "views.i8").write_bytes(content)
    made, real = [], teacher_pass._view_shard
    monkeypatch.setattr(
        teacher_pass, "_view_shard", lambda *given: (made.append((given[2].start, given[3])), real(*given))[1]
    )
    three = packing(whole, space, tmp_path, views=3)
    assert torch.equal(three.views, by_shards(space, whole.views))
    assert made == [(8, 1), (0, 2), (8, 2), (16, 2)]


@pytest.mark.parametrize("of_features", [False, True])
def test_views_that_are_stored_beside_a_pass_are_packed_without_the_teacher(
    of_features: bool,
    packing: Packing,
    teacher: Encoder,
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    space: TargetSpace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    viewing = replace(packing.viewing, of_features=of_features)
    teacher_pass.run(teacher, folder, store, 2, 0.2, tmp_path, CPU, of_features=of_features)
    seen = teacher_pass.run(teacher, folder, store, 0, 0.2, tmp_path, CPU, of_features=of_features)
    (tmp_path / "asked").mkdir()
    asked = teacher_pass.with_packed_views(replace(seen, home=tmp_path), viewing, 2, space, tmp_path / "asked")
    with monkeypatch.context() as patch:
        patch.setattr(teacher_pass, "_embedded", lambda *_: pytest.fail("embedded again"))
        found = teacher_pass.with_packed_views(seen, viewing, 2, space, seen.home)
    assert torch.equal(found.views, asked.views) and torch.equal(found.close, asked.close)


def test_an_image_that_the_teacher_makes_no_numbers_of_is_not_packed(
    whole: TeacherPass,
    packing: Packing,
    teacher: Encoder,
    space: TargetSpace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda views: real(views) * float("nan"))
    with pytest.raises(BingoError, match=r"found zeros, infinities or NaN for 8 of 8 images"):
        packing(whole, space, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_bags_that_look_at_an_images_own_views_are_the_same(
    whole: TeacherPass, packing: Packing, space: TargetSpace, folder: image_list.ImageList, tmp_path: Path
) -> None:
    """The target space has not what they look at: another mean, fewer dimensions."""
    bags = []
    for seen in (whole, packing(whole, space, tmp_path, views=3)):
        bags.append(bagging.BAGGERS["adaptive"](bagging.Seen(seen, folder, torch.arange(COUNT), 0, 0), 6))
    mutual = bagging.mutual(bagging.knn(whole.features, 6)[0])
    assert torch.equal(*bags) and 0 < int((bags[0] >= 0).sum()) < int(mutual.sum())


def test_views_of_features_are_packed_where_there_is_a_projection(
    whole: TeacherPass,
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
) -> None:
    projected = encoder()
    projected.load_state_dict(teacher.state_dict())
    projected.projection = torch.nn.Linear(teacher.width, 6).eval()
    plain = teacher_pass.run(projected, folder, store, 0, 0.2, tmp_path, CPU, of_features=True)
    viewing = teacher_pass.Viewing(projected, folder, store, 0.2, CPU, of_features=True)
    (tmp_path / "views").mkdir()
    raw = TargetSpace(None, None)
    found = teacher_pass.with_packed_views(plain, viewing, 1, raw, tmp_path / "views")
    assert torch.equal(found.views, by_shards(raw, whole.views[:, :1]))


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_packed_targets_are_drawn_as_stored_ones_and_near_them(mean: bool, lengths: bool) -> None:
    views = unit(30, 4, 32) + 0.2
    space = target_space(views[:, 0], "pca", 16)
    stored = StoredTargets(views.half(), space, CPU, lengths=lengths, mean=mean)
    kept = packed((space.project if lengths else space)(views.half()))
    targets = PackedTargets(kept, CPU, lengths=lengths, mean=mean)
    indices, mine = torch.randint(30, (64,), generator=seeded(3)), torch.arange(5, 60)
    one, two = seeded(1), seeded(1)
    for _ in range(3):
        expected, found = stored(indices, one, mine), targets(indices, two, mine)
        assert found.dtype == torch.float32 and found.shape == (55, 16)
        assert float(cosine_similarity(found, expected).min()) > 0.9995
        assert found.norm(dim=1).numpy() == pytest.approx(expected.norm(dim=1).numpy(), rel=0.01)
    assert torch.equal(one.get_state(), two.get_state())  # what is drawn after them is the same too
