"""What a comparison found: mean and spread of every arm and its difference from the first, as a table, JSON, CSV and a
picture.
"""

import csv
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bingo_compress.evaluation import intervals, probes
from bingo_compress.features import neighbours
from bingo_compress.presenting import plots
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import console, run_dir

OF_ARMS = {"method", "seed"}  # not of the comparison


def titles(gallery: int) -> dict[str, str]:
    """The figures of a table and how they are headed; no recall where the smallest gallery, of so many images, is too
    small for one.
    """
    recall = {"neighbour_recall": neighbours.recall_title(gallery)} if neighbours.recall_k(gallery) else {}
    return {"knn": "kNN", "linear": "linear"} | recall


def summarise(results: list[dict[str, Any]], arms: list[str], base: Recipe, test: str | None) -> dict[str, Any]:
    """Mean and spread (standard deviation over seeds, None for one) of every arm; its paired difference from the first;
    recall's rank correlation with labels.
    """
    gallery = int(results[0]["gallery"])
    by_arm = {arm: [run for run in results if run["arm"] == arm] for arm in arms}
    first = by_arm[arms[0]]
    recalls = [run.get("neighbour_recall", 0.0) for run in results]
    ranks = {name: intervals.spearman(recalls, [run[name] for run in results]) for name in ("knn", "linear")}
    strengths = [strength for run in results for strength in run["linear_strengths"]]
    return {
        "protocol": _protocol(gallery, strengths, test, alone=len(first) == 1)
        | {"near_copies": results[0]["near_copies"]},
        "settings": base.model_dump(exclude=OF_ARMS),
        "rank_correlation_of_recall": {
            **{name: None if math.isnan(value) else value for name, value in ranks.items()},
            "runs": len(results),
        },
        "rows": [_row(arm, runs, first, titles(gallery)) for arm, runs in by_arm.items()],
        "runs": [{key: value for key, value in run.items() if key not in ("tensors", "made_of")} for run in results],
    }


def _row(
    arm: str, runs: list[dict[str, Any]], first: list[dict[str, Any]], headed: Mapping[str, str]
) -> dict[str, Any]:
    """An arm's line of the table. first: the runs of the first arm."""
    row: dict[str, Any] = {
        "name": arm,
        "seeds": [run["seed"] for run in runs],
        "student": runs[0]["student"],
        "epochs": runs[0]["epochs"],
    }
    for figure in headed:
        row[figure], spread = intervals.mean_and_spread([run[figure] for run in runs])
        row[f"{figure}_spread"] = spread if len(runs) > 1 else None
    for count in ("student_passes", "average_passes", "teacher_passes"):
        row[count] = runs[0][count]
    row["train_seconds"] = statistics.fmean(run["train_seconds"] for run in runs)
    row["memory_mb"] = max(run["memory_mb"] for run in runs)
    row["bags"] = runs[0]["bags"] | runs[0]["purity"]
    for figure in ("knn", "linear"):
        # Of each seed on each test image: both arms share them.
        mine, theirs = (torch.stack([run["tensors"][figure].double() for run in part]) for part in (runs, first))
        row[f"{figure}_minus_first"] = float((mine - theirs).mean())
        row[f"{figure}_minus_first_interval"] = list(intervals.seeds_interval(mine - theirs))
    return row


def _protocol(gallery: int, strengths: Sequence[float], test: str | None, *, alone: bool) -> dict[str, Any]:
    """How all of it was measured, in words. alone: one seed an arm."""
    return {
        "knn": f"weighted vote exp(cos/{probes.KNN_TEMPERATURE}), k = {probes.KNN_K} (DINO), plain view",
        "linear": (
            "logistic regression on frozen standardised features, its strength by cross-validation inside the bank"
            " (one-standard-error rule)"
        ),
        "linear_strengths_at_the_grids_end": sum(bool(probes.grid_end(strength)) for strength in strengths),
        "linear_fits": len(strengths),
        "recall": neighbours.recall_facts(gallery),
        "queries": (
            f"all images of {test}"
            if test
            else "every labelled image once, cross-validated in stratified folds, exact copies in one fold"
        ),
        "spread": (
            "standard deviation over seeds (student's weights, order, augmentation and mates; teacher views and split"
            " are shared)"
        ),
        "minus_first": (
            "difference from the first arm; 95% interval over "
            + (
                "test images alone: one seed, the spread between runs is not known"
                if alone
                else "seeds and test images, both as random effects"
            )
            + "; each for itself: of twenty intervals of equal arms one leaves out zero"
        ),
        "student_passes": "views through the student, forward and backward",
        "memory_mb": "highest so far in this process: it also holds the arms before",
    }


def write(table: dict[str, Any], out: Path) -> None:
    """table.json, table.csv, table.txt and table.svg, and the table on screen."""
    rows = table["rows"]
    run_dir.write_text(out / "table.json", json.dumps(table, indent=2) + "\n")
    buffer = io.StringIO()
    flat = [{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows]
    writer = csv.DictWriter(buffer, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in flat
    )
    run_dir.write_text(out / "table.csv", buffer.getvalue())
    protocol = table["protocol"]
    headed, alone = titles(protocol["recall"]["gallery"]), len(rows[0]["seeds"]) == 1
    quality = [("", *headed.values(), "kNN - first", "linear - first")]
    cost = [("", "epochs", "student passes", "teacher passes", "own average's", "time", "memory", "mates", "purity")]
    for row in rows:
        means = [f"{row[figure]:.3f}" + ("" if alone else f" ± {row[f'{figure}_spread']:.3f}") for figure in headed]
        differences = [
            (
                "-"
                if row is rows[0]
                else "{:+.3f} [{:+.3f}, {:+.3f}]".format(
                    row[f"{figure}_minus_first"], *row[f"{figure}_minus_first_interval"]
                )
            )
            for figure in ("knn", "linear")
        ]
        quality.append((row["name"], *means, *differences))
        passes = [f"{row[name]:,}" for name in ("epochs", "student_passes", "teacher_passes", "average_passes")]
        bags = [
            f"{row['bags'][name]:.{digits}f}" if name in row["bags"] else "-"
            for name, digits in (("size_mean", 1), ("bag_purity", 2))
        ]
        cost.append(
            (row["name"], *passes, console.duration(row["train_seconds"]), f"{row['memory_mb']:,.0f} MB", *bags)
        )
    for reference in table["references"]:
        quality.append((str(reference["name"]), *(f"{reference[figure]:.3f}" for figure in headed), "-", "-"))
    closing = _closing(table, headed)
    text = "\n\n".join(console.table_text(part[0], part[1:]) for part in (quality, cost))
    run_dir.write_text(out / "table.txt", "\n".join((f"{text}\n", *closing, "")))
    run_dir.write_text(out / "table.svg", plots.dots(rows, list(headed), headed))
    spread = (
        "one seed: the spread between runs is not known"
        if alone
        else "mean ± spread over seeds; differences: 95% over seeds and images"
    )
    for title, part in ((spread, quality), ("cost of one seed", cost)):
        console.table(title, part[0], part[1:])
    for line in closing:
        console.say(line)
    console.say(f"the tables: {out / 'table.txt'}, .json, .csv, .svg")


def _closing(table: Mapping[str, Any], headed: Mapping[str, str]) -> list[str]:
    """What is to be known beside the table."""
    protocol, ranks = table["protocol"], table["rank_correlation_of_recall"]
    lines = []
    if "neighbour_recall" in headed:
        correlation = "not defined" if ranks["linear"] is None else f"{ranks['linear']:.2f}"
        lines.append(
            f"{headed['neighbour_recall']} against linear over {ranks['runs']} runs: rank correlation {correlation}"
        )
    else:
        lines.append(
            f"neighbour recall is not measured: a gallery of {protocol['recall']['gallery']:,} is too small (at least"
            f" {neighbours.RECALL_SHARE})"
        )
    if len(table["rows"][0]["seeds"]) == 1:
        lines.append(
            "one seed: the intervals are over test images alone; another seed of the same arm may land outside"
        )
    ends = protocol["linear_strengths_at_the_grids_end"]
    if ends:
        lines.append(
            f"linear probe: {ends} of {protocol['linear_fits']} fits took an L2 penalty at the end of the grid; one"
            " beyond it may do better"
        )
    if share := protocol["near_copies"].get("test_share_near_bank"):
        lines.append(
            f"{share:.0%} of the test images have a near-copy in the bank, which is found, not recognised: every model"
            " looks better than it is"
        )
    if whole := protocol["near_copies"].get("classes_of_one_scene"):
        lines.append(
            f"{len(whole):,} classes are near-copies of one scene, on both sides of the split: every model looks better"
            " than it is"
        )
    lines += same_students(table["runs"])
    if protocol["judged_images_in_data"]:
        lines.append(
            f"{protocol['judged_images_in_data']:,} of the {protocol['judged_images']:,} images that students are"
            " judged on are also in --data, without labels"
        )
    return lines


def same_students(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each set of runs that ended with the very same weights: what tells them apart changed nothing."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for run in runs:
        alike[run["digest"]].append(f"{run['arm']} (seed {run['seed']})")
    return [
        f"the very same student, so what differs in the settings changed nothing: {', '.join(names)}"
        for names in alike.values()
        if names[1:]
    ]
