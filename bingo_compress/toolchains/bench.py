"""An exported file in every toolchain that is at hand: its golden pictures in, what comes out against golden.json."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bingo_edge.golden import tolerance
from bingo_edge.model import network_input
from numpy.typing import NDArray

from bingo_compress.errors import BingoError, nearest
from bingo_compress.models import exported
from bingo_compress.presenting import model_card
from bingo_compress.presenting.toolchain_table import HEADER, cells
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import RunDir, made_by, read_json, refuse_no_file, write_text
from bingo_compress.toolchains import child

WRONG = 3
HALF = 0.999  # smallest cosine of what is computed in half precision
# The largest error that passes, of the spread of the golden pictures' outputs: a network may answer nearly the same to
# all, and then a cosine says nothing.
OF_SPREAD, OF_SPREAD_INT8 = 0.1, 1.0
PROBE = 60.0  # seconds for a Python to say what it has
APART = {"tflite": "onnx2tf", "rknn": "rknn-toolkit2"}  # of these no version can be installed beside us

Outputs = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Place:
    """A toolchain in a Python. asked: the user named it, so that it has to be there."""

    toolchain: str
    python: str
    asked: bool


@dataclass(frozen=True)
class Graph:
    """Of a file: its input, its outputs in their order, and how many pictures it takes at once."""

    input: str
    outputs: list[str]
    batch: int


@dataclass(frozen=True)
class Golden:
    """n pictures as uint8 (n, S, S, 3), and what the file answered to them: (n, D) by the names of its outputs."""

    pixels: NDArray[np.uint8]
    outputs: Outputs


def verify(
    file: Path, names: str, pythons: Sequence[str], seconds: float, json_file: Path | None = None
) -> list[dict[str, Any]]:
    """Run the golden pictures of an exported file in toolchains, one after another, each in a process of its own; print
    a table. Returns its rows: toolchain, version, verdict (right, wrong, cannot run it, crashed, too slow, not
    installed), cause, and, where something came out, what `judged` tells.

    names: toolchains with commas between, "" for all that are installed. pythons: NAME=PYTHON, where a toolchain is
    installed elsewhere. seconds: that one may take. All rows go to `json_file`; those that ran are kept beside the file
    and told in its card. Raises BingoError: exit status 3 where an answer is wrong, or where a toolchain that was named
    gives none.
    """
    refuse_no_file(json_file, "--json")
    if not seconds > 0:
        raise BingoError(f"--seconds: expected more than 0, found {seconds:g}; give a larger number")
    places = _places(names, pythons)
    contract = exported.contract(file)
    golden = _golden(file, contract)
    versions = [_version(place) for place in places]
    rows = []
    for place, version in zip(places, versions, strict=True):
        if version:
            console.say(f"{place.toolchain} {version} ...")
        row = {"toolchain": place.toolchain, "version": version or "", "verdict": "not installed", "cause": ""}
        found = _tried(place, file, contract, golden, seconds) if version else {"cause": way(place.toolchain)}
        rows.append(row | found)
    console.table(f"{file}: {len(golden.pixels)} golden pictures", HEADER, cells(rows))
    _keep(file, contract["sha256"], [row for row in rows if row["version"]])
    if json_file:
        held = {"file": file.name, "sha256": contract["sha256"], "pictures": len(golden.pixels), "rows": rows}
        write_text(json_file, json.dumps(held, indent=2) + "\n")
    _refuse(file, rows, places)
    return rows


def _places(names: str, pythons: Sequence[str]) -> list[Place]:
    """What is to be tried. Raises BingoError for words that say nothing."""
    elsewhere: dict[str, list[str]] = {}
    for each in pythons:
        name, _, python = each.partition("=")
        if not python or not os.access(python, os.X_OK):
            raise BingoError(
                f"--python: expected TOOLCHAIN=PYTHON, for example rknn=/opt/rknn/bin/python, found {each!r}; name a"
                " Python that is there"
            )
        elsewhere.setdefault(name, []).append(python)
    named = list(filter(None, names.split(",")))
    for option, words in (("--with", named), ("--python", list(elsewhere))):
        for word in words:
            if word not in child.TOOLCHAINS:
                raise BingoError(
                    f"{option}: expected {', '.join(child.TOOLCHAINS)}, found {word!r}; did you mean"
                    f" {nearest(word, child.TOOLCHAINS, 1)[0]}?"
                )
    return [
        Place(name, python, bool(named) or name in elsewhere)
        for name in (dict.fromkeys(named) or child.TOOLCHAINS)
        for python in elsewhere.get(name, [sys.executable])
    ]


def _golden(file: Path, contract: dict[str, Any]) -> Golden:
    """The golden pictures beside a file. Raises BingoError where they are not whole, or another file's."""
    path = file.with_suffix(exported.GOLDEN) / "golden.json"
    if not path.is_file():
        raise BingoError(f"FILE: expected its golden pictures at {path}, found none; export again, or copy them along")
    held, size = read_json("export", path), int(contract["input"]["size"])
    with made_by("export", path):
        if held["sha256"] != contract["sha256"]:
            raise ValueError(f"golden pictures of another file than {file.name}")
        raws = [_intact(path.parent, entry) for entry in held["images"]]
        pixels = np.stack([np.frombuffer(raw, np.uint8).reshape(size, size, 3) for raw in raws])
        outputs = {
            name: np.array([entry[name] for entry in held["images"]], np.float64)
            for name in _graph(file).outputs
            if all(name in entry for entry in held["images"])
        }
        if not outputs or not all(values.ndim == 2 and np.isfinite(values).all() for values in outputs.values()):
            raise ValueError("no finite output of each picture")
    return Golden(pixels, outputs)


def _intact(folder: Path, entry: dict[str, Any]) -> bytes:
    """The network's input of a golden picture; its name may not lead out of the folder."""
    if not re.fullmatch(r"\w[\w.-]*", entry["rgb"]):
        raise ValueError(f"the file name {entry['rgb']!r}")
    path = folder / entry["rgb"]
    raw = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(raw).hexdigest() != entry["rgb_sha256"]:
        raise ValueError(f"{path.name} is missing or damaged")
    return raw


def _graph(file: Path) -> Graph:
    graph = onnx.load(file, load_external_data=False).graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_value  # 0: any
    return Graph(graph.input[0].name, [output.name for output in graph.output], batch or 1)


def _command(place: Place, *words: str) -> list[str]:
    # Another Python has its own packages: ours must not come before them.
    alone = [] if place.python == sys.executable else ["-E"]
    return [place.python, *alone, child.__file__, place.toolchain, *words]


def _version(place: Place) -> str | None:
    """The version of a toolchain, None where it is not installed. Raises BingoError where it was asked for."""
    try:
        done = subprocess.run(_command(place), capture_output=True, text=True, check=True, timeout=PROBE)
        found: dict[str, str] = json.loads(done.stdout)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        raise BingoError(
            f"--python: expected a Python 3.8 or newer at {place.python}, found something else"
            f" ({type(error).__name__}); name another"
        ) from None
    if "absent" in found and place.asked:
        raise BingoError(
            f"{place.toolchain}: expected it in {place.python}, found no module {found['absent']};"
            f" {way(place.toolchain)}"
        )
    return found.get("version")


def way(name: str) -> str:
    """How a toolchain is had."""
    if package := APART.get(name):
        return f"pip install {package} in an environment of its own, then --python {name}=THERE/bin/python"
    return f"pip install 'bingo-compress[{name}]'"


def _tried(place: Place, file: Path, contract: dict[str, Any], golden: Golden, seconds: float) -> dict[str, Any]:
    """What came of a toolchain that is installed: verdict, cause and figures."""
    graph, given = _graph(file), network_input(contract, golden.pixels)
    count, runs = len(given), -(-len(given) // graph.batch)
    filled = given[np.arange(runs * graph.batch) % count]
    with tempfile.TemporaryDirectory(prefix="bingo-verify-") as name:
        folder = Path(name)
        (folder / "work").mkdir()
        np.save(folder / "batches.npy", filled.reshape(runs, graph.batch, *given.shape[1:]))
        job = {"file": str(file.resolve()), "input": graph.input, "outputs": graph.outputs}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        try:
            status = _ran(place, folder, seconds)
        except subprocess.TimeoutExpired:
            return {"verdict": "too slow", "cause": f"no answer in {seconds:g} s"}
        if (folder / "error.txt").is_file():
            why = (folder / "error.txt").read_text(encoding="utf-8")
            return {"verdict": "cannot run it", "cause": _line(f"{why} {_last(folder / 'said.txt')}")}
        if status or not (folder / "outputs.npz").is_file():
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            return {"verdict": "crashed", "cause": _line(f"{how} {_last(folder / 'said.txt')}")}
        with np.load(folder / "outputs.npz", allow_pickle=False) as held:
            found = {key: held[key].reshape(len(filled), -1)[:count].astype(np.float64) for key in golden.outputs}
    least = tolerance(contract)[0]
    if child.TOOLCHAINS[place.toolchain].half:
        least = min(least, HALF)
    told = judged(golden.outputs, found, least)
    return told | {"cause": told.get("cause", "") or _hint(place, contract, told["verdict"])}


def _hint(place: Place, contract: dict[str, Any], verdict: str) -> str:
    """What is known of a wrong answer."""
    if verdict == "wrong" and place.toolchain == "opencv" and contract.get("precision") == "int8":
        return "OpenCV 5's new engine has int8 wrong: read the file with cv2.dnn.ENGINE_CLASSIC"
    return ""


def _ran(place: Place, folder: Path, seconds: float) -> int:
    """The exit status of the job in `folder`; nothing that it started is left."""
    with open(folder / "said.txt", "wb") as said:
        process = subprocess.Popen(
            _command(place, str(folder)),
            cwd=folder / "work",
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last(path: Path) -> str:
    """The last line that a process has said, without the colours of a terminal."""
    said = re.sub(r"\x1b\[[\d;]*m", "", path.read_text(encoding="utf-8", errors="replace"))
    lines = said.strip().splitlines()
    return f"({lines[-1]})" if lines else ""


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def judged(expected: Outputs, found: Outputs, least: float) -> dict[str, Any]:
    """Verdict and figures of outputs (n, D) against those that are expected: min_cosine, max_difference (of an output's
    largest value) and max_of_spread (the largest error, of the distance of the pictures from their mean) over pictures
    and outputs.

    least: the smallest cosine; as far apart as two vectors of length one at that cosine, relative to the length that is
    expected, may any two vectors be. It is below HALF for int8 alone.
    """
    if any(found[name].shape != values.shape for name, values in expected.items()):
        shapes = ", ".join(f"{name} {list(found[name].shape[1:])}" for name in expected)
        return {"verdict": "wrong", "cause": f"outputs of another shape: {shapes}"}
    if not all(np.isfinite(found[name]).all() for name in expected):
        return {"verdict": "wrong", "cause": "values that are not finite"}
    cosines, differences, errors, of_spread = [], [], [], []
    for name, values in expected.items():
        length = np.maximum(np.linalg.norm(values, axis=1), 1e-12)
        away = found[name] - values
        cosines += list((found[name] * values).sum(1) / length / np.maximum(np.linalg.norm(found[name], axis=1), 1e-12))
        differences.append(np.abs(away).max() / max(np.abs(values).max(), 1e-12))
        lost = np.linalg.norm(away, axis=1)
        errors += list(lost / length)
        spread = np.linalg.norm(values - values.mean(0), axis=1).mean()
        of_spread.append(lost.max() / max(spread, 1e-12))
    near = max(errors) <= (2 * (1 - least)) ** 0.5
    right = near and max(of_spread) <= (OF_SPREAD if least >= HALF else OF_SPREAD_INT8)
    return {
        "verdict": "right" if right else "wrong",
        "min_cosine": float(min(cosines)),
        "max_difference": float(max(differences)),
        "max_of_spread": float(max(of_spread)),
    }


def _keep(file: Path, sha256: str, rows: list[dict[str, Any]]) -> None:
    """Put what ran beside the file, in place of what the same toolchains said before; and renew its card."""
    path = file.with_suffix(exported.TOOLCHAINS)
    before = read_json("verify", path)
    with made_by("verify", path):
        old = before["rows"] if before.get("sha256") == sha256 else []
        again = {(row["toolchain"], row["version"]) for row in rows}
        all_rows = [row for row in old if (row["toolchain"], row["version"]) not in again] + rows
        ran = {row["toolchain"] for row in all_rows}
    held = {"sha256": sha256, "rows": all_rows, "not_run": [name for name in child.TOOLCHAINS if name not in ran]}
    write_text(path, json.dumps(held, indent=2) + "\n")
    run = RunDir(file.resolve().parent.parent)
    if run.export == file.resolve().parent and run.as_run.is_file() and (run.export / exported.CARD).is_file():
        model_card.renew(run, run.export)


def _refuse(file: Path, rows: list[dict[str, Any]], places: list[Place]) -> None:
    """Raise BingoError (exit status 3) for a wrong answer, or none where one was asked for."""
    bad = [
        f"{row['toolchain']} {row['version']}: {row['verdict']}"
        for row, place in zip(rows, places, strict=True)
        if row["verdict"] == "wrong" or (place.asked and row["verdict"] != "right")
    ]
    if bad:
        raise BingoError(
            f"{file}: expected the answers of its golden pictures, found {'; '.join(bad)}; do not use the file there,"
            " try --profile edge or another student",
            WRONG,
        )
