"""Encoders: measured width, each model's own normalisation and size, names people type, and a hub out of reach."""

import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from bingo_compress.errors import BingoError
from bingo_compress.models import encoder as module
from bingo_compress.models.encoder import Encoder, Preprocessing, ProjectionHead, RegressionHead, build
from bingo_compress.models.names import FAMILIES, has_pretrained, resolve_name

# model, pixels a side, width of the pooled features
MODELS = [
    ("resnet18", 64, 512),
    ("resnet152", 32, 2048),
    ("mobilenetv3_large_100", 64, 1280),
    ("mobilenetv3_small_050", 64, 1024),
    ("mobilenetv4_conv_small", 64, 1280),
    ("efficientnet_b0", 64, 1280),
    ("tf_efficientnet_lite0", 64, 1280),
    ("fastvit_t8", 64, 768),
    ("swin_tiny_patch4_window7_224", 224, 768),
    ("vit_small_patch14_dinov2", 98, 384),
    ("convnext_atto", 64, 320),
    ("ghostnet_100", 64, 1280),
    ("levit_128s", 64, 384),
    ("repvit_m0_9", 64, 384),
]
WIDER_THAN_TIMM_SAYS = {
    "mobilenetv3_large_100": 960,
    "mobilenetv3_small_050": 288,
    "mobilenetv4_conv_small": 960,
    "ghostnet_100": 960,
}


def pictures(size: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- width


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "width"), MODELS, ids=[name for name, _, _ in MODELS])
def test_the_measured_width_is_the_width_of_the_features(name: str, size: int, width: int) -> None:
    encoder = build(name, size, "random", "--student")
    with torch.inference_mode():
        features = encoder(pictures(size))
    assert encoder.width == width
    assert features.shape == (2, width)
    assert features.isfinite().all()
    assert not torch.equal(features[0], features[1])
    assert encoder.preprocessing.size == size
    assert not encoder.training
    stated = WIDER_THAN_TIMM_SAYS.get(name, width)
    assert encoder.backbone.num_features == stated
    # The size of its position embeddings.
    whole = timm.create_model(name, **({"img_size": size} if name.startswith(("vit", "levit")) else {}))
    classifier = sum(
        value.numel() for key, value in whole.named_parameters() if key not in dict(encoder.backbone.named_parameters())
    )
    assert classifier > 0 or name == "vit_small_patch14_dinov2"
    assert encoder.parameters_count() == sum(parameter.numel() for parameter in whole.parameters()) - classifier


def test_the_gradient_reaches_the_layer_behind_the_pooling() -> None:
    encoder = build("mobilenetv3_large_100", 32, "random", "--student").train()
    encoder(pictures(32, 4)).square().sum().backward()
    head = encoder.backbone.conv_head
    assert head.weight.shape[:2] == (1280, 960)
    assert head.weight.grad is not None and head.weight.grad.abs().sum() > 0
    assert [name for name, parameter in encoder.backbone.named_parameters() if parameter.grad is None] == []


# ---------------------------------------------------------------- normalisation and size


@pytest.mark.parametrize(
    ("name", "size", "mean", "std"),
    [
        ("test_vit", 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("tf_efficientnet_lite0", 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("resnet18", 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_each_model_gets_its_own_normalisation(
    name: str, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    encoder = build(name, size, "random", "--teacher")
    images = pictures(size)
    normal = torch.stack([(images[:, channel] - mean[channel]) / std[channel] for channel in range(3)], dim=1)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), encoder.backbone(normal), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(encoder(images), encoder.backbone(images), atol=1e-3)
    assert encoder.preprocessing.mean == mean and encoder.preprocessing.std == std
    # Mean and std are not weights.
    assert set(encoder.state_dict()) == {f"backbone.{key}" for key in encoder.backbone.state_dict()}


def test_geometry_is_the_models_own() -> None:
    own = build("test_vit", 0, "random", "--teacher").preprocessing
    assert own.geometry() == {"size": 160, "crop_pct": 0.95, "interpolation": "bicubic", "crop_mode": "center"}
    assert build("test_resnet", 0, "random", "--teacher").preprocessing.interpolation == "bilinear"
    assert build("test_vit", 96, "random", "--teacher").preprocessing.geometry() == {**own.geometry(), "size": 96}


def test_evaluating_gives_every_layer_back_its_own_mode() -> None:
    encoder = build("test_resnet", 32, "random", "--student").train()
    encoder.backbone.bn1.eval()  # frozen among layers that train
    before = [module.training for module in encoder.modules()]
    during = []

    def fail() -> None:
        with module.evaluating(encoder):
            during.extend(each.training for each in encoder.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert during and not any(during)
    assert [each.training for each in encoder.modules()] == before and len(set(before)) == 2


def test_a_models_preprocessing_in_words() -> None:
    own = build("test_vit", 96, "random", "--teacher").preprocessing
    assert (
        own.describe()
        == "the centred 0.95 of the short side, bicubic to 96 px, less mean 0.500 0.500 0.500, by std 0.500 0.500 0.500"
    )
    assert "squashed" in replace(own, crop_mode="squash").describe()


def test_without_a_projection_the_features_are_the_embedding() -> None:
    encoder = build("test_resnet", 32, "random", "--teacher")
    with torch.inference_mode():
        features, embedding = encoder.embed(pictures(32))
        assert torch.equal(features, embedding)
        encoder.projection = nn.Linear(encoder.width, 5)
        features, embedding = encoder.embed(pictures(32))
        assert torch.equal(embedding, encoder.projection(features))
        assert torch.equal(features, encoder(pictures(32)))


@pytest.mark.parametrize(("name", "size"), [("test_vit", 5), ("swin_tiny_patch4_window7_224", 1)])
def test_a_size_that_a_model_cannot_take_is_an_error(name: str, size: int) -> None:
    with pytest.raises(BingoError, match=rf"{name}.*{size} x {size} pixels.*choose another size"):
        build(name, size, "random", "--student")


def test_features_that_are_no_vectors_are_an_error() -> None:
    geometry = Preprocessing(8, 1.0, "bicubic", "center", (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(BingoError, match=r"gives features of shape \(1, 4, 6, 6\), expected \(batch, width\)"):
        Encoder("convolution", nn.Conv2d(3, 4, 3), geometry)


def test_measuring_changes_neither_mode_nor_statistics() -> None:
    backbone = timm.create_model("test_resnet", num_classes=0).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    Encoder("test_resnet", backbone, Preprocessing(32, 1.0, "bicubic", "center", (0.5,) * 3, (0.5,) * 3))
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_projection_head_is_two_layers_deep() -> None:
    head, features = ProjectionHead(7, 11, 5), torch.randn(3, 7)
    first, last = head[0], head[2]
    expected = torch.relu(features @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(head(features), expected)


def test_regression_head_has_four_linear_layers_with_norms_between() -> None:
    head = RegressionHead(7, 12, 5)
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 3 + ["Linear"]
    assert head(torch.randn(3, 7)).shape == (3, 5)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("resnet18", "resnet18"),
        ("resnet", "resnet50"),
        ("mobilenetv3", "mobilenetv3_large_100"),
        ("efficientnet_lite", "tf_efficientnet_lite0"),
        ("efficientnet_lite0", "efficientnet_lite0"),
        ("timm/resnet18", "resnet18"),
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("dino", "vit_small_patch16_224.dino"),
        ("resnet50x2", "resnet50x2"),
    ],
)
def test_names_and_families(word: str, name: str) -> None:
    assert resolve_name(word, "--teacher") == name


def test_every_family_is_a_model() -> None:
    assert {word: name for word, name in FAMILIES.items() if resolve_name(name, "--teacher") != name} == {}
    assert [word for word in FAMILIES if timm.is_model(word)] == []  # it would never be asked


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("resnet1o1", "resnet101"), ("mobilenet_v3", "mobilenetv3"), ("efficientnetb0", "efficientnet_b0")],
)
def test_an_unknown_name_gets_the_three_nearest(word: str, nearest: str) -> None:
    with pytest.raises(BingoError) as caught:
        resolve_name(word, "--student")
    message = str(caught.value)
    offered = message.split("the nearest are ")[1].split(";")[0].split(", ")
    assert message.startswith(f"--student: unknown model '{word}'")
    assert len(offered) == 3 and nearest in offered
    assert all(timm.is_model(name) or name in FAMILIES for name in offered)


def test_an_unknown_tag_gets_the_nearest_tags() -> None:
    with pytest.raises(
        BingoError,
        match=r"--teacher: unknown weights tag 'a1_in1' of resnet18; the nearest are resnet18\.a1_in1k, resnet18\.",
    ):
        resolve_name("resnet18.a1_in1", "--teacher")


def test_no_name_is_an_error() -> None:
    with pytest.raises(BingoError, match="--student: expected a model name, found none"):
        resolve_name("", "--student")


# ---------------------------------------------------------------- where weights come from


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """No connection can be made and nothing is in the hub's cache. Returns the addresses that were tried."""
    tried: list[Any] = []

    def refuse(address: Any, *_: object, **__: object) -> None:
        tried.append(address)
        raise OSError(101, "Network is unreachable")

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))  # read from HF_HOME when it was imported
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tried


def test_a_hub_out_of_reach_is_one_line_with_the_ways_out(
    no_network: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(BingoError) as caught:
        build("resnet18", 0, "pretrained", "--teacher-weights")
    message = str(caught.value)
    assert message.startswith("--teacher-weights: pretrained weights of resnet18 could not be fetched")
    for way in ("HF_HOME", "--teacher-weights PATH", "--teacher-weights random", "online"):
        assert way in message
    assert len(message) < 600
    assert no_network == [("huggingface.co", 443)]  # asked once, and no retries
    assert sum(slept) == 0
    assert constants.HF_HUB_OFFLINE is False


def test_a_filled_cache_needs_no_network(no_network: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model("test_resnet").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(source))
    encoder = build("test_resnet", 32, "pretrained", "--teacher-weights")
    assert all(torch.equal(value, source[key]) for key, value in encoder.backbone.state_dict().items())


@pytest.mark.parametrize(("source", "asked"), [("pretrained", True), ("random", False)])
def test_weights_are_random_only_where_random_is_said(
    no_network: list[Any], monkeypatch: pytest.MonkeyPatch, source: str, asked: bool
) -> None:
    calls: list[dict[str, Any]] = []
    real = timm.create_model

    def create(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        calls.append({"name": name, "pretrained": pretrained, "offline": constants.HF_HUB_OFFLINE, **arguments})
        return real(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", create)
    build("test_vit", 96, source, "--teacher-weights")
    # Without a network the hub's library is told so while timm loads: then it looks into its cache alone.
    assert calls == [{"name": "test_vit", "pretrained": asked, "offline": asked, "num_classes": 0, "img_size": 96}]
    assert constants.HF_HUB_OFFLINE is False


def test_random_weights_ask_nobody(no_network: list[Any]) -> None:
    build("test_resnet", 32, "random", "--teacher-weights")
    assert no_network == []


def test_behind_a_proxy_the_hub_is_asked(no_network: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert module._reachable("https://huggingface.co")
    monkeypatch.delenv("HTTPS_PROXY")
    assert not module._reachable("https://huggingface.co:8443/x")
    assert no_network == [("huggingface.co", 8443)]


def test_a_model_without_known_weights_says_so(no_network: list[Any]) -> None:
    assert (
        not has_pretrained("mobilenetv4_conv_small_035")
        and has_pretrained("resnet18")
        and not has_pretrained("resnet50x2")
    )
    with pytest.raises(
        BingoError, match=r"--teacher-weights: timm has no pretrained weights for mobilenetv4_conv_small_035.*random"
    ):
        build("mobilenetv4_conv_small_035", 0, "pretrained", "--teacher-weights")
    assert no_network == []


def test_a_file_that_is_not_there_is_no_reason_for_random_weights(tmp_path: Path) -> None:
    with pytest.raises(
        BingoError, match=r"--teacher-weights: expected pretrained, random or a weights file; found no file .*none\.pth"
    ):
        build("test_resnet", 32, str(tmp_path / "none.pth"), "--teacher-weights")
