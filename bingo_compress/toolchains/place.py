"""A toolchain in a Python, and what it answers: in a process of its own with a time limit, as it may crash or hang, or
need another Python.
"""

import contextlib
import json
import os
import re
import shutil
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
from numpy.typing import NDArray

from bingo_compress.errors import BingoError, nearest
from bingo_compress.toolchains import child

PROBE = 60.0  # seconds for a Python to say what it has
APART = {"tflite": "onnx2tf tensorflow", "rknn": "rknn-toolkit2"}  # of these no version can be installed beside us

Outputs = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Place:
    """A toolchain in a Python. asked: the user named it, so that it has to be there."""

    toolchain: str
    python: str
    asked: bool


class NoAnswer(Exception):
    """Nothing came out. verdict: cannot run it, crashed or too slow; cause: a line."""

    def __init__(self, verdict: str, cause: str) -> None:
        super().__init__(f"{verdict}: {cause}")
        self.verdict, self.cause = verdict, cause


def places(names: str, pythons: Sequence[str], option: str = "--with") -> list[Place]:
    """What is to be tried. names: with commas between, "" for all; pythons: NAME=PYTHON; option: where the names were
    given. Raises BingoError for words that say nothing.
    """
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
    for where, words in ((option, named), ("--python", list(elsewhere))):
        for word in words:
            if word not in child.TOOLCHAINS:
                raise BingoError(
                    f"{where}: expected {', '.join(child.TOOLCHAINS)}, found {word!r}; did you mean"
                    f" {nearest(word, child.TOOLCHAINS, 1)[0]}?"
                )
    return [
        Place(name, python, bool(named) or name in elsewhere)
        for name in (dict.fromkeys(named) or child.TOOLCHAINS)
        for python in elsewhere.get(name, [sys.executable])
    ]


def version(place: Place) -> str | None:
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


def answers(
    place: Place, file: Path, given: NDArray[Any], seconds: float, keep: Path | None = None
) -> tuple[Outputs, dict[str, Any]]:
    """(the outputs of an ONNX file by name, each (n, D) as float64; what a converter says of its file).

    given: (n, ...), pictures as the file takes them; a fixed batch is filled up and cut again. keep: a folder for the
    file that the toolchain makes of it, which then is what answers. Raises NoAnswer.
    """
    graph = onnx.load(file, load_external_data=False).graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1  # 0: any
    runs = -(-len(given) // batch)
    filled = given[np.arange(runs * batch) % len(given)]
    with tempfile.TemporaryDirectory(prefix="bingo-verify-") as name:
        folder = Path(name)
        (folder / "work").mkdir()
        # A copy: onnx2tf writes its simplified graph over the file that it is given.
        copy = shutil.copy(file, folder / file.name)
        np.save(folder / "batches.npy", filled.reshape(runs, batch, *given.shape[1:]))
        outputs = [output.name for output in graph.output]
        job = {"file": str(copy), "input": graph.input[0].name, "outputs": outputs, "keep": bool(keep)}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        try:
            status = _ran(place, folder, seconds)
        except subprocess.TimeoutExpired:
            raise NoAnswer("too slow", f"no answer in {seconds:g} s") from None
        if (folder / "error.txt").is_file():
            why = (folder / "error.txt").read_text(encoding="utf-8")
            raise NoAnswer("cannot run it", _line(f"{why} {_last(folder / 'said.txt')}"))
        if status or not (folder / "outputs.npz").is_file():
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise NoAnswer("crashed", _line(f"{how} {_last(folder / 'said.txt')}"))
        with np.load(folder / "outputs.npz", allow_pickle=False) as held:
            found = {key: held[key].reshape(len(filled), -1)[: len(given)].astype(np.float64) for key in outputs}
        told = folder / "work" / child.TOLD
        if keep:
            for path in (folder / "work" / child.CONVERTED).iterdir():
                shutil.move(path, keep / path.name)
        return found, json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}


def _command(place: Place, *words: str) -> list[str]:
    # Another Python has its own packages: ours must not come before them.
    alone = [] if place.python == sys.executable else ["-E"]
    return [place.python, *alone, child.__file__, place.toolchain, *words]


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
