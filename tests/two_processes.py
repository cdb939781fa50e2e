"""What test_distributed.py asks of two processes, case after case in one start of them: torchrun two_processes.py DATA
TEST OUT.

Each case leaves its files in OUT; OUT/CASE.RANK.json is what its process did.
"""

import contextlib
import io
import json
import math
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers import CPU, clustered, encoder, flags, turned, unit

import bingo_compress.training.loop as loop
from bingo_compress import budget, cli
from bingo_compress.data import hashing, image_list, listing, pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import finetune
from bingo_compress.features import extract, near_copies, neighbours, targets, teacher_pass
from bingo_compress.features.targets import TargetSpace
from bingo_compress.models.encoder import weights_digest
from bingo_compress.runtime import checkpoint, distributed, signals
from bingo_compress.training import loader, metrics

BATCHES, SHARDS = {"BATCH": 4}, {"SHARD": 8}  # of embed and teacher_pass: so small that every process has a share
TUNED = {"TUNE_EPOCHS": 2, "TUNE_STEPS": 2}  # of finetune
SLOW = {"LOG_SECONDS": math.inf}  # of metrics: a line an epoch, however slow the machine is
BLOCKS = {"BLOCK": 300, "TILE": 130}  # of neighbours
DISTILLED: dict[str, dict[str, Any]] = {
    "bingo": {"method": "bingo", "student": "test_efficientnet", "lr": 0.005},
    "official": {"method": "bingo", "variant": "official", "student": "test_resnet", "views": "online"},
    "coss": {"method": "coss", "student": "test_vit", "image_size": 160},
    "disco": {"method": "disco", "student": "test_byobnet"},
    "known": {"student": "test_efficientnet", "head_first": 0.5, "backbone_lr": 0.3, "norms": "frozen"},
    "kept": {"student": "test_efficientnet", "keep_best": True, "epochs": 3, "hold_out": 0.25},
}


HANDED_OVER: dict[str, Any] = {"student": "test_resnet", "batch_size": 6, "hold_out": 0.0, "epochs": 3, "lr": 0.005}
STOP_AT = 8  # of 18 steps, 6 an epoch


def distill(data: Path, out: Path, **settings: Any) -> list[str]:
    """The words of a command. Crops from 20%: of larger ones, at these rates, rounding alone drifts apart sooner."""
    return [
        "distill",
        "--no-report",
        "--out",
        str(out),
        *flags(**{"data": data, "optimizer": "sgd", "lr": 0.05, "crop_scale_min": 0.2, **settings}),
    ]


def validate(run: Path, data: Path, test: Path, file: Path) -> list[str]:
    """The words of a command."""
    return [
        "validate",
        "--no-report",
        "--run",
        str(run),
        "--data",
        str(data),
        "--test",
        str(test),
        "--json",
        str(file),
        "--shots",
        "2",
        "--fine-tune",
    ]


@contextlib.contextmanager
def reads() -> Iterator[list[str]]:
    """The files that are read inside to hash them."""
    read, real = [], image_list.file_digest
    recorded = lambda file: (read.append(str(file)), real(file))[1]  # noqa: E731
    with mock.patch.object(image_list, "file_digest", recorded):
        yield read


def command(*words: str, stop_at: int | None = None) -> dict[str, Any]:
    """The command line in this process: its exit status, what it printed, the students it checked during training, and
    of each step that it trained the images that it showed as anchors and the seed of other random numbers; and the
    files that it read to hash them. stop_at: a step before which the last process gets a SIGTERM. The second process is
    one that would fit another target space.
    """
    out, err, checked, made, trained, seeds = io.StringIO(), io.StringIO(), [], {}, [], {}
    real, make, learning_rate = extract.store_features, loader.Maker.__call__, loop.learning_rate

    def recorded(student: Any, *rest: Any) -> torch.Tensor:
        checked.append(weights_digest(student))
        return real(student, *rest)

    def recorded_make(self: loader.Maker, step: int, bags: torch.Tensor) -> loader.Ready:
        ready = make(self, step, bags)
        made[step] = ready.anchors[loader.own_share(self.plan.schedule.batch_size)].tolist()
        return ready

    def recorded_rate(step: int, *rest: Any) -> float:
        trained.append(step)
        seeds[step] = torch.initial_seed()  # the one that a dropout draws by
        if step == stop_at and distributed.rank() == distributed.world() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(step, *rest)

    with contextlib.ExitStack() as stack:
        read = stack.enter_context(reads())
        stack.callback(signals._heard.clear)
        stack.enter_context(mock.patch.object(loader.Maker, "__call__", recorded_make))
        stack.enter_context(mock.patch.object(loop, "learning_rate", recorded_rate))
        stack.enter_context(mock.patch.object(sys, "argv", ["bingo-compress", *words]))
        stack.enter_context(mock.patch.object(distributed, "stop"))  # the next case goes on with the same processes
        stack.enter_context(mock.patch.object(extract, "store_features", recorded))
        if os.environ.get("RANK", "0") != "0":
            stack.enter_context(mock.patch.object(targets, "target_space", turned(targets.target_space)))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            cli.main()
        except SystemExit as stop:
            shown = {step: made[step] for step in trained}
            return {
                "status": stop.code,
                "out": out.getvalue(),
                "err": err.getvalue(),
                "checked": checked,
                "shown": shown,
                "seeds": seeds,
                "read": read,
            }
    raise AssertionError("the command line always exits")


def timed(data: Path, out: Path) -> dict[str, Any]:
    """A run of an hour, of which the second process measures steps twice as long as the first."""
    real = budget.rehearse

    def rehearse(*given: Any) -> tuple[float, float]:
        real(*given)
        return 0.0, 200.0 * (1 + distributed.rank())

    with mock.patch.multiple(budget, REHEARSED=0.0, rehearse=rehearse):
        return command(*distill(data, out / "timed", student="test_efficientnet", epochs=0, time="1h"))


def whole_pass(data: Path, out: Path) -> dict[str, Any]:
    """Features and views that this process got."""
    folder, work = listing.list_images(data), out / "pass"
    work.mkdir(exist_ok=True)
    store, _ = pixel_store.build(folder, 40, work, CPU)
    seen = teacher_pass.run(encoder(), folder, store, 2, 0.2, work, CPU)
    viewing = teacher_pass.Viewing(encoder(), folder, store, 0.2, CPU, of_features=False)
    kept = teacher_pass.with_packed_views(seen, viewing, 2, TargetSpace(None, None), seen.home)
    found = {"features": seen.features, "views": seen.views, "packed": kept.views, "close": kept.close}
    checkpoint.save(out / f"pass.{distributed.rank()}.safetensors", found)
    return {}


def search(how: str, out: Path) -> dict[str, Any]:
    """Mates that this process got, and how many blocks it made itself."""
    made, real = [], checkpoint.save
    recorded = lambda file, *rest, **facts: (made.append(file.name), real(file, *rest, **facts))  # noqa: E731
    with mock.patch.multiple(neighbours, **BLOCKS), mock.patch.object(checkpoint, "save", recorded):
        bags, similar = neighbours.mates(clustered(2000), 4, neighbours.Search(how, CPU, out / f"bags-{how}"))
    real(out / f"{how}.{distributed.rank()}.safetensors", {"bags": bags, "similar": similar})
    return {"blocks": sum(name.startswith("neighbours") for name in made)}


def hashed(data: Path, other: Path) -> dict[str, Any]:
    """What this process knows of files that it and others hashed, and which of them it read; what it says where the
    second process has other files; and what the first finds alone.
    """
    with reads() as read:
        folder = hashing.hashed(listing.list_images(data))
        found = {"fingerprint": folder.fingerprint(), "stamps": folder.contents.stamps.tolist()}
    named = listing.list_images((data, other)[distributed.rank()])
    try:
        hashing.hashed(named)
    except BingoError as error:
        found["refused"] = str(error)
    alone = distributed.from_first(lambda: hashing.hashed(listing.list_images(data)).fingerprint())
    return {**found, "alone": alone, "read": read}


def copies(data: Path) -> dict[str, Any]:
    """The scenes that this process got, and the pairs that it compared itself."""
    compared, real = [], near_copies._are_copies

    def recorded(look: near_copies.Look, pairs: torch.Tensor, alike: float) -> torch.Tensor:
        compared.extend(pairs.T.tolist())
        return real(look, pairs, alike)

    folder = listing.list_images(data)
    # As if the processors differed: it is the first process's neighbours that are compared.
    features = unit(len(folder.files), 8, seed=distributed.rank())
    with mock.patch.multiple(near_copies, PAIRS=5, _are_copies=recorded):
        scenes = near_copies.find(near_copies.of_folder(features, folder), near_copies.Limits(-1.0, 0.7))
    return {"scenes": scenes.tolist(), "compared": compared}


def joined() -> dict[str, Any]:
    """Rows of differing numbers from each process, from one alone and from none; and what only one process raises."""
    first = distributed.rank() == 0
    pair = lambda *rows: [torch.tensor(rows), torch.tensor(rows)[:, None] / 2]  # noqa: E731

    def failing() -> Iterator[list[torch.Tensor]]:
        yield pair(1)
        if not first:
            raise BingoError("of the second process")

    def alone() -> int:
        assert [part.tolist() for part in distributed.joined([pair(5)])] == [[5], [[2.5]]]  # nobody is waited for
        return distributed.world()

    def raised(work: Callable[[], object]) -> str:
        try:
            work()
        except BingoError as error:
            return str(error)
        raise AssertionError("nothing was raised")

    def fail() -> None:
        raise BingoError("of the first process")

    return {
        "both": [part.tolist() for part in distributed.joined([pair(1, 2), pair(3)] if first else [pair(4)])],
        "second": [part.tolist() for part in distributed.joined([] if first else [pair(4), pair(5, 6, 7)])],
        "none": distributed.joined([]),
        "stretch": list(distributed.stretch(range(5))),
        "alone": distributed.from_first(alone),
        "worlds": distributed.world(),
        "raised": [raised(lambda: distributed.joined(failing())), raised(lambda: distributed.from_first(fail))],
    }


def main(data: Path, test: Path, out: Path) -> None:
    """All cases; then, as torchrun -m bingo_compress does it, one that is refused: the processes end as a command's."""
    distributed.start(CPU)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        **{name: lambda name=name: command(*distill(data, out / name, **DISTILLED[name])) for name in DISTILLED},  # type: ignore[misc]
        "stopped": lambda: command(*distill(data, out / "stopped", **HANDED_OVER), stop_at=STOP_AT),
        "taken": lambda: command(*distill(data, out / "taken", **HANDED_OVER), "--resume"),
        "timed": lambda: timed(data, out),
        "validate": lambda: command(*validate(out / "kept", data, test, out / "proof.json")),
        "pass": lambda: whole_pass(data, out),
        "exact": lambda: search("exact", out),
        "ivf": lambda: search("ivf", out),
        "copies": lambda: copies(out / "clips" / "all"),
        "hashed": lambda: hashed(data, test),
        "joined": joined,
    }
    with (
        mock.patch.multiple(extract, **BATCHES),
        mock.patch.multiple(metrics, **SLOW),
        mock.patch.multiple(teacher_pass, **SHARDS),
        mock.patch.multiple(finetune, **TUNED),
    ):
        for name, case in cases.items():
            (out / f"{name}.{distributed.rank()}.json").write_text(json.dumps(case()))
    sys.argv = ["bingo-compress", *distill(data, out / "refused", batch_size=7)]
    runpy.run_module("bingo_compress", run_name="__main__")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
