"""--dry-run against what a run then does: widths, teacher views, and how often the teacher is asked."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, encoder, photos, recipe, unit

from bingo_compress import budget, dry_run, pipeline
from bingo_compress.errors import BingoError
from bingo_compress.features import targets
from bingo_compress.runtime import checkpoint, console
from bingo_compress.training.plan import make_plan, shape_of


@pytest.mark.parametrize("count", [12, 60])
@pytest.mark.parametrize(
    ("method", "target"),
    [("bingo", kind) for kind in ("auto", "raw", "centred", "pca", "whitened")] + [("simreg", "auto")],
)
def test_the_width_of_a_target_is_that_of_the_target_made(method: str, target: str, count: int) -> None:
    chosen = recipe(method=method, target=target, target_dim=16)
    for projected in (False, True):
        teacher = encoder("test_resnet")
        if projected:
            teacher.projection = torch.nn.Linear(teacher.width, 24)
        seen = unit(count, teacher.width if method == "simreg" else teacher.embedding_width())
        plan = make_plan(chosen, count, CPU, shape_of(teacher))
        assert plan.dim == targets.target_space(seen, plan.target, chosen.target_dim)(seen[:1]).shape[1]


def told(monkeypatch: pytest.MonkeyPatch, data: Path, **changes: Any) -> tuple[dict[str, str], float]:
    """(rows of a dry run's tables, steps), where a view takes the teacher a second and nothing else takes any time."""
    rows: dict[str, str] = {}
    only_the_teacher = budget.Rates(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    monkeypatch.setattr(budget, "measure", lambda *_: only_the_teacher)
    monkeypatch.setattr(console, "table", lambda title, head, cells: rows.update({row[0]: row[1] for row in cells}))
    monkeypatch.setattr(console, "duration", lambda seconds: f"{seconds:g}")
    dry_run.estimate(recipe(data=str(data), hold_out=0.0, **changes), data / "out")
    (line,) = (name for name in rows if name.startswith("distil, "))
    return rows | {"distil": rows[line]}, float(line.split()[1].replace(",", ""))


def test_the_teacher_is_counted_as_often_as_it_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On 4500913 online views cost one target an anchor where the default takes two, and moco a teacher that it does
    not have.
    """
    data = photos(tmp_path / "photos", 4)
    for changes, each in (
        ({}, 2),
        ({"variant": "paper"}, 1),
        ({"variant": "official"}, 2),
        ({"method": "seed"}, 2),
        ({"method": "moco"}, 0),
    ):
        rows, steps = told(monkeypatch, data, views="online", **changes)
        assert float(rows["distil"]) == steps * 8 * each, changes
        assert rows["teacher, 1 views"] == "12"
    assert told(monkeypatch, data, views="2")[0]["teacher, 3 views"] == "36"
    rows, _ = told(monkeypatch, data, views="2", method="moco")
    assert (
        rows["teacher, 1 views"] == "12"
        and rows["stored targets, mapped from a file"] == console.size(0)
        and "the student's moving average" in rows
    )


def test_the_head_is_the_methods_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 4)
    first = {method: told(monkeypatch, data, method=method, head_hidden=2048)[0] for method in ("seed", "simreg")}
    sizes = {method: rows["student, head, gradients and optimiser"] for method, rows in first.items()}
    assert sizes["seed"] != sizes["simreg"]  # two layers and four


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"method": "simreg"}, {"method": "moco"}, {"target": "whitened", "target_dim": 9}, {"target": "whitened"}, {}],
    ids=str,
)
def test_a_dry_run_names_the_width_that_the_run_has(
    changes: dict[str, Any], tmp_path: Path, printed: io.StringIO
) -> None:
    """Neither said what a target is, nor how wide."""
    chosen = recipe(data=str(photos(tmp_path / "photos", 4)), **{"epochs": 1, "target_dim": 64, **changes})
    dry_run.estimate(chosen, tmp_path / "out")
    said = [line.split("; ")[-1] for line in printed.getvalue().splitlines() if " held out; " in line]
    pipeline.run_distill(chosen, tmp_path / "out")
    ran = [line.split("; ")[-1] for line in printed.getvalue().splitlines() if " held out; " in line]
    width = checkpoint.load(tmp_path / "out" / "work" / "checkpoint.safetensors")[0]["queue.rows"].shape[1]
    assert len(said) == 1 and ran == said * 2 and said[0].endswith(f", {width} wide")


def test_stored_views_are_as_wide_as_what_a_method_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """simreg stores backbone features, also of a teacher whose projection head makes narrower embeddings."""
    data, real = photos(tmp_path / "photos", 4), dry_run.build_models

    def projected(*chosen: Any) -> Any:
        models = real(*chosen)
        models.teacher.projection = torch.nn.Linear(models.teacher.width, 24)
        return models

    monkeypatch.setattr(dry_run, "build_models", projected)
    width = encoder("test_resnet").width
    for method, viewed in (("simreg", width), ("seed", 24)):
        rows, _ = told(monkeypatch, data, method=method, views="2")
        assert rows["teacher's embeddings"] == console.size(2 * 12 * (width + 24 + 2 * viewed))


def test_packed_views_are_as_wide_as_a_target_and_counted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """11 dimensions at most of 12 images; a byte each, two for the step and four for the closeness to the image."""
    rows, _ = told(monkeypatch, photos(tmp_path / "photos", 4), views="4", stored_as="int8")
    plain = 2 * 12 * 2 * encoder("test_resnet").width
    assert rows["stored targets, mapped from a file"] == console.size(12 * 4 * (11 + 2 + 4))
    assert rows["teacher's features and views, mapped while bags are made"] == console.size(plain)
    assert rows["teacher's embeddings"] == console.size(plain + 12 * 4 * (11 + 2 + 4))


def test_a_folder_of_as_many_images_as_one_says_is_refused_where_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = recipe(data=str(photos(tmp_path / "photos", 4)), pixels="disk", memory="4GB")
    monkeypatch.setattr(console, "table", lambda title, head, cells: rows.update({row[0]: row[1] for row in cells}))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9))
    rows: dict[str, str] = {}
    dry_run.estimate(chosen, tmp_path / "out", images=10_000)
    assert rows["pixel store, raw"] == console.size(10_000 * 4 * 40**2)
    with pytest.raises(BingoError, match=r"no space: the run needs .* are missing"):
        dry_run.estimate(chosen, tmp_path / "out", images=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**15, 0, 10**15))
    dry_run.estimate(chosen, tmp_path / "out", images=1_000_000)
    with pytest.raises(BingoError, match=r"memory: expected .* found 4 GB"):
        dry_run.estimate(chosen, tmp_path / "out", images=100_000_000)
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_the_mean_of_its_views_is_stored_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 4)
    for how, count in (("mean", 1), ("drawn", 4)):
        rows, _ = told(monkeypatch, data, views="4", stored_views=how)
        size = console.size(2 * 11 * 12 * count)  # the disk's row and memory's
        assert rows["stored targets"] == rows["stored targets, mapped from a file"] == size
