"""The words of the command line: its help, what is refused at once, and what is said when it is stopped."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Ran, command, flags, photos, untrained_run
from test_cli import one_error

import bingo_compress
from bingo_compress import cli
from bingo_compress.errors import BingoError
from bingo_compress.recipe import load_recipe
from bingo_compress.words import GROUPS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return photos(tmp_path / "photos", 2)


@pytest.fixture
def bingo(bingo: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)
    return bingo


def test_the_help_has_headings_and_whole_summaries(bingo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = bingo("--help").out
    assert "..." not in shown.split("Commands:")[1] and max(map(len, shown.splitlines())) <= 80
    assert all(f"\n  {name} " in shown for name in cli.AGAIN)
    shown = bingo("distill", "--help").out
    heads = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert heads == [f"{name.capitalize()}:" for name in GROUPS]
    assert shown.index("Models:") < shown.index("--teacher") < shown.index("Data:") < shown.index("--max-bad")
    assert "\nOptions:" not in shown and "[default: runs/first]" in " ".join(shown.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_in_the_home_folder_and_completes(shell: str, tmp_path: Path) -> None:
    program = [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'bingo-compress'; from bingo_compress.cli import main; main()",
    ]
    home = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / ".config")}
    home["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"  # or typer takes the shell that runs the tests
    ran = subprocess.run([*program, "--install-completion", shell], capture_output=True, text=True, env=home)
    assert ran.returncode == 0 and "completion installed" in ran.stdout, ran.stderr
    assert any("_BINGO_COMPRESS_COMPLETE" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    if shell == "bash":
        asked = {"_BINGO_COMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": "bingo-compress dis", "COMP_CWORD": "1"}
        found = subprocess.run(program, capture_output=True, text=True, env=home | asked)
        assert found.stdout.split() == ["distill"]


@pytest.mark.parametrize(
    ("words", "way"),
    [
        (("distill",), "the same command with --resume goes on"),
        (("compare",), "the same command goes on"),
        (("validate", "--run", "x"), "the same command goes on"),
        (("export", "--run", "x"), "the same command begins the export anew"),
        (("suggest",), "the same command goes on"),
        (("demo",), "demo --overwrite begins anew"),
        (("check",), "the same command begins anew"),
    ],
)
def test_what_is_stopped_is_told_how_it_goes_on_itself(
    words: tuple[str, ...],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(**_: Any) -> None:
        raise KeyboardInterrupt

    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a file")

    for error, status in ((stopped, 130), (full, 2)):
        monkeypatch.setattr(cli, "app", lambda args, standalone_mode, error=error: error())
        ran = command(monkeypatch, capsys, *words)
        assert ran.status == status and ran.err.count("\n") == (2 if status == 130 else 1)
        assert way in ran.err and ("--resume" in ran.err) == (words == ("distill",))


def test_a_demo_in_a_folder_with_something_in_it_names_its_own_way(bingo: Any, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "recipe.yaml").write_text("")
    ran = bingo("demo", "--out", "demo")
    one_error(ran, "demo is not empty", "--overwrite")
    assert "--resume" not in ran.err


def test_a_result_that_has_no_place_is_refused_before_any_work(bingo: Any, tmp_path: Path) -> None:
    untrained_run(tmp_path, 2)
    (tmp_path / "model.onnx").write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    for words in (("validate", "--run", "run", "--data", "photos"), ("latency", "model.onnx")):
        one_error(bingo(*words, "--json", "nowhere/proof.json"), "--json: expected a file", "make nowhere first")
        one_error(bingo(*words, "--json", tmp_path), "--json: expected a file", "name a file in it")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"WORLD_SIZE": ""}, "found ''"),
        ({"WORLD_SIZE": "two"}, "found 'two'"),
        ({"WORLD_SIZE": "0"}, "found '0'"),
        ({"WORLD_SIZE": "2"}, "expected RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "expected MASTER_ADDR beside WORLD_SIZE=2"),
    ],
)
def test_what_a_cluster_left_in_the_environment_is_one_line(
    given: dict[str, str], said: str, bingo: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    one_error(bingo("check", "--data", data), "WORLD_SIZE", said, "unset")
    with pytest.raises(BingoError, match="WORLD_SIZE"):
        bingo_compress.distill(
            data=data, teacher="test_resnet", student="test_vit", teacher_weights="random", out="run"
        )


def test_a_tilde_is_the_home_folder_wherever_a_path_stands(
    bingo: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: ~/photos\nteacher_weights: ~/gone.pth\n")
    said = f"found no file {tmp_path / 'gone.pth'}"
    one_error(bingo("distill", *flags(data=data, teacher_weights="~/gone.pth"), "--out=run"), said)
    given = ("--teacher", "test_resnet", "--student", "test_vit", "--out=~/run")
    one_error(bingo("distill", "--recipe=~/mine.yaml", *given), said)
    one_error(bingo("distill", *given, "--set", "teacher_weights=~/gone.pth", "--data=~/photos"), said)
    assert bingo("check", "--data=~/photos").status == 0
    one_error(bingo("export", "--run=~/nowhere"), f"no recipe.yaml in {tmp_path / 'nowhere'}")
    one_error(bingo("validate", "--run=~/nowhere", "--data=~/photos"), f"no recipe.yaml in {tmp_path / 'nowhere'}")
    assert (
        load_recipe(None, [], {"data": "~/photos", "teacher": "~"}).model_dump().items()
        >= {
            "data": str(data),
            "teacher": "~",
        }.items()
    )


@pytest.mark.parametrize(
    "words", [("export",), ("validate", "--data", "x"), ("validate", "--data", "x", "--json", ".")]
)
def test_a_run_that_is_not_there_is_refused_without_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv[0] = 'bingo-compress'\nfrom bingo_compress.cli import main\n"
        "try: main()\nexcept SystemExit as stop: print(stop.code, sorted({'torch', 'timm'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words, "--run", str(tmp_path)], capture_output=True, text=True)
    assert ran.stdout.strip() == "2 []" and ran.stderr.count("\n") == 1 and ran.stderr.startswith("error: --")


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--help",), ("models", "test_res*"), ("check", "--data", "{data}")])
def test_a_reader_that_has_seen_enough_ends_it_without_a_word(words: tuple[str, ...], data: Path) -> None:
    asked = [word.format(data=data) for word in words]
    with subprocess.Popen(
        [sys.executable, "-m", "bingo_compress", *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as ran:
        assert ran.stdout and ran.stderr
        ran.stdout.close()
        assert ran.stderr.read() == b"" and ran.wait() == cli.CLOSED_PIPE
