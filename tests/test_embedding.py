"""Array jobs: shares that are made apart join into the run that one process makes by itself, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Ran, flags, photos
from safetensors.torch import load_file

import bingo_compress
from bingo_compress import embedding, pipeline
from bingo_compress.data import pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.features import extract, teacher_pass
from bingo_compress.runtime import run_dir

Bingo = Callable[..., Ran]
JOBS = 4
WORDS = {"lr": 0.01, "optimizer": "sgd", "search": "exact"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards so small that 25 photos, one of them damaged, make seven of each stage and view, the last one short."""
    for owner, sizes in ((pixel_store, {"SHARD": 4}), (teacher_pass, {"SHARD": 4}), (extract, {"BATCH": 2})):
        for name, size in sizes.items():
            monkeypatch.setattr(owner, name, size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = photos(tmp_path / "photos", 8)
    (made / "kind1" / "cut.png").write_bytes((made / "kind1" / "0.png").read_bytes()[:200])
    return made


def job(number: int, folder: Path, out: Path, **changes: Any) -> list[str]:
    """The words of an array job."""
    return ["embed", "--shard", f"{number}/{JOBS}", "--out", str(out), *flags(data=folder, **WORDS, **changes)]


def parts(run: Path) -> dict[str, bytes]:
    """Every file of both stages, by its path."""
    stages = [path for stem in ("pixels", "teacher") for path in (run / "work").glob(f"{stem}-*/*")]
    return {str(path.relative_to(run)): path.read_bytes() for path in stages}


def same(one: Path, two: Path) -> None:
    """Pixels, teacher's files, bags, start and student of two runs, bit for bit."""
    assert parts(one) == parts(two) != {}
    for name in ("work/bags.safetensors", "work/start.safetensors", "student.safetensors"):
        found, other = load_file(one / name), load_file(two / name)
        assert found.keys() == other.keys() and all(torch.equal(found[key], other[key]) for key in found), name
    assert json.loads((one / "summary.json").read_text())["run_id"] == json.loads(
        (two / "summary.json").read_text()
    )["run_id"]


def test_four_jobs_join_into_the_run_that_one_process_makes(
    folder: Path, tmp_path: Path, bingo: Bingo, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, alone = tmp_path / "joined", tmp_path / "alone"
    rounds = [[bingo(*job(number, folder, out)) for number in (2, 0, 3, 1)] for _ in range(2)]
    assert [ran.status for made in rounds for ran in made] == [0] * 8, [ran.err for made in rounds for ran in made]
    last = [[ran.out.strip().splitlines()[-1] for ran in made] for made in rounds]
    assert last[0][0] == (
        "share 2/4 is decoded; 5 of 7 parts are left to others; when all are decoded, the same command again embeds"
    )
    next_ = f"bingo-compress distill --out {out} --resume"
    # The last job to decode finds all decoded, and embeds at once.
    assert last[0][3] == (
        f"share 1/4 is embedded; 13 of 18 parts are left to others; when all are embedded, the run goes on with: {next_}"
    )
    assert last[1][2:] == [f"all shares are embedded; next: {next_}"] * 2
    before = parts(out)
    for owner, name in ((pixel_store, "_fill"), (teacher_pass, "_embedded")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("made again"))
    assert bingo(*job(0, folder, out)).out.strip().splitlines()[-1] == last[1][3]
    ran = bingo("distill", "--out", out, "--resume")
    assert ran.status == 0 and "cannot be used" in ran.out, ran.err
    assert parts(out) == before
    monkeypatch.undo()


