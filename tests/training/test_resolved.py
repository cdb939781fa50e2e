"""A run keeps what was asked for and what became of it apart: recipe.yaml and resolved.yaml, threads included."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import CPU, Ran, command, encoder, filled_store, flags, interrupted_at, kind_targets, photos, recipe

from bingo_compress import pipeline
from bingo_compress.comparison import side_by_side
from bingo_compress.data import augment
from bingo_compress.errors import BingoError
from bingo_compress.features.targets import OnlineTargets, StoredTargets, TargetSpace, target_space
from bingo_compress.models import names
from bingo_compress.recipe import load_recipe
from bingo_compress.runtime import devices, machine, run_dir
from bingo_compress.runtime.devices import use_threads
from bingo_compress.training import loop, plan
from bingo_compress.training.plan import resolve

RAW = TargetSpace(None, None)
OPEN = {"threads": 0, "image_size": 0, "epochs": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Photos, and a run on them with as much left open as there is; cut off before its first step, so that it costs
    next to nothing.
    """
    root = tmp_path_factory.mktemp("world")
    data = photos(root / "photos", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "choose_threads", lambda *_: 2)
        patch.setattr(loop, "learning_rate", stopped)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run_distill(recipe(data=str(data), **OPEN), root / "run")
    return data, root / "run"


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def run(world: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world[1], tmp_path / "run"))


@pytest.fixture
def bingo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    before = torch.get_num_threads()
    yield lambda *words: command(monkeypatch, capsys, *words)
    torch.set_num_threads(before)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "student.safetensors")


# ---------------------------------------------------------------- two files


@pytest.mark.slow
def test_the_recipe_is_kept_as_asked_for_and_as_run(world: Any) -> None:
    data, run = world
    assert load_recipe(run / "recipe.yaml", [], {}) == recipe(data=str(data.resolve()), **OPEN)
    was_run = load_recipe(run_dir.RunDir(run).as_run)
    assert was_run == load_recipe(run / "resolved.yaml", [], {})
    assert (was_run.temperature, was_run.stored_views, was_run.threads) == (0.2, "mean", 2)
    assert was_run.image_size == encoder("test_efficientnet", 0).preprocessing.size


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"method": "seed"}, {"variant": "paper"}, {"student": "test_vit"}, {"views": "online"}]
)
def test_a_runs_recipe_with_a_change_is_that_recipe_with_that_change(changes: dict[str, str], world: Any) -> None:
    data, run = world
    again = resolve(load_recipe(run / "recipe.yaml", [], changes))
    assert again == resolve(recipe(data=str(data.resolve()), **OPEN, **changes))
    assert again.teacher_temperature == (0.01 if "method" in changes else 0.1)


@pytest.mark.slow
def test_a_bare_resume_changes_neither_file_nor_the_runs_id(
    run: Path, bingo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "choose_threads", lambda *_: pytest.fail("timed anew"))
    files = [(run / name).read_text() for name in ("recipe.yaml", "resolved.yaml")]
    ids = []
    for _ in range(2):
        ran = bingo("distill", "--out", run, "--resume")
        assert ran.status == 0, ran.err
        assert [(run / name).read_text() for name in ("recipe.yaml", "resolved.yaml")] == files
        ids.append(json.loads((run / "summary.json").read_text())["run_id"])
    assert bingo("distill", "--out", run, "--resume", "--set", "save_every_steps=7").status == 0
    assert ids[0] == ids[1] == json.loads((run / "summary.json").read_text())["run_id"]


@pytest.mark.slow
def test_a_run_of_a_relative_folder_keeps_its_id_wherever_it_goes_on(
    world: Any, bingo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is named by a path is named wholly: images, and a file of weights."""
    (tmp_path / "elsewhere").mkdir()
    start = encoder("test_efficientnet", 32).backbone.state_dict()
    safetensors.torch.save_file({name: value.contiguous() for name, value in start.items()}, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(world[0])
    ids = []
    words = flags(data="photos", student_weights="w.safetensors", epochs=1)
    for place, given in ((tmp_path, words), (tmp_path / "elsewhere", ["--resume"]), (tmp_path, ["--resume"])):
        monkeypatch.chdir(place)
        ran = bingo("distill", "--out", tmp_path / "out", *given)
        assert ran.status == 0, ran.err
        ids.append(json.loads((tmp_path / "out" / "summary.json").read_text())["run_id"])
    assert len(set(ids)) == 1
    was_run = load_recipe(run_dir.RunDir(tmp_path / "out").as_run)
    assert Path(was_run.data).is_absolute() and was_run.student_weights == str(tmp_path / "w.safetensors")


@pytest.mark.slow
def test_what_a_newer_version_would_fill_in_otherwise_is_no_resume(
    run: Path, bingo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = plan.settled
    monkeypatch.setattr(plan, "settled", lambda *given: real(*given) | {"temperature": 0.3})
    ran = bingo("distill", "--out", run, "--resume")
    assert ran.status == 2 and "temperature: 0.2 -> 0.3" in ran.err and len(ran.err.splitlines()) == 1


@pytest.mark.slow
def test_a_run_of_an_earlier_version_has_one_file(run: Path, bingo: Any) -> None:
    (run / "resolved.yaml").replace(run / "recipe.yaml")
    was_run = load_recipe(run_dir.RunDir(run).as_run)
    assert was_run.temperature == 0.2
    assert bingo("distill", "--out", run, "--resume").status == 0
    assert load_recipe(run_dir.RunDir(run).as_run) == was_run


@pytest.mark.slow
def test_overwrite_leaves_nothing_of_the_earlier_recipe(run: Path) -> None:
    run_dir.open_new(run, resume=False, overwrite=True)
    assert not (run / "resolved.yaml").exists() and not (run / "recipe.yaml").exists()


# ---------------------------------------------------------------- threads


@pytest.mark.slow
def test_a_run_keeps_its_threads_when_it_goes_on(
    world: Any, run: Path, bingo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On 4500913 the machine was timed anew and a run begun on two threads ended on one."""
    monkeypatch.setattr(machine, "free_cores", lambda: 2)  # whatever this machine has, or is lent
    monkeypatch.setattr(devices, "choose_threads", lambda *_: 2)
    with interrupted_at(monkeypatch, loop, "learning_rate", 2):
        cut: Ran = bingo(
            "distill", "--out", tmp_path / "cut", "--recipe", run / "recipe.yaml", "--set", "save_every_steps=1"
        )
    assert cut.status == 130
    monkeypatch.setattr(devices, "choose_threads", lambda *_: 1)
    assert bingo("distill", "--out", tmp_path / "cut", "--resume").status == 0
    assert torch.get_num_threads() == 2
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["machine"]["threads"] == 2
    assert bingo("distill", "--out", run, "--resume").status == 0
    one, two = weights(tmp_path / "cut"), weights(run)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_fewer_cores_than_the_run_began_with_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "free_cores", lambda: 1)
    before = torch.get_num_threads()
    student = encoder("test_efficientnet")
    settled = use_threads(recipe(threads=0), student, 32, CPU, kept=2)
    assert (settled.threads, torch.get_num_threads()) == (2, 1)  # where there are two again, it is two
    assert "threads: 1 instead of the 2 that this run began with, there are no more cores" in capsys.readouterr().out
    assert use_threads(recipe(threads=1), student, 32, CPU, kept=2).threads == 1
    assert "as asked for" in capsys.readouterr().out
    for asked, kept in ((1, 1), (1, 0), (0, 1)):
        assert use_threads(recipe(threads=asked), student, 32, CPU, kept=kept).threads == 1
        assert "threads" not in capsys.readouterr().out
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_batch_is_the_same_whatever_the_threads_it_is_made_with() -> None:
    """So it does not matter whether a thread of one core makes it beside the student, or the trainer's own threads."""
    before, count = torch.get_num_threads(), 40
    targets, images = kind_targets(count, 3, 64), torch.arange(count)
    space, pixels = target_space(targets[:, 0].half(), "pca", 16), filled_store(count, 72)
    sources = (
        StoredTargets(targets.half(), space, CPU),
        OnlineTargets(encoder("test_resnet", 64), pixels, RAW, 0.2, CPU),
    )
    for source in sources:
        made = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(0)
            drawn = augment.draw(pixels.aspect, generator, 0.2)
            made.append((augment.apply(pixels.crops(images, drawn.box, 64), drawn), source(images, generator, images)))
        assert all(torch.equal(*pair) for other in made[1:] for pair in zip(made[0], other, strict=True))
    torch.set_num_threads(before)


# ---------------------------------------------------------------- a comparison


class Built(Exception):
    """In place of a model."""


def built(monkeypatch: pytest.MonkeyPatch, data: Path, methods: str, out: Path, **changes: Any) -> Any:
    """The first recipe that a comparison builds models of."""
    found = []

    def note(chosen: Any) -> None:
        found.append(chosen)
        raise Built

    monkeypatch.setattr(side_by_side, "build_models", note)
    with pytest.raises(Built):
        side_by_side.compare(recipe(data=str(data), **changes), data, None, methods, [0], out)
    return found[0]


@pytest.mark.slow
def test_an_arms_student_has_its_own_weights(
    world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 4500913 `auto` was what it is for the comparison's student, and resnet was looked for under that name."""
    monkeypatch.setattr(names, "has_pretrained", lambda name: name == "resnet50")
    methods = "bingo:student=resnet,bingo,bingo:student=test_vit"
    arm = built(monkeypatch, world[0], methods, tmp_path / "out", student_weights="auto")
    assert (arm.student, arm.student_weights) == ("resnet50", "pretrained")
    said = capsys.readouterr().out
    assert said.count("student: resnet means resnet50") == 1 and said.count("student weights:") == 3
    arm = built(
        monkeypatch, world[0], "bingo:student=test_vit", tmp_path / "other", student="resnet", student_weights="auto"
    )
    assert (arm.student, arm.student_weights) == ("test_vit", "random")


@pytest.mark.slow
def test_a_comparison_keeps_the_threads_of_each_student(
    world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, used = torch.get_num_threads(), list[tuple[str, int]]()

    def trained(models: Any, *_: object) -> None:
        used.append((models.student.name, torch.get_num_threads()))
        raise BingoError("not trained")

    counts = {"test_efficientnet": 1, "test_vit": 2}
    monkeypatch.setattr(devices, "choose_threads", lambda student, _: counts.pop(student.name))  # each is timed once
    monkeypatch.setattr(side_by_side, "prepare", lambda *_: None)
    monkeypatch.setattr(side_by_side, "_train", lambda _, models, *__: trained(models))
    base, out = recipe(data=str(world[0]), threads=0), tmp_path / "out"
    for methods in ("bingo", "bingo:student=test_vit", "seed", "bingo:student=test_vit", "moco"):
        with pytest.raises(BingoError):
            side_by_side.compare(base, world[0], None, methods, [0], out)
    torch.set_num_threads(before)
    assert used == [("test_efficientnet", 1), ("test_vit", 2)] * 2 + [("test_efficientnet", 1)]
