"""--dry-run: what a run would do and cost, measured on a few images and steps of the real models."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from bingo_compress.data.decode import decode_all
from bingo_compress.data.image_list import ImageList
from bingo_compress.data.pixel_store import guess
from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import Encoder
from bingo_compress.models.trained import NOTHING_GIVEN, Given, Models, build_models
from bingo_compress.recipe import Recipe, recipe_text
from bingo_compress.report.tables import header
from bingo_compress.runtime import console, machine
from bingo_compress.runtime.devices import saved_bytes
from bingo_compress.sources.opened import absolute_recipe
from bingo_compress.training.material import split
from bingo_compress.training.plan import Plan, begin, plan_run
from bingo_compress.training.state import make_head

SAMPLE = 64
SAMPLE_VIEWS = 16
TEACHER_VIEWS = 4


def estimate(recipe: Recipe, out: Path, given: Given = NOTHING_GIVEN) -> None:
    """Print the resolved recipe, model sizes, steps, memory and time, and write nothing. Raises BingoError as a real
    run would.
    """
    resolved, folder, device = begin(absolute_recipe(recipe))
    models = build_models(resolved, given)
    count = len(folder.files)
    # A run tries out how many threads are fastest, which takes longer than all that is here.
    threads = 0 if resolved.threads else min(torch.get_num_threads(), machine.free_cores())
    plan = plan_run(models, count, device, threads)
    header(plan, models, folder)
    console.say(recipe_text(models.recipe).rstrip())
    held, training = split(torch.arange(count), plan.recipe)
    plan = plan.on(len(training))
    console.say(f"{len(training):,} images to train on, {len(held):,} held out; {plan.describe()}")

    decode, teacher = _decode_seconds(folder), _teacher_seconds(models.teacher, device)
    step, activations = _step_cost(plan, models.student)
    schedule, passes = plan.schedule, count * (plan.views + 1)
    memory, disk = _memory(plan, models, activations, count), _disk(plan, count)
    stages = {
        "decode images": count * decode,
        f"teacher, {plan.views + 1} views": passes * teacher,
        f"distil, {schedule.steps:,} steps": schedule.steps * (step + schedule.batch_size * plan.asked * teacher),
    }
    sizes = {name: console.size(size) for name, size in memory.items()}
    _table("memory", sizes | {"together, at most": console.size(sum(memory.values()))})
    _table(f"disk, in {out / 'work'}", {name: console.size(size) for name, size in disk.items()})
    times = {name: console.duration(seconds) for name, seconds in stages.items()}
    _table("time, from a few steps measured now", times | {"together": console.duration(sum(stages.values()))})
    console.say("dry run: nothing was written; leave --dry-run out to start")


def _table(title: str, rows: dict[str, str]) -> None:
    console.table(title, ("", "estimate"), list(rows.items()))


def _memory(plan: Plan, models: Models, activations: float, count: int) -> dict[str, float]:
    """Bytes by what holds them, for a folder of `count` files."""
    head = sum(parameter.numel() for parameter in make_head(plan, models.student.width).parameters())
    parameters = models.student.parameters_count() + head
    kept = min(plan.views, 1) if plan.recipe.stored_views == "mean" else plan.views  # targets an image
    return {
        "student, head, gradients and optimiser": 4 * parameters * (4 if plan.schedule.optimizer == "adamw" else 3),
        **({"the student's moving average": 4 * parameters} if plan.loss.momentum else {}),
        "activations of a step": activations,
        "teacher": 4 * models.teacher.parameters_count(),
        "queue": 4 * plan.dim * plan.schedule.queue_size,
        "stored targets": 2 * plan.dim * kept * count,
        "teacher's features and views while bags are made": 2 * plan.stored * count,
    }


def _disk(plan: Plan, count: int) -> dict[str, int]:
    return {"pixel store": guess(count, plan.side), "teacher's embeddings": 2 * plan.stored * count}


def _decode_seconds(folder: ImageList) -> float:
    sample = range(0, len(folder.files), max(1, len(folder.files) // SAMPLE))
    start = time.perf_counter()
    good = sum(
        not isinstance(result, Exception) for _, result in decode_all(folder, sample, lambda pixels: pixels.shape)
    )
    if not good:
        raise BingoError(
            f"--data: expected images, found none that can be decoded among {len(sample)} tried in {folder.where}"
        )
    return (time.perf_counter() - start) / len(sample)


def _teacher_seconds(teacher: Encoder, device: torch.device) -> float:
    size = teacher.preprocessing.size
    teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = torch.rand(TEACHER_VIEWS, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        return _seconds(lambda: teacher(batch), device) / len(batch)


def _step_cost(plan: Plan, student: Encoder) -> tuple[float, float]:
    """(seconds of a step, bytes of its activations), from a step on at most SAMPLE_VIEWS views, scaled up."""
    size, device = student.preprocessing.size, plan.device
    views = plan.schedule.batch_size * plan.schedule.student_views
    head = make_head(plan, student.width).to(device)
    student.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    tried = min(views, SAMPLE_VIEWS)
    batch = torch.rand(tried, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            head(student(batch)).sum().backward()

    saved = saved_bytes(step)  # first: it also warms up
    return _seconds(step, device) * views / tried, saved * views / tried


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call: an estimate need not be exact, and a large teacher takes seconds."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
