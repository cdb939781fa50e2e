"""stored_as=int8 in the run: what the stored targets are made of, and students of both kinds side by side."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, interrupted_at, photos, recipe, turned

from bingo_compress import pipeline
from bingo_compress.data import augment, listing
from bingo_compress.features import extract, targets, teacher_pass
from bingo_compress.models.trained import build_models
from bingo_compress.runtime import checkpoint
from bingo_compress.training.material import Material, lessons_of, make_bags, prepare
from bingo_compress.training.plan import Plan, plan_run, settle


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_pass, "SHARD", 8)
    monkeypatch.setattr(extract, "BATCH", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos"), 6)


def prepared(data: Path, work: Path, **changes: Any) -> tuple[Plan, Material]:
    chosen = settle(recipe(data=str(data), **{"stored_as": "int8", **changes}))
    models, listed = build_models(chosen), listing.list_images(data)
    work.mkdir(exist_ok=True)
    plan = plan_run(models, len(listed.files), CPU)
    return plan, prepare(plan, models, listed, work)


def targets_of(plan: Plan, material: Material) -> torch.Tensor:
    """Targets (n, dim) of the training images, where nothing is drawn."""
    models = build_models(plan.recipe)
    source = lessons_of(plan, models.teacher, material, make_bags(plan, models.teacher, material)).target_of
    assert source is not None
    return source(material.training, torch.Generator().manual_seed(0), torch.arange(len(material.training)))


def kept(work: Path) -> list[Path]:
    return sorted(work.glob("teacher-*/targets-*"))


@pytest.mark.parametrize("method", ["bingo", "coss"])  # coss learns lengths too
def test_the_run_has_the_targets_of_a_float16_run_and_no_views_but_packed_ones(
    method: str, data: Path, tmp_path: Path
) -> None:
    found = {}
    for kind in ("float16", "int8"):
        plan, material = prepared(data, tmp_path / kind, method=method, stored_as=kind, stored_views="mean")
        found[kind] = targets_of(plan.on(len(material.training)), material)
        views = {file.name: file.stat().st_size for file in tmp_path.glob(f"{kind}/teacher-*/**/views.*")}
        count, beside = len(material.folder.files), 0 if kind == "float16" else 4 * 2 * len(material.folder.files)
        assert list(views) == ["views.f16" if kind == "float16" else "views.i8"]
        assert sum(views.values()) + beside == plan.on(len(material.training)).view_bytes * 2 * count
    # The axes of the two spaces are the same ones: both were fitted here and now.
    assert float(torch.cosine_similarity(found["int8"], found["float16"]).min()) > 0.9995
    assert found["int8"].norm(dim=1).numpy() == pytest.approx(found["float16"].norm(dim=1).numpy(), rel=0.01)


def test_another_target_space_or_other_training_images_are_other_views(data: Path, tmp_path: Path) -> None:
    first = prepared(data, tmp_path, target_dim=8)[1]  # as wide with fewer images too
    for changes in (
        {"target_dim": 9},
        {"target": "raw"},
        {"method": "coss"},
        {"hold_out": 0.3},
    ):
        before = len(kept(tmp_path))
        material = prepared(data, tmp_path, **{"target_dim": 8, **changes})[1]
        assert len(kept(tmp_path)) == before + 1, changes
        assert material.sources["teacher's embeddings"] == first.sources["teacher's embeddings"]


def test_what_does_not_change_targets_makes_no_views_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(data, tmp_path)[1]
    monkeypatch.setattr(teacher_pass, "_view_shard", lambda *_: pytest.fail("embedded again"))
    for changes in ({}, {"seed": 3, "stored_views": "drawn", "method": "seed", "epochs": 9}):
        assert torch.equal(prepared(data, tmp_path, **changes)[1].seen.views, first.seen.views)


def test_an_interrupted_pass_goes_on_in_the_space_it_began_in(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared(data, tmp_path / "whole")[1].seen
    with interrupted_at(monkeypatch, augment, "apply", 4), pytest.raises(KeyboardInterrupt):
        prepared(data, tmp_path / "parts")
    monkeypatch.setattr(targets, "target_space", turned(targets.target_space))
    assert torch.equal(prepared(data, tmp_path / "parts")[1].seen.views, whole.views)


def test_views_whose_space_is_lost_are_made_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(data, tmp_path)[1].seen.views.clone()
    (home,) = kept(tmp_path)
    (home / "space.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(targets, "target_space", turned(targets.target_space))
    found = prepared(data, tmp_path)[1].seen.views
    assert torch.equal(found[..., 0], -first[..., 0]) and torch.equal(found[..., 1:], first[..., 1:])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"bags": "adaptive"}, {"duplicates": "near", "target_dim": 64}], ids=str)
def test_a_run_learns_as_one_with_float16_does_and_goes_on_as_it_was(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With copies of some: the anchors, of which a target has one dimension less at most, are fewer than the images."""
    data, losses = photos(tmp_path / "photos", 6), {}
    for file in sorted(data.glob("kind0/*"))[:4]:
        (data / "kind0" / f"again{file.name}").write_bytes(file.read_bytes())
    for kind in ("float16", "int8"):
        chosen = recipe(data=str(data), **{"epochs": 2, "stored_as": kind, **changes})
        run = pipeline.run_distill(chosen, tmp_path / kind)
        losses[kind] = [json.loads(line)["loss"] for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    counted = json.loads(run.summary.read_text(encoding="utf-8"))["images"]
    assert counted["scenes"] < counted["training"] + counted["held_out"]
    assert losses["int8"] != losses["float16"]
    assert losses["int8"] == pytest.approx(losses["float16"], rel=0.02, abs=0.01)
    parts = tmp_path / "parts"
    with interrupted_at(monkeypatch, augment, "apply", 9), pytest.raises(KeyboardInterrupt):
        pipeline.run_distill(chosen, parts)
    made = checkpoint.load(pipeline.run_distill(chosen, parts, resume=True).student)[0]
    expected = checkpoint.load(run.student)[0]
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
