"""Commands of tests/stale_state.py, each forked from a process that has imported everything."""

import contextlib
import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import onnx
import onnxruntime.quantization  # noqa: F401 - imported before the fork, as all below
import onnxscript.function_libs.torch_lib.ops  # noqa: F401
import torch
import torch.export._trace
import torch.onnx._internal.exporter._compat
from bingo_edge import cli as edge

import bingo_compress.training.loop as loop
from bingo_compress import cli
from bingo_compress.evaluation import intervals, probes
from bingo_compress.exporters import timing
from bingo_compress.features import extract
from bingo_compress.runtime import signals

PATIENCE = 90.0  # seconds until a command counts as hung


class Ended(NamedTuple):
    """Exit status (minus the signal's number; None: it hung), what was on screen, and the CPU seconds that it took."""

    status: int | None
    told: str
    seconds: float = 0.0


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
