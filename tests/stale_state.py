"""Stale state: random sequences of commands over a tiny world that changes between them; the last one's result against
the same in clean folders.

    python tests/stale_state.py [--sequences 300] [--seed 0] [--length 6] [--only N] [--minutes 120]
        [--source folder] [--json FILE]

A sequence is commands (distill, resumed, killed, overwritten; export, validate, compare; the kit's index, nearest,
classify) in two runs and a comparison, and changes between them (pictures, folders, weights, times, copies of runs and
of parts of them). What the last command made is compared with what it makes in clean folders: after the commands that
it depends on, each with the world that it was given, but with what both read as it is now. A difference is fine where
it was said: by exit status 2 or 3, or by a line on screen that the clean command does not print. Linux only; about a
second a command.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stale_commands import RUNS, Command, Held, chain, draw, read, remember, words
from stale_result import differing, result
from stale_run import Ended, run
from stale_world import ENDINGS, World, changed, first_world, put

HEAD = "student.linear.npz"
KEPT = 60  # clean folders on the disk at once
SAID = re.compile(
    r"\b(again|anew|earlier|older|other|another|stale|chang|differ|does not fit|not of|no"
    r" longer|remov|delet|damaged|warning|instead|copies)",
    re.I,
)
REFUSED = (2, 3)


@dataclass(frozen=True)
class Verdict:
    """kind: same, refused, said, not said, or broken (a traceback, a hang). why: the differences, or what was said."""

    kind: str
    why: tuple[str, ...]


class Fuzzer:
    """One home on disk: live/ for sequences, clean/ for what their last commands are compared with, which is kept for
    the next sequences.
    """

    def __init__(self, home: Path, source: str = "folder") -> None:
        self.source = source
        self.home, self.live, self.clean = home, home / "live", home / "clean"
        self.kept = home / "graphs"
        for folder in (self.live, self.clean, self.kept):
            folder.mkdir(parents=True)
        self.known: dict[tuple[Any, ...], tuple[Ended, dict[str, Any]]] = {}
        self.folders: dict[tuple[Any, ...], Path] = {}
        self.commands, self.seconds = Counter[str](), Counter[str]()

    def fork(self, line: list[str], killed_at: int = 0) -> Ended:
        ended = run(line, self.home / "log", self.kept, killed_at)
        name = line[1 if line[0] == "bingo-edge" else 0]
        self.commands[name] += 1
        self.seconds[name] += ended.seconds
        return ended

    def sequence(self, number: int, seed: int, length: int) -> tuple[Verdict, list[str]]:
        """A whole sequence: the verdict on its last command, and all of it in words."""
        random = np.random.default_rng([seed, number])
        shutil.rmtree(self.live)
        world, held, history = first_world(self.source), {name: Held() for name in RUNS}, []
        put(world, self.live / "world")
        for step in range(length):
            if step:
                for _ in range(int(random.choice([0, 1, 2], p=[0.2, 0.5, 0.3]))):
                    what, world = self.change(random, world, held)
                    history.append(f"  {what}")
                put(world, self.live / "world")
            command, killed_at = draw(random, held, last=step == length - 1)
            line = words(command, self.live, world, self.live / "world")
            ended = self.fork(line, killed_at)
            shown = " ".join(f"{key}={value}" for key, value in command.settings)
            history.append(
                f"{command.kind} {command.place} {shown}{f' killed at step {killed_at}' if killed_at else ''} ->"
                f" {ended.status}"
            )
            if step == length - 1:
                return self.judge(command, world, ended, held), history
            remember(command, world, ended, held)
            if ended.status not in (0, -9, *REFUSED):
                return Verdict("broken", (ended.told[-1500:],)), history
        raise AssertionError("a sequence has a last command")

    def change(self, random: np.random.Generator, world: World, held: dict[str, Held]) -> tuple[str, World]:
        """Change the world, or the folders of the runs: what was done, and the world after it."""
        one, two = (str(name) for name in random.permutation(RUNS))
        here, other = self.live / one, self.live / two
        kinds: dict[str, Callable[[], bool]] = {
            f"{two}/work replaced by {one}/work": lambda: _copied(here / "work", other / "work"),
            f"{two} replaced by a copy of {one}": lambda: "distill" in held[one].steps and _copied(here, other),
            f"{one}/work deleted": lambda: (here / "work").is_dir() and not shutil.rmtree(here / "work"),
            f"{one}/export/student.onnx deleted": lambda: _deleted(here / "export" / "student.onnx"),
            f"{two}/export/student.onnx replaced by that of {one}": lambda: _copied(
                *(it / "export" / "student.onnx" for it in (here, other))
            ),
            f"{two}/export replaced by that of {one}": lambda: (
                "export" in held[two].steps and _copied(here / "export", other / "export")
            ),
            f"{two}'s linear head replaced by that of {one}": lambda: _copied(
                *(it / "export" / HEAD for it in (here, other))
            ),
        }
        if random.random() < 0.4:
            for what in random.permutation(list(kinds)):
                if kinds[what]():
                    if what.endswith(f"a copy of {one}"):
                        held[two] = held[one].copy()
                    if what.endswith("deleted") and "onnx" in what:
                        held[one].steps.pop("export", None)
                    return str(what), world
        return changed(random, world)

    def judge(self, command: Command, world: World, live: Ended, held: dict[str, Held]) -> Verdict:
        """What the last command made, against the same in clean folders."""
        if live.status not in (0, *REFUSED) or "Traceback" in live.told:
            return Verdict("broken", (f"status {live.status}", live.told[-1500:]))
        steps = chain(command, world, held.get(command.place, Held()))
        clean, expected = self.in_clean_folders(steps)
        if live.status != 0:
            kind = "refused" if clean.status == 0 else "same"
            return Verdict(
                kind, (next((line for line in live.told.splitlines() if "error:" in line), live.told[-300:]),)
            )
        try:
            found = result(command, live, self.live, world, self.live / "world", self.fork)
        except (OSError, ValueError, KeyError) as error:
            return Verdict("broken", (f"status 0, but no result: {type(error).__name__}: {error}",))
        tolerance = 0.0 if command.kind in ("distill", "compare") else 1e-3 if command.kind == "validate" else 1e-4
        if command.kind == "validate" and not (self.live / command.place / "work" / "start.safetensors").exists():
            # Work/ may be deleted after a run, and what is shown of it is then missing.
            figures = dict(expected["figures"]) if expected else {}
            rows = {name: row for name, row in figures.get("rows", {}).items() if name != "start"}
            expected = expected | {
                "figures": {key: value for key, value in figures.items() if not key.startswith("bag_")} | {"rows": rows}
            }
        differences = tuple(differing(found, expected, tolerance=tolerance))
        if clean.status != 0:
            differences = (f"status 0 instead of {clean.status}: {clean.told[-300:]}",)
        if not differences:
            return Verdict("same", ())
        printed = {_without_numbers(line) for line in clean.told.splitlines()}
        said = [line for line in live.told.splitlines() if SAID.search(line) and _without_numbers(line) not in printed]
        return Verdict("said", tuple(said)) if said else Verdict("not said", differences)

    def in_clean_folders(self, steps: list[tuple[Command, World]]) -> tuple[Ended, dict[str, Any]]:
        """What the last of `steps` prints and makes after the others, in folders of their own; from an earlier sequence
        where it is known.
        """
        key = tuple((step, read(step, world)) for step, world in steps)
        if key in self.known:
            return self.known[key]
        command, world = steps[-1]
        root = self.clean / str(len(self.known))
        if steps[:-1]:
            before, _ = self.in_clean_folders(steps[:-1])
            if before.status != 0:
                return before, {}
            if not self.folders[key[:-1]].is_dir():
                del self.known[key[:-1]]
                return self.in_clean_folders(steps)
            root = self.clean / str(len(self.known))
            shutil.copytree(self.folders[key[:-1]], root)
        there = self.clean / "world"
        put(world, there, told_apart=True)
        root.mkdir(exist_ok=True)
        ended = self.fork(words(command, root, world, there))
        made = result(command, ended, root, world, there, self.fork) if ended.status == 0 else {}
        self.known[key], self.folders[key] = (ended, made), root
        for old in list(self.folders.values())[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return ended, made


def _without_numbers(line: str) -> str:
    return re.sub(r"\S*/\S*|[\d.,]+", "#", line)


def _copied(source: Path, target: Path) -> bool:
    """Put a copy of source where target is, if both are there (a whole run: if source is)."""
    if not source.exists() or not (target.exists() or target.name in RUNS):
        return False
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)
    return True


def _deleted(file: Path) -> bool:
    there = file.exists()
    file.unlink(missing_ok=True)
    return there


def fuzz(
    home: Path, numbers: list[int], seed: int, length: int, over: Callable[[], bool], source: str = "folder"
) -> dict[str, Any]:
    """Sequences `numbers`; what was found."""
    fuzzer, counts, found, refusals = Fuzzer(home, source), Counter[str](), [], Counter[str]()
    began, last_kinds = time.monotonic(), Counter[str]()
    for done, number in enumerate(numbers, 1):
        verdict, history = fuzzer.sequence(number, seed, length)
        counts[verdict.kind] += 1
        last_kinds[f"{history[-1].split()[0]}: {verdict.kind}"] += 1
        if verdict.kind in ("refused", "said"):
            refusals.update(_without_numbers(line)[:160] for line in verdict.why)
        if verdict.kind != "same":
            found.append(
                {"number": number, "verdict": verdict.kind, "sequence": history, "why": list(verdict.why[:12])}
            )
        if verdict.kind in ("not said", "broken"):
            print(f"sequence {number} (--seed {seed} --only {number}): {verdict.kind.upper()}", flush=True)
            for line in (*history, *(f"    {why[:400]}" for why in verdict.why[:4])):
                print(f"    {line}", flush=True)
        if done % 5 == 0 or done == len(numbers) or over():
            seconds = time.monotonic() - began
            print(
                f"{done} of {len(numbers)} sequences, {seconds:.0f} s, {seconds / fuzzer.commands.total():.2f} s a"
                f" command: {dict(counts)}",
                flush=True,
            )
        if over():
            break
    differences = sum(counts[kind] for kind in ("refused", "said", "not said"))
    return {
        "asked": len(numbers),
        "sequences": sum(counts.values()),
        "commands": dict(fuzzer.commands),
        "cpu_seconds": {name: round(value, 1) for name, value in fuzzer.seconds.items()},
        "differences": differences,
        "not_said": counts["not said"],
        "broken": counts["broken"],
        "counts": dict(counts),
        "by_last_command": dict(sorted(last_kinds.items())),
        "said": dict(refusals.most_common()),
        "found": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("sequences", 300), ("seed", 0), ("length", 6), ("only", -1), ("minutes", 120.0)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--source", choices=ENDINGS, default="folder")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit(
            "start it with OMP_NUM_THREADS=1: a child of a process with several threads of torch would hang"
        )
    end = time.monotonic() + 60 * given.minutes
    numbers = [given.only] if given.only >= 0 else list(range(given.sequences))
    with tempfile.TemporaryDirectory(prefix="bingo-stale-") as name:
        told = fuzz(
            Path(name) / "home", numbers, given.seed, given.length, lambda: time.monotonic() > end, given.source
        )
    if given.json:
        given.json.write_text(json.dumps(told, indent=1) + "\n")
    shown = {key: value for key, value in told.items() if key not in ("found", "said")}
    print(json.dumps(shown, indent=1))
    for line, count in told["said"].items():
        print(f"  {count} x {line}")
    raise SystemExit(bool(told["not_said"] or told["broken"]))


if __name__ == "__main__":
    main()
