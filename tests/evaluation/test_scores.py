"""Which images stand on which side of a split, by content; and what is said where a side is too small or an image goes
missing.
"""

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, Ran, encoder, photos, recipe, unit

from bingo_compress import validation
from bingo_compress.comparison import side_by_side, tables
from bingo_compress.data import image_list, listing
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import probes, scores
from bingo_compress.features import bagging, extract
from bingo_compress.int8 import gate
from bingo_compress.recipe import recipe_text
from bingo_compress.runtime import checkpoint, run_dir
from bingo_compress.training import metrics

Bingo = Callable[..., Ran]


def copied(folder: Path, *names: str) -> Path:
    """Each of `names` once more in its class, under another name and as another file."""
    for name in names:
        shutil.copy(folder / name, folder / name.replace(".png", "-copy.png"))
    return folder


def a_run(path: Path, data: Path) -> Path:
    """A finished run of an untrained student, trained on all of `data` as far as its bags tell."""
    run = run_dir.RunDir(path)
    run.work.mkdir(parents=True)
    run.recipe.write_text(recipe_text(recipe(data=str(data))))
    checkpoint.save(run.student, encoder("test_efficientnet", seed=1).backbone.state_dict())
    folder = listing.list_images(data)
    bagging.save(run.bags, torch.zeros(len(folder.files), 1, dtype=torch.int64), folder)
    return path


def by_model(name: str = "student") -> dict[str, Any]:
    return {name: extract.as_embed(encoder("test_efficientnet").eval(), CPU)}


# ---------------------------------------------------------------- test images


def test_test_images_that_are_in_the_bank_are_refused_by_content(bingo: Bingo, tmp_path: Path) -> None:
    data, test = photos(tmp_path / "data", 6), photos(tmp_path / "test", 3, start=50)
    run = a_run(tmp_path / "run", data)
    shutil.copy(data / "kind1" / "004.png", test / "kind1" / "another-name.png")
    for given, said in (
        (test, "found 1 of 10 in both (kind1/another-name.png is kind1/004.png)"),
        (data, "found 18 of 18 in both"),
    ):
        ran = bingo("validate", "--run", run, "--data", data, "--test", given)
        assert ran.status == 2 and len(ran.err.splitlines()) == 1
        assert "--test: expected images that are not in --data" in ran.err and said in ran.err
    assert not (run / "validation.json").exists()
    with pytest.raises(BingoError, match="--test: expected images that are not in --labels, found 1 of 10"):
        side_by_side.compare(recipe(data=str(data)), data, test, "bingo", [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_are_kept_on_one_side_of_what_is_set_aside(tmp_path: Path, printed: StringIO) -> None:
    data = photos(tmp_path / "data", 8)
    copied(data, *(f"kind{kind}/{number:03d}.png" for kind in range(3) for number in range(8)))
    shutil.copy(data / "kind0" / "001.png", data / "kind2" / "under-another-label.png")
    folder = listing.list_images(data)
    sides = scores.sides(by_model(), folder, None, image_list.labels_of(folder)[0])
    digests = folder.digests
    assert not {digests[place] for place in sides.places} & {digests[place] for place in sides.query_places}
    assert sorted(sides.places + sides.query_places) == list(range(49))
    assert min(sides.query_labels.bincount().tolist()) >= 4  # a quarter of 16
    assert (
        sides.groups is not None
        and len(sides.groups) == len(sides.places)
        and len(sides.groups.unique()) < len(sides.groups)
    )
    assert "25 labelled images are exact copies of others" in printed.getvalue()


def test_without_copies_the_part_set_aside_is_a_quarter_of_each_class() -> None:
    labels = torch.tensor([0] * 7 + [1] * 8 + [2] * 41)
    chosen = scores._quarter(labels, torch.arange(56))
    assert [int(chosen[labels == label].sum()) for label in range(3)] == [1, 2, 10]


def test_a_class_of_one_picture_and_its_copies_cannot_be_set_aside() -> None:
    labels, groups = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 3, 3, 3])
    with pytest.raises(BingoError, match="at least two different images in every class"):
        scores._quarter(labels, groups)
    groups = torch.tensor([0, 1, 2, 3, 3, 4])  # the smaller group where a quarter is less than either
    assert scores._quarter(labels, groups)[3:].tolist() == [False, False, True]


def test_test_images_that_were_distilled_on_are_counted(bingo: Bingo, tmp_path: Path) -> None:
    data, test = photos(tmp_path / "data", 6), photos(tmp_path / "test", 3, start=50)
    trained = photos(tmp_path / "trained", 4, start=300)
    for number in range(2):
        shutil.copy(test / "kind0" / f"05{number}.png", trained / f"renamed-{number}.png")
    run = a_run(tmp_path / "run", trained)
    ran = bingo("validate", "--run", run, "--data", data, "--test", test, "--json", tmp_path / "v.json")
    assert ran.status == 0, ran.err
    assert json.loads((tmp_path / "v.json").read_text())["protocol"]["test_images_trained_on"] == 2
    assert "2 of the test images were also distilled on" in ran.out
    shutil.rmtree(trained)  # it goes by contents
    assert scores.trained_on(run_dir.RunDir(run).bags, listing.list_images(test)) == 2
    checkpoint.save(run_dir.RunDir(run).bags, {"bags": torch.zeros(1, 1)}, root="of an earlier version", files=[])
    assert scores.trained_on(run_dir.RunDir(run).bags, listing.list_images(test)) is None


# ---------------------------------------------------------------- an image that goes missing


def test_an_image_that_can_no_longer_be_read_is_named_not_skipped(tmp_path: Path) -> None:
    data = photos(tmp_path / "data", 4)
    folder = listing.list_images(data)
    labels = torch.tensor(image_list.labels_of(folder)[1])
    seen = torch.zeros(12, 4)
    judged = side_by_side.Labelled(folder, None, labels, labels, 3, {"bank": seen}, torch.arange(12))
    (data / "kind1" / "002.png").write_bytes(b"broken")
    with pytest.raises(BingoError, match=r"kind1/002\.png could be read before and cannot be now"):
        side_by_side.judge(encoder("test_efficientnet"), judged, CPU)


def test_the_gate_names_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, test = photos(tmp_path / "data", 4), photos(tmp_path / "test", 2, start=50)
    run = by_model()["student"][1]
    monkeypatch.setattr(gate, "onnx_runner", lambda _: lambda batch: (run(batch), run(batch)))
    judged = gate._labelled(
        tmp_path / "float.onnx", encoder("test_efficientnet").preprocessing, gate.open_labelled(data, test)
    ).report
    (test / "kind2" / "050.png").write_bytes(b"broken")
    with pytest.raises(BingoError, match=r"kind2/050\.png changed while the command was running"):
        judged(tmp_path / "int8.onnx")


# ---------------------------------------------------------------- a bank that is too small


def test_a_small_bank_has_no_recall_and_says_so(bingo: Bingo, tmp_path: Path) -> None:
    data, test = photos(tmp_path / "data", 3), photos(tmp_path / "test", 2, start=50)
    run = a_run(tmp_path / "run", data)
    words = ("validate", "--run", run, "--data", data, "--test", test, "--json", tmp_path / "v.json")
    assert bingo(*words).status == 0
    found = json.loads((tmp_path / "v.json").read_text())
    assert all("neighbour_recall" not in row for row in found["rows"])
    assert found["protocol"]["neighbour_recall"] == "not measured: a bank of 9 is too small (at least 10)"
    assert found["protocol"]["recall"] == {"k": 0, "gallery": 9, "chance": 1.0}
    ran = bingo(*words, "--require", "neighbour_recall=0.5")
    assert ran.status == 3 and "neighbour_recall not measured (a bank of 9 is too small (at least 10))" in ran.err


@pytest.mark.slow
def test_what_is_required_of_recall_is_told_with_its_k_and_chance(bingo: Bingo, tmp_path: Path) -> None:
    data, test = photos(tmp_path / "data", 10), photos(tmp_path / "test", 2, start=50)
    run = a_run(tmp_path / "run", data)
    words = ("validate", "--run", run, "--data", data, "--test", test)
    ran = bingo(*words, "--require", "neighbour_recall=1")
    assert ran.status == 3 and "(at least 1; recall@3 (chance 0.100))" in ran.err
    assert "recall@3 (chance 0.100)" in ran.out and "recall@20" not in ran.out
    ran = bingo(*words, "--require", "neighbour_recall=0.01")
    assert ran.status == 3 and "neighbour_recall=0.01 asks for no more than what is found by chance, 0.100" in ran.err
    validation._refuse_under({"neighbour_recall": 0.2}, [{"name": "student", "neighbour_recall": 0.3}], 30)


def test_a_comparison_on_few_images_measures_no_recall(tmp_path: Path) -> None:
    bank, labels = unit(9, 8), torch.arange(9) % 3
    folder = listing.list_images(photos(tmp_path / "data", 3))
    judged = side_by_side.Labelled(folder, None, labels, labels, 3, {"bank": bank}, torch.arange(9))
    found, right = side_by_side.judge(encoder("test_efficientnet"), judged, CPU)
    assert "neighbour_recall" not in found and found["gallery"] == 7
    assert set(right) == {"knn", "linear"} and tables.titles(7) == {"knn": "kNN", "linear": "linear"}


# ---------------------------------------------------------------- the table of a comparison


def a_run_of(arm: str, seed: int, **changes: Any) -> dict[str, Any]:
    """What `compare` keeps of one arm with one seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: (torch.rand(40, generator=generator) < 0.6).to(torch.uint8) for name in ("knn", "linear")}
    shares = {name: float(values.double().mean()) for name, values in tensors.items()}
    facts = {
        "student_passes": 1,
        "average_passes": 0,
        "teacher_passes": 1,
        "train_seconds": 1.0,
        "memory_mb": 1.0,
        "bags": {},
        "purity": {},
        "near_copies": {"test_images_near_bank": 4, "test_share_near_bank": 0.1},
    }
    own = {
        "arm": arm,
        "seed": seed,
        "digest": f"{arm} {seed}",
        "student": "s",
        "epochs": 1,
        "gallery": 32,
        "linear_strengths": [10.0, 0.1],
        "tensors": tensors,
    }
    return own | facts | shares | {"neighbour_recall": 0.5 + seed / 10} | changes


def table_of(tmp_path: Path, seeds: list[int], **changes: Any) -> tuple[dict[str, Any], str]:
    runs = [a_run_of(arm, seed, **changes) for arm in ("one", "two") for seed in seeds]
    table = tables.summarise(runs, ["one", "two"], recipe(), None)
    table["protocol"] |= {"judged_images": 40, "judged_images_in_data": 3}
    table["references"] = []
    tables.write(table, tmp_path)
    return table, (tmp_path / "table.txt").read_text()


def test_one_seed_has_no_spread_and_the_table_says_so(tmp_path: Path) -> None:
    table, text = table_of(tmp_path, [4])
    assert [row["knn_spread"] for row in table["rows"]] == [None, None]
    assert "±" not in text and "one seed: the intervals are over test images alone" in text
    assert "one seed" in table["protocol"]["minus_first"]
    assert (tmp_path / "table.svg").read_text().count("<circle") == 6


def test_the_table_names_k_chance_the_ends_of_the_grid_and_what_is_in_training(tmp_path: Path) -> None:
    table, text = table_of(tmp_path, [0, 1, 2])
    assert "recall@3 (chance 0.094)" in text and "one seed" not in text
    assert "10% of the test images have a near-copy in the bank" in text
    assert "3 of the 40 images that students are judged on are also in --data" in text
    assert "6 of 12 fits took an L2 penalty at the end of the grid" in text
    assert table["protocol"]["recall"]["k"] == 3
    _, text = table_of(tmp_path, [0, 1, 2], gallery=7)
    assert "recall@" not in text and "neighbour recall is not measured: a gallery of 7 is too small" in text


def test_seconds_of_training_are_those_of_all_starts(tmp_path: Path) -> None:
    """Three starts: 12 s until a save, 7 s of which 4 s were kept, and 9 s; the second is short, so that its seconds
    alone do not tell it apart.
    """
    file = tmp_path / "metrics.jsonl"
    told = [(5, 1005), (12, 1012), (4, 2004), (5, 3005), (9, 3009)]
    file.write_text(
        "".join(json.dumps({"step": step, "seconds": s, "time": t}) + "\n" for step, (s, t) in enumerate(told))
    )
    assert metrics.seconds_of(file) == 12 + 4 + 9


def test_copies_stay_in_one_fold_of_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = photos(tmp_path / "data", 6)
    copied(data, *(f"kind{kind}/{number:03d}.png" for kind in range(3) for number in range(3)))
    folder = listing.list_images(data)
    labels = torch.tensor(image_list.labels_of(folder)[1])
    judged = side_by_side._labelled(folder, None, encoder("test_resnet", 32), CPU)
    assert torch.equal(judged.labels, labels)
    fitted: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recorded(rows: torch.Tensor, labels: torch.Tensor, classes: int, groups: torch.Tensor) -> probes.LinearHead:
        fitted.append((rows, groups))
        return probes.LinearHead(torch.zeros(classes, rows.shape[1]), torch.zeros(classes), 0.1)

    monkeypatch.setattr(probes, "fit_linear", recorded)
    side_by_side.judge(encoder("test_efficientnet"), judged, CPU)
    every = judged.groups.bincount()
    for _, groups in fitted:
        inside = groups.bincount(minlength=len(every))
        assert bool(((inside == 0) | (inside == every)).all())
