"""Checkpoints of self-supervised teachers, written here in their exact layouts with few channels: each key is loaded,
known, or refused by name.
"""

from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from checkpoints import (
    BASE,
    CASES,
    DIM,
    DINO_VIT,
    DINOV2,
    HIDDEN,
    REGISTERS,
    SMALL,
    Case,
    Tensors,
    dinov2,
    made_head,
    moco,
    prefixed,
    reference,
    swav,
    trained,
)
from torch import nn

from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import build
from bingo_compress.models.weights import load_into

OPTION = "--teacher-weights"
create = timm.create_model


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real models, names and all, with few channels."""
    monkeypatch.setattr(
        timm, "create_model", lambda name, **arguments: create(name, **SMALL.get(name, {}), **arguments)
    )


each_layout = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
each_method = pytest.mark.parametrize(
    "case",
    [case for key, case in CASES.items() if key not in ("SwAV, training", "DINOv2 in chunks")],
    ids=lambda case: case.head,
)


def written(case: Case) -> tuple[nn.Module, Tensors, Any, Tensors]:
    """(the trunk, the head's tensors, the file's content, the tensors in it)."""
    source = trained(case.name, case.size)
    head = made_head(source.num_features, case.steps)
    return source, head, *case.write(source.state_dict(), head)


def saved(content: Any, folder: Path) -> str:
    torch.save(content, folder / "file.pth")
    return str(folder / "file.pth")


def check_trunk(backbone: nn.Module, source: nn.Module) -> None:
    own, theirs = backbone.state_dict(), source.state_dict()
    assert own.keys() == theirs.keys()
    assert [key for key in own if not torch.equal(own[key], theirs[key])] == []


def check(case: Case, source: nn.Module, head: Tensors, file: str) -> None:
    """By way of the encoder: trunk bit for bit, features those of the source, embedding that of the file's head."""
    encoder = build(case.name, case.size, file, OPTION)
    check_trunk(encoder.backbone, source)
    assert encoder.projection is not None and not any(module.training for module in encoder.projection.modules())
    assert encoder.preprocessing.mean == pytest.approx(
        (0.485, 0.456, 0.406)
    ) and encoder.preprocessing.std == pytest.approx((0.229, 0.224, 0.225))
    images = torch.rand(3, 3, case.size, case.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features, embedding = encoder.embed(images)
        assert torch.equal(features, source((images - encoder.mean) / encoder.std))
        torch.testing.assert_close(encoder.embed(images[:1])[1], embedding[:1])  # of no other image
    assert embedding.shape == (3, DIM)
    torch.testing.assert_close(embedding.double(), reference(features, head, case.steps), rtol=1e-4, atol=1e-5)


@cache
def spared(name: str, size: int) -> nn.Module:
    """A backbone for what is refused: it stays as it is."""
    model: nn.Module = timm.create_model(name, num_classes=0, **({"img_size": size} if name.startswith("vit") else {}))
    return model


def refusal(case: Case, content: Any, folder: Path) -> str:
    """The message for a file of this content that is not loaded; the backbone is as before. What is written and read
    is the same: test_trunk_and_head_are_loaded.
    """
    backbone, file = spared(case.name, case.size), folder / "file.pth"
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    file.touch()
    with mock.patch.object(torch, "load", return_value=content), pytest.raises(BingoError) as caught:
        load_into(backbone, case.name, file, OPTION)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert str(caught.value).startswith(f"{OPTION}: ") and "file.pth" in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- every layout


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("key", ["DINOv2, whole state", "DINO ViT"])
def test_the_teacher_is_taken_whatever_ema_says(key: str, ema: bool, tmp_path: Path) -> None:
    case = CASES[key]
    source, _, content, _ = written(case)
    check_trunk(build(case.name, case.size, saved(content, tmp_path), OPTION, ema=ema).backbone, source)


@pytest.mark.parametrize("key", ["MoCo-v3 ViT", "DINO ViT", "DINOv2"])
def test_the_methods_normalisation_holds_for_a_file_of_the_trunk_alone(key: str, tmp_path: Path) -> None:
    case = CASES[key]
    _, _, content, tensors = written(case)
    for name in list(tensors):
        if not name.startswith(case.trunk) or name.startswith(case.head):
            del tensors[name]
    encoder = build(BASE if key != "DINOv2" else case.name, case.size, saved(content, tmp_path), OPTION)
    assert encoder.projection is None
    if key != "DINOv2":
        assert timm.models.get_pretrained_cfg(BASE).mean == (0.5, 0.5, 0.5)
    assert encoder.preprocessing.mean == (0.485, 0.456, 0.406) and encoder.preprocessing.std == (0.229, 0.224, 0.225)
    assert encoder.mean.flatten().tolist() == pytest.approx((0.485, 0.456, 0.406))


@each_layout
def test_trunk_and_head_are_loaded(tmp_path: Path, case: Case) -> None:
    source, head, content, _ = written(case)
    check(case, source, head, saved(content, tmp_path))


@each_layout
def test_what_is_known_and_not_needed_may_be_missing(tmp_path: Path, case: Case) -> None:
    source, head, content, tensors = written(case)
    for key in list(tensors):
        if not key.startswith((case.trunk, case.head)) or "prototypes" in key or key.endswith("num_batches_tracked"):
            del tensors[key]
    source.load_state_dict(
        {key: torch.zeros_like(value) for key, value in source.state_dict().items() if "num_b" in key}, strict=False
    )
    check(case, source, head, saved(content, tmp_path))


@each_method
def test_every_missing_key_of_the_head_is_an_error(tmp_path: Path, case: Case) -> None:
    """A tensor, a layer, all of it."""
    _, head, content, tensors = written(case)
    for key in (key for key in head if not key.endswith("num_batches_tracked")):
        gone = tensors.pop(case.head + key)
        message = refusal(case, content, tmp_path)
        assert "expected the projection head of" in message and "is the file complete?" in message, key
        tensors[case.head + key] = gone
    for place in {key.split(".")[0] for key in head}:
        gone_layer = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{case.head}{place}.")}
        assert "expected the projection head of" in refusal(case, content, tmp_path), place
        tensors |= gone_layer
    for key in head:
        del tensors[case.head + key]
    message = refusal(case, content, tmp_path)
    assert "expected one projection head of" in message and "found none; is the file complete?" in message


@each_method
def test_every_missing_key_of_the_trunk_is_named(tmp_path: Path, case: Case) -> None:
    source, _, content, tensors = written(case)
    for key in [key for key in source.state_dict() if not key.endswith("num_batches_tracked")][::9]:
        inside = next(
            name for name in tensors if name.startswith(case.trunk) and name.endswith(key.removeprefix("blocks."))
        )
        gone = tensors.pop(inside)
        assert f"1 missing keys ({key}), 0 unexpected keys" in refusal(case, content, tmp_path)
        tensors[inside] = gone


@each_method
def test_a_key_of_no_known_part_is_named(tmp_path: Path, case: Case) -> None:
    for stray in ("queues", "layer5.0.conv1.weight"):
        for prefix in ("module." if case.trunk.startswith("module.") else "", case.trunk):
            _, _, content, tensors = written(case)
            tensors[prefix + stray] = torch.ones(2, 2)
            message = refusal(case, content, tmp_path)
            assert "1 unexpected keys" in message and stray in message


@each_method
def test_a_classifier_beside_the_projection_is_an_error(tmp_path: Path, case: Case) -> None:
    for stray in ("fc.weight", "head.weight"):
        _, _, content, tensors = written(case)
        tensors[case.trunk + stray] = torch.ones(5, 24)
        message = refusal(case, content, tmp_path)
        assert stray in message or "found 2; is the file complete?" in message or "projection head of MoCo" in message


@each_method
def test_a_layer_more_or_of_another_kind_is_an_error(tmp_path: Path, case: Case) -> None:
    _, head, content, tensors = written(case)
    for key in (
        "20.weight",
        "x.weight",
        "0.scale",
        "007.weight",
        f"{max(int(key.split('.')[0]) for key in head) + 1}.weight",
    ):
        tensors[case.head + key] = torch.ones(DIM, DIM)
        assert "expected the projection head of" in refusal(case, content, tmp_path)
        del tensors[case.head + key]


@each_layout
def test_a_head_of_another_width_is_an_error(tmp_path: Path, case: Case) -> None:
    source, _, content, tensors = written(case)
    width = source.num_features
    tensors[f"{case.head}0.weight"] = torch.ones(HIDDEN, width + 1)
    message = refusal(case, content, tmp_path)
    assert (
        f"does not fit features {width} wide: 1 tensors of another shape (0.weight ({HIDDEN}, {width + 1}) for"
        f" ({HIDDEN}, {width}))" in message
    )


@each_layout
def test_a_file_of_nothing_but_the_trunk_has_no_projection(tmp_path: Path, case: Case) -> None:
    source, _, _, tensors = written(case)
    trunk = {
        key: value for key, value in tensors.items() if key.startswith(case.trunk) and not key.startswith(case.head)
    }
    encoder = build(
        case.name, case.size, saved({key: v for key, v in trunk.items() if "prototypes" not in key}, tmp_path), OPTION
    )
    check_trunk(encoder.backbone, source)
    assert encoder.projection is None


# ---------------------------------------------------------------- one by one


@pytest.mark.parametrize("method", ["MoCo-v1", "SwAV"])
def test_a_single_linear_layer_as_head(tmp_path: Path, method: str) -> None:
    source = trained("resnet50", 32)
    head = made_head(source.num_features, "L0")
    bare = {key.removeprefix("0."): value for key, value in head.items()}
    content, _ = (moco if method == "MoCo-v1" else swav)(source.state_dict(), bare)
    check(Case("resnet50", 32, "L0", moco, "", ""), source, head, saved(content, tmp_path))


def test_half_precision(tmp_path: Path) -> None:
    case = CASES["MoCo-v2"]
    source, head, content, tensors = written(case)
    for mine in (tensors, head):
        mine.update({key: value.half() for key, value in mine.items() if value.is_floating_point()})
    source.load_state_dict({key: value.half() for key, value in source.state_dict().items()})
    check(case, source, head, saved(content, tmp_path))


@pytest.mark.parametrize("name", ["resnet50", BASE])
def test_moco_v3s_files_of_the_linear_probe_give_the_trunk(tmp_path: Path, name: str) -> None:
    source = trained(name, 32)
    classifier = {"fc.weight" if name == "resnet50" else "head.weight": torch.ones(5, source.num_features)}
    content = {
        "arch": "any",
        "state_dict": prefixed(source.state_dict() | classifier, "module."),
        "best_acc1": torch.tensor([70.0]),
    }
    encoder = build(name, 32, saved(content, tmp_path), OPTION)
    check_trunk(encoder.backbone, source)
    assert encoder.projection is None


def test_moco_v3s_small_vit_has_twelve_attention_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SMALL, "vit_small_moco_v3", {"depth": 1})
    monkeypatch.setitem(SMALL, "vit_small_patch16_224", {"depth": 1})
    case = CASES["MoCo-v3 ViT"]._replace(name="vit_small_moco_v3", size=224)
    source, head, content, _ = written(case)
    check(case, source, head, saved(content, tmp_path))
    message = refusal(case._replace(name="vit_small_patch16_224"), content, tmp_path)
    assert (
        "MoCo-v3's ViT-S has 12 attention heads, vit_small_patch16_224 has 6; name the model vit_small_moco_v3"
        in message
    )
    preprocessing = build("vit_small_moco_v3", 48, "random", OPTION).preprocessing
    assert preprocessing.size == 48 and preprocessing.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", [DINO_VIT, "resnet50"])
def test_dinos_backbone_alone(tmp_path: Path, name: str) -> None:
    source = trained(name, 32)
    encoder = build(name, 32, saved(source.state_dict(), tmp_path), OPTION)
    check_trunk(encoder.backbone, source)
    assert encoder.projection is None


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", [DINOV2, REGISTERS])
def test_dinov2s_backbone_alone(tmp_path: Path, name: str, chunked: bool) -> None:
    source = trained(name, 28)
    tensors = source.state_dict()
    if name == REGISTERS:  # upstream adds a position to the class token, timm keeps their sum
        first = torch.randn(1, 1, 24)
        tensors |= {
            "register_tokens": tensors.pop("reg_token"),
            "pos_embed": torch.cat([first, tensors["pos_embed"]], 1),
        }
        source.cls_token.data = tensors["cls_token"] + first
    named = dinov2(tensors, {}, 2 if chunked else 0)[1]
    plain = {key.removeprefix("backbone."): value for key, value in named.items() if key.startswith("backbone.")}
    assert ("blocks.1.1.ls1.gamma" in plain) == chunked and "mask_token" in plain
    encoder = build(name, 28, saved(plain, tmp_path), OPTION)
    check_trunk(encoder.backbone, source)
    assert encoder.projection is None
    larger = build(name, 56, str(tmp_path / "file.pth"), OPTION).backbone  # position embeddings are resized
    assert larger.pos_embed.shape[1] == source.pos_embed.shape[1] + 12
    assert torch.equal(larger.blocks[1].ls1.gamma, source.blocks[1].ls1.gamma)


def test_weights_in_a_second_place_of_the_file_are_named(tmp_path: Path) -> None:
    case = CASES["MoCo-v2"]
    for more in ({"teacher_head": {"0.weight": torch.ones(2)}}, {"bias": torch.ones(2)}):
        _, _, content, _ = written(case)
        assert f"found more in {next(iter(more))}" in refusal(case, content | more, tmp_path)
    source, head, content, _ = written(case)
    harmless = {
        "best_acc1": torch.tensor([60.0]),
        "rng": torch.zeros(9, dtype=torch.uint8),
        "lr_scheduler": {"w": torch.ones(2)},
        "note": "x",
    }
    check(case, source, head, saved(content | harmless, tmp_path))


def test_another_models_trunk_is_named_before_its_head(tmp_path: Path) -> None:
    _, _, content, _ = written(CASES["MoCo-v2"])
    assert "does not fit vit_base_patch16_224: " in refusal(CASES["MoCo-v3 ViT"], content, tmp_path)
