"""What a GPU computes against what the CPU computes: crops, augmentation, neighbours, the teacher, every method's loss;
and its memory. Skipped without one.
"""

import gc
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Trained, encoder, filled_store, kind_targets, photo, photos, planned, recipe, unit
from torch import Tensor

from bingo_compress.data import augment, pixel_store
from bingo_compress.data.listing import list_images
from bingo_compress.data.pixel_store import PixelStore
from bingo_compress.errors import BingoError
from bingo_compress.features import teacher_pass
from bingo_compress.features.bagging import knn
from bingo_compress.features.neighbours import nearest_neighbours
from bingo_compress.features.targets import PackedTargets, StoredTargets, TargetSpace, packed
from bingo_compress.kernels import negatives
from bingo_compress.models.encoder import build
from bingo_compress.training import loop, plan
from bingo_compress.training.loader import Lessons
from bingo_compress.training.losses import LOSSES, Batch, Queries, Targets, make_loss
from bingo_compress.training.plan import settle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LEVEL = 1 / 255
METHODS = [{"method": name} for name in LOSSES] + [
    {"method": "bingo", "variant": name} for name in ("paper", "official")
]

# As a student with known weights learns: its head alone, then all of it, by other rates and with statistics that stand.
KNOWN = {"method": "bingo", "head_first": 0.05, "backbone_lr": 0.1, "norms": "frozen"}


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(store: PixelStore) -> PixelStore:
    return PixelStore(store.pictures, GPU, "gpu")


def both_stores(count: int, side: int) -> tuple[PixelStore, PixelStore]:
    """The same pictures in memory and on the GPU."""
    pictures = [photo(number % 3, number, side, side + number % 7) for number in range(count)]
    aspect = torch.tensor([picture.shape[1] / picture.shape[0] for picture in pictures])
    one = pixel_store.store_of(pictures, aspect, CPU)
    return one, on_gpu(one)


@pytest.mark.parametrize(("side", "size"), [(80, 64), (300, 224), (60, 96)])
def test_views_are_the_cpus(side: int, size: int) -> None:
    here, there = both_stores(40, side)
    rows = torch.arange(40)
    drawn = augment.draw(here.aspect, torch.Generator().manual_seed(0))
    crops = [store.crops(rows, drawn.box, size) for store in (here, there)]
    away = (crops[0].int() - crops[1].cpu().int()).float()
    assert augment.fused() is not None  # the kernels, not the way without them
    assert crops[1].is_cuda and away.abs().max() <= 1
    assert away.abs().mean() < 0.25 and away.mean().abs() < 0.05  # the CPU's rounds between its two passes
    views = [augment.apply(found, drawn) for found in (crops[0], crops[0].to(GPU))]
    assert views[1].is_cuda and views[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(views[1].cpu(), views[0], atol=LEVEL / 2, rtol=0)  # convolutions in TF32


def test_views_without_triton_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows = both_stores(40, 80)[1], torch.arange(40)
    drawn = augment.draw(store.aspect, torch.Generator().manual_seed(2))
    found = []
    for kernels in (augment.fused(), None):
        monkeypatch.setattr(augment, "fused", lambda kernels=kernels: kernels)
        crops = store.crops(rows, drawn.box, 64)
        found.append((crops.int(), augment.apply(found[0][0].byte() if found else crops, drawn)))
    assert (found[0][0] - found[1][0]).abs().max() <= 1
    torch.testing.assert_close(found[0][1], found[1][1], atol=LEVEL / 2, rtol=0)


def test_pixels_kept_off_the_gpu_give_the_same_views() -> None:
    here = both_stores(20, 80)[0]
    moved = PixelStore(here.pictures, GPU)
    rows = torch.arange(20)
    box = augment.draw(here.aspect, torch.Generator().manual_seed(1)).box
    found = moved.crops(rows, box, 64)
    assert found.is_cuda and torch.equal(found.cpu(), here.crops(rows, box, 64))


def test_neighbours_are_the_cpus() -> None:
    rows = unit(3000, 64)
    for kind in (torch.float32, torch.float16):
        similar, indices = nearest_neighbours(rows.to(kind), rows.to(kind), 6, GPU)
        expected, places = nearest_neighbours(rows.to(kind), rows.to(kind), 6, CPU)
        torch.testing.assert_close(similar, expected, atol=2e-3, rtol=0)
        assert (indices == places).double().mean() > 0.98


def test_the_teacher_pass_is_the_cpus(tmp_path: Path) -> None:
    folder = list_images(photos(tmp_path / "photos", 6))
    seen = []
    for device in (CPU, GPU):
        work = tmp_path / device.type
        work.mkdir()
        store = pixel_store.build(folder, 40, work, device, "gpu" if device == GPU else "memory")[0]
        seen.append(teacher_pass.run(encoder(), folder, store, 2, 0.2, work, device))
    assert seen[0].key == seen[1].key
    for name in ("features", "embeddings", "views"):
        one, two = (getattr(found, name).float() for found in seen)
        assert torch.nn.functional.cosine_similarity(one, two, dim=-1).min() > 0.999, name


@pytest.mark.parametrize("mean", [False, True])
def test_packed_targets_are_the_cpus(mean: bool) -> None:
    kept, indices = packed(unit(30, 4, 17)), torch.arange(30)
    one, two = (
        PackedTargets(kept, device, mean=mean)(indices, torch.Generator().manual_seed(0), indices)
        for device in (CPU, GPU)
    )
    assert two.is_cuda and torch.allclose(two.cpu(), one, atol=1e-6)


def batch_on(device: torch.device, rows: list[Tensor]) -> tuple[Batch, list[Tensor]]:
    """A batch of every kind of tensor a loss may look at, and the queries, which want gradients."""
    queries = [part.to(device).clone().requires_grad_() for part in rows[:3]]
    anchor, mate, negatives = (part.to(device) for part in rows[3:6])
    masked = torch.arange(64).expand(8, 64).remainder(7).eq(0).to(device)
    targets = Targets(anchor, mate)
    return Batch(Queries(queries[0], queries[1], queries[2], 0.4), targets, targets, negatives, masked, 20), queries


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: "-".join(settings.values()))
def test_every_loss_is_the_cpus(settings: dict[str, str]) -> None:
    rows = [unit(8, 16, seed=number) for number in range(5)] + [unit(64, 16, seed=9)]
    found = []
    for device in (CPU, GPU):
        batch, queries = batch_on(device, rows)
        terms = make_loss(settings["method"], settings)(batch)
        torch.stack(list(terms.values())).sum().backward()
        used = [query.grad.cpu() for query in queries if query.grad is not None]
        found.append(({name: float(value) for name, value in terms.items()}, torch.cat(used)))
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-3, abs=1e-4)
    assert (found[1][1] - found[0][1]).norm() < 0.01 * found[0][1].norm()  # TF32


@pytest.mark.parametrize("method", ["bingo", "seed", "moco"])
@pytest.mark.parametrize(("count", "dim"), [(200, 256), (128, 40)])
def test_a_long_queue_by_its_kernel_is_the_cpus(count: int, dim: int, method: str) -> None:
    parts = [unit(count, dim, seed=number) for number in range(4)]
    queue = unit(negatives.WORTH + 77, dim, seed=9)
    masked = torch.arange(len(queue)).expand(count, -1).remainder(torch.arange(2, 2 + count)[:, None]).eq(0)
    found = []
    for device in (CPU, GPU):
        queries = [part.to(device).clone().requires_grad_() for part in parts[:2]]
        targets = Targets(*(part.to(device) for part in parts[2:]))
        assert negatives._by_kernel(queue.to(device)) == (device == GPU)
        batch = Batch(Queries(*queries), targets, targets, queue.to(device), masked.to(device), 0)
        loss = torch.stack(list(make_loss(method, {})(batch).values())).sum()
        loss.backward()
        found.append((float(loss), torch.cat([query.grad.cpu() for query in queries if query.grad is not None])))
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-3)
    assert (found[1][1] - found[0][1]).norm() < 0.01 * found[0][1].norm()


def train(folder: Path, device: torch.device, stops: tuple[int, ...], **settings: Any) -> Trained:
    """A distillation of 48 pictures that leaves after each of `stops` and goes on."""
    count, dim = 48, 16
    chosen = settle(recipe(**{"student": "test_resnet", "device": device.type, "compile": "off", **settings}))
    loss = plan.loss_of(chosen)
    targets = kind_targets(count, 2, dim)
    bags = knn(targets[:, 0], 3)[0]
    store = filled_store(count)
    source = None
    if loss.teacher:
        mean = chosen.stored_views == "mean"
        source = StoredTargets(targets, TargetSpace(None, None), device, lengths=loss.lengths, mean=mean)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "metrics.jsonl", folder / "checkpoint.safetensors"
    for steps in stops:
        student = encoder(chosen.student)
        pictures = on_gpu(store) if device == GPU else store
        lessons = Lessons(pictures, torch.arange(count), bags, source)
        loop.distill(planned(chosen, count, dim, device), student, lessons, *files, stop_after=steps)
    return Trained(student, *files)


@pytest.mark.parametrize("settings", [*METHODS, KNOWN], ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_distillation_has_the_cpus_losses(settings: dict[str, Any], tmp_path: Path) -> None:
    # A line of metrics a step: it stops after each and goes on.
    losses = [
        [line["loss"] for line in train(tmp_path / kind.type, kind, (1, 2, 3, 4, 5, 6), **settings).lines]
        for kind in (CPU, GPU)
    ]
    assert len(losses[1]) == 6
    # bf16 against fp32: a step is close, and six of them drift apart.
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.02)
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.02)


@pytest.mark.parametrize("method", ["bingo", "disco", "self"])
def test_a_resumed_run_is_the_uninterrupted_one(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    whole, again = (train(tmp_path / name, GPU, (12,), method=method).weights for name in ("whole", "again"))
    resumed = train(tmp_path / "resumed", GPU, (1, 5, 12), method=method).weights
    noise = max(float((value.float() - again[name].float()).abs().max()) for name, value in whole.items())
    away = max(float((value.float() - resumed[name].float()).abs().max()) for name, value in whole.items())
    print(f"{method}: two whole runs differ by {noise:.3g}, a resumed one by {away:.3g}")
    assert away <= 2 * noise  # bit-equal where the GPU's own kernels are


# (student, BatchNorm in it): the first can but recompute, the second is cut into micro-batches as well.
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_too_little_memory_is_a_slower_step_with_the_same_result(
    name: str, tmp_path: Path, printed: io.StringIO
) -> None:
    total, held = torch.cuda.get_device_properties(0).total_memory, 0
    # Of a ResNet recomputing saves less than half of the activations; they must be most of what is held.
    count, dim, size = (256, 16, 160) if name == "resnet18" else (128, 16, 128)
    targets = kind_targets(count, 2, dim)
    bags, store = knn(targets[:, 0], 3)[0], filled_store(count, size)
    chosen = settle(recipe(student=name, image_size=size, batch_size=count, device="cuda", compile="off"))

    def losses(limit: float, folder: Path) -> list[float]:
        nonlocal held
        gc.collect()  # what a failed step held
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.set_per_process_memory_fraction(min((held + limit) / total, 1.0))
        folder.mkdir()
        files = folder / "metrics.jsonl", folder / "checkpoint.safetensors"
        for steps in (1, 2, 3):
            torch.manual_seed(0)
            student = build(name, size, "random", "--test")
            source = StoredTargets(targets, TargetSpace(None, None), GPU, mean=True)
            lessons = Lessons(on_gpu(store), torch.arange(count), bags, source)
            loop.distill(planned(chosen, count, dim, GPU), student, lessons, *files, stop_after=steps)
        return [json.loads(line)["loss"] for line in files[0].read_text().splitlines()]

    try:
        torch.cuda.reset_peak_memory_stats()
        plain = losses(total, tmp_path / "plain")
        peak = torch.cuda.max_memory_allocated() - held
        outcomes = []
        for percent in (90, 75, 60, 45, 30, 20, 10, 2):
            printed.truncate(0)
            try:
                found = losses(peak * percent / 100, tmp_path / str(percent))
                text = printed.getvalue()
                outcomes.append((percent, 2 if "micro-batches" in text else int("recomputed" in text)))
                assert found == pytest.approx(plain, rel=0.02), percent
            except BingoError:
                outcomes.append((percent, -1))
            except torch.OutOfMemoryError:  # not in a step: cli.py says it in a line
                outcomes.append((percent, -2))
        print(
            f"{name}: peak {peak / 1e6:.0f} MB; (percent of it; 1 recomputed, 2 in parts, -1 for the ladder's end, -2"
            f" elsewhere): {outcomes}"
        )
        assert any(rungs > 0 for _, rungs in outcomes) and outcomes[-1][1] < 0
        if name.startswith("vit"):
            assert any(rungs > 1 for _, rungs in outcomes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_photos_streamed_through_nvjpeg_are_pillows(clothing: Path, tmp_path: Path, printed: io.StringIO) -> None:
    folder = list_images(clothing / "test")
    folder = replace(folder, files=folder.files[:96])
    found = []
    for device in (CPU, GPU):
        (tmp_path / device.type).mkdir()
        store = pixel_store.build(folder, 256, tmp_path / device.type, device, "stream")[0]
        rows = torch.arange(96)
        found.append(
            store.crops(rows, augment.draw(store.aspect, torch.Generator().manual_seed(0)).box, 224).cpu().int()
        )
    assert "nvJPEG cannot" not in printed.getvalue() and "of them by nvJPEG" in printed.getvalue()
    away = (found[0] - found[1]).abs().float()
    print(
        f"nvJPEG against Pillow, 96 photos: mean {away.mean():.3f} levels, 99% under"
        f" {away.flatten()[::97].quantile(0.99):.0f}"
    )
    assert away.mean() < 2
