"""The class head in a file gives the scores of the head beside it, in every form of file; what is not equal, or another
file's, is refused.
"""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bingo_edge import Embedder, classify, load_head
from bingo_edge.heads import BankHead, Head, LinearHead
from edge_models import make_model, units
from helpers import Ran, command, photos, untrained_run

from bingo_compress import exporting, validation
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import probes
from bingo_compress.exporters import head as heads
from bingo_compress.exporters.onnx import OUTPUTS, PROFILES, REFUSED, publish
from bingo_compress.exporting import Int8, Shape
from bingo_compress.heads import fitting
from bingo_compress.models import exported
from bingo_compress.runtime import run_dir

NAMES = np.array(["ant", "bee", "cow", "dog"])
SHOWN = torch.randint(0, 256, (11, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
RANDOM = np.random.default_rng(0)
MEANS = units(RANDOM.normal(size=(4, 3))).astype(np.float32)


def linear() -> LinearHead:
    random = np.random.default_rng(1)
    return LinearHead(random.normal(size=(4, 3)).astype("f4") / 50, random.normal(size=4).astype("f4"), NAMES)


def bank(k: int) -> BankHead:
    random = np.random.default_rng(2)
    rows = np.abs(units(random.normal(size=(50, 3)))).astype("f2").astype("f4")
    return BankHead(rows, random.integers(0, 4, 50, np.int32), NAMES, k, 0.07)


HEADS = {"linear": linear(), "whole bank": bank(50), "larger k": bank(99), "seven nearest": bank(7)}


# ---------------------------------------------------------------- the graph


@pytest.mark.parametrize("opset", [17, 18, 21])
@pytest.mark.parametrize("batch", ["batch", 1, 4])
@pytest.mark.parametrize("kind", HEADS)
def test_the_scores_of_a_file_are_those_of_the_head_beside_it(
    kind: str, batch: int | str, opset: int, tmp_path: Path
) -> None:
    bare = onnx.load(make_model(tmp_path / "student.onnx", batch=batch))
    if opset != 18:  # the reductions of make_model are written as 18 has them
        bare = onnx.version_converter.convert_version(bare, opset)
    made = heads.with_head(bare, HEADS[kind]._replace(means=MEANS))
    onnx.save(made, tmp_path / "headed.onnx")
    found = exported.runner_by_name(tmp_path / "headed.onnx")(SHOWN)
    assert {name: tuple(values.shape[1:]) for name, values in found.items()} == {
        "embedding": (3,),
        "features": (3,),
        "scores": (4,),
        "distance": (1,),
    }
    embedding, features = found["embedding"].numpy(), found["features"].numpy()
    expected = classify(HEADS[kind], embedding, features)[1]
    assert np.abs(found["scores"].numpy() - expected).max() < 1e-5
    assert np.ptp(expected, axis=0).max() > 0.01  # not all alike
    assert found["distance"][:, 0].numpy() == pytest.approx(1 - (embedding @ MEANS.T).max(1), abs=1e-6)
    kinds = {node.op_type for node in made.graph.node if node.name.startswith("head_")}
    assert ("TopK" in kinds) == (kind == "seven nearest")
    assert [dim.dim_value for output in made.graph.output for dim in output.type.tensor_type.shape.dim[:1]] == [
        batch if isinstance(batch, int) else 0
    ] * 4
    assert [output.name for output in bare.graph.output] == ["embedding", "features"]  # that one is as it was


def test_a_head_that_the_file_does_not_give_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(heads.with_head(onnx.load(make_model(tmp_path / "s.onnx")), linear()), tmp_path / "h.onnx")
    assert heads._prove(tmp_path / "h.onnx", linear(), SHOWN)["max_difference"] < 1e-5
    other = linear()._replace(bias=linear().bias + np.array([0, 1e-3, 0, 0], np.float32))
    with pytest.raises(BingoError, match="differ on 11 of your images by") as caught:
        heads._prove(tmp_path / "h.onnx", other, SHOWN)
    assert caught.value.exit_status == REFUSED
    sure = linear()._replace(weight=linear().weight * 1000)
    features = np.array([[100, 0, 0]], np.float32)
    assert heads._allowed(linear(), features) == 1e-5  # no less is asked of logits that float32 cannot hold
    assert heads._allowed(sure, features) == pytest.approx(np.abs(sure.weight[:, 0] * 100 + sure.bias).max() * 2**-23)
    assert heads._allowed(bank(50)._replace(temperature=0.005), features) == 200 * 2**-23
    monkeypatch.setattr(heads, "LARGEST", 100)
    with pytest.raises(BingoError, match="expected a bank of at most"):
        heads.with_head(onnx.load(tmp_path / "s.onnx"), bank(50))


# ---------------------------------------------------------------- fitted


def clouds(each: int = 30, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (3 * each, 8) around three centres that overlap, and their labels."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(3 * each) % 3
    return 3 + centres[labels] + 0.9 * torch.randn(3 * each, 8, generator=random), labels


@pytest.mark.parametrize("kind", fitting.KINDS)
def test_a_fitted_head_is_calibrated_and_saved_as_it_is(kind: str, tmp_path: Path) -> None:
    features, labels = clouds()
    made = fitting.fit(kind, features, labels, ["a", "b", "c"])
    model = make_model(tmp_path / "student.onnx")
    digest = Embedder(model).sha256
    saved = fitting.save(Path(model), digest, made)
    assert saved.name == {"linear": "student.linear.npz", "knn": "student.bank.npz"}[kind]
    asked, truth = clouds(200, seed=5)
    rows, shares = probes.normalised(asked).numpy(), asked.numpy()
    before = classify(made.head, rows, shares)[1]
    after = classify(load_head(saved, Embedder(model)), rows, shares)[1]
    assert np.array_equal(before, after)
    probabilities = torch.from_numpy(before)
    accuracy = float((probabilities.argmax(1) == truth).double().mean())
    assert accuracy > 0.6 and abs(float(probabilities.max(1).values.mean()) - accuracy) < 0.1
    assert made.head.threshold is not None and 0 < made.head.threshold < 2 and made.facts["kind"] == kind
    if kind == "linear":
        plain = probes.fit_linear(features, labels, 3)
        assert made.head.weight * made.facts["temperature"] == pytest.approx(plain.weight.numpy(), rel=1e-5)
    else:
        assert made.head.k == made.facts["k"] == 90


def test_held_out_logits_are_of_heads_that_did_not_see_the_row() -> None:
    features, labels = clouds()
    fold = probes.folds(labels, 5)
    logits = probes.held_out_logits(features, labels, 3, 0.1, fold)
    changed = labels.clone()
    changed[fold == 2] = (changed[fold == 2] + 1) % 3
    again = probes.held_out_logits(features, changed, 3, 0.1, fold)
    assert torch.equal(logits[fold == 2], again[fold == 2]) and not torch.equal(logits[fold == 1], again[fold == 1])


# ---------------------------------------------------------------- an export


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, labelled images and others to test on."""
    folder = tmp_path_factory.mktemp("world")
    untrained_run(folder, 14)
    photos(folder / "labels", 9)
    photos(folder / "test", 5, start=60)
    return folder


@pytest.fixture(scope="module")
def both(world: Path) -> Path:
    """The folder of an export of float and int8 file with a linear head."""
    out = world / "both"
    int8 = Int8(world / "labels", world / "test", max_loss=40)
    exporting.export(world / "run", out, fmt="all", shape=Shape("edge"), int8=int8, head="linear")
    return out


def contract(file: Path) -> dict[str, Any]:
    return json.loads(file.with_suffix(".json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student.onnx", "student-int8.onnx"])
def test_an_exported_file_has_its_own_head_proven_and_beside_it(both: Path, world: Path, name: str) -> None:
    file = both / name
    model, told = Embedder(file), contract(file)
    assert model.classes == ("kind0", "kind1", "kind2") == tuple(told["classes"])
    assert list(told["outputs"]) == ["embedding", "features", "scores", "distance"] == list(OUTPUTS)
    facts = told["head"]
    assert facts["kind"] == "linear" and facts["parity"]["max_difference"] <= 1e-5 and facts["images"] == 27
    found = model.embed(str(world / "test"))
    assert found.scores is not None and found.distances is not None
    labels, beside = classify(load_head(both / f"{file.stem}.linear.npz", model), found.embeddings, found.features)
    assert np.abs(found.scores - beside).max() <= 1e-5
    truth = np.array([Path(path).parent.name for path in found.names])
    assert (
        facts["accuracy"]
        == (labels == truth).mean()
        == (np.array(model.classes)[found.scores.argmax(1)] == truth).mean()
    )
    assert facts["test_images"] == 15 and [entry["images"] for entry in facts["per_class"]] == [5, 5, 5]
    assert facts["false_alarms"] == pytest.approx((found.distances > model.threshold).mean())
    assert 0 <= facts["ece"] <= 1 and facts["threshold"] == model.threshold
    golden = json.loads((file.with_suffix(".golden") / "golden.json").read_text())["images"]
    assert all(len(entry["scores"]) == 3 for entry in golden)


@pytest.mark.slow
def test_the_int8_file_has_a_head_of_its_own_and_names_the_float_file_with_its(both: Path) -> None:
    exact, small = contract(both / "student.onnx"), contract(both / "student-int8.onnx")
    assert small["int8"]["float_sha256"] == exact["sha256"]
    assert 0.9 <= small["int8"]["gate"]["same_class"] <= 1
    heads_of = [np.load(both / f"{stem}.linear.npz") for stem in ("student", "student-int8")]
    assert not np.array_equal(heads_of[0]["weight"], heads_of[1]["weight"])
    quantised = {
        node.op_type for node in onnx.load(both / "student-int8.onnx").graph.node if node.name.startswith("head_")
    }
    assert quantised == {"Gemm", "Softmax", "MatMul", "ReduceMax", "Sub"}
    card = (both / "MODEL_CARD.md").read_text()
    assert "## Classes" in card and "bingo-edge classify student.onnx photo.jpg" in card
    assert "It knows 3 classes" in card and "calibration error" in card


@pytest.mark.slow
def test_a_head_from_a_file_goes_into_the_next_export_and_another_files_is_refused(
    both: Path, world: Path, tmp_path: Path
) -> None:
    run = world / "run"
    given = tmp_path / "given"
    shutil.copytree(both, given)
    exporting.export(run, tmp_path / "again", head=str(given / "student.linear.npz"))
    facts = contract(tmp_path / "again" / "student.onnx")["head"]
    assert "accuracy" not in facts and facts["threshold"] == contract(both / "student.onnx")["head"]["threshold"]
    assert "Not tested on labelled images" in (tmp_path / "again" / "MODEL_CARD.md").read_text()
    first, second = (np.load(folder / "student.linear.npz") for folder in (both, tmp_path / "again"))
    assert np.array_equal(first["weight"], second["weight"]) and first["model_sha256"] != second["model_sha256"]

    shutil.copy(given / "student-int8.linear.npz", given / "student.linear.npz")
    with pytest.raises(BingoError, match="--head: expected a head of the model file with sha256"):
        exporting.export(run, tmp_path / "third", head=str(given / "student.linear.npz"))
    other = untrained_run(tmp_path / "other", 4)
    held = run_dir.open_finished(other.path)
    (tmp_path / "fourth").mkdir()
    with pytest.raises(BingoError, match="expected a head of the run's student as it is exported here"):
        exporting.export(
            held.path, tmp_path / "fourth", shape=Shape(image_size=40), head=str(both / "student.linear.npz")
        )
    assert not (tmp_path / "third").exists() or not list((tmp_path / "third").glob("*.onnx"))


@pytest.fixture
def bingo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object) -> Ran:
        return command(monkeypatch, capsys, *words)

    return run


def refused(ran: Ran, said: str) -> None:
    assert ran.status == 2 and said in ran.err.replace("\n", " ") and "Traceback" not in ran.err, ran.err


def test_words_that_do_not_go_together_are_refused_before_anything_is_made(
    world: Path, bingo: Any, tmp_path: Path
) -> None:
    run, labels = world / "run", world / "labels"
    words = ("export", "--run", run, "--out", tmp_path / "out")
    refused(bingo(*words, "--head", "linear"), "--head linear: expected --labels beside it")
    refused(bingo(*words, "--head", "knn", "--test", world / "test"), "--head knn: expected --labels beside it")
    refused(bingo(*words, "--test", world / "test"), "--test: expected --labels beside it, found none")
    refused(bingo(*words, "--labels", labels), "or --head, beside it")
    refused(bingo(*words, "--head", "forest", "--labels", labels), "--head: expected linear, knn, or a head")
    refused(bingo(*words, "--head", tmp_path / "student.linear.npz"), "no file at")
    refused(bingo(*words, "--head", "linear", "--labels", labels, "--outputs", "embedding"), "with --head scores")
    refused(bingo(*words, "--outputs", "scores"), "--outputs: expected embedding or features")
    few = photos(tmp_path / "few", 2)
    refused(bingo(*words, "--head", "linear", "--labels", few), "at least three different images in every class")
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_strangers_npz_is_never_unpickled(world: Path, bingo: Any, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    assert pickle.dumps(Bomb())
    model = make_model(tmp_path / "student.onnx")
    keys = {"weight": np.ones((1, 3), "f4"), "bias": np.ones(1, "f4"), "model_sha256": np.array(Embedder(model).sha256)}
    np.savez(tmp_path / "student.linear.npz", classes=np.array([Bomb()], dtype=object), **keys)
    ran = bingo("export", "--run", world / "run", "--out", tmp_path / "out", "--head", tmp_path / "student.linear.npz")
    refused(ran, "--head: expected a head, found")
    assert not (tmp_path / "exploded").exists()


def test_publishing_keeps_the_outputs_that_are_asked_for(tmp_path: Path) -> None:
    meta = {"outputs": {"embedding": "", "features": "", **heads.OUTPUTS}, "input": {"dtype": "uint8"}}
    head = linear()._replace(means=MEANS)
    onnx.save(heads.with_head(onnx.load(make_model(tmp_path / "s.onnx")), head), tmp_path / "h.onnx")
    wanted = PROFILES["modern"].__class__(18, 0, 0, outputs=("embedding", "scores"))
    publish(tmp_path / "h.onnx", tmp_path / "out.onnx", meta, wanted)
    assert [output.name for output in onnx.load(tmp_path / "out.onnx").graph.output] == ["embedding", "scores"]


def test_a_head_is_one_of_the_kits_own_kinds() -> None:
    assert all(isinstance(each, Head) for each in HEADS.values())


def test_validate_leaves_the_head_of_a_file_that_has_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    monkeypatch.setattr(validation, "save_heads", lambda file, *rest: saved.append(file))
    monkeypatch.setattr(validation.model_card, "renew", lambda run, folder: folder)
    run = run_dir.RunDir(tmp_path)
    sides: Any = SimpleNamespace(bank_folder=SimpleNamespace(files=[]), places=[], bank={"onnx": 0, "onnx-int8": 0})
    sides.labels, sides.classes = None, []
    files = {"onnx": {"file": "student.onnx", "sha256": "1", "classes": ["ant"]}}
    files["onnx-int8"] = {"file": "student-int8.onnx", "sha256": "2"}
    validation._write({}, run, None, files, sides, {"onnx": linear(), "onnx-int8": linear()})
    assert saved == [run.export / "student-int8.onnx"]
