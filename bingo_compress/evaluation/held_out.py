"""Neighbour recall on images that were kept out of training, the only figure that needs no label: while the student
trains, and at the end.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo_compress.errors import BingoError
from bingo_compress.evaluation import intervals, probes
from bingo_compress.features import extract, neighbours
from bingo_compress.models import trained
from bingo_compress.models.encoder import Encoder, weights_digest
from bingo_compress.runtime import console, distributed, run_dir
from bingo_compress.runtime.made_of import MadeOf
from bingo_compress.training.loader import Lessons
from bingo_compress.training.loop import distill
from bingo_compress.training.material import Material, halves
from bingo_compress.training.plan import CHECK_GALLERY, GALLERY_AT_MOST, Plan, refuse_few_held


def train(
    plan: Plan,
    student: Encoder,
    material: Material,
    lessons: Lessons,
    metrics: Path,
    saved: Path,
    *,
    discard: bool = False,
) -> MadeOf:
    """Distil `student` in place, with checks of neighbour recall where the recipe asks for them. Returns what it is
    made of.

    discard: a state in `saved` that is another run's is deleted instead of refused.
    """
    recipe, check = plan.recipe, None
    if recipe.keep_best or recipe.check_every:
        refuse_few_held(recipe, len(material.held))
        choosing, reporting = halves(material, recipe)
        if recipe.keep_best:
            console.say(
                f"--keep-best chooses by {len(choosing):,} of the images held out; the closing figure is of the other"
                f" {len(reporting):,}"
            )
        check = recall_check(material, choosing, plan.device)
    return distill(plan, student, lessons, metrics, saved, check=check, discard=discard)


def recall_check(material: Material, held: Tensor, device: torch.device) -> Callable[[Encoder], float]:
    """A student's neighbour recall on the images `held`, from the pixel store, in a gallery of at most CHECK_GALLERY;
    several processes share them.
    """
    gallery = material.training[:: -(-len(material.training) // CHECK_GALLERY)]
    if not neighbours.recall_k(len(gallery)):
        raise BingoError(
            f"--keep-best: expected {neighbours.RECALL_SHARE} images to train on, found {len(gallery)}; add images"
        )
    truth = material.seen.features

    def check(student: Encoder) -> float:
        found = extract.store_features(student, material.store, torch.cat((held, gallery)), device).split(
            (len(held), len(gallery))
        )
        return distributed.from_first(lambda: probes.neighbour_recall((truth[held], truth[gallery]), found))

    return check


def held_out_recall(run: run_dir.RunDir, plan: Plan, student: Encoder, material: Material) -> dict[str, Any]:
    """Neighbour recall on the held-out images before and after ("start", "student") and what was gained, with 95%
    intervals, its k and counts; nothing without such. Several processes share them.
    """
    held, training, truth = halves(material, plan.recipe)[1], material.training, material.seen.features
    gallery = training[:: -(-len(training) // GALLERY_AT_MOST)]
    if not len(held) or not neighbours.recall_k(len(gallery)):
        console.say(
            f"neighbour recall is not measured: {len(held):,} images held out, a gallery of {len(gallery):,} (at least"
            f" {neighbours.RECALL_SHARE})"
        )
        return {}
    encoders = {"start": trained.load_start(plan.recipe, run, student), "student": student}
    ready = {name: extract.as_embed(encoder, plan.device) for name, encoder in encoders.items()}
    order = torch.cat((held, gallery)).tolist()
    keep = extract.Keep(run.work, "closing", {name: weights_digest(each) for name, each in encoders.items()})
    found, good = extract.plain(ready, material.folder, order, "check held-out images", keep)
    if len(good) < len(held) + len(gallery):
        raise BingoError(
            f"an image in {material.folder.where} changed during the run; start the command again with --resume"
        )
    sides = {name: features.split((len(held), len(gallery))) for name, features in found.items()}
    counts = neighbours.recall_facts(len(gallery)) | {"queries": len(held)}

    def measure() -> dict[str, Any]:
        each = {name: probes.neighbour_recalls((truth[held], truth[gallery]), side) for name, side in sides.items()}
        found: dict[str, Any] = {name: float(values.mean()) for name, values in each.items()}
        found |= {f"{name}_interval": list(intervals.bounded_interval(values)) for name, values in each.items()}
        return counts | found | {"gain_interval": list(intervals.bounded_interval(each["student"] - each["start"], -1))}

    return distributed.from_first(measure)
