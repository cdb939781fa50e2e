"""Near-copies in training: no negatives of one another, and with duplicates=near one of each scene an epoch; without
near-copies all as before.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, encoder, filled_store, kind_targets, photos, planned, recipe

from bingo_compress.data import listing
from bingo_compress.features import near_copies, targets
from bingo_compress.features.bagging import knn
from bingo_compress.models import trained
from bingo_compress.training import loop, material
from bingo_compress.training.loader import Lessons, Maker, anchors_of, shown_in
from bingo_compress.training.metrics import Meter
from bingo_compress.training.plan import plan_run, settle
from bingo_compress.training.state import FeatureQueue

SCENES = torch.tensor([0, 0, 2, 0, 4, 2, 6, 7, 0, 9])
SIZES = {0: 4, 2: 2, 4: 1, 6: 1, 7: 1, 9: 1}


def lessons(scenes: torch.Tensor | None, **more: Any) -> Lessons:
    store, count = filled_store(10, 8), 10
    bags = torch.tensor([[(image + 4) % 10, -1] for image in range(10)])
    source = targets.StoredTargets(kind_targets(count, 2, 16), targets.TargetSpace(None, None), CPU)
    return Lessons(store, torch.arange(count), bags, source, scenes=scenes, **more)


def test_a_near_copy_is_no_negative_of_its_anchor() -> None:
    chosen = recipe(batch_size=10, epochs=2)
    taught = lessons(SCENES)
    make = Maker(planned(chosen, 10), taught, 32, Meter(CPU))
    queue = FeatureQueue(10, 16, CPU)
    first = make(0, taught.bags)
    queue.push(torch.zeros(10, 16), first.scenes)
    then = make(1, taught.bags)
    masked = queue.holding(then.known)
    for row, anchor in enumerate(then.anchors.tolist()):
        own, mate = int(SCENES[anchor]), int(SCENES[(anchor + 4) % 10])
        left_out = [int(SCENES[earlier]) in (own, mate) for earlier in first.anchors.tolist()]
        assert masked[row].tolist() == left_out


def test_each_scene_is_an_anchor_once_an_epoch_and_each_of_its_images_in_turn() -> None:
    chosen = recipe(batch_size=3, epochs=8, duplicates="near", bag_size=2)
    taught, plan = lessons(SCENES), planned(chosen, 6)
    shown = torch.cat([shown_in(plan, taught, step) for step in range(plan.schedule.steps)]).split(6)
    assert len(shown) == 8
    for epoch in shown:
        assert sorted(SCENES[epoch].tolist()) == sorted(SIZES)
    seen: dict[int, list[int]] = {}
    for image in torch.cat(shown).tolist():
        seen.setdefault(int(SCENES[image]), []).append(image)
    for scene, size in SIZES.items():
        assert {seen[scene].count(image) for image in set(seen[scene])} == {8 // size}
        assert len(set(seen[scene][:size])) == size


def test_without_near_copies_duplicates_near_changes_nothing() -> None:
    plan = planned(recipe(batch_size=4, duplicates="near"), 10)
    for step in range(5):
        wanted = anchors_of(0, step, 4, 10)
        assert torch.equal(shown_in(plan, lessons(None), step), wanted)
        assert torch.equal(shown_in(plan, lessons(torch.arange(10)), step), wanted)


@pytest.mark.parametrize("method", ["bingo", "self"])
def test_without_near_copies_a_student_is_the_same_to_the_last_bit(method: str, tmp_path: Path) -> None:
    made = []
    for name, scenes in {"before": None, "after": torch.arange(10)}.items():
        student = encoder("test_efficientnet")
        files = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.safetensors"
        loop.distill(planned(recipe(epochs=3, method=method, rebag_epochs=1), 10), student, lessons(scenes), *files)
        made.append(student.backbone.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_students_own_bags_are_of_other_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt: list[torch.Tensor] = []

    def over(make: Any, scenes: torch.Tensor) -> torch.Tensor:
        rebuilt.append(near_copies.within(scenes, torch.arange(len(scenes))))
        return knn(torch.rand(10, 4), 2)[0]

    monkeypatch.setattr(loop, "over_scenes", over)
    chosen = recipe(epochs=2, method="self", rebag_epochs=1, bag_size=2)
    files = tmp_path / "metrics.jsonl", tmp_path / "state.safetensors"
    loop.distill(planned(chosen, 10), encoder("test_efficientnet"), lessons(SCENES), *files)
    assert rebuilt and all(torch.equal(scenes, SCENES) for scenes in rebuilt)


def test_scenes_are_kept_and_a_run_that_goes_on_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settle(recipe(data=str(photos(tmp_path / "photos", 4))))
    models, listed = trained.build_models(settings), listing.list_images(tmp_path / "photos")
    (tmp_path / "work").mkdir()
    plan = plan_run(models, len(listed.files), CPU)
    scenes = torch.arange(12) // 2 * 2
    monkeypatch.setattr(near_copies, "find", lambda *_: scenes)
    found = material.prepare(plan, models, listed, tmp_path / "work")
    assert torch.equal(found.scenes, scenes) and "near-copies" in found.sources
    assert material.anchors_count(plan, found) == len(found.training)
    near = plan_run(trained.build_models(settings.model_copy(update={"duplicates": "near"})), 12, CPU)
    assert material.anchors_count(near, found) == len(scenes[found.training].unique())
    bags = material.make_bags(plan, models.teacher, found)
    own = scenes[found.training]
    assert not (own[bags.clamp(min=0)] == own[:, None])[bags >= 0].any()
    monkeypatch.setattr(near_copies, "find", lambda *_: pytest.fail("looked for again"))
    again = material.prepare(plan, models, listed, tmp_path / "work")
    assert torch.equal(again.scenes, scenes) and again.sources == found.sources
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(near_copies, "find", lambda *_: torch.arange(12))
    assert "near-copies" not in material.prepare(plan, models, listed, tmp_path / "other").sources
