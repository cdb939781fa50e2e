"""The heads that `validate` writes beside a file are those that `export` puts into it: calibrated, "none of these"
with them; and what is told of a head that comes from a file is what is known of it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bingo_edge import Embedder, classify, load_head, named
from bingo_edge.heads import LinearHead
from edge_models import GREEN, RED, contract, make_model, plain, save
from helpers import listed, photos, untrained_run

from bingo_compress import exporting, validation
from bingo_compress.data import listing
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import probes, protocol, scores
from bingo_compress.evaluation.scores import Sides
from bingo_compress.exporters import head as in_file
from bingo_compress.exporting import Int8
from bingo_compress.heads import answers, calibration, fitting
from bingo_compress.models import exported
from bingo_compress.models.encoder import Preprocessing
from bingo_compress.runtime.run_dir import RunDir

CENTRES = torch.randn(3, 8, generator=torch.Generator().manual_seed(9)) * 1.5


def clouds(each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (3 * each, 8) around three centres, and their labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(3 * each) % 3
    return CENTRES[labels] + 0.7 * torch.randn(3 * each, 8, generator=random), labels


def proof_of(features: torch.Tensor, labels: torch.Tensor) -> Sides:
    folder = listed([f"{number}.png" for number in range(len(labels))])
    places = list(range(len(labels)))
    return Sides(["a", "b", "c"], {"onnx": features}, labels, folder, places, {}, labels[:0], folder, [])


def test_a_proofs_head_is_the_one_that_an_export_fits_and_its_bank_votes_as_its_knn(tmp_path: Path) -> None:
    features, labels = clouds(40, seed=0)
    model = Path(make_model(tmp_path / "student.onnx"))
    opened = Embedder(model)
    head = probes.fit_linear(features, labels, 3)
    validation.save_heads(model, opened.sha256, head, "onnx", proof_of(features, labels))
    written = {end: load_head(model.with_suffix(end), opened) for end in (exported.LINEAR, exported.BANK)}

    asked, truth = clouds(400, seed=5)
    units, rows = probes.normalised(asked).numpy(), asked.numpy()
    shares = torch.from_numpy(classify(written[exported.LINEAR], units, rows)[1])
    ours = fitting.fit("linear", features, labels, ["a", "b", "c"])
    assert shares.numpy() == pytest.approx(classify(ours.head, units, rows)[1], abs=1e-6)
    raw = head.logits(asked)
    assert torch.equal(shares.argmax(1), raw.argmax(1))
    error, before = (calibration.calibration_error(each, truth) for each in (shares, raw.softmax(1)))
    assert error < 0.05 < before
    votes = classify(written[exported.BANK], units, rows)[1].argmax(1)
    assert votes.tolist() == probes.knn_predict(features, labels, asked, 3).tolist()
    for each in written.values():
        assert ours.head.means is not None and each.means == pytest.approx(ours.head.means)
        assert each.threshold == ours.head.threshold


PREPROCESS = {"crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center", "size": 8}


def saved(folder: Path, **earlier: None) -> tuple[fitting.Made, fitting.Made]:
    """(linear head, kNN bank) as `export --head FILE` reads what `validate` wrote. earlier: keys that it did not write
    once.
    """
    features, labels = clouds(40, seed=0)
    model = Path(make_model(folder / "student.onnx", contract(student_weights="w")))
    opened = Embedder(model)
    head = probes.fit_linear(features[:, :3], labels, 3)
    validation.save_heads(model, opened.sha256, head, "onnx", proof_of(features[:, :3], labels))
    for end, gone in ((exported.LINEAR, {*earlier}), (exported.BANK, {*earlier} - {"temperature"})):
        held = dict(np.load(model.with_suffix(end)))
        np.savez(model.with_suffix(end), **{key: value for key, value in held.items() if key not in gone})
    linear, bank = (fitting.read(model.with_suffix(end), "w", PREPROCESS) for end in (exported.LINEAR, exported.BANK))
    return linear, bank


def told(made: fitting.Made, printed: Any) -> tuple[dict[str, Any], str]:
    """(figures on test images, what is said) of a head that goes into a file."""
    asked, truth = clouds(100, seed=5)
    sides = replace(proof_of(asked[:, :3], truth), query_labels=truth)
    shares = classify(made.head, probes.normalised(asked[:, :3]).numpy(), asked[:, :3].numpy())[1]
    found = in_file._figures(torch.from_numpy(shares), None, made, sides)
    facts = made.facts | found | {"parity": {"max_difference": 0.0}}
    facts |= {} if made.head.threshold is None else {"threshold": made.head.threshold}
    printed.truncate(0)
    in_file._say(Path("student.onnx"), {"classes": ["a", "b", "c"], "head": facts}, made.head)
    return found, " ".join(printed.getvalue().split())


def test_of_a_head_from_a_file_what_is_known_is_told(tmp_path: Path, printed: Any) -> None:
    linear, bank = saved(tmp_path)
    features, labels = clouds(40, seed=0)
    raw = probes.fit_linear(features[:, :3], labels, 3)
    fitted = fitting.fit("linear", features[:, :3], labels, ["a", "b", "c"])
    assert linear.facts["calibrated"] is True and linear.facts["temperature"] == fitted.facts["temperature"] != 1
    found, said = told(linear, printed)
    asked, truth = clouds(100, seed=5)
    before = calibration.calibration_error(raw.logits(asked[:, :3]).softmax(1), truth)
    assert found["ece_uncalibrated"] == pytest.approx(before, abs=1e-4) and found["ece"] < before
    assert f"temperature {linear.facts['temperature']:.3g};" in said and "before the temperature)" in said
    assert "not calibrated" not in said and "is not known" not in said and "none of these" not in said

    assert bank.facts["calibrated"] is False and bank.head.threshold == linear.head.threshold
    found, said = told(bank, printed)
    assert "ece_uncalibrated" not in found and "before the temperature" not in said
    assert "its scores are not calibrated; --head linear or knn, with --labels, makes one whose scores are" in said


def test_of_a_head_of_an_earlier_version_nothing_is_made_up(tmp_path: Path, printed: Any) -> None:
    linear, bank = saved(tmp_path, calibrated=None, temperature=None, means=None, threshold=None)
    for made in (linear, bank):
        assert "calibrated" not in made.facts and made.head.means is made.head.threshold is None
        found, said = told(made, printed)
        assert "ece_uncalibrated" not in found and "before the temperature" not in said
        assert "whether its scores are calibrated is not known: an earlier version made the head" in said
        assert 'says no "none of these": the head knows no threshold; --head linear or knn, with --labels,' in said
    assert "temperature" not in linear.facts and bank.facts["temperature"] == probes.KNN_TEMPERATURE


def test_a_head_with_an_unsound_temperature_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "student.linear.npz"
    for key, value in (("temperature", 0.0), ("temperature", [1.0, 1.0]), ("calibrated", [True, False])):
        saved(tmp_path)
        np.savez(file, **dict(np.load(file)) | {key: np.array(value)})
        with pytest.raises(BingoError, match="--head: expected a head with one temperature above 0, found"):
            fitting.read(file, "w", PREPROCESS)


def test_images_of_one_scene_calibrate_nothing_and_that_is_said(printed: Any) -> None:
    features, labels = clouds(10, seed=0)
    for kind in fitting.KINDS:
        made = fitting.fit(kind, features, labels, ["a", "b", "c"], torch.zeros(30, dtype=torch.int64))
        assert made.facts["calibrated"] is False and made.head.means is None
        in_file._say(
            Path("student.onnx"),
            {"classes": ["a"], "head": made.facts | {"parity": {"max_difference": 0.0}}},
            made.head,
        )
    said = " ".join(printed.getvalue().split())
    assert said.count("its scores are not calibrated; all labelled images show one scene; others make one whose") == 2
    assert said.count('says no "none of these"') == 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run: of an untrained student; labels and test: images of three kinds; two: labels of two of these."""
    folder = tmp_path_factory.mktemp("world")
    untrained_run(folder, 12)
    photos(folder / "labels", 12, start=20)
    photos(folder / "test", 6, start=60)
    photos(folder / "two", 12, kinds=2, start=20)
    return folder


@pytest.mark.slow
def test_two_ways_to_one_head_validate_and_export(bingo: Any, world: Path, tmp_path: Path) -> None:
    """The one that `export --head linear` puts into the file, and the one that `validate` writes beside a file without,
    of the same images: the features differ by rounding, and so may the scores.
    """
    run, labels, test = RunDir(world / "run"), world / "labels", world / "test"
    assert bingo("export", "--run", run.path).status == 0
    ran = bingo("validate", "--run", run.path, "--data", labels, "--test", test)
    assert ran.status == 0, ran.err
    exporting.export(run.path, tmp_path / "out", int8=Int8(labels, test), head="linear")
    model, headed = Embedder(run.export / "student.onnx"), Embedder(tmp_path / "out" / "student.onnx")
    found, inside = model.embed(str(test)), headed.embed(str(test))
    head = load_head(run.export / "student.linear.npz", model)
    assert inside.scores is not None and inside.distances is not None
    _, beside = classify(head, found.embeddings, found.features)
    assert beside == pytest.approx(inside.scores, abs=1e-5)
    assert head.threshold == pytest.approx(headed.threshold, abs=1e-5)
    ways = named(model, found, head), named(headed, inside)
    for one, other in zip(*ways, strict=True):
        assert (one.label, one.known) == (other.label, other.known)
        assert one.distance == pytest.approx(other.distance, abs=1e-5)


@pytest.mark.slow
def test_validate_asks_a_file_for_its_own_classes(bingo: Any, world: Path) -> None:
    run, words = RunDir(world / "run"), ("--data", world / "labels", "--test", world / "test")
    exporting.export(run.path, int8=Int8(world / "two"), head="linear")
    ran = bingo("validate", "--run", run.path, *words, "--require", "own_classes=0.9", "--require", "knn=0.1")
    (row,) = (row for row in json.loads(run.validation.read_text())["rows"] if row["name"] == "onnx")
    found = Embedder(run.export / "student.onnx")
    shown = found.embed(str(world / "test"))
    said = zip(named(found, shown), shown.names, strict=True)
    right = [one.known and one.label == Path(path).parent.name for one, path in said]
    assert row["own_classes"] == pytest.approx(np.mean(right)) and row["own_classes"] <= 12 / 18 < row["linear"]
    assert row["classes_missing"] == ["kind2"] and "classes_more" not in row
    low, high = row["own_classes_interval"]
    assert low < row["own_classes"] < high
    assert ran.status == 3 and f"student.onnx with own_classes {row['own_classes']:.4f} (at least 0.9)" in ran.err
    out = " ".join(ran.out.split())
    assert "warning: student.onnx does not know kind2: 6 of 18 test images" in out and "own classes" in out
    card = (run.export / "MODEL_CARD.md").read_text()
    assert f"{row['own_classes']:.3f} [{low:.3f}, {high:.3f}]" in card and "| own classes |" in card
    assert "- own\\_classes: of a file with classes in it\\: share of the test images that it names rightly" in card


def test_the_answers_of_a_file_in_the_classes_of_a_proof(tmp_path: Path, printed: Any) -> None:
    axes = np.eye(2, 3, dtype="f4")
    head = LinearHead(axes / 100, np.zeros(2, "f4"), np.array(["red", "lime"]), axes)
    told = contract(classes=["red", "lime"], head={"threshold": 0.2})
    told["outputs"] = dict.fromkeys(("embedding", "features", "scores", "distance"), "")
    onnx.save(in_file.with_head(onnx.load(make_model(tmp_path / "m.onnx", told)), head), tmp_path / "m.onnx")
    for name, colour in {"red/1": RED, "green/1": GREEN, "blue/1": (20, 20, 250)}.items():
        save(tmp_path / "shown" / f"{name}.png", plain(colour))
    folder = listing.list_images(tmp_path / "shown")
    sides = Sides(["blue", "green", "red"], {}, torch.arange(0), folder, [], {}, torch.arange(3), folder, [0, 1, 2])
    see = Preprocessing(8, 0.875, "bicubic", "center", (0.5,) * 3, (0.5,) * 3)
    predicted = answers.in_classes_of(sides, tmp_path / "m.onnx", told, see)
    assert predicted.tolist() == [scores.NONE_OF_THESE, scores.UNKNOWN, 2]
    known = {name: word for name, word in told["outputs"].items() if name != "distance"}
    assert answers.in_classes_of(sides, tmp_path / "m.onnx", told | {"outputs": known}, see)[0] != scores.NONE_OF_THESE

    judged = protocol.Judged("onnx", sides, probes.LinearHead(torch.zeros(3, 3), torch.zeros(3), 1.0), {}, predicted)
    found = protocol.FIGURES["own_classes"].measure(judged)
    assert found["own_classes"] == found["none_of_these"] == pytest.approx(1 / 3)
    assert protocol.FIGURES["own_classes"].measure(judged._replace(own=None)) == {}
    other = answers.other_classes(told, sides)
    assert other == {"classes_missing": ["blue", "green"], "classes_more": ["lime"]}
    assert answers.other_classes({"classes": ["red", "green", "blue"]}, sides) == {}
    answers.say([{"name": "student"}, {"file": "m.onnx", **found, **other}], sides)
    said = " ".join(printed.getvalue().split())
    assert "warning: m.onnx does not know blue, green: 2 of 3 test images" in said
    assert "m.onnx knows classes that are not in this proof: lime" in said
    assert 'm.onnx says "none of these" of 33.3% of 3 test images' in said


def test_near_copies_of_test_images_among_the_labelled_ones_are_told_beside_the_accuracy() -> None:
    features, labels = clouds(40, seed=0)
    made = fitting.fit("linear", features, labels, ["a", "b", "c"])
    sides = replace(proof_of(features, labels), query_labels=labels)
    shares = torch.from_numpy(classify(made.head, features.numpy(), features.numpy())[1])
    assert "test_share_near_bank" not in in_file._figures(shares, None, made, sides)
    near = replace(sides, near={"test_images_near_bank": 30, "test_share_near_bank": 0.25})
    assert in_file._figures(shares, None, made, near)["test_share_near_bank"] == 0.25
