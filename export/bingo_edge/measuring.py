"""How long the ONNX files of a folder take on this machine, one after the other."""

import hashlib
import json
import lzma
import os
import platform
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from bingo_edge.errors import EdgeError
from bingo_edge.files import write_text

FORMAT = 1
ENDINGS = (".onnx", ".onnx.xz")
WARM_UP, LEAST, MOST, SECONDS = 3, 9, 200, 0.5
PROTOCOL = (
    f"one run at a time of random pictures in the file's own input, one or its fixed batch; {WARM_UP} runs before, then"
    f" at least {LEAST}, at most {MOST}, until {SECONDS:g} s have gone"
)
KINDS = {"tensor(uint8)": "uint8", "tensor(float16)": "float16", "tensor(float)": "float32"}
Told = Callable[[int, int, str, dict[str, Any]], None]


def measure(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    threads: int = 1,
    told: Told = lambda done, count, name, times: None,
    names: Collection[str] | None = None,
) -> dict[str, Any]:
    """Time the .onnx and .onnx.xz files in `folder` (not below it) and write the profile `out` after each; returns it.

    What an earlier profile in `out` has of the same machine, runtime and threads stays, and the same file is not timed
    again: a measurement that was stopped goes on. told: called after each that was timed, with how many are done, of
    how many, the name and its times. names: of the files, where not all are meant. Raises EdgeError.
    """
    files = sorted(path for path in Path(folder).glob("*") if path.name.endswith(ENDINGS) and path.is_file())
    files = [path for path in files if names is None or path.name in names]
    if threads < 1:
        raise EdgeError("at least 1 thread", str(threads), "give a positive number")
    if not files:
        raise EdgeError(f"{' or '.join(ENDINGS)} files", f"none in {os.fspath(folder)}", "give another folder")
    import onnxruntime  # its version by itself: wheels of other makers have other names

    profile: dict[str, Any] = {
        "format": FORMAT,
        "machine": machine(),
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "threads": threads,
        "protocol": PROTOCOL,
    }
    profile["files"] = _earlier(Path(out), profile)
    for place, path in enumerate(files, 1):
        held = path.read_bytes()
        sha256 = hashlib.sha256(held).hexdigest()
        if profile["files"].get(path.name, {}).get("sha256") != sha256:
            profile["files"][path.name] = {"sha256": sha256} | _times(path, held, threads)
            write_text(Path(out), json.dumps(profile, indent=1) + "\n")
            told(place, len(files), path.name, profile["files"][path.name])
    return profile


def machine() -> dict[str, Any]:
    """{"name": of the board or processor, "architecture", "cores": that this process may use, "system"}."""
    return {
        "name": _board() or _processor() or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()}",
    }


def _board() -> str:
    """What a device tree calls the board, such as a Raspberry Pi's; elsewhere nothing."""
    try:
        return Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _earlier(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The files of an earlier profile that was measured in the same way; none where there is no such."""
    if not out.exists():
        return {}
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
        files = {str(name): dict(times) for name, times in found.pop("files").items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise EdgeError("a profile of `bingo-edge measure`", f"something else in {out}", "delete it") from None
    return files if found == about else {}


def _times(path: Path, held: bytes, threads: int) -> dict[str, Any]:
    """{"runs", "p50_ms", "p90_ms"} of a file with these bytes."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # its errors come as exceptions too
    try:
        graph = lzma.decompress(held) if path.name.endswith(".xz") else held
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        feed = {given.name: _pictures(given.type, given.shape) for given in session.get_inputs()}
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < WARM_UP + LEAST or (
            len(times) < WARM_UP + MOST and time.perf_counter() - began < SECONDS + sum(times[:WARM_UP])
        ):
            start = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - start)
    except Exception as error:  # onnxruntime's own exceptions share no base class below Exception
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        todo = "take it out of the folder, or copy it again"
        raise EdgeError("an ONNX file that runs", f"{path} ({why})", todo) from None
    p50, p90 = (float(value) * 1e3 for value in np.percentile(times[WARM_UP:], [50, 90]))
    return {"runs": len(times) - WARM_UP, "p50_ms": round(p50, 4), "p90_ms": round(p90, 4)}


def _pictures(kind: str, shape: list[Any]) -> Any:
    """Random pictures for an input of this type and shape, one where the batch is open."""
    import numpy as np

    sides = [side if isinstance(side, int) and side > 0 else 1 for side in shape]
    pixels = np.random.default_rng(0).integers(0, 256, sides, np.uint8)
    return pixels if kind == "tensor(uint8)" else (pixels / 255).astype(KINDS[kind])
