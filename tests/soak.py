"""The long part of "never lose a run": runs are killed, stopped, starved of disk and of a worker at random moments, then resumed and compared bit for bit.

    python tests/soak.py [--trials 200] [--stops 50] [--disks 30] [--workers 3] [--decodes 1000000] [--minutes 60] [--seed 0] [--json FILE]

A trial is the whole road - pixels, teacher, bags, training, proof, export - of the smallest models on drawn photos, forked from a process that has imported
everything, so that no time goes into imports. --minutes bounds the whole: what was not reached is said. Linux only.
"""

import argparse
import hashlib
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from helpers import flags, photos
from soak_pictures import decodes, throughput

import bingo_compress.distill as loop
from bingo_compress import checkpoint, cli, compare, exporting, pipeline, pixels, screen, stopping, validation  # noqa: F401 - imported before the fork

SAVE_EVERY = 5  # steps
EPOCHS = 6
PATIENCE = 120.0  # seconds until a road counts as hung
STOP_WITHIN = 20.0


class Watch:
    """What a forked road tells its parent, in shared memory: the stage it is in, whether signals are heard, the first and the last step it began."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)
        self.clear()

    def clear(self) -> None:
        self._memory[:16] = struct.pack("<iiii", -1, -1, 0, 0)
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
        self._memory[16:80] = name.encode()[:64].ljust(64, b"\0")


WATCH = Watch()


def road(data: Path, out: Path, log: Path, *, exports: bool = True) -> int:
    """Fork a process that distils, validates and, if asked to, exports; its number, which is also its group's."""
    WATCH.clear()
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    shown = screen.bar

    @contextmanager
    def told(what: str, total: int) -> Iterator[Any]:
        WATCH.stage = what
        with shown(what, total) as advance:
            yield advance

    def rate(step: int, *rest: Any) -> float:
        WATCH.step(step)
        return learning_rate(step, *rest)

    learning_rate = loop.learning_rate
    status = 0
    stopping.listen()
    WATCH.ready()
    try:
        with mock.patch.object(screen, "bar", told), mock.patch.object(loop, "learning_rate", rate):
            resume = ["--resume"] if out.is_dir() and any(out.iterdir()) else []
            sets = flags(data=data, epochs=EPOCHS, save_every_steps=SAVE_EVERY)
            for words in (
                ["distill", *sets, "--out", str(out), *resume],
                ["validate", "--run", str(out), "--data", str(data)],
                *([["export", "--run", str(out)]] if exports else []),
            ):
                WATCH.stage = words[0]
                sys.argv = ["bingo-compress", *words]
                try:
                    cli.main()
                except SystemExit as end:
                    status = int(end.code or 0)
                if status:
                    break
    except KeyboardInterrupt:
        status = stopping.status()
    except BaseException as error:
        print(f"TRACEBACK {type(error).__name__}: {error}", flush=True)
        status = 70
    finally:
        os._exit(status)


def ended(child: int, within: float) -> int | None:
    """Exit status of a child, minus the signal's number if one killed it; None, and the group is killed, if it is not over in time."""
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
    """What must be equal bit for bit: the student's weights, the proof's accuracies, the exported file if there is one."""
    tensors, _ = checkpoint.load(out / "student.safetensors")
    weights = hashlib.sha256(b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
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


def interrupted(
    number: int, signal_number: int, home: Path, data: Path, expected: dict[str, str], whole: dict[bool, float], seed: int
) -> list[str]:
    """One trial: interrupt a road at a random moment, resume it to its end. Returns the stage, then what went wrong."""
    random = np.random.default_rng([seed, number, signal_number])
    out, log = home / "run", home / "log"
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    exports = number % 3 == 0  # it takes as long as all before it
    child = road(data, out, log, exports=exports)
    while not WATCH.is_ready:
        time.sleep(0.001)
    time.sleep(float(random.uniform(0, whole[exports])))
    stage, wrong = WATCH.stage, []
    os.kill(child, signal_number)
    status = ended(child, STOP_WITHIN)
    if status not in ((0, -9) if signal_number == signal.SIGKILL else (0, 143)):
        wrong.append(f"status {status}")
    if orphans(child):
        wrong.append("a child outlived its parent")
    last = WATCH.steps[1]
    child = road(data, out, log, exports=exports)
    if (status := ended(child, PATIENCE)) != 0:
        return [stage, *wrong, f"resumed: status {status}: {log.read_text()[-300:]}"]
    first = WATCH.steps[0]
    if first >= 0 and last - first > SAVE_EVERY:
        wrong.append(f"{last - first} steps lost")
    for name, value in result(out).items():
        if value != expected[name]:
            wrong.append(f"{name} differ")
    return [stage, *wrong]


def full_disks(count: int, home: Path, data: Path, expected: dict[str, str], size: int, over: Callable[[], bool]) -> list[list[str]]:
    """Roads on disks that are too small by more and more, from nothing left to nearly enough; each goes on when there is room."""
    if os.geteuid() or shutil.which("mount") is None:
        return []
    disk, log, found = home / "disk", home / "log", []
    disk.mkdir(exist_ok=True)
    for number in range(count):
        if over():
            break
        bytes_there = int(size * (number + 0.5) / count)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={bytes_there}", "bingo-soak", str(disk)], check=True)
        try:
            log.unlink(missing_ok=True)
            status = ended(road(data, disk / "run", log), PATIENCE)
            stage, told, wrong = WATCH.stage, log.read_text(), []
            if status != 2:
                wrong.append(f"status {status}: {told[-300:]}")
            elif "error: no space" not in told or not ("are missing" in told or "the disk is full" in told):
                wrong.append(f"message: {told[-200:]}")
            subprocess.run(["mount", "-o", f"remount,size={size * 8}", str(disk)], check=True)
            if (status := ended(road(data, disk / "run", log), PATIENCE)) != 0:
                wrong.append(f"resumed: status {status}: {log.read_text()[-300:]}")
            else:
                wrong += [f"{name} differ" for name, value in result(disk / "run").items() if value != expected[name]]
            found.append([stage, *wrong])
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return found


def lost_workers(count: int, home: Path, data: Path, over: Callable[[], bool]) -> list[list[str]]:
    """Runs of two processes under torchrun, one of which is killed while they train: the other ends, and the run goes on to the same weights."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = flags(data=data, epochs=40, save_every_steps=SAVE_EVERY)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "bingo_compress",
        "distill",
        *words,
    ]

    def weights(out: Path) -> dict[str, torch.Tensor]:
        return checkpoint.load(out / "student.safetensors")[0]

    subprocess.run([*launch, "--out", str(home / "two")], check=True, capture_output=True, env=environment, timeout=600)
    expected, found = weights(home / "two"), []
    for number in range(count):
        if over():
            break
        out, wrong = home / f"two-{number}", []
        running = subprocess.Popen([*launch, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        until = time.monotonic() + PATIENCE
        while not (out / "work" / "checkpoint.safetensors").exists() and time.monotonic() < until and running.poll() is None:
            time.sleep(0.02)
        workers = [int(word) for word in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
        killed = time.monotonic()
        os.kill(workers[number % len(workers)], signal.SIGKILL)
        try:
            told = running.communicate(timeout=120)[0].decode(errors="replace")
            took = time.monotonic() - killed
        except subprocess.TimeoutExpired:
            running.kill()
            told, took = running.communicate()[0].decode(errors="replace"), 120.0
            wrong.append("not over after 120 s")
        if running.returncode == 0:
            wrong.append("status 0")
        if any(Path(f"/proc/{worker}").exists() for worker in workers):
            wrong.append("a worker outlived torchrun")
        if (out / "student.safetensors").exists():
            wrong.append(f"was over before the kill: {told[-200:]}")
        again = subprocess.run([*launch, "--out", str(out), "--resume"], capture_output=True, env=environment, timeout=600, check=False)
        if again.returncode:
            wrong.append(f"resumed: status {again.returncode}: {again.stderr[-300:]!r}")
        elif not all(torch.equal(value, weights(out)[name]) for name, value in expected.items()):
            wrong.append("weights differ")
        found.append([f"training, worker {number % len(workers)}, over in {took:.1f} s", *wrong])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("trials", 200),
        ("stops", 50),
        ("disks", 30),
        ("workers", 3),
        ("decodes", 1_000_000),
        ("minutes", 60),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * given.minutes

    def over() -> bool:
        return time.monotonic() > end

    told: dict[str, Any] = {}
    bad = 0

    def tell(name: str, found: list[list[str]], asked: int) -> None:
        nonlocal bad
        failed = [row for row in found if len(row) > 1]
        bad += len(failed)
        told[name] = {
            "asked": asked,
            "done": len(found),
            "as_expected": len(found) - len(failed),
            "stages": dict(Counter(row[0] for row in found)),
            "failures": failed[:20],
        }
        print(f"{name}: {len(found) - len(failed)} of {len(found)} as expected ({asked} asked for)", flush=True)
        for stage, amount in Counter(row[0] for row in found).most_common():
            print(f"    {amount} in {stage}")
        for row in failed[:20]:
            print(f"    FAILED {row}")

    with tempfile.TemporaryDirectory(prefix="bingo-soak-") as name:
        home = Path(name)
        data = photos(home / "photos", 12)
        whole: dict[bool, float] = {}
        for exports in (False, True):
            began = time.monotonic()
            shutil.rmtree(home / "whole", ignore_errors=True)
            status = ended(road(data, home / "whole", home / "log", exports=exports), PATIENCE)
            if status != 0:
                raise SystemExit(f"the uninterrupted road ended with status {status}:\n{(home / 'log').read_text()[-2000:]}")
            whole[exports] = time.monotonic() - began
        expected = result(home / "whole")
        size = sum(path.stat().st_blocks * 512 for path in (home / "whole").rglob("*"))
        print(f"an uninterrupted road takes {whole[True]:.1f} s ({whole[False]:.1f} s without export) and {size / 1e6:.1f} MB", flush=True)

        def trials(count: int, number: int) -> list[list[str]]:
            found = []
            for trial in range(count):
                if over():
                    break
                found.append(interrupted(trial, number, home, data, expected, whole, given.seed))
            return found

        tell("full disk", full_disks(given.disks, home, data, expected, size, over), given.disks)
        tell("SIGTERM", trials(given.stops, signal.SIGTERM), given.stops)
        if given.workers:
            tell("worker killed", lost_workers(given.workers, home, data, over), given.workers)
        tell("kill -9", trials(given.trials, signal.SIGKILL), given.trials)
        if given.decodes and not over():
            told["throughput"] = throughput(home)
            print(f"throughput, files/s: {told['throughput']}", flush=True)
            told["decodes"] = decodes(given.decodes, home, over)
            print(f"decodes: {told['decodes']}", flush=True)
            bad += told["decodes"]["growth"] > 0.02
    if given.json:
        given.json.write_text(json.dumps(told, indent=1) + "\n")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
