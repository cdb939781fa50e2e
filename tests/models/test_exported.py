"""What belongs to an exported file goes with it, and every file in export/ is judged as itself: nothing of another file
is read as its own.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bingo_edge
import numpy as np
import onnx
import pytest
import torch
from bingo_edge import EdgeError, load_head
from edge_models import make_model
from helpers import encoder, interrupted_at, photos, untrained_run

from bingo_compress import exporting
from bingo_compress.errors import BingoError
from bingo_compress.exporters import timing
from bingo_compress.exporters.onnx import REFUSED
from bingo_compress.exporting import Shape
from bingo_compress.int8 import int8_file
from bingo_compress.int8.ladder import LadderEnds, Rung
from bingo_compress.models import exported, trained
from bingo_compress.recipe import load_recipe
from bingo_compress.runtime import checkpoint, run_dir
from bingo_compress.runtime.made_of import file_digest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Nothing is timed for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "TIMED", 2)
        patch.setattr(timing, "LOADS", 1)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an untrained student on 36 photos, exported once."""
    torch.set_num_threads(1)
    run = untrained_run(tmp_path_factory.mktemp("made"), 12)
    exporting.export(run.path)
    return run.path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> run_dir.RunDir:
    """A copy that a test may spoil."""
    return run_dir.RunDir(Path(shutil.copytree(made, tmp_path / "run")))


@pytest.fixture
def int8(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """int8(): from now on the ladder's first rung gives the float file itself, or one of spoilt weights; the gate has
    nothing against it.
    """

    def set_to(*, spoilt: bool = False) -> None:
        def quantise(float_file: Path, calibration: Any, wanted: Any, work: Path, judge: Any, prefix: str = "") -> Any:
            model = onnx.load(float_file)
            del model.metadata_props[:]
            for one in model.graph.initializer if spoilt else ():
                if len(one.dims) > 1:
                    values = (
                        np.random.default_rng(0).permutation(onnx.numpy_helper.to_array(one).ravel()).reshape(one.dims)
                    )
                    one.CopyFrom(onnx.numpy_helper.from_array(values, one.name))
            onnx.save(model, work / "int8.onnx")
            tried = {
                "images": 24,
                "mean_cosine": 1.0,
                "min_cosine": 1.0,
                "recall": 1.0,
                "recall_k": 2,
                "bytes": 1,
                "missed": [],
            }
            return work / "int8.onnx", Rung("first"), [{"rung": "first", **tried}]

        monkeypatch.setattr(int8_file, "quantise", quantise)

    return set_to


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantise(*_: Any) -> Any:
        raise LadderEnds(
            [
                {
                    "rung": "first",
                    "missed": ["mean cosine"],
                    "images": 30,
                    "mean_cosine": 0.5,
                    "min_cosine": 0.5,
                    "recall": 0.5,
                    "recall_k": 2,
                    "bytes": 1,
                }
            ]
        )

    monkeypatch.setattr(int8_file, "quantise", quantise)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def belongs(folder: Path) -> None:
    """Whatever stands beside a file names that file's sha256."""
    for path in exported.files(folder).values():
        digest = file_digest(path)
        contract, golden = path.with_suffix(".json"), path.with_suffix(".golden") / "golden.json"
        for told in (contract, golden):
            assert not told.exists() or json.loads(told.read_text())["sha256"] == digest, told
        for end in (exported.LINEAR, exported.BANK):
            assert not path.with_suffix(end).exists() or str(np.load(path.with_suffix(end))["model_sha256"]) == digest


WITH_HEADS = [
    "MODEL_CARD.md",
    "latency.json",
    "student.bank.npz",
    "student.golden",
    "student.json",
    "student.linear.npz",
    "student.onnx",
]


# ---------------------------------------------------------------- export


def test_heads_go_with_the_file_that_they_were_fitted_for(run: run_dir.RunDir, made: Path, bingo: Any) -> None:
    data = made.parent / "photos"
    assert bingo("validate", "--run", run.path, "--data", data).status == 0
    assert left(run.export) == WITH_HEADS
    belongs(run.export)
    before = shutil.copy(run.export / "student.linear.npz", run.path / "older.npz")
    # The same again is the same file, and keeps what belongs to it.
    assert bingo("export", "--run", run.path).status == 0
    assert left(run.export) == WITH_HEADS
    ran = bingo("export", "--run", run.path, "--image-size", "48")
    assert ran.status == 0, ran.err
    assert "removed student.linear.npz, student.bank.npz, of an older student.onnx: run validate again" in ran.out
    assert left(run.export) == [name for name in WITH_HEADS if not name.endswith(".npz")]
    belongs(run.export)
    card = (run.export / "MODEL_CARD.md").read_text()
    assert (
        "Not proven: student.onnx. Run validate:" in card
        and "exported ONNX file" not in card
        and "classify" not in card
    )
    with pytest.raises(EdgeError, match="a head of the model file with sha256"):
        load_head(before, bingo_edge.Embedder(run.export / "student.onnx"))
    assert len(json.loads((run.export / "latency.json").read_text())["rows"]) == 1


def test_a_file_that_a_user_keeps_beside_is_no_export_and_stays(tmp_path: Path) -> None:
    assert set(exported.ROWS) == {"onnx", *exporting.FORMATS}
    newest = Path(make_model(tmp_path / "student.onnx"))
    for name in ("student-old.onnx", "student (copy).onnx"):
        (tmp_path / name).write_bytes(newest.read_bytes())
    exported.keep_pair(newest)
    assert exported.files(tmp_path) == {"onnx": newest}
    assert (tmp_path / "student-old.onnx").is_file() and (tmp_path / "student (copy).onnx").is_file()


def test_both_files_in_a_folder_are_of_one_export(run: run_dir.RunDir, int8: Any, printed: Any) -> None:
    int8()
    exporting.export(run.path, fmt="onnx-int8")
    names = [file["file"] for file in json.loads((run.export / "latency.json").read_text())["rows"]]
    # The float file of the same export stayed, and both are timed.
    assert names == [
        "student.onnx",
        "student-int8.onnx",
    ]
    assert "removed" not in printed.getvalue()
    exporting.export(run.path, shape=Shape(image_size=48))
    assert "removed student-int8.onnx" in printed.getvalue()
    assert [name for name in left(run.export) if "int8" in name] == []
    exporting.export(run.path, fmt="onnx-int8")  # at 32 again
    assert [name for name in left(run.export) if name.startswith("student.")] == []
    assert list(exported.files(run.export)) == ["onnx-int8"]
    belongs(run.export)


def test_a_refused_int8_file_leaves_no_older_one(
    run: run_dir.RunDir, int8: Any, monkeypatch: pytest.MonkeyPatch, printed: Any
) -> None:
    int8()
    exporting.export(run.path, fmt="all")
    assert "student-int8.onnx" in (run.export / "MODEL_CARD.md").read_text()
    refuse(monkeypatch)
    with pytest.raises(BingoError, match="export refused") as caught:
        exporting.export(run.path, fmt="onnx-int8")
    assert caught.value.exit_status == REFUSED
    assert (
        "removed student-int8.onnx, student-int8.json, student-int8.golden: what was to take its place is refused"
        in printed.getvalue()
    )
    belongings = ("student-fp16.golden", "student-fp16.json", "student-fp16.onnx", "student.golden", "student.json")
    assert left(run.export) == ["MODEL_CARD.md", "latency.json", *belongings, "student.onnx"]
    for name in ("MODEL_CARD.md", "latency.json"):  # of what is there, and of nothing else
        assert (
            "student-int8" not in (run.export / name).read_text() and "student.onnx" in (run.export / name).read_text()
        )


def test_a_file_whose_golden_pictures_fail_is_not_there(run: run_dir.RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise BingoError("export refused: not finite", REFUSED)

    shutil.rmtree(run.export)
    monkeypatch.setattr(exporting, "write_golden", failing)
    with pytest.raises(BingoError, match="not finite"):
        exporting.export(run.path)
    assert left(run.export) == []


@pytest.mark.parametrize("at", [1, 2, 20, 30])
def test_a_kill_in_between_leaves_nothing_of_another_file(
    at: int, made: Path, run: run_dir.RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """put() moves the file, 17 golden files, their folder, and the contract; before the first of these it has cleared
    what belonged to the older file.
    """
    work = Path(shutil.copytree(run.export, tmp_path / "work"))
    model = onnx.load(work / "student.onnx")
    model.producer_name = "another"
    onnx.save(model, work / "student.onnx")
    digest = file_digest(work / "student.onnx")
    for path in (work / "student.json", work / "student.golden" / "golden.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": digest}))
    whole = np.array(file_digest(run.export / "student.onnx"))
    for end in (exported.LINEAR, exported.BANK):
        np.savez((run.export / "student.onnx").with_suffix(end), model_sha256=whole)
    belongs(run.export)
    with interrupted_at(monkeypatch, exported.os, "replace", at):
        try:
            exported.put(work / "student.onnx", run.export / "student.onnx")
        except KeyboardInterrupt:
            assert at < 30
    belongs(run.export)
    assert not list(run.export.glob("*.npz")) and not (run.export / "MODEL_CARD.md").exists()
    assert (file_digest(run.export / "student.onnx") == digest) == (at > 2)


# ---------------------------------------------------------------- validate


def test_every_exported_file_is_judged_with_its_own_head_and_asked_by_require(
    run: run_dir.RunDir, made: Path, int8: Any, bingo: Any, tmp_path: Path
) -> None:
    int8(spoilt=True)
    exporting.export(run.path, fmt="all")
    data, test = made.parent / "photos", photos(tmp_path / "test", 6, start=300)
    ran = bingo("validate", "--run", run.path, "--data", data, "--test", test)
    assert ran.status == 0, ran.err
    rows = {row["name"]: row for row in json.loads(run.validation.read_text())["rows"]}
    assert list(rows) == ["teacher", "student", "random", "onnx", "onnx-fp16", "onnx-int8"]
    belongs(run.export)
    for name, file in exported.files(run.export).items():
        assert (rows[name]["file"], rows[name]["sha256"]) == (file.name, file_digest(file))
        assert f"bingo-edge classify {file} --head {file.with_suffix(exported.LINEAR)}" in ran.out
        kit = bingo_edge.Embedder(file)
        found = kit.embed(test)
        truth = np.array([Path(path).parent.name for path in found.names])
        for end, key in ((exported.LINEAR, "linear"), (exported.BANK, "knn")):
            named, _ = bingo_edge.classify(load_head(file.with_suffix(end), kit), found.embeddings, found.features)
            assert float((named == truth).mean()) == pytest.approx(rows[name][key], abs=1e-6)
    assert rows["student"]["weights"] == exported.weights_digest(run.student)
    card = (run.export / "MODEL_CARD.md").read_text()
    assert "| exported int8 file |" in card and "Not proven" not in card
    recalls = {row["file"]: row["neighbour_recall"] for row in rows.values() if row["name"].startswith("onnx")}
    assert len(set(recalls.values())) == 2
    words = ("validate", "--run", run.path, "--data", data, "--test", test, "--require")
    for least in (1.0, sum(recalls.values()) / 2):
        ran = bingo(*words, f"neighbour_recall={least}")
        assert ran.status == 3
        for name, recall in recalls.items():
            assert (f"{name} with neighbour_recall {recall:.4f}" in ran.err) == (recall < least)
    exported.drop(run.export / "student.onnx", "test")
    ran = bingo(*words, "neighbour_recall=1")  # the int8 file alone is judged too
    assert ran.status == 3 and "student-int8.onnx with neighbour_recall" in ran.err
    card = (run.export / "MODEL_CARD.md").read_text()
    assert "exported ONNX file" not in card and "| student.onnx |" not in card


def test_without_an_exported_file_the_student_is_asked_and_that_is_said(
    run: run_dir.RunDir, made: Path, bingo: Any
) -> None:
    shutil.rmtree(run.export)
    ran = bingo("validate", "--run", run.path, "--data", made.parent / "photos", "--require", "knn=0.1")
    assert ran.status == 0 and "--require is asked of the student: there is no exported file yet" in ran.out
    assert not run.export.exists()  # no file, no head


def test_a_file_of_another_student_is_refused_before_anything(run: run_dir.RunDir, made: Path, bingo: Any) -> None:
    recipe = load_recipe(run.as_run)
    made_of = checkpoint.made_of(run.student)
    assert made_of
    trained.save_student(encoder("test_efficientnet", 32, seed=5), run, recipe, made_of)
    ran = bingo("validate", "--run", run.path, "--data", made.parent / "photos")
    assert ran.status == 2 and len(ran.err.splitlines()) == 1
    assert (
        f"expected a file exported from the run's student (weights {exported.weights_digest(run.student)})" in ran.err
        and "export again" in ran.err
    )
    assert not run.validation.exists()


def test_the_same_weights_saved_again_are_the_same_student(run: run_dir.RunDir) -> None:
    digest, recipe, made_of = (
        exported.weights_digest(run.student),
        load_recipe(run.as_run),
        checkpoint.made_of(run.student),
    )
    assert made_of
    student = trained.load_student(recipe, run.student)
    for _ in range(12):  # safetensors writes what a file says of itself in any order: the bytes differ
        trained.save_student(student, run, recipe, made_of)
        assert exported.weights_digest(run.student) == digest
    with torch.no_grad():
        next(student.parameters()).view(-1)[0] += 1
    trained.save_student(student, run, recipe, made_of)
    assert exported.weights_digest(run.student) != digest


def test_a_file_that_does_not_say_whose_it_is_is_refused(run: run_dir.RunDir, made: Path, bingo: Any) -> None:
    file = run.export / "student.onnx"
    model = onnx.load(file)
    contract = json.loads(model.metadata_props[0].value)
    del contract["student_weights"]
    onnx.helper.set_model_props(model, {"bingo_compress": json.dumps(contract)})
    onnx.save(model, file)
    ran = bingo("validate", "--run", run.path, "--data", made.parent / "photos")
    assert ran.status == 2 and "as earlier versions wrote" in ran.err
