"""Labels that no proof can be made with: named before anything is embedded; and very many of them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Ran, listed, photos, recipe, untrained_run
from torch import Tensor

from bingo_compress import validation
from bingo_compress.comparison import side_by_side
from bingo_compress.data import listing
from bingo_compress.data.image_list import labels_of
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import scores
from bingo_compress.features import extract
from bingo_compress.int8 import gate
from bingo_compress.runtime.run_dir import RunDir

Bingo = Callable[..., Ran]


@pytest.fixture
def nothing_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test in which an image is embedded fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was embedded")

    for name in ("plain", "pixels_of"):
        monkeypatch.setattr(extract, name, refuse)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return untrained_run(tmp_path / "elsewhere", 2)


def one_error(ran: Ran, *said: str) -> None:
    assert ran.status == 2 and len(ran.err.splitlines()) == 1, ran.err
    for words in said:
        assert words in ran.err, ran.err


def with_a_rare_class(folder: Path, each: int = 4) -> Path:
    """Three classes of `each` images, and `rare`, of one and its copy."""
    photos(folder, each)
    (folder / "rare").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(folder / "kind0" / "000.png", folder / "rare" / name)
    return folder


def test_a_class_of_one_image_is_named_before_anything_is_embedded(
    bingo: Bingo, run: RunDir, tmp_path: Path, nothing_embedded: None
) -> None:
    labelled = with_a_rare_class(tmp_path / "labelled")
    said = "at least two different images in every class", "found 1 in rare;", "or give --test"
    one_error(bingo("validate", "--run", run.path, "--data", labelled), "--data", *said)
    with pytest.raises(BingoError, match=r"--labels: .*two different images.*found 1 in rare; .*or give --test"):
        side_by_side.compare(recipe(data=str(labelled)), labelled, None, "bingo", [0], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not run.validation.exists()


def test_export_wants_one_more_to_choose_by(bingo: Bingo, run: RunDir, tmp_path: Path, nothing_embedded: None) -> None:
    words = ("export", "--run", run.path, "--format", "onnx-int8", "--labels")
    two = photos(tmp_path / "two", 2, kinds=1)
    shutil.move(photos(tmp_path / "four", 4, start=10) / "kind1", two / "plenty")
    one_error(bingo(*words, two), "--labels", "at least three different images", "found 2 in kind0;")
    test = photos(tmp_path / "test", 2, kinds=1, start=90)
    shutil.copytree(photos(tmp_path / "more", 2, start=95) / "kind2", test / "plenty")
    gate.open_labelled(two, test)  # none of these is set aside to be tested on
    (two / "kind0" / "001.png").unlink()
    one_error(bingo(*words, two, "--test", test), "at least two different images", "found 1 in kind0;")
    assert not run.export.exists()


def test_with_test_images_of_its_own_a_class_may_have_one(tmp_path: Path) -> None:
    labelled = listing.list_images(with_a_rare_class(tmp_path / "labelled"))
    with pytest.raises(BingoError):
        scores.refuse_few(labelled, None, "--data")
    scores.refuse_few(labelled, labelled, "--data")


def test_many_small_classes_are_counted(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"c{number}").mkdir()
        (tmp_path / f"c{number}" / "1.jpg").write_bytes(b"%d" % number)
    with pytest.raises(BingoError, match=r"found 1 in c0, 1 in c1, .*1 in c4 and in 4 classes more; add"):
        scores.refuse_few(listing.list_images(tmp_path), None, "--data")


def test_a_class_that_is_one_image_because_the_other_is_damaged_is_named_too(tmp_path: Path) -> None:
    data = photos(tmp_path / "data", 3)
    (data / "kind2" / "002.png").unlink()
    (data / "kind2" / "001.png").write_bytes(b"damaged")
    folder = listing.list_images(data)
    scores.refuse_few(folder, None, "--data")
    run = lambda batch: batch.float().mean((1, 2))  # noqa: E731
    seen = SimpleNamespace(geometry=lambda: {"size": 8, "crop_pct": 1.0, "interpolation": "bilinear"})
    with pytest.raises(BingoError, match="found 1 in kind2;"):
        scores.sides({"one": (seen, run)}, folder, None, labels_of(folder)[0])  # type: ignore[dict-item]


@pytest.mark.parametrize("how", ["itself", "link", "links", "copies", "inside"])
def test_test_images_out_of_the_bank_are_refused_and_counted_in_every_command(
    how: str, bingo: Bingo, run: RunDir, tmp_path: Path, nothing_embedded: None
) -> None:
    labelled, test = photos(tmp_path / "labelled", 4), tmp_path / "test"
    if how == "itself":
        test = labelled
    elif how == "link":
        test.symlink_to(labelled)
    elif how in ("links", "copies"):
        for file in labelled.rglob("*.png"):
            place = test / file.parent.name / f"other-{file.name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file, place) if how == "links" else shutil.copy(file, place)
    else:
        shutil.copytree(labelled, tmp_path / "within" / "kind0" / "more")
        labelled, test = labelled, tmp_path / "within"
        shutil.copytree(labelled / "kind1", test / "kind1")
    count = 16 if how == "inside" else 12
    said = f"found {count} of {count} in both"
    one_error(bingo("validate", "--run", run.path, "--data", labelled, "--test", test), "not in --data", said)
    int8 = ("export", "--run", run.path, "--format", "onnx-int8", "--labels", labelled, "--test", test)
    one_error(bingo(*int8), "not in --labels", said)
    with pytest.raises(BingoError, match=f"not in --labels, {said}"):
        side_by_side.compare(recipe(data=str(labelled)), labelled, test, "bingo", [0], tmp_path / "out")
    assert not run.validation.exists() and not run.export.exists()


def test_files_that_nobody_can_read_are_not_the_same_picture() -> None:
    digests = np.arange(64, dtype=np.uint8).reshape(2, 32)
    digests[1] = 0
    bank, test = listed(("a/1.jpg", "a/2.jpg"), digests), listed(("a/3.jpg", "a/4.jpg"), digests[::-1].copy() * 3)
    scores.refuse_shared(bank, test, "--data")
    with pytest.raises(BingoError, match="found 1 of 2 in both"):
        scores.refuse_shared(bank, listed(("a/3.jpg", "a/4.jpg"), digests), "--data")


# ---------------------------------------------------------------- thousands of classes


def set_aside_slowly(labels: Tensor, groups: Tensor) -> Tensor:
    """What `_quarter` sets aside, a class and a group at a time."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        take = max(1, int(len(rows) * scores.TEST_SHARE))
        drawn = groups[rows[torch.randperm(len(rows), generator=generator)]].tolist()
        for group in dict.fromkeys(drawn):
            held, size = int(chosen[rows].sum()), drawn.count(group)
            if 2 * held + size <= 2 * take or (not held and size == min(map(drawn.count, drawn))):
                chosen |= groups == group
    return chosen


@pytest.mark.parametrize("seed", range(12))
def test_one_pass_sets_the_same_images_aside(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels, groups = torch.randint(4, (60,), generator=generator), torch.randint(45, (60,), generator=generator)
    groups = groups if seed % 2 else groups + 45 * labels  # copies across classes, and none
    assert torch.equal(scores._quarter(labels, groups), set_aside_slowly(labels, groups))


def test_the_file_of_a_proof_of_25_000_classes_is_small() -> None:
    count = 25_000
    classes = [f"n{number:08d}_a_class_of_some_name" for number in range(count)]
    labels = torch.arange(count)
    found = scores.by_class(labels.roll(1), SimpleNamespace(classes=classes, query_labels=labels))  # type: ignore[arg-type]
    rows = [{"name": name, **found} for name in ("student", "onnx", "onnx-int8")]
    assert len(validation._json({"protocol": {"classes": classes}, "rows": rows})) < 5e6
