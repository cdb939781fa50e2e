"""The training loop, top to bottom. What it changes is one `State`; every random number comes from (seed, epoch, step),
so a resumed run draws the same.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bingo_compress.errors import BingoError
from bingo_compress.features.bagging import knn, over_scenes
from bingo_compress.features.extract import store_features
from bingo_compress.models.encoder import Encoder, weights_digest
from bingo_compress.recipe import Recipe, deciding
from bingo_compress.runtime import checkpoint, console, devices, distributed, machine, signals
from bingo_compress.runtime.made_of import MadeOf, as_told, hash_seed, made_of
from bingo_compress.runtime.run_dir import write_text
from bingo_compress.training.loader import Lessons, Maker, Ready, ahead, shown_in
from bingo_compress.training.losses import Batch, Queries, Targets
from bingo_compress.training.metrics import Log, Meter, forget_after, profiled
from bingo_compress.training.out_of_memory import Frugal
from bingo_compress.training.plan import Plan, learning_rate
from bingo_compress.training.state import FeatureQueue, State, first_state, set_learning

EPOCH_SAVES_APART = 30.0  # seconds: of a short epoch a save would be a good part
COMPILE_FROM = 5_000  # steps that pay for the minute or two that the compiler takes
CHECKS = 10  # in a run
FILLED = 4096  # rows of the queue at a time
WARM = {"cpu": 1, "cuda": 3}  # steps that are not timed
TIMED = 100  # steps, at most
Check = Callable[[Encoder], float]


def distill(
    plan: Plan,
    student: Encoder,
    lessons: Lessons,
    metrics: Path,
    saved: Path,
    *,
    check: Check | None = None,
    stop_after: int | None = None,
    discard: bool = False,
) -> MadeOf:
    """Train `student` in place by `lessons`; go on from the checkpoint `saved` if it is there and was made from just
    this. In one piece, because the order in which a step is counted, checked, told and saved is what resuming rests on.

    metrics: appended to, one JSON object a line. check: scores the student after the epochs that are `due`; with
    recipe.keep_best the best-scored student is what is left. stop_after: leave after this many steps, as an
    interruption would (tests). discard: the checkpoint of another run is deleted instead of refused. Returns what the
    student is made of. Raises BingoError when the loss is not finite, and nothing is saved after such a step; and for
    the checkpoint of another run.
    """
    recipe, schedule, first = plan.recipe, plan.schedule, distributed.rank() == 0
    made = _made_of(plan, student, lessons)
    state = first_state(plan, student, lessons.bags)
    if found := _own_state(saved, metrics, made, discard):
        state.restore(*found)
    elif recipe.queue_start == "targets":
        _fill(state.queue, plan, lessons)
    if first:
        forget_after(metrics, state.step)
    meter = Meter(plan.device)
    make = Maker(plan, lessons, student.preprocessing.size, meter)
    set_learning(plan, state)
    frugal = _frugal(plan, state, make)
    fills = 0 if recipe.queue_start == "targets" else schedule.queue_size // schedule.batch_size
    log = Log(metrics if first else None, plan.device, meter, state.step, fills)
    last = schedule.steps if stop_after is None else min(stop_after, schedule.steps)
    shown = schedule.batch_size * schedule.student_views
    last_save = time.monotonic()
    with (
        console.bar("distil", schedule.steps * shown, state.step * shown) as advance,
        profiled(recipe.profile and first, metrics.with_name("trace.json")) as tick,
        signals.deferred(),
    ):
        for ready in _batches(make, state, last):
            epoch = schedule.epochs_after(state.step)
            if state.step == schedule.head_steps and state.step:
                set_learning(plan, state)
                frugal = _frugal(plan, state, make)  # for all that learns from here on
            log.add(train_step(plan, state, frugal, meter, ready), shown)
            advance(shown)
            tick()
            ended = schedule.epochs_after(state.step) > epoch or state.step == schedule.steps
            scored: dict[str, float] = {}
            if check is not None and ended and (due(epoch + 1, recipe) or state.step == schedule.steps):
                scored["neighbour_recall"] = check(student)
                set_learning(plan, state)
                if recipe.keep_best:
                    state.scored(scored["neighbour_recall"])
            # All leave after the same step, or some would wait for ever.
            signals.pass_on(distributed.largest(signals.heard()))
            stop = signals.heard() > 0
            saving = stop or state.step in (schedule.steps, stop_after)
            saving = saving or _save_due(recipe, state.step, time.monotonic() - last_save, ended)
            if log.due() or ended or saving:
                rate = state.optimizer.param_groups[-1]["lr"]
                mean, said = log.write(step=state.step, epoch=epoch, lr=rate, **scored)
                advance(0, note=f"epoch {epoch + 1}/{math.ceil(recipe.epochs)}, {said}")
                if not math.isfinite(mean):
                    raise BingoError(_not_finite(int(log.poisoned), plan, lessons, metrics, saved))
            if saving:
                if first:
                    checkpoint.save_keeping(saved, state.tensors(), made, **state.facts())
                last_save = time.monotonic()
            if stop:
                console.say(f"asked to stop: saved at step {state.step:,} of {schedule.steps:,}")
                break
    if first and log.steps:
        console.say(log.describe())
    distributed.barrier()  # the last checkpoint is there for all
    if state.best and state.step == schedule.steps:
        student.backbone.load_state_dict(state.best)
    student.eval()
    return made


def due(epoch: int, recipe: Recipe) -> bool:
    """Whether the student is checked after an epoch (counted from 1): every recipe.check_every, without that CHECKS
    times, evenly spread.
    """
    if recipe.check_every:
        return epoch % recipe.check_every == 0
    return epoch * CHECKS // recipe.epochs > (epoch - 1) * CHECKS // recipe.epochs


def train_step(plan: Plan, state: State, frugal: Frugal, meter: Meter, ready: Ready) -> dict[str, Tensor]:
    """One step on `ready`; `state` is what it changes. Returns the loss and its terms, detached: the mean of all
    processes.
    """
    recipe, schedule, average = plan.recipe, plan.schedule, state.average
    epoch = schedule.epochs_after(state.step)
    torch.manual_seed(hash_seed(recipe.seed, "dropout", state.step, distributed.rank()))
    keys = None
    if average is not None:
        with meter("teacher"), _halved(plan.device):
            keys = Targets(average(ready.fresh)) if ready.fresh is not None else Targets(*average(ready.views).chunk(2))
    rates = {
        "head": learning_rate(state.step, schedule.steps, schedule.warmup, schedule.peak_lr),
        "student": schedule.backbone_rate(state.step),
    }
    for group in state.optimizer.param_groups:
        group["lr"] = rates[group["name"]]
    masked = state.queue.holding(ready.known) if recipe.mask_mates else None

    def learn() -> dict[str, Tensor]:
        state.optimizer.zero_grad(set_to_none=True)
        with meter("student"), _halved(plan.device):
            embedded = frugal(ready.views).float()
        with meter("loss"):
            queries, targets = _sides(plan, ready, embedded)
            terms = plan.loss(Batch(queries, targets, keys, state.queue.negatives(), masked, epoch))
            loss = torch.stack(list(terms.values())).sum()
        with meter("student"), frugal.backward():
            loss.backward()
        return {name: value.detach() for name, value in {"loss": loss, **terms}.items()}

    losses = frugal.step(learn)
    with meter("student"):
        state.optimizer.step()  # not part of what is tried again: what it had updated would be updated twice
    pushed = keys or ready.targets
    assert pushed is not None
    state.queue.push(distributed.rows(pushed.anchor.float()), ready.scenes)
    if average is not None:
        average.follow(state.student, state.head, schedule.average)
    state.step += 1
    return distributed.mean(losses)


def rehearse(plan: Plan, student: Encoder, lessons: Lessons, enough: float) -> tuple[float, float]:
    """(seconds that a run takes to get ready for its steps, seconds of a step, the mean over the plan's phases): real
    ones on a copy of `student` with a full queue, about `enough` seconds of them. Nothing that a run has or draws
    changes.
    """
    device, meter = plan.device, Meter(plan.device)
    warm, getting_ready, step = WARM[device.type], 0.0, 0.0

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        state = first_state(plan, copy.deepcopy(student), lessons.bags)
        rows = torch.arange(plan.schedule.queue_size)
        state.queue.push(normalize(torch.randn(len(rows), plan.dim, device=device), dim=1), rows)
        make = Maker(plan, lessons, student.preprocessing.size, meter)
        for start, share in plan.phases:
            state.step = max(start, 1)  # bags are rebuilt at the first step
            began, taken, since = now(), 0, 0.0
            set_learning(plan, state)
            frugal = _frugal(plan, state, make)
            with closing(_batches(make, state, state.step + warm + TIMED)) as batches:
                for ready in batches:
                    train_step(plan, state, frugal, meter, ready)
                    taken += 1
                    if taken == warm:
                        since = now()
                    if taken > warm and distributed.largest(int(time.perf_counter() - since >= share * enough)):
                        break
                ended = now()  # before the batches that nobody will take are waited for
            each = (ended - since) / (taken - warm)
            getting_ready += max(0.0, since - began - warm * each)
            step += share * each
    return getting_ready, step


def _fill(queue: FeatureQueue, plan: Plan, lessons: Lessons) -> None:
    """Push stored targets of as many training images as `queue` holds, drawn by the recipe's seed, the last ones of
    that order last.
    """
    assert lessons.target_of is not None
    generator = torch.Generator().manual_seed(hash_seed(plan.recipe.seed, "queue"))
    drawn = torch.randperm(len(lessons.training), generator=generator)[: plan.schedule.queue_size]
    for some in drawn.split(FILLED):
        rows = lessons.target_of(lessons.training[some], generator, torch.arange(len(some)))
        queue.push(rows, lessons.scenes_of(some))


def _halved(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _sides(plan: Plan, ready: Ready, embedded: Tensor) -> tuple[Queries, Targets | None]:
    """(the student's embeddings by view, the targets), as the loss takes them. embedded: (views x b, D)."""
    embedded = embedded if plan.loss.lengths else normalize(embedded, dim=1)
    parts, targets = embedded.chunk(plan.schedule.student_views), ready.targets
    if plan.loss.whole:
        parts = tuple(map(distributed.with_gradients, parts))
        assert targets is not None and targets.mate is not None
        targets = Targets(distributed.rows(targets.anchor), distributed.rows(targets.mate))
    return Queries(*parts, share=ready.share), targets  # type: ignore[misc, arg-type]


def _made_of(plan: Plan, student: Encoder, lessons: Lessons) -> MadeOf:
    return made_of(
        "training",
        settings=deciding(plan.recipe),
        start=weights_digest(student),
        training=checkpoint.tensor_digest(lessons.training),
        bags=checkpoint.tensor_digest(lessons.bags),
        **lessons.sources,
    )


def _frugal(plan: Plan, state: State, make: Maker) -> Frugal:
    """Student and head as one model, compiled where that is asked for or pays, and shared among processes."""
    model, wanted = nn.Sequential(state.student, state.head), plan.recipe.compile
    worth = plan.device.type == "cuda" and plan.schedule.steps - state.step >= COMPILE_FROM
    if distributed.world() > 1:
        if wanted == "on":
            console.say("torch.compile: not used, several processes share the student")
        return Frugal(model, state.student.backbone, distributed.shared(model, plan.device))
    run = None
    if wanted == "on" or (wanted == "auto" and worth):
        run = devices.compiled_if_faster(model, make(state.step, state.bags).views, wanted)
    return Frugal(model, state.student.backbone, run)


def _batches(make: Maker, state: State, last: int) -> Generator[Ready]:
    """The material of every step from `state.step` to `last`, which the steps move on; bags are rebuilt where they are
    due, when no batch of the old ones is left.
    """
    plan, schedule, lessons = make.plan, make.plan.schedule, make.lessons
    period = plan.recipe.rebag_epochs if plan.rebags else math.ceil(plan.recipe.epochs)
    thread = machine.free_cores() > torch.get_num_threads() * distributed.world()
    while state.step < last:
        periods = schedule.epochs_after(state.step) // period
        if plan.rebags and state.step == schedule.steps_of(periods * period):
            assert state.average is not None
            found = store_features(state.average.student, lessons.pixels, lessons.training, plan.device)
            scenes = lessons.scenes_of(torch.arange(len(lessons.training)))
            state.bags = distributed.from_first(
                lambda: over_scenes(lambda firsts: knn(found[firsts], plan.recipe.bag_size)[0], scenes)  # noqa: B023 - called at once
            )
        span = range(state.step, min(schedule.steps_of((periods + 1) * period), last))
        batches = ahead(lambda number: make(number, state.bags), span, plan.device, thread=thread)
        while True:
            with make.meter("wait"):
                ready = next(batches, None)
            if ready is None:
                break
            yield ready


def _save_due(recipe: Recipe, step: int, old: float, ended: bool) -> bool:
    """Whether the last save is old enough for another. old: seconds; ended: the step is an epoch's last."""
    return (
        old > 60 * recipe.save_every_minutes
        or (ended and old > EPOCH_SAVES_APART)
        or (bool(recipe.save_every_steps) and step % recipe.save_every_steps == 0)
    )


def _own_state(
    saved: Path, metrics: Path, made: MadeOf, discard: bool
) -> tuple[dict[str, Tensor], dict[str, object]] | None:
    """The state in `saved` if it was made from just `made`, None where there is none; another run's is deleted, or
    raises BingoError.
    """
    found = checkpoint.load_newest(saved)
    if found is None or not (others := made.differences(as_told(found[1].get("made_of")))):
        return found
    if not discard:
        raise checkpoint.of_another_run(saved, others)
    console.say(f"the state in {saved} is of another run and is deleted; what differs: {', '.join(others)}")

    def delete() -> None:
        checkpoint.forget(saved)
        metrics.unlink(missing_ok=True)

    distributed.from_first(delete)
    return None


def _not_finite(step: int, plan: Plan, lessons: Lessons, metrics: Path, saved: Path) -> str:
    """What to say of a step (counted from 1) whose loss was not finite; the names of its images go into a file beside
    the metrics.
    """
    schedule, names = plan.schedule, lessons.names
    epoch = schedule.epochs_after(step - 1)
    images = lessons.training[shown_in(plan, lessons, step - 1)].tolist()
    batch = [names[image] if names else str(image) for image in images]
    file = metrics.with_name("not_finite.json")
    write_text(file, json.dumps({"step": step, "epoch": epoch + 1, "images": batch}, indent=1) + "\n")
    kept = f"the save in {saved.parent} is of an earlier step" if saved.exists() else "nothing was saved yet"
    rate = learning_rate(step - 1, schedule.steps, schedule.warmup, schedule.peak_lr)
    return (
        f"the loss is not finite at step {step} (epoch {epoch + 1}), of the images {', '.join(batch[:3])}, ... (all"
        f" {len(batch)} in {file}); {kept}: look at the images and go on with --resume, or start anew with --overwrite"
        f" and a smaller rate, for example --set lr={rate / 2:.2g}"
    )
