"""The proof on screen: what `validation` measured, as tables and lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bingo_compress import __version__
from bingo_compress.data.image_list import ImageList
from bingo_compress.features import neighbours
from bingo_compress.models import exported
from bingo_compress.models.trained import Models
from bingo_compress.presenting import caveats
from bingo_compress.presenting.markdown import figure, title
from bingo_compress.runtime import console, run_dir
from bingo_compress.training.plan import Plan
from bingo_compress.unread import unread

CLASSES_SHOWN = 20
PLAIN = ("linear_balanced", "linear_auc", "neighbour_recall")  # without their intervals: a screen is narrow


def show(result: dict[str, Any], run: run_dir.RunDir, models: Models) -> None:
    """Everything that a validation has to say, widest view first."""
    rows = {row["name"]: row for row in result["rows"]}
    _main(result["protocol"], result["rows"])
    _few_labels(result["rows"])
    _classes(rows["student"]["per_class"])
    if none := caveats.untested(rows["student"]):
        console.say(f"classes without a test image, of which no figure tells: {none:,}")
    closing_table(models, rows, result["protocol"]["bank_images"])
    _strengths(result["rows"])
    _gap(rows)
    if result["protocol"].get("test_images_trained_on"):
        console.say(
            f"{result['protocol']['test_images_trained_on']:,} of the test images were also distilled on (the same"
            " contents), without their labels"
        )
    if "paired" in result:
        _paired(result["paired"], result["protocol"]["against"])
    if "bag_purity" in result:
        console.say(
            f"bags: {figure(result, 'bag_purity')} of the pairs (anchor, mate) with labels share one; by chance"
            f" {result['bag_purity_chance']:.3f}"
        )
    _next(run)


def _next(run: run_dir.RunDir) -> None:
    """What to type, with files that are there."""
    made = exported.files(run.export)
    if not made:
        console.say(
            f"no exported file yet, so no head for one. next: bingo-compress export --run {run.path}, then validate"
            " again"
        )
    for file in made.values():
        own = "classes" in exported.contract(file)  # then the heads beside it are those that it was exported with
        head = "" if own else f" --head {file.with_suffix(exported.LINEAR)}"
        console.say(f"next: bingo-edge classify {file}{head} PHOTOS")


def _main(protocol: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    figures = {key: name for key, name in protocol["figures"].items() if any(key in row for row in rows)}
    cells = [[title(row["name"]), *(_cell(row, key) for key in figures)] for row in rows]
    console.table(
        f"{protocol['test_images']:,} test images, bank of {protocol['bank_images']:,}, {len(protocol['classes'])}"
        " classes; in brackets: 95% interval",
        ["", *figures.values()],
        cells,
    )


def _cell(row: Mapping[str, Any], key: str) -> str:
    return "-" if key not in row else f"{row[key]:.3f}" if key in PLAIN else figure(row, key)


def _few_labels(rows: Sequence[Mapping[str, Any]]) -> None:
    few = [(row["name"], spec, found) for row in rows for spec, found in row.get("shots", {}).items()]
    if not few:
        return
    tuned = any("fine_tuned" in found for _, _, found in few)
    cells = []
    for name, spec, found in sorted(few, key=lambda entry: list(rows[0]["shots"]).index(entry[1])):
        spread = (
            f"{found['linear']:.3f} ± {found['linear_spread']:.3f} [{found['linear_interval'][0]:.3f},"
            f" {found['linear_interval'][1]:.3f}]"
        )
        cells.append([spec, title(name), f"{found['images']:,}", spread])
        if tuned:
            cells[-1].append(figure(found, "fine_tuned") if "fine_tuned" in found else "-")
    console.table(
        "few labels (± over draws of the images)",
        ["labels", "model", "images", "linear", *(["fine-tuned"] if tuned else [])],
        cells,
    )


def _classes(found: Sequence[Mapping[str, Any]]) -> None:
    """The student's classes, weakest first."""
    known = sorted((entry for entry in found if entry["images"]), key=lambda entry: entry["accuracy"])
    shown = known[:CLASSES_SHOWN]
    more = f", the weakest {len(shown)} of {len(known)}" if len(shown) < len(known) else ""
    cells = [
        (entry["class"], f"{entry['images']:,}", figure(entry, "accuracy"), entry["mistaken_for"] or "-")
        for entry in shown
    ]
    console.table(
        f"{title('student')}, linear probe by class{more}", ("", "images", "found", "most often taken for"), cells
    )


def _strengths(rows: Sequence[Mapping[str, Any]]) -> None:
    """Where the linear probe would perhaps have taken a penalty beyond its grid."""
    ends = [
        f"{title(row['name'])} ({row['linear_strength']:g}, the {row['linear_at_grid_end']})"
        for row in rows
        if row.get("linear_at_grid_end")
    ]
    if ends:
        console.say(
            f"linear probe: the L2 penalty is at the end of its grid for {', '.join(ends)}; one beyond it may do better"
        )


def _gap(rows: Mapping[str, Mapping[str, Any]]) -> None:
    values = {name: row["linear"] for name, row in rows.items()}
    gap = f"between random weights ({values['random']:.3f}) and the teacher ({values['teacher']:.3f})"
    if "gap_closed" not in rows["student"]:
        console.say(f"linear probe: there is hardly a gap {gap}; these labels do not tell good features from bad")
    else:
        low, high = rows["student"]["gap_closed_interval"]
        console.say(
            f"linear probe: the student closed {rows['student']['gap_closed']:.0%} [{low:.0%}, {high:.0%}] of the gap"
            f" {gap}"
        )


def _paired(found: Mapping[str, Any], other: str) -> None:
    console.say(f"against {other}:")
    for key, name in (("knn", "kNN"), ("linear", "linear")):
        test = found[key]
        low, high = test["difference_interval"]
        console.say(
            f"  {name}: {test['difference']:+.3f} [{low:+.3f}, {high:+.3f}] for this student; right alone on"
            f" {test['only_this']:,} images, the other on {test['only_other']:,}; McNemar p = {test['p_value']:.2g}"
        )


def describe_bags(plan: Plan, facts: dict[str, float]) -> str:
    """One line for the screen of what `bag_facts` found in the training set."""
    recipe = plan.recipe
    if not facts:
        return (
            f"bags: {'none' if 'bag_size' in unread(recipe) else 'rebuilt from the student'} in method {recipe.method}"
        )
    by = neighbours.Search(recipe.search, plan.device).describe(plan.schedule.images)
    line = (
        f"bags: {recipe.bags} by {by}, {facts['size_mean']:.1f} mates on average"
        f" ({facts['size_least']:.0f}-{facts['size_most']:.0f})"
    )
    line += f", {facts['empty']:.0%} empty" if facts["empty"] else ""
    return line + (
        f", mean cosine {facts['similarity']:.3f}, {facts['mutual']:.0%} mutual" if "similarity" in facts else ""
    )


def say_smaller(plan: Plan) -> None:
    """A line for a batch, and one for a queue, that there are too few images for."""
    recipe, schedule = plan.recipe, plan.schedule
    if schedule.batch_size < recipe.batch_size:
        console.say(f"batch size {schedule.batch_size} instead of {recipe.batch_size}: there are no more images")
    if schedule.queue_size < recipe.queue_size:
        console.say(f"queue {schedule.queue_size:,} instead of {recipe.queue_size:,}: one entry an image")


def closing_table(models: Models, rows: dict[str, dict[str, float]], gallery: int) -> None:
    """Teacher, student before and after: recall in a gallery of so many images, kNN, linear (a dash is not measured);
    parameters, size and ratio.
    """
    labels = {"teacher": "teacher", "start": "student before", "student": "student after"}
    big, small = models.teacher.parameters_count(), models.student.parameters_count()
    cells = []
    for name, label in labels.items():
        figures = rows.get(name, {})
        count = big if name == "teacher" else small
        scores = [f"{figures[key]:.3f}" if key in figures else "-" for key in ("neighbour_recall", "knn", "linear")]
        cells.append((label, *scores, f"{count / 1e6:.2f} M", f"{count * 4 / 1e6:.1f}", f"{big / count:.1f}x"))
    console.table("", ("", neighbours.recall_title(gallery), "kNN", "linear", "parameters", "MB", "smaller"), cells)


def say_agreement(recall: Mapping[str, float]) -> None:
    """A line where the student agrees less with its teacher than before it was trained: that alone condemns nobody."""
    if recall and recall["student"] < recall["start"]:
        console.say(
            "the student agrees less with its teacher than before; that does not say that it is worse: labels do, even"
            " few of them (validate, below)"
        )


def header(plan: Plan, models: Models, folder: ImageList) -> None:
    """The models with their sizes, weights and preprocessing; the images, the device and the method."""
    recipe, device = plan.recipe, plan.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    roles = (("teacher", models.teacher, recipe.teacher_weights), ("student", models.student, recipe.student_weights))
    rows = [
        (
            role,
            encoder.name,
            f"{encoder.parameters_count() / 1e6:.2f} M",
            f"{encoder.preprocessing.size} px",
            str(encoder.width),
            Path(source).name,
        )
        for role, encoder, source in roles
    ]
    console.table(f"bingo-compress {__version__}", ("", "model", "parameters", "input", "width", "weights"), rows)
    for role, encoder, _ in roles:
        console.say(f"{role} sees: {encoder.preprocessing.describe()}")
    console.say(f"images: {len(folder.files):,} files in {folder.where}; device: {where}")
    targets = "an online teacher" if plan.online else f"{plan.views} stored views an image"
    method = f"bingo ({recipe.variant})" if recipe.method == "bingo" else recipe.method
    source = targets if plan.loss.teacher else "the student's own moving average"
    idle = unread(recipe)
    bags = "" if "bags" in idle else f", bags: {recipe.bags}" + ("" if "bag_size" in idle else f" of {recipe.bag_size}")
    tau = "" if "temperature" in idle else f", temperature {recipe.temperature}"
    epochs = f"about {recipe.epochs} epochs in {recipe.time}" if recipe.time else f"{recipe.epochs} epochs"
    console.say(f"method: {method}{bags}{tau}, targets from {source}, {epochs}")
