"""Two processes by torchrun against one with the same global batch: same stages, same views, same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, photos

from bingo_compress import checkpoint, distributed
from bingo_compress.batches import own_share

ROOT = Path(__file__).parent.parent


def distill(folder: Path, out: Path, processes: int, *settings: str) -> list[dict[str, float]]:
    """The lines of metrics.jsonl of a run."""
    command = [sys.executable, "-m", "bingo_compress"]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "-m",
            "bingo_compress",
        ]
    command += ["distill", "--data", str(folder), "--out", str(out)]
    for key, value in TINY.items():
        command += ["--set", f"{key}={value}"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("student after") == 1  # one process speaks
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos"), 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("method=bingo", "student=test_efficientnet"),
        ("method=bingo", "variant=official", "student=test_resnet", "views=online"),
        ("method=coss", "student=test_vit", "image_size=160"),
        ("method=disco", "student=test_byobnet"),
    ],
    ids=lambda settings: settings[0] + settings[1],
)
def test_two_processes_train_what_one_trains(settings: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    settings = (*settings, "optimizer=sgd", "lr=0.05")
    one, two = (distill(folder, tmp_path / str(count), count, *settings) for count in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for line, other in zip(one, two, strict=True):
        for key in ("loss", "intra", "inter", "feature", "space", "contrast", "distance"):
            if key in line:
                assert other[key] == pytest.approx(line[key], rel=2e-3, abs=2e-4), key
    bags, others = (checkpoint.load(tmp_path / str(count) / "work" / "bags.safetensors")[0]["bags"] for count in (1, 2))
    assert torch.equal(bags, others)
    students = [checkpoint.load(tmp_path / str(count) / "student.safetensors")[0] for count in (1, 2)]
    for name, value in students[0].items():
        if value.is_floating_point():
            assert torch.allclose(value, students[1][name], rtol=5e-3, atol=5e-3), name


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bingo_compress", "distill"]
    command += ["--data", str(folder), "--out", str(tmp_path / "run")]
    for key, value in {**TINY, "batch_size": 7}.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "expected a multiple of the 2 processes, found 7" in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_process_is_the_identity() -> None:
    rows = torch.rand(4, 3)
    assert (distributed.rank(), distributed.world()) == (0, 1)
    assert distributed.rows(rows) is rows and distributed.with_gradients(rows) is rows
    assert distributed.mine([1, 2, 3]) == [1, 2, 3] and distributed.exchange("a") == ["a"]
    assert distributed.from_first(lambda: 7) == 7 and distributed.in_turn(lambda: 8) == 8
    assert own_share(4).tolist() == [0, 1, 2, 3]


def test_processes_share_a_batch_and_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 3)
    for rank, (share, items) in enumerate((([0, 1], [1, 4]), ([2, 3], [2, 5]), ([4, 5], [3]))):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert own_share(6).tolist() == share
        assert distributed.mine([1, 2, 3, 4, 5]) == items
