"""The index of a tar file is kept in the run: no later command walks the archive, and none trusts one that does not
fit.
"""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Ran, flags, picture
from worlds import add

from bingo_compress.data.image_list import keep
from bingo_compress.data.listing import list_images
from bingo_compress.sources import tar


def packed(path: Path, numbers: range, order: int = 1) -> Path:
    """A tar file of a photo a number, in two classes; the same bytes in all, whatever the order."""
    with tarfile.open(path, "w") as archive:
        for number in numbers[::order]:
            file = path.with_name(f"{number}.bmp")
            picture(number, 16, 16).save(file)  # all of one size
            add(archive, f"kind{number % 2}/{number:03d}.bmp", file.read_bytes())
            file.unlink()
    return path


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The archives that were walked."""
    found: list[Path] = []
    walked = tar._walked

    def counted(path: Path) -> tar.Index:
        found.append(path)
        return walked(path)

    monkeypatch.setattr(tar, "_walked", counted)
    return found


def forget() -> None:
    """As a new process."""
    tar._known.clear()


def test_a_kept_index_is_the_archives(tmp_path: Path, walks: list[Path]) -> None:
    archive = packed(tmp_path / "a.tar", range(6))
    first = list_images(archive)
    keep(tmp_path, first)
    forget()
    again = list_images(archive, work=tmp_path)
    assert walks == [archive]
    assert (again.files, again.digests, again.labels()) == (first.files, first.digests, first.labels())
    assert len([file for file in tmp_path.iterdir() if file.suffix == ".json"]) == 1


def test_an_archive_that_took_anothers_place_is_walked(tmp_path: Path, walks: list[Path]) -> None:
    archive = packed(tmp_path / "a.tar", range(6))
    before, status = list_images(archive).digests, os.stat(archive)
    keep(tmp_path, list_images(archive))
    packed(tmp_path / "a.tar", range(6), order=-1)  # the same size, members elsewhere
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(archive).st_size == status.st_size
    forget()
    found = list_images(archive, work=tmp_path)
    assert walks == [archive, archive] and found.digests == before
    keep(tmp_path, found)
    forget()
    assert list_images(archive, work=tmp_path).digests == before and len(walks) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole.replace(b"512", b"513", 1),
        lambda whole: b"\xff" + whole,
        lambda whole: whole.partition(b"\n")[0] + b"\n{}",
        lambda whole: json.dumps({"index": 1}).encode(),
    ],
)
def test_a_damaged_index_is_made_again(damage: Callable[[bytes], bytes], tmp_path: Path, walks: list[Path]) -> None:
    archive = packed(tmp_path / "a.tar", range(6))
    first = list_images(archive)
    keep(tmp_path, first)
    (file,) = tmp_path.glob("index-*.json")
    whole = file.read_bytes()
    assert damage(whole) != whole
    file.write_bytes(damage(whole))
    forget()
    found = list_images(archive, work=tmp_path)
    assert len(walks) == 2 and found.digests == first.digests
    keep(tmp_path, found)
    assert file.read_bytes() == whole


@pytest.mark.slow
def test_each_archive_is_walked_once_a_run(tmp_path: Path, bingo: Callable[..., Ran], walks: list[Path]) -> None:
    archive, test, run = packed(tmp_path / "a.tar", range(24)), packed(tmp_path / "b.tar", range(24, 32)), "run"

    def did(*words: object) -> list[Path]:
        forget()
        walks.clear()
        shown = bingo(*words)
        assert shown.status == 0, shown.err
        return walks

    assert did("distill", "--data", archive, "--out", tmp_path / run, *flags(epochs=1)) == [archive]
    assert did("distill", "--out", tmp_path / run, "--resume") == []
    assert did("validate", "--run", tmp_path / run, "--data", archive, "--test", test) == [test]
    assert did("validate", "--run", tmp_path / run, "--data", archive, "--test", test) == []
    assert did("export", "--run", tmp_path / run) == []
    words = ("compare", "--data", archive, "--labels", test, "--methods", "bingo", "--seeds", "0", "--out")
    given = [*words, tmp_path / "table", *flags(epochs=1)]
    assert did(*given) == [archive, test]
    assert did(*given) == []
