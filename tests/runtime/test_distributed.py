"""Two processes by torchrun against one with the same global batch: same stages, same views, same losses, same
proof.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import CPU, Ran, clips, clustered, encoder, photos
from timm.layers import EvoNorm2dB0
from torch import nn
from torch.distributed.run import parse_args
from two_processes import (
    BATCHES,
    DISTILLED,
    HANDED_OVER,
    SHARDS,
    SLOW,
    STOP_AT,
    TUNED,
    command,
    copies,
    distill,
    validate,
)

from bingo_compress.data import listing, pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import finetune, held_out
from bingo_compress.features import extract, neighbours, teacher_pass
from bingo_compress.features.targets import TargetSpace, packed
from bingo_compress.models import trained
from bingo_compress.recipe import load_recipe
from bingo_compress.runtime import checkpoint, console, distributed, run_dir, signals
from bingo_compress.training import metrics
from bingo_compress.training.loader import own_share
from bingo_compress.training.material import halves, prepare
from bingo_compress.training.plan import plan_run

Bingo = Callable[..., Ran]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*TORCHRUN, *map(str, words)], capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos"), 12)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = photos(tmp_path_factory.mktemp("test"), 5, start=200)
    (made / "kind1" / "200.png").write_bytes(b"no image")
    return made


@pytest.fixture(scope="module")
def two(folder: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left every case of two_processes.py; one process began the run that they take
    over.
    """
    out = tmp_path_factory.mktemp("two")
    with mock.patch.multiple(extract, **BATCHES), mock.patch.multiple(teacher_pass, **SHARDS):
        (out / "began.json").write_text(
            json.dumps(command(*distill(folder, out / "taken", **HANDED_OVER), stop_at=STOP_AT))
        )
    clips(out / "clips")
    done = torchrun(Path(__file__).parents[1] / "two_processes.py", folder, labelled, out)
    assert (out / "joined.1.json").exists(), done.stderr[-5000:]
    (out / "stderr").write_text(done.stderr)
    (out / "status").write_text(str(done.returncode))
    return out


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process with the sizes of two_processes.py."""
    torch.set_num_threads(1)
    for owner, sizes in ((extract, BATCHES), (teacher_pass, SHARDS), (finetune, TUNED), (metrics, SLOW)):
        for name, size in sizes.items():
            monkeypatch.setattr(owner, name, size)


def did(two: Path, case: str) -> list[dict[str, Any]]:
    """What each of the two processes did."""
    return [json.loads((two / f"{case}.{rank}.json").read_text()) for rank in (0, 1)]


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_training(one: Path, two: Path) -> None:
    """Steps, losses, bags and students of two runs, within float error."""
    assert [line["step"] for line in lines(one)] == [line["step"] for line in lines(two)]
    for line, other in zip(lines(one), lines(two), strict=True):
        for key in ("loss", "intra", "inter", "feature", "space", "contrast", "distance"):
            if key in line:
                assert other[key] == pytest.approx(line[key], rel=2e-3, abs=2e-4), key
    bags, others = (checkpoint.load(run / "work" / "bags.safetensors")[0]["bags"] for run in (one, two))
    assert torch.equal(bags, others)
    students = [checkpoint.load(run / "student.safetensors")[0] for run in (one, two)]
    for name, value in students[0].items():
        if value.is_floating_point():
            assert torch.allclose(value, students[1][name], rtol=5e-3, atol=5e-3), name


# ---------------------------------------------------------------- distill


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bingo", "official", "coss", "disco", "known"])
@pytest.mark.usefixtures("small")
def test_two_processes_train_what_one_trains(case: str, two: Path, folder: Path, tmp_path: Path, bingo: Bingo) -> None:
    ran = bingo(*distill(folder, tmp_path / case, **DISTILLED[case]))
    assert ran.status == 0, ran.err
    first, second = did(two, case)
    assert (first["status"], second["status"]) == (0, 0), first["err"] + second["err"]
    assert ran.out.count("student after") == first["out"].count("student after") == 1 and not second["out"]
    same_training(tmp_path / case, two / case)


@pytest.mark.slow
def test_two_processes_fit_the_same_epochs_into_a_time(two: Path) -> None:
    first, second = did(two, "timed")
    assert (first["status"], second["status"]) == (0, 0), first["err"] + second["err"]
    assert first["shown"].keys() == second["shown"].keys()
    chosen = load_recipe(two / "timed" / "resolved.yaml")
    assert chosen.time == "" and 4 < chosen.epochs < 4.5  # of 33 images, 200 s a step of 8


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_two_processes_check_the_student_as_one_does(two: Path, folder: Path) -> None:
    first, second = did(two, "kept")
    assert (first["status"], second["status"]) == (0, 0), first["err"] + second["err"]
    assert len(first["checked"]) == len(set(first["checked"])) == 3
    assert first["checked"] == second["checked"]  # all have the same student
    run = run_dir.RunDir(two / "kept")
    recipe = load_recipe(run.as_run)
    models = replace(trained.build_models(recipe), student=trained.load_student(recipe, run.student))
    listed = listing.list_images(folder)
    plan = plan_run(models, len(listed.files), CPU)
    material = prepare(plan, models, listed, run.work)
    assert json.loads(run.summary.read_text())["neighbour_recall"] == held_out.held_out_recall(
        run, plan, models.student, material
    )
    checks = [line["neighbour_recall"] for line in lines(run.path) if "neighbour_recall" in line]
    assert len(checks) == 3
    choosing, reporting = halves(material, recipe)
    # The log rounds.
    assert max(checks) == pytest.approx(held_out.recall_check(material, choosing, CPU)(models.student), abs=1e-6)
    assert (
        json.loads(run.summary.read_text())["neighbour_recall"]["queries"]
        == len(reporting)
        == len(material.held) - len(choosing)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_signal_to_one_process_stops_both_after_the_same_step_with_a_save(two: Path) -> None:
    first, second = did(two, "stopped")
    assert (first["status"], second["status"]) == (143, 143)
    assert "the same command with --resume" in first["err"] and not second["err"]
    assert f"asked to stop: saved at step {STOP_AT + 1} of 18" in first["out"]
    assert list(first["shown"]) == list(second["shown"]) == [str(step) for step in range(STOP_AT + 1)]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_another_number_of_processes_goes_on_and_shows_each_image_once_an_epoch(
    two: Path, folder: Path, tmp_path: Path
) -> None:
    alone = command(*distill(folder, tmp_path / "alone", **HANDED_OVER))
    one_then_two = [json.loads((two / "began.json").read_text()), *did(two, "taken")]
    two_then_one = [*did(two, "stopped"), command(*distill(folder, two / "stopped", **HANDED_OVER), "--resume")]
    assert [part["status"] for part in (alone, *one_then_two, *two_then_one)] == [0, 143, 0, 0, 143, 143, 0]
    for parts in ([alone], one_then_two, two_then_one):
        shown = {epoch: [] for epoch in range(3)}
        for part in parts:
            for step, anchors in part["shown"].items():
                shown[int(step) // 6] += anchors
        assert all(sorted(shown_once) == list(range(36)) for shown_once in shown.values())
    first, second = (part["seeds"] for part in did(two, "stopped"))
    whole = {int(step): seed for step, seed in alone["seeds"].items()}
    assert all(
        whole[int(step)] == seed for part in (first, did(two, "taken")[0]["seeds"]) for step, seed in part.items()
    )
    assert not set(second.values()) & set(whole.values())  # each process has masks of its own
    for name in ("taken", "stopped"):
        assert lines(two / name)[-1]["loss"] == pytest.approx(lines(tmp_path / "alone")[-1]["loss"], rel=2e-3)


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(two: Path) -> None:
    assert int((two / "status").read_text()) != 0
    said = (two / "stderr").read_text()
    assert "expected a multiple of the 2 processes, found 7" in said
    assert "exitcode  : 2" in said
    assert not (two / "refused").exists()


# ---------------------------------------------------------------- the other stages


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_two_processes_prove_what_one_proves(
    two: Path, folder: Path, labelled: Path, tmp_path: Path, bingo: Bingo
) -> None:
    first, second = did(two, "validate")
    assert (first["status"], second["status"]) == (0, 0), first["err"] + second["err"]
    ran = bingo(*validate(two / "kept", folder, labelled, tmp_path / "proof.json"))
    assert ran.status == 0, ran.err
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert json.loads((two / "proof.json").read_text()) == proof
    assert (proof["protocol"]["bank_images"], proof["protocol"]["test_images"]) == (36, 14)
    assert "fine_tuned" in proof["rows"][1]["shots"]["2"]
    assert first["out"].count("linear probe by class") == 1 and not second["out"]


def test_torchrun_does_not_take_run_for_an_option_of_its_own(tmp_path: Path, bingo: Bingo) -> None:
    """On Python 3.11 it does (--run-path) where no -- comes first."""
    words = parse_args(
        [
            "--nproc-per-node",
            "2",
            "-m",
            "bingo_compress",
            "--",
            *validate(tmp_path, tmp_path, tmp_path, tmp_path / "proof.json"),
        ]
    )
    ran = bingo(*words.training_script_args)
    assert ran.status == 2 and "--run: expected the --out folder of `distill`" in ran.err


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_two_processes_share_the_pass_and_get_the_same(two: Path, folder: Path, tmp_path: Path) -> None:
    listed = listing.list_images(folder)
    whole = teacher_pass.run(encoder(), listed, pixel_store.build(listed, 40, tmp_path, CPU)[0], 2, 0.2, tmp_path, CPU)
    for rank in (0, 1):
        found = checkpoint.load(two / f"pass.{rank}.safetensors")[0]
        assert torch.equal(found["features"], whole.features) and torch.equal(found["views"], whole.views)
        assert torch.equal(found["packed"], packed(TargetSpace(None, None)(found["views"])))
        assert torch.allclose(found["close"], whole.closeness(torch.arange(len(whole.features))), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exact", "ivf"])
def test_two_processes_share_the_blocks_and_find_the_same(how: str, two: Path) -> None:
    expected = neighbours.mates(clustered(2000), 4, neighbours.Search(how))
    assert [process["blocks"] for process in did(two, how)] == [4, 3]
    for rank in (0, 1):
        found = checkpoint.load(two / f"{how}.{rank}.safetensors")[0]
        assert torch.equal(found["bags"], expected[0]) and torch.allclose(found["similar"], expected[1], atol=1e-6)


@pytest.mark.slow
def test_two_processes_know_the_same_files_and_each_reads_its_half(two: Path, folder: Path) -> None:
    one, (first, second) = listing.list_images(folder), did(two, "hashed")
    assert first["fingerprint"] == second["fingerprint"] == first["alone"] == one.fingerprint()
    assert first["stamps"] == second["stamps"] == one.contents.stamps.tolist()
    files = [one.place(index) for index in range(36)]
    assert (sorted(first["read"]), sorted(second["read"])) == (files[:18], files[18:])
    assert first["refused"].startswith(f"{folder}: expected the same files in every process, found 36 in process 0 and")
    assert "15 in process 1, whose names differ" in first["refused"] and second["refused"].endswith("start again")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "images"), [("bingo", 36), ("validate", 51)])
def test_a_command_of_two_processes_reads_each_file_once_to_hash_it(case: str, images: int, two: Path) -> None:
    first, second = (process["read"] for process in did(two, case))
    assert len({*first, *second}) == len(first) + len(second) == images
    assert abs(len(first) - len(second)) <= 2


@pytest.mark.slow
def test_two_processes_share_the_pairs_and_find_the_same_scenes(two: Path) -> None:
    one, (first, second) = copies(two / "clips" / "all"), did(two, "copies")
    assert first["scenes"] == second["scenes"] == one["scenes"] and len(set(one["scenes"])) < 60  # of 96 images
    assert sorted(first["compared"] + second["compared"]) == sorted(one["compared"])
    assert 0.3 < len(second["compared"]) / len(one["compared"]) <= 0.5  # of so few images a round has few blocks


@pytest.mark.slow
def test_rows_of_both_processes_are_joined_and_what_one_raises_both_raise(two: Path) -> None:
    first, second = did(two, "joined")
    assert (first.pop("stretch"), second.pop("stretch")) == ([0, 1, 2], [3, 4])
    assert first == second
    assert first == {
        "both": [[1, 2, 3, 4], [[0.5], [1], [1.5], [2]]],
        "second": [[4, 5, 6, 7], [[2], [2.5], [3], [3.5]]],
        "none": [],
        "alone": 1,
        "worlds": 2,
        "raised": ["of the second process", "of the first process"],
    }


# ---------------------------------------------------------------- one process


def test_one_process_is_the_identity() -> None:
    rows = torch.rand(4, 3)
    assert (distributed.rank(), distributed.world()) == (0, 1)
    assert distributed.rows(rows) is rows and distributed.with_gradients(rows) is rows
    assert distributed.mine([1, 2, 3]) == distributed.stretch([1, 2, 3]) == [1, 2, 3] and distributed.exchange("a") == [
        "a"
    ]
    assert distributed.from_first(lambda: 7) == 7 and distributed.joined([]) == []
    (joined,) = distributed.joined([rows[:3]] if number else [rows[3:]] for number in range(2))
    assert torch.equal(joined, rows[[3, 0, 1, 2]])
    assert own_share(4).tolist() == [0, 1, 2, 3]


def test_a_lost_process_is_told_in_one_line_and_other_errors_are_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bingo: Bingo
) -> None:
    gloo = RuntimeError("[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:24996: Connection reset by peer")
    assert not distributed.lost(gloo)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.lost(gloo) and distributed.lost(torch.distributed.DistNetworkError("timed out"))
    assert not distributed.lost(RuntimeError("shape mismatch")) and not distributed.lost(
        ConnectionResetError("Connection reset by peer")
    )

    def fail(*_: object) -> None:
        raise gloo

    monkeypatch.setattr("bingo_compress.inventory.check", fail)
    # They would hold for all that this process does later.
    for module, name in (
        (signals, "end_with_parent"),
        (console, "be_quiet"),
    ):
        monkeypatch.setattr(module, name, lambda: None)
    ran = bingo("check", "--data", tmp_path)
    assert (
        ran.status == 1
        and ran.err.startswith("process 1: error: another process of this run has ended")
        and ran.err.count("\n") == 1
    )


def test_a_norm_whose_statistics_processes_do_not_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    students = [nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)) for norm in (nn.BatchNorm2d, EvoNorm2dB0)]
    for student in students:
        distributed.refuse_unshared(student)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    distributed.refuse_unshared(students[0])
    with pytest.raises(BingoError, match="found EvoNorm2dB0 and 2 processes"):
        distributed.refuse_unshared(students[1])


def test_processes_share_a_batch_and_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 3)
    shares = (([0, 1], [1, 4], [1, 2]), ([2, 3], [2, 5], [3, 4]), ([4, 5], [3], [5]))
    for rank, (share, items, stretch) in enumerate(shares):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert own_share(6).tolist() == share
        assert distributed.mine([1, 2, 3, 4, 5]) == items
        assert distributed.stretch([1, 2, 3, 4, 5]) == stretch
