"""What tests/stale_state.py works on: a small world of pictures and weights that is a value, and commands forked from a
process that has imported everything.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import onnx
import onnxruntime.quantization  # noqa: F401 - imported before the fork, as all below
import onnxscript  # noqa: F401
import torch
import torch.onnx._internal.exporter._core
from bingo_edge import cli as edge
from helpers import encoder, flags, photo
from PIL import Image
from safetensors.torch import save

import bingo_compress.training.loop as loop
from bingo_compress import cli
from bingo_compress.evaluation import intervals, probes
from bingo_compress.exporters import timing
from bingo_compress.features import extract
from bingo_compress.recipe import load_recipe
from bingo_compress.runtime import checkpoint, signals

PATIENCE = 90.0  # seconds until a command counts as hung
WRITTEN = 1_700_000_000
CLASSES = 3
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


class Pictures(NamedTuple):
    """A folder: its name, the seed of each file's contents by relative name, and when all were last written
    (seconds).
    """

    name: str
    files: tuple[tuple[str, int], ...]
    written: int = WRITTEN


class World(NamedTuple):
    """All that commands are given: pictures to train on, labelled ones, and the seeds of what is in teacher.safetensors
    and start.safetensors.
    """

    photos: Pictures
    bank: Pictures
    test: Pictures
    teacher: int = 0
    start: int = 0


class Command(NamedTuple):
    """kind: a command of bingo-compress, or index, nearest or classify for the kit's. place: the run's folder;
    settings: of `words`.
    """

    kind: str
    place: str
    settings: tuple[tuple[str, Any], ...]

    def get(self, key: str) -> Any:
        """A setting; "" where it is not given."""
        return dict(self.settings).get(key, "")

    def but(self, **settings: Any) -> "Command":
        """The same with other settings; "" takes one away."""
        changed = {key: value for key, value in (dict(self.settings) | settings).items() if value != ""}
        return self._replace(settings=tuple(sorted(changed.items())))


class Ended(NamedTuple):
    """Exit status (minus the signal's number; None: it hung), what was on screen, and the CPU seconds that it took."""

    status: int | None
    told: str
    seconds: float = 0.0


def first_world() -> World:
    """Bank and test have the same names, sizes and times, and nothing else in common."""

    def folder(name: str, each: int, start: int) -> Pictures:
        return Pictures(
            name,
            tuple(
                (f"kind{kind}/{number:02d}.bmp", start + number) for kind in range(CLASSES) for number in range(each)
            ),
        )

    return World(folder("photos", 8, 0), folder("bank", 6, 100), folder("test", 6, 200))


@cache
def _contents(name: str, seed: int) -> bytes:
    """A BMP file: all have the same size. One in three is of another kind than its folder says, so that no figure is
    perfect.
    """
    kind, file = int(name[4]), io.BytesIO()
    Image.fromarray(photo(kind if seed % 3 else (kind + 1) % CLASSES, 10 * seed + kind, 32, 40)).save(file, "BMP")
    return file.getvalue()


@cache
def _weights(model: str, seed: int) -> bytes:
    return save({name: value.contiguous() for name, value in encoder(model, seed=seed).backbone.state_dict().items()})


def put(world: World, root: Path, *, told_apart: bool = False) -> None:
    """Make `root` hold the world and nothing else; files that are the same are left as they are. told_apart: no two
    contents have the same time of change.
    """
    root.mkdir(parents=True, exist_ok=True)
    wanted = {
        f"{folder.name}/{name}": (_contents(name, seed), folder.written)
        for folder in world[:3]
        for name, seed in folder.files
    }
    wanted["teacher.safetensors"] = _weights("test_resnet", world.teacher), WRITTEN
    wanted["start.safetensors"] = _weights("test_efficientnet", world.start + 10), WRITTEN
    for path in root.rglob("*"):
        if path.is_file() and str(path.relative_to(root)) not in wanted:
            path.unlink()
    for name, (contents, written) in wanted.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != contents:
            path.write_bytes(contents)
        if told_apart:
            written = int.from_bytes(hashlib.sha256(contents).digest()[:3], "little") + WRITTEN
        os.utime(path, (written, written))
    for path in root.iterdir():
        if path.is_dir() and not any(entry.is_file() for entry in path.rglob("*")):
            shutil.rmtree(path)


def changed(random: np.random.Generator, world: World) -> tuple[str, World]:
    """Another world, and in words what is different."""
    if random.random() < 0.25:
        role = str(random.choice(["teacher", "start"], p=[0.7, 0.3]))
        return f"{role} weights replaced under their name", world._replace(**{role: 1 - getattr(world, role)})
    role = str(random.choice(["photos", "bank", "test"], p=[0.6, 0.2, 0.2]))
    folder: Pictures = getattr(world, role)
    files = dict(folder.files)
    extra = f"kind{CLASSES - 1}/extra.bmp"
    picture = str(random.choice([name for name in files if name != extra][:4]))
    kinds: dict[str, Pictures] = {
        f"{role}: {picture} replaced by another of the same size and time": _with(
            folder, files | {picture: files[picture] ^ 512}
        ),
        f"{role}: another folder of as many pictures with equal names, sizes and times": _with(
            folder, {name: seed ^ 1024 for name, seed in files.items()}
        ),
        f"{role}: a picture added or taken away": _with(
            folder,
            {name: seed for name, seed in files.items() if name != extra} | ({} if extra in files else {extra: 7}),
        ),
        f"{role}: one removed or put back": _with(folder, _but_last(files)),
        f"{role}: moved to another name": folder._replace(name=role if folder.name != role else f"moved-{role}"),
        f"{role}: times set back by a day": folder._replace(written=folder.written - 86_400),
    }
    what = str(random.choice(list(kinds), p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.1]))
    return what, world._replace(**{role: kinds[what]})


def _with(folder: Pictures, files: dict[str, int]) -> Pictures:
    return folder._replace(files=tuple(sorted(files.items())))


def _but_last(files: dict[str, int]) -> dict[str, int]:
    """Without kind0/05.bmp, or with it again."""
    name = "kind0/05.bmp"
    return {key: seed for key, seed in files.items() if key != name} | ({} if name in files else {name: 5})


def words(command: Command, root: Path, world: World, there: Path) -> list[str]:
    """The command's words. root: where runs are; there: where the world is."""
    run, photos, bank, test = (
        str(path) for path in (root / command.place, *(there / folder.name for folder in world[:3]))
    )
    kind, get = command.kind, command.get
    if kind in ("distill", "compare"):
        start = str(there / "start.safetensors") if get("start") == "file" else "random"
        chosen = {key: get(key) for key in ("seed", "method", "bags") if get(key) != ""}
        sets = flags(
            data=photos,
            teacher_weights=there / "teacher.safetensors",
            student_weights=start,
            epochs=get("epochs"),
            image_size=get("image_size"),
            hold_out=0.25,
            save_every_steps=1,
            **chosen,
        )
        if kind == "distill":
            return [kind, *sets, "--out", run, *([f"--{get('how')}"] if get("how") else [])]
        judged = [
            "--labels",
            bank,
            *(["--test", test] if get("test") else []),
            "--methods",
            get("methods"),
            "--seeds",
            get("seeds"),
        ]
        return [kind, *sets, *judged, "--out", run, *(["--overwrite"] if get("how") else [])]
    if kind == "export":
        elsewhere = ["--out", f"{run}-files"] if get("elsewhere") else []
        size = ["--image-size", str(get("image_size"))] if get("image_size") else []
        return [kind, "--run", run, "--data", photos, "--format", get("format"), *size, *elsewhere]
    if kind == "validate":
        bank = photos if get("bank") else bank
        return [
            kind,
            "--run",
            run,
            "--data",
            bank,
            *({"test": ["--test", test], "bank": ["--test", bank]}.get(get("test"), [])),
        ]
    file = str((Path(f"{run}-files") if get("elsewhere") else Path(run, "export")) / f"student{get('file')}.onnx")
    index = f"{run}-index.npz"
    rest = {
        "index": ["embed", file, bank, "--out", index],
        "nearest": ["nearest", file, f"{test}/{world.test.files[0][0]}", "--index", index, "--k", "4", "--json"],
        "classify": ["classify", file, test, "--head", f"{run}/export/student.{get('head')}.npz", "--json"],
    }
    return ["bingo-edge", *rest[kind]]


def run(line: list[str], log: Path, kept: Path, killed_at: int = 0) -> Ended:
    """Fork a process that runs a command line. kept: a folder for graphs that torch traced; killed_at: a step before
    which it is killed, as by kill -9.
    """
    log.unlink(missing_ok=True)
    sys.stdout.flush()
    if not (child := os.fork()):
        _command(line, log, kept, killed_at)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return Ended(
                os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), used.ru_utime + used.ru_stime
            )
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Ended(None, log.read_text(errors="replace"))


def _command(line: list[str], log: Path, kept: Path, killed_at: int) -> None:
    """In the child: run the command and leave."""
    status: Any = 70
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
        signals._heard.clear()
        with contextlib.ExitStack() as patched:
            _quicken(patched, kept)
            if killed_at:
                rate = loop.learning_rate

                def stop(step: int, *rest: Any) -> float:
                    if step == killed_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return rate(step, *rest)

                patched.enter_context(mock.patch.object(loop, "learning_rate", stop))
            if line[0] == "bingo-edge":
                status = edge.main(line[1:])
            else:
                sys.argv = ["bingo-compress", *line]
                cli.main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(status))


def _quicken(patched: contextlib.ExitStack, kept: Path) -> None:
    """What has no part in a result is not done: timing files in fresh processes, tracing the same network with other
    weights, fits of a finer grid.

    `export` itself compares each file with torch.
    """
    export = torch.onnx.export

    def once(module: torch.nn.Module, example: Any, path: Path, **settings: Any) -> None:
        weights = module.state_dict()
        fixed = {name: value.tolist() for name, value in module.named_buffers() if name not in weights}
        told = repr((example[0].shape, settings["opset_version"], settings["dynamic_shapes"], module, fixed))
        graph = kept / f"{hashlib.sha256(told.encode()).hexdigest()}.onnx"
        if not graph.exists():
            export(module, example, graph, optimize=False, **settings)  # not optimised, the weights keep their names
        model = onnx.load(graph)
        for held in model.graph.initializer:
            if held.name in weights:
                held.CopyFrom(onnx.numpy_helper.from_array(weights[held.name].numpy(force=True), held.name))
        onnx.save(model, path)

    patched.enter_context(mock.patch.object(torch.onnx, "export", once))
    if hasattr(timing, "_fresh"):
        fresh = {"load_ms": 1.0, "baseline_bytes": 1, "peak_bytes": 2}
        patched.enter_context(mock.patch.object(timing, "_fresh", return_value=fresh))
    # Several parts to a stage, of so few pictures; fewer fits and draws. What is not called so any more stays as it is.
    for owner, name, value in (
        (extract, "BATCH", 8),
        (extract, "PART", 1),
        (probes, "L2_STRENGTHS", (0.1, 1.0)),
        (intervals, "DRAWS", 100),
    ):
        if hasattr(owner, name):
            patched.enter_context(mock.patch.object(owner, name, value))


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
