"""Checkpoints in the layouts of MoCo, SwAV, DINO and DINOv2, of the real models with few channels, and what their heads
make of features.
"""

import argparse
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
BASE, DINO_VIT, DINOV2, REGISTERS = (
    "vit_base_patch16_224",
    "vit_small_patch16_224.dino",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
)
VIT = {"embed_dim": 24, "num_heads": 2, "depth": 2}
SMALL: dict[str, dict[str, Any]] = {"resnet50": {"layers": (1, 1, 1, 1), "channels": (4, 8, 12, 16)}}
SMALL |= dict.fromkeys((BASE, DINO_VIT, DINOV2, REGISTERS), VIT)
HIDDEN, DIM, PROTOTYPES = 10, 6, 9


def trained(name: str, size: int) -> nn.Module:
    """A backbone in eval mode none of whose tensors has the value of a new one."""
    torch.manual_seed(1)
    model: nn.Module = timm.create_model(name, num_classes=0, **({"img_size": size} if name.startswith("vit") else {}))
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(3)
        else:
            value.add_(0.1 * torch.rand_like(value))
    return model.eval()


def made_head(width: int, steps: str) -> Tensors:
    """Tensors by "place.name" for steps such as "L0 relu L2": L and N are Linear and BatchNorm, small ones without
    bias, without weights.
    """
    torch.manual_seed(2)
    layers = [step for step in steps.split() if step not in ("relu", "gelu")]
    last = [step for step in layers if step[0] in "Ll"][-1]
    made: Tensors = {}
    for step in layers:
        kind, place = step[0], step[1:]
        if kind in "Ll":
            leaving = DIM if step == last else HIDDEN
            made[f"{place}.weight"] = torch.randn(leaving, width) / width**0.5
            width = leaving
        if kind == "N":
            made[f"{place}.weight"] = torch.rand(width) + 0.5
        if kind in "LN":
            made[f"{place}.bias"] = torch.randn(width)
        if kind in "Nn":
            made |= {f"{place}.running_mean": torch.randn(width), f"{place}.running_var": torch.rand(width) + 0.5}
            made[f"{place}.num_batches_tracked"] = torch.tensor(5)
    return made


def reference(features: Tensor, head: Tensors, steps: str) -> Tensor:
    """What the steps make of the features, in float64, by hand."""
    value = features.double()
    tensors = {key: tensor.double() for key, tensor in head.items()}
    for step in steps.split():
        at = step[1:]
        if step == "relu":
            value = value * (value > 0)
        elif step == "gelu":
            value = value * (1 + torch.erf(value / 2**0.5)) / 2
        elif step[0] in "Ll":
            value = torch.einsum("bi,oi->bo", value, tensors[f"{at}.weight"]) + tensors.get(f"{at}.bias", 0)
        else:
            value = (value - tensors[f"{at}.running_mean"]) / (tensors[f"{at}.running_var"] + 1e-5) ** 0.5
            value = value * tensors.get(f"{at}.weight", 1) + tensors.get(f"{at}.bias", 0)
    return value


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def others(tensors: Tensors, prefix: str) -> Tensors:
    """The same keys under another prefix, with values that would be seen."""
    return {f"{prefix}{key}": torch.full_like(value, 7) for key, value in tensors.items()}


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}


# Each writer gives the file's content and the tensors in it, in place: a test may change them before they are saved.
Written = tuple[Any, Tensors]


def moco(trunk: Tensors, head: Tensors) -> Written:
    query = trunk | prefixed(head, "fc.")
    tensors = prefixed(query, "module.encoder_q.") | others(query, "module.encoder_k.")
    tensors |= {"module.queue": torch.randn(DIM, 32), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 800, "arch": "resnet50", "state_dict": tensors, "optimizer": OPTIMIZER}, tensors


def moco_v3(trunk: Tensors, head: Tensors) -> Written:
    base = trunk | prefixed(head, "head." if "pos_embed" in trunk else "fc.")
    tensors = prefixed(base, "module.base_encoder.") | others(base, "module.momentum_encoder.")
    tensors |= prefixed(made_head(DIM, "l0 N1 relu l3 n4"), "module.predictor.")
    return {
        "epoch": 300,
        "arch": "any",
        "state_dict": tensors,
        "optimizer": OPTIMIZER,
        "scaler": {"scale": 65536.0},
    }, tensors


def swav(trunk: Tensors, head: Tensors, prototypes: str = "prototypes.weight") -> Written:
    tensors = prefixed(
        trunk | prefixed(head, "projection_head.") | {prototypes: torch.randn(PROTOTYPES, DIM)}, "module."
    )
    return tensors, tensors


def swav_training(trunk: Tensors, head: Tensors) -> Written:
    tensors = swav(trunk, head, "prototypes.prototypes0.weight")[1]
    tensors["module.prototypes.prototypes1.weight"] = torch.randn(PROTOTYPES, DIM)
    return {
        "epoch": 400,
        "state_dict": tensors,
        "optimizer": OPTIMIZER,
        "amp": {"loss_scaler0": {"loss_scale": 1.0}},
    }, tensors


def dino(trunk: Tensors, head: Tensors) -> Written:
    wrapped = "" if "pos_embed" in trunk else "module."  # for the sake of BatchNorm
    last = {"last_layer.weight_g": torch.ones(PROTOTYPES, 1), "last_layer.weight_v": torch.randn(PROTOTYPES, DIM)}
    both = prefixed(trunk, "backbone.") | prefixed(prefixed(head, "mlp.") | last, "head.")
    tensors = prefixed(both, wrapped)
    content = {"student": others(both, "module."), "teacher": tensors, "optimizer": OPTIMIZER, "epoch": 100}
    content |= {
        "args": argparse.Namespace(arch="vit_small", lr=0.1),
        "dino_loss": {"center": torch.zeros(1, PROTOTYPES)},
        "fp16_scaler": {},
    }
    return content, tensors


def dinov2(trunk: Tensors, head: Tensors, chunks: int = 0) -> Written:
    """The training's teacher_checkpoint.pth: blocks in chunks, counted through."""
    each = VIT["depth"] // max(chunks, 1)
    named = {}
    for key, value in (trunk | {"mask_token": torch.randn(1, 24)}).items():
        number = re.match(r"blocks\.(\d+)", key) if chunks else None
        named[key.replace("blocks.", f"blocks.{int(number[1]) // each}.", 1) if number else key] = value
    last = {"last_layer.weight_g": torch.ones(PROTOTYPES, 1), "last_layer.weight_v": torch.randn(PROTOTYPES, DIM)}
    tensors = prefixed(named, "backbone.") | prefixed(prefixed(head, "mlp.") | last, "dino_head.")
    tensors |= prefixed(others(head, "mlp.") | last, "ibot_head.")
    return {"teacher": tensors}, tensors


def dinov2_state(trunk: Tensors, head: Tensors) -> Written:
    """The training's whole state."""
    teacher = dinov2(trunk, head, 2)[1]
    tensors = prefixed(teacher, "teacher.") | others(teacher, "student.")
    tensors |= {"dino_loss.center": torch.zeros(1, PROTOTYPES), "ibot_patch_loss.center": torch.zeros(1, 1, PROTOTYPES)}
    return {"model": tensors, "optimizer": OPTIMIZER, "scheduler": {}, "iteration": 9}, tensors


class Case(NamedTuple):
    """A layout: model, pixels a side, the head's steps, what writes it, where the file keeps trunk and head."""

    name: str
    size: int
    steps: str
    write: Callable[[Tensors, Tensors], Written]
    trunk: str
    head: str


THREE, THREE_NORM = "L0 gelu L2 gelu L4", "L0 N1 gelu L3 N4 gelu L6"
CASES = {
    "MoCo-v2": Case("resnet50", 32, "L0 relu L2", moco, "module.encoder_q.", "module.encoder_q.fc."),
    "MoCo-v3 ResNet": Case(
        "resnet50", 32, "l0 N1 relu l3 n4", moco_v3, "module.base_encoder.", "module.base_encoder.fc."
    ),
    "MoCo-v3 ViT": Case(
        BASE, 32, "l0 N1 relu l3 N4 relu l6 n7", moco_v3, "module.base_encoder.", "module.base_encoder.head."
    ),
    "SwAV": Case("resnet50", 32, "L0 N1 relu L3", swav, "module.", "module.projection_head."),
    "SwAV, training": Case("resnet50", 32, "L0 N1 relu L3", swav_training, "module.", "module.projection_head."),
    "DINO ViT": Case(DINO_VIT, 32, THREE, dino, "backbone.", "head.mlp."),
    "DINO ResNet": Case("resnet50", 32, THREE_NORM, dino, "module.backbone.", "module.head.mlp."),
    "DINOv2": Case(DINOV2, 28, THREE, dinov2, "backbone.", "dino_head.mlp."),
    "DINOv2 in chunks": Case(
        DINOV2, 28, THREE, lambda trunk, head: dinov2(trunk, head, 2), "backbone.", "dino_head.mlp."
    ),
    "DINOv2, whole state": Case(DINOV2, 28, THREE_NORM, dinov2_state, "teacher.backbone.", "teacher.dino_head.mlp."),
}
