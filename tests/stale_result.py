"""What a command of tests/stale_state.py made, as a value, and where two of them differ."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stale_commands import Command
from stale_run import Ended
from stale_world import World

from bingo_compress.recipe import load_recipe
from bingo_compress.runtime import checkpoint

# Of no meaning for a result: where and when it was made, and by what.
NOT_COMPARED = (
    "second",
    "time",
    "date",
    "version",
    "run_id",
    "sha256",
    "digest",
    "made_of",
    "key",
    "bytes",
    "memory",
    "machine",
    "finished",
    "path",
)


def result(
    command: Command, ended: Ended, root: Path, world: World, there: Path, again: Callable[[list[str]], Ended]
) -> dict[str, Any]:
    """What a command made, without times, paths and versions: figures by name, and digests of what must be equal bit
    for bit. again: forks a command.
    """
    run, kind = root / command.place, command.kind
    if kind == "distill":
        recipe = load_recipe(run / "recipe.yaml", [], {}).model_dump()
        return {
            "weights": _tensors(run / "student.safetensors"),
            "start": _tensors(run / "work" / "start.safetensors"),
            "summary": _figures(json.loads((run / "summary.json").read_text())),
            "recipe": {key: value for key, value in recipe.items() if key != "data" and "weights" not in key},
            "quarantine": (run / "quarantine.csv").read_text(),
        }
    if kind == "compare":
        table = json.loads((run / "table.json").read_text())
        named = {f"{part['arm']} {part['seed']}": part for part in table["runs"]}
        told = {file: checkpoint.load(file)[1] for file in (run / "runs").glob("*.student.safetensors")}
        used = {
            name: _tensors(file) for file, facts in told.items() if (name := f"{facts['arm']} {facts['seed']}") in named
        }
        return {
            "rows": _figures(table["rows"]),
            "runs": _figures(named),
            "references": _figures(table["references"]),
            "weights": used,
        }
    if kind == "validate":
        proof = json.loads((run / "validation.json").read_text())
        found: dict[str, Any] = {"figures": _figures(proof | {"rows": {row["name"]: row for row in proof["rows"]}})}
        found["named but not there"] = _lacking(run / "export")
        for model in sorted((run / "export").glob("*.onnx")):  # heads of a file that was deleted serve no other
            for file in sorted(model.parent.glob(f"{model.stem}.*.npz")):
                with np.load(file) as held:
                    found[file.name] = {
                        key: held[key].tolist() for key in held.files if not any(word in key for word in NOT_COMPARED)
                    }
        return found
    if kind == "export":
        folder = Path(f"{run}-files") if command.get("elsewhere") else run / "export"
        found = {}
        for file in [
            f"student{end}"
            for end in {"onnx": [""], "onnx-int8": ["-int8"], "all": ["", "-int8"]}[command.get("format")]
        ]:
            contract = json.loads((folder / f"{file}.json").read_text())
            embedded = again(
                ["bingo-edge", "embed", str(folder / f"{file}.onnx"), str(there / world.test.name), "--json"]
            )
            checked = again(["bingo-edge", "selftest", str(folder / f"{file}.onnx")])
            found[file] = {
                "contract": _figures({key: value for key, value in contract.items() if key != "onnx"}),
                "embeddings": json.loads(embedded.told)["embeddings"] if embedded.status == 0 else embedded.told,
                "selftest": checked.status,
            }
        return found | {"named but not there": _lacking(folder)}
    if kind == "index":
        with np.load(f"{run}-index.npz") as held:
            return {
                "embeddings": held["embeddings"].tolist(),
                "paths": [_tail(path) for path in held["paths"].tolist()],
            }
    told = json.loads(ended.told)
    return {"answer": _figures(told), "paths": [_tail(path) for path in _paths(told)]}


def _lacking(folder: Path) -> list[str]:
    """Files that a model card names and that are not beside it; an index is the user's own."""
    card = folder / "MODEL_CARD.md"
    named = set(re.findall(r"[\w.-]+\.(?:onnx|npz)\b", card.read_text())) if card.exists() else set()
    return sorted(name for name in named if not (folder / name).exists() and name != "index.npz")


def _tail(path: str) -> str:
    return "/".join(path.split("/")[-2:])


def _paths(held: Any) -> Iterator[str]:
    if isinstance(held, dict):
        for key, value in held.items():
            if key == "path":
                yield value
            else:
                yield from _paths(value)
    elif isinstance(held, list):
        for value in held:
            yield from _paths(value)


def _figures(held: Any) -> Any:
    """What of a JSON document is compared: words that are paths or keys, and times, are left out."""
    if isinstance(held, dict):
        return {
            key: _figures(value)
            for key, value in held.items()
            if not any(word in key for word in NOT_COMPARED) and key != "protocol"
        }
    if isinstance(held, list):
        return [_figures(value) for value in held]
    return None if isinstance(held, str) and "/" in held else held


def _tensors(file: Path) -> str:
    """A digest of names and contents; "" where there is no file."""
    if not file.exists():
        return ""
    tensors, _ = checkpoint.load(file)
    return hashlib.sha256(
        b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
    ).hexdigest()[:16]


def differing(live: Any, clean: Any, path: str = "", tolerance: float = 0.0) -> Iterator[str]:
    """The places at which two results differ, each with what is there."""
    if isinstance(live, dict) and isinstance(clean, dict):
        for key in sorted(live.keys() | clean.keys()):
            yield from differing(live.get(key), clean.get(key), f"{path}/{key}", tolerance)
    elif isinstance(live, list) and isinstance(clean, list) and len(live) == len(clean):
        for number, pair in enumerate(zip(live, clean, strict=True)):
            yield from differing(*pair, f"{path}/{number}", tolerance)
    elif isinstance(live, float) and isinstance(clean, float):
        if not (live == clean or abs(live - clean) <= tolerance):
            yield f"{path}: {live:.6g} instead of {clean:.6g}"
    elif live != clean:
        yield f"{path}: {str(live)[:60]} instead of {str(clean)[:60]}"
