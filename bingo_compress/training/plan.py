"""What a recipe leaves open, filled in: names, weights, what a method takes where nothing is set, threads."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import ProjectionHead, RegressionHead
from bingo_compress.models.names import has_pretrained, resolve_name
from bingo_compress.recipe import GIVEN, Recipe
from bingo_compress.runtime import console, distributed
from bingo_compress.runtime.made_of import hash_seed
from bingo_compress.training.losses import LOSSES, Loss, make_loss, readers, settled

SLOW_AVERAGE, QUICK_AVERAGE = 0.999, 0.99
ADAMW_BELOW = 50_000


def resolve(recipe: Recipe, say: Callable[[str], None] = console.say) -> Recipe:
    """`resolve_names` and `settle`."""
    return settle(resolve_names(recipe, say))


def settle(recipe: Recipe) -> Recipe:
    """What was left to the method is filled in: temperatures, and what a target is. Raises BingoError."""
    chosen = recipe.stored_views
    if chosen == "auto":
        chosen = (
            "mean" if make_loss(recipe.method, recipe.model_dump()).averaged and recipe.views != "online" else "drawn"
        )
    if chosen == "mean" and recipe.views == "online":
        raise BingoError(
            "--set stored_views=mean: expected stored views to take the mean of, found --views online; give --views 4"
        )
    return recipe.model_copy(update=settled(recipe.method, recipe.model_dump()) | {"stored_views": chosen})


def resolve_names(recipe: Recipe, say: Callable[[str], None] = console.say) -> Recipe:
    """Family names to models and `auto` student weights to what they mean; says what it chose. Raises BingoError."""
    names: dict[str, Any] = {}
    for role in ("teacher", "student"):
        if getattr(recipe, f"{role}_weights") == GIVEN:
            continue  # a module of the user's own: its name is no model's
        names[role] = resolve_name(getattr(recipe, role), f"--{role}")
        if names[role] != getattr(recipe, role):
            say(f"{role}: {getattr(recipe, role)} means {names[role]}")
    if recipe.student_weights == "auto":
        names["student_weights"] = "pretrained" if has_pretrained(names["student"]) else "random"
        say(
            f"student weights: {names['student_weights']} (timm"
            f" {'has' if names['student_weights'] == 'pretrained' else 'has no'} weights for {names['student']})"
        )
    return recipe.model_copy(update=names)


@dataclass(frozen=True)
class Plan:
    """What a recipe means for a folder of a given size: nothing in it is a setting, all of it follows.

    Every batch is full (`anchors_of`): an epoch may end within one, and the run's last one is filled up with images of
    the epoch that would come next. A smaller last batch would let BatchNorm learn from a few views, and could not be
    shared among processes.
    """

    images: int
    batch_size: int
    steps: int
    warmup: int
    optimizer: str
    peak_lr: float
    queue_size: int
    student_views: int
    average: float

    def steps_of(self, epochs: float) -> int:
        """Steps after which so many epochs are complete."""
        return steps_of(epochs, self.images, self.batch_size)

    def epochs_after(self, steps: int) -> int:
        """Epochs that are complete after so many steps: also the number, from 0, of the epoch that the next step's
        first anchor belongs to.
        """
        return steps * self.batch_size // self.images

    def describe(self) -> str:
        """One line for the screen."""
        return (
            f"{self.steps:,} steps of {self.batch_size} anchors x {self.student_views} student views; {self.optimizer},"
            f" peak learning rate {self.peak_lr:.3g}, warm-up {self.warmup:,} steps; queue {self.queue_size:,}"
        )


def steps_of(epochs: float, images: int, batch: int) -> int:
    """Batches that hold each of the images an anchor `epochs` times, the last one filled up."""
    return -(-round(epochs * images) // batch)


def plan(recipe: Recipe, images: int) -> Plan:
    """The plan for a training set of `images`. Raises BingoError when there are too few for the bags."""
    if "bag_size" not in unread(recipe) and images <= recipe.bag_size:
        raise BingoError(
            f"--data: expected more images than a bag holds ({recipe.bag_size}), found {images} to train on; add images"
            " or lower --bag-size"
        )
    if images < 2:
        raise BingoError(f"--data: expected images, found {images} to train on; add some")
    batch = min(recipe.batch_size, images)
    if batch % distributed.world():
        raise BingoError(f"--batch-size: expected a multiple of the {distributed.world()} processes, found {batch}")
    steps = steps_of(recipe.epochs, images, batch)
    optimizer = recipe.optimizer if recipe.optimizer != "auto" else "adamw" if steps < ADAMW_BELOW else "sgd"
    peak = recipe.lr or (0.03 * batch / 256 if optimizer == "sgd" else 0.003 * math.sqrt(batch / 128))
    warmup = (
        round(recipe.warmup_epochs * images / batch)
        if recipe.warmup_epochs >= 0
        else 0
        if optimizer == "sgd"
        else round(0.05 * steps)
    )
    average = recipe.average or (SLOW_AVERAGE if steps >= ADAMW_BELOW else QUICK_AVERAGE)
    views = 3 if loss_of(recipe).official else 2
    return Plan(images, batch, steps, warmup, optimizer, peak, min(recipe.queue_size, images), views, average)


def loss_of(recipe: Recipe) -> Loss:
    """The recipe's method with its settings."""
    return make_loss(recipe.method, recipe.model_dump())


def make_head(recipe: Recipe, width: int, dim: int) -> nn.Module:
    """The student's head for training, random by the recipe's seed: the paper's, or what the method defines."""
    torch.manual_seed(hash_seed(recipe.seed, "head"))
    if loss_of(recipe).regression:
        return RegressionHead(width, recipe.head_hidden, dim)
    return ProjectionHead(width, recipe.head_hidden, dim)


def make_optimizer(recipe: Recipe, planned: Plan, modules: list[nn.Module]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 as in the paper, or AdamW, which leaves biases and norms undecayed."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    if planned.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=planned.peak_lr, momentum=0.9, weight_decay=recipe.weight_decay, fused=True
        )
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=planned.peak_lr, fused=True)


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to zero at `total` (SGDR without restarts). step counts from
    0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def unread(recipe: Recipe) -> dict[str, str]:
    """The settings that change nothing in a run of this recipe, each with what would read it. A setting that is not
    named here is read by every run.
    """
    loss = make_loss(recipe.method, recipe.model_dump())
    taught, paired, bagged = loss.teacher, loss.mates, loss.mates and recipe.bags != "none"
    for_own_bags = recipe.bags in ("knn", "none")  # a student's own bags are its nearest neighbours
    projected = recipe.target in ("pca", "whitened") or (recipe.target == "auto" and not loss.regression)
    with_bags = f"{_methods('mates')} with bags"
    table = {
        "bags": (
            paired and (taught or for_own_bags),
            _methods("mates") + ("" if taught or not paired else " (self: only knn or none)"),
        ),
        "bag_size": (bagged, with_bags),
        "clusters": (bagged and taught and recipe.bags == "kmeans", "bags=kmeans of a teacher"),
        "search": (bagged and taught and recipe.bags in ("knn", "adaptive"), "bags=knn and bags=adaptive of a teacher"),
        "rebag_epochs": (bagged and not taught, "method=self with bags"),
        "average": (bool(loss.momentum), _methods("momentum")),
        "queue_size": (loss.negatives, _methods("negatives")),
        "mask_mates": (loss.negatives, _methods("negatives")),
        "views": (taught, _methods("teacher")),
        "stored_views": (taught and recipe.views != "online", f"{_methods('teacher')} with stored views"),
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
