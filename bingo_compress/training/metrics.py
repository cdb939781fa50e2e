"""What a run says of itself: losses, rate, memory and the share of time of each part, a JSON line at a time."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import profile, schedule, supported_activities

from bingo_compress.runtime import console
from bingo_compress.runtime.devices import peak_memory
from bingo_compress.runtime.run_dir import write_text

WARM, TRACED = 5, 10

LOG_SECONDS = 5.0
PARTS = ("pixels", "augment", "teacher", "student", "loss", "wait")
SAID = ("student", "loss", "wait")


class Meter:
    """Seconds by part. On a GPU they are the device's, between two events: nothing is waited for until they are read.

    Parts run side by side (the next batch is made while the student works), so that their shares of the wall time may
    sum to more than one.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._done: list[tuple[str, float]] = []  # appended to by two threads: list.append is atomic
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time of the block as `part`'s."""
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((part, start, end))
        else:
            began = time.perf_counter()
            yield
            self._done.append((part, time.perf_counter() - began))

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading; what the GPU has not finished is left for the next."""
        seconds = dict.fromkeys(PARTS, 0.0)
        done, self._done = self._done, []
        events, self._events = self._events, []
        for part, spent in done:
            seconds[part] += spent
        for part, start, end in events:
            if end.query():
                seconds[part] += start.elapsed_time(end) / 1000
            else:
                self._events.append((part, start, end))
        return seconds


class Log:
    """Losses summed on the device and read only when a line is due, so that the GPU is not waited for in every step.

    begun: steps taken before. settled: steps until the queue is full, before which a loss compares with no other.
    steps: taken since; poisoned: the first step (from 1) whose loss was not finite, a tensor on the device, -1: none.
    """

    def __init__(self, path: Path | None, device: torch.device, meter: Meter, begun: int, settled: int) -> None:
        self._path = path
        self._begun = begun
        self._settled = settled
        self._means = _means(path, settled) if path is not None and path.exists() else []
        self.poisoned = torch.full((), -1, device=device)
        self._device = device
        self._meter = meter
        self._start = time.monotonic()
        self.total = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._since = time.monotonic()

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        """One step's losses, and how many student views it saw."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self._steps += 1
        self.steps += 1
        self._images += images
        bad = (self.poisoned < 0) & ~losses["loss"].isfinite()
        self.poisoned = torch.where(bad, self._begun + self.steps, self.poisoned)

    def due(self) -> bool:
        """Whether the last line is LOG_SECONDS old."""
        return time.monotonic() - self._since >= LOG_SECONDS

    def write(self, step: int, epoch: int, lr: float, **scored: float) -> tuple[float, str]:
        """Append one line of means since the last one, and what was scored; images_per_s counts student views of all
        processes.

        Returns the mean loss, and what to say of it and of the time.
        """
        means = {name: float(value) / self._steps for name, value in self._sums.items()}
        now = time.monotonic()
        wall = max(now - self._since, 1e-9)
        spent = self._meter.read()
        for part, seconds in spent.items():
            self.total[part] += seconds
        shares = {part: seconds / wall for part, seconds in spent.items()}
        line = {
            "step": step,
            "epoch": epoch,
            **means,
            **scored,
            "lr": lr,
            "images_per_s": self._images / wall,
            **{f"share_{part}": share for part, share in shares.items()},
            "memory": peak_memory(self._device),
            "seconds": now - self._start,
        }
        rounded = {key: _short(value) for key, value in line.items()} | {"time": round(time.time(), 3)}
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(rounded) + "\n")
        self._clear()
        if step > self._settled:
            self._means.append(means["loss"])
        parts = ", ".join(f"{part} {shares[part]:.0%}" for part in SAID)
        return means["loss"], f"{_said(means['loss'], self._means)}; time: {parts}"

    def describe(self) -> str:
        """One line: the share of the wall time by part, of the whole loop."""
        wall = max(time.monotonic() - self._start, 1e-9)
        parts = ", ".join(f"{part} {self.total[part] / wall:.0%}" for part in PARTS)
        return (
            f"share of the time: {parts} (parts run side by side); peak memory {peak_memory(self._device) / 1e9:.2f} GB"
        )


def _means(metrics: Path, settled: int) -> list[float]:
    """The losses that `metrics` has of steps after `settled`."""
    lines = (json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if line["step"] > settled and line["loss"] is not None]


def _said(loss: float, means: Sequence[float]) -> str:
    """The loss as a share of the first that it compares with, and its curve since."""
    if not means:
        return f"loss {loss:.3f} while the queue fills"
    if len(means) < 2 or not means[0]:
        return f"loss {loss:.3f}"
    return f"loss {console.sparkline(means)} {loss / means[0]:.0%} of its first".replace("  ", " ")


def _short(value: float) -> float | None:
    """Six digits; None (JSON's null) for what JSON has no number for."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that will be run again."""
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(metrics, "".join(line for line in lines if _is_until(line, step)))


def _is_until(line: str, step: int) -> bool:
    """Whether a line is whole, ours, and of a step up to `step`."""
    try:
        return line.endswith("\n") and bool(json.loads(line)["step"] <= step)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def seconds_of(metrics: Path) -> float:
    """Seconds that the loop ran for the steps that stand in `metrics`, over all its interruptions: each line tells
    those since the loop was started.
    """
    total, began, last = 0.0, math.nan, 0.0
    for line in metrics.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        start = found["time"] - found["seconds"]
        if not abs(start - began) < 1:
            total, began = total + last, start
        last = found["seconds"]
    return float(total + last)


@contextmanager
def profiled(wanted: bool, path: Path) -> Iterator[Callable[[], None]]:
    """Call the yielded function after every step: steps WARM to WARM + TRACED go into the trace `path`. Does nothing
    unless `wanted`.
    """
    if not wanted:
        yield lambda: None
        return

    written: list[Path] = []

    def write(tracer: profile) -> None:
        written.append(path)
        tracer.export_chrome_trace(str(path))
        console.say(f"trace of {TRACED} steps: {path} (open it in https://ui.perfetto.dev or chrome://tracing)")

    steps = schedule(wait=0, warmup=WARM, active=TRACED, repeat=1)
    with profile(activities=supported_activities(), schedule=steps, on_trace_ready=write) as tracer:
        yield tracer.step
    if not written:
        console.say(f"no trace: --profile needs {WARM + TRACED} steps in one go, and this run took fewer")
