"""The whole road - check, distill, validate, report - over N distinct photos, with the smallest models: seconds, memory
and bytes on disk by stage, and how they grow.

python benchmarks/scale.py --images 10000 50000 200000 --work /tmp/scale [--source folder] [--memory 4GB] [--json FILE]

The photos are drawn once, 320 x 240, some 30 kB each, of ten classes, in folders or tar files of a thousand. A stage's
seconds are the processor's, all threads together: they tell the same on a busy machine; wall seconds stand beside them.
Memory is what the process itself holds at most (anonymous) and what is resident, pages of mapped files included, which
the system takes back when it needs them. The last table is the growth: seconds an image against the size before, and
what more images would take if it went on so.
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

CLASSES, TOGETHER = 10, 1000  # images in a folder or a tar file
LABELLED = 1000  # images that the proof is of: few have labels for more
WIDTH, HEIGHT = 320, 240
SMALL = ["--teacher", "test_resnet", "--student", "test_resnet", "--image-size", "32", "--teacher-size", "64"]
SMALL += ["--teacher-weights", "random", "--student-weights", "random", "--views", "1", "--epochs", "1"]
SAMPLE = 0.02  # seconds between two looks at the memory
KEY = re.compile(r"-[0-9a-f]{16}")  # of what a stage's folder was made of
FURTHER = (1_281_167, 100_000_000)


class Stage(NamedTuple):
    """What a stage took: seconds of the processor and of the clock, bytes at most."""

    cpu: float
    wall: float
    anonymous: int
    resident: int


@cache
def grain() -> np.ndarray:
    """Noise (16, 2 HEIGHT, 2 WIDTH, 3) to cut each photo's grain from."""
    return np.random.default_rng(0).normal(0, 14, (16, 2 * HEIGHT, 2 * WIDTH, 3)).astype(np.int16)


def jpeg(number: int) -> bytes:
    """The photo `number`, of the class number % CLASSES."""
    random = np.random.default_rng(number)
    kind = np.random.default_rng(10**9 + number % CLASSES).integers(0, 256, (6, 8, 3))
    coarse = (kind + random.integers(0, 256, (6, 8, 3))) // 2
    large = np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    top, left = random.integers(0, HEIGHT), random.integers(0, WIDTH)
    noise = grain()[random.integers(16), top : top + HEIGHT, left : left + WIDTH]
    file = io.BytesIO()
    Image.fromarray((large + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def draw(start: int, stop: int, home: Path, source: str) -> None:
    """Photos start to stop, one file of them or one folder a class; a part that is there is not drawn again."""
    name, made = f"{start // TOGETHER:06d}", home.with_name(f"{home.name}-drawn") / f"{start:09d}-{stop:09d}"
    if made.exists():
        return
    photos = [(f"class{number % CLASSES}/{name}/{number:09d}.jpg", jpeg(number)) for number in range(start, stop)]
    if source == "tar":
        with tarfile.open(home / f"{name}.tar", "w") as archive:
            for path, raw in photos:
                entry = tarfile.TarInfo(path)
                entry.size = len(raw)
                archive.addfile(entry, io.BytesIO(raw))
    else:
        for path, raw in photos:
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_bytes(raw)
    made.parent.mkdir(exist_ok=True)
    made.touch()


def drawn(count: int, work: Path, source: str) -> Path:
    """A folder of the first `count` photos."""
    home = work / f"{source}-{count}"
    home.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, TOGETHER)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        stops = [min(start + TOGETHER, count) for start in starts]
        list(pool.map(partial(draw, home=home, source=source), starts, stops))
    return home


# ---------------------------------------------------------------- in a process of its own


def held() -> tuple[int, int]:
    """Bytes that this process holds: (anonymous, resident)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


class Watch:
    """Stages of this process as they begin: each lasts until the next."""

    def __init__(self) -> None:
        self.stages: dict[str, list[float]] = {}
        self._name, self._since = "", (time.process_time(), time.monotonic())
        self.begin("start")
        threading.Thread(target=self._look, daemon=True).start()

    def begin(self, name: str) -> None:
        now = time.process_time(), time.monotonic()
        for place, (before, after) in enumerate(zip(self._since, now, strict=True)):
            if self._name:
                self.stages[self._name][place] += after - before
        self._name, self._since = name, now
        self.stages.setdefault(name, [0.0, 0.0, 0, 0])

    def _look(self) -> None:
        while True:
            stage = self.stages[self._name]
            stage[2:] = map(max, stage[2:], held())
            time.sleep(SAMPLE)


def watched(words: list[str], told: Path) -> None:
    """Run a command of bingo-compress in this process; what its stages took is in the file `told`."""
    from bingo_compress import cli, inventory, pipeline
    from bingo_compress.data import image_list
    from bingo_compress.features import near_copies
    from bingo_compress.runtime import console
    from bingo_compress.training import material

    watch = Watch()
    shown = console.bar

    @contextlib.contextmanager
    def bar(what: str, total: int, before: int = 0) -> Iterator[Any]:
        watch.begin(what.split(",")[0])
        with shown(what, total, before) as advance:
            yield advance
        watch.begin(f"after {what.split(',')[0]}")

    def named(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            watch.begin(name)
            found = work(*arguments, **settings)
            watch.begin(f"after {name}")
            return found

        return wrapped

    places: list[tuple[Any, str, str]] = [
        (material, "_scenes", "near-copies"),
        (pipeline, "make_bags", "bags"),
        (pipeline, "bag_facts", "facts of the bags"),
        (pipeline, "lessons_of", "targets"),
        (pipeline, "held_out_recall", "closing check"),
        (pipeline, "_look", "what the page shows"),
        (image_list, "keep", "list kept"),
        (inventory, "check", "check"),
        (near_copies, "find", "near-copies"),
    ]
    sys.argv = ["bingo-compress", *words]
    with contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch.object(console, "bar", bar))
        for module, name, stage in places:
            patched.enter_context(mock.patch.object(module, name, named(stage, getattr(module, name))))
        try:
            cli.main()
        finally:
            watch.begin("end")
            told.write_text(json.dumps(watch.stages))


# ---------------------------------------------------------------- the table


def road(count: int, work: Path, source: str, memory: str) -> dict[str, Any]:
    """{"stages": {command: {stage: Stage}}, "disk": {file or folder of the run: bytes}, ...} of `count` photos."""
    data, run = drawn(count, work, source), work / f"run-{source}-{count}"
    labelled = drawn(min(count, LABELLED), work, source)
    commands = {
        "check": ["check", "--data", data],
        "distill": ["distill", "--data", data, "--out", run, "--overwrite", "--no-report", "--memory", memory, *SMALL],
        "validate": ["validate", "--run", run, "--data", labelled, "--no-report"],
        "report": ["report", run],
    }
    commands["distill"] += ["--threads", "1"]
    stages: dict[str, dict[str, Stage]] = {}
    for name, words in commands.items():
        told = work / f"{name}.json"
        log = work / f"{source}-{count}-{name}.log"
        with log.open("w") as output:
            ended = subprocess.run(
                [sys.executable, __file__, "--watched", str(told), *map(str, words)],
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if ended.returncode:
            sys.exit(f"{name} of {count:,} images ended with {ended.returncode}: {log.read_text()[-2000:]}")
        stages[name] = {stage: Stage(*took) for stage, took in json.loads(told.read_text()).items()}
        total = sum(stage.cpu for stage in stages[name].values())
        print(f"    {count:,}: {name} {total:,.0f} CPU s", flush=True)
    photos = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
    disk = {"photos": photos} | {
        KEY.sub("", str(path.relative_to(run))): sum(each.stat().st_blocks * 512 for each in [path, *path.rglob("*")])
        for path in sorted([*run.iterdir(), *(run / "work").iterdir()])
        if path.name != "work"
    }
    return {"images": count, "stages": stages, "disk": disk}


def show(roads: list[dict[str, Any]]) -> None:
    """The tables of all sizes, smallest first."""
    counts = [road["images"] for road in roads]
    print("\nCPU seconds (wall), per 1,000 images of CPU seconds, memory at most: anonymous / resident")
    print(f"{'':40}" + "".join(f"{count:>38,}" for count in counts))
    for command, stages in roads[-1]["stages"].items():
        for name, last in stages.items():
            if last.cpu < 0.002 * sum(stage.cpu for stage in stages.values()):
                continue
            cells = ""
            for found in roads:
                stage = found["stages"][command].get(name)
                cells += (
                    f"{stage.cpu:10.1f} ({stage.wall:6.1f}) {1000 * stage.cpu / found['images']:7.3f}"
                    f"{stage.anonymous / 1e6:6.0f}/{stage.resident / 1e6:5.0f}"
                    if stage
                    else f"{'-':>38}"
                )
            print(f"{command + ': ' + name:40}{cells}")
    print("\nbytes on disk an image")
    for name in roads[-1]["disk"]:
        sizes = [found["disk"].get(name, 0) / found["images"] for found in roads]
        if sizes[-1] >= 1:
            print(f"{name:40}" + "".join(f"{size:>38,.0f}" for size in sizes))
    if len(roads) < 2:
        return
    before, last = roads[-2:]
    print(
        f"\ngrowth from {before['images']:,} to {last['images']:,} (1.00: linear), and hours further on at that growth"
    )
    print(f"{'':40}{'growth':>10}{'bytes/image':>14}" + "".join(f"{count:>16,}" for count in FURTHER))
    more = last["images"] / before["images"]
    for command, stages in last["stages"].items():
        for name, stage in stages.items():
            earlier = before["stages"][command].get(name)
            if earlier is None or stage.cpu < 0.002 * sum(each.cpu for each in stages.values()):
                continue
            power = max(np.log(stage.cpu / earlier.cpu) / np.log(more), 0) if earlier.cpu > 0.05 else 1.0
            held = (stage.anonymous - earlier.anonymous) / (last["images"] - before["images"])
            hours = [stage.cpu * (count / last["images"]) ** power / 3600 for count in FURTHER]
            print(
                f"{command + ': ' + name:40}{stage.cpu / earlier.cpu / more if earlier.cpu else 1:>10.2f}{held:>14,.0f}"
                + "".join(f"{each:>16,.1f}" for each in hours)
            )


def main() -> None:
    if sys.argv[1:2] == ["--watched"]:
        watched(sys.argv[3:], Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--source", choices=("folder", "tar"), default="folder")
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    roads = [road(count, chosen.work, chosen.source, chosen.memory) for count in sorted(chosen.images)]
    show(roads)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"\nthe most that any command was resident with: {peak / 1e9:.2f} GB, of --memory {chosen.memory}")
    if chosen.json:
        chosen.json.write_text(json.dumps(roads, indent=1) + "\n")


if __name__ == "__main__":
    main()
