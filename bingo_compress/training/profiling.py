"""--profile: a trace of a few steps, for chrome://tracing or Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule, supported_activities

from bingo_compress.runtime import console

WARM, TRACED = 5, 10


@contextmanager
def profiled(wanted: bool, path: Path) -> Iterator[Callable[[], None]]:
    """Call the yielded function after every step: steps WARM to WARM + TRACED go into the trace `path`. Does nothing unless `wanted`."""
    if not wanted:
        yield lambda: None
        return

    def write(tracer: profile) -> None:
        tracer.export_chrome_trace(str(path))
        console.say(f"trace of {TRACED} steps: {path} (open it in https://ui.perfetto.dev or chrome://tracing)")

    steps = schedule(wait=0, warmup=WARM, active=TRACED, repeat=1)
    with profile(activities=supported_activities(), schedule=steps, on_trace_ready=write) as tracer:
        yield tracer.step
