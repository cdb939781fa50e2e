"""Imports run one way, and the device never sees torch."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Lowest first; a module imports only from lower lines.
LAYERS = (
    "errors families memory processor stopping transfer",
    "distributed made_of",
    "recipe run_dir layouts kernels",
    "screen feature_queue losses schedule chart evidence logistic meter",
    "weights",
    "augment images unread encoder checkpoint frugal speed profiling matrices golden latency",
    "decoding intake resolving exported",
    "pixels neighbours",
    "bagging",
    "embed probes exporters.onnx",
    "teacher_pass batches held_out exporters.onnx_int8 trained",
    "distill checking catalogue finetune",
    "material header",
    "pipeline figures arms",
    "proof_table gate quantaware compare_table",
    "model_card",
    "validation exporting estimate compare",
    "demo early",
    "cli",
    "__main__",
)
RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_imports_run_one_way() -> None:
    package = ROOT / "bingo_compress"
    for file in package.rglob("*.py"):
        name = ".".join(file.relative_to(package).with_suffix("").parts)
        if name.endswith("__init__"):
            continue
        used = {target.removeprefix("bingo_compress.") for target in imported(file) if target.startswith("bingo_compress.")}
        for other in used & RANK.keys():
            assert RANK[other] < RANK[name], f"{name} imports {other}, which stands above or beside it"


def test_every_module_has_a_layer() -> None:
    package = ROOT / "bingo_compress"
    names = {".".join(file.relative_to(package).with_suffix("").parts) for file in package.rglob("*.py")}
    assert {name for name in names if not name.endswith("__init__")} == set(RANK)


def test_the_device_never_sees_torch() -> None:
    for file in (ROOT / "export").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(file)}
        assert not roots & {"torch", "torchvision", "timm", "bingo_compress"}, file


def test_no_file_is_too_long() -> None:
    for folder in ("bingo_compress", "export", "tests", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file


def test_help_does_not_import_torch() -> None:
    code = "import sys; sys.argv = ['bingo-compress', '--help']\ntry:\n    from bingo_compress.cli import main; main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("False")
    assert "distill" in shown
