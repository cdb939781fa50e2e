"""Signals, the lock of a run, and saves that are damaged: nothing is lost, and it is said."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Ran, flags, free_port, photos, recipe, untrained_run

from bingo_compress import pipeline
from bingo_compress.errors import BingoError
from bingo_compress.runtime import checkpoint, run_dir, signals
from bingo_compress.runtime.made_of import made_of
from bingo_compress.training import loop

MADE = made_of("training", images="ab")
COMPARE = ("compare", *flags(data="photos"), "--labels", "photos", "--out", "compared")


@pytest.fixture(autouse=True)
def handlers() -> object:
    """Leave the handlers of this process, and what they heard, as they were."""
    before = {number: signal.getsignal(number) for number in signals.STATUS}
    unraisable = sys.unraisablehook
    yield
    sys.unraisablehook = unraisable
    for number, handler in before.items():
        signal.signal(number, handler)
    signals._heard.clear()


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_is_running(number: int, status: int) -> None:
    def sleep() -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    signals.listen()
    with pytest.raises(signals.Stopped):
        sleep()
    assert signals.status() == status


def test_a_signal_while_python_itself_ends_leaves_no_traceback() -> None:
    """As torchrun sends it to those that have told already that another is lost."""
    code = (
        "import atexit, os, signal, sys\nfrom bingo_compress import cli\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "sys.argv = ['bingo-compress', '--version']\ncli.main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGTERM, "") and ended.stdout.startswith("bingo-compress")


def test_a_signal_in_the_end_of_a_generator_that_nobody_holds_is_not_lost() -> None:
    code = (
        "import os, signal, time\nfrom bingo_compress.runtime import signals\n"
        "def parts():\n    try:\n        yield 1\n    finally:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(0.001)\n"
        "signals.listen()\n"
        "try:\n    next(parts())\n    time.sleep(50)\n"
        "except signals.Stopped:\n    print('stopped', signals.status())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "stopped 143\n", "")


def test_inside_a_deferred_block_a_signal_waits_for_its_end() -> None:
    reached = []

    def work() -> None:
        with signals.deferred():
            assert not signals.heard()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert signals.heard() == signal.SIGTERM
            reached.append(True)

    signals.listen()
    with pytest.raises(signals.Stopped):
        work()
    assert reached == [True] and signals.status() == 143


def test_a_second_interrupt_leaves_at_once() -> None:
    code = (
        "import os, signal, time\nfrom bingo_compress.runtime import signals\nsignals.listen()\nwith"
        " signals.deferred():\n    os.kill(os.getpid(), signal.SIGINT)\n    os.kill(os.getpid(), signal.SIGINT)\n   "
        " time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == 130


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_worker_does_not_outlive_the_process_that_started_it() -> None:
    worker = (
        "import time; from bingo_compress.runtime import signals; signals.listen(); signals.end_with_parent();"
        " print('on', flush=True); time.sleep(60); print('outlived')"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None and parent.stdout.readline() == "on\n"
    parent.kill()
    assert parent.stdout.read() == ""  # the pipe ends with the worker, which holds it too


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_worker_that_waits_for_others_to_come_is_ended_by_a_signal(rank: str) -> None:
    worker = (
        "import torch; from bingo_compress.runtime import distributed, signals; signals.listen(); print('on',"
        " flush=True); distributed.start(torch.device('cpu'))"
    )
    place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    waiting = subprocess.Popen([sys.executable, "-c", worker], env={**os.environ, **place}, stdout=subprocess.PIPE)
    try:
        assert waiting.stdout is not None and waiting.stdout.readline() == b"on\n"
        time.sleep(1)
        waiting.terminate()
        assert waiting.wait(timeout=60) == -signal.SIGTERM
    finally:
        waiting.kill()
        waiting.communicate()


@pytest.mark.slow
def test_sigterm_in_training_saves_and_the_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, bingo: Callable[..., Ran]
) -> None:
    words = ["distill", *flags(data=photos(tmp_path / "photos", 12), epochs=25)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert bingo(*words, "--out", whole).status == 0
    command = [sys.executable, "-m", "bingo_compress", *map(str, words), "--out", str(cut)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (cut / "metrics.jsonl").exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    told, complained = running.communicate(timeout=60)
    assert (
        running.returncode == 143
        and "asked to stop: saved at step" in told
        and "the same command with --resume" in complained
    )
    step = checkpoint.load(cut / "work" / "checkpoint.safetensors")[1]["step"]
    assert isinstance(step, int) and 0 < step < 4 * 25
    assert bingo(*words, "--out", cut, "--resume").status == 0
    one, two = (checkpoint.load(run / "student.safetensors")[0] for run in (whole, cut))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


# ---------------------------------------------------------------- one writer


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bingo_compress.runtime import"
        " run_dir\nrun_dir.open_new(Path(sys.argv[1]), resume=False, overwrite=False)\nprint('mine',"
        " flush=True)\ntime.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "mine\n"
    with pytest.raises(BingoError, match=rf"being written by another process .*\"process\": {other.pid}"):
        run_dir.open_new(tmp_path / "run", resume=True, overwrite=False)
    (tmp_path / "run" / "recipe.yaml").write_text("teacher: resnet18\n")
    with pytest.raises(BingoError, match="being written by another process"):
        run_dir.open_new(tmp_path / "run", resume=False, overwrite=True)
    assert (tmp_path / "run" / "recipe.yaml").exists()  # of a run that goes on nothing is deleted
    other.kill()
    other.communicate()
    run = run_dir.open_new(tmp_path / "run", resume=True, overwrite=False)  # a killed owner owns nothing
    assert json.loads((run.work / "writer.json").read_text())["process"] == os.getpid()
    run_dir.open_new(tmp_path / "run", resume=True, overwrite=False)  # nor is this process in its own way


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("validate", "--run", "run", "--data", "photos"), ("export", "--run", "run"), COMPARE]
)
def test_what_writes_into_a_run_is_its_only_writer(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bingo: Callable[..., Ran]
) -> None:
    monkeypatch.chdir(tmp_path)
    untrained_run(tmp_path, 3)
    shutil.rmtree(tmp_path / "run" / "work")  # it may be deleted
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "compare.json").write_text("{}")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bingo_compress.runtime import run_dir\nfor name in"
        " sys.argv[1:]:\n    (Path(name) / 'work').mkdir()\n    run_dir.hold(Path(name), '--out')\nprint('mine',"
        " flush=True)\ntime.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, "run", "compared"], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "mine\n"
    before = sorted(tmp_path.rglob("*"))
    ran = bingo(*words)
    assert ran.status == 2 and "is being written by another process" in ran.err and f'"process": {other.pid}' in ran.err
    assert sorted(tmp_path.rglob("*")) == before
    other.kill()
    other.communicate()
    if words[0] == "validate":
        assert bingo(*words).status == 0


# ---------------------------------------------------------------- damaged saves


@pytest.fixture
def two_saves(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.safetensors"
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        tensors = {
            "a": torch.randn(40, 30, generator=generator),
            "b": torch.arange(7),
            "c": torch.ones(2, 3, dtype=torch.bfloat16),
            "d": torch.tensor(3.0),
        }
        checkpoint.save_keeping(
            path, tensors | {"e": torch.empty(0, 5), "f": torch.tensor([True, False])}, MADE, step=step, name="naïve"
        )
    return path


def test_the_newest_two_are_kept(two_saves: Path) -> None:
    assert checkpoint.load(two_saves, checked=True)[1]["step"] == 3
    assert checkpoint.load(checkpoint.before(two_saves), checked=True)[1]["step"] == 2
    assert sorted(path.name for path in two_saves.parent.iterdir()) == [
        "checkpoint-before.safetensors",
        "checkpoint.safetensors",
    ]


def test_two_are_kept_without_links_too(two_saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # FAT and exFAT

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save_keeping(two_saves, {"a": torch.ones(2)}, MADE, step=4)
    assert checkpoint.load_newest(two_saves)[1]["step"] == 4
    assert checkpoint.load(checkpoint.before(two_saves), checked=True)[1]["step"] == 3


def test_a_signal_while_a_save_is_read_is_no_damage(two_saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint._checksum
    monkeypatch.setattr(checkpoint, "_checksum", lambda *given: (os.kill(os.getpid(), signal.SIGTERM), real(*given))[1])
    signals.listen()
    with pytest.raises(signals.Stopped):
        checkpoint.load_newest(two_saves)


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_cut_or_flipped_save_is_noticed_and_the_one_before_is_used(
    how: str, two_saves: Path, printed: StringIO
) -> None:
    content = two_saves.read_bytes()
    draw = torch.Generator().manual_seed(1)
    for number in range(50):
        place = int(torch.randint(len(content), (1,), generator=draw))
        # Half of the flips go into the header, which is a small part of the file.
        place = place % (8 + int.from_bytes(content[:8], "little")) if how == "flipped" and number % 2 else place
        damaged = (
            content[:place]
            if how == "cut"
            else content[:place] + bytes([content[place] ^ 1 << number % 8]) + content[place + 1 :]
        )
        two_saves.write_bytes(damaged)
        tensors, facts = checkpoint.load_newest(two_saves)
        assert facts["step"] == 2 and tensors["a"].shape == (40, 30), (how, place)
    assert printed.getvalue().count("going on from the save before it") == 50
    checkpoint.before(two_saves).write_bytes(b"")
    with pytest.raises(BingoError, match="cannot be read"):
        checkpoint.load_newest(two_saves)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("apart", "settings", "expected"),
    [(30.0, {"save_every_steps": 3}, [3, 6, 9]), (0.0, {}, [5, 9]), (30.0, {"save_every_minutes": 10}, [9])],
)
def test_saves_come_every_so_many_steps_and_every_epoch(
    apart: float, settings: dict[str, Any], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EPOCH_SAVES_APART", apart)
    steps: list[object] = []
    real = checkpoint.save_keeping
    monkeypatch.setattr(
        checkpoint,
        "save_keeping",
        lambda path, tensors, made, **facts: (steps.append(facts["step"]), real(path, tensors, made, **facts)),
    )
    data = photos(tmp_path / "photos", 12)
    pipeline.run_distill(recipe(data=str(data), **settings), tmp_path / "run")
    assert steps == expected
