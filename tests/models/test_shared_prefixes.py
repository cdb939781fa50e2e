"""Weights as people have them: under prefixes that all names share, out of Lightning and solo-learn."""

from pathlib import Path

import pytest
import timm
import torch

from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import build


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(timm.create_model("test_resnet", num_classes=10).state_dict())


def loaded(file: Path) -> dict[str, torch.Tensor]:
    return build("test_resnet", 0, str(file), "--teacher-weights").backbone.state_dict()


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.", "timm_model.", "module._orig_mod.model.", "a.b."],
)
def test_what_stands_before_every_name_is_taken_off_and_said(
    prefix: str, state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"epoch": 1, "state_dict": {prefix + key: value for key, value in state.items()}}, tmp_path / "w.ckpt")
    found = loaded(tmp_path / "w.ckpt")
    assert all(torch.equal(found[key], state[key]) for key in found)
    assert f"{prefix} before every name is taken off" in " ".join(capsys.readouterr().out.split())


def test_a_backbone_under_that_name_is_loaded(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trunk = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    torch.save({f"model.{key}": value for key, value in trunk.items()}, tmp_path / "w.pth")
    found = loaded(tmp_path / "w.pth")
    assert all(torch.equal(found[key], state[key]) for key in found)


def test_names_that_fit_as_they_are_are_left_alone(
    state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state, tmp_path / "w.pth")
    loaded(tmp_path / "w.pth")
    assert "taken off" not in capsys.readouterr().out


@pytest.mark.parametrize("stray", ["criterion.weight", "model.extra.weight"])
def test_one_name_that_does_not_share_it_or_does_not_fit_is_an_error(
    stray: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({f"model.{key}": value for key, value in state.items()} | {stray: torch.ones(3)}, tmp_path / "w.pth")
    with pytest.raises(BingoError, match=r"unexpected|missing"):
        loaded(tmp_path / "w.pth")


def test_a_file_of_solo_learn_brings_its_projector(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trunk = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    width = timm.create_model("test_resnet", num_classes=0).num_features
    head = torch.nn.Sequential(
        torch.nn.Linear(width, 24), torch.nn.BatchNorm1d(24), torch.nn.ReLU(), torch.nn.Linear(24, 8)
    )
    beside = {"classifier.weight": torch.ones(10, width), "momentum_backbone.conv1.0.weight": torch.ones(1)}
    whole = trunk | {f"projector.{key}": value for key, value in head.state_dict().items()} | beside
    torch.save({"state_dict": whole, "optimizer_states": []}, tmp_path / "last.ckpt")
    encoder = build("test_resnet", 0, str(tmp_path / "last.ckpt"), "--teacher-weights")
    rows = torch.randn(5, width)
    assert encoder.projection is not None
    assert torch.allclose(encoder.projection(rows), head.eval()(rows), atol=1e-6)
