"""The long part of "never lose a run": runs are killed, stopped, starved of disk and of a worker at random moments,
then resumed and compared bit for bit.

    python tests/soak.py [--trials 200] [--stops 50] [--two-trials 50] [--two-stops 20] [--disks 30]
        [--workers 3] [--decodes 1000000] [--minutes 60] [--seed 0] [--traced-once] [--source folder]
        [--json FILE]

A trial is the whole road - pixels, teacher, bags, training, proof, export - of the smallest models on drawn photos,
forked from a process that has imported everything, so that no time goes into imports. --minutes bounds the whole:
what was not reached is said. Linux only.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import traced
from helpers import flags, photos
from soak_pictures import closed_early, decodes, throughput
from soak_roads import SAVE_EVERY, WATCH, ended, orphans, result, road, source_of

from bingo_compress.runtime import checkpoint

PATIENCE = 120.0  # seconds until a road counts as hung
STOP_WITHIN = 20.0


class Whole(NamedTuple):
    """An uninterrupted road: its seconds, those of each stage, and what it left."""

    seconds: float
    stages: dict[str, float]
    left: dict[str, str]


def uninterrupted(home: Path, data: Path, *, exports: bool, processes: int) -> Whole:
    """Walk a road to its end. Raises SystemExit if it does not get there."""
    out, log = home / "whole", home / "log"
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    began = time.monotonic()
    status = ended(road(data, out, log, exports=exports, processes=processes), PATIENCE)
    if status != 0:
        raise SystemExit(
            f"the uninterrupted road of {processes} processes ended with status {status}:\n{log.read_text()[-2000:]}"
        )
    return Whole(time.monotonic() - began, json.loads(log.with_suffix(".stages").read_text()), result(out))


def interrupted(
    number: int,
    signal_number: int,
    home: Path,
    data: Path,
    whole: Whole,
    seed: int,
    *,
    exports: bool = False,
    processes: int = 1,
) -> list[str]:
    """One trial: interrupt a road, all its processes at once, and resume it to its end. Returns the stage, then what
    went wrong.

    The moment is drawn from the whole road's time in every second trial, and from one stage's in the others, stage
    after stage.
    """
    random = np.random.default_rng([seed, number, signal_number, processes])
    out, log = home / "run", home / "log"
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    child = road(data, out, log, exports=exports, processes=processes)
    while not WATCH.is_ready:
        time.sleep(0.001)
    if number % 2:
        stage = list(whole.stages)[number // 2 % len(whole.stages)]
        until = time.monotonic() + PATIENCE
        while WATCH.stage != stage and time.monotonic() < until:
            time.sleep(0.0001)
        time.sleep(float(random.uniform(0, whole.stages[stage])))
    else:
        time.sleep(float(random.uniform(0, whole.seconds)))
    stage, wrong = WATCH.stage, []
    os.killpg(child, signal_number)
    status = ended(child, STOP_WITHIN)
    if status not in (0, -signal_number, *[143] * (signal_number == signal.SIGTERM)):
        wrong.append(f"status {status}: {log.read_text()[-300:]}")
    if orphans(child):
        wrong.append("a child outlived its parent")
    if "Traceback" in (told := log.read_text()) or "TRACEBACK" in told:
        wrong.append(f"traceback: {told[-1500:]}")
    last = WATCH.steps[1]
    child = road(data, out, log, exports=exports, processes=processes)
    if (status := ended(child, PATIENCE)) != 0:
        return [stage, *wrong, f"resumed: status {status}: {log.read_text()[-300:]}"]
    first = WATCH.steps[0]
    if first >= 0 and last - first > SAVE_EVERY:
        wrong.append(f"{last - first} steps lost")
    return [stage, *wrong, *(f"{name} differ" for name, value in result(out).items() if value != whole.left[name])]


def full_disks(
    count: int, home: Path, data: Path, expected: dict[str, str], size: int, over: Callable[[], bool]
) -> list[list[str]]:
    """Roads on disks that are too small by more and more, from nothing left to nearly enough; each goes on when there
    is room.
    """
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
    """Runs of two processes under torchrun, one of which is killed while they train: the other ends, and the run goes
    on to the same weights; every second time by torchrun's own restart.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = flags(data=data, epochs=40, save_every_steps=SAVE_EVERY)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch = [*torchrun, "-m", "bingo_compress", "distill", *words]

    def weights(out: Path) -> dict[str, torch.Tensor]:
        return checkpoint.load(out / "student.safetensors")[0]

    subprocess.run([*launch, "--out", str(home / "two")], check=True, capture_output=True, env=environment, timeout=600)
    expected, found = weights(home / "two"), []
    for number in range(count):
        if over():
            break
        out, wrong, restarted = home / f"two-{number}", [], number % 2 == 1
        # As docs/several_gpus.md has it: the shell looks anew at each start.
        script = shlex.join([sys.executable, "-m", "bingo_compress", "distill", *words, "--out", str(out)])
        anew = f"exec {script} $([ -f {shlex.quote(str(out))}/recipe.yaml ] && echo --resume)"
        restart = [*torchrun, "--max-restarts", "1", "--no-python", "sh", "-c", anew]
        running = subprocess.Popen(
            restart if restarted else [*launch, "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        until = time.monotonic() + PATIENCE
        while (
            not (out / "work" / "checkpoint.safetensors").exists()
            and time.monotonic() < until
            and running.poll() is None
        ):
            time.sleep(0.02)
        workers = [int(word) for word in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
        killed = time.monotonic()
        os.kill(workers[number % len(workers)], signal.SIGKILL)
        try:
            told = running.communicate(timeout=600 if restarted else 120)[0].decode(errors="replace")
            took = time.monotonic() - killed
        except subprocess.TimeoutExpired:
            running.kill()
            told, took = running.communicate()[0].decode(errors="replace"), 120.0
            wrong.append("not over after 120 s")
        if (running.returncode == 0) != restarted:
            wrong.append(f"status {running.returncode}: {told[-300:]}")
        if any(Path(f"/proc/{worker}").exists() for worker in workers):
            wrong.append("a worker outlived torchrun")
        if (out / "student.safetensors").exists() and not restarted:
            wrong.append(f"was over before the kill: {told[-200:]}")
        again = subprocess.run(
            [*launch, "--out", str(out), "--resume"], capture_output=True, env=environment, timeout=600, check=False
        )
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
        ("two-trials", 50),
        ("two-stops", 20),
        ("disks", 30),
        ("workers", 3),
        ("decodes", 1_000_000),
        ("minutes", 60),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--source", choices=("folder", "list", "tar"), default="folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--traced-once", action="store_true", help="trace the student once: an export takes a second")
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
        if given.traced_once:
            (home / "graphs").mkdir()
            torch.onnx.export = traced.once(home / "graphs")
        data = source_of(photos(home / "photos", 12), given.source)

        @cache
        def whole(processes: int, *, exports: bool) -> Whole:
            return uninterrupted(home, data, exports=exports, processes=processes)

        longest = whole(1, exports=True)
        size = sum(path.stat().st_blocks * 512 for path in (home / "whole").rglob("*"))
        print(f"an uninterrupted road takes {longest.seconds:.1f} s and {size / 1e6:.1f} MB", flush=True)
        print(f"    {', '.join(f'{stage} {seconds:.3f} s' for stage, seconds in longest.stages.items())}", flush=True)

        def trials(count: int, number: int, processes: int = 1) -> list[list[str]]:
            found: list[list[str]] = []
            while len(found) < count and not over():
                # An export takes as long as all before it. Only one process exports.
                exports = len(found) % 6 in (0, 1) and processes == 1
                way = whole(processes, exports=exports)
                found.append(
                    interrupted(len(found), number, home, data, way, given.seed, exports=exports, processes=processes)
                )
            return found

        tell("full disk", full_disks(given.disks, home, data, longest.left, size, over), given.disks)
        tell("SIGTERM", trials(given.stops, signal.SIGTERM), given.stops)
        tell("SIGTERM of two processes", trials(given.two_stops, signal.SIGTERM, 2), given.two_stops)
        if given.workers:
            tell("worker killed", lost_workers(given.workers, home, data, over), given.workers)
        tell("kill -9", trials(given.trials, signal.SIGKILL), given.trials)
        tell("kill -9 of two processes", trials(given.two_trials, signal.SIGKILL, 2), given.two_trials)
        if given.decodes and not over():
            told["closed_early"] = closed_early(given.decodes // 100)
            print(f"JPEGs with an end marker: {told['closed_early']}", flush=True)
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
