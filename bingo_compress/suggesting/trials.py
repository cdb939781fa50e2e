"""The best few of a table, distilled briefly on the user's own images: successive halving by neighbour recall on images
held out, which needs no labels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from bingo_compress.data import image_list
from bingo_compress.errors import BingoError
from bingo_compress.evaluation.held_out import recall_check, train
from bingo_compress.models.trained import build_models
from bingo_compress.recipe import WORDS, Recipe, deciding, make_recipe
from bingo_compress.runtime import checkpoint, console, run_dir
from bingo_compress.runtime.made_of import FORMATS, file_digest, made_of
from bingo_compress.suggesting.ranking import Row
from bingo_compress.training.material import anchors_count, lessons_of, make_bags, prepare
from bingo_compress.training.plan import begin, plan_run

LONGER = 3  # times the passes of the round before, for half of its students


def recipe_of(row: Row, named: Mapping[str, Any]) -> Recipe:
    """The recipe of a trial; named: the settings that all share. Raises BingoError."""
    return make_recipe({**named, "student": row.student, "image_size": row.px}, "the command line")


def halving(rows: Sequence[Row], named: Mapping[str, Any], epochs: float, out: Path) -> dict[Row, dict[float, float]]:
    """Rounds: each student is distilled anew for `epochs` passes, the better half goes on to LONGER times as many,
    until one is left. Neighbour recall by passes of each, the best first.

    What `out` has is not trained again, and a training that was stopped goes on. Raises BingoError.
    """
    run_dir.refuse_taken(out, may_hold_files=True)
    (out / "work").mkdir(parents=True, exist_ok=True)
    run_dir.hold(out, "--out")
    found: dict[Row, dict[float, float]] = {row: {} for row in rows}
    largest = max(row.px for row in rows)
    left = list(rows)
    while True:
        for place, row in enumerate(left, 1):
            console.say(f"== {row.student} at {row.px} px, passes: {epochs:g} ({place} of {len(left)} in this round)")
            recipe = recipe_of(row, {**named, "epochs": epochs})
            found[row][epochs] = _recall(recipe, largest, out, f"{row.name}-{epochs:g}")
        left = sorted(left, key=lambda row: -found[row][epochs])[: -(-len(left) // 2)]
        if len(left) == 1:
            break
        epochs *= LONGER
    return dict(sorted(found.items(), key=lambda entry: [-len(entry[1]), -entry[1][max(entry[1])]]))


def _recall(recipe: Recipe, largest: int, out: Path, name: str) -> float:
    """Neighbour recall of a student that is distilled by this recipe, or was: out/NAME.json.

    largest: pixels a side of the largest student, for which pictures are stored: so that they are the same for all, and
    the teacher passes over them once.
    """
    recipe, folder, device = begin(recipe)
    files = [getattr(recipe, f"{role}_weights") for role in ("teacher", "student")]
    made = made_of(
        "arm",
        settings=deciding(recipe),
        weights=[word if word in WORDS else file_digest(Path(word)) for word in files],
        images=folder.fingerprint(),
        largest=largest,
        training=FORMATS["training"],
        program={"torch": torch.__version__, "timm": timm.__version__, "device": device.type},
    )
    result = out / f"{name}.json"
    before = run_dir.read_json("suggest", result)
    if before.get("made_of") == made.told():
        return float(before["neighbour_recall"])
    image_list.keep(out / "work", folder)
    models = build_models(recipe)
    plan = plan_run(models, len(folder.files), device)
    for_all = replace(plan, recipe=plan.recipe.model_copy(update={"image_size": largest}))
    material = prepare(for_all, models, folder, out / "work")
    if not len(material.held):
        raise BingoError("--data: expected images to hold out, found too few; add images or --set hold_out=0.2")
    plan = plan.on(anchors_count(plan, material))
    lessons = lessons_of(plan, models.teacher, material, make_bags(plan, models.teacher, material))
    check = recall_check(material, material.held, plan.device)
    saved = out / "work" / "checkpoint.safetensors"
    train(plan, models.student, material, lessons, out / "work" / "metrics.jsonl", saved, discard=True)
    recall = check(models.student.eval())
    run_dir.write_text(result, json.dumps({"neighbour_recall": recall, "made_of": made.told()}, indent=2) + "\n")
    checkpoint.forget(saved)
    return recall
