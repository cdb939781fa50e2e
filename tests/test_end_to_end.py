"""The whole road through the command line on small synthetic photos: files, figures, interruption, and the same
again.
"""

import csv
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import bingo_edge
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import Ran, bad_files, encoder, flags, interrupted_at, photos, recipe

from bingo_compress.cli import main
from bingo_compress.data import pixel_store
from bingo_compress.features import extract, teacher_pass
from bingo_compress.features.bagging import knn
from bingo_compress.recipe import load_recipe
from bingo_compress.runtime import machine
from bingo_compress.training import loop
from bingo_compress.training.material import split

pytestmark = pytest.mark.slow
ROWS = ["teacher", "student", "start", "random"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Photos of three kinds with five bad files among them, test photos, and an uninterrupted run of two epochs."""
    root = tmp_path_factory.mktemp("world")
    data, test = photos(root / "photos", 22), photos(root / "test", 6, start=200)
    bad = bad_files(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["bingo-compress", "distill", *flags(data=data, epochs=2), "--out", str(root / "run")]
        )
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return {"root": root, "data": data, "test": test, "bad": bad, "run": root / "run"}


@pytest.fixture
def run(world: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the finished run, to do things to."""
    return Path(shutil.copytree(world["run"], tmp_path / "run"))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "student.safetensors")


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------- the files of a run


def test_a_run_leaves_the_files_that_it_promises(world: dict[str, Any]) -> None:
    run = world["run"]
    names = {path.name for path in run.iterdir()}
    assert names == {
        "recipe.yaml",
        "resolved.yaml",
        "student.safetensors",
        "timm",
        "metrics.jsonl",
        "quarantine.csv",
        "summary.json",
        "report.html",
        "work",
    }
    assert not list(run.rglob("*.tmp"))
    settings = load_recipe(run / "recipe.yaml", [], {})
    assert (settings.teacher, settings.student, settings.epochs, settings.image_size) == (
        "test_resnet",
        "test_efficientnet",
        2,
        32,
    )
    assert Path(settings.data) == world["data"].resolve()


def test_the_weights_have_timms_own_keys_and_are_trained(world: dict[str, Any]) -> None:
    found = weights(world["run"])
    backbone = encoder("test_efficientnet").backbone
    assert set(found) == set(backbone.state_dict())
    backbone.load_state_dict(found)
    start = safetensors.torch.load_file(world["run"] / "work" / "start.safetensors")
    assert set(start) == set(found)
    assert not torch.equal(start["conv_stem.weight"], found["conv_stem.weight"])
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_every_bad_file_is_quarantined_with_its_reason(world: dict[str, Any]) -> None:
    with (world["run"] / "quarantine.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["path", "reason"]
    reasons = dict(rows)
    assert set(reasons) == world["bad"] and len(rows) == 5
    assert reasons["empty.jpg"] == "empty file"
    assert "nowhere" in reasons["nowhere.jpg"]
    assert ".txt" in reasons["notes.txt"]
    assert all(reasons.values())


def test_metrics_and_summary_add_up(world: dict[str, Any]) -> None:
    found = lines(world["run"])
    summary = json.loads((world["run"] / "summary.json").read_text())
    assert summary["images"] == {"training": 60, "held_out": 6, "scenes": 66, "unusable": 5}
    assert [line["step"] for line in found] == [8, 15]  # 60 and 120 anchors, 8 a step
    assert all(math.isfinite(line["loss"]) for line in found)
    recall = summary["neighbour_recall"]
    assert (recall["k"], recall["queries"], recall["gallery"], recall["chance"]) == (6, 6, 60, 0.1)
    assert all(0 <= recall[name] <= 1 for name in ("start", "student"))


# ---------------------------------------------------------------- export and validate


def test_export_then_validate_with_a_test_folder(bingo: Any, world: dict[str, Any], run: Path, tmp_path: Path) -> None:
    ran = bingo("export", "--run", run)
    assert ran.status == 0, ran.err
    left = ["MODEL_CARD.md", "latency.json", "student.golden", "student.json", "student.onnx"]
    assert sorted(path.name for path in (run / "export").iterdir() if path.suffix != ".npz") == left
    assert "Not validated on labels yet" in (run / "export" / "MODEL_CARD.md").read_text()
    contract = json.loads((run / "export" / "student.json").read_text())
    assert contract["run_id"] == json.loads((run / "summary.json").read_text())["run_id"] != ""
    assert contract["parity"]["images"] == 66

    labelled = photos(tmp_path / "labelled", 22)
    ran = bingo("validate", "--run", run, "--data", labelled, "--test", world["test"], "--json", tmp_path / "v.json")
    assert ran.status == 0, ran.err
    result = json.loads((tmp_path / "v.json").read_text())
    assert result == json.loads((run / "validation.json").read_text())
    card = (run / "export" / "MODEL_CARD.md").read_text()
    # Written again, and no path of this machine in it.
    assert "Not validated on labels yet" not in card and str(tmp_path) not in card
    ran = bingo(
        "validate",
        "--run",
        run,
        "--data",
        labelled,
        "--test",
        world["test"],
        "--require",
        "linear=1.0",
        "--require",
        "knn=0.1",
    )
    missed = result["rows"][-1]["linear"] < 1
    assert ran.status == (3 if missed else 0) and ("linear" in ran.err and "(at least 1)" in ran.err) == missed
    assert bingo("validate", "--run", run, "--data", labelled, "--require", "colour=0.5").status == 2
    # The labelled photos are the run's own, in another folder: their contents tell.
    assert set(result) == {"protocol", "rows", "gain", "bag_purity", "bag_purity_interval", "bag_purity_chance"}
    assert (result["protocol"]["bank_images"], result["protocol"]["test_images"]) == (66, 18)
    assert result["protocol"]["classes"] == ["kind0", "kind1", "kind2"]
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [*ROWS, "onnx"]
    for row in rows.values():
        assert all(0 <= row[key] <= 1 for key in ("knn", "linear", "linear_balanced", "neighbour_recall"))
    assert rows["teacher"]["neighbour_recall"] == 1
    assert rows["teacher"]["linear"] > 0.9  # colours and stripes are easy even for random features
    assert rows["student"]["linear"] > 0.9
    for key in ("knn", "linear", "neighbour_recall"):
        assert rows["onnx"][key] == pytest.approx(rows["student"][key], abs=0.06)

    kit = bingo_edge.Embedder(run / "export" / "student.onnx")
    embedded = kit.embed(str(world["test"]))
    truth = np.array([Path(name).parent.name for name in embedded.names])
    for head, figure in (("student.linear.npz", "linear"), ("student.bank.npz", "knn")):
        named, _ = bingo_edge.classify(
            bingo_edge.load_head(run / "export" / head, kit), embedded.embeddings, embedded.features
        )
        assert float((named == truth).mean()) == pytest.approx(rows["onnx"][figure], abs=1e-6)


def test_validate_without_a_test_folder_sets_a_quarter_aside(
    bingo: Any, world: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    ran = bingo("validate", "--run", run, "--data", world["test"], "--json", tmp_path / "v.json")
    assert ran.status == 0, ran.err
    result = json.loads((tmp_path / "v.json").read_text())
    # One of the six of each kind.
    assert (result["protocol"]["bank_images"], result["protocol"]["test_images"]) == (
        15,
        3,
    )
    assert "set aside" in result["protocol"]["test"]
    assert [row["name"] for row in result["rows"]] == ROWS
    assert not (run / "export").exists()  # no file, so no head for one
    assert "export --run" in ran.out


def test_the_test_images_never_reach_the_heads(bingo: Any, world: dict[str, Any], run: Path, tmp_path: Path) -> None:
    heads = []
    assert bingo("export", "--run", run).status == 0
    for number in (300, 400):
        test = photos(tmp_path / f"test{number}", 3, start=number)
        assert bingo("validate", "--run", run, "--data", world["test"], "--test", test).status == 0
        heads.append(
            {name: dict(np.load(run / "export" / name)) for name in ("student.linear.npz", "student.bank.npz")}
        )
    for name, arrays in heads[0].items():
        assert all(np.array_equal(array, heads[1][name][key]) for key, array in arrays.items())


def test_validate_refuses_classes_it_does_not_know_and_folders_without_classes(
    bingo: Any, world: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    strange = photos(tmp_path / "strange", 2, kinds=2)
    (strange / "kind1").rename(strange / "other")
    for words, said in (
        ((world["test"], "--test", strange), "found others: other"),
        ((world["test"] / "kind0",), "one folder a class"),
    ):
        ran = bingo("validate", "--run", run, "--data", *words)
        assert ran.status == 2 and len(ran.err.splitlines()) == 1 and said in ran.err


# ---------------------------------------------------------------- interruption


def interrupted(
    bingo: Any, monkeypatch: pytest.MonkeyPatch, world: dict[str, Any], out: Path, at: int, *words: str
) -> Ran:
    """The same run, cut off by Ctrl-C in step `at`."""
    with interrupted_at(monkeypatch, loop, "learning_rate", at):
        ran: Ran = bingo("distill", *flags(data=world["data"], epochs=2), *words, "--out", out)
    return ran


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_cut_off_and_resumed_equals_the_uninterrupted_one(
    saved: bool, bingo: Any, world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    often = ("--set", "save_every_minutes=1e-9") if saved else ()
    assert interrupted(bingo, monkeypatch, world, out, 10, *often).status == 130
    assert (out / "work" / "checkpoint.safetensors").exists() == saved
    assert not (out / "student.safetensors").exists()
    ran = bingo("export", "--run", out)
    assert ran.status == 2 and "unfinished" in ran.err and "--resume" in ran.err
    again = bingo("distill", "--out", out, "--resume")  # the settings come from the run itself
    assert again.status == 0, again.err
    assert equal(weights(out), weights(world["run"]))
    steps = [line["step"] for line in lines(out)]
    assert steps == sorted(set(steps)) and steps[-1] == 15
    ours, theirs = (
        json.loads((folder / "summary.json").read_text())["neighbour_recall"] for folder in (out, world["run"])
    )
    assert ours == theirs


def test_another_number_of_loader_threads_changes_nothing(
    bingo: Any, world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cores(count: int) -> None:
        monkeypatch.setattr("os.cpu_count", lambda: count)  # of the decoding
        # Of the next batches: with one they are made in the trainer's thread.
        monkeypatch.setattr(machine, "free_cores", lambda: count)

    cores(1)
    assert interrupted(bingo, monkeypatch, world, tmp_path / "run", 10, "--set", "save_every_steps=4").status == 130
    cores(8)
    assert bingo("distill", "--out", tmp_path / "run", "--resume").status == 0
    assert equal(weights(tmp_path / "run"), weights(world["run"]))


def test_resume_refuses_other_settings_and_names_them(bingo: Any, run: Path) -> None:
    before = weights(run)
    ran = bingo("distill", "--out", run, "--resume", "--temperature", "0.1", "--set", "head_hidden=64")
    assert ran.status == 2 and len(ran.err.splitlines()) == 1
    assert "temperature: 0.2 -> 0.1" in ran.err and "head_hidden: 32 -> 64" in ran.err
    assert equal(weights(run), before)
    assert load_recipe(run / "resolved.yaml", [], {}).temperature == 0.2


def test_resume_of_a_finished_run_changes_nothing(bingo: Any, run: Path, world: dict[str, Any]) -> None:
    assert bingo("distill", "--out", run, "--resume").status == 0
    assert equal(weights(run), weights(world["run"]))
    assert lines(run) == lines(world["run"])


def test_resume_after_the_folder_changed_says_so_in_one_line(bingo: Any, world: dict[str, Any], tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 6)
    assert bingo("distill", *flags(data=data, epochs=1), "--out", tmp_path / "run").status == 0
    photos(data, 4, start=50)
    ran = bingo("distill", "--out", tmp_path / "run", "--resume")
    assert ran.status == 2 and len(ran.err.splitlines()) == 1 and ran.err.startswith("error: ")


def test_overwrite_uses_stored_pixels_and_embeddings_again(
    bingo: Any, world: dict[str, Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_store, "_fill", lambda *_: pytest.fail("decoded again"))
    for shard in ("_plain_shard", "_view_shard"):
        monkeypatch.setattr(teacher_pass, shard, lambda *_: pytest.fail("embedded again"))
    (run / "export").mkdir()
    (run / "export" / "student.onnx").write_bytes(b"of the old run")
    ran = bingo("distill", *flags(data=world["data"], epochs=1), "--out", run, "--overwrite")
    assert ran.status == 0, ran.err
    assert [line["step"] for line in lines(run)] == [8]
    assert not equal(weights(run), weights(world["run"]))
    assert not (run / "export").exists()
    again = bingo("distill", *flags(data=world["data"], epochs=2), "--out", run, "--overwrite")
    assert again.status == 0, again.err
    assert equal(weights(run), weights(world["run"]))


def test_official_with_an_online_teacher_runs_to_the_end(bingo: Any, world: dict[str, Any], tmp_path: Path) -> None:
    more = ("--set", "variant=official", "--set", "switch_epoch=1", "--views", "online")
    ran = bingo("distill", *flags(data=world["data"], epochs=2), *more, "--out", tmp_path / "run")
    assert ran.status == 0, ran.err
    assert [line["inter"] > 0 for line in lines(tmp_path / "run")] == [False, True]
    assert all(line["mixed"] > 0 for line in lines(tmp_path / "run"))


def test_the_bags_of_the_run_hold_images_of_one_kind(world: dict[str, Any]) -> None:
    stored = next((world["run"] / "work").glob("teacher-*/features.f16"))
    features = torch.from_file(str(stored), size=stored.stat().st_size // 2, dtype=torch.float16).view(66, -1)
    kinds = torch.arange(66) // 22
    assert float((kinds[knn(features, 3)[0]] == kinds[:, None]).float().mean()) > 0.9


def test_keep_best_leaves_the_student_of_the_best_check_and_judges_it_on_other_images(
    bingo: Any, world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[int]] = {"store_features": set(), "plain": set()}

    def noted(name: str, real: Any, *given: Any) -> Any:
        seen[name] |= set(torch.as_tensor(given[2]).tolist())  # the images
        return real(*given)

    for name in seen:
        monkeypatch.setattr(extract, name, partial(noted, name, getattr(extract, name)))
    more = ("--set", "check_every=1", "--set", "hold_out=0.3", "--keep-best", "--bags", "adaptive")
    ran = bingo("distill", *flags(data=world["data"], epochs=4), *more, "--out", tmp_path / "run")
    assert ran.status == 0, ran.err
    scores = [line["neighbour_recall"] for line in lines(tmp_path / "run")]
    assert len(scores) == 4 and all(0 <= score <= 1 for score in scores)
    tensors = safetensors.torch.load_file(tmp_path / "run" / "work" / "checkpoint.safetensors")
    best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
    assert equal(weights(tmp_path / "run"), best)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["bags"]["size_mean"] <= 3
    held = set(split(torch.arange(66), recipe(hold_out=0.3))[0].tolist())
    choosing, judging = (positions & held for positions in seen.values())
    assert not choosing & judging and choosing | judging == held
    assert (len(choosing), summary["neighbour_recall"]["queries"]) == (10, 9) == (len(choosing), len(judging))
    assert "chooses by 10 of the images held out; the closing figure is of the other 9" in ran.out


@pytest.mark.parametrize("method", ["moco", "self", "simreg"])
def test_another_method_runs_to_the_end(method: str, bingo: Any, world: dict[str, Any], tmp_path: Path) -> None:
    ran = bingo("distill", *flags(data=world["data"], epochs=1, method=method), "--out", tmp_path / "run")
    assert ran.status == 0, ran.err
    assert ("moving average" in ran.out) == (method != "simreg")
    assert not equal(weights(tmp_path / "run"), weights(world["run"]))


def test_keep_best_without_held_out_images_is_refused(bingo: Any, world: dict[str, Any], tmp_path: Path) -> None:
    ran = bingo("distill", *flags(data=world["data"]), "--set", "hold_out=0", "--keep-best", "--out", tmp_path / "run")
    assert ran.status == 2
    assert "--keep-best: expected images held out, found none" in ran.err
    few = ("--set", "hold_out=0.02", "--keep-best", "--out", tmp_path / "run")
    ran = bingo("distill", *flags(data=world["data"]), *few)
    assert ran.status == 2 and "--keep-best: expected 2 or more images held out, found 1;" in ran.err
    assert not (tmp_path / "run").exists() and "teacher," not in ran.out
