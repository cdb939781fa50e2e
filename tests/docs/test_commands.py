"""Every command in README and docs/ is run here with small models, or read by the program's own parser, or stands in
commands.yaml with the reason why it is not.
"""

import ast
import inspect
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from bingo_edge import cli as edge
from helpers import Ran, flags, photos

import bingo_compress
from bingo_compress import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = yaml.safe_load((Path(__file__).parent / "commands.yaml").read_text(encoding="utf-8"))
PROGRAMS = ("bingo-compress", "bingo-edge", "make", "pip", "python", "python3", "torchrun", "git", "docker")
GROUP = typer.main.get_command(cli.app)
LANGUAGES = ("", "sh", "bash")  # of blocks that have commands


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced and each indented block of a page."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^ {4}.*\n)+", plain, re.MULTILINE):
        yield "", re.sub(r"^ {4}", "", block, flags=re.MULTILINE)


def commands() -> dict[str, str]:
    """Every command, its lines and spaces made one, and the page that has it first."""
    found: dict[str, str] = {}
    for page in PAGES:
        if page.name in TABLE["records"]["pages"]:
            continue
        for language, block in blocks(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("  #")[0].split()
                if language in LANGUAGES and words and words[0] in PROGRAMS:
                    found.setdefault(" ".join(words), page.name)
    return found


def listed() -> list[str]:
    return [*TABLE["run"], *(line for part in ("read", "not run") for lines in TABLE[part].values() for line in lines)]


def test_every_command_is_in_the_table_once_and_nothing_else_is() -> None:
    known = listed()
    assert len(known) == len(set(known))
    new = {f"{page}: {line}" for line, page in commands().items() if line not in known}
    assert not new, "put each into tests/docs/commands.yaml: run, or read, or not run and why"
    assert set(known) <= commands().keys(), "no page has these any more"


def read(line: str) -> None:
    """A command goes through the parser of its program. Raises where it has an option or a name that is none."""
    program, *words = shlex.split(line)
    if program in ("python3", "python", "torchrun", "docker") and "bingo_compress" in words:
        program, words = "bingo-compress", [word for word in words[words.index("bingo_compress") + 1 :] if word != "--"]
    if program == "docker":
        name = "bingo-compress" if "bingo-compress" in words else "bingo-edge"
        program, words = name, words[words.index(name) + 1 :]
    if program == "bingo-compress":
        GROUP.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]
    elif program == "bingo-edge":
        edge.parser().parse_args(words)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for asked in re.findall(r"\[(.*?)\]", line):
            assert set(asked.split(",")) <= set(project["optional-dependencies"])
    elif words[0] == "-c":
        compile(words[1], line, "exec")
    else:
        assert program == "python" and (ROOT / words[0]).is_file()


@pytest.mark.parametrize("line", [*TABLE["run"], *(line for lines in TABLE["read"].values() for line in lines)])
def test_a_command_is_one_that_the_program_knows(line: str) -> None:
    read(line)


@pytest.mark.parametrize("line", ["bingo-compress distill --bag 5", "bingo-compress chek --data x", "make tests"])
def test_a_command_that_the_program_does_not_know_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, KeyError, cli.UsageError)):
        read(line)


def small(line: str, words: list[str]) -> list[str]:
    """The words of a command, with the smallest models where it names some."""
    return [*words, *flags(epochs=1)] if words[0] == "distill" and "--teacher" in line else words


@pytest.mark.slow
def test_the_commands_that_are_run_do_what_the_pages_say(
    tmp_path: Path, bingo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the table's order, in one folder of few drawn pictures: each begins where the one before it ended."""
    photos(tmp_path / "photos", 12)
    photos(tmp_path / "labelled", 4, start=12)
    photos(tmp_path / "labelled-test", 3, start=16)
    rows = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in sorted(tmp_path.glob("labelled/*/*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(["photo,species", *rows]))
    monkeypatch.chdir(tmp_path)
    for line in TABLE["run"]:
        program, *words = shlex.split(line)
        if program == "bingo-compress":
            ran: Ran = bingo(*small(line, words))
            assert ran.status == 0, f"{line}\n{ran.err}"
        elif program == "bingo-edge":
            if not Path("student.onnx").exists():
                for file in (tmp_path / "runs/first/export").iterdir():
                    os.symlink(file, tmp_path / file.name)
                os.symlink(next(tmp_path.glob("photos/kind0/*")), tmp_path / "photo.jpg")
            assert edge.main(words) in (0, None), line
        else:
            assert program == "python" and words[0] == "-c"
            exec(words[1], {})
    assert (tmp_path / "proof.json").is_file() and (tmp_path / "index.npz").is_file()
    assert int(capsys.readouterr().out.split()[-1]) > 0  # the width of the student in timm


def calls() -> Iterator[Any]:
    """(page, name, call or None) of what the pages and the notebook import of the package and call by name."""
    found = [(page.name, *block) for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
    code = [(page, block) for page, language, block in found if language == "python"]
    book = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))
    code += [("tutorial.ipynb", "".join(cell["source"])) for cell in book["cells"] if cell["cell_type"] == "code"]
    for page, block in code:
        if page == "python.md" and "import" not in block:  # a signature
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "bingo_compress":
                yield from ((page, alias.name, None) for alias in node.names)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                yield page, node.func.id, node


def test_the_python_of_the_pages_calls_what_there_is_with_words_that_there_are() -> None:
    found = 0
    for page, name, node in calls():
        if node is None:
            assert name in bingo_compress.__all__, f"{page}: {name}"
        elif name in bingo_compress.__all__:
            signature = inspect.signature(getattr(bingo_compress, name))
            signature.bind(*node.args, **{word.arg: None for word in node.keywords})
            found += 1
    assert found >= 12
