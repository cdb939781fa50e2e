"""A folder as people have them: every file is either used or named with its reason, and no link or name stops the
scan.
"""

import csv
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from bingo_edge.image import ImageError

from bingo_compress.data.decode import decode_all
from bingo_compress.data.image_list import ImageList, labels_of, read_contents, same_bytes
from bingo_compress.data.listing import list_images
from bingo_compress.data.quarantine import write_quarantine
from bingo_compress.errors import BingoError
from bingo_compress.runtime.machine import in_threads
from bingo_compress.sources.listed import Names

MakePhoto = Callable[..., Path]
NOT_UTF8 = os.fsdecode(b"caf\xe9.jpg")


def outcome(root: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """What a run makes of a folder: {usable: (width, height)} and {unusable: reason}."""
    folder = list_images(root)
    good, bad = {}, dict(folder.bad)
    for index, result in decode_all(
        folder, range(len(folder.files)), lambda pixels: (pixels.shape[1], pixels.shape[0])
    ):
        if isinstance(result, ImageError):
            bad[folder.files[index]] = str(result)
        else:
            good[folder.files[index]] = result
    assert len(good) + len(bad) == len(folder.files) + len(folder.bad)
    return good, bad


# ---------------------------------------------------------------- what is used and what is not


def test_usable_files_are_sorted_and_relative(photos: Path) -> None:
    folder = list_images(photos)
    assert folder.files == (
        "cats/0.jpg",
        "cats/2.jpg",
        "cats/4.jpg",
        "cats/6.jpg",
        "dogs/1.jpg",
        "dogs/3.jpg",
        "dogs/5.jpg",
        "dogs/7.jpg",
    )
    assert folder.bad == ()
    assert folder.read_raw(2) == photos / "cats" / "4.jpg"
    assert outcome(photos)[0]["cats/4.jpg"] == (1, 40)


def test_damaged_files_are_named_with_their_reason(tmp_path: Path, make_photo: MakePhoto) -> None:
    whole = make_photo(tmp_path / "good.jpg", 1, 90, 60).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.jpg").write_bytes(np.random.default_rng(0).bytes(500))
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "notes.TXT").write_text("hello")
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "no_suffix").write_bytes(whole)
    (tmp_path / "wrong_suffix.png").write_bytes(whole)
    good, bad = outcome(tmp_path)
    assert good == dict.fromkeys(["good.jpg", "no_suffix", "wrong_suffix.png"], (90, 60))
    assert "truncated" in bad.pop("half.jpg").lower()
    assert bad == {
        "noise.jpg": "not an image that Pillow can read",
        "text.jpg": "not an image that Pillow can read",
        "empty.jpg": "empty file",
        "notes.TXT": "not an image (its name ends in .txt)",
        "data.json": "not an image (its name ends in .json)",
    }


def test_things_that_are_no_files(tmp_path: Path, make_photo: MakePhoto) -> None:
    make_photo(tmp_path / "good.jpg")
    make_photo(tmp_path / "folder.jpg" / "inside.jpg")
    (tmp_path / "empty_folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    good, bad = outcome(tmp_path)
    assert sorted(good) == ["folder.jpg/inside.jpg", "good.jpg"]
    assert bad == {
        "dangling.jpg": "link that leads nowhere",
        "self.jpg": "link that leads nowhere",
        "pipe.jpg": "not a regular file",
    }


@pytest.mark.parametrize("target", [".", "..", "../..", "/", "../deep"])
def test_links_to_folders_above_or_to_itself_end(tmp_path: Path, make_photo: MakePhoto, target: str) -> None:
    root = tmp_path / "a" / "photos"
    make_photo(root / "deep" / "good.jpg")
    (root / "deep" / "loop").symlink_to(target)
    assert list_images(root) == ImageList(root, ("deep/good.jpg",), ())


def test_a_link_to_a_folder_elsewhere_is_followed_once(tmp_path: Path, make_photo: MakePhoto) -> None:
    make_photo(tmp_path / "elsewhere" / "x.jpg")
    root = tmp_path / "photos"
    make_photo(root / "own.jpg")
    for name in ("first", "second"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    assert list_images(root).files == ("own.jpg", "first/x.jpg")


@pytest.mark.parametrize("link", ["a_before.jpg", "z_after.jpg"])
@pytest.mark.parametrize("kind", ["symbolic", "hard", "from another folder"])
def test_a_file_with_two_names_is_used_once(tmp_path: Path, make_photo: MakePhoto, link: str, kind: str) -> None:
    real = make_photo(tmp_path / "m.jpg")
    if kind == "hard":
        (tmp_path / link).hardlink_to(real)
    else:
        place = tmp_path / ("sub" if kind == "from another folder" else ".") / link
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(real)
    folder = list_images(tmp_path)
    assert len(folder.files) == 1
    assert folder.bad == ()


def test_two_files_of_the_same_content_are_two_images(tmp_path: Path, make_photo: MakePhoto) -> None:
    make_photo(tmp_path / "a.jpg")
    make_photo(tmp_path / "b.jpg")
    assert list_images(tmp_path).files == ("a.jpg", "b.jpg")


STRANGE = [
    "été ☃ 写真.jpg",
    "two\nlines.jpg",
    "[bold]x[/].jpg",
    NOT_UTF8,
    " lead and trail .jpg",
    "-rf.jpg",
    'quo"te,comma.jpg',
]


def test_strange_names_are_read_like_others(tmp_path: Path, make_photo: MakePhoto) -> None:
    for number, name in enumerate(STRANGE):
        make_photo(tmp_path / "x" / name, number, 20 + number, 10)
    good, bad = outcome(tmp_path)
    assert good == {f"x/{name}": (20 + number, 10) for number, name in enumerate(STRANGE)}
    assert bad == {}
    assert len(list_images(tmp_path).fingerprint()) == 64


def test_a_file_that_vanishes_after_the_scan_is_a_bad_file(photos: Path) -> None:
    folder = list_images(photos)
    folder.read_raw(3).unlink()
    results = dict(decode_all(folder, range(len(folder.files)), np.shape))
    assert str(results.pop(3)) == "No such file or directory"
    assert not any(isinstance(result, ImageError) for result in results.values())


# ---------------------------------------------------------------- folders that are none


def test_folder_errors(tmp_path: Path, make_photo: MakePhoto) -> None:
    with pytest.raises(BingoError, match=r"^--test: expected a folder of images, found nothing at"):
        list_images(tmp_path / "none", "--test")
    with pytest.raises(BingoError, match=r"^--data: expected a folder of images, found a file"):
        list_images(make_photo(tmp_path / "a.jpg"))
    (tmp_path / "empty" / "in" / "empty").mkdir(parents=True)
    with pytest.raises(BingoError, match="found an empty folder"):
        list_images(tmp_path / "empty")


def test_a_folder_of_other_files_only_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert list_images(tmp_path).bad == (("a.txt", "not an image (its name ends in .txt)"),)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_an_unreadable_folder_is_named(tmp_path: Path, make_photo: MakePhoto) -> None:
    make_photo(tmp_path / "good.jpg")
    (tmp_path / "locked").mkdir(mode=0)
    assert list_images(tmp_path).bad == (("locked", "folder cannot be read"),)


def test_the_fingerprint_is_of_names_and_contents_wherever_the_folder_lies(
    tmp_path: Path, make_photo: MakePhoto
) -> None:
    root = tmp_path / "one"
    first, second = make_photo(root / "a.jpg"), make_photo(root / "b.jpg")
    seen = [list_images(root).fingerprint()]
    os.utime(first, ns=(0, 12345))
    assert list_images(root).fingerprint() == seen[0]
    root = root.rename(tmp_path / "two")
    assert list_images(root).fingerprint() == seen[0]
    first, second = root / "a.jpg", root / "b.jpg"
    overwrite_unseen(first, b"x")
    seen.append(list_images(root).fingerprint())
    second.rename(root / "c.jpg")
    seen.append(list_images(root).fingerprint())
    assert len(set(seen)) == 3


def overwrite_unseen(file: Path, end: bytes) -> None:
    """Another content of the same size and time of change."""
    status = file.stat()
    file.write_bytes(file.read_bytes()[: -len(end)] + end)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_two_folders_of_equal_names_sizes_and_times_are_two(tmp_path: Path, make_photo: MakePhoto) -> None:
    for name in ("bank", "test"):
        file = make_photo(tmp_path / name / "cats" / "1.jpg")
        overwrite_unseen(file, name[:2].encode())
        os.utime(file, ns=(5, 5))
    assert list_images(tmp_path / "bank").fingerprint() != list_images(tmp_path / "test").fingerprint()


def test_a_picture_that_changes_after_it_was_read_ends_the_command(photos: Path) -> None:
    folder = list_images(photos)
    folder.fingerprint()
    overwrite_unseen(folder.read_raw(3), b"x")
    with pytest.raises(BingoError, match=r"\.jpg changed while the command was running"):
        list(decode_all(folder, range(len(folder.files)), np.shape))


def test_a_picture_that_was_only_touched_goes_on(photos: Path) -> None:
    folder = list_images(photos)
    folder.fingerprint()
    folder.read_raw(3).chmod(0o600)
    os.utime(folder.read_raw(2))
    assert len(list(decode_all(folder, range(len(folder.files)), np.shape))) == len(folder.files)


def test_some_files_alone_are_read(photos: Path) -> None:
    folder = list_images(photos)
    some = read_contents(folder, range(2, 5))
    assert np.array_equal(some.digests, folder.contents.digests[2:5])
    assert np.array_equal(some.stamps, folder.contents.stamps[2:5])


def test_a_part_of_a_folder_keeps_what_was_read(photos: Path) -> None:
    folder = list_images(photos)
    part = folder.only([4, 1])
    assert part.files == (folder.files[4], folder.files[1])
    folder.fingerprint()
    read = folder.only([4, 1])
    assert read.read is not None and read.digests == [folder.digests[4], folder.digests[1]] == part.digests


def test_a_part_that_is_the_whole_is_no_copy_of_it(photos: Path) -> None:
    folder = list_images(photos)
    assert folder.only(range(len(folder.files))) is folder
    assert folder.only(list(range(len(folder.files)))[::-1]).files == tuple(folder.files)[::-1]


def test_names_are_as_they_were_given() -> None:
    given = ("", "b/ä€😀.jpg", os.fsdecode(b"\xff\x00\n.png"), "", "a" * 5000)
    names = Names(given)
    assert tuple(names) == given == names and names != given[::-1] and names != given[:-1]
    assert [names[place] for place in range(-5, 5)] == [*given, *given]
    assert names[1:4] == given[1:4] and names[::-2] == given[::-2] and len(names[9:]) == 0
    with pytest.raises(IndexError):
        names[5]
    letters, ends = names.parts
    assert Names.of(bytes(letters), ends.tolist()) == given
    assert names == Names(given) and hash(names) == hash(given) and len(Names()) == 0


# ---------------------------------------------------------------- labels


def test_labels_come_from_the_first_folder() -> None:
    folder = ImageList(Path(), ("cats/1.jpg", "dogs/b/1.jpg", "dogs/a/2.jpg", "ants/x.jpg"), ())
    assert labels_of(folder) == (["ants", "cats", "dogs"], [1, 2, 2, 0])


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (("1.jpg", "2.jpg"), "found 0 such folders and 2 images outside"),
        (("cats/1.jpg", "cats/2.jpg"), "found 1 such folders and 0 images outside"),
        (("cats/1.jpg", "dogs/2.jpg", "3.jpg"), "found 2 such folders and 1 images outside"),
    ],
)
def test_no_labels_says_what_was_found(files: tuple[str, ...], found: str) -> None:
    with pytest.raises(BingoError, match=found):
        labels_of(ImageList(Path("root"), files, ()))


# ---------------------------------------------------------------- threads


def test_in_threads_keeps_the_order_when_the_first_is_the_last_to_finish() -> None:
    others = threading.Semaphore(0)
    finished: list[int] = []

    def job(item: int) -> int:
        if item == 0:
            for _ in range(3):
                assert others.acquire(timeout=20)
        finished.append(item)
        others.release()
        return item * item

    assert list(in_threads(job, range(10), threads=4)) == [(item, item * item) for item in range(10)]
    assert finished[0] != 0


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (3, 2), (2, 5)])
def test_in_threads_looks_ahead_no_more_than_asked(threads: int, ahead: int) -> None:
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for item in range(30):
            taken += 1
            yield item

    early = [taken - item - 1 for item, _ in in_threads(lambda item: item, source(), threads, ahead)]
    assert len(early) == 30
    assert max(early) == ahead
    assert early[-1] == 0


def test_in_threads_of_nothing_is_nothing() -> None:
    assert list(in_threads(lambda item: item, [])) == []


def test_in_threads_hands_on_an_error_and_stops() -> None:
    started: list[int] = []

    def job(item: int) -> int:
        started.append(item)
        if item == 4:
            raise LookupError("fourth")
        return item

    results = in_threads(job, range(1000), threads=2, ahead=3)
    assert [next(results) for _ in range(4)] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    with pytest.raises(LookupError, match="fourth"):
        next(results)
    assert len(started) <= 4 + 1 + 3


def test_decode_all_gives_the_images_asked_for_in_the_order_asked(photos: Path) -> None:
    folder = list_images(photos)
    sizes = [(index, shape) for index, shape in decode_all(folder, [7, 0, 2], np.shape)]
    assert sizes == [(7, (7, 9, 3)), (0, (57, 33, 3)), (2, (40, 1, 3))]


# ---------------------------------------------------------------- quarantine


def test_quarantine_is_read_back_by_csv(tmp_path: Path) -> None:
    bad = [
        ("a.jpg", "empty file"),
        ("two\nlines.jpg", 'says "no", twice'),
        ("é,☃.jpg", "x"),
        (NOT_UTF8, "not an image"),
        ("=1+1.jpg", "y"),
    ]
    write_quarantine(tmp_path / "quarantine.csv", iter(bad))
    with (tmp_path / "quarantine.csv").open(newline="", encoding="utf-8") as handle:
        header, *rows = csv.reader(handle)
    assert header == ["path", "reason"]
    assert rows == [
        [{"=1+1.jpg": "./=1+1.jpg"}.get(name, name).replace("\udce9", "\\udce9"), reason] for name, reason in bad
    ]


def test_quarantine_of_nothing_is_a_header(tmp_path: Path) -> None:
    write_quarantine(tmp_path / "quarantine.csv", [])
    assert (tmp_path / "quarantine.csv").read_text().split() == ["path,reason"]


def test_the_shared_photos_are_all_usable(clothing: Path) -> None:
    folder = list_images(clothing / "validation")
    assert (len(folder.files), folder.bad) == (341, ())
    assert len(labels_of(folder)[0]) == 10


def test_the_first_file_of_the_same_bytes_is_the_one_a_dict_finds() -> None:
    random = np.random.default_rng(0)
    for values in (2, 3, 200):  # many copies, digests that differ in one byte at either end, and zeros within
        digests = np.zeros((300, 32), np.uint8)
        digests[:, [0, 15, 31]] = random.integers(0, values, (300, 3))
        first: dict[bytes, int] = {}
        found = [first.setdefault(bytes(row), place) if row.any() else place for place, row in enumerate(digests)]
        assert same_bytes(digests).tolist() == found
    assert same_bytes(np.empty((0, 32), np.uint8)).tolist() == []
