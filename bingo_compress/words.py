"""How a field of a command's words is asked for, and the fields that several commands have."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

GROUPS = ("models", "data", "method", "schedule", "machine", "run")
Place = str | Path


class Word(NamedTuple):
    """How a field is asked for: under which heading of --help, with what words, as what type, under which name."""

    group: str
    help: str
    kind: Any = str
    name: str = ""  # default: the field's own, with dashes
    metavar: str | None = None
    positional: bool = False


Data = str | Path | Sequence[str | Path]


def places(help_text: str) -> Word:
    """Images: one place or several."""
    return Word("data", help_text, list[str], metavar="PLACE")


Settings = Sequence[str] | Mapping[str, Any]


def setting(help_text: str) -> Word:
    """Keys of the recipe with values."""
    return Word("run", help_text, list[str], "--set", "KEY=VALUE")


RunFolder = Annotated[Place, Word("run", "the --out folder of a finished distill", Path)]
Json = Annotated[Place | None, Word("run", "write protocol and figures to this file", Path)]
IMAGES = "images: a folder, searched to any depth, a list (.txt, .csv), tar shards, a .zip or .parquet"
AGAIN = "may be repeated"
LABELLED = "labelled images: one folder a class, or a list, tar shards, a .zip or .parquet with labels"
TestFolder = Annotated[
    Data | None,
    places("labelled images to test on; default: a quarter of the others is set aside"),
]
IMAGE_COLUMN = Word("data", "column of a list or Parquet file that has the images, where its name does not tell")
LABEL_COLUMN = Word("data", "the same for labels; or the key of a JSON file")
DEVICE = Word("machine", "auto, cpu or cuda")
ELSEWHERE = f"where a toolchain is installed elsewhere; {AGAIN}"
PYTHON = Word("machine", ELSEWHERE, list[str], metavar="TOOLCHAIN=PYTHON")
OWN_SIZE = "pixels a side for the {}; default: its own"
Page = Annotated[
    bool,
    Word("run", "write RUN/report.html, a page on the run for anybody to read", bool, "--report/--no-report"),
]
