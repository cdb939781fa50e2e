"""Quantisation-aware fine-tuning without labels: a student whose numbers are rounded as int8 will round them learns to
give what it gives in float.
"""

import copy
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils import parametrize

from bingo_compress.data import pixel_store
from bingo_compress.data.image_list import ImageList
from bingo_compress.errors import BingoError
from bingo_compress.evaluation.finetune import Labelled, crops_and_flips
from bingo_compress.models.encoder import Encoder
from bingo_compress.recipe import Recipe
from bingo_compress.runtime.devices import choose_device, use_threads
from bingo_compress.training.plan import learning_rate

IMAGES = 20_000  # of the folder, at most
EPOCHS, BATCH = 2, 64
RATE = 1e-4
SCALE_MIN = 0.3  # of a crop's area: nearer to whole images than training's crops
KEEP = 0.98  # of a range's moving average, a batch
WEIGHTS = (-64, 63)  # 7 bits, as exporters/onnx_int8.py asks for
ACTIVATIONS = (0, 255)
# What onnxruntime rounds the input of. ReLU is missing: a range that begins at zero does its work.
WEIGHTED = (nn.Conv2d, nn.Linear)
ROUNDED = (*WEIGHTED, nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardsigmoid)


def finetune(recipe: Recipe, student: Encoder, folder: ImageList, work: Path, apart: Set[str]) -> Encoder:
    """Train `student`, rounded, in place, on images of `folder` without those that it is judged by; `work`: an empty
    folder for their pixels.

    apart: sha256 of the files that it must not see, which keeps copies of them out too. Raises BingoError where no
    other is left.

    The loss is one minus the cosine to the float student's embedding of the same crop: the float file is what the int8
    file is judged against. The teacher's targets led away from it (docs/log.md). BatchNorm keeps its statistics, as in
    the file it is folded away.
    """
    device = choose_device(recipe.device)
    use_threads(recipe.model_copy(update={"threads": 0}), student, student.preprocessing.size, device, recipe.threads)
    some = folder.only(range(0, len(folder.files), -(-len(folder.files) // IMAGES)))
    chosen = some.only([index for index, digest in enumerate(some.digests) if digest not in apart])
    if not chosen.files:
        raise BingoError(
            f"--finetune: expected images in {folder.where} beside those that int8 is judged by, found none; add images"
        )
    size = student.preprocessing.size
    store, _ = pixel_store.build(chosen, pixel_store.store_side(size, size), work, device)
    rows = torch.arange(len(store))
    exact = copy.deepcopy(student).to(device).eval()
    student.to(device).eval()
    optimizer = torch.optim.AdamW(student.backbone.parameters(), lr=RATE, weight_decay=0)
    steps = EPOCHS * -(-len(rows) // BATCH)
    with rounded(student.backbone):
        batches = crops_and_flips(
            student, Labelled(store, rows, rows, 0), device, EPOCHS, BATCH, recipe.seed, "fine-tune, rounded", SCALE_MIN
        )
        for step, (_, views, _) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, steps // 4, RATE)
            with torch.no_grad():
                wanted = exact(views)
            optimizer.zero_grad(set_to_none=True)
            (1 - cosine_similarity(student(views), wanted)).mean().backward()
            optimizer.step()
    return student.cpu()


@contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """Inside, weights of convolutions and products are rounded to 7 bits by output channel, inputs of ROUNDED modules
    to 8 bits; gradients pass as if they were not (straight-through). A folded BatchNorm scales whole output channels,
    so it changes nothing in how they are rounded.
    """
    hooks: list[Any] = []
    weighted = [module for module in model.modules() if isinstance(module, WEIGHTED)]
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
    """A forward pre-hook: the input at the nearest of 256 steps of its range, whose ends are moving averages over
    training batches.
    """

    def __init__(self) -> None:
        self._ends: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value, training = args[0], torch.is_grad_enabled()
        if not isinstance(module, WEIGHTED) and value.shape[2:].numel() == 1:
            return args  # after pooling: the features are in float
        with torch.no_grad():
            # Zero has a step of its own: padding is zero.
            ends = torch.stack((value.amin().clamp(max=0), value.amax().clamp(min=0))).float()
            if self._ends is None:
                self._ends = ends
            elif training:
                self._ends = self._ends.lerp(ends, 1 - KEEP)
            low, high = self._ends.unbind()
            scale = ((high - low) / ACTIVATIONS[1]).clamp(min=1e-12)
            zero = (-low / scale).round().int()
        return (torch.fake_quantize_per_tensor_affine(value, scale, zero, *ACTIVATIONS), *args[1:])
