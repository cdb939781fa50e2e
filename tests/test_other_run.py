"""A run goes on, and is proven, with what it was made from and with nothing else; and an arm of a comparison is the
same run as `distill`.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import encoder, photos, recipe

from bingo_compress import pipeline, validation
from bingo_compress.comparison import side_by_side
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import held_out
from bingo_compress.models import trained
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import checkpoint
from bingo_compress.training import loop

SAVES = {"save_every_steps": 1, "batch_size": 8}


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """tmp_path/run: interrupted after three steps, on tmp_path/photos, with weights from the files teacher.safetensors
    and student.safetensors.
    """
    for name, model in (("teacher", "test_resnet"), ("student", "test_efficientnet")):
        save_weights(tmp_path / f"{name}.safetensors", model, seed=1)
    settings = recipe(
        data=str(photos(tmp_path / "photos", 8)),
        teacher_weights=str(tmp_path / "teacher.safetensors"),
        student_weights=str(tmp_path / "student.safetensors"),
        **SAVES,
    )
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "distill", partial(loop.distill, stop_after=3))
        pipeline.run_distill(settings, tmp_path / "run")
    (tmp_path / "run" / "student.safetensors").unlink()
    return settings


def save_weights(file: Path, model: str, seed: int) -> None:
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in encoder(model, 32, seed).backbone.state_dict().items()}, file
    )


def another_folder(folder: Path, settings: Recipe) -> Recipe:
    return settings.model_copy(update={"data": str(photos(folder / "others", 8, start=40))})


def one_picture(folder: Path, settings: Recipe) -> Recipe:
    """Replaced by another of the same size, its time set back."""
    file = folder / "photos" / "kind1" / "003.png"
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-20] ^= 1  # within the checksum of the last chunk: Pillow reads it all the same
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return settings


def teacher_file(folder: Path, settings: Recipe) -> Recipe:
    save_weights(folder / "teacher.safetensors", "test_resnet", seed=2)
    return settings


def start_file(folder: Path, settings: Recipe) -> Recipe:
    save_weights(folder / "student.safetensors", "test_efficientnet", seed=2)
    return settings


def another_methods_work(folder: Path, settings: Recipe) -> Recipe:
    other = settings.model_copy(update={"method": "seed"})
    pipeline.run_distill(other, folder / "other")
    shutil.rmtree(folder / "run" / "work")
    shutil.copytree(folder / "other" / "work", folder / "run" / "work")
    return settings


def contents(run: Path) -> dict[str, bytes]:
    """Of what a refused command must leave as it is: all but the lock, and caches that are made again."""
    kept = (
        "recipe.yaml",
        "metrics.jsonl",
        "quarantine.csv",
        "work/checkpoint.safetensors",
        "work/checkpoint-before.safetensors",
        "work/bags.safetensors",
    )
    return {name: (run / name).read_bytes() for name in kept}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (another_folder, "images"),
        (one_picture, "images"),
        (teacher_file, "teacher"),
        (start_file, "start"),
        (another_methods_work, r"method \(seed -> bingo\)"),
    ],
)
def test_resume_refuses_the_state_of_another_run_and_leaves_it(
    change: Callable[[Path, Recipe], Recipe], named: str, begun: Recipe, tmp_path: Path
) -> None:
    now = change(tmp_path, begun)
    before = contents(tmp_path / "run")
    with pytest.raises(BingoError, match=rf"--resume: .* is of another run; what differs: .*{named}"):
        pipeline.run_distill(now, tmp_path / "run", resume=True)
    after = contents(tmp_path / "run")
    assert after == before


@pytest.mark.slow
def test_photos_and_weights_that_moved_are_the_same_run(begun: Recipe, tmp_path: Path) -> None:
    pipeline.run_distill(begun, tmp_path / "whole")
    (tmp_path / "photos").rename(tmp_path / "moved")
    run = pipeline.run_distill(
        begun.model_copy(update={"data": str(tmp_path / "moved")}), tmp_path / "run", resume=True
    )
    one, other = (checkpoint.load(path / "student.safetensors")[0] for path in (run.path, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_a_proof_refuses_another_teacher_and_another_start(begun: Recipe, tmp_path: Path) -> None:
    run = pipeline.run_distill(begun, tmp_path / "run", resume=True)
    teacher_file(tmp_path, begun)
    with pytest.raises(BingoError, match=r"has other weights now than this run was distilled from"):
        validation.validate(run.path, tmp_path / "photos")
    save_weights(tmp_path / "teacher.safetensors", "test_resnet", seed=1)
    trained.save_start(encoder("test_efficientnet", 32, seed=9), run.start, begun)
    with pytest.raises(BingoError, match=r"start.safetensors is not what this run began with"):
        validation.validate(run.path, tmp_path / "photos")
    trained.save_start(encoder("test_efficientnet", 32, seed=1), run.start, begun)
    tensors, facts = checkpoint.load(run.bags)
    checkpoint.save(run.bags, {"bags": tensors["bags"].flip(1)}, **facts)
    with pytest.raises(BingoError, match=r"bags.safetensors is not what this run was distilled with"):
        validation.validate(run.path, tmp_path / "photos")


# ---------------------------------------------------------------- compare


@pytest.mark.slow
def test_every_arm_and_seed_of_a_comparison_is_the_same_distillation_bit_for_bit(tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 8)
    base = recipe(data=str(data), **SAVES)  # every arm saves more than twice
    side_by_side.compare(base, data, None, "bingo,seed,moco", [0, 1], tmp_path / "compared")
    for method in ("bingo", "seed", "moco"):
        for seed in (0, 1):
            run = pipeline.run_distill(
                base.model_copy(update={"method": method, "seed": seed}), tmp_path / f"{method}{seed}"
            )
            alone = checkpoint.load(run.student)[0]
            arm = checkpoint.load(tmp_path / "compared" / "runs" / f"{method}-seed{seed}.student.safetensors")[0]
            assert all(torch.equal(arm[name], alone[name]) for name in alone), (method, seed)
    assert not list((tmp_path / "compared" / "work").glob("checkpoint*"))


@pytest.mark.slow
def test_what_an_earlier_version_trained_is_told_and_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = photos(tmp_path / "photos", 8), tmp_path / "compared"
    base = recipe(data=str(data), epochs=1)
    side_by_side.compare(base, data, None, "bingo", [0], out)
    wanted = {}
    for name in ("student", "figures"):
        file = out / "runs" / f"bingo-seed0.{name}.safetensors"
        tensors, facts = checkpoint.load(file)
        wanted[name] = tensors
        facts.pop("made_of")
        checkpoint.save(file, {key: torch.zeros_like(value) for key, value in tensors.items()}, **facts)
    # and the saves of an arm that was killed
    checkpoint.save(out / "work" / "checkpoint-before.safetensors", wanted["student"], step=1, steps=2, best_score=-1.0)
    capsys.readouterr()
    side_by_side.compare(base, data, None, "bingo", [0], out)
    said = capsys.readouterr().out
    assert said.count("was made from something else (the version of this program): it is made again") == 2
    assert "checkpoint.safetensors is of another run and is deleted" in said
    found = checkpoint.load(out / "runs" / "bingo-seed0.student.safetensors")[0]
    assert all(torch.equal(found[name], wanted["student"][name]) for name in found)
