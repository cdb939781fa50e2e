"""Our loop against its limit: forward, backward and optimiser of the same student and head on one fixed batch in memory.

python benchmarks/step.py [--student mobilenetv3_small_100] [--size 224] [--batch 32] [--threads 1] [--steps 12] [--images 1024] [--json FILE]

Ours is `distill.distill` itself on stored views and pixels in memory. A ratio of 1 would mean that crops, augmentation, bags, targets, queue and loss
cost nothing. Wall time counts that batches are made ahead on a free core; CPU time counts all cores' work.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bingo_compress import distill
from bingo_compress.bagging import knn
from bingo_compress.embed import StoredTargets, TargetSpace
from bingo_compress.encoder import build
from bingo_compress.memory import keep_memory
from bingo_compress.recipe import make_recipe

from synthetic import store_of  # isort: skip

DIM = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="mobilenetv3_small_100")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32, help="anchors; the student sees two views of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024, help="also the length of the queue")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    keep_memory()
    torch.set_num_threads(chosen.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = store_of(chosen.images, chosen.size, device)
    targets = torch.from_numpy(np.random.default_rng(0).normal(size=(chosen.images, 4, DIM)).astype(np.float32))
    bags = knn(targets[:, 0], 5)[0]
    settings = {
        "student": chosen.student,
        "image_size": chosen.size,
        "batch_size": chosen.batch,
        "epochs": 10_000,
        "student_weights": "random",
    }
    recipe = distill_recipe(settings)

    def ours(steps: int) -> tuple[float, float]:
        source = StoredTargets(targets, TargetSpace(None, None), device, mean=True)
        student = build(chosen.student, chosen.size, "random", "--student")
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            files = (Path(folder) / "metrics.jsonl", Path(folder) / "checkpoint.safetensors")
            start = clocks(device)
            distill.distill(recipe, student, store, torch.arange(chosen.images), bags, source, DIM, *files, device, stop_after=steps)
            return tuple(after - before for before, after in zip(start, clocks(device), strict=True))  # type: ignore[return-value]

    def limit(steps: int) -> tuple[float, float]:
        student = build(chosen.student, chosen.size, "random", "--student")
        head = distill.make_head(recipe, student.width, DIM).to(device)
        student.to(device, memory_format=torch.channels_last).train()
        optimizer = distill.make_optimizer(recipe, distill.plan(recipe, chosen.images), [student, head])
        model = nn.Sequential(student, head)
        views = torch.rand(2 * chosen.batch, 3, chosen.size, chosen.size, device=device).contiguous(memory_format=torch.channels_last)
        start = clocks(device)
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(views).float().square().sum()
            loss.backward()
            optimizer.step()
        return tuple(after - before for before, after in zip(start, clocks(device), strict=True))  # type: ignore[return-value]

    ours(2), limit(2)
    found: dict[str, list[float]] = {"ours_wall": [], "ours_cpu": [], "limit_wall": [], "limit_cpu": []}
    for _ in range(chosen.rounds):  # in turn, so that a busy moment hits both
        for name, work in (("ours", ours), ("limit", limit)):
            # The difference of a long and a short run: start, last checkpoint and the first, slower steps cancel out.
            short, long = work(2), work(2 + chosen.steps)
            for clock, before, after in zip(("wall", "cpu"), short, long, strict=True):
                found[f"{name}_{clock}"].append((after - before) / chosen.steps)
    middle = {name: statistics.median(values) for name, values in found.items()}
    ratios = {clock: middle[f"limit_{clock}"] / middle[f"ours_{clock}"] for clock in ("wall", "cpu")}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {chosen.threads} threads"
    print(
        f"{chosen.student}, {chosen.size} px, {chosen.batch} anchors x 2 views, queue {recipe.queue_size:,}, {where}; seconds a step, median of {chosen.rounds}"
    )
    print(f"{'':<8}{'limit':>10}{'ours':>10}{'limit/ours':>12}")
    for clock in ("wall", "cpu"):
        print(f"{clock:<8}{middle[f'limit_{clock}']:>10.4f}{middle[f'ours_{clock}']:>10.4f}{ratios[clock]:>12.2f}")
    if chosen.json:
        facts = {"device": where, "torch": torch.__version__, **{k: v for k, v in vars(chosen).items() if k != "json"}}
        chosen.json.write_text(json.dumps({**facts, "seconds": found, "ratios": ratios}, indent=2) + "\n")


def distill_recipe(settings: dict[str, object]) -> distill.Recipe:
    """A default recipe of these settings, its open ends filled in."""
    from bingo_compress.resolving import settle

    return settle(make_recipe({"queue_size": 1024, **settings, "save_every_minutes": 1000.0}, "benchmark"))


def clocks(device: torch.device) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main()
