"""Folders as people have them: what systems leave in them, our own runs among the photos, labels one level too deep."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import Ran, flags, untrained_run

from bingo_compress.data.image_list import ImageList, labels_of
from bingo_compress.data.listing import list_images
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import scores
from bingo_compress.exporting import export

Make = Callable[..., Path]
LEFT_BEHIND = (".DS_Store", "Thumbs.db", "desktop.ini", "._1.jpg", ".hidden.jpg", "README.md", "LICENSE", "Readme.TXT")
SYSTEM = (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "lost+found", "$RECYCLE.BIN", ".Trash-1000", "#recycle")


@pytest.fixture
def labelled(tmp_path: Path, make_photo: Make) -> Path:
    for number in range(12):
        make_photo(tmp_path / "labelled" / "ab"[number % 2] / f"{number}.jpg", number)
    return tmp_path / "labelled"


@pytest.mark.parametrize("place", ["", "a"])
@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_systems_leave_is_no_photo_no_label_and_no_bad_file(name: str, place: str, labelled: Path) -> None:
    clean = list_images(labelled)
    (labelled / place / name).write_bytes(b"something")
    found = list_images(labelled)
    assert (found.files, found.bad, found.passed, clean.passed) == (clean.files, (), 1, 0)
    assert labels_of(found)[0] == ["a", "b"]


@pytest.mark.parametrize("name", SYSTEM)
def test_system_folders_are_not_searched(name: str, labelled: Path, make_photo: Make) -> None:
    clean = list_images(labelled)
    make_photo(labelled / name / "thumb.jpg", 1)
    make_photo(labelled / "a" / name / "deep" / "thumb.jpg", 2)
    found = list_images(labelled)
    assert (found.files, found.bad, found.passed) == (clean.files, (), 2)


def test_a_folder_that_lies_in_a_hidden_one_is_searched(tmp_path: Path, make_photo: Make) -> None:
    make_photo(tmp_path / ".cache" / "photos" / "1.jpg")
    assert list_images(tmp_path / ".cache" / "photos").files == ("1.jpg",)


def test_what_was_passed_over_is_said_once(labelled: Path, bingo: Callable[..., Ran]) -> None:
    (labelled / ".DS_Store").write_bytes(b"")
    shown = " ".join(bingo("check", "--data", labelled).out.split())
    assert shown.count("1 hidden or system files") == 1 and "2 folders of 6 to 6 images" in shown


@pytest.mark.slow
def test_our_own_runs_and_files_among_the_photos_are_none(labelled: Path, tmp_path: Path) -> None:
    clean = list_images(labelled)
    run = untrained_run(tmp_path / "elsewhere", 1)
    export(run.path, labelled / "for the device")
    (run.work / "plain.jpg").write_bytes(next(labelled.rglob("*.jpg")).read_bytes())
    shutil.copytree(run.path, labelled / "runs" / "first")
    found = list_images(labelled)
    assert (found.files, found.bad, found.passed) == (clean.files, (), 2)


@pytest.mark.slow
def test_a_run_made_among_the_photos_changes_nothing(
    labelled: Path, bingo: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(labelled)  # the default of --out is runs/first, within it
    words = ("distill", *flags(data=".", epochs=1))
    assert bingo(*words).status == 0 and bingo("export", "--run", "runs/first").status == 0
    shown = " ".join(bingo("check", "--data", ".").out.split())
    assert "12 usable images in" in shown and "cannot be used" not in shown and "2 folders of 6 to 6" in shown
    before = (labelled / "runs" / "first" / "student.safetensors").read_bytes()
    again = bingo(*words, "--resume")
    assert again.status == 0 and "images: 12 files in" in " ".join(again.out.split()), again.err
    assert (labelled / "runs" / "first" / "student.safetensors").stat().st_size == len(before)
    assert '"training": 11' in (labelled / "runs" / "first" / "summary.json").read_text()


def test_train_and_val_are_not_taken_for_classes(labelled: Path, tmp_path: Path, bingo: Callable[..., Ran]) -> None:
    for split in ("train", "val"):
        shutil.copytree(labelled, tmp_path / "all" / split)
    with pytest.raises(BingoError, match=r"give .*all/train, and .*all/val as --test"):
        labels_of(list_images(tmp_path / "all"))
    assert "as --test" in " ".join(bingo("check", "--data", tmp_path / "all").out.split())
    assert labels_of(list_images(tmp_path / "all" / "train"))[0] == ["a", "b"]


def test_classes_that_are_called_train_and_test_are_classes(tmp_path: Path, make_photo: Make) -> None:
    for name in ("train/1.jpg", "train/2.jpg", "test/3.jpg", "car/4.jpg"):
        make_photo(tmp_path / name)
    assert labels_of(list_images(tmp_path))[0] == ["car", "test", "train"]


def test_a_wrapper_too_much_is_named(labelled: Path) -> None:
    with pytest.raises(BingoError, match=r"labelled holds 2 folders: did you mean .*labelled\?"):
        labels_of(list_images(labelled.parent))


def test_thousands_of_classes_take_a_file_of_hundreds() -> None:
    count = 3000
    labels = torch.arange(count).repeat(2)
    predicted = labels.clone()
    predicted[:30] = (labels[:30] + 1) % count
    predicted[count : count + 3] = (labels[count : count + 3] + 1) % count
    sides = SimpleNamespace(classes=[f"c{number}" for number in range(count)], query_labels=labels)
    found = scores.by_class(predicted, sides)  # type: ignore[arg-type]
    assert "confusion" not in found and len(found["per_class"]) == scores.DENSE
    assert found["confused_most"][:3] == [["c0", "c1", 2], ["c1", "c2", 2], ["c2", "c3", 2]]
    assert [entry["accuracy"] for entry in found["per_class"][:4]] == [0, 0, 0, 0.5]
    assert found["per_class"][0]["mistaken_for"] == "c1" and len(json.dumps(found)) < 60_000


def test_many_labels_are_one_pass() -> None:
    files = tuple(sorted(f"c{number:05d}/{image}.jpg" for number in range(20_000) for image in range(5)))
    classes, labels = labels_of(ImageList(Path("x"), files, ()))
    assert len(classes) == 20_000 and labels[:6] == [0, 0, 0, 0, 0, 1]
