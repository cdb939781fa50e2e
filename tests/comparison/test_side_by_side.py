"""The comparison on tiny models: its table against its own runs, against brute force, and after every kind of
interruption.
"""

import csv
import json
import math
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import CPU, command, encoder, flags, photos, recipe

from bingo_compress import pipeline
from bingo_compress.comparison import side_by_side, tables
from bingo_compress.data import image_folder
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import intervals, probes
from bingo_compress.features import extract, teacher_pass
from bingo_compress.models.trained import Models
from bingo_compress.recipe import Recipe
from bingo_compress.report.plots import dots
from bingo_compress.runtime import checkpoint
from bingo_compress.training import loop, material
from bingo_compress.training.plan import Plan, schedule

METHODS = "bingo,moco,bingo:variant=official:bag_size=1"
OFFICIAL = "bingo:variant=official:bag_size=1"
FIGURES, GALLERY = ("knn", "linear", "neighbour_recall"), 28
KINDS, EACH, TRAINING = 4, 9, 33  # kinds 0 and 3 look alike, so that nobody is always right


@dataclass
class World:
    """A folder of photos, a teacher's weights, and one uninterrupted comparison with what it did."""

    data: Path
    base: Recipe
    out: Path
    table: dict[str, Any]
    passes: dict[str, int]

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.out, to))

    def words(self, out: Path, **changes: str) -> list[str]:
        """The same comparison on the command line."""
        given = {
            "data": str(self.data),
            "labels": str(self.data),
            "methods": METHODS,
            "seeds": "0,1",
            "out": str(out),
            **changes,
        }
        own = flags(teacher_weights=self.base.teacher_weights)
        return ["compare", *own, *(word for key, value in given.items() for word in (f"--{key}", value))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("compare")
    weights = root / "teacher.safetensors"
    tensors = encoder("test_resnet", 32, seed=9).backbone.state_dict()
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, weights)
    data = photos(root / "photos", EACH, KINDS)
    base = recipe(data=str(data), teacher_weights=str(weights))
    passes = {"_plain_shard": 0, "_view_shard": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "L2_STRENGTHS", (0.1, 1.0))  # fewer fits: quicker
        for name in passes:

            def counted(real: Any, name: str, *given: Any) -> Any:
                passes[name] += 1
                return real(*given)

            patch.setattr(teacher_pass, name, partial(counted, getattr(teacher_pass, name), name))
        table = side_by_side.compare(base, data, None, METHODS, [0, 1], root / "out")
        yield World(data, base, root / "out", table, dict(passes))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "train", lambda *_: pytest.fail("something was trained"))


def figures(table: dict[str, Any], arm: str) -> list[tuple[Any, ...]]:
    """The figures of an arm's runs: all that training and judging gave, but no times and memory."""
    return [(run["seed"], *(run[figure] for figure in FIGURES)) for run in table["runs"] if run["arm"] == arm]


# ---------------------------------------------------------------- the table


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


def test_a_variant_is_its_settings_and_another_run_than_the_method(world: World) -> None:
    plain, variant = side_by_side.make_arms("bingo, bingo:bag_size=1:bags=labels:lr=1e-3", world.base)
    assert variant.recipe == plain.recipe.model_copy(update={"bag_size": 1, "bags": "labels", "lr": 0.001})
    rows = {row["name"]: row for row in world.table["rows"]}
    assert rows["bingo"]["bags"]["size_mean"] == 3 and rows[OFFICIAL]["bags"]["size_mean"] == 1
    assert rows["moco"]["bags"] == {}
    assert figures(world.table, "bingo") != figures(world.table, OFFICIAL)


def test_the_purity_of_bags_equals_brute_force(world: World) -> None:
    folder = image_folder.list_folder(world.data)
    teacher = encoder("test_resnet", 32, seed=9)
    features, good = extract.plain(
        {"teacher": extract.as_embed(teacher, CPU)}, folder, range(len(folder.files)), "test"
    )
    _, training = material.split(len(good), world.base)
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


def test_the_teacher_is_embedded_once_for_all_methods_and_seeds(world: World) -> None:
    assert world.passes == {"_plain_shard": 1, "_view_shard": 2}
    assert {path.name for path in (world.out / "work").glob("teacher-*/*.f16")} == {
        "features.f16",
        "embeddings.f16",
        "views.f16",
    }


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


# ---------------------------------------------------------------- again, and going on


@pytest.mark.usefixtures("no_training")
def test_the_same_command_again_trains_nothing_and_gives_the_same_table(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = world.copy(tmp_path / "out")
    before = {name: (out / name).read_bytes() for name in ("table.json", "table.csv", "table.txt", "table.svg")}
    for name in before:
        (out / name).unlink()
    ran = command(monkeypatch, capsys, *world.words(out))
    assert ran.status == 0, ran.err
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_interrupted_in_training_and_started_again_gives_the_uninterrupted_figures(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, calls = side_by_side.train, list[int]()

    def interrupted(plan: Plan, *given: Any, **named: Any) -> None:
        calls.append(plan.recipe.seed)
        if len(calls) == 2:
            with monkeypatch.context() as patch:
                patch.setattr(pipeline, "distill", partial(loop.distill, stop_after=5))
                real(plan, *given, **named)
            raise KeyboardInterrupt
        real(plan, *given, **named)

    monkeypatch.setattr(side_by_side, "train", interrupted)
    out, arguments = tmp_path / "out", (world.base, world.data, None, "bingo", [0, 1], tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        side_by_side.compare(*arguments)
    assert checkpoint.load(out / "work" / "checkpoint.safetensors")[1]["step"] == 5
    assert [file.name for file in (out / "runs").iterdir() if "student" in file.name] == [
        "bingo-seed0.student.safetensors"
    ]
    assert not (out / "table.json").exists()
    table = side_by_side.compare(*arguments)
    assert calls == [0, 1, 1]
    assert figures(table, "bingo") == figures(world.table, "bingo")
    for name in [name for name in table["rows"][0] if name not in ("train_seconds", "memory_mb")]:
        assert table["rows"][0][name] == world.table["rows"][0][name], name


@pytest.mark.slow
def test_what_another_method_left_unfinished_is_not_gone_on_with(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = world.copy(tmp_path / "out")
    for file in (out / "runs").glob("bingo-*"):
        file.unlink()
    with monkeypatch.context() as patch:

        def stopped(*given: Any, **named: Any) -> None:
            pipeline.train(*given, **named)
            raise KeyboardInterrupt

        patch.setattr(pipeline, "distill", partial(loop.distill, stop_after=3))
        patch.setattr(side_by_side, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            side_by_side.compare(world.base, world.data, None, "seed", [0], out)
    assert (out / "work" / "checkpoint.safetensors").exists()
    table = side_by_side.compare(world.base, world.data, None, "bingo", [0], out)
    assert figures(table, "bingo") == figures(world.table, "bingo")[:1]


@pytest.mark.slow
@pytest.mark.usefixtures("no_training")
def test_another_test_set_judges_again_without_training(world: World, tmp_path: Path) -> None:
    out, test = world.copy(tmp_path / "out"), photos(tmp_path / "test", 5, KINDS, start=50)
    table = side_by_side.compare(world.base, world.data, test, "moco", [1], out)
    assert figures(table, "moco") != figures(world.table, "moco")[1:]
    # One run by hand: DINO's vote of the 20 nearest bank images.
    student = encoder("test_efficientnet")
    student.backbone.load_state_dict(checkpoint.load(out / "runs" / "moco-seed1.student.safetensors")[0])
    rows, kinds = {}, {}
    for role, root in (("bank", world.data), ("test", test)):
        folder = image_folder.list_folder(root)
        found, _ = extract.plain({"": extract.as_embed(student.eval(), CPU)}, folder, range(len(folder.files)), role)
        rows[role] = torch.nn.functional.normalize(found[""].double(), dim=1).numpy()
        kinds[role] = np.array([int(name[4]) for name in folder.files])
    right = 0
    for row, kind in zip(rows["test"], kinds["test"], strict=True):
        cosines = rows["bank"] @ row
        nearest = np.argsort(-cosines)[:20]
        votes = [sum(math.exp(cosines[j] / 0.07) for j in nearest if kinds["bank"][j] == k) for k in range(KINDS)]
        right += int(np.argmax(votes)) == kind
    assert table["runs"][0]["knn"] == pytest.approx(right / (5 * KINDS)) and 0 < right < 5 * KINDS
    back = side_by_side.compare(world.base, world.data, None, "moco", [1], out)
    assert figures(back, "moco") == figures(world.table, "moco")[1:]


@pytest.mark.usefixtures("no_training")
def test_purity_is_that_of_the_labels_of_the_day(world: World, tmp_path: Path) -> None:
    """Half of the kinds under one name: the bags are the same, their purity is not."""
    for kind in range(KINDS):
        (tmp_path / "labels" / f"half{kind in (1, 2)}").mkdir(parents=True, exist_ok=True)
        for file in (world.data / f"kind{kind}").iterdir():
            (tmp_path / "labels" / f"half{kind in (1, 2)}" / f"{kind}-{file.name}").symlink_to(file)
    table = side_by_side.compare(world.base, tmp_path / "labels", None, "bingo", [0], world.copy(tmp_path / "out"))
    tensors, facts = checkpoint.load(world.out / "runs" / "bingo-seed0.bags.safetensors")
    folder = image_folder.list_folder(world.data)
    half = {digest: name[4] in "12" for digest, name in zip(folder.digests, folder.files, strict=True)}
    halves = [half[digest] for digest in facts["digests"]]  # type: ignore[attr-defined]
    same = [halves[mate] == halves[anchor] for anchor, bag in enumerate(tensors["bags"].tolist()) for mate in bag]
    assert table["rows"][0]["bags"]["bag_purity"] == pytest.approx(sum(same) / len(same))
    assert table["rows"][0]["bags"]["bag_purity"] > world.table["rows"][0]["bags"]["bag_purity"]


def test_other_settings_and_overwrite_train_anew(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained: list[float] = []

    def noted(models: Models, *_: Any, **__: Any) -> None:
        trained.append(models.recipe.temperature)
        raise KeyboardInterrupt

    monkeypatch.setattr(side_by_side, "train", noted)
    out = world.copy(tmp_path / "out")
    for base, overwrite in ((world.base.model_copy(update={"temperature": 0.1}), False), (world.base, True)):
        with pytest.raises(KeyboardInterrupt):
            side_by_side.compare(base, world.data, None, "bingo", [0], out, overwrite=overwrite)
    assert trained == [0.1, 0.2]
    assert not list((out / "runs").iterdir())


# ---------------------------------------------------------------- refusals


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "bingo,byol"}, "byol"),
        ({"methods": "bingo:bagsize=1"}, "the nearest is 'bag_size'"),
        ({"methods": "bingo:bag_size"}, "expected KEY=VALUE, found 'bag_size'"),
        ({"methods": "bingo:bag_size=many"}, "found 'many'"),
        ({"methods": "bingo:bag_size=99"}, "expected more images than a bag holds (99), found 36"),
        ({"methods": "bingo,moco, bingo"}, "expected different names, found one twice"),
        ({"methods": " , "}, "expected names such as bingo,seed"),
        ({"seeds": "0,x"}, "--seeds: expected numbers with commas between, for example 0,1,2; found '0,x'"),
        ({"seeds": ""}, "--seeds: expected numbers"),
        ({"seeds": "-1"}, "--seeds: expected numbers"),
        ({"labels": "/nowhere"}, "--labels: expected a folder of images, found nothing at /nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    changes: dict[str, str],
    message: str,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    ran = command(monkeypatch, capsys, *world.words(tmp_path / "out", **changes))
    assert ran.status == 2
    assert message in ran.err and len(ran.err.strip().splitlines()) == 1 and "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_training")
def test_a_test_set_with_other_classes_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    test = photos(tmp_path / "test", 2, KINDS + 1)
    ran = command(monkeypatch, capsys, *world.words(world.copy(tmp_path / "out"), test=str(test)))
    assert ran.status == 2 and len(ran.err.strip().splitlines()) == 1
    assert "--test: expected the classes of --labels (kind0, kind1, kind2, kind3), found others: kind4" in ran.err


def test_a_folder_that_holds_something_else_is_left_alone(world: World, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BingoError, match="holds something else than a comparison"):
        side_by_side.compare(world.base, world.data, None, "bingo", [0], tmp_path)
    with pytest.raises(BingoError, match="expected a folder, found the file"):
        side_by_side.compare(world.base, world.data, None, "bingo", [0], tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
