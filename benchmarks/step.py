"""Our loop against its limit: forward, backward and optimiser of the same student and head on one fixed batch in
memory.

python benchmarks/step.py [--student mobilenetv3_small_100 ...] [--size 224] [--batch 32 ...] [--threads 1] [--seconds
0] [--steps 12] [--json FILE]

Ours is `distill.distill` itself on stored views and pixels in memory (on a GPU, on the GPU). A ratio of 1 would mean
that crops, augmentation, bags, targets, queue and loss cost nothing. Wall time counts that batches are made ahead, on a
free core or beside the student on the GPU; CPU time counts all cores' work. Several students and batches are measured
in turn. --seconds: steps are chosen so that a measurement takes about so long. On a GPU the shares of the time by part
are printed (side by side, so their sum may exceed 1; `wait` is the GPU's own), and what making a batch takes alone.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from bingo_compress.features.targets import StoredTargets, TargetSpace
from bingo_compress.models.encoder import build
from bingo_compress.recipe import Recipe, make_recipe
from bingo_compress.runtime import checkpoint
from bingo_compress.runtime.machine import keep_memory
from bingo_compress.training import loop
from bingo_compress.training.loader import Lessons, Maker
from bingo_compress.training.metrics import PARTS, Meter
from bingo_compress.training.plan import Plan, TeacherShape, make_plan, settle
from bingo_compress.training.state import make_head, make_optimizer

from synthetic import store_of  # isort: skip

DIM = 256
WARM, MOST = 5, 500  # steps
SHOWN = (
    100_000  # images of the training set, by their bags and targets; their pixels are those of a few, again and again
)


@dataclass(frozen=True)
class Case:
    """One student at one batch: what both sides train."""

    recipe: Recipe
    store: Any
    training: Tensor
    bags: Tensor
    targets: Tensor
    device: torch.device

    def source(self) -> StoredTargets:
        return StoredTargets(self.targets, TargetSpace(None, None), self.device, mean=True)

    def plan(self) -> Plan:
        return make_plan(self.recipe, SHOWN, self.device, TeacherShape(DIM, DIM, projected=True))

    def lessons(self, source: StoredTargets) -> Lessons:
        return Lessons(self.store, self.training, self.bags, source)

    def student(self) -> Any:
        return build(self.recipe.student, self.recipe.image_size, "random", "--student")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", default=["mobilenetv3_small_100"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[32], help="anchors; the student sees two views of each"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0, help="of a measurement; 0: --steps steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024, help="whose pixels are held")
    parser.add_argument("--queue", type=int, default=1024)
    parser.add_argument("--compile", default="off", choices=("on", "off"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    keep_memory()
    torch.set_num_threads(chosen.threads)
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")  # as in a run
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {chosen.threads} threads"
    store = store_of(chosen.images, chosen.size, device)
    random = np.random.default_rng(0)
    targets = torch.from_numpy(random.normal(size=(chosen.images, 4, DIM)).astype(np.float32))
    bags = torch.from_numpy(random.integers(0, SHOWN, (SHOWN, 5)))
    facts = {"device": where, "torch": torch.__version__, **{k: v for k, v in vars(chosen).items() if k != "json"}}
    rows: list[dict[str, Any]] = []
    print(
        f"{chosen.size} px, 2 views an anchor, queue {chosen.queue:,}, compile {chosen.compile}, {where}; median of"
        f" {chosen.rounds}"
    )
    head = ("student", "batch", "limit s", "ours s", "wall", "CPU", "limit im/s", "ours im/s", *PARTS, "making s")
    print("{:<22}{:>6}{:>9}{:>9}{:>6}{:>6}{:>11}{:>10}{:>8}{:>8}{:>8}{:>8}{:>6}{:>6}{:>9}".format(*head))
    for student in chosen.student:
        for batch in chosen.batch:
            settings = {"student": student, "image_size": chosen.size, "batch_size": batch, "queue_size": chosen.queue}
            recipe = distill_recipe(
                {**settings, "epochs": 10_000, "student_weights": "random", "compile": chosen.compile}
            )
            row = measured(Case(recipe, store, torch.arange(SHOWN) % chosen.images, bags, targets, device), chosen)
            rows.append({"student": student, "batch": batch, **row})
            figures = [
                row["limit_wall"],
                row["ours_wall"],
                row["wall"],
                row["cpu"],
                row["limit_images_per_s"],
                row["ours_images_per_s"],
            ]
            shares = [row[f"share_{part}"] for part in PARTS]
            print(
                "{:<22}{:>6}{:>9.4f}{:>9.4f}{:>6.2f}{:>6.2f}{:>11,.0f}{:>10,.0f}".format(student, batch, *figures)
                + "{:>8.0%}{:>8.0%}{:>8.0%}{:>8.0%}{:>6.0%}{:>6.0%}{:>9.4f}".format(*shares, row["making"]),
                flush=True,
            )
            if chosen.json:
                chosen.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def measured(case: Case, chosen: argparse.Namespace) -> dict[str, float]:
    """Seconds a step of both sides by both clocks, their ratios, views a second, shares of ours by part, and seconds to
    make a batch with nothing beside it.
    """
    ours(case, WARM), limit(case, WARM)
    steps = chosen.steps
    if chosen.seconds:
        pilot = limit(case, WARM + 5)[0] - limit(case, WARM)[0]
        steps = min(max(round(chosen.seconds / max(pilot / 5, 1e-4)), 10), MOST)
    found: dict[str, list[float]] = {"ours_wall": [], "ours_cpu": [], "limit_wall": [], "limit_cpu": []}
    shares: dict[str, float] = {}
    for _ in range(chosen.rounds):  # in turn, so that a busy moment hits both
        # The difference of a long and a short run: start, last checkpoint and the first, slower steps cancel out.
        short, (long, shares) = ours(case, WARM)[0], ours(case, WARM + steps)
        least, most = limit(case, WARM), limit(case, WARM + steps)
        for name, before, after in (("ours", short, long), ("limit", least, most)):
            for place, clock in enumerate(("wall", "cpu")):
                found[f"{name}_{clock}"].append((after[place] - before[place]) / steps)
    row = {name: statistics.median(values) for name, values in found.items()}
    views = 2 * case.recipe.batch_size
    row |= (
        {clock: row[f"limit_{clock}"] / row[f"ours_{clock}"] for clock in ("wall", "cpu")} | shares | {"steps": steps}
    )
    row |= {f"{name}_images_per_s": views / row[f"{name}_wall"] for name in ("ours", "limit")}
    return row | making(case, min(steps, 30))


def ours(case: Case, steps: int) -> tuple[tuple[float, float], dict[str, float]]:
    """(wall, CPU) seconds of `steps` of the loop itself, and its shares of the time."""
    source, student = case.source(), case.student()
    # It is not what is measured, and takes from one time to the next as long as several steps.
    unsaved = patch.object(checkpoint, "save_keeping")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), unsaved:
        files = (Path(folder) / "metrics.jsonl", Path(folder) / "checkpoint.safetensors")
        start = clocks(case.device)
        loop.distill(case.plan(), student, case.lessons(source), *files, stop_after=steps)
        spent = since(start, case.device)
        line = json.loads(files[0].read_text().splitlines()[-1])
    return spent, {name: value for name, value in line.items() if name.startswith("share_")}


def limit(case: Case, steps: int) -> tuple[float, float]:
    """(wall, CPU) seconds of `steps` of student and optimiser alone."""
    recipe, device, student = case.recipe, case.device, case.student()
    head = make_head(case.plan(), student.width).to(device)
    student.to(device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(case.plan(), {"student": student, "head": head})
    model: Any = nn.Sequential(student, head)
    if recipe.compile == "on":
        model = torch.compile(model, dynamic=False)
    views = torch.rand(2 * recipe.batch_size, 3, recipe.image_size, recipe.image_size, device=device)
    views = views.contiguous(memory_format=torch.channels_last)
    start = clocks(device)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(views).float().square().sum()
        loss.backward()
        optimizer.step()
    return since(start, device)


def making(case: Case, steps: int) -> dict[str, float]:
    """Seconds a batch takes to make with nothing beside it: all, and by part."""
    meter = Meter(case.device)
    maker = Maker(case.plan(), case.lessons(case.source()), case.recipe.image_size, meter)
    maker(0, case.bags)
    start = clocks(case.device)
    meter.read()
    for step in range(steps):
        maker(step, case.bags)
    spent = since(start, case.device)[0] / steps
    return {"making": spent} | {f"making_{part}": seconds / steps for part, seconds in meter.read().items() if seconds}


def distill_recipe(settings: dict[str, object]) -> Recipe:
    """A default recipe of these settings, its open ends filled in."""
    return settle(
        make_recipe({"queue_size": 1024, "compile": "off", **settings, "save_every_minutes": 1000.0}, "benchmark")
    )


def clocks(device: torch.device) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float], device: torch.device) -> tuple[float, float]:
    """(wall, CPU) seconds since `start`."""
    wall, cpu = clocks(device)
    return wall - start[0], cpu - start[1]


if __name__ == "__main__":
    main()
