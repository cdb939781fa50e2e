"""What the user reads: durations and sizes, plain lines in a log, names printed as they are, and the tables of `check`
and `models`.
"""

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from rich.console import Console

from bingo_compress import cli, inventory
from bingo_compress.errors import BingoError, nearest
from bingo_compress.models import catalogue
from bingo_compress.runtime import console

MARKUP = "[bold]x[/] [red][/nothing] \\[y]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (8, "8s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (60, "1m00s"),
        (185, "3m05s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (3600, "1h00m"),
        (7380, "2h03m"),
        (7439, "2h03m"),
        (360000, "100h00m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (7, "7 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_340_000, "12.3 MB"),
        (999_499, "999 kB"),
        (999_700, "1 MB"),
        (1_234_567_890, "1.23 GB"),
        (65.6e9, "65.6 GB"),
        (3e12, "3 TB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert console.size(count) == text


# ---------------------------------------------------------------- bars


def test_a_log_gets_one_plain_line_at_the_end(printed: io.StringIO) -> None:
    with console.bar(f"decode {MARKUP}", 1200) as advance:
        advance(1000)
        advance(200, note=f"3 bad {MARKUP}")
    (line,) = printed.getvalue().splitlines()
    assert re.fullmatch(
        rf"decode {re.escape(MARKUP)}: 1,200 images in \S+, [\d,]+ images/s, 3 bad {re.escape(MARKUP)}", line
    )


def test_a_log_gets_a_line_every_few_seconds(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 110.0, 111.0, 120.0, 130.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.bar("embed", 1000) as advance:
        for _ in range(4):  # at 1, 10, 11 and 20 seconds after the start
            advance(100)
    assert printed.getvalue().splitlines() == [
        "embed: 200/1,000 images, 20 images/s, 40s left",
        "embed: 400/1,000 images, 20 images/s, 30s left",
        "embed: 400 images in 30s, 13 images/s",
    ]


def test_what_an_earlier_run_did_is_not_counted_in_the_rate(
    printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.bar("distil", 1000, 700) as advance:
        advance(100)
    assert printed.getvalue().splitlines() == [
        "distil: 800/1,000 images, 10 images/s, 20s left",
        "distil: 100 images in 20s, 5 images/s (700 were done before)",
    ]


def test_a_note_stays_until_the_next(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    with console.bar("train", 30) as advance:
        advance(10, note="loss 1")
        advance(10)
        advance(10, note="")
    assert [line.endswith("loss 1") for line in printed.getvalue().splitlines()] == [True, True, False, False]


def test_a_terminal_gets_a_bar_with_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(
        console, "console", Console(file=text, force_terminal=True, width=180, color_system=None, _environ={})
    )
    with console.bar(f"a {MARKUP}", 10) as advance:
        advance(10, note=f"b {MARKUP}")
    assert f"a {MARKUP}" in text.getvalue()
    assert f"b {MARKUP}" in text.getvalue()
    assert "100%" in text.getvalue()


# ---------------------------------------------------------------- lines and tables


def test_say_and_complain_print_brackets_as_they_are(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = io.StringIO()
    monkeypatch.setattr(console, "errors", Console(file=wrong, highlight=False, soft_wrap=True))
    long = f"{MARKUP} {'x' * 300}"
    console.say(long)
    console.complain(long)
    assert printed.getvalue() == wrong.getvalue() == f"{long}\n"


def test_a_table_prints_cells_as_they_are(printed: io.StringIO) -> None:
    console.table("title", ("file", "reason"), [(MARKUP, "empty"), ("b.jpg", "[/]")])
    text = printed.getvalue()
    assert "title" in text and "file" in text and MARKUP in text and "[/]" in text
    first = next(line for line in text.splitlines() if "b.jpg" in line)
    assert re.search(r"│ b\.jpg +│ +\[/\] │", first)


def test_a_long_cell_is_folded_not_cut(printed: io.StringIO) -> None:
    name = "".join(f"{number:04d}" for number in range(100))
    console.table("", ("file", "reason"), [(name, "empty")])
    assert re.sub(r"[^0-9]", "", printed.getvalue()) == name


# ---------------------------------------------------------------- errors


def test_an_error_is_one_line() -> None:
    error = BingoError("first\n  second\tthird")
    assert (str(error), error.exit_status) == ("first second third", 2)


def test_nearest_is_best_first() -> None:
    assert nearest("resnet5", ["vgg", "resnet50", "resnet152"], 2) == ["resnet50", "resnet152"]
    assert nearest("zzz", ["a", "b"], 1)


# ---------------------------------------------------------------- check and models


def test_check_counts_sizes_and_names_what_is_bad(photos: Path, printed: io.StringIO) -> None:
    (photos / "cats" / "[red]bad.jpg").write_text("x")
    (photos / "dogs" / "empty.jpg").touch()
    inventory.check(photos)
    text = printed.getvalue()
    assert "2 files cannot be used" in text
    assert re.search(r"cats/\[red\]bad\.jpg +│ +not an image that Pillow can read", text)
    assert re.search(r"dogs/empty\.jpg +│ +empty file", text)
    assert "  1 x empty file" in text
    # Short sides: 1, 7, 17, 31, 33, 49, 64, 80.
    assert "8 usable images" in text and "short side 1 to 80 px, half of them 33 px or more" in text
    assert "2 folders" in text
    assert f"next: bingo-compress distill --data {photos}" in text


def test_check_shows_at_most_fifty_bad_files(
    tmp_path: Path, printed: io.StringIO, make_photo: Callable[..., Path]
) -> None:
    make_photo(tmp_path / "good.jpg")
    for number in range(53):
        (tmp_path / f"{number:02d}.txt").write_text("x")
    inventory.check(tmp_path)
    text = printed.getvalue()
    assert text.count(".txt ") == 50
    assert "... and 3 more" in text
    assert "53 x not an image (its name ends in .txt)" in text
    assert "no folder names that could be labels" in text


def test_check_of_no_image_is_an_error(tmp_path: Path, printed: io.StringIO) -> None:
    (tmp_path / "a.jpg").write_text("x")
    with pytest.raises(BingoError, match="none that can be decoded among 1 files"):
        inventory.check(tmp_path)
    assert "a.jpg" in printed.getvalue()


def test_check_writes_nothing(photos: Path, printed: io.StringIO) -> None:
    before = sorted(photos.parent.rglob("*"))
    inventory.check(photos)
    assert sorted(photos.parent.rglob("*")) == before


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_outside_the_terminals_encoding_is_printed_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_photo: Callable[..., Path], encoding: str
) -> None:
    make_photo(tmp_path / "good.jpg")
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_text("x")
    raw = io.BytesIO()
    monkeypatch.setattr(console, "console", Console(highlight=False, soft_wrap=True, width=140))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors="strict"))
    monkeypatch.setattr(sys, "argv", ["bingo-compress", "check", "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    assert b"caf\\udce9.jpg" in raw.getvalue()
    assert b"1 usable images" in raw.getvalue()


def test_a_name_cannot_steer_the_terminal(printed: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b]0;title\x07\x1b[2J\x9b1m.jpg"
    console.say(f"{hostile} left out")
    console.table("", ("file",), ((hostile,),))
    console.complain(f"error: {hostile}")
    told = printed.getvalue() + capsys.readouterr().err
    assert not set("\x1b\x07\x9b") & set(told) and told.count(r"a\x1b]0;title\x07\x1b[2J\x9b1m.jpg") == 3
    assert console.visible("two\nlines, caf\u00e9, \U0001f600") == "two\nlines, caf\u00e9, \U0001f600"


def test_models_counts_the_parameters_without_classifier(printed: io.StringIO) -> None:
    catalogue.show("test_res*")
    count = sum(parameter.numel() for parameter in timm.create_model("test_resnet", num_classes=0).parameters())
    assert re.search(
        rf"test_resnet +│ +{count / 1e6:.2f} M │ +{count * 4 / 1e6:.1f} │ 160 px │ +yes", printed.getvalue()
    )


def test_models_finds_parts_of_names(printed: io.StringIO) -> None:
    catalogue.show("v4_conv_small_0")
    text = printed.getvalue()
    assert re.search(r"mobilenetv4_conv_small_035 .* no ", text)
    assert re.search(r"mobilenetv4_conv_small_050 .* yes ", text)
    assert "mobilenetv4_conv_small " not in text


def test_models_that_are_none_name_the_nearest() -> None:
    with pytest.raises(BingoError, match=r"no model matches 'mobilnetv3'; the nearest are mobilenetv3, "):
        catalogue.show("mobilnetv3")


def test_the_short_list_is_of_models_that_exist() -> None:
    assert [name for name in catalogue.SHORT_LIST if not timm.is_model(name)] == []


def test_a_curve_is_as_wide_as_it_may_be_and_shows_the_way() -> None:
    assert console.sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert console.sparkline([1.0] * 100) == "▁" * 8 and console.sparkline([2, 1]) == "█▁"
    assert console.sparkline([3.0]) == console.sparkline([]) == ""


@pytest.mark.parametrize("width", [40, 60, 100])
def test_no_line_of_a_bar_wraps(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.StringIO()
    narrow = Console(file=printed, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(console, "console", narrow)
    with console.bar("distil", 647_936) as advance:
        curve = console.sparkline([4, 3, 2, 1])
        advance(120_000, note=f"epoch 12/100, loss {curve} 71% of its first; time: student 95%, loss 4%, wait 0%")
    last = printed.getvalue().replace("\r", "\n").splitlines()
    shown = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line) for line in last]
    assert max(map(len, shown)) <= width and any("distil" in line and "19%" in line for line in shown)
    assert any("epoch 12/100, loss █" in line for line in shown)
