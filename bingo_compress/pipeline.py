"""A whole run on one page: folder -> pixels -> teacher -> bags -> student. The stages are elsewhere; here is their
order.
"""

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo_compress import __version__, budget, loggers
from bingo_compress.data import image_list
from bingo_compress.data.image_list import ImageList
from bingo_compress.data.quarantine import report
from bingo_compress.errors import BingoError
from bingo_compress.evaluation.held_out import held_out_recall, train
from bingo_compress.features import bagging, near_copies, teacher_pass
from bingo_compress.html_report import looking, looks
from bingo_compress.models import trained
from bingo_compress.models.encoder import Encoder, weights_digest
from bingo_compress.models.trained import NOTHING_GIVEN, Given, Models, build_models
from bingo_compress.presenting.tables import closing_table, describe_bags, header, say_agreement, say_smaller
from bingo_compress.recipe import Recipe, deciding, load_recipe, recipe_text
from bingo_compress.runtime import console, distributed, run_dir
from bingo_compress.sources.opened import absolute_recipe
from bingo_compress.training.material import (
    Material,
    anchors_count,
    bag_facts,
    begun_with,
    lessons_of,
    make_bags,
    prepare,
    with_room,
)
from bingo_compress.training.plan import Plan, begin, plan_run

# What becomes of near-copies; second with duplicates=near.
NEAR = (
    "none is another's mate or negative; --set duplicates=near trains on one of each scene an epoch",
    "one of each scene is trained on an epoch, another each time",
)


def run_distill(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    given: Given = NOTHING_GIVEN,
    began: float | None = None,
    look: bool = False,
    logger: str = "",
) -> run_dir.RunDir:
    """Distil recipe.teacher into recipe.student on recipe.data; everything lands in `out`. Raises BingoError.

    given: the modules of the user's own that the recipe names. began: when recipe.time began, by the monotonic clock;
    None: now. look: what the page on the run shows of its images is made and kept. logger: of loggers.LOGGERS.
    """
    began = time.monotonic() if began is None else began
    asked = absolute_recipe(recipe)
    goes_on = resume and (out / "recipe.yaml").is_file()
    before = absolute_recipe(load_recipe(run_dir.RunDir(out).as_run)) if goes_on else None
    resolved, folder, device = begin(_with_choice(asked, before, out))
    models = build_models(resolved, given)
    _refuse_other_recipe(before, models.recipe)
    distributed.refuse_unshared(models.student)
    if resume:
        _refuse_other_inputs(models, folder, out)
    plan = plan_run(models, len(folder.files), device, before.threads if before else 0)
    any_views = before is None and "views" not in asked.model_fields_set
    plan, rates = _expected(plan, models, folder, any_views, began, new=not (out / "work").exists())
    plan, asked = with_room(plan, asked, models.student, folder, out, new=before is None)
    distributed.barrier()  # no process looks at --out after the first has made it
    run = _opened(out, given, resume=resume, overwrite=overwrite)
    _keep(run, plan)
    distributed.from_first(lambda: image_list.keep(run.work, folder))
    # Last: with it the folder is a run.
    distributed.from_first(lambda: run_dir.write_text(run.recipe, recipe_text(asked)))
    header(plan, models, folder)

    material = prepare(plan, models, folder, run.work)
    plan = plan.on(anchors_count(plan, material))
    distributed.from_first(lambda: report(material.folder, run.quarantine))
    console.say(f"{len(material.training):,} images to train on, {len(material.held):,} held out; {plan.describe()}")
    _say_copies(plan, material)
    say_smaller(plan)
    bags = make_bags(plan, models.teacher, material)
    distributed.from_first(lambda: _save_beginning(run, plan, models.student, material, bags))
    console.say(describe_bags(plan, facts := bag_facts(plan, bags, material)))
    lessons = lessons_of(plan, models.teacher, material, bags)
    if rates:
        plan = budget.settled(plan, rates, models.student, lessons, len(material.held), began)
        console.say(plan.describe())
        _keep(run, plan)
    with loggers.following(logger if distributed.rank() == 0 else "", run) as picture:
        made = train(plan, models.student, material, lessons, run.metrics, run.checkpoint)
        distributed.from_first(lambda: trained.save_student(models.student, run, plan.recipe, made))
        recall = held_out_recall(run, plan, models.student, material)
        distributed.from_first(lambda: _close(run, plan, models, material, facts, recall))
        if look:
            distributed.from_first(lambda: _look(run, plan, models.student, material, bags, picture))
    return run


def _opened(out: Path, given: Given, *, resume: bool, overwrite: bool) -> run_dir.RunDir:
    """`run_dir.open_new` by the first process. The weights of modules that were given do not tell all that they do, so
    one that begins anew uses nothing that they made before.
    """
    seen = ("teacher", "near-copies", "bags") if given.teacher else ()
    embedded = ("closing", "proof") if given != NOTHING_GIVEN else ()
    return distributed.from_first(
        lambda: run_dir.open_new(out, resume=resume, overwrite=overwrite, stages=(*seen, *embedded))
    )


def _with_choice(asked: Recipe, before: Recipe | None, out: Path) -> Recipe:
    """What was asked for, with what `auto` and its time have become in the run that goes on. Raises BingoError for
    another time.
    """
    asked = trained.as_begun(asked, before)
    if before is None or not asked.time:
        return asked
    began = load_recipe(run_dir.RunDir(out).recipe)
    if began.time != asked.time:
        raise _other_settings(f"time: {began.time or 'none'} -> {asked.time}")
    chosen = ("time", "epochs", "views") if asked.views == began.views else ("time", "epochs")
    return asked.model_copy(update={key: getattr(before, key) for key in chosen})


def _expected(
    plan: Plan, models: Models, folder: ImageList, any_views: bool, began: float, *, new: bool
) -> tuple[Plan, budget.Rates | None]:
    """`budget.expected` of a plan with a time, and the rates. new: no stage may be there already."""
    if not plan.recipe.time:
        return plan, None
    rates = distributed.from_first(lambda: budget.measure(plan, models, folder))
    gone = time.monotonic() - began
    return budget.expected(plan, rates, len(folder.files), gone, any_views=any_views, refuse=new), rates


def _say_copies(plan: Plan, material: Material) -> None:
    if copies := near_copies.describe(material.scenes, material.folder.files):
        console.say(f"{copies}; {NEAR[plan.recipe.duplicates == 'near']}")


def _keep(run: run_dir.RunDir, plan: Plan) -> None:
    """resolved.yaml; epochs are not chosen yet while there is a time."""
    epochs = 0 if plan.recipe.time else plan.recipe.epochs
    text = recipe_text(plan.recipe.model_copy(update={"epochs": epochs}))
    distributed.from_first(lambda: run_dir.write_text(run.resolved, text))


def _refuse_other_inputs(models: Models, folder: ImageList, out: Path) -> None:
    """--resume goes on with the images, weights and settings that are there."""
    now = begun_with(models, folder)
    distributed.from_first(lambda: trained.refuse_other_inputs(run_dir.RunDir(out), now))


def _save_beginning(run: run_dir.RunDir, plan: Plan, student: Encoder, material: Material, bags: Tensor) -> None:
    """The bags and the student as it is before training. What array jobs stored to be packed has been packed."""
    if plan.packed and run.begun.is_file():
        teacher_pass.drop_views(material.seen)
    bagging.save(run.bags, bags, material.folder.only(material.training.numpy()))
    trained.save_start(student, run.start, plan.recipe)


def _refuse_other_recipe(before: Recipe | None, now: Recipe) -> None:
    """--resume goes on with the run that is there; a changed setting would make it another one."""
    if before and (difference := trained.changed(before, now)):
        raise _other_settings(difference)


def _other_settings(difference: str) -> BingoError:
    return BingoError(
        f"--resume: the run was started with other settings ({difference}); use those, or start anew with --overwrite"
    )


def _look(
    run: run_dir.RunDir,
    plan: Plan,
    student: Encoder,
    material: Material,
    bags: Tensor,
    picture: loggers.Picture,
) -> None:
    """Keep what the page on the run shows of its images; whatever goes wrong is said and loses nothing. picture: what
    shows a bag elsewhere.
    """
    with looking.spared(run):
        left = looking.Left(
            material.store, material.seen.features, material.scenes, material.training, bags, material.folder.files
        )
        encoders = {"start": trained.load_start(plan.recipe, run, student), "student": student}
        seen = looking.make(left, encoders, plan.recipe.seed, plan.device)
        looks.save(seen, run)
        for title, pixels in looks.sheets(seen):
            picture(title, pixels)


def _close(
    run: run_dir.RunDir,
    plan: Plan,
    models: Models,
    material: Material,
    facts: dict[str, float],
    recall: dict[str, Any],
) -> None:
    """summary.json and the closing table; what was kept to make it is not needed any more. recall: of
    `held_out_recall`.
    """
    summary: dict[str, Any] = {
        "version": __version__,
        "run_id": run_dir.stage_key(recipe=deciding(plan.recipe), student=weights_digest(models.student)),
        "images": {
            "training": len(material.training),
            "held_out": len(material.held),
            "scenes": len(material.scenes.unique()),
            "unusable": len(material.folder.bad),
        },
        "bags": facts,
        "parameters": {
            "teacher": models.teacher.parameters_count(),
            "student": models.student.parameters_count(),
        },
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "device": str(plan.device),
            "threads": torch.get_num_threads(),
        },
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if recall:
        summary["neighbour_recall"] = recall
    run_dir.write_text(run.summary, json.dumps(summary, indent=2) + "\n")
    found = {"teacher": 1.0} | {name: recall[name] for name in ("start", "student")} if recall else {}
    rows = {name: {"neighbour_recall": value} for name, value in found.items()}
    closing_table(models, rows, int(recall.get("gallery", 0)))
    say_agreement(recall)
    run_dir.drop_stale(run.work, "closing", set())
    console.say(f"weights: {run.student}   metrics: {run.metrics}   settings: {run.recipe}, as run: {run.resolved}")
    console.say(f"next: bingo-compress export --run {run.path}")
    console.say(
        f"      bingo-compress validate --run {run.path} --data LABELLED_FOLDER   (kNN and linear need a folder of"
        " labels)"
    )
