"""Array jobs: the first stages of a run, decoding and the teacher's pass, by jobs on many machines that share a folder
and never talk.
"""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bingo_compress.data import image_list
from bingo_compress.data.image_list import ImageList
from bingo_compress.errors import BingoError
from bingo_compress.models import trained
from bingo_compress.models.trained import NOTHING_GIVEN, Given, Models, build_models
from bingo_compress.recipe import Recipe, load_recipe, recipe_text
from bingo_compress.runtime import checkpoint, console, devices, distributed, run_dir
from bingo_compress.runtime.made_of import FORMATS, made_of
from bingo_compress.sources.opened import absolute_recipe
from bingo_compress.training import material
from bingo_compress.training.plan import begin, make_plan, shape_of


def embed(recipe: Recipe, out: Path, share: tuple[int, int], given: Given = NOTHING_GIVEN) -> tuple[bool, bool]:
    """Make share (number, jobs) of the pixels in `out` and, once those of all jobs are there, of the teacher's pass,
    for a `distill` that goes on with them: (whether the pixels of all are there, whether all is). Other jobs may run at
    the same time; none is waited for, and what is there is not made again. Raises BingoError.
    """
    number, jobs = share
    run, asked = run_dir.RunDir(out), absolute_recipe(recipe)
    before = load_recipe(run.as_run) if run.recipe.is_file() else None
    resolved, folder, device = begin(trained.as_begun(asked, before))
    models = build_models(resolved, given)
    if before and (difference := trained.changed(before, models.recipe)):
        raise _other(out, difference)
    plan = make_plan(models.recipe, len(folder.files), device, shape_of(models.teacher))
    plan, asked = material.with_room(plan, asked, models.student, folder, out, new=before is None, by_jobs=True)
    models = replace(models, recipe=plan.recipe)
    run_dir.open_shared(out, f"{number}-of-{jobs}")
    _begin(run, models, folder, device)
    if not run.recipe.is_file():  # after all else: with it the folder is a run
        with run_dir.atomic_first(run.recipe) as file:
            file.write_text(recipe_text(asked), encoding="utf-8")
    image_list.keep(run.work, folder)

    next_ = f"bingo-compress distill --out {shlex.quote(str(out))} --resume"
    try:
        with distributed.as_job(number, jobs):
            # Packed ones, too, as the teacher gives them: `distill` knows their space when all are there.
            material.embed(plan, models.teacher, folder, run.work, plan.views)
    except distributed.Unfinished as others:
        decoded = others.stage == "embedded"
        then = f"the run goes on with: {next_}" if decoded else "the same command again embeds"
        console.say(
            f"share {number}/{jobs} is {others.stage}; {others.left:,} of {others.parts:,} parts are left to others;"
            f" when all are {others.stage}, {then}"
        )
        return decoded, False
    console.say(f"all shares are embedded; next: {next_}")
    return True, True


def _begin(run: run_dir.RunDir, models: Models, folder: ImageList, device: torch.device) -> None:
    """The first job writes what the run is made from, and how many threads it has: jobs on like machines take as many,
    for the last bits depend on them. Raises BingoError in a job that would make it from something else: it would not
    join.
    """
    made = made_of("training", **material.begun_with(models, folder), program=FORMATS)
    if not run.begun.is_file():
        with run_dir.atomic_first(run.begun) as file:
            checkpoint.save(file, {}, made)
    if others := made.differences(checkpoint.made_of(run.begun)):
        raise _other(run.path, ", ".join(others))
    student = models.student
    threads = partial(devices.use_threads, models.recipe, student, student.preprocessing.size, device)
    if not run.resolved.is_file():
        settled = recipe_text(threads())
        with run_dir.atomic_first(run.resolved) as file:
            file.write_text(settled, encoding="utf-8")
    threads(load_recipe(run.resolved).threads)


def _other(out: Path, difference: str) -> BingoError:
    return BingoError(
        f"--out: {out} was begun as another run; what differs: {difference}; give every job the same, or name another"
        " folder"
    )
