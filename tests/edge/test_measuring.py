"""`bingo-edge measure`: what is timed, what is not timed twice, and what is refused."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from bingo_edge import EdgeError, measuring
from bingo_edge.cli import main
from bingo_edge.measuring import measure
from edge_models import make_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files, one of them packed, that take a moment to measure, and one that is none."""
    monkeypatch.setattr(measuring, "SECONDS", 0.0)
    for name in ("a", "b"):
        make_model(tmp_path / f"{name}.onnx", size=8 if name == "a" else 12)
    held = Path(make_model(tmp_path / "c.tmp", batch=2)).read_bytes()
    (tmp_path / "c.onnx.xz").write_bytes(lzma.compress(held))
    return tmp_path


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are really run."""
    names, real = list[str](), measuring._times

    def times(path: Path, held: bytes, threads: int) -> dict[str, Any]:
        names.append(path.name)
        return real(path, held, threads)

    monkeypatch.setattr(measuring, "_times", times)
    return names


def test_a_profile_says_what_was_measured_and_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", str(folder), "--threads", "2"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[2].startswith("3 of 3\tc.onnx.xz\t") and "suggest --on profile.json" in said.out
    profile = json.loads((folder / "profile.json").read_text())
    assert list(profile["files"]) == ["a.onnx", "b.onnx", "c.onnx.xz"]
    assert all(0 < times["p50_ms"] <= times["p90_ms"] for times in profile["files"].values())
    assert all(times["runs"] == measuring.LEAST for times in profile["files"].values())
    assert profile["threads"] == 2 and profile["runtime"].startswith("onnxruntime ") and profile["machine"]["name"]


def test_a_measurement_that_was_stopped_goes_on(folder: Path, timed: list[str]) -> None:
    def stop(done: int, count: int, name: str, times: dict[str, Any]) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(folder, folder / "profile.json", told=stop)
    first = json.loads((folder / "profile.json").read_text())["files"]
    whole = measure(folder, folder / "profile.json")
    assert timed == ["a.onnx", "b.onnx", "c.onnx.xz"] and whole["files"].items() >= first.items()
    assert whole == json.loads((folder / "profile.json").read_text())


def test_only_what_changed_is_timed_again(folder: Path, timed: list[str]) -> None:
    measure(folder, folder / "profile.json")
    make_model(folder / "b.onnx", size=16)
    measure(folder, folder / "profile.json")
    assert timed[3:] == ["b.onnx"]
    measure(folder, folder / "profile.json", threads=2)
    assert timed[4:] == ["a.onnx", "b.onnx", "c.onnx.xz"]
    measure(folder, folder / "other.json", threads=2, names={"c.onnx.xz"})
    assert timed[7:] == ["c.onnx.xz"]


def test_what_cannot_be_measured_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "d.onnx").write_bytes(b"words")
    for words, said in (
        ([str(folder)], "found " + str(folder / "d.onnx")),
        ([str(folder), "--out", str(folder / "no" / "x.json")], "choose another --out"),
        ([str(folder), "--threads", "0"], "at least 1 thread"),
        ([str(folder / "gone"), "--out", str(folder / "x.json")], "none in"),
    ):
        assert main(["measure", *words]) == 2
        (line,) = [each for each in capsys.readouterr().err.splitlines() if " of 4\t" not in each]
        assert line.startswith("error: ") and said in line
    (folder / "d.onnx.xz").write_bytes(b"words")
    with pytest.raises(EdgeError, match=r"d\.onnx\.xz"):
        measure(folder, folder / "profile.json", names={"d.onnx.xz"})
    (folder / "profile.json").write_text("[1]")
    with pytest.raises(EdgeError, match="delete it"):
        measure(folder, folder / "profile.json")
