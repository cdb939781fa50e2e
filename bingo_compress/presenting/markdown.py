"""Figures in words, and text as Markdown that shows just that."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "teacher": "teacher",
    "student": "student (distilled)",
    "start": "student before",
    "random": "student, random weights",
    "onnx": "exported ONNX file",
    "against": "student of --against",
}
CLASSES_SHOWN = 50
# All that can begin or end something inside a line, of CommonMark and of GitHub's tables, formulas and links that need
# no brackets.
MARKUP = re.compile(r"[!#$&*+:<=>@\[\\\]^_`{|}~]|(?<=www)\.", re.IGNORECASE)
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def plain(value: object) -> str:
    """Text from elsewhere as Markdown that shows just that text on one line: no markup, HTML, link or table cell can
    come of it.
    """
    line = " ".join(str(value).split())
    shown = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line)
    return re.sub(MARKUP, lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), shown)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def figure(row: Mapping[str, Any], key: str) -> str:
    """A figure with its interval: 0.683 [0.634, 0.731]."""
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.3f} [{low:.3f}, {high:.3f}]"


def shown(row: Mapping[str, Any], key: str) -> str:
    """0.683 [0.634, 0.731]; a dash where it was not measured."""
    return figure(row, key) if key in row else "-"


def name_of(contract: Mapping[str, Any]) -> str:
    """What the exported file of a contract is called."""
    return {"int8": "student-int8.onnx", "float16": "student-fp16.onnx"}.get(
        str(contract.get("precision")), "student.onnx"
    )


def title(row: str) -> str:
    """A row of a proof in words: "onnx-int8" is the exported int8 file."""
    return NAMES.get(row) or f"exported {row.removeprefix('onnx-')} file"
