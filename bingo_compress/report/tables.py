"""The proof on screen: what `validation` measured, as tables and lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from bingo_compress.evaluation import probes
from bingo_compress.models import exported
from bingo_compress.models.trained import Models
from bingo_compress.pipeline import closing_table
from bingo_compress.runtime import console, run_dir

NAMES = {
    "teacher": "teacher",
    "student": "student (distilled)",
    "start": "student before",
    "random": "student, random weights",
    "onnx": "exported ONNX file",
    "onnx-int8": "exported int8 file",
    "against": "student of --against",
}
CLASSES_SHOWN = 20


def show(result: dict[str, Any], run: run_dir.RunDir, models: Models) -> None:
    """Everything that a validation has to say, widest view first."""
    rows = {row["name"]: row for row in result["rows"]}
    _main(result["protocol"], result["rows"])
    _few_labels(result["rows"])
    _classes(rows["student"]["per_class"])
    closing_table(models, rows, result["protocol"]["bank_images"])
    _strengths(result["rows"])
    _gap(rows)
    if result["protocol"].get("test_images_trained_on"):
        console.say(
            f"{result['protocol']['test_images_trained_on']:,} of the test images were also distilled on (the same contents), without their labels"
        )
    if "paired" in result:
        _paired(result["paired"], result["protocol"]["against"])
    if "bag_purity" in result:
        console.say(
            f"bags: {_figure(result, 'bag_purity')} of the pairs (anchor, mate) with labels share one; by chance {result['bag_purity_chance']:.3f}"
        )
    made = exported.files(run.export)
    if not made:
        console.say(f"no exported file yet, so no head for one. next: bingo-compress export --run {run.path}, then validate again")
    for file in made.values():
        console.say(f"next: bingo-edge classify {file} --head {file.with_suffix(exported.LINEAR)} PHOTOS")


def _figure(row: Mapping[str, Any], key: str) -> str:
    """A figure with its interval: 0.683 [0.634, 0.731]."""
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.3f} [{low:.3f}, {high:.3f}]"


def _main(protocol: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    augmented, areas = any("literature" in row for row in rows), "linear_auc" in rows[0]
    header = ["", "kNN", "linear", "balanced", *(["AUC"] if areas else []), probes.recall_title(protocol["bank_images"])]
    cells = []
    for row in rows:
        plain = ["linear_balanced", *(["linear_auc"] if areas else []), "neighbour_recall"]
        cells.append(
            [NAMES[row["name"]], _figure(row, "knn"), _figure(row, "linear"), *(f"{row[key]:.3f}" if key in row else "-" for key in plain)]
        )
        if augmented:
            cells[-1].append(_figure(row, "literature") if "literature" in row else "-")
    console.table(
        f"{protocol['test_images']:,} test images, bank of {protocol['bank_images']:,}, {len(protocol['classes'])} classes; in brackets: 95% interval",
        [*header, *(["linear, augmented"] if augmented else [])],
        cells,
    )


def _few_labels(rows: Sequence[Mapping[str, Any]]) -> None:
    few = [(row["name"], spec, found) for row in rows for spec, found in row.get("shots", {}).items()]
    if not few:
        return
    tuned = any("fine_tuned" in found for _, _, found in few)
    cells = []
    for name, spec, found in sorted(few, key=lambda entry: list(rows[0]["shots"]).index(entry[1])):
        spread = (
            f"{found['linear']:.3f} ± {found['linear_spread']:.3f} [{found['linear_interval'][0]:.3f}, {found['linear_interval'][1]:.3f}]"
        )
        cells.append([spec, NAMES[name], f"{found['images']:,}", spread])
        if tuned:
            cells[-1].append(_figure(found, "fine_tuned") if "fine_tuned" in found else "-")
    console.table(
        "few labels (± over draws of the images)", ["labels", "model", "images", "linear", *(["fine-tuned"] if tuned else [])], cells
    )


def _classes(found: Sequence[Mapping[str, Any]]) -> None:
    """The student's classes, weakest first."""
    known = sorted((entry for entry in found if entry["images"]), key=lambda entry: entry["accuracy"])
    shown = known[:CLASSES_SHOWN]
    more = f", the weakest {len(shown)} of {len(known)}" if len(shown) < len(known) else ""
    cells = [(entry["class"], f"{entry['images']:,}", _figure(entry, "accuracy"), entry["mistaken_for"] or "-") for entry in shown]
    console.table(f"{NAMES['student']}, linear probe by class{more}", ("", "images", "found", "most often taken for"), cells)


def _strengths(rows: Sequence[Mapping[str, Any]]) -> None:
    """Where the linear probe would perhaps have taken a penalty beyond its grid."""
    ends = [
        f"{NAMES[row['name']]} ({row['linear_strength']:g}, the {probes.grid_end(row['linear_strength'])})"
        for row in rows
        if probes.grid_end(row["linear_strength"])
    ]
    if ends:
        console.say(f"linear probe: the L2 penalty is at the end of its grid for {', '.join(ends)}; one beyond it may do better")


def _gap(rows: Mapping[str, Mapping[str, Any]]) -> None:
    values = {name: row["linear"] for name, row in rows.items()}
    gap = f"between random weights ({values['random']:.3f}) and the teacher ({values['teacher']:.3f})"
    if "gap_closed" not in rows["student"]:
        console.say(f"linear probe: there is hardly a gap {gap}; these labels do not tell good features from bad")
    else:
        low, high = rows["student"]["gap_closed_interval"]
        console.say(f"linear probe: the student closed {rows['student']['gap_closed']:.0%} [{low:.0%}, {high:.0%}] of the gap {gap}")


def _paired(found: Mapping[str, Any], other: str) -> None:
    console.say(f"against {other}:")
    for key, title in (("knn", "kNN"), ("linear", "linear")):
        test = found[key]
        low, high = test["difference_interval"]
        console.say(
            f"  {title}: {test['difference']:+.3f} [{low:+.3f}, {high:+.3f}] for this student; right alone on {test['only_this']:,} images, "
            f"the other on {test['only_other']:,}; McNemar p = {test['p_value']:.2g}"
        )
