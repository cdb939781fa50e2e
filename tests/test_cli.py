"""The command line, in this process: what it prints, and every bad input as one line, exit status 2 and nothing
written.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Ran, bad_files, command, encoder, flags, photos
from PIL import Image

from bingo_compress import __version__, cli
from bingo_compress.features import teacher_pass
from bingo_compress.runtime import run_dir


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return photos(tmp_path / "photos", 4)


@pytest.fixture
def bingo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)  # where the default --out would be made

    def run(*words: object) -> Ran:
        return command(monkeypatch, capsys, *words)

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_error(ran: Ran, *said: str) -> None:
    """Exit status 2, one line on standard error, no traceback, and in that line all of `said`."""
    assert ran.status == 2, ran
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in ran.out + ran.err
    for text in said:
        assert text in lines[0]


# ---------------------------------------------------------------- bad input


def test_a_folder_that_is_missing_a_file_empty_or_without_an_image(bingo: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    for number in range(9):
        (tmp_path / "words" / f"{number}.txt").write_text("words")
    (tmp_path / "file.png").write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    one_error(bingo("distill", *flags(data=tmp_path / "gone"), "--out", "run"), "--data", "found nothing", "gone")
    one_error(bingo("distill", *flags(data=tmp_path / "file.png"), "--out", "run"), "--data", "found a file")
    one_error(bingo("distill", *flags(data=tmp_path / "empty"), "--out", "run"), "--data", "empty folder")
    one_error(bingo("distill", *flags(data=tmp_path / "words"), "--out", "run"), "--data", "found 0")
    one_error(bingo("check", "--data", tmp_path / "gone"), "--data", "found nothing")
    one_error(bingo("distill", "--teacher", "resnet18", "--student", "resnet10t"), "--data", "none given")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_whose_images_are_all_broken(bingo: Any, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for number in range(9):
        (tmp_path / "broken" / f"{number}.jpg").write_bytes(b"\xff\xd8\xff broken")
    one_error(bingo("distill", *flags(data=tmp_path / "broken"), "--out", "run"), "found none that can be decoded")
    ran = bingo("check", "--data", tmp_path / "broken")
    one_error(ran, "found none that can be decoded among 9 files")
    assert not list((tmp_path / "run").rglob("student*"))


def test_fewer_images_than_the_bag_needs(bingo: Any, data: Path, tmp_path: Path) -> None:
    one_error(
        bingo("distill", *flags(data=data, bag_size=12), "--out", "run"), "a bag holds (12)", "found 12", "--bag-size"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_an_unknown_model_gets_the_three_nearest(role: str, bingo: Any, data: Path, tmp_path: Path) -> None:
    ran = bingo("distill", *flags(data=data, **{role: "mobilnetv3_smal_050"}), "--out", "run")
    one_error(ran, f"--{role}", "unknown model 'mobilnetv3_smal_050'", "mobilenetv3_small_050")
    assert len(ran.err.split("the nearest are ")[1].split(";")[0].split(", ")) == 3
    assert not (tmp_path / "run").exists()


def test_unknown_keys_and_wrong_types_in_settings_and_recipes(bingo: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("temprature: 0.1\n")
    (tmp_path / "type.yaml").write_text("epochs: many\n")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    given = ("distill", *flags(data=data), "--out", "run")
    one_error(bingo(*given, "--set", "temprature=0.1"), "unknown key 'temprature'", "'temperature'")
    one_error(bingo(*given, "--set", "lr=fast"), "lr", "'fast'")
    one_error(bingo(*given, "--set", "target_dim=2.5"), "target_dim", "2.5")
    one_error(bingo(*given, "--set", "lr"), "--set", "KEY=VALUE")
    one_error(bingo(*given, "--recipe", "typo.yaml"), "typo.yaml", "'temperature'")
    one_error(bingo("distill", "--data", data, "--recipe", "type.yaml"), "type.yaml", "epochs", "'many'")
    one_error(bingo(*given, "--recipe", "list.yaml"), "list.yaml")
    one_error(bingo(*given, "--recipe", "no-such-recipe"), "--recipe", "demo")
    one_error(bingo(*given, "--method", "bongo"), "method", "'bingo'")
    one_error(bingo(*given, "--views", "0"), "views", "'0'")
    one_error(bingo(*given, "--device", "tpu"), "device", "'tpu'")
    one_error(bingo(*given, "--temperature", "-1"), "temperature", "-1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("distill", "--epochs", "ten"), "--epochs"),
        (("distill", "--epoch", "3"), "--epochs"),
        (("distil",), "distill"),
        (("validate", "--data", "x"), "--run"),
        (("export",), "--run"),
    ],
)
def test_words_that_the_parser_refuses(words: tuple[str, ...], said: str, bingo: Any) -> None:
    one_error(bingo(*words), said)


def test_an_out_folder_that_is_not_empty_offers_both_ways(bingo: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    one_error(bingo("distill", *flags(data=data), "--out", "run"), "not empty", "--resume", "--overwrite")
    one_error(
        bingo("distill", *flags(data=data), "--out", "run", "--overwrite"),
        "not a run of this program",
        "nothing in it is deleted",
    )
    assert files(tmp_path / "run") == {"mine.txt": b"mine"}
    one_error(bingo("distill", *flags(data=data), "--out", "run/mine.txt"), "--out", "found the file")
    one_error(bingo("distill", *flags(data=data), "--out", "none", "--resume"), "--resume", "found none")
    one_error(
        bingo("distill", *flags(data=data), "--out", "none", "--resume", "--overwrite"), "--overwrite", "found both"
    )
    assert not (tmp_path / "none").exists()


def test_no_space(bingo: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    one_error(
        bingo("distill", *flags(data=data), "--out", "run"), "no space", "teacher's embeddings", "--out on another disk"
    )
    one_error(
        bingo("distill", *flags(data=data), "--pixels", "memory", "--out", "run"), "no space", "--out on another disk"
    )
    assert not [name for name in files(tmp_path / "run") if name.startswith(("work", "student"))]


def test_a_step_that_needs_more_than_the_memory_allowed(bingo: Any, data: Path, tmp_path: Path) -> None:
    words = ("distill", *flags(data=data), "--memory", "300MB", "--out", "run")
    for more in ((), ("--dry-run",)):
        one_error(bingo(*words, *more), "--memory", "step of 8 anchors", "found 300 MB")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_while_writing(bingo: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "run/work/pixels")

    monkeypatch.setattr(teacher_pass, "run", full)
    one_error(
        bingo("distill", *flags(data=data), "--out", "run"), "no space: the disk is full", "run/work/pixels", "--resume"
    )


@pytest.mark.slow
def test_weights_that_are_missing_unreadable_or_another_models(bingo: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.pth").write_bytes(b"this is no checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    torch.save(encoder("test_convnext").backbone.state_dict(), tmp_path / "other.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for role in ("teacher", "student"):
        for name, said in (
            ("gone.pth", "found no file"),
            ("noise.pth", "not a readable weights file"),
            ("noise.safetensors", "not a readable weights file"),
            ("other.pth", "does not fit"),
            ("none.pth", "found none"),
        ):
            ran = bingo("distill", *flags(data=data, **{f"{role}_weights": tmp_path / name}), "--out", "run")
            one_error(ran, f"--{role}-weights", said, name)
    assert not (tmp_path / "run").exists()


def test_a_hub_out_of_reach_says_the_ways_out(
    bingo: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    ran = bingo("distill", *flags(data=data, teacher_weights="pretrained"), "--out", "run")
    one_error(ran, "--teacher-weights", "could not be fetched", "HF_HOME", "--teacher-weights random")
    assert not (tmp_path / "run").exists()


def test_models_without_weights_in_timm_are_named_and_never_random(bingo: Any, data: Path) -> None:
    one_error(
        bingo("distill", *flags(data=data, teacher="resnet50x2", teacher_weights="pretrained")),
        "no pretrained weights",
        "resnet50x2",
    )


def test_a_size_that_a_model_cannot_take(bingo: Any, data: Path) -> None:
    one_error(bingo("distill", *flags(data=data, student="test_vit", image_size=33), "--out", "run"), "33 x 33")


def test_validate_and_export_of_what_is_no_run(bingo: Any, data: Path, tmp_path: Path) -> None:
    one_error(bingo("validate", "--run", data, "--data", data), "--run", "no recipe.yaml")
    one_error(bingo("export", "--run", tmp_path / "gone"), "--run", "no recipe.yaml")


def test_a_gpu_that_is_not_there(bingo: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_error(bingo("distill", *flags(data=data, device="cuda"), "--out", "run"), "--device", "sees none")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- good input


def test_check_counts_what_can_and_cannot_be_used(bingo: Any, data: Path) -> None:
    bad = bad_files(data)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.png")}
    ran = bingo("check", "--data", data)
    assert ran.status == 0
    assert "12 usable images" in ran.out and "5 files cannot be used" in ran.out
    assert all(name in ran.out for name in bad)
    assert all(reason in ran.out for reason in ("empty file", "link that leads nowhere", "not an image"))
    assert "3 folders" not in ran.err
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.png")} == before


def test_a_dry_run_prints_all_and_writes_nothing(bingo: Any, data: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    ran = bingo("distill", *flags(data=data, epochs=3), "--out", "run", "--dry-run")
    assert ran.status == 0, ran.err
    assert sorted(tmp_path.rglob("*")) == before
    for text in (
        "test_resnet",
        "test_efficientnet",
        "epochs: 3",
        "temperature: 0.2",
        "5 steps of 8 anchors",
        "memory",
        "disk",
        "time",
    ):
        assert text in ran.out
    one_error(bingo("distill", *flags(data=data, bag_size=40), "--out", "run", "--dry-run"), "found 12")


@pytest.mark.slow
def test_models_lists_what_matches(bingo: Any) -> None:
    ran = bingo("models", "resnet1*")
    assert ran.status == 0
    rows = {line.split()[1]: line for line in ran.out.splitlines() if " M " in line}
    assert set(rows) >= {"resnet18", "resnet152", "resnet10t"}
    assert all(name.startswith("resnet1") for name in rows)
    assert "11.18 M" in rows["resnet18"] and "224 px" in rows["resnet18"] and "44.7" in rows["resnet18"]
    one_error(bingo("models", "rsnet18zz"), "no model matches", "resnet18")


def test_the_version(bingo: Any) -> None:
    assert bingo("--version") == Ran(0, f"bingo-compress {__version__}\n", "")


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("distill", "--help"), ("validate", "--help")])
def test_help_and_version_as_a_module_without_torch(words: tuple[str, ...]) -> None:
    code = (
        "import sys, runpy; sys.argv = ['bingo-compress', *sys.argv[1:]]\n"
        "try: runpy.run_module('bingo_compress', run_name='__main__')\n"
        "except SystemExit as stop: print('status', stop.code)\n"
        "print('heavy', sorted({'torch', 'timm', 'numpy', 'onnx', 'PIL', 'faiss'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert ran.stderr == ""
    assert "status 0" in ran.stdout and "heavy []" in ran.stdout
    assert __version__ in ran.stdout if words == ("--version",) else "Usage" in ran.stdout
    if words == ("distill", "--help"):
        for option in (
            "--data",
            "--teacher-weights",
            "--set",
            "--resume",
            "--overwrite",
            "--dry-run",
            "--views",
            "--seed",
        ):
            assert option in ran.stdout


def test_ctrl_c_says_how_to_go_on(bingo: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher_pass, "run", stopped)
    ran = bingo("distill", *flags(data=data), "--out", "run")
    assert ran.status == cli.INTERRUPTED == 130
    assert "--resume" in ran.err and "Traceback" not in ran.err


def test_names_with_brackets_are_printed_as_they_are(bingo: Any, tmp_path: Path) -> None:
    odd = tmp_path / "[bold]odd"
    odd.mkdir()
    Image.new("RGB", (9, 9)).save(odd / "a.png")
    assert "1 usable images in" in (ran := bingo("check", "--data", odd)).out
    assert "[bold]odd" in ran.out
    one_error(bingo("check", "--data", tmp_path / "[red]gone"), "[red]gone")


def test_an_out_folder_that_cannot_be_made(
    bingo: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(run_dir.Path, "mkdir", denied)
        one_error(bingo("distill", *flags(data=data), "--out", "run"), "--out", "Permission denied")


def test_a_full_gpu_is_one_clear_line(bingo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.80 GiB"
        )

    monkeypatch.setattr(teacher_pass, "run", full)
    found = bingo("distill", *flags(data=photos(tmp_path / "photos", 6)), "--out", "run")
    one_error(found, "out of the GPU's memory (CUDA out of memory)", "--batch-size")
