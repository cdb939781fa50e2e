"""Folders of video frames on the command line: counted, kept on one side of the proof, told where a test set shares
them.
"""

import json
from pathlib import Path

import pytest
from helpers import clips, command, flags

from bingo_compress import api
from bingo_compress.runtime.run_dir import RunDir

TEACHER = ("--teacher", "test_resnet", "--teacher-weights", "random", "--device", "cpu")


@pytest.mark.slow
def test_frames_of_a_video_do_not_stand_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = clips(tmp_path), tmp_path / "run"
    words = flags(data=root / "all", epochs=1, batch_size=16, teacher_size=64, image_size=64)
    ran = command(monkeypatch, capsys, "distill", *words, "--out", run)
    assert ran.status == 0 and "96 of 96 images are of 12 scenes" in ran.out and "duplicates=near" in ran.out
    told = json.loads((run / "summary.json").read_text())["images"]
    assert (told["scenes"], told["held_out"], told["training"]) == (12, 8, 88)  # one whole clip held out

    ran = command(monkeypatch, capsys, "validate", "--run", run, "--data", root / "all")
    assert ran.status == 0 and "96 of 96 labelled images are of 12 scenes" in ran.out and "one side" in ran.out
    told = json.loads(RunDir(run).validation.read_text())
    rows = {row["name"]: row for row in told["rows"]}
    assert max(rows["random"]["linear"], rows["random"]["knn"]) < 1  # with frames of every clip in the bank: 1.000
    assert told["protocol"]["test_images"] % 8 == 0
    assert told["protocol"]["near_copies"] == {"images": 96, "scenes": 12, "classes_of_one_scene": []}
    assert "set aside by whole scenes of near-copies" in told["protocol"]["test"]

    ran = command(monkeypatch, capsys, "validate", "--run", run, "--data", root / "bank", "--test", root / "test")
    protocol = json.loads(RunDir(run).validation.read_text())["protocol"]
    assert ran.status == 0 and "near-copy in the bank" not in ran.out
    assert protocol["near_copies"] == {"test_images_near_bank": 0, "test_share_near_bank": 0.0}

    for file in (root / "bank" / "ok").glob("clip01_00[0-3].png"):
        (root / "test" / "ok" / file.name).write_bytes(file.read_bytes())
        file.unlink()
    ran = command(monkeypatch, capsys, "validate", "--run", run, "--data", root / "bank", "--test", root / "test")
    assert ran.status == 0 and "4 of 28 test images (14%) have a near-copy in the bank" in ran.out
    protocol = json.loads(RunDir(run).validation.read_text())["protocol"]
    assert protocol["near_copies"]["test_images_near_bank"] == 4
    assert protocol["near_copies"]["test_share_near_bank"] == pytest.approx(4 / 28)


@pytest.mark.slow
def test_a_label_that_is_one_scene_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = clips(tmp_path), tmp_path / "run"
    alone = root / "all" / "alone"
    alone.mkdir()
    for file in (root / "all" / "ok").glob("clip01*"):
        file.rename(alone / file.name)
    words = flags(data=root / "all", epochs=1, teacher_size=64, image_size=64, duplicates="near")
    ran = command(monkeypatch, capsys, "distill", *words, "--out", run)
    assert ran.status == 0 and "one of each scene is trained on an epoch" in ran.out
    ran = command(monkeypatch, capsys, "validate", "--run", run, "--data", root / "all")
    assert ran.status == 0 and "all images of alone are near-copies of one another" in ran.out


@pytest.mark.slow
def test_check_counts_near_copies_with_a_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = clips(tmp_path) / "test"
    ran = command(monkeypatch, capsys, "check", "--data", root, *TEACHER)
    assert ran.status == 0
    assert "24 of 24 images are of 3 scenes" in ran.out and "clip10_000.png with " in ran.out
    found = api.check(data=root, teacher="test_resnet", teacher_weights="random", device="cpu", progress=False)
    assert found.scenes is not None and [len(scene) for scene in found.scenes] == [8, 8, 8]
    ran = command(monkeypatch, capsys, "check", "--data", root, "--teacher", "no_such_model")
    assert ran.status == 2 and "--teacher" in ran.err
