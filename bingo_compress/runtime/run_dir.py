"""The names of everything in a run folder, and the only ways to write there."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bingo_compress.errors import BingoError

UMASK = os.umask(0o022)
os.umask(UMASK)
HOST = socket.gethostname()[:64]  # in containers every program may be process 1


class RunDir:
    """A run folder: results on top, `work/` for what later stages and --resume need (safe to delete after the run)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"  # as it was asked for
        self.resolved = path / "resolved.yaml"  # as it was run
        self.student = path / "student.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.quarantine = path / "quarantine.csv"
        self.summary = path / "summary.json"
        self.validation = path / "validation.json"
        self.timm = path / "timm"  # the student as timm.create_model reads it
        self.report = path / "report.html"
        self.export = path / "export"
        self.work = path / "work"
        self.start = self.work / "start.safetensors"
        self.bags = self.work / "bags.safetensors"
        self.begun = self.work / "begun.safetensors"  # by array jobs, and from what
        self.looks = self.work / "looks.safetensors"
        self.mistakes = self.work / "mistakes.safetensors"
        self.checkpoint = self.work / "checkpoint.safetensors"
        self.before = self.work / "checkpoint-before.safetensors"

    @property
    def as_run(self) -> Path:
        """The recipe with nothing left open; an earlier version's run has its recipe.yaml alone."""
        return self.resolved if self.resolved.is_file() else self.recipe


def open_new(path: Path, *, resume: bool, overwrite: bool, stages: Sequence[str] = ()) -> RunDir:
    """The folder for a run that is to be written. stages: with `overwrite`, what these made goes too, which they else
    find again; by the beginnings of names in work/. Raises BingoError if something is in it and neither flag says what
    to do.
    """
    run = RunDir(path)
    refuse_taken(path, may_hold_files=resume or overwrite)
    taken = path.is_dir() and any(path.iterdir())
    clear = taken and overwrite and not resume
    if clear and not run.recipe.is_file():
        raise BingoError(
            f"--overwrite: {path} is not a run of this program (no recipe.yaml), so nothing in it is deleted; name"
            " another folder"
        )
    if resume and not taken:
        raise BingoError(f"--resume: expected a run in {path}, found none; leave --resume out to start one")
    _make(run)
    hold(path, "--out")  # before anything of another writer's is deleted
    if clear:
        _clear(run)
        for stage in stages:
            drop_stale(run.work, stage, set())
    return run


def open_shared(path: Path, share: str) -> RunDir:
    """The folder of a run that array jobs begin together; this one is the only writer of its `share`. Raises BingoError
    for a folder of something else, and while a command writes that shares with nobody.
    """
    run = RunDir(path)
    if path.is_dir() and any(path.iterdir()) and not run.work.is_dir():
        raise BingoError(
            f"--out: expected a run or no folder, found {path} with other files in it; name another folder"
        )
    _make(run)
    hold(path, "--out", share)
    return run


def _make(run: RunDir) -> None:
    try:
        run.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BingoError(
            f"--out: {run.path} cannot be made ({error.strerror}); name a folder you may write to"
        ) from None


_HELD: dict[Path, IO[str]] = {}


def hold(folder: Path, option: str, share: str = "") -> None:
    """Be the only writer of a run, or of a comparison, until this process ends. The kernel frees the lock of a process
    that was killed. Raises BingoError.

    option: what named the folder, for the message. share: be one of several writers, the only one of this share.
    """
    _refuse_links(folder, option)
    if share:
        _lock(folder, f"writer-{share}.json", fcntl.LOCK_EX, option)
    _lock(folder, "writer.json", fcntl.LOCK_SH if share else fcntl.LOCK_EX, option)


def _lock(folder: Path, name: str, kind: int, option: str) -> None:
    path = (folder / "work" / name).resolve()
    if path in _HELD:
        _HELD.pop(path).close()
    try:
        path.parent.mkdir(exist_ok=True)  # it may have been deleted after the run
        handle = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise BingoError(
            f"{option}: {folder} cannot be written to ({error.strerror}); copy it to a folder of your own"
        ) from None
    handle.seek(0)
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = handle.read()
        handle.close()
        raise BingoError(
            f"{option}: {folder} is being written by another process ({owner.strip() or 'unknown'}); wait for it, or"
            " name another folder"
        ) from None
    except OSError:
        pass  # a file system without locks, such as some network disks: then there is none
    handle.truncate(0)
    handle.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}) + "\n")
    handle.flush()
    _HELD[path] = handle


def let_go() -> None:
    """Free all that this process holds: others may write there again."""
    while _HELD:
        _HELD.popitem()[1].close()


def _refuse_links(folder: Path, option: str) -> None:
    """Raise BingoError for a link, a pipe or the like where a run has its files: a folder from elsewhere could have us
    write outside of it, or wait for ever.
    """
    for path in (*folder.iterdir(), *(folder / "work").rglob("*"), *(folder / "export").rglob("*")):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:  # a file on its way, of another array job
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            what = f"a link to {os.readlink(path)}" if stat.S_ISLNK(mode) else "neither a file nor a folder"
            raise BingoError(
                f"{option}: expected files in {folder}, found {path.relative_to(folder)}, {what}; remove it, or put"
                " there what it stands for"
            )


def refuse_no_file(file: Path | None, option: str) -> None:
    """Raise BingoError where `file`, if there is to be one, could not be written when all is computed."""
    if file and (file.is_dir() or not file.parent.is_dir()):
        way = "name a file in it" if file.is_dir() else f"make {file.parent} first"
        raise BingoError(f"{option}: expected a file in a folder that is there, found {file}; {way}")
    if file and file.exists() and not file.is_file():  # it would be replaced, by root even /dev/null
        raise BingoError(f"{option}: expected a file, found a device or a pipe: {file}; name a file")


@contextmanager
def made_by(command: str, file: Path) -> Iterator[None]:
    """Raise BingoError for whatever goes wrong in the block because `file` is not what `bingo-compress COMMAND`
    writes.
    """
    try:
        yield
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise BingoError(
            f"{file}: expected what `bingo-compress {command}` writes, found something else ({type(error).__name__}:"
            f" {error}); {command} again or delete it"
        ) from None


def read_json(command: str, file: Path) -> dict[str, Any]:
    """The JSON object in `file`; an empty one where there is no file. Raises BingoError where it holds something
    else.
    """
    with made_by(command, file):
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__} instead of an object")
    return found


def refuse_taken(path: Path, *, may_hold_files: bool) -> None:
    """Raise BingoError if `path` is a file, or a folder with something in it unless that is allowed."""
    if path.exists() and not path.is_dir():
        raise BingoError(f"--out: expected a folder, found the file {path}; name another")
    if path.is_dir() and any(path.iterdir()) and not may_hold_files:
        raise BingoError(
            f"--out: {path} is not empty; add --resume to go on, --overwrite to start anew, or name another folder"
        )


def open_finished(path: Path) -> RunDir:
    """The folder of a finished run. Raises BingoError."""
    run = RunDir(path)
    if not run.recipe.is_file():
        raise BingoError(f"--run: expected the --out folder of `distill`, found no recipe.yaml in {path}")
    if not run.student.is_file():
        raise BingoError(
            f"--run: {path} holds an unfinished run (no student.safetensors); finish it with distill --out {path}"
            " --resume"
        )
    return run


def _clear(run: RunDir) -> None:
    for path in (
        run.recipe,
        run.resolved,
        run.student,
        run.metrics,
        run.quarantine,
        run.summary,
        run.validation,
        run.start,
        run.bags,
        run.begun,
        run.report,
        run.looks,
        run.mistakes,
        run.checkpoint,
        run.before,
        run.metrics.with_name("not_finite.json"),
        run.metrics.with_name("trace.json"),
    ):
        path.unlink(missing_ok=True)
    for folder in (run.timm, run.export):
        shutil.rmtree(folder, ignore_errors=True)


def stage_key(**made_from: Any) -> str:
    """A short hash of all that a stage's artefact depends on; part of its file name, so that a stale one is never
    read.
    """
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def drop_stale(folder: Path, stem: str, keep: set[str]) -> None:
    """Delete the artefacts `stem`-* in `folder` whose names are not in `keep`."""
    for path in folder.glob(f"{stem}-*"):
        if path.name not in keep:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; synced and renamed when the block ends well, deleted when it does
    not.
    """
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors makes files that only their owner may read
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_first(path: Path) -> Iterator[Path]:
    """As `atomic`, but of several writers, on several machines too, the first one's file stays."""
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.first")
    try:
        yield temporary
        _sync(temporary)
        try:
            os.link(temporary, path)  # unlike a renaming, it replaces nothing
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` to put files in; synced and renamed when the block ends well, replacing an
    older one; deleted when it does not.
    """
    temporary, older = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))

    def clear() -> None:
        for path in (temporary, older):
            shutil.rmtree(path, ignore_errors=True)

    clear()  # of a process with this number that was killed
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if folder.is_dir():
            os.replace(folder, older)  # a folder with files in it cannot be renamed over: for a moment there is none
        os.replace(temporary, folder)
        _sync(folder.parent)
    finally:
        clear()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def need_space(folder: Path, size: int, what: str) -> None:
    """Raise BingoError unless the disk of `folder`, which need not be there yet, has `size` bytes free and a little
    more.
    """
    folder = next((above for above in (folder, *folder.absolute().parents) if above.is_dir()), folder)
    free, needed = shutil.disk_usage(folder).free, round(size * 1.02)
    if needed > free:
        raise BingoError(
            f"no space: {what} needs {needed:,} bytes in {folder}, {free:,} are free, {needed - free:,} are missing;"
            " free some, or put --out on another disk"
        )


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a quota on it, is full; safetensors says so in words only."""
    number = error.errno if isinstance(error, OSError) else None
    return (
        number in (errno.ENOSPC, errno.EDQUOT)
        or f"(os error {errno.ENOSPC})" in str(error)
        or f"(os error {errno.EDQUOT})" in str(error)
    )
