"""`validate`: its figures against plain references, every option through the command line on tiny models, and bad input
in one line.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import digests_of, encoder, listed, photos, recipe, unit

from bingo_compress import validation
from bingo_compress.data import listing
from bingo_compress.data.image_list import ImageList
from bingo_compress.evaluation import finetune, intervals, probes, protocol, scores
from bingo_compress.evaluation.scores import Sides
from bingo_compress.features import bagging, extract
from bingo_compress.presenting import tables
from bingo_compress.recipe import recipe_text
from bingo_compress.runtime import checkpoint, run_dir

FIGURES = ("knn", "linear", "linear_balanced", "neighbour_recall")


# ---------------------------------------------------------------- figures on features


def sides(classes: int = 3, bank: int = 90, queries: int = 60) -> Sides:
    """A sharp teacher, a blurred student and a random model, on clouds about the classes' centres."""
    generator = torch.Generator().manual_seed(0)
    labels, asked = torch.arange(bank) % classes, torch.arange(queries) % classes
    centres = unit(classes, 8, seed=1)
    features = {}
    for name, spread in (("teacher", 0.2), ("student", 0.5), ("random", 100.0)):
        features[name] = [centres[of] + spread * torch.randn(len(of), 8, generator=generator) for of in (labels, asked)]
    folder = ImageList(Path("nowhere"), (), ())
    by_side = ({name: pair[side] for name, pair in features.items()} for side in (0, 1))
    return Sides(
        [f"class{c}" for c in range(classes)], next(by_side), labels, folder, [], next(by_side), asked, folder, []
    )


def test_the_figures_are_those_of_the_probes_inside_their_intervals() -> None:
    both = sides(classes=2)
    for name in both.bank:
        head = probes.fit_linear(both.bank[name], both.labels, 2)
        found, right = protocol.figures_of(name, both, head)
        bank, queries, labels = both.bank[name], both.queries[name], both.query_labels
        predicted = head.predict(queries)
        assert found["knn"] == pytest.approx(probes.accuracy(probes.knn_predict(bank, both.labels, queries, 2), labels))
        assert found["linear"] == pytest.approx(probes.accuracy(predicted, labels))
        assert found["linear_balanced"] == pytest.approx(probes.balanced_accuracy(predicted, labels))
        logits = head.logits(queries)
        assert found["linear_auc"] == pytest.approx(probes.auc(logits[:, 0] - logits[:, 1], labels == 0))
        assert found["linear_strength"] == head.strength
        recall = probes.neighbour_recall((both.queries["teacher"], both.bank["teacher"]), (queries, bank))
        assert found["neighbour_recall"] == pytest.approx(recall)
        assert right["linear"].tolist() == (predicted == labels).tolist()
        for key in (*FIGURES, "linear_auc"):
            low, high = found[f"{key}_interval"]
            assert 0 <= low <= found[key] <= high <= 1, key
            assert high - low < 0.35, key
    assert protocol.figures_of("teacher", both, head)[0]["neighbour_recall_interval"] == (1, 1)


def test_each_class_has_its_share_its_interval_and_its_double() -> None:
    both = sides()
    predicted = both.query_labels.clone()
    predicted[both.query_labels == 1] = torch.tensor([1] * 12 + [0] * 3 + [2] * 5)
    found = scores.by_class(predicted, both)
    assert found["confusion"] == [[20, 0, 0], [3, 12, 5], [0, 0, 20]]
    first, second, _ = found["per_class"]
    assert (first["accuracy"], first["accuracy_interval"], first["mistaken_for"]) == (
        1.0,
        intervals.wilson(20, 20),
        None,
    )
    assert (second["class"], second["images"], second["accuracy"], second["mistaken_for"]) == (
        "class1",
        20,
        0.6,
        "class2",
    )
    low, high = second["accuracy_interval"]
    assert (low, high) == pytest.approx((0.6 - 0.215, 0.6 + 0.215), abs=0.06)


def test_the_gap_closed_with_its_interval_and_nothing_where_there_is_no_gap() -> None:
    low, value, high = (torch.arange(200) < right for right in (40, 100, 160))
    found = scores.gap_closed(low, value, high)
    assert found["gap_closed"] == pytest.approx(0.5)
    assert 0.3 < found["gap_closed_interval"][0] < 0.5 < found["gap_closed_interval"][1] < 0.7
    assert scores.gap_closed(low, value, torch.arange(200) < 45) == {}


def test_few_labels_are_the_mean_of_three_probes_on_three_draws() -> None:
    both = sides()
    found = scores.few_labels("student", both, "10%")
    shares = []
    for seed in range(3):
        rows = finetune.subset(both.labels, "10%", seed)
        head = probes.fit_linear(both.bank["student"][rows], both.labels[rows], 3)
        shares.append(probes.accuracy(head.predict(both.queries["student"]), both.query_labels))
    mean = sum(shares) / 3
    assert found["images"] == 9
    assert found["linear"] == pytest.approx(mean)
    assert found["linear_spread"] == pytest.approx(math.sqrt(sum((share - mean) ** 2 for share in shares) / 2))
    assert found["linear_interval"][0] < mean < found["linear_interval"][1]


def test_the_table_of_classes_is_short_and_starts_with_the_weakest(printed: Any) -> None:
    entries = [
        {"class": f"c{n:02d}", "images": 9, "accuracy": n / 30, "accuracy_interval": (0.0, 1.0), "mistaken_for": "c29"}
        for n in range(30)
    ]
    entries.append({"class": "gone", "images": 0, "accuracy": None, "mistaken_for": None})
    tables._classes(entries[::-1])
    shown = re.findall(r"│ (c\d\d) ", printed.getvalue())
    assert shown == [f"c{n:02d}" for n in range(20)]
    assert "the weakest 20 of 30" in printed.getvalue() and "gone" not in printed.getvalue()


# ---------------------------------------------------------------- the command


def make_run(path: Path, data: Path, seed: int) -> Path:
    """A finished run without a day's distillation: recipe, a student and its start."""
    run = run_dir.RunDir(path)
    run.work.mkdir(parents=True)
    run.recipe.write_text(recipe_text(recipe(data=str(data))))
    checkpoint.save(run.student, encoder("test_efficientnet", seed=seed).backbone.state_dict())
    checkpoint.save(run.start, encoder("test_efficientnet", seed=100).backbone.state_dict())
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    data, test = photos(root / "photos", 8), photos(root / "test", 5, start=200)
    return {
        "data": data,
        "test": test,
        "run": make_run(root / "run", data, 1),
        "other": make_run(root / "other", data, 2),
    }


@pytest.fixture
def prove(bingo: Any, world: dict[str, Path], tmp_path: Path) -> Any:
    """prove(*options) -> (what is on screen, the JSON); --run, --data, --test and --json are given."""

    def run(*words: object, run: Path = world["run"]) -> tuple[str, dict[str, Any]]:
        file = tmp_path / "proof.json"
        ran = bingo("validate", "--run", run, "--data", world["data"], "--test", world["test"], "--json", file, *words)
        assert ran.status == 0, ran.err
        return ran.out, json.loads(file.read_text())

    return run


def test_every_figure_has_an_interval_and_the_student_its_classes(prove: Any, tmp_path: Path) -> None:
    out, result = prove()
    assert set(result) == {"protocol", "rows", "gain"}
    assert [row["name"] for row in result["rows"]] == ["teacher", "student", "start", "random"]
    for row in result["rows"]:
        for key in FIGURES:
            low, high = row[f"{key}_interval"]
            assert isinstance(row[key], float) and low <= row[key] <= high
        assert ("confusion" in row) == (row["name"] == "student")
    student = result["rows"][1]
    counts = student["confusion"]
    assert [sum(line) for line in counts] == [5, 5, 5] == [entry["images"] for entry in student["per_class"]]
    assert sum(counts[c][c] for c in range(3)) / 15 == pytest.approx(student["linear"])
    assert "bootstrap" in result["protocol"]["intervals"]
    low, high = student["knn_interval"]
    assert f"{student['knn']:.3f} [{low:.3f}, {high:.3f}]" in out
    assert "linear probe by class" in out
    text = (tmp_path / "proof.json").read_text()
    assert all(f"[{', '.join(map(str, line))}]" in text for line in counts)


@pytest.mark.slow
def test_shots_probe_every_model_on_parts_of_the_labels(prove: Any) -> None:
    out, result = prove("--shots", "25%,3")
    for row in result["rows"]:
        assert {spec: found["images"] for spec, found in row["shots"].items()} == {"25%": 6, "3": 9}
        for found in row["shots"].values():
            assert found["linear_interval"][0] <= found["linear"] <= found["linear_interval"][1]
            assert found["linear_spread"] >= 0 and "fine_tuned" not in found
    assert "3 draws" in result["protocol"]["shots"] and "fine_tuned" not in result["protocol"]
    assert "few labels" in out and "fine-tuned" not in out and "linear, augmented" not in out


@pytest.mark.slow
def test_fine_tuning_and_the_literatures_protocol_leave_out_the_teacher(
    prove: Any, world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "TUNE_STEPS", 20)
    run = Path(shutil.copytree(world["run"], tmp_path / "run"))
    stored = run / "work" / "pixels-0123456789abcdef.u8"
    stored.write_bytes(b"of distill")
    out, result = prove("--shots", "4", "--fine-tune", "--literature", run=run)
    rows = {row["name"]: row for row in result["rows"]}
    assert "literature" not in rows["teacher"] and "fine_tuned" not in rows["teacher"]["shots"]["4"]
    for name in ("student", "start", "random"):
        found = rows[name]["shots"]["4"]
        for figure, low, high in (
            (rows[name]["literature"], *rows[name]["literature_interval"]),
            (found["fine_tuned"], *found["fine_tuned_interval"]),
        ):
            assert 0 <= low <= figure <= high <= 1
    assert rows["student"]["literature"] > 0.6  # colours are easy; a wrong order of labels would give a third
    assert rows["student"]["shots"]["4"]["fine_tuned"] > 0.6
    assert (
        "teacher would be expensive" in result["protocol"]["literature"]
        and "20 steps" in result["protocol"]["fine_tuned"]
    )
    assert "linear, augmented" in out and "fine-tuned" in out
    assert stored.read_bytes() == b"of distill"
    assert list((run / "work" / "labelled").glob("pixels-*/*.u8"))


def test_a_part_set_aside_is_never_trained_on(
    bingo: Any, world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recorded(encoder: object, images: finetune.Labelled, *_: object, **__: object) -> probes.LinearHead:
        trained.append((images.rows, images.labels))
        return probes.LinearHead(torch.zeros(3, encoder.width), torch.zeros(3), 0.0)  # type: ignore[attr-defined]

    monkeypatch.setattr(finetune, "linear_with_augmentation", recorded)
    run = Path(shutil.copytree(world["run"], tmp_path / "run"))
    shutil.copytree(world["data"], tmp_path / "data")
    (tmp_path / "data" / "kind0" / "000.png").write_bytes(b"broken")  # positions shift by one
    ran = bingo("validate", "--run", run, "--data", tmp_path / "data", "--literature", "--json", tmp_path / "v.json")
    assert ran.status == 0, ran.err
    files = [name for name in listing.list_images(tmp_path / "data").files if name != "kind0/000.png"]
    rows, labels = trained[0]
    assert [files[row].split("/")[0] for row in rows.tolist()] == [f"kind{label}" for label in labels.tolist()]
    assert len(set(rows.tolist())) == 23 - 5  # a quarter of 7, 8 and 8
    assert json.loads((tmp_path / "v.json").read_text())["protocol"]["bank_images"] == 18


@pytest.mark.slow
def test_against_another_run_adds_its_row_and_a_paired_test(prove: Any, world: dict[str, Path]) -> None:
    out, result = prove("--against", world["other"])
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[-1] == "against"
    _, alone = prove(run=world["other"])
    assert {key: rows["against"][key] for key in FIGURES} == {key: alone["rows"][1][key] for key in FIGURES}
    for key in ("knn", "linear"):
        test = result["paired"][key]
        assert test["difference"] == pytest.approx(rows["student"][key] - rows["against"][key])
        assert test["difference"] == pytest.approx((test["only_this"] - test["only_other"]) / 15)
        assert test["difference_interval"][0] <= test["difference"] <= test["difference_interval"][1]
    assert str(world["other"]) in result["protocol"]["against"]
    assert "McNemar p = " in out and str(world["other"]) in out


def test_against_itself_nothing_differs(prove: Any, world: dict[str, Path]) -> None:
    _, result = prove("--against", world["run"])
    expected = {"difference": 0.0, "difference_interval": [0.0, 0.0], "only_this": 0, "only_other": 0, "p_value": 1.0}
    assert result["paired"] == {"knn": expected, "linear": expected}


@pytest.mark.slow
def test_bags_are_judged_by_the_labels_of_their_images(prove: Any, world: dict[str, Path], tmp_path: Path) -> None:
    run = run_dir.RunDir(Path(shutil.copytree(world["run"], tmp_path / "run")))
    folder = listing.list_images(world["data"])
    assert [Path(name).parts[0] for name in folder.files] == [f"kind{kind}" for kind in range(3) for _ in range(8)]
    elsewhere = digests_of(["elsewhere"])
    images = listed([*folder.files, "elsewhere"], np.concatenate((folder.contents.digests, elsewhere)))
    bags = torch.randint(25, (25, 3), generator=torch.Generator().manual_seed(0))
    bags[3, 1:] = bags[7] = -1
    bagging.save(run.bags, bags, images)
    out, result = prove(run=run.path)
    labels = torch.tensor([*(number // 8 for number in range(24)), -1])
    assert result["bag_purity"] == pytest.approx(bagging.purity(bags, labels))
    assert result["bag_purity_interval"][0] < result["bag_purity"] < result["bag_purity_interval"][1]
    assert result["bag_purity_chance"] == pytest.approx(7 / 23)
    assert f"bags: {result['bag_purity']:.3f} [" in out

    bagging.save(run.bags, bags, listed(["of other images"] * 25))
    out, result = prove(run=run.path)
    assert "bag_purity" not in result and "bags:" not in out


def test_json_keeps_names_with_brackets_as_they_are() -> None:
    result = {"counts": [[1, 2], [3.5, -4e-05]], "empty": [], "names": ["[ 1,  2 ]", "a\n[\n1 ]"]}
    text = validation._json(result)
    assert json.loads(text) == result
    assert "[3.5, -4e-05]" in text


# ---------------------------------------------------------------- bad input


def test_bad_options_are_one_line_and_nothing_is_embedded(
    bingo: Any, world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "plain", lambda *_: pytest.fail("embedded"))
    unfinished = Path(shutil.copytree(world["other"], tmp_path / "unfinished"))
    (unfinished / "student.safetensors").unlink()
    for words, said in (
        (("--shots", "ten"), ("--shots", "1%, 10% or 5", "'ten'")),
        (("--shots", "1%,,5"), ("--shots", "1%, 10% or 5", "''")),
        (("--shots", "0%"), ("--shots", "'0%'")),
        (("--fine-tune",), ("--fine-tune", "--shots")),
        (("--against", world["data"]), ("--against: expected", "no recipe.yaml")),
        (("--against", tmp_path / "gone"), ("--against: expected", "no recipe.yaml")),
        (("--against", unfinished), ("--against: ", "unfinished")),
    ):
        ran = bingo("validate", "--run", world["run"], "--data", world["data"], *words)
        assert ran.status == 2, words
        assert len(ran.err.splitlines()) == 1 and ran.err.startswith("error: "), ran.err
        assert all(text in ran.err for text in said), ran.err


@pytest.mark.slow
def test_the_student_of_a_run_without_start_is_still_proven(prove: Any, world: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(world["run"], tmp_path / "run"))
    shutil.rmtree(run / "work")
    _, result = prove("--literature", run=run)
    assert [row["name"] for row in result["rows"]] == ["teacher", "student", "random"]
    assert (run / "work" / "labelled").is_dir()
