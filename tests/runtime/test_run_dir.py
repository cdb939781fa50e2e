"""The run folder: files appear whole or not at all, and nothing that is not ours is deleted."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors

from bingo_compress.errors import BingoError
from bingo_compress.runtime.run_dir import (
    UMASK,
    RunDir,
    atomic,
    drop_stale,
    is_full,
    need_space,
    open_finished,
    open_new,
    stage_key,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def a_run(path: Path) -> RunDir:
    """A folder as a finished run leaves it, with a file of the user's in it."""
    run = open_new(path, resume=False, overwrite=False)
    for file in (
        run.recipe,
        run.student,
        run.metrics,
        run.quarantine,
        run.summary,
        run.start,
        run.checkpoint,
        path / "notes.txt",
    ):
        file.write_text(file.name)
    run.export.mkdir()
    (run.export / "student.onnx").write_text("x")
    (run.work / "pixels-1.u8").write_text("x")
    return run


# ---------------------------------------------------------------- atomic


def test_atomic_replaces_the_file_when_the_block_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with atomic(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
        assert temporary.parent == tmp_path and temporary != file
    assert file.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_atomic_keeps_the_old_file_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")

    def stopped_half_way() -> None:
        with atomic(file) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        stopped_half_way()
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_atomic_leaves_nothing_when_there_was_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.txt"):
        raise RuntimeError
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "a.txt"):
        pass  # a block that writes nothing is an error, not an empty file
    assert names(tmp_path) == []


def test_atomic_gives_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    with atomic(tmp_path / "a") as temporary:
        temporary.touch(0o600)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~UMASK


def test_write_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "é☃\n")
    assert (tmp_path / "a.txt").read_bytes() == "é☃\n".encode()


# ---------------------------------------------------------------- open_new


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    run = open_new(tmp_path / "a" / "b", resume=False, overwrite=False)
    assert run.work.is_dir()
    assert run.recipe == tmp_path / "a" / "b" / "recipe.yaml"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    for overwrite in (True, False):
        folder = tmp_path / str(overwrite)
        folder.mkdir()
        assert open_new(folder, resume=False, overwrite=overwrite).work.is_dir()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    before = names(tmp_path)
    with pytest.raises(BingoError, match=r"not empty.*--resume.*--overwrite"):
        open_new(tmp_path / "run", resume=False, overwrite=False)
    assert names(tmp_path) == before


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_a_file_is_refused(tmp_path: Path, resume: bool, overwrite: bool) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(BingoError, match="expected a folder, found the file"):
        open_new(file, resume=resume, overwrite=overwrite)
    assert file.read_text() == "mine"
    with pytest.raises(BingoError):
        open_new(file / "below", resume=False, overwrite=False)


def test_overwrite_of_a_foreign_folder_keeps_everything(tmp_path: Path) -> None:
    for name in (
        "student.safetensors",
        "metrics.jsonl",
        "export/model.onnx",
        "work/checkpoint.safetensors",
        "thesis.tex",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = names(tmp_path)
    with pytest.raises(BingoError, match=r"not a run of this program.*nothing in it is deleted"):
        open_new(tmp_path, resume=False, overwrite=True)
    assert names(tmp_path) == before


def test_overwrite_of_a_run_deletes_its_results_and_nothing_else(tmp_path: Path) -> None:
    a_run(tmp_path)
    open_new(tmp_path, resume=False, overwrite=True)
    assert names(tmp_path) == ["notes.txt", "work", "work/pixels-1.u8", "work/writer.json"]


def test_resume_deletes_nothing(tmp_path: Path) -> None:
    a_run(tmp_path)
    before = names(tmp_path)
    for overwrite in (False, True):
        open_new(tmp_path, resume=True, overwrite=overwrite)
        assert names(tmp_path) == before


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        with pytest.raises(BingoError, match=r"--resume: expected a run in .*found none"):
            open_new(tmp_path / name, resume=True, overwrite=False)
    assert names(tmp_path) == ["empty"]


def test_open_finished_says_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BingoError, match=r"found no recipe\.yaml"):
        open_finished(tmp_path)
    run = a_run(tmp_path / "run")
    assert open_finished(run.path).student == run.student
    run.student.unlink()
    with pytest.raises(BingoError, match=r"unfinished.*--resume"):
        open_finished(run.path)


# ---------------------------------------------------------------- keys, stale files, space


def test_stage_key_is_stable_and_tells_apart() -> None:
    key = stage_key(images="abc", side=112, layout=1)
    assert key == stage_key(layout=1, side=112, images="abc")
    # The hash is part of file names on users' disks: changing it would redo every stage of a run that is resumed.
    assert key == "bebf93633b00ecb2"
    others = [
        stage_key(images="abd", side=112, layout=1),
        stage_key(images="abc", side=113, layout=1),
        stage_key(images="abc", side=112),
    ]
    others.append(stage_key(images="abc", side="112", layout=1))
    assert len({key, *others}) == 5


def test_drop_stale_deletes_only_the_stem_and_not_what_is_kept(tmp_path: Path) -> None:
    for name in ("pixels-1.u8", "pixels-1.json", "pixels-2.u8", "views-1.f16", "pixels.txt"):
        (tmp_path / name).touch()
    (tmp_path / "pixels-3").mkdir()
    (tmp_path / "pixels-3" / "x").touch()
    drop_stale(tmp_path, "pixels", {"pixels-2.u8"})
    assert names(tmp_path) == ["pixels-2.u8", "pixels.txt", "views-1.f16"]


def test_need_space_names_what_how_much_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_000_000_000))
    need_space(tmp_path, 2_900_000_000, "the pixel store")
    with pytest.raises(BingoError) as caught:
        need_space(tmp_path, 2_990_000_000, "the pixel store")
    for part in (
        "the pixel store",
        "3,049,800,000 bytes",
        "3,000,000,000 are free",
        "49,800,000 are missing",
        str(tmp_path),
        "--out",
    ):
        assert part in str(caught.value)


def test_a_full_disk_is_told_from_other_errors_whoever_says_it() -> None:
    said = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_full(said) and is_full(OSError(28, "No space left on device")) and is_full(OSError(122, "Quota exceeded"))
    assert not is_full(OSError(5, "Input/output error")) and not is_full(ValueError("28"))


def test_need_space_asks_the_real_disk(tmp_path: Path) -> None:
    need_space(tmp_path, 0, "nothing")
    with pytest.raises(BingoError, match="no space"):
        need_space(tmp_path, 1 << 60, "an exabyte")
    assert os.listdir(tmp_path) == []
