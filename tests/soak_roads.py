"""What tests/soak.py sends on its way and judges: the whole road - pixels, teacher, bags, training, proof, export - in
forked processes that tell where they are.
"""

import hashlib
import json
import mmap
import os
import signal
import struct
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import onnxscript.function_libs.torch_lib.ops  # noqa: F401 - imported before the fork, as all below
import torch.export._trace
import torch.onnx._internal.exporter._compat  # noqa: F401
from helpers import flags, free_port

import bingo_compress.training.loop as loop
from bingo_compress import cli, pipeline
from bingo_compress.features import extract
from bingo_compress.runtime import checkpoint, console, signals

SAVE_EVERY = 5  # steps
EPOCHS = 6
NAMED = ("make_bags", "bag_facts", "held_out_recall", "_close")  # of pipeline: stages without a bar of their own


def source_of(folder: Path, kind: str) -> Path:
    """The folder, or a list or a tar file of its images."""
    files = sorted(folder.rglob("*.png"))
    target = folder.with_suffix({"folder": "", "list": ".txt", "tar": ".tar"}[kind])
    if kind == "list":
        target.write_text("\n".join(map(str, files)))
    elif kind == "tar":
        with tarfile.open(target, "w") as archive:
            for file in files:
                archive.add(file, str(file.relative_to(folder)))
    return target


class Watch:
    """What a forked road tells its parent, in shared memory: the stage it is in, whether signals are heard, the first
    and the last step it began.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)
        self.clear()

    def clear(self) -> None:
        self._memory[:16] = struct.pack("<iiii", -1, -1, 0, 0)
        self.began: list[tuple[str, float]] = []
        self.stage = "start"

    def step(self, number: int) -> None:
        first = self.steps[0]
        self._memory[:8] = struct.pack("<ii", number if first < 0 else first, number)

    def ready(self) -> None:
        self._memory[8:12] = struct.pack("<i", 1)

    @property
    def is_ready(self) -> bool:
        return bool(struct.unpack("<i", self._memory[8:12])[0])

    @property
    def steps(self) -> tuple[int, int]:
        return struct.unpack("<ii", self._memory[:8])

    @property
    def stage(self) -> str:
        return self._memory[16:80].rstrip(b"\0").decode()

    @stage.setter
    def stage(self, name: str) -> None:
        self.began.append((name, time.monotonic()))
        self._memory[16:80] = name.encode()[:64].ljust(64, b"\0")

    def lengths(self) -> dict[str, float]:
        """Seconds of every stage of the process that ran them, if it is over."""
        ends = [*(when for _, when in self.began[1:]), time.monotonic()]
        spent: dict[str, float] = {}
        for (name, when), end in zip(self.began, ends, strict=True):
            spent[name] = spent.get(name, 0.0) + end - when
        return spent


WATCH = Watch()


def road(data: Path, out: Path, log: Path, *, exports: bool = True, processes: int = 1) -> int:
    """Fork a process that distils, validates and, if asked to, exports; its number, which is also its group's.
    processes: 2 share the work, as torchrun's do.

    When it is over, log with the suffix .stages holds how long each stage took.
    """
    WATCH.clear()
    sys.stdout.flush()
    ports = [free_port() for _ in range(3)] if processes > 1 else []  # one for each command
    resume = ["--resume"] if out.is_dir() and any(out.iterdir()) else []
    child = os.fork()
    if child:
        return child
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    signals.listen()
    second = 0
    if processes > 1:
        second = os.fork()
        rank = "0" if second else "1"
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    if second or processes == 1:
        WATCH.ready()
    sets = flags(data=data, epochs=EPOCHS, save_every_steps=SAVE_EVERY)
    commands = [["distill", *sets, "--out", str(out), *resume], *[["export", "--run", str(out)]] * exports]
    status = _walk(
        [*commands, ["validate", "--run", str(out), "--data", str(data)]], ports, first=bool(second) or processes == 1
    )
    try:
        if second:
            status = status or os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    except KeyboardInterrupt:
        status = signals.status()
    if status == 0 and (second or processes == 1):
        log.with_suffix(".stages").write_text(json.dumps(WATCH.lengths()))
    os._exit(status)


def _walk(commands: list[list[str]], ports: list[int], *, first: bool) -> int:
    """The road in this process, which tells where it is if it is the first: its exit status."""
    status = 0
    try:
        with ExitStack() as told:
            # Several parts to a stage, of so few photos.
            told.enter_context(mock.patch.multiple(extract, BATCH=8, PART=1))
            if first:
                _tell(told)
            for number, words in enumerate(commands):
                if first:
                    WATCH.stage = words[0]
                if ports:
                    os.environ["MASTER_PORT"] = str(ports[number])
                sys.argv = ["bingo-compress", *words]
                try:
                    cli.main()
                except SystemExit as end:
                    status = int(end.code or 0)
                if status:
                    break
    except KeyboardInterrupt:
        status = signals.status()
    except BaseException as error:
        print(f"TRACEBACK {type(error).__name__}: {error}", flush=True)
        status = 70
    return status


def _tell(told: ExitStack) -> None:
    """Patch what begins a stage or a step so that WATCH hears of it."""
    shown, learning_rate = console.bar, loop.learning_rate

    @contextmanager
    def bar(what: str, total: int, before: int = 0) -> Iterator[Any]:
        WATCH.stage = what
        with shown(what, total, before) as advance:
            yield advance

    def rate(step: int, *rest: Any) -> float:
        WATCH.step(step)
        return learning_rate(step, *rest)

    def named(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            WATCH.stage = name
            return work(*arguments, **settings)

        return wrapped

    told.enter_context(mock.patch.object(console, "bar", bar))
    told.enter_context(mock.patch.object(loop, "learning_rate", rate))
    for name in NAMED:
        told.enter_context(mock.patch.object(pipeline, name, named(name.strip("_"), getattr(pipeline, name))))


def ended(child: int, within: float) -> int | None:
    """Exit status of a child, minus the signal's number if one killed it; None, and the group is killed, if it is not
    over in time.
    """
    until = time.monotonic() + within
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def orphans(child: int, within: float = 10) -> bool:
    """Whether processes of a dead child's group are still there after a while; they are killed."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            os.killpg(child, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    return True


def result(out: Path) -> dict[str, str]:
    """What must be equal bit for bit: the student's weights, the proof's accuracies, the exported file if there is
    one.
    """
    tensors, _ = checkpoint.load(out / "student.safetensors")
    weights = hashlib.sha256(
        b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
    ).hexdigest()
    proof = json.loads((out / "validation.json").read_text())
    proof["rows"] = proof["rows"][:4]  # a proof after an export has one of the file more
    found = {"weights": weights, "proof": json.dumps(list(_numbers(proof)))}
    if (file := out / "export" / "student.onnx").exists():
        found["onnx"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _numbers(held: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(held, dict):
        for key, value in held.items():
            if not any(word in key for word in ("second", "date", "time", "created")):
                yield from _numbers(value, f"{path}/{key}")
    elif isinstance(held, list):
        for number, value in enumerate(held):
            yield from _numbers(value, f"{path}/{number}")
    elif isinstance(held, float):
        yield path, held
