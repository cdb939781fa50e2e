"""--dry-run: what a run would do and cost, measured on a few images and steps of the real models."""

import time
from pathlib import Path

import torch

from bingo_compress import budget
from bingo_compress.data import pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.models.trained import NOTHING_GIVEN, Given, Models, build_models
from bingo_compress.presenting.tables import header
from bingo_compress.recipe import Recipe, recipe_text
from bingo_compress.runtime import console, machine, run_dir
from bingo_compress.sources.opened import absolute_recipe
from bingo_compress.training.plan import Plan, begin, held_out, plan_run
from bingo_compress.training.state import make_head

LISTED = 220  # bytes of memory an image, beside its pixels and targets, at most (docs/scaling.md)
# Of files: the system takes their memory back when it needs it.
MAPPED = ("stored targets, mapped from a file", "teacher's features and views, mapped while bags are made")


def estimate(
    recipe: Recipe, out: Path, given: Given = NOTHING_GIVEN, began: float | None = None, images: int = 0
) -> None:
    """Print the resolved recipe, model sizes, steps, memory and time, and write nothing. began: as in `run_distill`;
    images: as if the folder had so many; 0: those that it has. Raises BingoError as a real run would, and where the
    disk or the memory is too small.
    """
    began = time.monotonic() if began is None else began
    resolved, folder, device = begin(absolute_recipe(recipe))
    models = build_models(resolved, given)
    count = images or len(folder.files)
    # A run tries out how many threads are fastest, which takes longer than all that is here.
    threads = 0 if resolved.threads else min(torch.get_num_threads(), machine.free_cores())
    plan = plan_run(models, count, device, threads)
    rates, gone = budget.measure(plan, models, folder), time.monotonic() - began
    if recipe.time:
        plan = budget.expected(plan, rates, count, gone, any_views="views" not in recipe.model_fields_set)
    header(plan, models, folder)
    chosen = {"epochs": plan.recipe.epochs, "views": plan.recipe.views}
    console.say(recipe_text(models.recipe.model_copy(update=chosen)).rstrip())
    held = held_out(plan.recipe, count)
    plan = plan.on(count - held)
    console.say(f"{count - held:,} images to train on, {held:,} held out; {plan.describe()}")

    activations = rates.activations * plan.schedule.batch_size * plan.schedule.student_views
    memory, disk = _memory(plan, models, activations, count), _disk(plan, count, out / "work")
    stages = {"start": gone} | budget.stages(plan, rates, count, held)
    sizes = {name: console.size(size) for name, size in memory.items()}
    _table("memory", sizes | {"together, at most": console.size(sum(memory.values()))})
    _table(f"disk, in {out / 'work'}", {name: console.size(size) for name, size in disk.items()})
    times = {name: console.duration(seconds) for name, seconds in stages.items()}
    _table("time, from a few steps measured now", times | {"together": console.duration(sum(stages.values()))})
    _refuse_too_large(plan, out, sum(disk.values()), sum(size for name, size in memory.items() if name not in MAPPED))
    console.say("dry run: nothing was written; leave --dry-run out to start")


def _refuse_too_large(plan: Plan, out: Path, disk: float, memory: float) -> None:
    """Raise BingoError where the run needs more bytes of the disk of `out`, or of memory, than there are."""
    run_dir.need_space(out.resolve(), round(disk), "the run")
    limit = machine.parse_memory(plan.recipe.memory) or machine.free_memory()
    if memory > limit:
        raise BingoError(
            f"memory: expected {console.size(memory)} for the run beside what is mapped from files, found"
            f" {console.size(limit)}; give fewer images, or a smaller --batch-size"
        )


def _table(title: str, rows: dict[str, str]) -> None:
    console.table(title, ("", "estimate"), list(rows.items()))


def _memory(plan: Plan, models: Models, activations: float, count: int) -> dict[str, float]:
    """Bytes by what holds them, for a folder of `count` files."""
    head = sum(parameter.numel() for parameter in make_head(plan, models.student.width).parameters())
    parameters = models.student.parameters_count() + head
    packed = plan.views * plan.view_bytes * count if plan.packed else 0  # one file for bags and targets
    return {
        "student, head, gradients and optimiser": 4 * parameters * (4 if plan.schedule.optimizer == "adamw" else 3),
        **({"the student's moving average": 4 * parameters} if plan.loss.momentum else {}),
        "activations of a step": activations,
        "teacher": 4 * models.teacher.parameters_count(),
        "queue": 4 * plan.dim * plan.schedule.queue_size,
        "names, sizes, neighbours and bags": LISTED * count,
        MAPPED[0]: packed + plan.target_bytes * count,
        MAPPED[1]: plan.stored_bytes * count - packed,
    }


def _disk(plan: Plan, count: int, work: Path) -> dict[str, int]:
    embeddings, own, wanted = plan.stored_bytes * count, plan.target_bytes * count, plan.recipe.pixels
    chosen = pixel_store.choose(count, plan.side, work.resolve(), embeddings + own) if wanted == "auto" else wanted
    kind = pixel_store.kind_of(chosen, count, plan.side, work.resolve())
    pixels = pixel_store.guess(count, plan.side, kind)
    return {f"pixel store, {kind}": pixels, "teacher's embeddings": embeddings, "stored targets": own}
