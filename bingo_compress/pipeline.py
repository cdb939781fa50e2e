"""A whole run on one page: folder -> pixels -> teacher -> bags -> student. The stages are elsewhere; here is their order."""

import json
import platform
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo_compress import __version__
from bingo_compress.data import pixel_store
from bingo_compress.data.quarantine import report, take
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import probes
from bingo_compress.features import extract, neighbours
from bingo_compress.models import trained
from bingo_compress.models.encoder import Encoder
from bingo_compress.models.trained import Models, build_models
from bingo_compress.recipe import RESUME_MAY_CHANGE, Recipe, deciding, load_recipe, recipe_text
from bingo_compress.report.header import header
from bingo_compress.runtime import checkpoint, console, distributed, run_dir
from bingo_compress.runtime.made_of import MadeOf
from bingo_compress.training.held_out import halves
from bingo_compress.training.loop import Check, Plan, distill, plan
from bingo_compress.training.material import Material, bag_facts, make_bags, prepare, sources_of, step_memory, target_source, views_stored
from bingo_compress.training.plan import resolve, use_threads
from bingo_compress.training.unread import unread

GALLERY_AT_MOST = 20_000
CHECK_GALLERY = 2000


def choose_device(wanted: str) -> torch.device:
    """auto, cpu or cuda to this process's device; joins the other processes where torchrun started several. Raises BingoError without the GPU asked for."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BingoError("--device: expected a CUDA GPU, torch sees none; use --device cpu or auto")
    device = distributed.start(torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is not bf16: the loss, the teacher
    return device


def saved_recipe(run: run_dir.RunDir) -> Recipe:
    """A run's recipe as it was run, nothing in it left open; of an earlier version that is its recipe.yaml. Raises BingoError."""
    return load_recipe(run.resolved if run.resolved.is_file() else run.recipe, [], {})


def run_distill(recipe: Recipe, out: Path, *, resume: bool = False, overwrite: bool = False) -> run_dir.RunDir:
    """Distil recipe.teacher into recipe.student on recipe.data; everything lands in `out`. Raises BingoError."""
    device = choose_device(recipe.device)
    plan(recipe, len((folder := take(recipe)).files))
    asked = recipe.model_copy(update={"data": str(Path(recipe.data).resolve())})
    recipe = resolve(asked)
    before = saved_recipe(run_dir.RunDir(out)) if resume and (out / "recipe.yaml").is_file() else None
    models = build_models(recipe)
    _refuse_other_recipe(before, models.recipe)
    distributed.refuse_unshared(models.student)
    if resume:
        now = sources_of(models, folder) | {"start": extract.weights_digest(models.student), "settings": deciding(models.recipe)}
        distributed.from_first(lambda: trained.refuse_other_inputs(run_dir.RunDir(out), now))
    models = replace(models, recipe=use_threads(models.recipe, models.student, device, before.threads if before else 0))
    recipe = models.recipe
    step = step_memory(recipe, models.student, len(folder.files), device)
    side = pixel_store.store_side(recipe.image_size, recipe.teacher_size)
    if not out.exists():  # refused before anything is written
        extract.pixels_of(models.student.preprocessing, folder, range(len(folder.files)), 1)
        above = next(parent for parent in out.resolve().parents if parent.is_dir())
        views = views_stored(recipe)
        run_dir.need_space(above, 2 * models.teacher.width * (views + 2) * len(folder.files), "the teacher's embeddings")
        if recipe.pixels not in ("auto", "stream"):  # auto streams where the store does not fit
            run_dir.need_space(above, pixel_store.guess(len(folder.files), side), "the pixel store")
    distributed.barrier()  # no process looks at --out after the first has made it
    run = distributed.from_first(lambda: run_dir.open_new(out, resume=resume, overwrite=overwrite))
    distributed.from_first(lambda: run_dir.write_text(run.resolved, recipe_text(recipe)))
    distributed.from_first(lambda: run_dir.write_text(run.recipe, recipe_text(asked)))  # last: with it the folder is a run
    header(recipe, models.teacher, models.student, folder, device)

    material = prepare(models, folder, side, run.work, device, step)
    distributed.from_first(lambda: report(material.folder, run.quarantine))
    planned = plan(recipe, len(material.training))
    console.say(f"{len(material.training):,} images to train on, {len(material.held):,} held out; {planned.describe()}")
    _say_smaller(recipe, planned)
    bags = make_bags(recipe, models.teacher, material, device)
    trained_on = material.folder.only(material.training.tolist())

    def save() -> None:
        checkpoint.save(run.bags, {"bags": bags}, files=trained_on.files, digests=trained_on.digests)
        trained.save_start(models.student, run.start, recipe)

    distributed.from_first(save)
    console.say(describe_bags(recipe, facts := bag_facts(recipe, bags, material), len(material.training), device))
    made = train(models, material, bags, run.metrics, run.checkpoint, device)
    distributed.from_first(lambda: trained.save_student(models.student, run.student, recipe, made))
    recall = held_out_recall(run, models, material, device)
    distributed.from_first(lambda: _close(run, models, material, facts, recall, device))
    distributed.from_first(lambda: run_dir.drop_stale(run.work, "closing", set()))
    return run


def describe_bags(recipe: Recipe, facts: dict[str, float], images: int, device: torch.device) -> str:
    """One line for the screen of what `bag_facts` found in a training set of `images`."""
    if not facts:
        return f"bags: {'none' if 'bag_size' in unread(recipe) else 'rebuilt from the student'} in method {recipe.method}"
    by = neighbours.Search(recipe.search, device).describe(images)
    line = f"bags: {recipe.bags} by {by}, {facts['size_mean']:.1f} mates on average ({facts['size_least']:.0f}-{facts['size_most']:.0f})"
    line += f", {facts['empty']:.0%} empty" if facts["empty"] else ""
    return line + (f", mean cosine {facts['similarity']:.3f}, {facts['mutual']:.0%} mutual" if "similarity" in facts else "")


def train(
    models: Models, material: Material, bags: Tensor, metrics: Path, saved: Path, device: torch.device, *, discard: bool = False
) -> MadeOf:
    """Distil models.student in place, with checks of neighbour recall where the recipe asks for them. Returns what it is made of.

    discard: a state in `saved` that is another run's is deleted instead of refused.
    """
    recipe = models.recipe
    target_of, dim = target_source(models, material, device)
    check = None
    if recipe.keep_best or recipe.check_every:
        choosing, reporting = halves(material.held, recipe)
        if not len(reporting):
            raise BingoError(
                f"--keep-best: expected 2 or more images held out, found {len(material.held)}; add images or raise --set hold_out=0.05"
            )
        if recipe.keep_best:
            console.say(
                f"--keep-best chooses by {len(choosing):,} of the images held out; the closing figure is of the other {len(reporting):,}"
            )
        check = recall_check(material, choosing, device)
    loop = partial(distill, recipe, models.student, material.store, material.training, bags, target_of, dim, metrics, saved, device)
    return loop(check=check, sources=material.sources, names=material.folder.files, discard=discard)


def recall_check(material: Material, held: Tensor, device: torch.device) -> Check:
    """A student's neighbour recall on the images `held`, from the pixel store, in a gallery of at most CHECK_GALLERY; several processes share them."""
    gallery = material.training[:: -(-len(material.training) // CHECK_GALLERY)]
    if not probes.recall_k(len(gallery)):
        raise BingoError(f"--keep-best: expected {probes.RECALL_SHARE} images to train on, found {len(gallery)}; add images")
    truth = material.seen.features

    def check(student: Encoder) -> float:
        found = extract.store_features(student, material.store, torch.cat((held, gallery)), device).split((len(held), len(gallery)))
        return distributed.from_first(lambda: probes.neighbour_recall((truth[held], truth[gallery]), found))

    return check


def _refuse_other_recipe(before: Recipe | None, now: Recipe) -> None:
    """--resume goes on with the run that is there; a changed setting would make it another one."""
    if before is None:
        return
    changed = [key for key, value in now.model_dump().items() if getattr(before, key) != value and key not in RESUME_MAY_CHANGE]
    if changed:
        difference = ", ".join(f"{key}: {getattr(before, key)} -> {getattr(now, key)}" for key in changed)
        raise BingoError(f"--resume: the run was started with other settings ({difference}); use those, or start anew with --overwrite")


def _say_smaller(recipe: Recipe, planned: Plan) -> None:
    if planned.batch_size < recipe.batch_size:
        console.say(f"batch size {planned.batch_size} instead of {recipe.batch_size}: there are no more images")
    if planned.queue_size < recipe.queue_size:
        console.say(f"queue {planned.queue_size:,} instead of {recipe.queue_size:,}: one entry an image")


def held_out_recall(run: run_dir.RunDir, models: Models, material: Material, device: torch.device) -> dict[str, float]:
    """Neighbour recall on the held-out images before and after ("start", "student"), its k and counts; nothing without such. Several processes share them."""
    held, training, truth = halves(material.held, models.recipe)[1], material.training, material.seen.features
    gallery = training[:: -(-len(training) // GALLERY_AT_MOST)]
    if not len(held) or not probes.recall_k(len(gallery)):
        console.say(
            f"neighbour recall is not measured: {len(held):,} images held out, a gallery of {len(gallery):,} (at least {probes.RECALL_SHARE})"
        )
        return {}
    encoders = {"start": trained.load_start(models.recipe, run), "student": models.student}
    ready = {name: extract.as_embed(encoder, device) for name, encoder in encoders.items()}
    order = torch.cat((held, gallery)).tolist()
    keep = extract.Keep(run.work, "closing", {name: extract.weights_digest(each) for name, each in encoders.items()})
    found, good = extract.plain(ready, material.folder, order, "check held-out images", keep)
    if len(good) < len(held) + len(gallery):
        raise BingoError(f"an image in {material.folder.root} changed during the run; start the command again with --resume")
    sides = {name: features.split((len(held), len(gallery))) for name, features in found.items()}
    counts = probes.recall_facts(len(gallery)) | {"queries": len(held)}
    return distributed.from_first(
        lambda: counts | {name: probes.neighbour_recall((truth[held], truth[gallery]), side) for name, side in sides.items()}
    )


def _close(
    run: run_dir.RunDir, models: Models, material: Material, facts: dict[str, float], recall: dict[str, float], device: torch.device
) -> None:
    """summary.json and the closing table. recall: of `held_out_recall`."""
    recipe, student = models.recipe, models.student
    summary: dict[str, Any] = {
        "version": __version__,
        "run_id": run_dir.stage_key(recipe=deciding(recipe), student=extract.weights_digest(student)),
        "images": {"training": len(material.training), "held_out": len(material.held), "unusable": len(material.folder.bad)},
        "bags": facts,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if recall:
        summary["neighbour_recall"] = recall
    run_dir.write_text(run.summary, json.dumps(summary, indent=2) + "\n")
    rows = {name: {"neighbour_recall": value} for name, value in ({"teacher": 1.0} | recall).items()} if recall else {}
    closing_table(models, rows, int(recall.get("gallery", 0)))
    console.say(f"weights: {run.student}   metrics: {run.metrics}   settings: {run.recipe}, as run: {run.resolved}")
    console.say(f"next: bingo-compress export --run {run.path}")
    console.say(f"      bingo-compress validate --run {run.path} --data LABELLED_FOLDER   (kNN and linear need a folder of labels)")


def closing_table(models: Models, rows: dict[str, dict[str, float]], gallery: int) -> None:
    """Teacher, student before and after: recall in a gallery of so many images, kNN, linear (a dash is not measured); parameters, size and ratio."""
    labels = {"teacher": "teacher", "start": "student before", "student": "student after"}
    big, small = models.teacher.parameters_count(), models.student.parameters_count()
    cells = []
    for name, label in labels.items():
        figures = rows.get(name, {})
        count = big if name == "teacher" else small
        scores = [f"{figures[key]:.3f}" if key in figures else "-" for key in ("neighbour_recall", "knn", "linear")]
        cells.append((label, *scores, f"{count / 1e6:.2f} M", f"{count * 4 / 1e6:.1f}", f"{big / count:.1f}x"))
    console.table("", ("", probes.recall_title(gallery), "kNN", "linear", "parameters", "MB", "smaller"), cells)
