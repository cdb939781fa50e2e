"""What an exported file with classes in it answers to test images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo_compress.evaluation import scores
from bingo_compress.models import exported
from bingo_compress.models.encoder import Preprocessing
from bingo_compress.runtime import console


def in_classes_of(sides: scores.Sides, file: Path, contract: Mapping[str, Any], preprocessing: Preprocessing) -> Tensor:
    """What a file takes each of sides.queries for, as the device says it: (M,) positions in sides.classes,
    NONE_OF_THESE, or UNKNOWN for a class that is not among them. Raises BingoError where an image cannot be read any
    more.
    """
    names, limit = contract["classes"], contract["head"].get("threshold")
    model = {"file": (preprocessing, exported.classes_runner(file))}
    found = scores.again(model, sides.query_folder, sides.query_places, "classify test images")["file"]
    place = {name: position for position, name in enumerate(sides.classes)}
    predicted = torch.tensor([place.get(name, scores.UNKNOWN) for name in names])[found[:, : len(names)].argmax(1)]
    if "distance" in contract["outputs"] and limit is not None:
        predicted[found[:, len(names)] > limit] = scores.NONE_OF_THESE
    return predicted


def other_classes(contract: Mapping[str, Any], sides: scores.Sides) -> dict[str, list[str]]:
    """The classes of the proof that a file does not know, and those that it knows beside them; nothing where all are
    the same.
    """
    known, asked = contract["classes"], sides.classes
    missing, more = [name for name in asked if name not in known], [name for name in known if name not in asked]
    return {key: names for key, names in (("classes_missing", missing), ("classes_more", more)) if names}


def say(rows: Sequence[Mapping[str, Any]], sides: scores.Sides) -> None:
    """What the figure own_classes of files alone does not tell: other classes than the proof's, and "none of these"."""
    count = len(sides.query_labels)
    for row in (row for row in rows if "own_classes" in row):
        if missing := row.get("classes_missing"):
            lost = sum(sides.classes[label] in missing for label in sides.query_labels.tolist())
            console.say(
                f"warning: {row['file']} does not know {_listed(missing)}: {lost:,} of {count:,} test images, which are"
                " wrong in own classes; export it with labels of all classes"
            )
        if more := row.get("classes_more"):
            console.say(f"{row['file']} knows classes that are not in this proof: {_listed(more)}")
        if row["none_of_these"]:
            console.say(
                f'{row["file"]} says "none of these" of {row["none_of_these"]:.1%} of {count:,} test images, which is'
                " wrong in own classes"
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - scores.NAMED:,} more" if len(names) > scores.NAMED else ""
    return f"{', '.join(names[: scores.NAMED])}{more}"
