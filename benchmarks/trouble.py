"""torchrun under trouble: several processes undisturbed, one of them slowed, one of them lost and started again, and
more processes than shards. Seconds by stage, and whether the student is the same bit for bit.

    python benchmarks/trouble.py --data FOLDER --out FOLDER [--images 1029] [--processes 2 4]
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STOPPED, RUNNING = 0.08, 0.02  # seconds of each in turn: a fifth of the speed
STAGES = ("decode", "teacher", "near-copies", "bags", "train", "recall")


def work(times: Path, words: list[str]) -> None:
    """A worker: the command line with a clock around its stages, whose seconds are in TIMES.RANK.START.json."""
    from bingo_compress import cli, pipeline
    from bingo_compress.data import pixel_store
    from bingo_compress.features import teacher_pass
    from bingo_compress.training import material

    owners: list[tuple[Any, str]] = [(pixel_store, "build"), (teacher_pass, "run"), (material, "_scenes")]
    owners += [(pipeline, "make_bags"), (pipeline, "train"), (pipeline, "held_out_recall")]
    took: dict[str, float] = {}

    def clocked(stage: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = time.monotonic()
            try:
                return real(*given, **named)
            finally:
                took[stage] = took.get(stage, 0.0) + time.monotonic() - began
                start = os.environ["TORCHELASTIC_RESTART_COUNT"]
                times.with_name(f"{times.name}.{os.environ['RANK']}.{start}.json").write_text(json.dumps(took))

        return run

    for stage, (owner, name) in zip(STAGES, owners, strict=True):
        setattr(owner, name, clocked(stage, getattr(owner, name)))
    sys.argv = ["bingo-compress", *words]
    cli.main()


def workers_of(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for(there: Callable[[], Any], running: subprocess.Popen[str]) -> Any:
    while running.poll() is None:
        if found := there():
            return found
        time.sleep(0.02)
    raise SystemExit(f"over too early: {running.communicate()[0][-2000:]}")


def slow(running: subprocess.Popen[str], processes: int, _: Path) -> None:
    """The last worker stands still four fifths of the time."""
    workers = wait_for(lambda: (found := workers_of(running.pid)) and len(found) == processes and found, running)

    def hold() -> None:
        while running.poll() is None:
            for number, seconds in ((signal.SIGSTOP, STOPPED), (signal.SIGCONT, RUNNING)):
                try:
                    os.kill(workers[-1], number)
                except ProcessLookupError:
                    return
                time.sleep(seconds)

    threading.Thread(target=hold, daemon=True).start()


def lose(running: subprocess.Popen[str], processes: int, out: Path) -> None:
    """The last worker is killed after the first save."""
    wait_for((out / "work" / "checkpoint.safetensors").exists, running)
    os.kill(workers_of(running.pid)[-1], signal.SIGKILL)


def run(name: str, home: Path, processes: int, words: list[str], trouble: Callable[..., None] | None = None) -> Path:
    """A distillation under torchrun; its stages' seconds are printed."""
    out = home / name
    script = [sys.executable, __file__, "--work", str(home / f"{name}.times"), "distill", "--out", str(out), *words]
    # The shell asks anew at each start whether there is a run to go on with.
    again = f"exec {shlex.join(script)} $([ -f {shlex.quote(str(out))}/recipe.yaml ] && echo --resume)"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    began = time.monotonic()
    running = subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "--no-python", "sh", "-c", again],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if trouble:
        trouble(running, processes, out)
    told = running.communicate()[0]
    (home / f"{name}.log").write_text(told)
    if running.returncode:
        raise SystemExit(f"{name}: status {running.returncode}: {told[-3000:]}")
    seconds = time.monotonic() - began
    for file in sorted(home.glob(f"{name}.times.0.*.json")):
        took = json.loads(file.read_text())
        shown = " | ".join(f"{took[stage]:.1f}" if stage in took else "-" for stage in STAGES)
        print(f"| {name}, start {file.name.split('.')[-2]} | {shown} | {seconds:.1f} |", flush=True)
    return out


def difference(one: Path, two: Path) -> str:
    """Of two runs' teacher files, bags and students."""
    from safetensors.torch import load_file

    files = [sorted(path for path in run.glob("work/teacher-*/*.f16")) for run in (one, two)]
    seen = all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    (bags, others), (student, other) = (
        [load_file(run / name) for run in (one, two)] for name in ("work/bags.safetensors", "student.safetensors")
    )
    most = max(float((student[key] - other[key]).abs().max()) for key in student if student[key].is_floating_point())
    same = bool((bags["bags"] == others["bags"]).all())
    return (
        f"teacher's files {'the same' if seen else 'differ'}, bags {'the same' if same else 'differ'}, weights {most}"
    )


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--data", type=Path, required=True)
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("--images", type=int, default=1029)
    asked.add_argument("--few", type=int, default=100)
    asked.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    given = asked.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    pictures = sorted(path.resolve() for path in given.data.rglob("*") if path.suffix.lower() in (".jpg", ".png"))

    def words(images: int) -> list[str]:
        listed = given.out / f"{images}.txt"
        listed.write_text("".join(f"{path}\n" for path in pictures[:: len(pictures) // images][:images]))
        tiny = "--teacher test_resnet --student test_efficientnet --teacher-weights random --student-weights random"
        sizes = "--teacher-size 64 --image-size 32 --batch-size 64 --epochs 2 --views 2 --device cpu --threads 1"
        settings = "--set save_every_steps=5 --set search=exact --set target_dim=32 --set head_hidden=128 --no-report"
        return ["--data", str(listed), *f"{tiny} {sizes} {settings}".split()]

    print(f"| run | {' | '.join(STAGES)} | with start and end |\n|{'---|' * (len(STAGES) + 2)}")
    one = run("one", given.out, 1, words(given.images))
    for count in given.processes:
        calm, *others = (
            run(f"{count} {name}".strip(), given.out, count, words(given.images), trouble)
            for name, trouble in (("", None), ("slow", slow), ("lost", lose))
        )
        few = [run(f"{number} few", given.out, number, words(given.few)) for number in (1, count)]
        for a, b in ((one, calm), *((calm, other) for other in others), few):
            print(f"{a.name} and {b.name}: {difference(a, b)}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
