"""What a comparison of tiny models is of, and its words."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import flags

from bingo_compress.recipe import Recipe

METHODS = "bingo,moco,bingo:variant=official:bag_size=1"

OFFICIAL = "bingo:variant=official:bag_size=1"

FIGURES, GALLERY = ("knn", "linear", "neighbour_recall"), 28

KINDS, EACH, TRAINING = 4, 9, 33  # kinds 0 and 3 look alike, so that nobody is always right


@dataclass
class Ground:
    """A folder of photos and a teacher's weights."""

    data: Path
    base: Recipe

    def words(self, out: Path, **changes: str) -> list[str]:
        """The comparison on the command line."""
        given = {
            "data": str(self.data),
            "labels": str(self.data),
            "methods": METHODS,
            "seeds": "0,1",
            "out": str(out),
            **changes,
        }
        own = flags(teacher_weights=self.base.teacher_weights, crop_scale_min=self.base.crop_scale_min)
        return ["compare", *own, *(word for key, value in given.items() for word in (f"--{key}", value))]


@dataclass
class World(Ground):
    """One uninterrupted comparison with what it did."""

    out: Path
    table: dict[str, Any]
    passes: dict[str, int]

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.out, to))


def figures(table: dict[str, Any], arm: str) -> list[tuple[Any, ...]]:
    """The figures of an arm's runs: all that training and judging gave, but no times and memory."""
    return [(run["seed"], *(run[figure] for figure in FIGURES)) for run in table["runs"] if run["arm"] == arm]
