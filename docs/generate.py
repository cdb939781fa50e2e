"""The pages that are made of the source: what stands between the two marks of each. `python docs/generate.py` writes
them; tests/docs/ compares them.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from bingo_edge import cli as edge

import bingo_compress
from bingo_compress import cli, options, results
from bingo_compress.recipe import Recipe

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BEGIN, END = "<!-- made by docs/generate.py from here -->", "<!-- to here -->"
WIDTH = 100  # of a --help
FAILURES = {"BingoError", "EdgeError"}
GAP = "…"  # what a message says of the case at hand


def command_line() -> str:
    """Every --help, of both programs."""
    group = typer.main.get_command(cli.app)
    parts = ["## bingo-compress\n", _fenced(_help(group, "bingo-compress"))]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        parts += [f"## bingo-compress {name}\n", _fenced(_help(command, f"bingo-compress {name}"))]
    top = edge.parser()
    parts += ["## bingo-edge\n", _fenced(_argparse(top))]
    for name, parser in subparsers(top).items():
        parts += [f"## bingo-edge {name}\n", _fenced(_argparse(parser))]
    return "\n".join(parts)


def _help(command: Any, name: str) -> str:
    context = command.context_class(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    shown: str = command.get_help(context)
    return shown


def _argparse(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=WIDTH)  # type: ignore[assignment]
    return parser.format_help()


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a program of argparse's."""
    found = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(next(found).choices)


def settings() -> str:
    """A line for each field of Recipe."""
    flags = {field.name for field in dataclasses.fields(options.Distill)}
    lines = ["| setting | takes | default | what it is |", "|---|---|---|---|"]
    for name, field in Recipe.model_fields.items():
        shown = f"`{name}`" + (f"<br>`--{name.replace('_', '-')}`" if name in flags else "")
        lines.append(_row(shown, _taken(field), f"`{_value(field.default)}`", field.description or ""))
    return "\n".join(lines) + "\n"


def _taken(field: Any) -> str:
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(field.annotation))
    kind = {bool: "true or false", int: "whole number", float: "number"}.get(field.annotation, "text")
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    limits = [f"{sign} {getattr(rule, key):g}" for rule in field.metadata for key, sign in signs if hasattr(rule, key)]
    return " ".join([kind, ", ".join(limits)]).strip()


def _value(default: object) -> str:
    return '""' if default == "" else str(default).lower() if isinstance(default, bool) else str(default)


def python() -> str:
    """Signature and docstring of every public name; the words of each function and the fields of each result."""
    parts = []
    for name in bingo_compress.__all__:
        thing = getattr(bingo_compress, name)
        parts += [f"## {name}\n", _fenced(_signature(name, thing), "python"), _prose(inspect.getdoc(thing) or "")]
        words = getattr(options, name.capitalize(), None)
        if words is not None:
            parts.append(_words(words))
    parts.append("## What comes back\n")
    for name, thing in vars(results).items():
        if isinstance(thing, type) and thing.__module__ == results.__name__:
            parts += [f"### {name}\n", _prose(inspect.getdoc(thing) or ""), _fields(thing)]
    return "\n".join(parts)


def _signature(name: str, thing: Any) -> str:
    if name in ("BingoError", "Recipe"):
        return {"BingoError": "BingoError(message: str, exit_status: int = 2)", "Recipe": "Recipe(**settings)"}[name]
    if hasattr(options, name.capitalize()):
        asked = inspect.signature(thing).parameters.values()
        needed = [f"{each.name}=..." for each in asked if each.default is inspect.Parameter.empty]
        return f"{name}({', '.join([*needed, '**words'])})"
    return f"{name}{inspect.signature(thing)}".replace("'", "").replace("bingo_compress.models.encoder.", "")


def _words(words: type) -> str:
    lines = ["| word | default | what it is |", "|---|---|---|"]
    for field in dataclasses.fields(words):
        word = cli._word(field)
        default = "needed" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        lines.append(_row(f"`{field.name}`", default, word.help if word else ONLY_PYTHON[field.name]))
    return "\n".join(lines) + "\n"


# Words that the command line does not have.
ONLY_PYTHON = {
    "progress": "false: no tables, lines and bars on the screen",
    "teacher": "an `Encoder`: the teacher of a run that was distilled with your own",
    "student": "an `Encoder`: the student of a run that was distilled into your own",
}


def _fields(thing: Any) -> str:
    kinds = typing.get_type_hints(thing)
    lines = ["| field | type |", "|---|---|"]
    lines += [_row(f"`{name}`", f"`{_type(kind)}`") for name, kind in kinds.items()]
    return "\n".join(lines) + "\n"


def _type(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    for module in ("collections.abc.", "typing.", "pathlib.", "bingo_compress.results."):
        text = text.replace(module, "")
    return text


def messages() -> str:
    """Every message of a BingoError or EdgeError, by room; what it says of the case at hand is an ellipsis."""
    rooms: dict[str, set[str]] = {}
    for package in (ROOT / "bingo_compress", ROOT / "export" / "bingo_edge"):
        for file in sorted(package.rglob("*.py")):
            parts = file.relative_to(package).with_suffix("").parts
            room = parts[0] if package.name == "bingo_compress" else "bingo-edge"
            rooms.setdefault(room, set()).update(templates(ast.parse(file.read_text(encoding="utf-8"))))
    lines = []
    for room, found in sorted(rooms.items()):
        if found:
            lines += [f"### {room}\n", *(f"- `{text}`" for text in sorted(found)), ""]
    return "\n".join(lines)


def templates(tree: ast.Module) -> Iterator[str]:
    """The messages of the errors that a module makes; none where it passes another error's on. Raises ValueError for a
    message whose words cannot be found.
    """
    module = _Module(tree)
    for call in module.calls:
        if call.func.id not in FAILURES:  # type: ignore[attr-defined]
            continue
        texts = [module.text(part) for part in call.args]
        if len(texts) == 3 and call.func.id == "EdgeError":  # type: ignore[attr-defined]
            found = [f"expected {texts[0]}, found {texts[1]}; {texts[2]}"]
        else:
            found = [texts[0]] if texts[0] != GAP else list(module.worded(call.args[0]))
        if not found and ast.unparse(call.args[0]) != "str(error)":
            raise ValueError(f"line {call.lineno}: where are the words of {ast.unparse(call)}?")
        yield from (_tidy(text) for text in found if re.search(r"(?<!-)\b[a-z]{4}", text))


class _Module:
    """What a module says: its functions, its calls, and its constants that are texts."""

    def __init__(self, tree: ast.Module) -> None:
        nodes = list(ast.walk(tree))
        self.functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        self.calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        self.constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        }

    def text(self, node: ast.expr) -> str:
        """An expression as text, with a gap for each part that a run decides."""
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(self.text, node.values))
        if isinstance(node, ast.FormattedValue):
            return self.text(node.value) if isinstance(node.value, ast.Name) else GAP
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.text(node.left) + self.text(node.right)
        return self.constants.get(node.id, GAP) if isinstance(node, ast.Name) else GAP

    def worded(self, said: ast.expr) -> Iterator[str]:
        """The texts of a message that a function of the module words, or that is given to one."""
        if isinstance(said, ast.Call) and isinstance(said.func, ast.Name) and said.func.id in self.functions:
            for part in ast.walk(self.functions[said.func.id]):
                if isinstance(part, ast.Return) and part.value:
                    yield self.text(part.value)
        if isinstance(said, ast.Name):
            for name, function in self.functions.items():
                taken = [each.arg for each in function.args.args]
                if said in ast.walk(function) and said.id in taken:
                    for call in self.calls:
                        if call.func.id == name:  # type: ignore[attr-defined]
                            given = dict(zip(taken, call.args, strict=False))
                            given |= {word.arg: word.value for word in call.keywords if word.arg}
                            yield self.text(given[said.id])


def _tidy(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def _prose(text: str) -> str:
    return text.replace("<", "&lt;") + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


PAGES: dict[str, Callable[[], str]] = {
    "command_line.md": command_line,
    "settings.md": settings,
    "python.md": python,
    "troubleshooting.md": messages,
}


def page(name: str) -> str:
    """The whole page as it should be: its own words, and what is made."""
    head, _, rest = (DOCS / name).read_text(encoding="utf-8").partition(BEGIN)
    return f"{head}{BEGIN}\n\n{PAGES[name]()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(page(name), encoding="utf-8")
