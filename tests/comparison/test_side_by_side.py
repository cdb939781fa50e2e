"""The comparison on tiny models: its table against its own runs, against brute force, and after every kind of
interruption.
"""

import csv
import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from compared import EACH, FIGURES, GALLERY, KINDS, METHODS, OFFICIAL, TRAINING, World, figures
from helpers import CPU, encoder, recipe

from bingo_compress.comparison import side_by_side, tables
from bingo_compress.data import listing
from bingo_compress.evaluation import intervals
from bingo_compress.features import extract
from bingo_compress.presenting.plots import dots
from bingo_compress.runtime import checkpoint
from bingo_compress.training import material
from bingo_compress.training.plan import schedule


@pytest.mark.slow
def test_a_row_a_method_with_mean_and_spread_of_its_own_runs(world: World) -> None:
    rows, runs = world.table["rows"], world.table["runs"]
    assert [row["name"] for row in rows] == METHODS.split(",")
    assert [(run["arm"], run["seed"]) for run in runs] == [(arm, seed) for arm in METHODS.split(",") for seed in (0, 1)]
    for row in rows:
        assert row["seeds"] == [0, 1]
        for figure in FIGURES:
            values = [run[figure] for run in runs if run["arm"] == row["name"]]
            assert row[figure] == pytest.approx(sum(values) / 2)
            assert row[f"{figure}_spread"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    for figure in FIGURES:
        assert len({run[figure] for run in runs}) > 1 and all(0 <= run[figure] <= 1 for run in runs)


@pytest.mark.slow
def test_differences_from_the_first_row_are_paired_over_images(world: World) -> None:
    right = {}
    for run in world.table["runs"]:
        file = world.out / "runs" / f"{side_by_side._file_name(run['arm'])}-seed{run['seed']}.figures.safetensors"
        right[run["arm"], run["seed"]] = tensors = checkpoint.load(file)[0]
        for figure in ("knn", "linear"):
            assert len(tensors[figure]) == KINDS * EACH
            assert float(tensors[figure].double().mean()) == pytest.approx(run[figure])
    first = world.table["rows"][0]
    for row in world.table["rows"]:
        for figure in ("knn", "linear"):
            low, high = row[f"{figure}_minus_first_interval"]
            assert row[f"{figure}_minus_first"] == pytest.approx(row[figure] - first[figure])
            assert low <= row[f"{figure}_minus_first"] <= high
            mine, theirs = (
                torch.stack([right[arm, seed][figure].double() for seed in (0, 1)])
                for arm in (row["name"], first["name"])
            )
            assert (low, high) == intervals.seeds_interval(mine - theirs)


@pytest.mark.slow
def test_student_passes_are_equal_to_within_a_batch(world: World) -> None:
    passes = {row["name"]: row["student_passes"] for row in world.table["rows"]}
    a_step = 8  # anchors; two epochs of 33 images are nine steps, the last one filled up
    assert passes["bingo"] == passes["moco"] == 9 * a_step * 2
    assert passes[OFFICIAL] == 6 * a_step * 3  # 4/3 epochs, 44 anchors
    for row in world.table["rows"]:
        assert row["teacher_passes"] == (0 if row["name"] == "moco" else KINDS * EACH * 3)  # plain and two stored views
        assert row["average_passes"] == (144 if row["name"] == "moco" else 0)


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 100])
def test_epochs_of_every_method_follow_from_equal_student_passes(epochs: int) -> None:
    arms = side_by_side.make_arms(
        "bingo,seed,disco,compress,simreg,coss,moco,self,bingo:variant=official,bingo:epochs=5", recipe(epochs=epochs)
    )
    assert [arm.recipe.epochs for arm in arms[:8]] == [epochs] * 8
    assert arms[8].recipe.epochs == pytest.approx(epochs * 2 / 3)
    assert arms[9].recipe.epochs == 5
    assert [arm.recipe.method for arm in arms[:8]] == [
        "bingo",
        "seed",
        "disco",
        "compress",
        "simreg",
        "coss",
        "moco",
        "self",
    ]


@pytest.mark.parametrize("count", [255, 33, 1000])
def test_arms_of_other_batch_sizes_and_views_have_equal_student_passes(count: int) -> None:
    names = (
        "bingo,bingo:batch_size=7,seed:batch_size=128,moco:batch_size=254,"
        "bingo:variant=official,bingo:variant=official:batch_size=100"
    )
    for epochs in (1, 10, 100):
        for arm in side_by_side.make_arms(names, recipe(epochs=epochs)):
            planned = schedule(arm.recipe, count)
            surplus = planned.steps * planned.batch_size * planned.student_views - epochs * count * 2
            # A third of an image may be lost.
            assert -1 <= surplus < planned.batch_size * planned.student_views, arm.name


@pytest.mark.slow
def test_a_variant_is_its_settings_and_another_run_than_the_method(world: World) -> None:
    plain, variant = side_by_side.make_arms("bingo, bingo:bag_size=1:bags=labels:lr=1e-3", world.base)
    assert variant.recipe == plain.recipe.model_copy(update={"bag_size": 1, "bags": "labels", "lr": 0.001})
    rows = {row["name"]: row for row in world.table["rows"]}
    assert rows["bingo"]["bags"]["size_mean"] == 3 and rows[OFFICIAL]["bags"]["size_mean"] == 1
    assert rows["moco"]["bags"] == {}
    assert figures(world.table, "bingo") != figures(world.table, OFFICIAL)


@pytest.mark.slow
def test_the_purity_of_bags_equals_brute_force(world: World) -> None:
    folder = listing.list_images(world.data)
    teacher = encoder("test_resnet", 32, seed=9)
    features, good = extract.plain(
        {"teacher": extract.as_embed(teacher, CPU)}, folder, range(len(folder.files)), "test"
    )
    _, training = material.split(torch.arange(len(good)), world.base)
    assert len(training) == TRAINING
    rows = torch.nn.functional.normalize(features["teacher"], dim=1).half().double().numpy()[training.numpy()]
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    kinds = [Path(folder.files[index]).parts[0] for index in training.tolist()]
    similar = rows @ rows.T
    np.fill_diagonal(similar, -1)
    for arm, bag_size in (("bingo", 3), (OFFICIAL, 1)):
        same = [kinds[i] == kinds[j] for i in range(TRAINING) for j in np.argsort(-similar[i])[:bag_size]]
        found = next(row for row in world.table["rows"] if row["name"] == arm)["bags"]
        assert found["bag_purity"] == pytest.approx(sum(same) / len(same)) and 0 < found["bag_purity"] < 1
        assert found["similarity"] == pytest.approx(np.sort(similar, axis=1)[:, -bag_size:].mean(), abs=1e-4)


@pytest.mark.slow
def test_the_rank_correlation_is_spearmans_over_all_runs(world: World) -> None:
    def ranks(values: list[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
            for value in values
        ]

    found = world.table["rank_correlation_of_recall"]
    recall = ranks([run["neighbour_recall"] for run in world.table["runs"]])
    assert found["runs"] == 6
    for figure in ("knn", "linear"):
        assert found[figure] == pytest.approx(
            statistics.correlation(recall, ranks([run[figure] for run in world.table["runs"]]))
        )


@pytest.mark.slow
def test_the_teacher_is_embedded_once_for_all_methods_and_seeds(world: World) -> None:
    assert world.passes == {"_plain_shard": 1, "_view_shard": 2}
    assert {path.name for path in (world.out / "work").glob("teacher-*/*.f16")} == {
        "features.f16",
        "embeddings.f16",
        "views.f16",
    }


@pytest.mark.slow
def test_the_files_hold_the_table(world: World) -> None:
    rows = world.table["rows"]
    assert json.loads((world.out / "table.json").read_text()) == json.loads(json.dumps(world.table))
    with (world.out / "table.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["name"] for row in read] == [row["name"] for row in rows]
    for back, row in zip(read, rows, strict=True):
        assert {key: float(back[key]) for key, value in row.items() if isinstance(value, (int, float))} == {
            key: value for key, value in row.items() if isinstance(value, (int, float))
        }
        assert (
            json.loads(back["seeds"]) == [0, 1]
            and json.loads(back["knn_minus_first_interval"]) == row["knn_minus_first_interval"]
        )
    text = (world.out / "table.txt").read_text()
    for row in rows:
        for figure in FIGURES:
            assert f"{row[figure]:.3f} ± {row[f'{figure}_spread']:.3f}" in text
        assert row["name"] in text and f"{row['student_passes']:,}" in text


@pytest.mark.slow
def test_the_picture_is_well_formed_with_a_dot_a_row_and_figure_in_order_of_the_means(world: World) -> None:
    rows = [{**row, "name": f'{row["name"]} <&"'} for row in world.table["rows"]]
    for text, shown in (
        ((world.out / "table.svg").read_text(), world.table["rows"]),
        (dots(rows, FIGURES, tables.titles(GALLERY)), rows),
    ):
        root = ElementTree.fromstring(text)
        space = "{http://www.w3.org/2000/svg}"
        circles = root.findall(f"{space}circle")
        assert len(circles) == len(shown) * len(FIGURES)
        words = [element.text for element in root.findall(f"{space}text")]
        assert {row["name"] for row in shown} <= set(words) and set(tables.titles(GALLERY).values()) <= set(words)
        for panel, figure in enumerate(FIGURES):
            places = [float(circle.attrib["cx"]) for circle in circles[panel * len(shown) : (panel + 1) * len(shown)]]
            order = np.argsort([row[figure] for row in shown], kind="stable").tolist()
            assert [places[index] for index in order] == sorted(places)
            assert all(0 <= place <= float(root.attrib["width"]) for place in places)
