"""Array jobs: shares that are made apart join into the run that one process makes by itself, bit for bit."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CPU, TINY, Ran, flags, interrupted_at, photos, recipe
from safetensors.torch import load_file

import bingo_compress
from bingo_compress import embedding
from bingo_compress.data import pixel_store
from bingo_compress.errors import BingoError
from bingo_compress.features import extract, teacher_pass
from bingo_compress.models.trained import build_models
from bingo_compress.runtime import checkpoint
from bingo_compress.training.plan import plan_run, settle

Bingo = Callable[..., Ran]
JOBS = 4
SHORT = ("teacher", "student", "teacher_weights", "student_weights", "device", "threads")  # words of their own
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
    (made / "kind1" / "cut.png").write_bytes((made / "kind1" / "001.png").read_bytes()[:200])
    return made


def job(number: int, folder: Path, out: Path, **changes: Any) -> list[str]:
    """The words of an array job."""
    return ["embed", "--shard", f"{number}/{JOBS}", "--out", str(out), *flags(data=folder, **WORDS, **changes)]


def parts(run: Path) -> dict[str, bytes]:
    """Every file of both stages, by its path; of safetensors the tensors, for the facts beside them have no order."""
    stages = [path for stem in ("pixels", "teacher") for path in (run / "work").glob(f"{stem}-*/**/*")]
    return {str(path.relative_to(run)): content(path) for path in stages if path.is_file()}


def content(file: Path) -> bytes:
    if file.suffix != ".safetensors":
        return file.read_bytes()
    return b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(load_file(file).items()))


def same(one: Path, two: Path) -> None:
    """Pixels, teacher's files, bags, start and student of two runs, bit for bit."""
    assert parts(one) == parts(two) != {}
    for name in ("work/bags.safetensors", "work/start.safetensors", "student.safetensors"):
        found, other = load_file(one / name), load_file(two / name)
        assert found.keys() == other.keys() and all(torch.equal(found[key], other[key]) for key in found), name
    assert (
        json.loads((one / "summary.json").read_text())["run_id"]
        == json.loads((two / "summary.json").read_text())["run_id"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_four_jobs_join_into_the_run_that_one_process_makes(
    kind: str, folder: Path, tmp_path: Path, bingo: Bingo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With int8 the run packs the float16 views of the jobs, and drops them when it has packed all."""
    out, alone = tmp_path / "joined", tmp_path / "alone"
    rounds = [[bingo(*job(number, folder, out, stored_as=kind)) for number in (2, 0, 3, 1)] for _ in range(2)]
    assert [ran.status for made in rounds for ran in made] == [0] * 8, [ran.err for made in rounds for ran in made]
    last = [[ran.out.strip().splitlines()[-1] for ran in made] for made in rounds]
    assert last[0][0] == (
        "share 2/4 is decoded; 5 of 7 parts are left to others; when all are decoded, the same command again embeds"
    )
    goes_on = f"bingo-compress distill --out {out} --resume"
    # The last job to decode finds all decoded, and embeds at once.
    assert last[0][3] == (
        "share 1/4 is embedded; 13 of 18 parts are left to others; when all are embedded, the run goes on with:"
        f" {goes_on}"
    )
    assert last[1][2:] == [f"all shares are embedded; next: {goes_on}"] * 2
    before = parts(out)
    with monkeypatch.context() as patch:
        for owner, name in ((pixel_store, "_fill"), (teacher_pass, "_embedded")):
            patch.setattr(owner, name, lambda *_: pytest.fail("made again"))
        assert bingo(*job(0, folder, out, stored_as=kind)).out.strip().splitlines()[-1] == last[1][3]
        ran = bingo("distill", "--out", out, "--resume")
    assert ran.status == 0, ran.err
    gone = {Path(name).name[:5] for name, _ in before.items() - parts(out).items()}
    assert gone == ({"views"} if kind == "int8" else set())
    by_itself = bingo("distill", "--out", alone, *flags(data=folder, stored_as=kind, **WORDS))
    assert by_itself.status == 0, by_itself.err
    same(out, alone)


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_packs_the_views_of_jobs_goes_on(
    folder: Path, tmp_path: Path, bingo: Bingo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is packed is not packed again; the teacher is asked for the one shard that was damaged meanwhile."""
    out, alone, words = tmp_path / "run", tmp_path / "alone", flags(data=folder, stored_as="int8", **WORDS)
    assert bingo("embed", "--shard", "0/1", "--out", out, *words).status == 0
    with interrupted_at(monkeypatch, teacher_pass, "packed", 5):
        assert bingo("distill", "--out", out, "--resume").status == 130
    file = next(out.glob("work/teacher-*/views.f16"))
    content = file.read_bytes()
    file.write_bytes(content[:-8] + bytes(8))
    asked, real = [], teacher_pass._embedded
    with monkeypatch.context() as patch:
        patch.setattr(teacher_pass, "_embedded", lambda *given: asked.append(1) or real(*given))
        ran = bingo("distill", "--out", out, "--resume")
    assert ran.status == 0 and "are damaged and are made again" in ran.out and len(asked) == 1, ran.err
    assert not list(file.parent.glob("views*"))
    assert bingo("distill", "--out", alone, *words).status == 0
    same(out, alone)


def test_jobs_count_views_that_will_be_packed_in_both_forms_on_the_disk(
    folder: Path, tmp_path: Path, bingo: Bingo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_run(build_models(settle(recipe(data=str(folder), stored_as="int8"))), 25, CPU)
    each = plan.stored_bytes + 2 * 2 * plan.teacher.embedding  # two views of two bytes a number beside them
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=25 * plan.stored_bytes))
    ran = bingo(*job(0, folder, tmp_path / "run", stored_as="int8"))
    assert ran.status == 2 and f"the teacher's embeddings needs {round(25 * each * 1.02):,} bytes" in ran.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_jobs_at_the_same_time_and_more_than_there_are_shards_join_as_well(
    tmp_path: Path,
) -> None:
    """Each job works in the middle of another: before its claim, its pixels, its embeddings are whole."""
    out, jobs, folder = tmp_path / "joined", 7, photos(tmp_path / "photos", 2)  # six parts of the teacher's pass
    words = {key: value for key, value in TINY.items() if key in SHORT} | {"data": folder, "out": out}
    rest = {key: value for key, value in TINY.items() if key not in SHORT} | WORDS | {"bag_size": 1, "batch_size": 4}
    waiting = list(range(jobs))

    def work(number: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((checkpoint, "save"), (pixel_store, "_fill"), (teacher_pass, "_embedded")):
                real = getattr(owner, name)

                def between(*given: Any, real: Any = real, **named: Any) -> Any:
                    if waiting:
                        work(waiting.pop())
                    return real(*given, **named)

                patch.setattr(owner, name, between)
            left.append(bingo_compress.embed(shard=f"{number}/{jobs}", settings=rest, progress=False, **words))

    for _ in range(2):
        waiting, left = list(range(jobs)), []
        while waiting:
            work(waiting.pop())
        assert len(left) == jobs
    assert left[-1].embedded
    assert not list(out.rglob(".*"))
    for settings, place in ((rest, out), (rest, tmp_path / "alone")):
        bingo_compress.distill(
            settings=settings, report=False, progress=False, resume=place == out, **words | {"out": place}
        )
    same(out, tmp_path / "alone")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shard", "4/4"], "--shard: expected I/N, job I of N counted from 0, for example 0/4 to 3/4; found '4/4'"),
        (["--shard", "1"], "found '1'"),
        (["--shard", "-1/4"], "found '-1/4'"),
        (["--shard", "0/0"], "found '0/0'"),
        (["--views", "online"], "--views online: expected stored views"),
        (["--epochs", "0", "--time", "1h"], "expected epochs, found a time"),
    ],
)
def test_what_is_no_share_of_a_run_is_refused_at_once(
    words: list[str], said: str, folder: Path, tmp_path: Path, bingo: Bingo
) -> None:
    ran = bingo(*job(0, folder, tmp_path / "run"), *words)
    assert ran.status == 2 and said in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_torchruns_processes_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BingoError, match="found 2 of torchrun's; start one job a GPU"):
        bingo_compress.embed(data=folder, teacher="test_resnet", student="test_vit", shard="0/4", out=tmp_path / "run")


@pytest.mark.slow
def test_a_job_of_another_run_is_refused_and_takes_nothing_away(
    folder: Path, tmp_path: Path, bingo: Bingo, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert bingo(*job(0, folder, out)).status == 0
    before = parts(out)
    other = bingo(*job(1, folder, out, bag_size=2))
    assert other.status == 2 and f"--out: {out} was begun as another run; what differs: bag_size: 3 -> 2;" in other.err
    # Two that begin at once: the one that finds no recipe yet finds what the other has claimed.
    (out / "recipe.yaml").unlink()
    other = bingo(*job(1, folder, out, bag_size=2))
    assert other.status == 2 and "what differs: bag_size (3 -> 2);" in other.err
    with monkeypatch.context() as patch:
        patch.setitem(embedding.FORMATS, "pixels", 99)
        assert "what differs: pixels (5 -> 99)" in bingo(*job(1, folder, out)).err
    (folder / "kind1" / "000.png").write_bytes((folder / "kind2" / "000.png").read_bytes())
    for words in (job(1, folder, out), job(0, folder, out)):
        other = bingo(*words)
        assert other.status == 2 and "what differs: images;" in other.err
    other = bingo(*job(1, folder, folder))
    assert other.status == 2 and "--out: expected a run or no folder" in other.err
    ran = bingo("distill", "--resume", "--out", out, *flags(data=folder, **WORDS))
    assert ran.status == 2 and "begun.safetensors is of another run; what differs: images" in ran.err
    assert parts(out) == before


@pytest.mark.slow
def test_a_share_has_one_writer_and_a_run_none_beside_its_jobs(folder: Path, tmp_path: Path, bingo: Bingo) -> None:
    out = tmp_path / "run"
    assert bingo(*job(0, folder, out)).status == 0
    for file, kind, words in (
        ("writer-0-of-4.json", fcntl.LOCK_EX, job(0, folder, out)),
        ("writer.json", fcntl.LOCK_EX, job(0, folder, out)),
        ("writer.json", fcntl.LOCK_SH, ["distill", "--out", str(out), "--resume"]),
    ):
        with (out / "work" / file).open() as handle:
            fcntl.flock(handle, kind)
            assert "is being written by another process" in bingo(*words).err
            assert bingo(*job(1, folder, out)).status == (2 if words[0] == "embed" and file == "writer.json" else 0)


@pytest.mark.slow
def test_a_share_that_was_damaged_is_made_again_by_its_own_job(folder: Path, tmp_path: Path, bingo: Bingo) -> None:
    out, words = tmp_path / "run", ["embed", "--shard", "0/1", "--out", str(tmp_path / "run"), *flags(data=folder)]
    assert bingo(*words).status == 0
    before = parts(out)
    for name in ("pixels", "teacher"):
        file = next(out.glob(f"work/{name}-*/*.{'u8' if name == 'pixels' else 'f16'}"))
        file.write_bytes(bytes(1) * 8 + file.read_bytes()[8:])
    assert "is damaged" in (ran := bingo(*words)).out and ran.out.endswith("--resume\n"), ran.err
    assert parts(out) == before
