"""Quantisation-aware fine-tuning without labels: the run goes on for a while, on its stored targets, with a student whose numbers are rounded as int8 will round them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bingo_compress import checkpoint, intake, pixels, run_dir, screen
from bingo_compress.distill import distill, plan
from bingo_compress.encoder import Encoder
from bingo_compress.errors import BingoError
from bingo_compress.pipeline import Models, build_models, choose_device, prepare, target_source, use_threads
from bingo_compress.recipe import Recipe

EPOCHS = 0.1  # of the run's
RATE = 0.1  # of the run's peak learning rate
KEEP = 0.98  # of a range's moving average, a batch
WEIGHTS = (-64, 63)  # 7 bits, as exporters/onnx_int8.py asks for
ACTIVATIONS = (0, 255)
# What onnxruntime rounds the input of. ReLU is missing: a range that begins at zero does its work.
ROUNDED = (nn.Conv2d, nn.Linear, nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardsigmoid)


def finetune(run: run_dir.RunDir, recipe: Recipe, student: Encoder, data: Path) -> Encoder:
    """Train `student`, rounded, on the run's images `data` and stored targets, in place. Needs RUN/work. Raises BingoError."""
    if not (run.checkpoint.exists() and run.bags.exists()):
        raise BingoError(
            f"--finetune: expected the run's bags and checkpoint in {run.work}, found them deleted; distil again, or leave --finetune out"
        )
    folder = intake.take(recipe.model_copy(update={"data": str(data)}))  # as the run took them: copies may have been dropped
    device = choose_device(recipe.device)
    models = Models(recipe, build_models(recipe).teacher, student)
    use_threads(recipe, student, device)
    material = prepare(models, folder, pixels.store_side(recipe.image_size, recipe.teacher_size), run.work, device)
    bags = checkpoint.load(run.bags)[0]["bags"]
    if len(bags) != len(material.training):
        raise BingoError(
            f"--finetune: expected the run's {len(bags):,} training images in {data}, found {len(material.training):,}; distil again"
        )
    tensors, _ = checkpoint.load(run.checkpoint)
    before = plan(recipe, len(material.training))
    shorter = recipe.model_copy(
        update={
            "epochs": max(2, round(EPOCHS * recipe.epochs)),
            "lr": RATE * before.peak_lr,
            "optimizer": before.optimizer,
            "keep_best": False,
            "check_every": 0,
            "profile": False,
        }
    )
    target_of, dim = target_source(models, material, device)
    screen.say(f"fine-tuning the rounded student on {len(material.training):,} images, {shorter.epochs} epochs, no labels")
    saved = run.work / "finetune.safetensors"
    with rounded(student.backbone):
        distill(
            shorter,
            student,
            material.store,
            material.training,
            bags,
            target_of,
            dim,
            run.work / "finetune.jsonl",
            saved,
            device,
            head_weights=checkpoint.under(tensors, "head"),
        )
    saved.unlink(missing_ok=True)
    return student.cpu().eval()


@contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """Inside, weights of convolutions and products are rounded to 7 bits by output channel, inputs of ROUNDED modules to 8 bits; gradients pass as if
    they were not (straight-through). A folded BatchNorm scales whole output channels, so it changes nothing in how they are rounded."""
    hooks: list[Any] = []
    weighted = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for module in model.modules():
        if isinstance(module, ROUNDED):
            hooks.append(module.register_forward_pre_hook(_Input()))
    for module in weighted:
        parametrize.register_parametrization(module, "weight", _Weight())
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in weighted:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


class _Weight(nn.Module):
    """Weights (out, ...) at the nearest of their channel's 7-bit steps."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-12) / WEIGHTS[1]
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, *WEIGHTS)


class _Input:
    """A forward pre-hook: the input at the nearest of 256 steps of its range, whose ends are moving averages over training batches."""

    def __init__(self) -> None:
        self._ends: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = args[0]
        with torch.no_grad():
            # Zero has a step of its own: padding is zero.
            ends = torch.stack((value.amin().clamp(max=0), value.amax().clamp(min=0))).float()
            if self._ends is None:
                self._ends = ends
            elif module.training:
                self._ends = self._ends.lerp(ends, 1 - KEEP)
            low, high = self._ends.unbind()
            scale = ((high - low) / ACTIVATIONS[1]).clamp(min=1e-12)
            zero = (-low / scale).round().int()
        return (torch.fake_quantize_per_tensor_affine(value, scale, zero, *ACTIVATIONS), *args[1:])
