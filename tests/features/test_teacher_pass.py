"""The teacher's one pass: by shards in files, resumed, mended and in whatever batch fits."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, encoder, interrupted_at, photos
from torch.nn.functional import normalize

from bingo_compress.data import augment, image_list, listing, pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.features import extract, teacher_pass
from bingo_compress.features.memmap import TeacherPass
from bingo_compress.models.encoder import Encoder

COUNT = 18


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_pass, "SHARD", 8)
    monkeypatch.setattr(extract, "BATCH", 4)


def run_pass(
    teacher: Encoder, folder: image_list.ImageList, store: pixel_store.PixelStore, work: Path, views: int = 2
) -> TeacherPass:
    work.mkdir(exist_ok=True)
    return teacher_pass.run(teacher, folder, store, views, 0.2, work, CPU)


def same(one: TeacherPass, two: TeacherPass) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("features", "embeddings", "views"))


def test_the_pass_gives_plain_features_unit_embeddings_and_differing_views(
    folder: image_list.ImageList, store: pixel_store.PixelStore, teacher: Encoder, tmp_path: Path
) -> None:
    seen = run_pass(teacher, folder, store, tmp_path)
    plain = extract.plain({"a": extract.as_embed(teacher, CPU)}, folder, range(COUNT), "test")[0]["a"]
    assert seen.features.dtype == seen.embeddings.dtype == seen.views.dtype == torch.float16
    assert torch.allclose(seen.features.float(), normalize(plain, dim=1), atol=1e-3)
    assert torch.allclose(seen.embeddings.float(), normalize(plain, dim=1), atol=1e-3)
    assert seen.views.shape == (COUNT, 2, teacher.width)
    assert seen.views.float().norm(dim=2).numpy() == pytest.approx(1, abs=2e-3)
    assert float((seen.views[:, 0] - seen.views[:, 1]).float().norm(dim=1).min()) > 1e-3
    assert not torch.equal(seen.views[:4], seen.views[4:8])


def test_every_batch_and_view_draws_its_own_parameters(
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []
    real = augment.draw

    def recorded(*arguments: Any) -> augment.Draw:
        drawn = real(*arguments)
        seen.append(drawn.brightness)
        return drawn

    monkeypatch.setattr(augment, "draw", recorded)
    run_pass(teacher, folder, store, tmp_path)
    assert [len(batch) for batch in seen] == [4, 4, 4, 4, 2] * 2
    assert len(torch.cat(seen).unique()) == COUNT * 2


def test_without_views_the_pass_gives_none(
    folder: image_list.ImageList, store: pixel_store.PixelStore, teacher: Encoder, tmp_path: Path
) -> None:
    assert run_pass(teacher, folder, store, tmp_path, views=0).views.shape == (COUNT, 0, teacher.width)


@pytest.mark.parametrize("at", [1, 2, 4, 7, 10])
def test_a_pass_interrupted_and_started_again_equals_the_whole(
    at: int,
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run_pass(teacher, folder, store, tmp_path / "whole")
    with interrupted_at(monkeypatch, augment, "apply", at), pytest.raises(KeyboardInterrupt):
        run_pass(teacher, folder, store, tmp_path / "parts")
    done = [len(list((tmp_path / "parts").glob(f"*/{name}-*.json"))) for name in ("features", "embeddings", "views")]
    # A view's shards of 8 are two batches, the last one of 2 is one.
    assert done == [
        3,
        3,
        (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)[at - 1],
    ]
    assert same(run_pass(teacher, folder, store, tmp_path / "parts"), whole)


def test_stored_shards_are_not_made_again(
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run_pass(teacher, folder, store, tmp_path)
    for work in ("_plain_shard", "_view_shard"):
        monkeypatch.setattr(teacher_pass, work, lambda *_: pytest.fail("embedded again"))
    assert same(run_pass(teacher, folder, store, tmp_path), first)


def test_more_views_add_to_the_views_that_are_there(
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = run_pass(teacher, folder, store, tmp_path, 2)
    monkeypatch.setattr(teacher_pass, "_plain_shard", lambda *_: pytest.fail("embedded again"))
    three = run_pass(teacher, folder, store, tmp_path, 3)
    assert torch.equal(three.views[:, :2], two.views)
    assert not torch.equal(three.views[:, 2], two.views[:, 1])
    assert same(run_pass(teacher, folder, store, tmp_path, 2), two)


def test_the_pass_is_read_from_disk_and_no_one_can_write_there(
    folder: image_list.ImageList, store: pixel_store.PixelStore, teacher: Encoder, tmp_path: Path
) -> None:
    seen = run_pass(teacher, folder, store, tmp_path)
    sizes = {file.name: file.stat().st_size for file in tmp_path.glob("*/*.f16")}
    plain = COUNT * teacher.width * 2
    assert sizes == {"features.f16": plain, "embeddings.f16": plain, "views.f16": 2 * plain}
    first = seen.features[0].clone()
    seen.features[0] = 7
    assert torch.equal(run_pass(teacher, folder, store, tmp_path).features[0], first)


@pytest.mark.parametrize("harm", ["a bit", "the end", "the file", "a marker", "marker's words"])
def test_damaged_shards_are_made_again_and_no_others(
    harm: str,
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    printed: io.StringIO,
) -> None:
    first = run_pass(teacher, folder, store, tmp_path)
    views = next(tmp_path.glob("*/views.f16"))
    each = teacher.width * 2
    content = bytearray(views.read_bytes())
    # Of rows 0, 8, 16 of view 0 and of rows 18, 26, 34, which are view 1.
    markers = sorted(views.parent.glob("views-*.json"))
    if harm == "a bit":
        content[(COUNT + 9) * each] ^= 1  # row 9 of view 1
        views.write_bytes(content)
    elif harm == "the end":
        views.write_bytes(content[:-each])
    elif harm == "the file":
        views.unlink()
    elif harm == "a marker":
        markers[1].unlink()
    else:
        markers[5].write_text("{")
    expected = {"a bit": [(8, 1)], "the end": [(16, 1)], "a marker": [(8, 0)], "marker's words": [(16, 1)]}
    made, real = [], teacher_pass._view_shard

    def recorded(*arguments: Any) -> Any:
        made.append((arguments[2].start, arguments[3]))
        return real(*arguments)

    monkeypatch.setattr(teacher_pass, "_view_shard", recorded)
    monkeypatch.setattr(teacher_pass, "_plain_shard", lambda *_: pytest.fail("embedded again"))
    assert same(run_pass(teacher, folder, store, tmp_path), first)
    assert made == expected.get(harm, [(start, view) for view in (0, 1) for start in (0, 8, 16)])
    assert ("are damaged and are made again" in printed.getvalue()) == (harm != "a marker")
    if harm == "a bit":
        assert f"rows {COUNT + 8} to {COUNT + 15} of" in printed.getvalue()
    assert same(run_pass(teacher, folder, store, tmp_path), first)
    assert made == expected.get(harm, made)  # and not a third time


@pytest.mark.parametrize("fits", [8, 3, 1])
def test_a_batch_that_does_not_fit_is_halved_and_the_result_is_the_same(
    fits: int,
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run_pass(teacher, folder, store, tmp_path / "whole")
    sizes: list[int] = []
    real = teacher_pass._both

    def limited(model: Encoder, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(batch))
        if len(batch) > fits:
            raise torch.cuda.OutOfMemoryError
        return real(model, batch)

    monkeypatch.setattr(teacher_pass, "_both", limited)
    # As a GPU, whose first batch is larger than BATCH.
    monkeypatch.setattr(teacher_pass, "_Fit", lambda _, make=teacher_pass._Fit: make(8))
    parts = run_pass(teacher, folder, store, tmp_path / "parts")
    assert sizes[:1] == [8] and max(sizes[4:]) <= fits
    for name in ("features", "embeddings", "views"):
        assert torch.allclose(getattr(parts, name).float(), getattr(whole, name).float(), rtol=2e-3, atol=1e-3)


def test_a_batch_of_one_that_does_not_fit_is_an_error(teacher: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(teacher_pass, "_both", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        teacher_pass._Fit(4)(teacher, torch.zeros(4, 3, 32, 32))


def test_another_teacher_or_folder_makes_another_pass_and_drops_the_old(
    folder: image_list.ImageList, store: pixel_store.PixelStore, teacher: Encoder, tmp_path: Path
) -> None:
    names = []
    other = image_list.ImageList(folder.root, folder.files[:-1], ())
    for model, listed in ((teacher, folder), (encoder(seed=9), folder), (teacher, other)):
        run_pass(model, listed, store, tmp_path, 1)
        kept = [path.name for path in tmp_path.iterdir()]
        assert len(kept) == 1
        names += kept
    assert len(set(names)) == len(names)


def test_pictures_of_another_side_make_other_views(
    folder: image_list.ImageList, teacher: Encoder, tmp_path: Path
) -> None:
    """A store of another side left by an earlier run of another image size: its views are not taken for these."""
    passes = {}
    for side in (40, 24):
        (tmp_path / str(side)).mkdir()
        store = pixel_store.build(folder, side, tmp_path / str(side), CPU)[0]
        passes[side] = run_pass(teacher, folder, store, tmp_path / "work", 1)
        assert same(run_pass(teacher, folder, store, tmp_path / f"clean{side}", 1), passes[side])
    assert passes[40].key != passes[24].key
    streamed = pixel_store.build(folder, 24, tmp_path / "24", CPU, "stream")[0]
    # Wherever the pictures are kept.
    assert run_pass(teacher, folder, streamed, tmp_path / "work", 1).key == passes[24].key


@pytest.mark.parametrize("factor", [1e7, 1e-9])
def test_features_beyond_float16_keep_their_directions(
    factor: float,
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run_pass(teacher, folder, store, tmp_path / "plain", 1)
    real = teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda pictures: real(pictures) * factor)
    found = run_pass(teacher, folder, store, tmp_path / "scaled", 1)
    for name in ("features", "embeddings", "views"):
        assert torch.allclose(getattr(found, name).float(), getattr(expected, name).float(), atol=1e-3), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_an_image_that_the_teacher_makes_no_numbers_of_is_named(
    value: float,
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = teacher.forward, iter(range(100))

    def broken(views: torch.Tensor) -> torch.Tensor:
        features = real(views)
        if next(calls) == 1:  # images 4 to 7
            features[2] = features[2] * value if value == 0 else value
        return features

    monkeypatch.setattr(teacher, "forward", broken)
    with pytest.raises(
        BingoError, match=r"found zeros, infinities or NaN for 1 of 8 images, the first .*" + Path(folder.files[6]).name
    ):
        run_pass(teacher, folder, store, tmp_path, 1)
    assert not list(tmp_path.glob("*/*-*.json"))  # nothing is taken for done


def test_embeddings_that_are_all_alike_are_said(
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    printed: io.StringIO,
) -> None:
    run_pass(teacher, folder, store, tmp_path / "plain", 0)
    assert "hardly apart" not in printed.getvalue()
    real = teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda pictures: real(pictures) * 1e-3 + 10)
    run_pass(teacher, folder, store, tmp_path / "alike", 0)
    assert "warning: the teacher tells these images hardly apart (mean cosine 1.0000" in printed.getvalue()


def test_views_of_features_are_the_backbones_where_there_is_a_projection(
    folder: image_list.ImageList, store: pixel_store.PixelStore, teacher: Encoder, tmp_path: Path
) -> None:
    plain = run_pass(teacher, folder, store, tmp_path / "none", 1).views
    projected = encoder()
    projected.load_state_dict(teacher.state_dict())
    projected.projection = torch.nn.Linear(teacher.width, 6).eval()
    (tmp_path / "two").mkdir()
    of_features = teacher_pass.run(projected, folder, store, 1, 0.2, tmp_path / "two", CPU, of_features=True)
    assert torch.equal(of_features.views, plain)
    assert run_pass(projected, folder, store, tmp_path / "three", 1).views.shape == (COUNT, 1, 6)


def test_an_image_that_breaks_during_the_run_is_named(teacher: Encoder, tmp_path: Path) -> None:
    broken = listing.list_images(photos(tmp_path / "photos", 2))
    (tmp_path / "work").mkdir()
    store, broken = pixel_store.build(broken, 40, tmp_path / "work", CPU)
    broken.read_raw(3).write_bytes(b"no image any more")
    with pytest.raises(BingoError, match=Path(broken.files[3]).name):
        run_pass(teacher, broken, store, tmp_path / "work")


def test_no_space_is_said_before_the_pass(
    folder: image_list.ImageList,
    store: pixel_store.PixelStore,
    teacher: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(BingoError, match="the teacher's embeddings"):
        run_pass(teacher, folder, store, tmp_path)
