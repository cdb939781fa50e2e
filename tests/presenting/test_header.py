"""How each model sees a picture: said before a run begins, and the same for the student that a run leaves."""

import io
from pathlib import Path

import pytest
import timm
import torch
from helpers import CPU, photos, recipe

from bingo_compress.data import listing
from bingo_compress.models import trained
from bingo_compress.presenting.tables import header
from bingo_compress.training.plan import plan_run

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    """A DINO training's file of a model that timm itself normalises with 0.5."""
    trunk = {
        f"backbone.{key}": value
        for key, value in timm.create_model("test_vit", num_classes=0, img_size=32).state_dict().items()
    }
    torch.save({"teacher": trunk, "student": trunk}, tmp_path / "dino.pth")
    return tmp_path / "dino.pth"


def test_the_header_says_how_each_model_sees_a_picture(dino: Path, tmp_path: Path, printed: io.StringIO) -> None:
    settings = recipe(teacher="test_vit", teacher_weights=str(dino))
    models = trained.build_models(settings)
    listed = listing.list_images(photos(tmp_path / "photos", 2))
    header(plan_run(models, len(listed.files), CPU), models, listed)
    said = printed.getvalue()
    assert (
        "teacher sees: the centred 0.95 of the short side, bicubic to 32 px, less mean 0.485 0.456 0.406, by std 0.229"
        " 0.224 0.225" in said
    )
    assert f"student sees: {models.student.preprocessing.describe()}" in said
    assert f"{dino} holds weights under teacher and student; those under teacher are taken" in said
    assert "6 files in" in said and "method: bingo" in said


def test_a_student_that_began_with_a_methods_file_keeps_its_normalisation(dino: Path, tmp_path: Path) -> None:
    settings = recipe(student="test_vit", student_weights=str(dino))
    student = trained.build_models(settings).student
    assert timm.models.get_pretrained_cfg("test_vit").mean == (0.5, 0.5, 0.5)
    assert (student.preprocessing.mean, student.preprocessing.std) == IMAGENET
    trained.save_start(student, tmp_path / "student.safetensors", settings)
    found = trained.load_student(settings, tmp_path / "student.safetensors")
    assert found.preprocessing == student.preprocessing and not found.training
    views = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(found(views), student(views))


@pytest.mark.parametrize("file", ["student.safetensors", "timm/model.safetensors"])
def test_a_student_of_a_run_as_anothers_start_or_teacher_sees_as_it_was_trained(
    file: str, dino: Path, tmp_path: Path, printed: io.StringIO
) -> None:
    """It began with a method's file, whose mean is not timm's."""
    settings = recipe(student="test_vit", student_weights=str(dino))
    student = trained.build_models(settings).student
    trained.save_start(student, tmp_path / "student.safetensors", settings)
    student.save_timm(tmp_path / "timm")
    found = trained.build("test_vit", 32, str(tmp_path / file), "--teacher-weights")
    assert found.preprocessing == student.preprocessing
    assert "its file says that it sees the centred" in " ".join(printed.getvalue().split())


def test_weights_that_only_their_prefix_takes_for_a_methods_are_said_to_be(
    tmp_path: Path, printed: io.StringIO
) -> None:
    tensors = trained.build("test_vit", 32, "random", "--test").backbone.state_dict()
    torch.save({f"backbone.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "last.ckpt")
    trained.build("test_vit", 32, str(tmp_path / "last.ckpt"), "--teacher-weights")
    assert "it is laid out like DINO's, which sees" in " ".join(printed.getvalue().split())
