"""The pages that are made of the source say what the source says today."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


generate = _module()


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_page_is_as_the_source_is(name: str) -> None:
    there = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert there == generate.page(name), f"docs/{name} is behind the source; next: python docs/generate.py"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("raise BingoError('a: expected b')", ["a: expected b"]),
        ("WAY = 'turn back'\nraise BingoError(f'{a}: it found {b!r}' f'; {WAY}')", ["…: it found …; turn back"]),
        ("def f(x): return BingoError(g(x))\ndef g(x): return f'this is {x}'", ["this is …"]),
        ("def f(x, said): raise BingoError(said)\nf(1, f'here: {y}')\nf(1, said='there')", ["here: …", "there"]),
        ("raise EdgeError(f'{n} files', 'none', 'look')", ["expected … files, found none; look"]),
        ("raise BingoError(str(error))", []),
    ],
)
def test_a_message_is_found_however_it_is_worded(code: str, found: list[str]) -> None:
    assert sorted(generate.templates(ast.parse(code))) == found


def test_a_message_without_words_is_noticed() -> None:
    with pytest.raises(ValueError, match="line 1: where are the words of BingoError"):
        list(generate.templates(ast.parse("raise BingoError(said)")))


def test_the_words_of_a_message_above_the_list_are_in_the_list() -> None:
    """What the hand-written tables quote is what the program says."""
    by_hand, _, made = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").partition(generate.BEGIN)
    quoted = [line.split("|")[1].strip().strip("`") for line in by_hand.splitlines() if line.startswith("| `")]
    assert len(quoted) >= 20
    for words in quoted:
        assert words in made, words


def test_the_rooms_of_the_page_are_those_that_the_house_has() -> None:
    layers = (ROOT / "tests/test_layers.py").read_text(encoding="utf-8")
    named = [node for node in ast.parse(layers).body if isinstance(node, ast.Assign)]
    value = next(
        node.value for node in named if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ROOMS"
    )
    rooms = [line.split() for line in ast.literal_eval(value) if line != "__main__"]
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    shown = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in page.splitlines() if line.startswith("| `")]
    assert {name for line in shown for name in line} == {name for line in rooms for name in line}
    order = {name: rank for rank, line in enumerate(rooms) for name in line}
    ranks = [max(order[name] for name in line) for line in shown]
    assert ranks == sorted(ranks), "the page's rooms stand in the order of the rule"
