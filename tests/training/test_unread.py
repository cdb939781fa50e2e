"""A setting that a run does not read is refused where it was asked for, and two runs that are one are told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, Ran, command, encoder, filled_store, flags, kind_targets, photos, planned, recipe

from bingo_compress import api
from bingo_compress.comparison import tables
from bingo_compress.comparison.arms import SHARED, make_arms, resolve_arms
from bingo_compress.errors import BingoError
from bingo_compress.features.bagging import knn
from bingo_compress.features.targets import StoredTargets, TargetSpace
from bingo_compress.options import Distill
from bingo_compress.recipe import KEYS, RESUME_MAY_CHANGE, Recipe
from bingo_compress.training import loop, plan
from bingo_compress.training.loader import Lessons
from bingo_compress.training.losses import LOSSES
from bingo_compress.training.plan import settle
from bingo_compress.unread import refuse_unread, unread

# (the run, a setting that it does not read, a word of what does)
NOT_READ: list[tuple[dict[str, Any], str, Any, str]] = [
    ({"variant": "paper"}, "inter_weight", 0.3, "bingo with variant=soft"),
    ({"variant": "paper"}, "teacher_temperature", 0.3, "seed"),
    ({"variant": "official"}, "inter_weight", 0.3, "variant=soft"),
    ({}, "switch_epoch", 3, "bingo with variant=official"),
    ({}, "average", 0.9, "disco, moco, self"),
    ({}, "rebag_epochs", 2, "method=self"),
    ({}, "clusters", 7, "bags=kmeans"),
    ({"bags": "none"}, "bag_size", 2, "bags"),
    ({"target": "raw"}, "target_dim", 8, "target=pca"),
    ({"target": "centred"}, "target_dim", 8, "target=pca"),
    ({"method": "seed"}, "variant", "paper", "bingo"),
    ({"method": "seed"}, "bags", "none", "bingo, coss, self"),
    ({"method": "seed"}, "bag_size", 2, "bingo, coss, self"),
    ({"method": "seed"}, "inter_weight", 0.3, "variant=soft"),
    ({"method": "disco"}, "teacher_temperature", 0.3, "seed"),
    ({"method": "simreg"}, "temperature", 0.3, "compress"),
    ({"method": "simreg"}, "queue_size", 8, "moco"),
    ({"method": "simreg"}, "target_dim", 8, "target=pca"),
    ({"method": "coss"}, "temperature", 0.3, "compress"),
    ({"method": "coss"}, "mask_mates", False, "moco"),
    ({"method": "moco"}, "views", "2", "bingo"),
    ({"method": "moco"}, "stored_views", "mean", "bingo"),
    ({"method": "moco"}, "target", "raw", "bingo"),
    ({"method": "self"}, "bags", "kmeans", "self: only knn or none"),
    ({"method": "self", "bags": "none"}, "rebag_epochs", 2, "method=self with bags"),
    ({"views": "online"}, "stored_views", "drawn", "stored views"),
    ({"views": "online"}, "stored_as", "int8", "stored views"),
    ({"method": "self"}, "stored_as", "int8", "stored views"),
]
READ: list[dict[str, Any]] = [
    {
        "inter_weight": 0.3,
        "teacher_temperature": 0.2,
        "bag_size": 2,
        "search": "exact",
        "target_dim": 8,
        "stored_views": "drawn",
    },
    {"variant": "official", "switch_epoch": 2, "bags": "kmeans", "clusters": 4, "bag_size": 2, "mask_mates": False},
    {
        "method": "seed",
        "teacher_temperature": 0.2,
        "temperature": 0.3,
        "queue_size": 8,
        "views": "1",
        "target": "whitened",
    },
    {"method": "self", "rebag_epochs": 2, "average": 0.9, "bag_size": 2, "target_dim": 8, "temperature": 0.3},
    {"method": "moco", "average": 0.9, "target_dim": 8, "queue_size": 8},
    {"method": "coss", "bags": "adaptive", "bag_size": 2, "stored_views": "mean", "stored_as": "int8"},
    {"method": "simreg", "target": "pca", "target_dim": 8, "stored_views": "mean"},
]


@pytest.fixture
def bingo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)
    return lambda *words: command(monkeypatch, capsys, *words)


@pytest.mark.parametrize(("run", "key", "value", "reader"), NOT_READ)
def test_a_setting_that_a_run_does_not_read_is_named_with_what_reads_it(
    run: dict[str, Any], key: str, value: Any, reader: str
) -> None:
    chosen = recipe(**{**run, key: value})
    assert key in unread(chosen)
    with pytest.raises(BingoError, match=f"here: .*found {key}={value}, read only by .*{reader}") as caught:
        refuse_unread([chosen], {"epochs": 2, key: value}, "here")
    assert "\n" not in str(caught.value)
    refuse_unread([chosen], {key: Recipe.model_fields[key].default}, "here")
    refuse_unread(
        [chosen, recipe(**next(each for each in READ if key in each or key in ("clusters", "variant")))], {}, "here"
    )


@pytest.mark.parametrize("settings", READ)
def test_a_setting_that_a_run_reads_is_not_refused(settings: dict[str, Any]) -> None:
    refuse_unread([recipe(**settings)], settings, "here")


@pytest.mark.parametrize("method", sorted(LOSSES))
def test_only_settings_of_the_recipe_are_named(method: str) -> None:
    assert set(unread(recipe(method=method))) < set(KEYS) - {"method", "teacher", "student", "epochs", "lr", "seed"}


def trained(folder: Path, chosen: Recipe) -> dict[str, torch.Tensor]:
    """Weights after a short run of the loop; bags as the recipe has them."""
    folder.mkdir()
    count = 16
    targets = kind_targets(count, 3, 16)
    loss = plan.loss_of(chosen)
    source = StoredTargets(
        targets, TargetSpace(None, None), CPU, lengths=loss.lengths, mean=chosen.stored_views == "mean"
    )
    bags = knn(targets[:, 0], chosen.bag_size)[0] if chosen.bags != "none" else torch.empty(count, 0, dtype=torch.int64)
    student = encoder("test_resnet", 32, seed=5)
    files = folder / "metrics.jsonl", folder / "checkpoint.safetensors"
    lessons = Lessons(filled_store(count), torch.arange(count), bags, source if loss.teacher else None)
    loop.distill(planned(chosen, count), student, lessons, *files)
    return student.backbone.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(LOSSES))
def test_what_is_said_to_be_unread_changes_nothing_and_the_rest_does(method: str, tmp_path: Path) -> None:
    """The table against the loop itself: every setting in it that a run of the loop could read, changed alone; those
    that it does not read, all at once.
    """
    other = {
        "bags": "none",
        "bag_size": 2,
        "rebag_epochs": 1,
        "average": 0.5,
        "queue_size": 8,
        "mask_mates": False,
        "stored_views": "mean",
        "temperature": 0.5,
        "teacher_temperature": 0.5,
        "variant": "paper",
        "switch_epoch": 0,
        "inter_weight": 0.1,
    }
    # Enough to make other neighbours.
    base = {
        "method": method,
        "epochs": 4,
        "rebag_epochs": 4,
        "stored_views": "drawn",
        "lr": 0.1,
    }
    plain = trained(tmp_path / "plain", settle(recipe(**base)))
    idle = unread(recipe(**base))
    unread_ones = {key: value for key, value in other.items() if key in idle}
    changes = {"unread": unread_ones, **{key: {key: value} for key, value in other.items() if key not in idle}}
    for what, changed in changes.items():
        found = trained(tmp_path / what, settle(recipe(**base | changed)))
        assert all(torch.equal(plain[name], found[name]) for name in plain) == (what == "unread"), what


# ---------------------------------------------------------------- the command line


@pytest.mark.slow
def test_distill_refuses_what_was_named_and_not_what_a_file_holds(bingo: Any, tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 4)
    words = ("distill", *flags(data=data, method="seed"), "--out", "run")
    for given, said in (
        (("--bag-size", "2"), "bag_size=2, read only by bingo, coss, self"),
        (("--set", "inter_weight=0.3"), "inter_weight=0.3, read only by bingo with variant=soft"),
    ):
        for more in ((), ("--dry-run",)):
            ran = bingo(*words, *given, *more)
            assert ran.status == 2 and len(ran.err.splitlines()) == 1 and said in ran.err
    assert not (tmp_path / "run").exists()
    (tmp_path / "all.yaml").write_text("inter_weight: 0.3\nbag_size: 2\n")
    ran = bingo(*words, "--recipe", "all.yaml", "--dry-run")
    assert ran.status == 0, ran.err
    assert "method: seed, temperature 0.2, targets" in ran.out  # and not a word of bags


@pytest.mark.slow
def test_a_method_without_bags_takes_fewer_images_than_a_bag_holds(bingo: Any, tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 1)
    assert bingo("distill", *flags(data=data, method="seed", hold_out=0), "--out", "run", "--dry-run").status == 0
    ran = bingo("distill", *flags(data=data, hold_out=0), "--out", "run", "--dry-run")
    assert ran.status == 2 and "a bag holds (3), found 3" in ran.err


def test_the_named_settings_are_those_of_the_words() -> None:
    words = Distill(settings=["lr=1", " seed=2"], epochs=0, bags=None)
    assert api._named(words) == {"lr": 1, "seed": 2, "epochs": 0}


# ---------------------------------------------------------------- arms


@pytest.mark.parametrize("key", [*SHARED])
def test_an_arm_cannot_have_what_is_one_for_all(key: str) -> None:
    with pytest.raises(BingoError, match=f"--methods bingo:{key}=.*found {key}; "):
        make_arms(f"moco,bingo:{key}=1", recipe())


def test_what_an_interrupted_run_may_change_is_no_arms_business() -> None:
    assert set(SHARED) | {"compile"} >= RESUME_MAY_CHANGE


def test_a_setting_that_an_arm_names_twice_is_refused() -> None:
    with pytest.raises(BingoError, match="found bag_size more often"):
        make_arms("bingo:bag_size=1:bag_size=2", recipe())


def test_an_arms_setting_must_be_read_by_that_arm() -> None:
    with pytest.raises(
        BingoError, match=r"--methods bingo:variant=paper:inter_weight=0.3: .*read only by bingo with variant=soft"
    ):
        make_arms("bingo,bingo:variant=paper:inter_weight=0.3", recipe())
    assert [arm.recipe.inter_weight for arm in make_arms("bingo:inter_weight=0.3,seed", recipe())] == [0.3, 0.5]


def test_a_setting_for_all_arms_must_be_read_by_one(bingo: Any, tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 4)
    words = ("compare", *flags(data=data, method="seed")[:-2], "--labels", data, "--out", "out", "--seeds", "0")
    ran = bingo(*words, "--methods", "seed,moco", "--set", "inter_weight=0.3")
    assert (
        ran.status == 2
        and "inter_weight=0.3, read only by bingo with variant=soft" in ran.err
        and not (tmp_path / "out").exists()
    )


def test_two_arms_that_are_one_run_are_told() -> None:
    said: list[str] = []
    resolve_arms(
        make_arms("bingo,bingo:stored_views=mean,bingo:bag_size=2,seed,seed:temperature=0.2", recipe()), said.append
    )
    assert said == [
        "warning: bingo and bingo:stored_views=mean are the same run; one of them is enough",
        "warning: seed and seed:temperature=0.2 are the same run; one of them is enough",
    ]


def test_students_that_ended_alike_are_told_below_the_table() -> None:
    runs = [
        {"arm": arm, "seed": seed, "digest": digest}
        for arm, seed, digest in (("a", 0, "x"), ("a", 1, "y"), ("b", 0, "x"), ("b", 1, "z"))
    ]
    (line,) = tables.same_students(runs)
    assert line == "the very same student, so what differs in the settings changed nothing: a (seed 0), b (seed 0)"
    assert tables.same_students(runs[:2]) == []
