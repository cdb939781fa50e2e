"""Whatever images lie in, a run is the same; what is no source is said in a line."""

import io
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Ran, flags
from worlds import CLASSES, KINDS, add, made

from bingo_compress.data.decode import decode_all
from bingo_compress.data.image_list import labels_of, say_splits
from bingo_compress.data.listing import list_images
from bingo_compress.errors import BingoError
from bingo_compress.models.exported import weights_digest
from bingo_compress.runtime import run_dir
from bingo_compress.sources.listed import Columns
from bingo_compress.sources.opened import Asked

MakePhoto = Callable[..., Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return made(tmp_path_factory.mktemp("world"), 8)


def words(data: Any) -> list[str]:
    return [word for place in ([data] if isinstance(data, str) else data) for word in ("--data", place)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_has_the_same_images_in_the_same_order_with_the_same_labels(
    kind: str, world: dict[str, Any]
) -> None:
    folder, found = list_images(world["folder"]), list_images(world[kind])
    assert found.digests == folder.digests and len(set(found.files)) == 24
    assert labels_of(found) == labels_of(folder) and labels_of(found)[0] == list(CLASSES)
    assert (found.bad, found.passed) == ((), 0)
    if kind != "folder":
        assert all("!" in name for name in found.files)
    seen = {index: pixels.shape for index, pixels in decode_all(found, range(24), lambda pixels: pixels)}
    assert len(seen) == 24
    some = found.only([20, 3])
    assert some.digests == [folder.digests[20], folder.digests[3]]
    assert labels_of(some)[0] == ["kind0", "kind2"]
    assert [name for _, name in decode_all(some, [0], lambda pixels: pixels.tobytes())] == [
        name for _, name in decode_all(folder, [20], lambda pixels: pixels.tobytes())
    ]


def test_names_stay_when_all_is_moved_and_tell_places_of_one_name_apart(tmp_path: Path, make_photo: MakePhoto) -> None:
    for root in ("here", "there"):
        for camera in ("a", "b"):
            make_photo(tmp_path / root / camera / "photos" / "1.jpg")
    here, there = (
        list_images([tmp_path / root / "a" / "photos", tmp_path / root / "b" / "photos"]) for root in ("here", "there")
    )
    assert here.files == ("a/photos!1.jpg", "b/photos!1.jpg") == there.files
    assert here.fingerprint() == there.fingerprint()


@pytest.mark.slow
def test_the_student_is_the_same_whatever_the_images_lie_in(
    world: dict[str, Any], tmp_path: Path, bingo: Callable[..., Ran]
) -> None:
    digests = {}
    for kind in ("folder", "list", "tar", "zip", "parquet", "two folders", "shards"):
        out = tmp_path / kind
        given = flags(epochs=2)
        shown = bingo("distill", *words(world[kind]), "--out", out, *given)
        assert shown.status == 0, shown.out
        digests[kind] = weights_digest(run_dir.RunDir(out).student)
    assert len(set(digests.values())) == 1, digests


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "two folders"])
def test_all_commands_take_any_source(
    kind: str, world: dict[str, Any], tmp_path: Path, bingo: Callable[..., Ran]
) -> None:
    data, out = words(world[kind]), tmp_path / "run"
    assert "24 usable images" in bingo("check", *data).out
    assert bingo("distill", *data, "--out", out, *flags(epochs=1)).status == 0
    assert bingo("distill", "--out", out, "--resume").status == 0
    assert bingo("validate", "--run", out, *data).status == 0
    assert bingo("export", "--run", out).status == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("s3://bucket/photos", "expected files of this machine, found s3://bucket/photos; copy or mount it first"),
        ("gs://bucket/a.tar", "expected files of this machine"),
        (
            "photos/*.jpg",
            "a pattern that stands for no file: .*; name the folder, write shards as .* or put the paths into",
        ),
        ("shards/{000..003}.tar", "expected 4 files of .*, found 0; the first that is missing is .*000.tar"),
        ("nowhere", "found nothing at .*nowhere; check the path"),
        ("photo.jpg", "found a file: .*photo.jpg; name its folder"),
        ("packed.tar.gz", "found a packed one: .*; unpack it"),
        ("bad.tar", "expected a tar file, found something else"),
        ("bad.zip", "expected a zip file, found something else"),
        ("bad.parquet", "expected a Parquet file, found something else"),
        ("empty.csv", "found an empty file"),
        ("no_column.csv", "expected a column of image files in .*, found columns a, b; say which with --image-col"),
        ("short.csv", "line 2: expected 2 values, found 1"),
        ("latin.txt", "expected a list in UTF-8"),
        ("empty.txt", "found an empty list or archive"),
        (["photos", "photos"], "expected each place once, found .*photos twice"),
        (["photos", "photos/a"], "found .*a inside .*photos; leave one out"),
    ],
)
def test_what_is_no_source_is_said_in_a_line(data: Any, words: str, tmp_path: Path, make_photo: MakePhoto) -> None:
    make_photo(tmp_path / "photos" / "a" / "1.jpg")
    make_photo(tmp_path / "photo.jpg")
    for name in ("packed.tar.gz", "bad.tar", "bad.zip", "bad.parquet"):
        (tmp_path / name).write_bytes(b"something else" * 100)
    for name, text in {"empty.csv": "", "no_column.csv": "a,b\n1,2\n", "short.csv": "image,label\n1\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9.jpg\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    here = [place if "://" in place else str(tmp_path / place) for place in ([data] if isinstance(data, str) else data)]
    with pytest.raises(BingoError, match=words) as refused:
        list_images(here)
    assert str(refused.value).startswith("--data: ") and "\n" not in str(refused.value)


def test_columns_are_found_by_name_or_said(tmp_path: Path, make_photo: MakePhoto) -> None:
    for name in "ab":
        make_photo(tmp_path / f"{name}.jpg")
    table = tmp_path / "t.csv"
    table.write_text("where;what;species\na.jpg;x;cat\nb.jpg;y;dog\n")
    with pytest.raises(BingoError, match="say which with --image-column"):
        list_images(table)
    found = list_images(Asked((str(table),), Columns("where", "what")))
    assert labels_of(found)[0] == ["x", "y"]
    with pytest.raises(BingoError, match=r"image-column wher: expected a column of .* the nearest is where"):
        list_images(Asked((str(table),), Columns("wher", "")))


def test_a_list_is_read_from_where_it_lies_and_names_what_it_cannot_use(tmp_path: Path, make_photo: MakePhoto) -> None:
    make_photo(tmp_path / "deep" / "a.jpg")
    (tmp_path / "deep" / "empty.jpg").touch()
    (tmp_path / "deep" / "list.txt").write_text("\n a.jpg \ngone.jpg\nempty.jpg\nnotes.md\na.jpg\n")
    found = list_images(tmp_path / "deep" / "list.txt")
    assert found.files == ("list.txt!a.jpg",) and found.passed == 0
    assert dict(found.bad) == {
        "list.txt!gone.jpg": "no such file",
        "list.txt!empty.jpg": "empty file",
        "list.txt!notes.md": "not an image (its name ends in .md)",
    }


def test_a_list_may_have_labels_behind_its_paths(tmp_path: Path, make_photo: MakePhoto) -> None:
    for name in ("my a.jpg", "b.jpg", "c.jpg"):
        make_photo(tmp_path / name)
    (tmp_path / "train.txt").write_text("my a.jpg 3\nb.jpg 0\nc.jpg 3\n")
    found = list_images(tmp_path / "train.txt")
    assert found.files == ("train.txt!my a.jpg", "train.txt!b.jpg", "train.txt!c.jpg")
    assert labels_of(found) == (["0", "3"], [1, 0, 1])
    (tmp_path / "train.txt").write_text("my a.jpg\nb.jpg\n")
    assert list_images(tmp_path / "train.txt").files == ("train.txt!my a.jpg", "train.txt!b.jpg")


def test_a_list_of_shards_is_the_shards(world: dict[str, Any], tmp_path: Path) -> None:
    shards = sorted(Path(world["shards"]).iterdir())
    (tmp_path / "list.txt").write_text("\n".join(map(str, shards)))
    assert list_images(tmp_path / "list.txt").files == list_images(world["shards"]).files


def hub(root: Path, world: dict[str, Any], names: dict[str, str]) -> Path:
    """A folder as the hubs lay it out, with one of the world's shards under each name."""
    for name, shard in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((Path(world["shards"]) / shard).read_bytes())
    for name in ("README.md", ".gitattributes", "dataset_infos.json", ".cache/x.lock"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("{}")
    return root


@pytest.mark.parametrize(
    ("names", "one", "other"),
    [
        (
            ("data/train-00000-of-00002.tar", "data/train-00001-of-00002.tar", "data/test-00000-of-00001.tar"),
            "data/train-0000{0..1}-of-00002.tar",
            "data/test-00000-of-00001.tar",
        ),
        (("train/007.tar", "train/009.tar", "test/000.tar"), "train", "test"),
        (("a/train_x.tar", "a/train_z.tar", "a/val_x.tar"), "a/train_{x,z}.tar", "a/val_x.tar"),
    ],
)
def test_archives_at_any_depth_are_shards_and_their_splits_are_said(
    names: tuple[str, ...], one: str, other: str, world: dict[str, Any], tmp_path: Path, printed: io.StringIO
) -> None:
    root = hub(tmp_path / "hub", world, dict(zip(names, ("000.tar", "001.tar", "002.tar"), strict=True)))
    found = list_images(root)
    assert (len(found.files), found.bad) == (21, ()) and labels_of(found)[0] == list(CLASSES)
    say_splits(found)
    told = " ".join(printed.getvalue().split())
    assert f"are splits, by the names of the archives in {root}; all are taken. To take one alone" in told
    train, test = (part.strip("'") for part in re.findall(r"--data (.*), and (.*) as --test", told)[0])
    assert (train, test) == (str(root / one), str(root / other))
    assert len(list_images(train).files) == 14 and len(list_images(test).files) == 7


def test_archives_of_no_split_say_nothing_and_a_link_to_one_is_no_second(world: dict[str, Any], tmp_path: Path) -> None:
    root = hub(tmp_path / "hub", world, {"a/000.tar": "000.tar", "train-b.tar": "001.tar"})
    (root / "a" / "b.tar").symlink_to(root / "a" / "000.tar")
    (root / "a" / "up").symlink_to(tmp_path)
    found = list_images(root)
    assert len(found.files) == 14 and found.opened is not None and found.opened.splits == ()


def test_beside_photos_archives_are_named_as_files_that_cannot_be_used(
    world: dict[str, Any], tmp_path: Path, make_photo: MakePhoto
) -> None:
    root = hub(tmp_path / "hub", world, {"data/train-0.tar": "000.tar"})
    make_photo(root / "z" / "1.jpg")
    found = list_images(root)
    assert found.files == ("z/1.jpg",)
    assert dict(found.bad)["data/train-0.tar"].startswith("an archive (its name ends in .tar): give it as --data of")


def test_a_pattern_that_the_shell_expanded_is_told(world: dict[str, Any], bingo: Callable[..., Ran]) -> None:
    shown = bingo("check", "--data", *map(str, sorted(Path(world["shards"]).glob("*.tar"))))
    assert shown.status == 2
    assert "a pattern that the shell expanded? Give the folder, or --data before each" in shown.err


def test_members_that_tell_of_an_image_are_not_bad_and_others_are(tmp_path: Path, make_photo: MakePhoto) -> None:
    photo = make_photo(tmp_path / "p.jpg").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in {
            "a/1.jpg": photo,
            "a/1.json": b'{"label": "cat"}',
            "a/1.txt": b"a caption",
            "a/2.jpg": b"",
            "a/notes.txt": b"x",
            "__MACOSX/a/._1.jpg": b"x",
            "a/.DS_Store": b"x",
        }.items():
            add(archive, name, content)
    found = list_images(tmp_path / "x.tar")
    assert (found.files, found.passed) == (("x.tar!a/1.jpg",), 2)
    assert dict(found.bad) == {
        "x.tar!a/2.jpg": "empty file",
        "x.tar!a/notes.txt": "not an image (its name ends in .txt)",
    }
    assert found.labels() == ["cat"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_damaged_member_is_a_bad_image_and_the_others_are_used(
    kind: str, tmp_path: Path, make_photo: MakePhoto
) -> None:
    photos = {f"{number}.jpg": make_photo(tmp_path / f"{number}.jpg", number).read_bytes() for number in range(3)}
    path = tmp_path / f"x.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name, content in photos.items():
                add(archive, name, content)
        raw = path.read_bytes()
        path.write_bytes(raw[: raw.index(photos["2.jpg"]) + 50])
    else:
        with zipfile.ZipFile(path, "w") as packed:
            for name, content in photos.items():
                packed.writestr(name, content)
        raw = bytearray(path.read_bytes())
        place = raw.index(photos["2.jpg"])
        raw[place + 30 : place + 60] = bytes(30)
        path.write_bytes(raw)
    found = list_images(path)
    results = dict(decode_all(found, range(len(found.files)), lambda pixels: "used"))
    assert [str(result) for result in results.values()].count("used") == 2
    assert len(results) + len(found.bad) == 3


def test_an_archive_that_changes_while_it_is_read_ends_the_command(world: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(Path(world["tar"]).read_bytes())
    found = list_images(path)
    assert found.digests
    raw = bytearray(path.read_bytes())
    start = raw.index(b"\x89PNG")
    raw[start : start + 200] = bytes(200)
    path.write_bytes(raw)
    with pytest.raises(BingoError, match=r"x.tar!.*png changed while"):
        list(decode_all(found, range(24), lambda pixels: None))
