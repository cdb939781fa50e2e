"""The training loop on a problem small enough to know its answers."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, Trained, dropping, encoder, filled_store, kind_targets, planned, recipe, whole_images

from bingo_compress.data import augment
from bingo_compress.errors import BingoError
from bingo_compress.features.bagging import knn
from bingo_compress.features.targets import OnlineTargets, StoredTargets, TargetSpace, target_space
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import checkpoint
from bingo_compress.training import loop, metrics, plan
from bingo_compress.training.loader import AHEAD, Lessons
from bingo_compress.training.losses import Batch, Bingo
from bingo_compress.training.out_of_memory import Frugal
from bingo_compress.training.state import first_state, make_optimizer

IMAGES, DIM, VIEWS = 40, 16, 3
STORE = filled_store(IMAGES)
TargetOf = Callable[[torch.Tensor, torch.Generator, torch.Tensor], torch.Tensor]


TARGETS = kind_targets(IMAGES, VIEWS, DIM)
BAGS = knn(TARGETS[:, 0], 3)[0]


@pytest.fixture(autouse=True)
def _a_line_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is."""
    monkeypatch.setattr(metrics, "LOG_SECONDS", math.inf)


def train(
    folder: Path,
    settings: Recipe,
    target_of: TargetOf | None = None,
    dim: int = DIM,
    stop_after: int | None = None,
    drop: float = 0.0,
) -> Trained:
    folder.mkdir(exist_ok=True)
    run = Trained(
        dropping(encoder("test_resnet", 32, seed=5), drop) if drop else encoder("test_resnet", 32, seed=5),
        folder / "metrics.jsonl",
        folder / "checkpoint.safetensors",
    )
    source = target_of or StoredTargets(TARGETS, TargetSpace(None, None), CPU)
    everything = torch.arange(IMAGES)
    lessons = Lessons(STORE, everything, BAGS, source)
    loop.distill(planned(settings, IMAGES, dim), run.student, lessons, run.metrics, run.saved, stop_after=stop_after)
    return run


def equal(one: Trained, two: Trained) -> bool:
    return set(one.weights) == set(two.weights) and all(
        torch.equal(one.weights[name], two.weights[name]) for name in one.weights
    )


# ---------------------------------------------------------------- plan


def test_a_plan_is_arithmetic() -> None:
    made = plan.schedule(recipe(batch_size=8, epochs=7, queue_size=30, optimizer="sgd"), 43)
    assert (made.batch_size, made.steps, made.warmup) == (8, 38, 0)  # 301 anchors
    assert made.peak_lr == pytest.approx(0.03 * 8 / 256)
    assert (made.optimizer, made.queue_size, made.student_views) == ("sgd", 30, 2)


def test_the_paper_at_its_own_size_gets_its_own_constants() -> None:
    made = plan.schedule(recipe(batch_size=256, epochs=200, queue_size=65536), 1_281_167)
    assert (made.optimizer, made.warmup, made.queue_size, made.steps) == ("sgd", 0, 65536, 1_000_912)
    assert made.peak_lr == pytest.approx(0.03)


def test_few_steps_get_adamw_with_a_warm_up() -> None:
    made = plan.schedule(recipe(batch_size=128, epochs=100), 3000)
    assert (made.optimizer, made.steps, made.warmup) == ("adamw", 2344, 117)
    assert made.peak_lr == pytest.approx(0.003)
    assert plan.schedule(recipe(batch_size=32, epochs=1), 3000).peak_lr == pytest.approx(0.0015)


def test_settings_win_over_what_follows() -> None:
    made = plan.schedule(
        recipe(batch_size=10, epochs=4, lr=0.7, warmup_epochs=1.5, optimizer="adamw", variant="official"), 100
    )
    assert (made.peak_lr, made.warmup, made.student_views) == (0.7, 15, 3)


def test_batch_and_queue_never_exceed_the_images() -> None:
    made = plan.schedule(recipe(batch_size=500, queue_size=65536, epochs=3), 20)
    assert (made.batch_size, made.steps, made.queue_size) == (20, 3, 20)


def test_the_plan_refuses_fewer_images_than_a_bag_needs() -> None:
    with pytest.raises(BingoError, match=r"expected more images than a bag holds \(3\), found 3"):
        plan.schedule(recipe(bag_size=3), 3)
    assert plan.schedule(recipe(bag_size=3, epochs=2), 4).steps == 2
    with pytest.raises(BingoError, match="found 0"):
        plan.schedule(recipe(), 0)


def test_the_optimizer_decays_no_norms_and_biases_under_adamw_and_everything_under_sgd() -> None:
    model = encoder()
    for kind in ("adamw", "sgd"):
        settings = recipe(optimizer=kind, weight_decay=0.05)
        made = make_optimizer(planned(settings, IMAGES), {"student": model})
        decay = {id(parameter): group["weight_decay"] for group in made.param_groups for parameter in group["params"]}
        assert len(decay) == len(list(model.parameters()))
        for parameter in model.parameters():
            assert decay[id(parameter)] == (0.05 if kind == "sgd" or parameter.ndim > 1 else 0.0)


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("kind", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_the_loss_goes_down_and_the_student_learns_the_kinds(kind: str, tmp_path: Path) -> None:
    run = train(tmp_path, recipe(epochs=10, optimizer=kind, lr=0.001 if kind == "adamw" else 0.1, mask_mates=False))
    losses = [line["loss"] for line in run.lines]
    assert len(losses) == 10  # the queue fills in the first
    assert sum(losses[-3:]) / 3 < losses[1] - 0.3
    with torch.no_grad():
        pictures = whole_images(STORE, torch.arange(IMAGES), 40).float() / 255
        features = run.student(torch.nn.functional.interpolate(pictures, (32, 32), mode="bilinear", antialias=True))
    mates = knn(features, 3)[0] % 3 == torch.arange(IMAGES)[:, None] % 3
    assert float(mates.float().mean()) > 0.9
    assert not run.student.training


def test_the_first_step_has_no_negatives_and_so_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LOG_SECONDS", 0.0)
    losses = [line["loss"] for line in train(tmp_path, recipe(epochs=1)).lines]
    assert len(losses) == 5
    assert losses[0] == 0 and min(losses[1:]) > 0.1


@pytest.mark.slow
def test_masking_takes_negatives_away(tmp_path: Path) -> None:
    free, masked = (
        train(tmp_path / str(mask), recipe(mask_mates=mask, epochs=2)).lines[-1]["loss"] for mask in (False, True)
    )
    assert masked < free - 0.01


def test_negatives_are_earlier_anchors_and_the_mask_is_the_anchor_with_its_bag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = torch.arange(IMAGES).flip(0)[:30]  # positions are not image numbers
    bags = (torch.arange(30)[:, None] + torch.tensor([1, 2, 5])) % 30
    place = {image: position for position, image in enumerate(training.tolist())}
    real, earlier = Bingo.__call__, list[int]()
    masks = 0

    def checked(loss: Any, batch: Batch) -> Any:
        nonlocal masks
        assert batch.targets is not None and batch.masked is not None
        held = batch.negatives.argmax(1).tolist()  # the target of image i is the unit vector i
        assert sorted(held) == sorted(earlier[-20:])
        anchors = batch.targets.anchor.argmax(1).tolist()
        for row, anchor in enumerate(anchors):
            bag = {anchor, *training[bags[place[anchor]]].tolist()}
            assert batch.masked[row].tolist() == [image in bag for image in held]
        masks += int(batch.masked.sum())
        earlier.extend(anchors)
        return real(loss, batch)

    monkeypatch.setattr(Bingo, "__call__", checked)
    source = StoredTargets(torch.eye(IMAGES)[:, None], TargetSpace(None, None), CPU)
    files = (tmp_path / "metrics.jsonl", tmp_path / "checkpoint.safetensors")
    chosen = planned(recipe(queue_size=20, epochs=4), len(training), IMAGES)
    loop.distill(chosen, encoder(), Lessons(STORE, training, bags, source), *files)
    assert len(earlier) == 4 * 30
    assert masks > 50
    # An epoch shows every image once.
    assert all(len(set(earlier[start : start + 30])) == 30 for start in range(0, 120, 30))


@pytest.mark.slow
def test_stored_and_online_targets_both_work_and_the_teacher_never_changes(tmp_path: Path) -> None:
    teacher = encoder("test_resnet", 32, seed=0)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with torch.no_grad():
        plain = teacher(whole_images(STORE, torch.arange(IMAGES), 40).float() / 255)
    space = target_space(plain, "pca", 12)
    online = train(tmp_path / "online", recipe(epochs=3), OnlineTargets(teacher, STORE, space, 0.2, CPU), 12)
    stored = train(tmp_path / "stored", recipe(epochs=3), StoredTargets(plain[:, None], space, CPU), 12)
    for run in (online, stored):
        assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in run.lines)
        assert not torch.equal(next(run.student.parameters()), next(encoder("test_resnet", 32, seed=5).parameters()))
    assert not equal(online, stored)
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_official_trains_three_views_and_two_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    asked: list[int] = []
    source = StoredTargets(TARGETS, TargetSpace(None, None), CPU)
    real = augment.cutmix

    def cutmix(one: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        seen.append(len(one) + len(other))
        return real(one, other, generator)

    def target_of(indices: torch.Tensor, generator: torch.Generator, mine: torch.Tensor) -> torch.Tensor:
        asked.append(len(indices))
        return source(indices, generator, mine)

    monkeypatch.setattr(augment, "cutmix", cutmix)
    run = train(tmp_path, recipe(variant="official", epochs=3, switch_epoch=1), target_of)
    assert seen == [16] * 15
    assert asked == [8] * 30
    assert {"intra", "inter", "mixed"} <= set(run.lines[0])
    assert [line["inter"] > 0 for line in run.lines] == [False, True, True]
    for line in run.lines:
        assert line["loss"] == pytest.approx(line["intra"] + line["inter"] + line["mixed"], rel=1e-4)


def test_metrics_have_their_keys_and_an_honest_learning_rate(tmp_path: Path) -> None:
    run = train(tmp_path, recipe(epochs=4, optimizer="sgd", lr=0.05))
    assert [(line["step"], line["epoch"]) for line in run.lines] == [(5, 0), (10, 1), (15, 2), (20, 3)]
    for line in run.lines:
        assert {"step", "epoch", "loss", "intra", "inter", "lr", "images_per_s"} <= set(line)
        assert line["loss"] == pytest.approx(line["intra"] + line["inter"], rel=1e-4)
        assert line["lr"] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * (line["step"] - 1) / 20)), rel=1e-4)
        assert line["images_per_s"] > 0


# ---------------------------------------------------------------- the same again


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others(tmp_path: Path) -> None:
    one, two, other = (train(tmp_path / str(n), recipe(seed=seed)) for n, seed in enumerate((3, 3, 4)))
    assert equal(one, two)
    assert not equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        (3, {"optimizer": "adamw"}),
        (8, {"optimizer": "adamw"}),
        (5, {"optimizer": "sgd", "lr": 0.05}),
        *((stop, {"variant": "official", "switch_epoch": 1, "batch_size": 12, "epochs": 3}) for stop in (3, 5, 8)),
    ],
)
def test_a_run_stopped_and_gone_on_with_equals_the_whole_bit_for_bit(
    stop: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = recipe(**changes)
    whole = train(tmp_path / "whole", settings)
    part = train(tmp_path / "parts", settings, stop_after=stop)
    assert not equal(part, whole)
    assert checkpoint.load(part.saved)[1]["step"] == stop
    parts = train(tmp_path / "parts", settings)
    assert equal(parts, whole)
    steps = [line["step"] for line in parts.lines]
    assert steps == sorted(set(steps)) and steps[-1] == 10
    saved = [checkpoint.load(run.saved)[0] for run in (parts, whole)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])


def test_lines_of_steps_that_are_run_again_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LOG_SECONDS", 0.0)
    run = train(tmp_path, recipe(), stop_after=4)
    with run.metrics.open("a") as file:  # as a run that went on after its last checkpoint and was cut off while writing
        file.write('{"step": 5, "loss": 99.0}\n{"step": 6, "loss": 99.0}\n{"step": 7, "lo')
    lines = train(tmp_path, recipe()).lines
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all(line["loss"] < 99 for line in lines)


def test_a_run_cut_off_before_its_first_checkpoint_leaves_no_line_twice(tmp_path: Path) -> None:
    calls = 0
    source = StoredTargets(TARGETS, TargetSpace(None, None), CPU)

    def target_of(indices: torch.Tensor, generator: torch.Generator, mine: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return source(indices, generator, mine)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe(), target_of)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    again = train(tmp_path, recipe(), target_of)
    assert [line["step"] for line in again.lines] == [5, 10]


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = train(tmp_path, recipe())
    again = train(tmp_path, recipe(), lambda indices, generator, mine: pytest.fail("a step was made"))
    assert equal(first, again)
    assert len(again.lines) == 2


@pytest.mark.slow
def test_a_student_with_dropout_draws_the_same_masks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", recipe(), drop=0.2)
    assert not equal(whole, train(tmp_path / "none", recipe()))
    train(tmp_path / "parts", recipe(), stop_after=4, drop=0.2)
    assert equal(whole, train(tmp_path / "parts", recipe(), drop=0.2))
    real, calls = Frugal.__call__, itertools.count()

    def short(frugal: Frugal, views: torch.Tensor) -> torch.Tensor:
        found = real(frugal, views)
        if next(calls) == 3:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return found

    monkeypatch.setattr(Frugal, "__call__", short)
    assert equal(whole, train(tmp_path / "short", recipe(), drop=0.2))
    assert next(calls) == 11  # ten steps, one of them twice


# ---------------------------------------------------------------- going wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "LOG_SECONDS", 0.0)
    calls = 0

    def target_of(indices: torch.Tensor, generator: torch.Generator, mine: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        found = TARGETS[indices, 0].clone()
        if calls == 3:
            found[2] = value
        return found

    with pytest.raises(
        BingoError, match=r"not finite at step 3 \(epoch 1\), of the images .* nothing was saved yet.*--set lr="
    ):
        train(tmp_path, recipe(variant="paper"), target_of)  # one call a step
    told = json.loads((tmp_path / "not_finite.json").read_text())
    assert told["step"] == 3 and len(told["images"]) == len(set(told["images"])) == recipe().batch_size
    assert 3 <= calls <= 3 + AHEAD  # batches are made ahead
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_damaged_checkpoint_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    run = train(tmp_path, recipe(), stop_after=2)
    run.saved.write_bytes(run.saved.read_bytes()[:-100])
    with pytest.raises(BingoError, match=r"checkpoint\.safetensors"):
        train(tmp_path, recipe())


def test_several_processes_never_try_to_compile_what_they_would_not_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = planned(recipe(compile="on"), IMAGES)
    state = first_state(chosen, encoder("test_resnet", 32), BAGS)
    monkeypatch.setattr(loop.devices, "compiled_if_faster", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(loop.distributed, "world", lambda: 2)
    monkeypatch.setattr(loop.distributed, "shared", lambda model, _: model)
    loop._frugal(chosen, state, lambda *_: pytest.fail("a batch was made"))
    assert capsys.readouterr().out == "torch.compile: not used, several processes share the student\n"


def test_a_run_too_short_for_a_trace_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (metrics.WARM + metrics.TRACED, 4):
        with metrics.profiled(True, tmp_path / f"{steps}.json") as tick:
            for _ in range(steps):
                tick()
        assert (tmp_path / f"{steps}.json").exists() == (steps > 4)
    assert capsys.readouterr().out.splitlines()[-1].startswith("no trace: --profile needs 15 steps")
