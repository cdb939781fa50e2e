"""The house: rooms, what each may import, and how large anything may grow. The device never sees torch."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bingo_compress"
# A module imports from its own room and from lines above; rooms in one line do not know each other.
ROOMS = (
    "errors",
    "recipe words",
    "runtime",
    "sources",
    "kernels",
    "data models",
    "features",
    "training",
    "unread loggers",
    "presenting",
    "html_report",
    "evaluation",
    "heads",
    "exporters toolchains budget",
    "int8 converting",
    "exporting validation",
    "pipeline embedding options results",
    "dry_run inventory comparison demo run_table",
    "preflight",
    "suggesting",
    "api",
    "cli",
    "__main__",
)
RANK = {name: rank for rank, line in enumerate(ROOMS) for name in line.split()}
WITHOUT_TORCH = (
    "recipe",
    "words",
    "loggers",
    "options",
    "preflight",
    "api",
    "models.names",
    "runtime.machine",
    "runtime.signals",
    "data.listing",
    "sources.opened",
    "suggesting.suggest",
)
FLOORS, MODULES = 13, 8  # import floors with api and __main__, modules in a room
PARAMETERS = 8  # of a function
LINES = 60  # of a function
LONG = {"training.loop.distill"}  # its docstring says why
# What may have more: a Triton kernel takes pointers and sizes one by one.
MANY = {"kernels.views._colours", "kernels.views._blur", "kernels.attention._attend"}


@cache
def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


@cache
def imported(file: Path) -> set[str]:
    found = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def modules() -> dict[str, set[str]]:
    """Every module, and those of ours that it imports, both as below the package."""
    files = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    files = {name: file for name, file in files.items() if not name.endswith("__init__")}
    return {
        name: {other.removeprefix("bingo_compress.") for other in imported(file)} & files.keys()
        for name, file in files.items()
    }


def test_rooms_import_only_from_their_left() -> None:
    for name, others in modules().items():
        room = name.split(".")[0]
        assert room in RANK, f"{name} is in no room"
        for other in others:
            there = other.split(".")[0]
            assert there == room or RANK[there] < RANK[room], f"{name} imports {other}, which stands above or beside it"


def test_there_is_no_circle_and_few_floors() -> None:
    graph = modules()

    @cache
    def floor(name: str, below: tuple[str, ...] = ()) -> int:
        assert name not in below, f"a circle: {' -> '.join((*below, name))}"
        return 1 + max((floor(other, (*below, name)) for other in graph[name]), default=0)

    assert max(map(floor, graph)) <= FLOORS


def test_no_room_is_crowded() -> None:
    assert max(Counter(name.split(".")[0] for name in modules() if "." in name).values()) <= MODULES


def test_no_function_has_many_parameters() -> None:
    found = set()
    for package in (PACKAGE, ROOT / "export"):
        for file in package.rglob("*.py"):
            module = ".".join(file.relative_to(package).with_suffix("").parts)
            for node in nodes(file):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                    taken = node.args
                    count = len(taken.posonlyargs + taken.args + taken.kwonlyargs) + bool(taken.vararg)
                    if count + bool(taken.kwarg) > PARAMETERS:
                        found.add(f"{module}.{getattr(node, 'name', 'lambda')}")
    assert found <= MANY, "give what belongs together a frozen dataclass"


def test_a_function_is_a_screen_long() -> None:
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= LINES:
                found.add(f"{'.'.join(file.relative_to(PACKAGE).with_suffix('').parts)}.{node.name}")
    assert found <= LONG, "a reader is better served by several"


def test_the_device_never_sees_torch() -> None:
    for file in (ROOT / "export").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(file)}
        assert not roots & {"torch", "torchvision", "timm", "bingo_compress"}, file


def test_no_file_is_too_long() -> None:
    for folder in ("bingo_compress", "export", "tests", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file


def test_what_is_refused_at_once_imports_neither_torch_nor_timm() -> None:
    names = ", ".join(f"bingo_compress.{name}" for name in WITHOUT_TORCH)
    code = f"import sys; import {names}; print(sorted({{'torch', 'timm'}} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
