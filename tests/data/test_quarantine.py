"""Exact copies, the limit on bad files, and files that were made to do harm."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Ran, flags, photos, recipe

from bingo_compress.data import image_list, pixel_store, quarantine
from bingo_compress.data.listing import list_images
from bingo_compress.data.quarantine import write_quarantine
from bingo_compress.errors import BingoError
from bingo_compress.models import weights
from bingo_compress.recipe import KEYS, load_recipe, make_recipe
from bingo_compress.training import plan

CPU = torch.device("cpu")


# ---------------------------------------------------------------- exact copies


@pytest.fixture
def doubled(tmp_path: Path) -> Path:
    """Six photos, three copies of one of them and one of another; and two files that are alike only in size, or in size
    and end.
    """
    root = photos(tmp_path / "photos", each=2)
    first = (root / "kind0" / "000.png").read_bytes()
    for name in ("a", "b", "c"):
        (root / f"kind2/copy_{name}.png").write_bytes(first)
    (root / "kind2/other.png").write_bytes((root / "kind1" / "001.png").read_bytes())
    (root / "kind2/size.png").write_bytes(first[:-1] + bytes([first[-1] ^ 1]))
    (root / "kind2/start.png").write_bytes(bytes([first[0] ^ 1]) + first[1:])
    return root


COPIES = [
    ("kind2/copy_a.png", "kind0/000.png"),
    ("kind2/copy_b.png", "kind0/000.png"),
    ("kind2/copy_c.png", "kind0/000.png"),
]
COPIES += [("kind2/other.png", "kind1/001.png")]


def test_exact_copies_are_found(doubled: Path) -> None:
    assert quarantine.copies(list_images(doubled)) == COPIES


def test_large_files_that_differ_before_their_end_are_no_copies(tmp_path: Path) -> None:
    for name, start in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / f"{name}.jpg").write_bytes(start + bytes(20_000))
    assert quarantine.copies(list_images(tmp_path)) == [("c.jpg", "a.jpg")]


def test_files_that_cannot_be_read_are_no_copies(doubled: Path) -> None:
    for name in ("gone1.png", "gone2.png"):
        (doubled / name).write_bytes(b"x")
    folder = list_images(doubled)
    for name in ("gone1.png", "gone2.png"):
        (doubled / name).unlink()
    assert quarantine.copies(folder) == COPIES


@pytest.mark.parametrize(("duplicates", "files"), [("keep", 12), ("drop", 8)])
def test_copies_are_said_and_kept_or_dropped(doubled: Path, printed: io.StringIO, duplicates: str, files: int) -> None:
    folder = plan.take(recipe(data=str(doubled), duplicates=duplicates))
    assert len(folder.files) == files
    assert "4 files are exact copies of another, for example kind2/copy_a.png of kind0/000.png" in printed.getvalue()
    assert ("left out" in printed.getvalue()) == (duplicates == "drop")
    quarantine.report(folder, doubled.parent / "quarantine.csv")
    with (doubled.parent / "quarantine.csv").open(newline="") as handle:
        rows = list(csv.reader(handle))[1:]
    assert rows == ([[name, f"exact copy of {first}"] for name, first in COPIES] if duplicates == "drop" else [])


# ---------------------------------------------------------------- --max-bad


def spoil(root: Path, count: int) -> None:
    for number in range(count):
        (root / f"bad{number}.jpg").write_text("words" if number % 3 else "")


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """16 photos, 4 files that are none, and 9 that do not say that they are."""
    root = photos(tmp_path / "photos", each=4, kinds=4)
    spoil(root, 4)
    for number in range(9):
        (root / f"{number}.json").write_text("{}")
    return root


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [("100%", True), ("20%", True), ("19.9%", False), ("4", True), (3, False), ("0%", False), (0, False)],
)
def test_the_limit_is_a_share_or_a_number(spoilt: Path, tmp_path: Path, limit: Any, allowed: bool) -> None:
    folder = plan.take(recipe(data=str(spoilt), max_bad=limit))
    (tmp_path / "run" / "work").mkdir(parents=True)
    if allowed:
        assert len(pixel_store.build(folder, 32, tmp_path / "run" / "work", CPU)[0]) == 16
        assert not (tmp_path / "run" / "quarantine.csv").exists()
        return
    with pytest.raises(
        BingoError,
        match=(
            rf"^--max-bad {limit}: expected at most {'3' if limit not in ('0%', 0) else '0'} of 20 files .* found \d"
            r" so far"
        ),
    ):
        pixel_store.build(folder, 32, tmp_path / "run" / "work", CPU)
    assert (tmp_path / "run" / "quarantine.csv").is_file()


@pytest.mark.parametrize("limit", ["5", "100%", "0.5%", "99.99%"])
def test_limits_that_can_be_written(limit: str) -> None:
    assert make_recipe({"max_bad": limit}, "x").max_bad == limit


@pytest.mark.parametrize("limit", ["", "-1", "101%", "5 %", "many", "0.05", "100.5%", 0.05])
def test_limits_that_cannot(limit: Any) -> None:
    with pytest.raises(BingoError, match=r"max_bad.*a share such as 5%"):
        make_recipe({"max_bad": limit}, "x")


def test_it_is_refused_as_soon_as_it_is_known(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_store, "SHARD", 5)
    decoded: list[int] = []
    real = pixel_store.decode_all

    def counted(folder: image_list.ImageList, rows: range, *rest: Any, **named: Any) -> Any:
        decoded.extend(rows)
        return real(folder, rows, *rest, **named)

    monkeypatch.setattr(pixel_store, "decode_all", counted)
    (tmp_path / "run" / "work").mkdir(parents=True)
    # Two are empty files, which the listing sees; two are the first that are decoded.
    for limit, seen in (
        (1, 0),
        (2, 5),
    ):
        with pytest.raises(BingoError, match="found"):
            pixel_store.build(plan.take(recipe(data=str(spoilt), max_bad=limit)), 32, tmp_path / "run" / "work", CPU)
        assert len(decoded) == seen
    with pytest.raises(BingoError, match="found 4 so far"):  # the first shard is there by now, and counts
        pixel_store.build(plan.take(recipe(data=str(spoilt), max_bad=3)), 32, tmp_path / "run" / "work", CPU)
    assert len(decoded) == 7  # the two bad ones of that shard were tried again


@pytest.mark.slow
def test_distill_ends_with_counts_reasons_and_the_list(spoilt: Path, tmp_path: Path, bingo: Callable[..., Ran]) -> None:
    run = tmp_path / "run"
    ran = bingo("distill", *flags(data=spoilt), "--out", run, "--max-bad", "5%")
    assert ran.status == 2
    assert (
        "--max-bad 5%: expected at most 1 of 20 files that cannot be used, found 2 so far (2 x empty file)" in ran.err
    )
    assert str(run / "quarantine.csv") in ran.err
    with (run / "quarantine.csv").open(newline="") as handle:
        assert ["bad0.jpg", "empty file"] in list(csv.reader(handle))
    ran = bingo("distill", *flags(data=spoilt), "--out", run, "--max-bad", "25%", "--resume")
    assert ran.status == 0
    assert "13 files cannot be used and are left out" in ran.out


def test_reasons_that_differ_in_a_number_are_one() -> None:
    bad = [("a", "truncated (7 bytes)"), ("b", "truncated (19 bytes)"), ("c", "its name ends in .mp4"), ("d", "x")]
    assert quarantine.reasons(bad, 2) == ["2 x truncated (N bytes)", "1 x its name ends in .mp4"]


# ---------------------------------------------------------------- hostile files


class Harm:
    """What unpickling would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.safetensors", "weights.bin"])
@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_is_never_run(tmp_path: Path, bingo: Callable[..., Ran], name: str, new_format: bool) -> None:
    torch.save(
        {"state_dict": {"x": Harm(tmp_path / "harm")}}, tmp_path / name, _use_new_zipfile_serialization=new_format
    )
    with pytest.raises(BingoError, match=r"--teacher-weights.*(never run|not a readable weights file)"):
        weights.read_tensors(tmp_path / name, "--teacher-weights")
    assert not (tmp_path / "harm").exists()
    torch.load(io.BytesIO((tmp_path / name).read_bytes()), weights_only=False)
    assert (tmp_path / "harm").exists()  # it would have


def test_distill_refuses_pickled_code(tmp_path: Path, bingo: Callable[..., Ran]) -> None:
    root = photos(tmp_path / "photos", each=3)
    torch.save(Harm(tmp_path / "harm"), tmp_path / "weights.pth")
    ran = bingo("distill", *flags(data=root, teacher_weights=tmp_path / "weights.pth"), "--out", tmp_path / "run")
    assert ran.status == 2
    assert "holds more than tensors (pickled code), which is never run" in ran.err
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "run").exists()


def test_no_name_in_the_quarantine_is_a_formula_or_a_second_row(tmp_path: Path) -> None:
    names = [
        "=cmd|' /C calc'!A0.jpg",
        "+1.jpg",
        "-2.jpg",
        "@SUM(A1).jpg",
        "\tx.jpg",
        "\rx.jpg",
        "two\nrows,1.jpg",
        'quo"te\n=1.jpg',
        "plain.jpg",
    ]
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_text("words")
    write_quarantine(tmp_path / "q.csv", ((name, "reason\nof two lines") for name in names))
    with (tmp_path / "q.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.reader(handle))[1:]
    assert len(rows) == len(names)
    assert not [path for path, _ in rows if path.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert all((tmp_path / "photos" / path).is_file() for path, _ in rows)  # what is written still names the file


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system", "python/module:os"]
)
def test_a_recipe_with_python_in_it_is_refused(tmp_path: Path, tag: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"epochs: !!{tag} ['touch {tmp_path / 'harm'}']\n")
    with pytest.raises(BingoError, match="expected YAML, found something else"):
        load_recipe(tmp_path / "recipe.yaml", [], {})
    with pytest.raises(BingoError, match="expected a plain value"):
        load_recipe(None, [f"epochs=!!{tag} ['touch {tmp_path / 'harm'}']"], {})
    assert not (tmp_path / "harm").exists()


def test_a_yaml_of_a_thousand_million_laughs_is_refused(tmp_path: Path) -> None:
    lines = [f"{KEYS[1]}: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{KEYS[n + 1]}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "recipe.yaml").write_text("\n".join([*lines, "data: *a8"]))
    with pytest.raises(BingoError, match=r"data: Input should be a valid string, found .\[") as refused:
        load_recipe(tmp_path / "recipe.yaml", [], {})
    assert len(str(refused.value)) < 10_000  # and not a thousand million x
