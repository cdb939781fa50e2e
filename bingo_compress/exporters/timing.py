"""How long ONNX files take on this machine: all of them in turn, run by run, so that whatever disturbs one disturbs
all.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from bingo_compress.errors import BingoError, first_line
from bingo_compress.presenting.timing_table import HEADER, PARTS, caption, cells, describe, said
from bingo_compress.runtime import console
from bingo_compress.runtime.machine import processor
from bingo_compress.runtime.made_of import file_digest
from bingo_compress.runtime.run_dir import refuse_no_file, write_text

LOADS = 3
PROBE_RUNS = 10
KINDS: dict[str, type[np.generic]] = {
    "tensor(uint8)": np.uint8,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
}
# onnxruntime's defaults, but for one: a file's idle threads would spin on after its run (for 41 ms of CPU here) and
# take the next file's cores.
SESSION = {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "1"}

# For a fresh interpreter with onnxruntime and numpy alone, as on a device. Linux: ru_maxrss would count the parent's
# memory before exec.
PROBE = """
import json, sys, time
import numpy, onnxruntime

def peak():
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

path, name, shape, dtype, runs = json.loads(sys.argv[1])
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
start = time.perf_counter()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
load_ms = (time.perf_counter() - start) * 1e3
for _ in range(runs):
    session.run(None, {name: numpy.zeros(shape, dtype)})
print(json.dumps({"load_ms": load_ms, "baseline_bytes": before, "peak_bytes": peak()}))
"""


@dataclass(frozen=True)
class Model:
    """A file to be timed: its name on screen, bytes on disk, their digest, and pictures (its batch, ...) under the name
    of the graph's input.
    """

    path: Path
    label: str
    bytes: int
    sha256: str
    input: str
    pictures: NDArray[Any]


def latency(
    models: Sequence[Path],
    threads: Sequence[int] | None = None,
    runs: int = 500,
    warm_up: int = 50,
    json_file: Path | None = None,
) -> list[dict[str, Any]]:
    """Time files that take pictures, whoever made them, in onnxruntime on the CPU; print a table and what each is of
    the first.

    threads: counts for the inside of an operator, default 1 and all cores. runs, warm_up: of each file with each count,
    on one picture or a fixed batch. With json_file writes {"protocol": ..., "rows": ...}. Returns the rows, the files
    in order for each count of threads: file, sha256, bytes, input, batch, threads, runs, p50_ms, p90_ms, p99_ms;
    p50_ratio and bytes_ratio to the first file, p50_ratio_range: least and most over PARTS parts of the runs; load_ms,
    peak_bytes and baseline_bytes (before the file is loaded) of a fresh process; machine. Raises BingoError before
    anything is timed.
    """
    machine = _machine()
    counts = list(dict.fromkeys(threads or [1, machine["cores"]]))
    _refuse(models, counts, runs, warm_up, json_file)
    names = [path.name for path in models]
    files = [_opened(path, path.name if names.count(path.name) == 1 else str(path)) for path in models]
    for model in files:
        if len(model.pictures) != len(files[0].pictures):
            raise BingoError(
                f"MODEL: expected files of one batch, found {len(files[0].pictures)} in {files[0].label} and"
                f" {len(model.pictures)} in {model.label}; time them one at a time"
            )
    console.say(f"loading every file in {LOADS} fresh processes ...")
    fresh = [_fresh(model) for model in files]
    rows: list[dict[str, Any]] = []
    with console.bar("time", len(counts) * len(files) * (warm_up + runs)) as advance:
        for count in counts:
            sessions = [_session(model.path, count) for model in files]
            runners = [
                partial(session.run, None, {model.input: model.pictures})
                for session, model in zip(sessions, files, strict=True)
            ]
            times = interleaved(runners, runs, warm_up, advance)
            for index, model in enumerate(files):
                of_file = {
                    "file": model.label,
                    "sha256": model.sha256,
                    "bytes": model.bytes,
                    "bytes_ratio": model.bytes / files[0].bytes,
                }
                of_file |= {
                    "input": f"{model.input}: {model.pictures.dtype} {list(model.pictures.shape)}",
                    "batch": len(model.pictures),
                }
                of_runs = {"threads": count, "runs": runs} | figures(times[index], times[0])
                rows.append(of_file | of_runs | fresh[index] | {"machine": machine})
    if json_file:
        write_text(json_file, json.dumps({"protocol": _protocol(runs, warm_up), "rows": rows}, indent=2) + "\n")
    console.table(caption(rows), HEADER, cells(rows))
    for line in (*said(rows), describe(machine)):
        console.say(line)
    return rows


def interleaved(
    runners: Sequence[Callable[[], object]],
    runs: int,
    warm_up: int,
    advance: Callable[[int], None] = lambda done: None,
    clock: Callable[[], float] = time.perf_counter,
) -> NDArray[np.float64]:
    """Milliseconds (files, runs) of rounds in which each runner runs once; every round starts one runner further on.
    advance: told after each round.
    """
    count = len(runners)
    seconds = np.empty((count, warm_up + runs))
    for turn in range(warm_up + runs):
        for step in range(count):
            index = (turn + step) % count
            start = clock()
            runners[index]()
            seconds[index, turn] = clock() - start
        advance(count)
    return seconds[:, warm_up:] * 1e3


def figures(times: NDArray[np.float64], first: NDArray[np.float64]) -> dict[str, Any]:
    """Percentiles of times (runs,) in ms, and the p50 as a multiple of that of `first`, (runs,) of the same rounds:
    over all, least and most of PARTS.
    """
    p50, p90, p99 = (float(value) for value in np.percentile(times, [50, 90, 99]))
    parts = np.array_split(np.stack([times, first]), min(PARTS, len(times)), axis=1)
    ratios = [float(np.median(part[0]) / np.median(part[1])) for part in parts]
    whole = float(np.median(times) / np.median(first))
    return {
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "p50_ratio": whole,
        "p50_ratio_range": [min(ratios), max(ratios)],
    }


def _machine() -> dict[str, Any]:
    versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return processor() | {"system": f"{platform.system()} {platform.machine()}"} | versions


def _refuse(models: Sequence[Path], threads: Sequence[int], runs: int, warm_up: int, json_file: Path | None) -> None:
    if not models:
        raise BingoError("MODEL: expected at least one ONNX file, found none; for example RUN/export/student.onnx")
    for option, value, least in (("--threads", min(threads), 1), ("--runs", runs, 1), ("--warm-up", warm_up, 0)):
        if value < least:
            raise BingoError(f"{option}: expected at least {least}, found {value}; give a larger number")
    refuse_no_file(json_file, "--json")


def _opened(path: Path, label: str) -> Model:
    """The file with pictures that it has run once. Raises BingoError for what is not a network with pictures in."""
    if not path.is_file():
        raise BingoError(f"MODEL: expected an ONNX file, found no file at {path}; check the path")
    session = _session(path, 1)
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise BingoError(f"{path}: expected one input, pictures, found {len(inputs)}; time another file")
    (given,) = inputs
    if given.type not in KINDS or not given.shape:
        raise BingoError(
            f"{path}: expected pictures as {', '.join(kind[7:-1] for kind in KINDS)}, found {given.type} {given.shape};"
            " time another file"
        )
    batch, *rest = given.shape
    if not all(isinstance(side, int) and side > 0 for side in rest):
        raise BingoError(
            f"{path}: expected input {given.name} of a known size, found {given.shape}; export it with all but the"
            " batch fixed"
        )
    pictures = np.random.default_rng(0).integers(0, 256, (batch if isinstance(batch, int) else 1, *rest), np.uint8)
    fitting = pictures if given.type == "tensor(uint8)" else (pictures / 255).astype(KINDS[given.type])
    try:
        session.run(None, {given.name: fitting})
    except Exception as error:  # onnxruntime's own exceptions share no base class below Exception
        raise BingoError(f"{path}: expected a file that runs, found {first_line(error)}; export it again") from None
    return Model(path, label, _bytes(path), file_digest(path), given.name, fitting)


def _session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # its errors come as exceptions too; the log would repeat them on stderr
    for key, value in SESSION.items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise BingoError(
            f"{path}: expected an ONNX file that onnxruntime {onnxruntime.__version__} opens, found"
            f" {first_line(error)}; export it again"
        ) from None


def _bytes(path: Path) -> int:
    """Bytes of a file, and of the files beside it that hold its weights."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    beside = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return sum(file.stat().st_size for file in (path, *(path.parent / name for name in beside)))


def _fresh(model: Model) -> dict[str, Any]:
    """Medians over LOADS fresh processes of what PROBE prints. Raises BingoError where one fails."""
    task = json.dumps([str(model.path), model.input, model.pictures.shape, str(model.pictures.dtype), PROBE_RUNS])
    found = []
    for _ in range(LOADS):
        done = subprocess.run([sys.executable, "-P", "-c", PROBE, task], capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
            raise BingoError(
                f"{model.path}: expected a file that runs in a fresh process, found {why}; free some memory, or export"
                " it again"
            )
        found.append(json.loads(done.stdout))
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def _protocol(runs: int, warm_up: int) -> dict[str, Any]:
    return {
        "pictures": (
            "random values in the graph's own input, one, or its batch where that is fixed; a time is a run's; decoding"
            " and resizing are not timed"
        ),
        "order": (
            "for each count of threads: rounds in which every file runs once, each round starting one file further on;"
            " between two runs of a file others use the caches"
        ),
        "runs": runs,
        "warm_up": warm_up,
        "p50_ratio": (
            f"p50 of a file / p50 of the first; range: least and most over {min(PARTS, runs)} consecutive parts of the"
            " runs"
        ),
        "load_ms": (
            f"making the session, 1 thread, in a fresh process, the file in the system's cache: median of {LOADS}"
        ),
        "peak_bytes": (
            f"most resident memory of that process (onnxruntime and numpy, no torch) after {PROBE_RUNS} runs, nothing"
            " subtracted; baseline_bytes: before the file is loaded; medians"
        ),
        "session": {
            "intra_op_num_threads": "threads",
            "inter_op_num_threads": 1,
            **SESSION,
            "all else": "onnxruntime's defaults, CPU",
        },
    }
