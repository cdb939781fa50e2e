"""What a caller must know stands in the docstring: what goes in and comes out, in which unit or shape, which error."""

import inspect
import re

import pytest

import bingo_compress
from bingo_compress import api

PUBLIC = [
    name for name in vars(api) if inspect.isfunction(vars(api)[name]) and vars(api)[name].__module__ == api.__name__
]
FUNCTIONS = [name for name in PUBLIC if not name.startswith("_")]
UNITS = re.compile(r"pixels|bytes|seconds|percent|in -?\d\.\.\d|\(B, ")
NO_UNITS = {"BingoError", "Recipe", "report"}  # a sentence; settings, each with its unit in its description; a page
# Whose work a function repeats: a reader must be able to look it up.
SOURCES = {"distill": "arXiv 2107.01691", "compare": "losses.py", "validate": "arXiv 1805.01978", "suggest": "state"}


@pytest.mark.parametrize("name", sorted({*bingo_compress.__all__, *FUNCTIONS}))
def test_a_public_name_says_what_a_caller_must_know(name: str) -> None:
    said = inspect.getdoc(getattr(api, name, None) or getattr(bingo_compress, name)) or ""
    assert len(said.split()) > 10
    assert name in NO_UNITS or UNITS.search(said), "say shapes or units"
    assert SOURCES.get(name, "") in said
    if name in FUNCTIONS:
        assert "Raises BingoError" in " ".join(said.split()), "say which error comes"


def test_every_function_of_the_package_is_one_of_those() -> None:
    functions = {name for name in bingo_compress.__all__ if name.islower()}
    assert functions <= set(FUNCTIONS)
