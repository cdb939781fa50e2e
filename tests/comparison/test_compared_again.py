"""A comparison started again: after every kind of interruption, with other settings, and what is refused."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compared import KINDS, Ground, World, figures
from helpers import CPU, command, encoder, photos, recipe
from PIL import Image

from bingo_compress.comparison import side_by_side
from bingo_compress.data import listing
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import held_out
from bingo_compress.features import bagging, extract
from bingo_compress.models.trained import Models
from bingo_compress.runtime import checkpoint
from bingo_compress.training import loop
from bingo_compress.training.plan import Plan


@pytest.mark.slow
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
                patch.setattr(held_out, "distill", partial(loop.distill, stop_after=5))
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
            held_out.train(*given, **named)
            raise KeyboardInterrupt

        patch.setattr(held_out, "distill", partial(loop.distill, stop_after=3))
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
        folder = listing.list_images(root)
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


@pytest.mark.slow
@pytest.mark.usefixtures("no_training")
def test_mended_labels_of_a_table_judge_again(world: World, tmp_path: Path) -> None:
    """The images are the same to the byte; only the words beside them change."""
    files, table = sorted(world.data.rglob("*.png")), tmp_path / "labels.csv"

    def compared(out: Path, kinds: list[str]) -> dict[str, Any]:
        lines = [f"{file},{kind}" for file, kind in zip(files, kinds, strict=True)]
        table.write_text("\n".join(["image,label", *lines]))
        return side_by_side.compare(world.base, table, None, "moco", [1], world.copy(out) if not out.exists() else out)

    right = [file.parent.name for file in files]
    wrong = [f"half{place % 2}" for place in range(len(files))]
    before, after = (compared(tmp_path / "out", kinds) for kinds in (wrong, right))
    assert figures(after, "moco") == figures(world.table, "moco")[1:] != figures(before, "moco")
    assert [row["linear"] for row in after["references"]] == [row["linear"] for row in world.table["references"]]


def test_bags_of_labels_are_made_of_them(ground: Ground, tmp_path: Path) -> None:
    table, made = tmp_path / "photos.csv", []
    for kinds in ("ab", "ba"):
        lines = [f"{file},{kind}" for file, kind in zip(sorted(ground.data.rglob("*.png")), kinds, strict=False)]
        table.write_text("\n".join(["image,label", *lines]))
        folder = listing.list_images(table)
        made.append([side_by_side._made_of(recipe(bags=bags), folder, CPU).key for bags in ("labels", "knn")])
    assert made[0][0] != made[1][0] and made[0][1] == made[1][1]


@pytest.mark.slow
def test_test_images_with_a_near_copy_in_the_bank_are_told_in_every_table(world: World, tmp_path: Path) -> None:
    """The bank is its own test set but for the names."""
    test = photos(tmp_path / "test", 2, KINDS)
    for file in test.rglob("*.png"):
        brighter = np.array(Image.open(world.data / file.relative_to(test))).clip(0, 250) + 4
        Image.fromarray(brighter.astype(np.uint8)).save(file)
    out = world.copy(tmp_path / "out")
    for _ in range(2):  # the second time nothing is judged
        table = side_by_side.compare(world.base, world.data, test, "moco", [1], out)
        assert table["protocol"]["near_copies"] == {"test_images_near_bank": 8, "test_share_near_bank": 1.0}
        assert "100% of the test images have a near-copy in the bank" in (out / "table.txt").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("no_training")
def test_purity_is_that_of_the_labels_of_the_day(world: World, tmp_path: Path) -> None:
    """Half of the kinds under one name: the bags are the same, their purity is not."""
    for kind in range(KINDS):
        (tmp_path / "labels" / f"half{kind in (1, 2)}").mkdir(parents=True, exist_ok=True)
        for file in (world.data / f"kind{kind}").iterdir():
            (tmp_path / "labels" / f"half{kind in (1, 2)}" / f"{kind}-{file.name}").symlink_to(file)
    table = side_by_side.compare(world.base, tmp_path / "labels", None, "bingo", [0], world.copy(tmp_path / "out"))
    bags, names, _ = bagging.load(world.out / "runs" / "bingo-seed0.bags.safetensors")
    folder = listing.list_images(world.data)
    assert set(names) <= set(folder.files)
    halves = [name[4] in "12" for name in names]
    same = [halves[mate] == halves[anchor] for anchor, bag in enumerate(bags.tolist()) for mate in bag]
    assert table["rows"][0]["bags"]["bag_purity"] == pytest.approx(sum(same) / len(same))
    assert table["rows"][0]["bags"]["bag_purity"] > world.table["rows"][0]["bags"]["bag_purity"]


@pytest.mark.slow
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
        (
            {"set": "seed=7"},
            "compare: expected no seed for all arms, found seed=7; give all arms their seeds by --seeds",
        ),
        ({"set": "method=coss"}, "compare: expected no method for all arms, found method=coss"),
        ({"labels": "/nowhere"}, "--labels: expected a folder of images, found nothing at /nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    changes: dict[str, str],
    message: str,
    ground: Ground,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    ran = command(monkeypatch, capsys, *ground.words(tmp_path / "out", **changes))
    assert ran.status == 2
    assert message in ran.err and len(ran.err.strip().splitlines()) == 1 and "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_training")
def test_a_test_set_with_other_classes_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    test = photos(tmp_path / "test", 2, KINDS + 1)
    ran = command(monkeypatch, capsys, *world.words(world.copy(tmp_path / "out"), test=str(test)))
    assert ran.status == 2 and len(ran.err.strip().splitlines()) == 1
    assert "--test: expected the classes of --labels (kind0, kind1, kind2, kind3), found others: kind4" in ran.err


def test_a_folder_that_holds_something_else_is_left_alone(ground: Ground, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BingoError, match="holds something else than a comparison"):
        side_by_side.compare(ground.base, ground.data, None, "bingo", [0], tmp_path)
    with pytest.raises(BingoError, match="expected a folder, found the file"):
        side_by_side.compare(ground.base, ground.data, None, "bingo", [0], tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
