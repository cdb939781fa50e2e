"""Settings that a run does not read: which they are, and that they are refused where they were asked for."""

from collections.abc import Iterable, Mapping
from typing import Any

from bingo_compress.errors import BingoError
from bingo_compress.recipe import WORDS, Recipe
from bingo_compress.training.losses import LOSSES, readers
from bingo_compress.training.plan import bagged, fills_queue, loss_of


def unread(recipe: Recipe) -> dict[str, str]:
    """The settings that change nothing in a run of this recipe, each with what would read it. A setting that is not
    named here is read by every run.
    """
    loss = loss_of(recipe)
    taught, paired, with_mates = loss.teacher, loss.mates, bagged(recipe)
    for_own_bags = recipe.bags in ("knn", "none")  # a student's own bags are its nearest neighbours
    projected = recipe.target in ("pca", "whitened") or (recipe.target == "auto" and not loss.regression)
    with_bags = f"{_methods('mates')} with bags"
    from_file = not {recipe.teacher_weights, recipe.student_weights} <= WORDS
    table = {
        "ema": (from_file, "a file of weights"),
        "bags": (
            paired and (taught or for_own_bags),
            _methods("mates") + ("" if taught or not paired else " (self: only knn or none)"),
        ),
        "bag_size": (with_mates, with_bags),
        "clusters": (with_mates and taught and recipe.bags == "kmeans", "bags=kmeans of a teacher"),
        "rebag_epochs": (with_mates and not taught, "method=self with bags"),
        "average": (bool(loss.momentum), _methods("momentum")),
        "queue_size": (loss.negatives, _methods("negatives")),
        "queue_start": (fills_queue(recipe), "methods with a queue of stored targets"),
        "mask_mates": (loss.negatives, _methods("negatives")),
        "views": (taught, _methods("teacher")),
        **dict.fromkeys(
            ("stored_views", "stored_as"),
            (taught and recipe.views != "online", f"{_methods('teacher')} with stored views"),
        ),
        "target": (taught, _methods("teacher")),
        "target_dim": (projected or not taught, "target=pca and target=whitened"),
    }
    for key, methods in readers().items():
        words = (method + (f" with variant={variant}" if variant else "") for method, variant in methods.items())
        table[key] = (methods.get(recipe.method) in ("", recipe.variant), ", ".join(words))
    return {key: reader for key, (read, reader) in table.items() if not read}


def refuse_unread(recipes: Iterable[Recipe], given: Mapping[str, Any], source: str) -> None:
    """Raise BingoError if none of the recipes reads one of the settings that were `given`; its default may stand
    there.
    """
    nowhere = [unread(recipe) for recipe in recipes]
    for key, value in given.items():
        if all(key in each for each in nowhere) and value != Recipe.model_fields[key].default:
            raise BingoError(
                f"{source}: expected settings that the run reads, found {key}={value}, read only by {nowhere[0][key]};"
                " leave it out"
            )


def _methods(need: str) -> str:
    return ", ".join(method for method, kind in LOSSES.items() if getattr(kind, need))
