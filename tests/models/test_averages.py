"""Files with a moving average beside the weights, and wrappers of other names: which was taken is said."""

import io
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from helpers import recipe
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from bingo_compress.comparison.arms import make_arms
from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import build
from bingo_compress.models.trained import build_student, build_teacher
from bingo_compress.unread import refuse_unread

Tensors = dict[str, Tensor]
OPTION = "--teacher-weights"


@pytest.fixture(scope="module")
def both() -> tuple[Tensors, Tensors]:
    """Weights of a test_resnet, and another's, for their average."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(dict(timm.create_model("test_resnet", num_classes=10).state_dict()))
    return made[0], made[1]


def loaded(content: Any, folder: Path, ema: bool = False) -> Tensors:
    torch.save(content, folder / "w.ckpt")
    return build("test_resnet", 0, str(folder / "w.ckpt"), OPTION, ema).backbone.state_dict()


def same(found: Tensors, wanted: Tensors) -> bool:
    return all(torch.equal(found[key], wanted[key]) for key in found)


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: value for key, value in tensors.items()}


LAYOUTS = {
    "timm's": lambda plain, average: {"epoch": 1, "state_dict": plain, "state_dict_ema": average, "optimizer": {}},
    "others'": lambda plain, average: {"model": plain, "model_ema": average},
    "diffusers'": lambda plain, average: {"params": plain, "params_ema": average},
    "below": lambda plain, average: {"model": plain, "ema": {"decay": 0.999, "shadow": average}},
    "in one": lambda plain, average: {"state_dict": under("model.", plain) | under("model_ema.module.", average)},
    "in one, wrapped": lambda plain, average: under("module.net.", plain) | under("module.ema_net.", average),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_as_trained_are_taken_and_ema_true_takes_their_average(
    layout: str, both: tuple[Tensors, Tensors], tmp_path: Path, printed: io.StringIO
) -> None:
    plain, average = both
    content = LAYOUTS[layout](plain, average)
    assert same(loaded(content, tmp_path), plain)
    assert "are taken (as they were trained; --set ema=true takes the other)" in printed.getvalue()
    assert same(loaded(content, tmp_path, ema=True), average)
    assert "are taken (a moving average; --set ema=false takes the other)" in printed.getvalue()
    assert "no moving average" not in printed.getvalue()


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_of_student_and_teacher_the_teacher_is_taken(
    ema: bool, prefix: str, both: tuple[Tensors, Tensors], tmp_path: Path, printed: io.StringIO
) -> None:
    plain, average = both
    assert same(loaded({"student": under(prefix, plain), "teacher": average}, tmp_path, ema=ema), average)
    assert "those under teacher are taken, the moving average that its method is judged by" in printed.getvalue()


@pytest.mark.parametrize("ema", [False, True])
def test_of_one_alone_that_one_is_taken_and_said(
    ema: bool, both: tuple[Tensors, Tensors], tmp_path: Path, printed: io.StringIO
) -> None:
    assert same(loaded({"model_ema": both[1]}, tmp_path, ema=ema), both[1])
    assert "those under model_ema are taken: there is nothing but a moving average" in printed.getvalue()
    assert same(loaded({"model": both[0]}, tmp_path, ema=ema), both[0])
    assert ("holds no moving average; its weights are taken as they were trained" in printed.getvalue()) == ema


def test_settings_of_an_average_are_no_weights(both: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    assert same(loaded({"model": both[0], "ema": {"decay": 0.999}, "model_ema": None}, tmp_path), both[0])


def test_torchs_own_average_is_loaded(both: tuple[Tensors, Tensors], tmp_path: Path, printed: io.StringIO) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    model.load_state_dict(both[0])
    averaged = AveragedModel(model).state_dict()
    assert "n_averaged" in averaged and same(loaded(averaged, tmp_path, ema=True), both[0])
    assert "no moving average" not in printed.getvalue()


def test_both_roles_read_the_setting(both: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    torch.save({"model": both[0], "model_ema": both[1]}, tmp_path / "w.pth")
    file = str(tmp_path / "w.pth")
    for ema, wanted in ((True, both[1]), (False, both[0])):
        chosen = recipe(
            teacher="test_resnet", student="test_resnet", teacher_weights=file, student_weights=file, ema=ema
        )
        assert same(build_teacher(chosen).backbone.state_dict(), wanted)
        assert same(build_student(chosen, file, "student").backbone.state_dict(), wanted)
        refuse_unread([chosen], {"ema": ema}, "here")
    with pytest.raises(BingoError, match="found ema=True, read only by a file of weights"):
        refuse_unread([recipe(ema=True)], {"ema": True}, "here")


def test_all_arms_of_a_comparison_take_the_same_of_the_two() -> None:
    with pytest.raises(BingoError, match=r"ema.*same for all arms"):  # their teacher is embedded once
        make_arms("bingo,bingo:ema=true", recipe())


# ---------------------------------------------------------------- wrappers of other names


def lightning(state: Tensors, **more: Any) -> dict[str, Any]:
    """A checkpoint as Lightning's trainer writes one."""
    saver = {"monitor": "loss", "best_model_score": torch.tensor(0.5), "best_k_models": {"a.ckpt": torch.tensor(0.5)}}
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}}
    return {
        "epoch": 3,
        "global_step": 30,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": saver},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "classes": ["a", "b"]},
        **more,
    }


@pytest.mark.parametrize("prefix", ["model.", "net.", "encoder.backbone.", "model._orig_mod."])
def test_a_checkpoint_of_lightning_is_loaded(prefix: str, both: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    assert same(loaded(lightning(under(prefix, both[0])), tmp_path), both[0])


def test_a_model_as_transformers_wraps_timms_is_loaded(both: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(under("timm_model.", both[0]), file, metadata={"format": "pt"})
    assert same(build("test_resnet", 0, str(file), OPTION).backbone.state_dict(), both[0])


@pytest.mark.parametrize("name", ["model_state_dict", "net", "weights", "backbone"])
def test_the_one_place_for_weights_is_opened_whatever_its_name(
    name: str, both: tuple[Tensors, Tensors], tmp_path: Path, printed: io.StringIO
) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": []}
    assert same(loaded({"epoch": 1, name: both[0], "optimizer_state_dict": optimizer}, tmp_path), both[0])
    assert f"holds weights under {name}; those under {name} are taken" in printed.getvalue()


@pytest.mark.parametrize(
    "more",
    [
        lambda state: {"first": state, "second": state},
        lambda state: {"model": state, "second": state},
        lambda state: {"second": state} | state,
    ],
)
def test_more_places_than_one_are_named_and_refused(more: Any, both: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    with pytest.raises(BingoError, match=r"expected the weights of .* in one place, found more in .*second"):
        loaded(more(both[0]), tmp_path)
