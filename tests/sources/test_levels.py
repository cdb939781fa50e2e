"""Labels that folders tell: of the same level in every source, and refused where the level is in doubt."""

import csv
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from helpers import Ran, photos
from worlds import add

from bingo_compress.data.image_list import labels_of
from bingo_compress.data.listing import list_images
from bingo_compress.errors import BingoError
from bingo_compress.sources.listed import Columns
from bingo_compress.sources.opened import Asked

Maker = Callable[[Path, Iterable[str]], Path]


def as_folder(place: Path, folders: Iterable[str]) -> Path:
    """Two images in each of the folders."""
    for name in folders:
        for number in range(2):
            file = place / name / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"{name}{number}".encode())
    return place


def as_zip(place: Path, folders: Iterable[str]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place.with_name(f"{place.name}.zip"), "w") as archive:
        for name in folders:
            for number in range(2):
                archive.writestr(f"{name}/{number}.jpg", f"{name}{number}")
    return place.with_name(f"{place.name}.zip")


def as_tar(place: Path, folders: Iterable[str]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place.with_name(f"{place.name}.tar"), "w") as archive:
        for name in folders:
            for number in range(2):
                add(archive, f"{name}/{number}.jpg", f"{name}{number}".encode())
    return place.with_name(f"{place.name}.tar")


def as_list(place: Path, folders: Iterable[str]) -> Path:
    files = sorted(as_folder(place, folders).rglob("*.jpg"))
    place.with_suffix(".txt").write_text("\n".join(map(str, files)))
    return place.with_suffix(".txt")


MAKERS = (as_folder, as_zip, as_tar, as_list)


def each(*outer: str) -> list[str]:
    return [f"{name}/{kind}" for name in outer for kind in ("cat", "dog")]


def classes(*places: Path) -> list[str]:
    return labels_of(list_images([str(place) for place in places]))[0]


def refusal(*places: Path) -> str:
    with pytest.raises(BingoError) as refused:
        classes(*places)
    return str(refused.value)


@pytest.mark.parametrize("make", MAKERS)
def test_train_and_test_are_no_classes_whatever_they_lie_in(make: Maker, tmp_path: Path) -> None:
    place = make(tmp_path / "all", each("train", "test"))
    said = refusal(place)
    assert "test and train hold folders of the same names, which look like the classes: give" in said
    assert f"{place}/train" in said if make is as_folder else f"train of {place} as a folder, list or archive" in said
    if make is not as_folder:
        assert "photos/train of" in refusal(make(tmp_path / "deep", each("photos/train", "photos/test")))


@pytest.mark.parametrize("make", MAKERS)
def test_classes_at_two_levels_are_refused_whatever_they_lie_in(make: Maker, tmp_path: Path) -> None:
    place = make(tmp_path / "all", ["cat", "dog", *each("more")])
    assert f"more of {place} holds no images but folders that are called as classes are (cat, dog)" in refusal(place)
    one, other = as_folder(tmp_path / "a", ["cat", "dog"]), make(tmp_path / "b", each("more"))
    if make is as_folder:
        assert f"more of {other} holds no images but folders" in refusal(one, other)
    else:  # an archive is often made of a folder
        assert classes(one, other) == ["cat", "dog"]


def test_shards_have_the_labels_of_one_archive(tmp_path: Path) -> None:
    kinds = {"cat": ["cat/v1", "cat/v2"], "dog": ["dog/v3", "dog/v4"]}
    for number, folders in enumerate(kinds.values()):
        as_tar(tmp_path / "shards" / str(number), folders)
    whole = list_images(as_tar(tmp_path / "whole", [*kinds["cat"], *kinds["dog"]]))
    (tmp_path / "list.txt").write_text("shards/0.tar\nshards/1.tar\n")
    for place in ("shards", "shards/{0..1}.tar", "list.txt"):
        assert labels_of(list_images(str(tmp_path / place))) == labels_of(whole)
    assert labels_of(whole)[0] == ["cat", "dog"]


def test_each_place_keeps_its_own_outer_folder(tmp_path: Path) -> None:
    one, other = (as_zip(tmp_path / name, each(name)) for name in ("day1", "day2"))
    assert classes(one, other) == ["cat", "dog"]


@pytest.mark.parametrize(
    "archives",
    [
        {"cat": ["2020", "2021"], "dog": ["2020", "2021"]},
        {"cat": ["cat/2020", "cat/2021"], "dog": ["dog/2020"]},
        {"day1": each("day1"), "day2": each("day2")},
        {"0": ["cat/v1", "cat/v2"], "1": ["dog/v1", "dog/v2"]},
        {"april": each("2024-04"), "march": each("2024-03")},
    ],
)
def test_archives_that_may_be_the_classes_are_asked_about(archives: dict[str, list[str]], tmp_path: Path) -> None:
    places = [as_zip(tmp_path / "place" / name, folders) for name, folders in archives.items()]
    said = refusal(tmp_path / "place")
    assert f"{places[0].name}, {places[1].name} may be the classes, or the folders in them (" in said
    assert len(classes(*places)) == 2  # each by an option of its own
    for name, folders in archives.items():
        as_folder(tmp_path / "unpacked" / name, folders)
    assert classes(tmp_path / "unpacked") == list(archives)


@pytest.mark.parametrize(
    "archives",
    [
        {"0": ["cat", "dog"], "1": ["cat", "dog"]},
        {"photos-01": each("all"), "photos-02": each("all")},
        {"train": ["cat", "dog"], "test": ["cat", "dog"]},
        {"one": ["cat"], "other": ["dog"]},
        {"part-aa": ["cat", "dog"], "part-ab": ["cat", "dog"]},
    ],
)
def test_archives_that_are_shards_are_not(archives: dict[str, list[str]], tmp_path: Path) -> None:
    for name, folders in archives.items():
        as_zip(tmp_path / name, folders)
    assert classes(tmp_path) == ["cat", "dog"]


def test_a_wrapper_in_each_place_is_named(tmp_path: Path) -> None:
    one, other = (as_folder(tmp_path / name, each(f"{name} light")) for name in ("morning", "evening"))
    said = refusal(one, other)
    assert f"{one}/morning light, {other}/evening light hold folders of the same names and may be the classes" in said


def test_folders_within_classes_are_no_labels(tmp_path: Path) -> None:
    true = as_folder(tmp_path / "predicted", each("cat", "dog"))
    one, other = as_folder(tmp_path / "a", ["cat/v1", "cat/v2"]), as_folder(tmp_path / "b", ["dog/v3", "dog/v4"])
    assert classes(true) == classes(one, other) == ["cat", "dog"]
    persons = as_folder(tmp_path / "persons", [f"{person}/{session}" for person in (1, 2, 3) for session in (1, 2)])
    assert classes(persons) == ["1", "2", "3"]


def test_what_archives_tell_stays_whatever_their_folders_are(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number, name in enumerate(each("train", "test")):
            add(archive, f"{name}/{number}.jpg", b"photo")
            add(archive, f"{name}/{number}.cls", str(number % 2).encode())
    assert labels_of(list_images(tmp_path / "x.tar")) == (["0", "1"], [0, 1, 0, 1])


# ---------------------------------------------------------------- --label-column


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("all.tar", "a key of NAME.json beside NAME.jpg in .*all.tar, which have none; name one"),
        ("told.tar", "a key of NAME.json beside NAME.jpg in .*told.tar, which have photographer, species; name one"),
    ],
)
def test_a_label_column_that_is_not_there_is_refused_where_labels_are_asked_for(
    kind: str, found: str, tmp_path: Path, bingo: Callable[..., Ran]
) -> None:
    as_list(tmp_path / "all", ["cat", "dog"])
    as_tar(tmp_path / "all", ["cat", "dog"])
    with tarfile.open(tmp_path / "told.tar", "w") as archive:
        for number in range(4):
            add(archive, f"{number % 2}/{number}.jpg", b"photo")
            told = {"species": "cat" if number < 2 else "dog", "photographer": "x"}
            add(archive, f"{number % 2}/{number}.json", json.dumps(told).encode())
    place = str(tmp_path / kind)
    listed = list_images(Asked((place,), Columns("", "speceis")))  # who trains needs no labels
    with pytest.raises(BingoError, match=f"^--label-column speceis: expected .*{found}"):
        labels_of(listed)
    ran = bingo("check", "--data", place, "--label-column", "speceis")
    assert ran.status == 2 and "--label-column speceis: expected" in ran.err
    if kind == "told.tar":
        assert labels_of(list_images(Asked((place,), Columns("", "species")))) == (["cat", "dog"], [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("kind", "said"),
    [("all", "whose labels are the names of its folders"), ("all.txt", "a list without columns")],
)
def test_beside_a_table_a_folder_keeps_its_labels_and_says_so(
    kind: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_list(tmp_path / "all", ["cat", "dog"])
    table(tmp_path / "t.csv", [("all/cat/0.jpg", "puma")], "species")
    found = list_images(Asked((str(tmp_path / kind), str(tmp_path / "t.csv")), Columns("", "species")))
    assert labels_of(found)[0] == ["cat", "dog", "puma"]
    assert said in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- lines of a list


def table(place: Path, rows: Iterable[tuple[Any, ...]], column: str = "label") -> Path:
    with place.open("w", newline="") as handle:
        csv.writer(handle).writerows([("image", column), *rows])
    return place


def test_an_image_of_two_labels_is_refused_where_labels_are_asked_for(
    tmp_path: Path, bingo: Callable[..., Ran]
) -> None:
    names = [str(file.relative_to(tmp_path)) for file in sorted(photos(tmp_path / "photos", 2).rglob("*.png"))]
    once = [(name, name.split("/")[1]) for name in names]
    place = table(tmp_path / "t.csv", [*once, once[0], (names[0], "outdoor")])
    with pytest.raises(BingoError, match=rf"found {names[0]} as 'kind0' and as 'outdoor'; leave one of the two"):
        labels_of(list_images(place))
    shown = bingo("check", "--data", place)
    said = " ".join(shown.out.split())
    assert shown.status == 0 and "no labels (labels: expected one label an image in" in said
    assert f"2 lines of {place} name an image again" in said and "hidden" not in said
    again = list_images(table(tmp_path / "t.csv", [*once, once[0], once[0]]))
    assert labels_of(again)[1] == [0, 0, 1, 1, 2, 2]
    text = tmp_path / "t.txt"
    text.write_text("".join(f"{name} {label}\n" for name, label in [*once, (names[0], "outdoor")]))
    with pytest.raises(BingoError, match="as 'kind0' and as 'outdoor'"):
        labels_of(list_images(text))
