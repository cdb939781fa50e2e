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

from bingo_compress import (
    __version__,
    checkpoint,
    distributed,
    embed,
    images,
    neighbours,
    pixels,
    probes,
    run_dir,
    screen,
    trained,
)
from bingo_compress.distill import Check, Plan, distill, loss_of, plan
from bingo_compress.encoder import Encoder
from bingo_compress.errors import BingoError
from bingo_compress.intake import report, take
from bingo_compress.made_of import MadeOf
from bingo_compress.material import Material, bag_facts, make_bags, prepare, sources_of, step_memory, target_source, views_stored
from bingo_compress.recipe import RESUME_MAY_CHANGE, Recipe, deciding, load_recipe, recipe_text
from bingo_compress.resolving import resolve, use_threads
from bingo_compress.trained import Models, build_models
from bingo_compress.unread import unread

GALLERY_AT_MOST = 20_000
CHECK_GALLERY, CHECKS = 2000, 10  # images, times in a run


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
    if resume:
        start = {"start": embed.weights_digest(models.student)}
        distributed.from_first(lambda: trained.refuse_other_inputs(run_dir.RunDir(out), sources_of(models, folder) | start))
    models = replace(models, recipe=use_threads(models.recipe, models.student, device, before.threads if before else 0))
    recipe = models.recipe
    step = step_memory(recipe, models.student, len(folder.files), device)
    side = pixels.store_side(recipe.image_size, recipe.teacher_size)
    if not out.exists():  # refused before anything is written
        embed.pixels_of(models.student.preprocessing, folder, range(len(folder.files)), 1)
        above = next(parent for parent in out.resolve().parents if parent.is_dir())
        views = views_stored(recipe)
        run_dir.need_space(above, 2 * models.teacher.width * (views + 2) * len(folder.files), "the teacher's embeddings")
        if recipe.pixels not in ("auto", "stream"):  # auto streams where the store does not fit
            run_dir.need_space(above, pixels.guess(len(folder.files), side), "the pixel store")
    distributed.barrier()  # no process looks at --out after the first has made it
    run = distributed.from_first(lambda: run_dir.open_new(out, resume=resume, overwrite=overwrite))
    distributed.from_first(lambda: run_dir.write_text(run.resolved, recipe_text(recipe)))
    distributed.from_first(lambda: run_dir.write_text(run.recipe, recipe_text(asked)))  # last: with it the folder is a run
    header(models, folder, device, recipe)

    material = prepare(models, folder, side, run.work, device, step)
    distributed.from_first(lambda: report(material.folder, run.quarantine))
    planned = plan(recipe, len(material.training))
    screen.say(f"{len(material.training):,} images to train on, {len(material.held):,} held out; {planned.describe()}")
    _say_smaller(recipe, planned)
    bags = make_bags(recipe, models.teacher, material, device)
    files = [material.folder.files[index] for index in material.training.tolist()]

    def save() -> None:
        checkpoint.save(run.bags, {"bags": bags}, root=str(folder.root.resolve()), files=files)
        trained.save_start(models.student, run.start, recipe)

    distributed.from_first(save)
    screen.say(describe_bags(recipe, facts := bag_facts(recipe, bags, material), len(material.training), device))
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
        if not len(material.held):
            raise BingoError("--keep-best: expected images held out, found none; add images or raise --set hold_out=0.05")
        recipe = recipe.model_copy(update={"check_every": recipe.check_every or max(1, recipe.epochs // CHECKS)})
        check = recall_check(material, device)
    loop = partial(distill, recipe, models.student, material.store, material.training, bags, target_of, dim, metrics, saved, device)
    return loop(check=check, sources=material.sources, names=material.folder.files, discard=discard)


def recall_check(material: Material, device: torch.device) -> Check:
    """A student's neighbour recall on the held-out images, from the pixel store, in a gallery of at most CHECK_GALLERY; several processes share them."""
    gallery = material.training[:: -(-len(material.training) // CHECK_GALLERY)]
    truth = material.seen.features

    def check(student: Encoder) -> float:
        found = embed.store_features(student, material.store, torch.cat((material.held, gallery)), device)
        held = len(material.held)
        return distributed.from_first(lambda: probes.neighbour_recall((truth[material.held], truth[gallery]), (found[:held], found[held:])))

    return check


def header(models: Models, folder: images.Folder, device: torch.device, recipe: Recipe) -> None:
    """Who is distilled into whom, on what, where."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    rows = [
        (role, encoder.name, f"{encoder.parameters_count() / 1e6:.2f} M", f"{encoder.preprocessing.size} px", str(encoder.width), source)
        for role, encoder, source in (
            ("teacher", models.teacher, recipe.teacher_weights),
            ("student", models.student, recipe.student_weights),
        )
    ]
    screen.table(f"bingo-compress {__version__}", ("", "model", "parameters", "input", "width", "weights"), rows)
    screen.say(f"images: {len(folder.files):,} files in {folder.root}; device: {where}")
    targets = "an online teacher" if recipe.views == "online" else f"{recipe.views} stored views an image"
    method = f"bingo ({recipe.variant})" if recipe.method == "bingo" else recipe.method
    source = targets if loss_of(recipe).teacher else "the student's own moving average"
    idle = unread(recipe)
    bags = "" if "bags" in idle else f", bags: {recipe.bags}" + ("" if "bag_size" in idle else f" of {recipe.bag_size}")
    tau = "" if "temperature" in idle else f", temperature {recipe.temperature}"
    screen.say(f"method: {method}{bags}{tau}, targets from {source}, {recipe.epochs} epochs")


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
        screen.say(f"batch size {planned.batch_size} instead of {recipe.batch_size}: there are no more images")
    if planned.queue_size < recipe.queue_size:
        screen.say(f"queue {planned.queue_size:,} instead of {recipe.queue_size:,}: one entry an image")


def held_out_recall(run: run_dir.RunDir, models: Models, material: Material, device: torch.device) -> dict[str, float]:
    """Neighbour recall on the held-out images before and after ("start", "student"), its k and counts; nothing without such. Several processes share them."""
    held, training, truth = material.held, material.training, material.seen.features
    if not len(held):
        return {}
    gallery = training[:: -(-len(training) // GALLERY_AT_MOST)]
    encoders = {"start": trained.load_start(models.recipe, run), "student": models.student}
    key = run_dir.stage_key(images=material.folder.fingerprint(), **{name: embed.weights_digest(each) for name, each in encoders.items()})
    ready = {name: embed.as_embed(encoder, device) for name, encoder in encoders.items()}
    order, keep = torch.cat((held, gallery)).tolist(), run.work / f"closing-{key}"
    found, good = embed.plain(ready, material.folder, order, "check held-out images", keep)
    if len(good) < len(held) + len(gallery):
        raise BingoError(f"an image in {material.folder.root} changed during the run; start the command again with --resume")
    sides = {name: features.split((len(held), len(gallery))) for name, features in found.items()}
    counts = {"k": probes.RECALL_K, "queries": len(held), "gallery": len(gallery)}
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
        "run_id": run_dir.stage_key(recipe=deciding(recipe), student=embed.weights_digest(student)),
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
    closing_table(models, {name: {"neighbour_recall": value} for name, value in ({"teacher": 1.0} | recall).items()} if recall else {})
    screen.say(f"weights: {run.student}   metrics: {run.metrics}   settings: {run.recipe}, as run: {run.resolved}")
    screen.say(f"next: bingo-compress validate --run {run.path} --data LABELLED_FOLDER   (kNN and linear need a folder of labels)")
    screen.say(f"      bingo-compress export --run {run.path}")


def closing_table(models: Models, rows: dict[str, dict[str, float]]) -> None:
    """Teacher, student before and after: recall, kNN, linear (a dash is not measured); parameters, size and ratio."""
    labels = {"teacher": "teacher", "start": "student before", "student": "student after"}
    big, small = models.teacher.parameters_count(), models.student.parameters_count()
    cells = []
    for name, label in labels.items():
        figures = rows.get(name, {})
        count = big if name == "teacher" else small
        scores = [f"{figures[key]:.3f}" if key in figures else "-" for key in ("neighbour_recall", "knn", "linear")]
        cells.append((label, *scores, f"{count / 1e6:.2f} M", f"{count * 4 / 1e6:.1f}", f"{big / count:.1f}x"))
    screen.table("", ("", f"recall@{probes.RECALL_K}", "kNN", "linear", "parameters", "MB", "smaller"), cells)
