"""A run in a tracker that people watch already: what metrics.jsonl says, and pictures of bags, by its own client."""

import importlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bingo_compress.errors import BingoError
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import RunDir

SECONDS = 5.0  # between two looks at metrics.jsonl
LOGGERS = ("tensorboard", "wandb", "mlflow")  # each the name of its module, and of the extra that brings it
UNTOLD = ("step", "time")

Pixels = NDArray[np.uint8]  # (H, W, 3)
Picture = Callable[[str, Pixels], None]


class Client(NamedTuple):
    """numbers: takes figures by name, and the step they are of; picture: takes a name and pixels; close: ends it."""

    numbers: Callable[[dict[str, float], int], None]
    picture: Picture
    close: Callable[[], None]


def refuse_absent(name: str) -> None:
    """Raise BingoError for a tracker that is not known, or whose client is not installed."""
    if name and name not in LOGGERS:
        raise BingoError(f"--logger: expected {', '.join(LOGGERS)}, found {name!r}")
    if name:
        try:
            importlib.import_module(name)
        except ImportError:
            raise BingoError(
                f"--logger {name}: expected its client, found no module {name}; pip install 'bingo-compress[{name}]'"
            ) from None


@contextmanager
def following(name: str, run: RunDir) -> Iterator[Picture]:
    """Tell the tracker `name` ("": none) every line of the run's metrics.jsonl, from the first on, while the block
    runs; yields what shows it a picture. A tracker that fails is said once and loses the run nothing.
    """
    if not name:
        yield lambda title, pixels: None
        return
    client, ended = _spared(lambda: _open(name, run)), threading.Event()
    thread = threading.Thread(target=_follow, args=(run.metrics, client, ended), daemon=True)
    thread.start()
    try:
        yield client.picture
    finally:
        ended.set()
        thread.join()
        client.close()


def _open(name: str, run: RunDir) -> Client:
    return {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[name](run)


def _tensorboard(run: RunDir) -> Client:
    from torch.utils.tensorboard import SummaryWriter

    folder = run.path / "tensorboard"
    # All lines are told again where a run goes on.
    for older in folder.glob("events.out.tfevents.*"):
        older.unlink()
    writer = SummaryWriter(str(folder))
    console.say(f"tensorboard --logdir {folder}")

    def numbers(figures: dict[str, float], step: int) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    def picture(title: str, pixels: Pixels) -> None:
        writer.add_image(title, pixels, dataformats="HWC")

    return Client(numbers, picture, writer.close)


def _wandb(run: RunDir) -> Client:
    import wandb

    seen = wandb.init(project="bingo-compress", name=run.path.name, dir=str(run.path))
    return Client(
        lambda figures, step: seen.log(figures, step=step),
        lambda title, pixels: seen.log({title: wandb.Image(pixels)}),
        seen.finish,
    )


def _mlflow(run: RunDir) -> Client:
    import mlflow

    mlflow.set_experiment("bingo-compress")
    client, here = mlflow.MlflowClient(), mlflow.start_run(run_name=run.path.name).info.run_id

    def numbers(figures: dict[str, float], step: int) -> None:
        mlflow.log_metrics(figures, step=step, run_id=here)

    def picture(title: str, pixels: Pixels) -> None:
        client.log_image(here, pixels, f"{title}.png")

    return Client(numbers, picture, mlflow.end_run)


def _spared(begin: Callable[[], Client]) -> Client:
    """The client that `begin` gives, but for its errors: the first is said, and from then on it is told nothing."""
    failed: list[str] = []

    def fail(error: Exception) -> None:
        failed.append(str(error))
        said = " ".join(str(error).split())[:200]
        console.complain(f"--logger: it failed ({type(error).__name__}: {said}); the run goes on without it")

    def kept(act: Callable[..., None]) -> Callable[..., None]:
        def once(*words: Any) -> None:
            if failed:
                return
            try:
                act(*words)
            except Exception as error:  # a tracker's own share no base class
                fail(error)

        return once

    try:
        client = begin()
    except Exception as error:
        fail(error)
        client = Client(_idle, _idle, _idle)
    return Client(kept(client.numbers), kept(client.picture), kept(client.close))


def _idle(*words: Any) -> None:
    pass


def _follow(metrics: Path, client: Client, ended: threading.Event) -> None:
    """Tell every whole line once; what is written before `ended` is told too."""
    last, over = -1, False
    while not over:
        over = ended.wait(SECONDS)
        for line in _lines(metrics):
            if line["step"] > last:
                last = line["step"]
                client.numbers(figures(line), last)


def _lines(metrics: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be written to, or not be there yet."""
    if not metrics.is_file():
        return []
    whole = metrics.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def figures(line: dict[str, Any]) -> dict[str, float]:
    """What of a line of metrics.jsonl is told: its numbers, those of one kind under one heading."""
    return {
        f"{'time' if key.startswith('share_') else 'run' if key in ('memory', 'seconds', 'images_per_s') else 'train'}"
        f"/{key.removeprefix('share_')}": value
        for key, value in line.items()
        if key not in UNTOLD and isinstance(value, int | float)
    }
