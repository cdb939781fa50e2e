"""--time: what fits into it, that a run of it is the run of the epochs it became, and that it goes on with them."""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, Ran, encoder, filled_store, flags, interrupted_at, kind_targets, photos, planned, recipe
from test_cli import one_error

from bingo_compress import budget, dry_run, pipeline
from bingo_compress.budget import Rates, expected, fitting_epochs, fitting_views, least_epochs
from bingo_compress.comparison.arms import make_arms
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import held_out
from bingo_compress.features import teacher_pass
from bingo_compress.features.targets import StoredTargets, TargetSpace
from bingo_compress.models.encoder import weights_digest
from bingo_compress.recipe import Recipe, load_recipe, make_recipe
from bingo_compress.runtime import checkpoint, machine
from bingo_compress.training import loop
from bingo_compress.training.loader import Lessons
from bingo_compress.training.plan import Plan, usual_epochs

# Seconds: of 100 images with 4 views 10 for decoding and 60 for the teacher, 1 a step of 10 anchors.
RATES = Rates(decode=0.1, teacher=0.1, teacher_made=0.0, learnt=0.05, plain=0.01, made=0.0, activations=0.0)
OPEN = {"epochs": 0, "time": "1h", "hold_out": 0.0}


@pytest.fixture
def bingo(bingo: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)
    return bingo


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are rehearsed, and said to take so long that about two epochs of 22 images fit into an hour."""
    real = budget.rehearse
    monkeypatch.setattr(budget, "REHEARSED", 0.0)
    monkeypatch.setattr(budget, "measure", lambda *_: RATES)
    monkeypatch.setattr(budget, "rehearse", lambda *given: (real(*given), (0.0, 600.0))[1])


def never(*_: object) -> None:
    pytest.fail("chosen again")


# ---------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("words", "seconds"), [("45m", 2700), ("2h", 7200), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), ("", 0)]
)
def test_a_time_is_read_as_people_write_it(words: str, seconds: float) -> None:
    assert machine.parse_time(make_recipe({"time": words}, "here").time) == seconds


@pytest.mark.parametrize("words", ["45", 45, "45min", "m", "1m30", "30m1h", "-5m", "1:30", "5 m", "1e3s"])
def test_what_is_no_time_is_refused(words: Any) -> None:
    with pytest.raises(BingoError, match=r"here: time: [\w ]+, found .* for example 45m, 2h or 1h30m"):
        make_recipe({"time": words}, "here")


def test_a_time_beside_epochs_is_refused_and_a_recipes_epochs_can_be_undone(bingo: Any, tmp_path: Path) -> None:
    words = ("distill", *flags(data=photos(tmp_path / "photos", 4)), "--out", "run", "--time", "45m")
    for more in ((), ("--dry-run",)):
        one_error(bingo(*words, *more), "expected a time or epochs, found both, 45m and 2", "--epochs 0")
    assert not (tmp_path / "run").exists()
    assert load_recipe(None, ["epochs=3"], {"epochs": 0, "time": "45m"}).time == "45m"


def test_a_comparison_is_of_equal_passes_and_has_no_time(bingo: Any, tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", 4)
    words = ("compare", *flags(data=data, epochs=0), "--labels", data, "--out", "out")
    one_error(bingo(*words, "--set", "time=5m"), "compare: expected epochs, found time 5m", "equal passes")
    with pytest.raises(BingoError, match="found time; methods are compared at equal passes"):
        make_arms("bingo:time=5m,seed", recipe())


# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    ("wanted", "seconds", "found"), [(4, 61, 4), (4, 59, 3), (4, 41, 2), (4, 0, 1), (1, 1000, 1), (9, 1000, 9)]
)
def test_views_of_the_teacher_are_as_many_as_its_share_of_the_time_holds(
    wanted: int, seconds: float, found: int
) -> None:
    assert fitting_views(wanted, RATES, 100, seconds) == found


@pytest.mark.parametrize(
    ("seconds", "epoch", "found"),
    [(3600, 10, 360), (3599, 7, 514), (100, 30, 3.33), (10, 30, 0.333), (10, 100, 0.25), (-5, 10, 0.25)],
)
def test_epochs_fill_what_is_left_of_the_time(seconds: float, epoch: float, found: float) -> None:
    assert fitting_epochs(seconds, epoch, 0.25) == found


def timed(time: str, **changes: Any) -> Plan:
    """The plan of a run of 100 images, 10 anchors a step, that has so long."""
    return planned(recipe(**{**OPEN, "batch_size": 10, "views": "4", "time": time, **changes}), 100)


@pytest.mark.parametrize(
    ("time", "changes", "any_views", "views", "epochs"),
    [
        ("1h", {}, True, 4, 342),  # 3492 s less 70 for decoding and the teacher, at 10 s an epoch
        ("2m", {}, True, 1, 7.64),  # a quarter is 30 s, which is one view
        ("2m", {}, False, 4, 4.64),
        ("2m", {"views": "online"}, True, 0, 2.88),  # two targets of 0.1 s an anchor: 2 s a step beside its own
        ("1h", {"head_first": 0.5}, True, 4, 570),  # half of the steps at a fifth of the cost
        ("1h", {"keep_best": True, "hold_out": 0.1}, True, 4, 378),  # 90 images, 10 checks and the closing one
    ],
)
def test_a_time_becomes_views_and_epochs(
    time: str, changes: dict[str, Any], any_views: bool, views: int, epochs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_cores", lambda: 1)  # a step and its batch, one after the other
    found = expected(timed(time, **changes), RATES, 100, 0.0, any_views=any_views)
    assert (found.views, found.recipe.epochs) == (views, pytest.approx(epochs, rel=0.01))
    assert found.recipe.time == time
    spent = budget.stages(found, RATES, 100, 100 - found.schedule.images)
    assert sum(spent.values()) == pytest.approx(0.97 * machine.parse_time(time), rel=0.02)


def test_a_time_too_short_for_an_epoch_is_refused_with_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_cores", lambda: 1)
    for time, changes in (("40s", {}), ("70s", {"views": "5"})):
        with pytest.raises(BingoError, match=rf"--time {time}: expected time for all stages and 1 epoch,") as caught:
            expected(timed(time, **changes), RATES, 100, 0.0, any_views=not changes)
        words = str(caught.value).split("about ")[1].split(" here")[0]
        found = expected(timed(words, **changes), RATES, 100, 0.0, any_views=not changes)
        assert found.recipe.epochs == pytest.approx(1, abs=0.1)
    late = expected(timed("40s"), RATES, 100, 0.0, any_views=True, refuse=False)  # its stages may be there already
    assert late.recipe.epochs == 1


def test_the_least_of_a_large_folder_is_a_thousand_steps() -> None:
    assert least_epochs(planned(recipe(batch_size=8), 100)) == 1
    assert least_epochs(planned(recipe(batch_size=8), 80_000)) == 0.1


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({}, [(0, 1.0)]),
        ({"head_first": 0.25}, [(0, 0.25), (10, 0.75)]),
    ],
)
def test_steps_of_one_cost_are_one_phase(changes: dict[str, Any], phases: list[tuple[int, float]]) -> None:
    assert planned(recipe(batch_size=10, epochs=4, **changes), 100).phases == phases


def test_many_more_or_fewer_epochs_than_usual_are_told(monkeypatch: pytest.MonkeyPatch, printed: io.StringIO) -> None:
    student, lessons = encoder("test_efficientnet"), Lessons(filled_store(2), torch.arange(2), torch.empty(2, 0), None)
    said = {}
    for step in (0.1, 2.0, 100.0, 10_000.0):
        monkeypatch.setattr(budget, "rehearse", lambda *_, step=step: (0.0, step))
        began = budget.time.monotonic() - 100
        found = budget.settled(timed("1h").lasting(9), RATES, student, lessons, 0, began)
        said[step] = printed.getvalue()
        printed.truncate(printed.seek(0))
        assert found.recipe.time == "" and found.schedule.steps == round(found.recipe.epochs * 10)
    assert usual_epochs(timed("1h").recipe) == 100
    assert "more than 3 times the usual 100 epochs" in said[0.1] and "not known to be better" in said[0.1]
    assert said[2.0].count("\n") == 2 and "after 1m40s; 170 epochs (1,700 steps of 2 s) fit" in said[2.0]
    assert "less than a third of the usual 100 epochs" in said[100.0]
    assert "1 epoch (10 steps of 1e+04 s) are the least, and will end 26h48m late" in said[10_000.0]


# ---------------------------------------------------------------- the run


def test_a_rehearsal_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = kind_targets(16, 2, 16)
    source = StoredTargets(targets, TargetSpace(None, None), CPU)
    bags = torch.arange(48).view(16, 3) % 16
    lessons = Lessons(filled_store(16), torch.arange(16), bags, source)
    student, steps, real = encoder("test_efficientnet"), list[tuple[int, bool]](), loop.train_step

    def recorded(plan: Plan, state: Any, *given: Any) -> Any:
        steps.append((state.step, any(each.requires_grad for each in state.student.parameters())))
        return real(plan, state, *given)

    monkeypatch.setattr(loop, "train_step", recorded)
    before, drawn = weights_digest(student), torch.get_rng_state()
    plan = planned(recipe(head_first=0.5, epochs=4), 16)
    getting_ready, step = loop.rehearse(plan, student, lessons, 0.0)
    assert steps == [(1, False), (2, False), (4, True), (5, True)]  # one to get warm, one that counts
    assert step > 0 and getting_ready >= 0
    assert weights_digest(student) == before and torch.equal(torch.get_rng_state(), drawn)
    assert not student.training and all(each.requires_grad for each in student.parameters())


def test_a_rehearsed_step_is_as_long_as_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are being made when it ends are waited for, and that was counted: 0.3 s of 2 s."""
    clock = [0.0]
    real = loop._batches

    def batches(*given: Any) -> Iterator[Any]:
        try:
            yield from real(*given)
        finally:
            clock[0] += 100

    def step(plan: Plan, state: Any, *_: Any) -> None:
        clock[0] += 2
        state.step += 1

    monkeypatch.setattr(loop, "_batches", batches)
    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    source = StoredTargets(kind_targets(16, 2, 16), TargetSpace(None, None), CPU)
    lessons = Lessons(filled_store(16), torch.arange(16), torch.arange(48).view(16, 3) % 16, source)
    plan = planned(recipe(head_first=0.5, epochs=40), 16)
    assert loop.rehearse(plan, encoder("test_efficientnet"), lessons, 5.0)[1] == 2


def state(run: Path) -> dict[str, torch.Tensor]:
    """All that a run ended with."""
    return checkpoint.load(run / "work" / "checkpoint.safetensors")[0] | checkpoint.load(run / "student.safetensors")[0]


def same(one: Path, other: Path) -> bool:
    first, second = state(one), state(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def asked(tmp_path: Path) -> Recipe:
    """Asked for a time, on tmp_path/photos."""
    given = recipe(data=str(photos(tmp_path / "photos", 8)), **OPEN, head_first=0.3, lr=0.05).model_dump(
        exclude_unset=True
    )
    return make_recipe({key: value for key, value in given.items() if key != "views"}, "tests")


@pytest.mark.slow
@pytest.mark.usefixtures("paced")
def test_a_run_of_a_time_is_the_run_of_the_epochs_that_it_became(asked: Recipe, tmp_path: Path) -> None:
    pipeline.run_distill(asked, tmp_path / "timed")
    became = load_recipe(tmp_path / "timed" / "resolved.yaml")
    assert became.time == "" and 1.5 < became.epochs < 2.5
    assert load_recipe(tmp_path / "timed" / "recipe.yaml").time == "1h"
    plain = {"time": "", "epochs": became.epochs, "views": became.views}
    pipeline.run_distill(asked.model_copy(update=plain), tmp_path / "plain")
    pipeline.run_distill(became, tmp_path / "again")
    assert same(tmp_path / "timed", tmp_path / "plain") and same(tmp_path / "timed", tmp_path / "again")
    made = [checkpoint.made_of(tmp_path / run / "student.safetensors") for run in ("timed", "plain")]
    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.usefixtures("paced")
@pytest.mark.parametrize("when", ["before the first step", "between two steps"])
def test_a_resumed_run_goes_on_with_the_epochs_that_were_chosen(
    when: str, asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    if when == "before the first step":
        with interrupted_at(monkeypatch, pipeline, "train", 1), pytest.raises(KeyboardInterrupt):
            pipeline.run_distill(asked, run)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(held_out, "distill", partial(loop.distill, stop_after=3))
            pipeline.run_distill(asked, run)
    chosen = (run / "resolved.yaml").read_text()
    for name in ("measure", "rehearse", "expected", "settled"):
        monkeypatch.setattr(budget, name, never)
    pipeline.run_distill(load_recipe(run / "recipe.yaml"), run, resume=True)
    assert (run / "resolved.yaml").read_text() == chosen and load_recipe(run / "recipe.yaml").time == "1h"
    pipeline.run_distill(load_recipe(run / "resolved.yaml"), tmp_path / "plain")
    assert same(run, tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.usefixtures("paced")
def test_a_run_stopped_before_its_epochs_were_chosen_keeps_its_views(
    asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(budget, "TEACHER_SHARE", 0.003)  # 11 s: of 24 images the plain view, and two more
    with interrupted_at(monkeypatch, teacher_pass, "_view_shard", 1), pytest.raises(KeyboardInterrupt):
        pipeline.run_distill(asked, run)
    resolved = load_recipe(run / "resolved.yaml")
    assert (resolved.time, resolved.epochs, resolved.views) == ("1h", 0, "2")
    monkeypatch.setattr(budget, "TEACHER_SHARE", 0.25)
    pipeline.run_distill(load_recipe(run / "recipe.yaml"), run, resume=True)
    resolved = load_recipe(run / "resolved.yaml")
    assert (resolved.time, resolved.views) == ("", "2") and resolved.epochs > 1


@pytest.mark.slow
@pytest.mark.usefixtures("paced")
def test_a_run_goes_on_with_no_other_time_and_no_other_views(asked: Recipe, tmp_path: Path, bingo: Any) -> None:
    run = tmp_path / "run"
    pipeline.run_distill(asked, run)
    before = (run / "resolved.yaml").read_text(), (run / "recipe.yaml").read_text()
    words = ("distill", "--out", run, "--resume")
    one_error(bingo(*words, "--time", "30m"), "started with other settings (time: 1h -> 30m)")
    one_error(bingo(*words, "--views", "3"), "started with other settings (views: 4 -> 3)")
    one_error(bingo(*words, "--epochs", "3"), "found both, 1h and 3")
    pipeline.run_distill(load_recipe(run / "resolved.yaml"), tmp_path / "plain")
    one_error(bingo("distill", "--out", tmp_path / "plain", "--resume", "--epochs", 0, "--time", "1h"), "none -> 1h")
    assert ((run / "resolved.yaml").read_text(), (run / "recipe.yaml").read_text()) == before


def test_a_dry_run_says_what_would_fit_and_that_it_fills_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: io.StringIO
) -> None:
    rows: dict[str, float] = {}
    monkeypatch.setattr(budget, "measure", lambda *_: RATES)
    monkeypatch.setattr(machine, "free_cores", lambda: 1)
    monkeypatch.setattr(dry_run.console, "duration", lambda seconds: f"{seconds}")
    real = dry_run.console.table

    def recorded(title: str, head: Any, cells: Any) -> None:
        if title.startswith("time"):
            rows.update({name: float(value) for name, value in cells})
        real(title, head, cells)

    monkeypatch.setattr(dry_run.console, "table", recorded)
    data = photos(tmp_path / "photos", 8)
    dry_run.estimate(recipe(data=str(data), **{**OPEN, "views": "2"}), tmp_path / "out")
    said = printed.getvalue()
    assert "--time 1h: about 1" in said and "epochs fit, with 2 stored views of the teacher" in said
    assert "epochs: 1" in said and "time: 1h" in said and "epochs in 1h\n" in said
    together = rows.pop("together")
    assert set(rows) >= {"decode images", "teacher, 3 views", "check held-out images"}
    assert together == pytest.approx(sum(rows.values())) and together == pytest.approx(0.97 * 3600, rel=0.02)
