"""--dry-run: what a run would do and cost, measured on a few images and steps of the real models."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from bingo_compress.data import image_folder, quarantine
from bingo_compress.data.decode import decode_all
from bingo_compress.data.pixel_store import guess, store_side
from bingo_compress.errors import BingoError
from bingo_compress.features import teacher_pass
from bingo_compress.models.encoder import Encoder
from bingo_compress.models.trained import NOTHING_GIVEN, Given, build_models
from bingo_compress.recipe import Recipe, recipe_text
from bingo_compress.report.tables import header
from bingo_compress.runtime import console
from bingo_compress.runtime.devices import choose_device, saved_bytes
from bingo_compress.training.material import split, step_memory, target_width, views_stored
from bingo_compress.training.plan import loss_of, make_head, plan, resolve

SAMPLE = 64
SAMPLE_VIEWS = 16
TEACHER_VIEWS = 4


def estimate(recipe: Recipe, out: Path, given: Given = NOTHING_GIVEN) -> None:
    """Print the resolved recipe, model sizes, steps, memory and time, and write nothing. Raises BingoError as a real
    run would.
    """
    folder = quarantine.take(recipe)
    plan(recipe, len(folder.files))
    device = choose_device(recipe.device)
    models = build_models(resolve(recipe), given)
    # Which number of threads is fastest is found out when the run begins: that takes longer than all that is here.
    recipe = models.recipe
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    step_memory(recipe, models.student, len(folder.files), device)
    header(recipe, models.teacher, models.student, folder, device)
    console.say(recipe_text(recipe).rstrip())
    held, training = split(len(folder.files), recipe)
    planned = plan(recipe, len(training))
    console.say(f"{len(training):,} images to train on, {len(held):,} held out; {planned.describe()}")

    side, count = store_side(recipe.image_size, recipe.teacher_size), len(folder.files)
    views = views_stored(recipe)
    decode = _decode_seconds(folder)
    teacher = _teacher_seconds(models.teacher, device)
    dim, loss = target_width(recipe, models.teacher, len(training)), loss_of(recipe)
    stored = (views + 1) * teacher_pass.embedding_width(models.teacher) + models.teacher.width  # numbers an image
    step, activations = _step_cost(models.student, recipe, planned.batch_size * planned.student_views, dim, device)
    online = (
        planned.batch_size * teacher * (2 if loss.both else 1) if loss.teacher and recipe.views == "online" else 0.0
    )

    head = sum(parameter.numel() for parameter in make_head(recipe, models.student.width, dim).parameters())
    parameters = models.student.parameters_count() + head
    memory = {
        "student, head, gradients and optimiser": 4 * parameters * (4 if planned.optimizer == "adamw" else 3),
        **({"the student's moving average": 4 * parameters} if loss.momentum else {}),
        "activations of a step": activations,
        "teacher": 4 * models.teacher.parameters_count(),
        "queue": 4 * dim * planned.queue_size,
        "stored targets": 2 * dim * views * count,
        "teacher's features and views while bags are made": 2 * stored * count,
    }
    disk = {"pixel store": guess(count, side), "teacher's embeddings": 2 * stored * count}
    console.table(
        "memory",
        ("", "estimate"),
        [
            *((name, console.size(size)) for name, size in memory.items()),
            ("together, at most", console.size(sum(memory.values()))),
        ],
    )
    console.table(
        f"disk, in {out / 'work'}", ("", "estimate"), [(name, console.size(size)) for name, size in disk.items()]
    )
    stages = {
        "decode images": count * decode,
        f"teacher, {views + 1} views": count * (views + 1) * teacher,
        f"distil, {planned.steps:,} steps": planned.steps * (step + online),
    }
    console.table(
        "time, from a few steps measured now",
        ("", "estimate"),
        [
            *((name, console.duration(seconds)) for name, seconds in stages.items()),
            ("together", console.duration(sum(stages.values()))),
        ],
    )
    console.say("dry run: nothing was written; leave --dry-run out to start")


def _decode_seconds(folder: image_folder.Folder) -> float:
    sample = range(0, len(folder.files), max(1, len(folder.files) // SAMPLE))
    start = time.perf_counter()
    good = sum(
        not isinstance(result, Exception) for _, result in decode_all(folder, sample, lambda pixels: pixels.shape)
    )
    if not good:
        raise BingoError(
            f"--data: expected images, found none that can be decoded among {len(sample)} tried in {folder.root}"
        )
    return (time.perf_counter() - start) / len(sample)


def _teacher_seconds(teacher: Encoder, device: torch.device) -> float:
    size = teacher.preprocessing.size
    teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = torch.rand(TEACHER_VIEWS, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        return _seconds(lambda: teacher(batch), device) / len(batch)


def _step_cost(student: Encoder, recipe: Recipe, views: int, dim: int, device: torch.device) -> tuple[float, float]:
    """(seconds of a step, bytes of its activations), from a step on at most SAMPLE_VIEWS views, scaled up."""
    size = student.preprocessing.size
    head = make_head(recipe, student.width, dim).to(device)
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
