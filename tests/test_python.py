"""The way in from Python: the words of the command line, results to go on with, and models of the user's own."""

import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import typer
from helpers import TINY, photos
from torch import Tensor, nn

import bingo_compress
from bingo_compress import BingoError, Encoder, Preprocessing, Recipe, api, cli, options
from bingo_compress.models import trained
from bingo_compress.recipe import GIVEN, load_recipe
from bingo_compress.runtime import checkpoint

SEES = Preprocessing(32, 0.9, "bicubic", "center", (0.5, 0.4, 0.3), (0.2, 0.3, 0.2))
OF_OWN = {"batch_size", "bag_size", "views", "epochs", "threads", "device"}  # words of TINY that are no model's


class Small(nn.Module):
    """A network that no list of models has: convolutions, BatchNorm, and a parameter that no layer draws."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.last, self.token = nn.Conv2d(16, width, 3, 2, 1), nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.last(torch.relu(self.norm(self.stem(images))))).mean((2, 3)) + self.token


def own(name: str, width: int = 24, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(name, Small(width), SEES)


class Made(NamedTuple):
    """A finished run of two models of the user's own."""

    run: Path
    data: Path
    teacher: Encoder
    student: Encoder
    result: api.Distilled


def quick() -> dict[str, Any]:
    return {key: TINY[key] for key in OF_OWN} | {"settings": {"head_hidden": 32, "target_dim": 16}, "progress": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("own")
    data, teacher, student = photos(root / "photos", 6), own("pathology", 40, 1), own("hand-made")
    result = bingo_compress.distill(data=data, teacher=teacher, student=student, out=root / "run", **quick())
    return Made(root / "run", data, teacher, student, result)


@pytest.fixture
def made(finished: Made, tmp_path: Path) -> Made:
    shutil.copytree(finished.run, tmp_path / "run")
    return finished._replace(run=tmp_path / "run")


# ---------------------------------------------------------------- the words


def test_the_package_is_imported_without_torch_and_its_names_without_a_model() -> None:
    code = (
        "import sys, bingo_compress; heavy = {'torch', 'timm', 'numpy', 'pydantic', 'typer'} & sys.modules.keys()\n"
        "from bingo_compress import distill, validate, export, compare, check, latency, suggest, Recipe, load_student\n"
        "print(sorted(heavy), 'torch' in sys.modules, sorted(set(bingo_compress.__all__) - set(dir(bingo_compress))))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[] False []"
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = bingo_compress.distil  # type: ignore[attr-defined]
    assert (Path(bingo_compress.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", ["check", "distill", "compare", "validate", "export", "latency", "suggest"])
def test_the_words_are_those_of_the_command_line(name: str) -> None:
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    asked = {parameter.name for parameter in command.params}
    python = set(inspect.signature(getattr(bingo_compress, name)).parameters)
    mine = {"progress"} | ({"teacher", "student"} if name == "validate" else {"student"} if name == "export" else set())
    only_tried = {"dry_run", "images"} if name == "distill" else set()
    assert python == (asked - only_tried) | mine


def test_a_word_that_is_none_is_refused_by_its_name() -> None:
    with pytest.raises(TypeError, match="'lable'"):
        bingo_compress.validate(run="x", data="y", lable=1)  # type: ignore[call-arg]


def test_a_recipe_or_a_name_of_one_and_settings_over_it(tmp_path: Path) -> None:
    base = Recipe(data=str(tmp_path), teacher="a", student="b", epochs=3, lr=0.5)
    words = options.Distill(recipe=base, epochs=2, settings={"lr": 0.25, "views": 2}, out=tmp_path)
    assert api._recipe(words) == base.model_copy(update={"epochs": 2, "lr": 0.25, "views": "2"})
    assert api._recipe(options.Distill(recipe="demo", seed=7)).seed == 7
    with pytest.raises(BingoError, match="unknown key 'lrr'"):
        api._recipe(options.Distill(settings={"lrr": 1}))


def test_quiet_for_a_call_and_no_longer(finished: Made, capfd: pytest.CaptureFixture[str]) -> None:
    found = bingo_compress.check(data=finished.data, progress=False)
    assert capfd.readouterr().out == ""
    assert (found.images, found.bad, found.copies) == (18, (), ()) and found.short_sides[0] == 36
    assert found.classes == {"kind0": 6, "kind1": 6, "kind2": 6}
    bingo_compress.check(data=str(finished.data))
    assert "18 usable images" in capfd.readouterr().out
    with pytest.raises(FrozenInstanceError):
        found.images = 3  # type: ignore[misc]


# ---------------------------------------------------------------- models of the user's own


def test_a_run_of_own_models_says_so_and_leaves_them_as_they_are(finished: Made) -> None:
    for given, width, seed in ((finished.teacher, 40, 1), (finished.student, 24, 0)):
        for key, value in own("again", width, seed).state_dict().items():
            assert torch.equal(value, given.state_dict()[key]), key
    recipe = load_recipe(finished.run / "recipe.yaml", [], {})
    assert (recipe.teacher, recipe.student) == ("pathology", "hand-made")
    assert recipe.teacher_weights == recipe.student_weights == GIVEN
    assert finished.result.timm is None and finished.result.student.is_file() and finished.result.run_id


def test_it_goes_on_with_the_same_modules_and_with_no_others(made: Made) -> None:
    before = made.result.student.read_bytes()
    (made.run / "student.safetensors").unlink()
    again = {"out": made.run, "resume": True, "progress": False}
    found = bingo_compress.distill(**again, teacher=made.teacher, student=made.student)
    assert trained.checkpoint.load(found.student)[0].keys() == trained.checkpoint.load(made.result.student)[0].keys()
    assert found.run_id == made.result.run_id and made.result.student.read_bytes() == before
    with pytest.raises(BingoError, match="what differs: start"):
        bingo_compress.distill(**again, teacher=made.teacher, student=own("hand-made", seed=5))
    with pytest.raises(BingoError, match="what differs: teacher"):
        bingo_compress.distill(**again, teacher=own("pathology", 40, 2), student=made.student)
    with pytest.raises(BingoError, match=r"--teacher: pathology is a module of your own.*teacher=Encoder"):
        bingo_compress.distill(**again, student=made.student)


def test_its_student_is_read_back_into_the_module_given(made: Made) -> None:
    student = bingo_compress.load_student(made.run, made.student)
    stored = trained.checkpoint.load(made.run / "student.safetensors")[0]
    assert all(torch.equal(value, stored[key]) for key, value in student.backbone.state_dict().items())
    assert student is not made.student and student.preprocessing == SEES and not student.training
    with pytest.raises(BingoError, match=r"does not fit hand-made.*token.*\[24\].*\[25\]"):
        bingo_compress.load_student(made.run, own("hand-made", 25))
    with pytest.raises(BingoError, match="hand-made is a module of your own"):
        bingo_compress.load_student(made.run)
    with pytest.raises(BingoError, match="hand-made: expected a model that timm can build"):
        student.save_timm(made.run / "folder")


@pytest.mark.slow
def test_it_is_proven_exported_and_timed(made: Made, tmp_path: Path) -> None:
    out = bingo_compress.export(run=made.run, student=made.student, progress=False)
    assert out.files == (made.run / "export" / "student.onnx",)
    assert "a module of the user's own" in out.card.read_text() and "with the same modules" in out.card.read_text()
    found = bingo_compress.validate(
        run=made.run,
        data=made.data,
        json=tmp_path / "proof.json",
        teacher=made.teacher,
        student=made.student,
        progress=False,
    )
    assert found.figures.keys() == {"teacher", "student", "start", "random", "onnx"}
    assert json.loads((tmp_path / "proof.json").read_text()) == json.loads(found.file.read_text())
    for row in found.rows:
        assert found.figures[row["name"]]["knn"] == (row["knn"], *row["knn_interval"])
    (timing,) = bingo_compress.latency(models=out.files, runs=9, warm_up=1, threads=[1], progress=False)
    assert timing.file == "student.onnx" and timing.p50_ratio == (1, 1, 1) and timing.p50_ms <= timing.p99_ms
    with pytest.raises(BingoError, match="--teacher: pathology"):
        bingo_compress.validate(run=made.run, data=made.data, student=made.student)


def test_the_command_line_says_what_it_cannot_build(made: Made, bingo: Any) -> None:
    for words in (
        ("export", "--run", made.run),
        ("validate", "--run", made.run, "--data", made.data),
        ("distill", "--out", made.run, "--resume"),
    ):
        ran = bingo(*words)
        assert ran.status == 2 and ran.err.count("\n") == 1 and "is a module of your own" in ran.err


def test_a_module_that_nobody_asked_for_or_with_tied_tensors_is_refused(made: Made, tmp_path: Path) -> None:
    tied = own("tied")
    tied.backbone.norm.running_var = tied.backbone.norm.running_mean
    with pytest.raises(BingoError, match="untie"):
        bingo_compress.load_student(made.run, tied)
    recipe = made.run / "recipe.yaml"
    for file in (recipe, made.run / "resolved.yaml"):
        file.write_text(file.read_text().replace("student_weights: given", "student_weights: random"))
    with pytest.raises(BingoError, match="student: expected no module"):
        bingo_compress.load_student(made.run, made.student)


def test_random_weights_of_an_own_module_are_random() -> None:
    module = own("x", seed=3).backbone
    before = {key: value.clone() for key, value in module.state_dict().items()}
    torch.manual_seed(0)
    trained.redraw(module)
    after = module.state_dict()
    assert not torch.equal(after["stem.weight"], before["stem.weight"])
    assert not torch.equal(after["token"], before["token"])
    assert torch.equal(after["token"].sort().values, before["token"])
    assert float(after["stem.weight"].std()) == pytest.approx(float(before["stem.weight"].std()), rel=0.3)


# ---------------------------------------------------------------- for timm


@pytest.mark.parametrize(("name", "size"), [("test_efficientnet", 48), ("test_vit", 64), ("test_resnet", 32)])
def test_a_student_of_timms_is_a_model_of_timms_again(name: str, size: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    student = trained.build(name, size, "random", "--test").normalised_by(SEES.mean, SEES.std)
    folder = tmp_path / "folder" / "timm"
    student.save_timm(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    source = f"local-dir:{folder}"
    model, views = timm.create_model(source, pretrained=True).eval(), torch.rand(2, 3, size, size)
    assert torch.equal(model((views - student.mean) / student.std), student.eval()(views))
    sees = timm.data.resolve_model_data_config(model)
    assert tuple(sees["mean"]) == SEES.mean and tuple(sees["std"]) == SEES.std
    assert tuple(sees["input_size"]) == (3, size, size) and sees["crop_pct"] == student.preprocessing.crop_pct
    trunk = timm.create_model(source, pretrained=True, features_only=True).eval()
    maps = trunk((views - student.mean) / student.std)
    assert len(maps) > 2 and maps[-1].shape[0] == 2
    weights = student.backbone.state_dict()
    shared = {key: value for key, value in trunk.state_dict().items() if key.removeprefix("model.") in weights}
    assert shared and all(torch.equal(value, weights[key.removeprefix("model.")]) for key, value in shared.items())


@pytest.mark.slow
def test_a_run_has_a_folder_for_timm_of_just_its_student(tmp_path: Path) -> None:
    words = quick() | {
        "data": photos(tmp_path / "photos", 4),
        "teacher": "test_resnet",
        "student": "test_efficientnet",
        "teacher_weights": "random",
        "student_weights": "random",
        "teacher_size": 32,
        "image_size": 32,
        "out": tmp_path / "run",
    }
    first = bingo_compress.distill(**words)
    assert first.timm == tmp_path / "run" / "timm"
    views = torch.rand(2, 3, 32, 32)

    def as_timm_has_it() -> Tensor:
        model = timm.create_model(f"local-dir:{first.timm}", pretrained=True).eval()
        rule = timm.data.resolve_model_data_config(model)
        mean, std = (torch.tensor(rule[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        found: Tensor = model((views - mean) / std)
        return found.detach()

    student = bingo_compress.load_student(first.run)
    before = as_timm_has_it()
    assert torch.allclose(before, student(views).detach(), atol=1e-6)
    (first.timm / "of another one").write_text("stale")
    bingo_compress.distill(**words | {"seed": 1, "overwrite": True})
    assert not (first.timm / "of another one").exists()
    assert not torch.equal(as_timm_has_it(), before)
    assert torch.allclose(as_timm_has_it(), bingo_compress.load_student(first.run)(views).detach(), atol=1e-6)


class Pooled(nn.Module):
    """Two networks of the same weights, by how they pool."""

    def __init__(self, largest: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells, self.largest = nn.Conv2d(3, 16, 8, 8), largest

    def forward(self, views: Tensor) -> Tensor:
        found: Tensor = self.cells(views).flatten(2)
        return found.amax(2) if self.largest else found.mean(2)


@pytest.mark.slow
def test_a_teacher_of_the_same_weights_and_another_forward_is_another_teacher_when_begun_anew(tmp_path: Path) -> None:
    words = quick() | {
        "data": photos(tmp_path / "photos", 4),
        "student": "test_efficientnet",
        "student_weights": "random",
        "image_size": 32,
    }

    def weights(largest: bool, out: str, **more: Any) -> dict[str, Tensor]:
        teacher = Encoder("ours", Pooled(largest), SEES)
        run = bingo_compress.distill(**words, **more, teacher=teacher, out=tmp_path / out)
        return checkpoint.load(run.student)[0]

    weights(False, "one")
    again, clean = weights(True, "one", overwrite=True), weights(True, "other")
    assert all(torch.equal(again[name], clean[name]) for name in clean)


def test_going_on_and_beginning_anew_are_not_both_asked_for_with_a_recipe_either(tmp_path: Path) -> None:
    with pytest.raises(BingoError, match="found both"):
        bingo_compress.distill(recipe=Recipe(data="photos"), out=tmp_path / "run", resume=True, overwrite=True)


def test_the_folder_for_timm_goes_before_its_student_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained.RunDir(tmp_path)
    run.timm.mkdir()
    monkeypatch.setattr(trained.checkpoint, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    student = trained.build("test_resnet", 32, "random", "--test")
    with pytest.raises(KeyboardInterrupt):
        trained.save_student(student, run, Recipe(student="test_resnet"), trained.made_of("training"))
    assert not run.timm.exists()
