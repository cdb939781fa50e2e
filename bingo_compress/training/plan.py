"""What a recipe leaves open, filled in: names, weights, what a method takes where nothing is set, threads."""

from collections.abc import Callable
from typing import Any

import torch

from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import Encoder, has_pretrained, resolve_name
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import console, devices, distributed
from bingo_compress.training.losses import make_loss, settled


def resolve(recipe: Recipe, say: Callable[[str], None] = console.say) -> Recipe:
    """`resolve_names` and `settle`."""
    return settle(resolve_names(recipe, say))


def settle(recipe: Recipe) -> Recipe:
    """What was left to the method is filled in: temperatures, and what a target is. Raises BingoError."""
    chosen = recipe.stored_views
    if chosen == "auto":
        chosen = "mean" if make_loss(recipe.method, recipe.model_dump()).averaged and recipe.views != "online" else "drawn"
    if chosen == "mean" and recipe.views == "online":
        raise BingoError("--set stored_views=mean: expected stored views to take the mean of, found --views online; give --views 4")
    return recipe.model_copy(update=settled(recipe.method, recipe.model_dump()) | {"stored_views": chosen})


def resolve_names(recipe: Recipe, say: Callable[[str], None] = console.say) -> Recipe:
    """Family names to models and `auto` student weights to what they mean; says what it chose. Raises BingoError."""
    names: dict[str, Any] = {}
    for role in ("teacher", "student"):
        names[role] = resolve_name(getattr(recipe, role), f"--{role}")
        if names[role] != getattr(recipe, role):
            say(f"{role}: {getattr(recipe, role)} means {names[role]}")
    if recipe.student_weights == "auto":
        names["student_weights"] = "pretrained" if has_pretrained(names["student"]) else "random"
        say(
            f"student weights: {names['student_weights']} (timm {'has' if names['student_weights'] == 'pretrained' else 'has no'} weights for {names['student']})"
        )
    return recipe.model_copy(update=names)


def use_threads(recipe: Recipe, student: Encoder, device: torch.device, kept: int = 0) -> Recipe:
    """torch's CPU threads set, and the recipe with them filled in: what it asks for; else `kept`, of the run that goes on; else, on a CPU, those with which
    a step of `student` is fastest here, or what torchrun set for each of several processes.

    A result depends on their number in its last bits, so a run settles it once. Where it cannot have as many again, that is said.
    """
    cores = max(1, devices.free_cores() // distributed.world())
    count = recipe.threads or min(kept, cores)
    if not count and device.type == "cpu":
        alone = distributed.world() == 1
        count = devices.choose_threads(student, student.preprocessing.size) if alone else torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    if kept and count != kept:
        why = "as asked for" if recipe.threads else "there are no more cores"
        console.say(f"threads: {count} instead of the {kept} that this run began with, {why}: its result will differ in the last bits")
    return recipe.model_copy(update={"threads": recipe.threads or kept or count})
