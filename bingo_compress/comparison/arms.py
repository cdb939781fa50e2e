"""The arms of a comparison: what `--methods` stands for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from bingo_compress.errors import BingoError
from bingo_compress.recipe import Recipe, make_recipe, parse_setting, repeated
from bingo_compress.training.plan import loss_of, resolve, student_views
from bingo_compress.unread import refuse_unread

# Settings that are one for a whole comparison, with the way to give them.
SHARED = {
    "method": "the method is the word before the first colon",
    "seed": "give all arms their seeds by --seeds",
    "time": "methods are compared at equal passes; give --epochs",
    **dict.fromkeys(
        (
            "data",
            "image_column",
            "label_column",
            "bands",
            "duplicates",
            "ema",
            "max_bad",
            "device",
            "threads",
            "pixels",
            "memory",
            "save_every_minutes",
            "save_every_steps",
            "profile",
        ),
        "it is the same for all arms; give it once for the whole comparison",
    ),
}


@dataclass(frozen=True)
class Arm:
    """One line of the table: its name as typed (bingo, seed, bingo:bag_size=1) and the recipe it stands for."""

    name: str
    recipe: Recipe


def refuse_own(named: Mapping[str, Any]) -> None:
    """Raise BingoError where a setting that each arm has of its own was named for the whole comparison."""
    for key in ("method", "seed"):
        if key in named:
            raise BingoError(f"compare: expected no {key} for all arms, found {key}={named[key]}; {SHARED[key]}")


def make_arms(methods: str, base: Recipe) -> list[Arm]:
    """Arms of a comma-separated list; each may change settings after colons. Epochs follow from the base recipe, and
    may be fractions: student passes are equal to within a batch.

    Raises BingoError for an unknown method or setting.
    """
    if base.time:
        raise BingoError(f"compare: expected epochs, found time {base.time}; {SHARED['time']}")
    arms = []
    for name in filter(None, (part.strip() for part in methods.split(","))):
        method, *changes = name.split(":")
        pairs = [parse_setting(change, f"--methods {name}") for change in changes]
        values = dict(pairs)
        if twice := repeated([key for key, _ in pairs]):
            raise BingoError(
                f"--methods {name}: expected each setting once, found {twice} more often; leave one of them"
            )
        if shared := [key for key in values if key in SHARED]:
            raise BingoError(
                f"--methods {name}: expected settings of one method, found {shared[0]}; {SHARED[shared[0]]}"
            )
        recipe = make_recipe(base.model_dump() | {"method": method} | values, "--methods")
        refuse_unread([recipe], {key: getattr(recipe, key) for key in values}, f"--methods {name}")
        if "epochs" not in values:
            views = student_views(loss_of(recipe))
            recipe = recipe.model_copy(update={"epochs": base.epochs * 2 / views if views != 2 else base.epochs})
        arms.append(Arm(name, recipe))
    if not arms:
        raise BingoError("--methods: expected names such as bingo,seed or bingo:bag_size=1, found none")
    if len({arm.name for arm in arms}) < len(arms):
        raise BingoError(f"--methods: expected different names, found one twice in {methods!r}")
    return arms


def resolve_arms(arms: list[Arm], say: Callable[[str], None]) -> list[Arm]:
    """The arms with nothing left open, each student with weights of its own; says what that is, and which arms are one.
    Raises BingoError.
    """
    resolved = [Arm(arm.name, resolve(arm.recipe, say)) for arm in arms]
    for one, other in combinations(resolved, 2):
        if one.recipe == other.recipe:
            say(f"warning: {one.name} and {other.name} are the same run; one of them is enough")
    return resolved
