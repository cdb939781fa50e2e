"""What a GPU computes against what the CPU computes: crops, augmentation, neighbours, a distillation. Skipped where there is no GPU."""

import json
from pathlib import Path

import pytest
import torch
from helpers import encoder, kind_targets, photo, pixel_store, recipe, unit

from bingo_compress import augment, distill, embed, pixels
from bingo_compress.bagging import knn
from bingo_compress.neighbours import nearest_neighbours
from bingo_compress.pixels import PixelStore
from bingo_compress.resolving import settle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LEVEL = 1 / 255


def both_stores(count: int, side: int) -> tuple[PixelStore, PixelStore]:
    """The same pictures in memory and on the GPU."""
    pictures = [photo(number % 3, number, side, side + number % 7) for number in range(count)]
    aspect = torch.tensor([picture.shape[1] / picture.shape[0] for picture in pictures])
    one = pixels.store_of(pictures, aspect, CPU)
    return one, PixelStore(one.height, one.width, aspect, one._read, GPU, "gpu")


def test_views_are_the_cpus() -> None:
    here, there = both_stores(40, 80)
    rows = torch.arange(40)
    drawn = augment.draw(here.aspect, torch.Generator().manual_seed(0))
    crops = [store.crops(rows, drawn.box, 64) for store in (here, there)]
    assert crops[1].is_cuda and (crops[0].int() - crops[1].cpu().int()).abs().max() <= 1
    views = [augment.apply(found, drawn) for found in (crops[0], crops[0].to(GPU))]
    assert views[1].is_cuda and views[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(views[1].cpu(), views[0], atol=LEVEL / 2, rtol=0)  # convolutions in TF32


def test_neighbours_are_the_cpus() -> None:
    rows = unit(3000, 64)
    for kind in (torch.float32, torch.float16):
        similar, indices = nearest_neighbours(rows.to(kind), rows.to(kind), 6, GPU)
        expected, places = nearest_neighbours(rows.to(kind), rows.to(kind), 6, CPU)
        torch.testing.assert_close(similar, expected, atol=2e-3, rtol=0)
        assert (indices == places).double().mean() > 0.98


def test_a_distillation_has_the_cpus_losses(tmp_path: Path) -> None:
    count, dim = 48, 16
    targets = kind_targets(count, 2, dim)
    bags = knn(targets[:, 0], 3)[0]
    losses = []
    for device in (CPU, GPU):
        store = pixel_store(count)
        if device == GPU:
            store = PixelStore(store.height, store.width, store.aspect, store._read, GPU, "gpu")
        chosen = settle(recipe(device=device.type, student="test_resnet", compile="off"))
        source = embed.StoredTargets(targets, embed.TargetSpace(None, None), device, mean=True)
        metrics = tmp_path / f"{device.type}.jsonl"
        student = encoder("test_resnet")
        for steps in range(1, 7):  # a line of metrics a step: it stops after each and goes on
            files = metrics, tmp_path / f"{device.type}.safetensors"
            distill.distill(chosen, student, store, torch.arange(count), bags, source, dim, *files, device, stop_after=steps)
        losses.append([json.loads(line)["loss"] for line in metrics.read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)  # bf16 against fp32
