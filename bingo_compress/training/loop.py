"""The training loop, top to bottom. It owns all state; every random number comes from (seed, epoch, step), so a resumed
run draws the same.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bingo_compress.data.pixel_store import PixelStore
from bingo_compress.errors import BingoError
from bingo_compress.features.bagging import knn
from bingo_compress.features.extract import store_features
from bingo_compress.features.targets import TargetOf
from bingo_compress.models.encoder import Encoder, weights_digest
from bingo_compress.recipe import Recipe, deciding
from bingo_compress.runtime import checkpoint, console, devices, distributed, machine, signals
from bingo_compress.runtime.made_of import MadeOf, as_told, hash_seed, made_of
from bingo_compress.runtime.run_dir import write_text
from bingo_compress.training.loader import Maker, Ready, ahead, anchors_of
from bingo_compress.training.losses import Batch, Queries, Targets
from bingo_compress.training.metrics import Log, Meter, forget_after, profiled
from bingo_compress.training.momentum import Average, FeatureQueue
from bingo_compress.training.out_of_memory import Frugal
from bingo_compress.training.plan import Plan, learning_rate, loss_of, make_head, make_optimizer, plan

EPOCH_SAVES_APART = 30.0  # seconds: of a short epoch a save would be a good part
COMPILE_FROM = 5_000  # steps that pay for the minute or two that the compiler takes
CHECKS = 10  # in a run
Check = Callable[[Encoder], float]


def due(epoch: int, recipe: Recipe) -> bool:
    """Whether the student is checked after an epoch (counted from 1): every recipe.check_every, without that CHECKS
    times, evenly spread.
    """
    if recipe.check_every:
        return epoch % recipe.check_every == 0
    return epoch * CHECKS // recipe.epochs > (epoch - 1) * CHECKS // recipe.epochs


def distill(
    recipe: Recipe,
    student: Encoder,
    pixels: PixelStore,
    training: Tensor,
    bags: Tensor,
    target_of: TargetOf | None,
    dim: int,
    metrics: Path,
    saved: Path,
    device: torch.device,
    *,
    check: Check | None = None,
    sources: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
    stop_after: int | None = None,
    discard: bool = False,
) -> MadeOf:
    """Train `student` in place on the images `training` (n,) of `pixels`; go on from the checkpoint `saved` if it is
    there and was made from just this.

    bags: (n, K) positions in `training`, -1 for an empty place. target_of: the teacher's embedding (B, dim) of images,
    None for methods without teacher. metrics: appended to, one JSON object a line. check: scores the student after the
    epochs that are `due`; with recipe.keep_best the best-scored student is what is left. names: of the images of
    `pixels`, for messages. sources: digests of what `pixels` and `target_of` were made from, by name. stop_after: leave
    after this many steps, as an interruption would (tests). discard: the checkpoint of another run is deleted instead
    of refused. Returns what the student is made of. Raises BingoError when the loss is not finite, and nothing is saved
    after such a step; and for the checkpoint of another run.
    """
    made = made_of(
        "training",
        settings=deciding(recipe),
        start=weights_digest(student),
        training=checkpoint.tensor_digest(training),
        bags=checkpoint.tensor_digest(bags),
        **(sources or {}),
    )
    planned = plan(recipe, len(training))
    loss_function = loss_of(recipe)
    head = make_head(recipe, student.width, dim).to(device)
    student.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(recipe, planned, [student, head])
    queue = FeatureQueue(planned.queue_size, dim, device)
    average = Average(student, head) if loss_function.momentum else None
    best: dict[str, Tensor] = {}
    best_score = -1.0

    def save(step: int) -> None:
        tensors = {f"student.{name}": value for name, value in student.backbone.state_dict().items()}
        tensors |= {f"head.{name}": value for name, value in head.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in checkpoint.optimizer_tensors(optimizer).items()}
        tensors |= {f"queue.{name}": value for name, value in queue.state().items()}
        tensors |= {f"best.{name}": value for name, value in best.items()}
        if average is not None:
            tensors |= {f"average.{name}": value for name, value in average.student.backbone.state_dict().items()}
            tensors |= {f"average_head.{name}": value for name, value in average.head.state_dict().items()}
            tensors["bags.now"] = bags
        checkpoint.save_keeping(saved, tensors, made, step=step, best_score=best_score)

    step = 0
    if state := _own_state(saved, metrics, made, discard):
        tensors, facts = state
        student.backbone.load_state_dict(checkpoint.under(tensors, "student"))
        head.load_state_dict(checkpoint.under(tensors, "head"))
        checkpoint.load_optimizer(optimizer, checkpoint.under(tensors, "optimizer"))
        queue.load_state(checkpoint.under(tensors, "queue"))
        if average is not None:
            average.student.backbone.load_state_dict(checkpoint.under(tensors, "average"))
            average.head.load_state_dict(checkpoint.under(tensors, "average_head"))
            bags = tensors["bags.now"]
        best, best_score = checkpoint.under(tensors, "best"), float(str(facts["best_score"]))
        step = int(str(facts["step"]))
    first = distributed.rank() == 0
    if first:
        forget_after(metrics, step)

    meter = Meter(device)
    make = Maker(
        seed=recipe.seed,
        loss=loss_function,
        pixels=pixels,
        training=training,
        batch=planned.batch_size,
        size=student.preprocessing.size,
        scale_min=recipe.crop_scale_min,
        target_of=target_of,
        device=device,
        meter=meter,
    )
    model = nn.Sequential(student, head)
    run = None
    if recipe.compile == "on" or (
        recipe.compile == "auto" and device.type == "cuda" and planned.steps - step >= COMPILE_FROM
    ):
        run = devices.compiled_if_faster(model, make(step, bags).views, recipe.compile)
    # DistributedDataParallel goes around everything else: it is what sees the gradients.
    frugal = Frugal(model, student.backbone, distributed.shared(model, device) if distributed.world() > 1 else run)
    rebags = average is not None and loss_function.mates and recipe.bags != "none"
    period = recipe.rebag_epochs if rebags else math.ceil(recipe.epochs)
    last = planned.steps if stop_after is None else min(stop_after, planned.steps)
    shown = planned.batch_size * planned.student_views
    thread = machine.free_cores() > torch.get_num_threads() * distributed.world()
    log = Log(metrics if first else None, device, meter)

    def learn(ready: Ready, keys: Targets | None, masked: Tensor | None, epoch: int) -> dict[str, Tensor]:
        """One forward and backward pass; the loss and its terms, detached."""
        optimizer.zero_grad(set_to_none=True)
        with meter("student"), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            embedded = frugal(ready.views).float()
        with meter("loss"):
            embedded = embedded if loss_function.lengths else normalize(embedded, dim=1)
            parts, targets = embedded.chunk(planned.student_views), ready.targets
            if loss_function.whole:
                parts = tuple(map(distributed.with_gradients, parts))
                assert targets is not None and targets.mate is not None
                targets = Targets(distributed.rows(targets.anchor), distributed.rows(targets.mate))
            queries = Queries(*parts, share=ready.share)  # type: ignore[misc, arg-type]
            terms = loss_function(Batch(queries, targets, keys, queue.negatives(), masked, epoch))
            loss = torch.stack(list(terms.values())).sum()
        with meter("student"), frugal.backward():
            loss.backward()
        return {name: value.detach() for name, value in {"loss": loss, **terms}.items()}

    last_save = time.monotonic()
    # The first step whose loss was not finite; read when a line is written, so that no step waits for it.
    poisoned = torch.full((), -1, device=device)
    with (
        console.bar("distil", planned.steps * shown) as advance,
        profiled(recipe.profile and first, metrics.with_name("trace.json")) as tick,
        signals.deferred(),
    ):
        advance(step * shown)
        while step < last:
            periods = planned.epochs_after(step) // period
            if rebags and step == planned.steps_of(periods * period):
                assert average is not None
                found = store_features(average.student, pixels, training, device)
                bags = distributed.from_first(lambda: knn(found, recipe.bag_size)[0])  # noqa: B023 - called at once
            span = range(step, min(planned.steps_of((periods + 1) * period), last))
            batches = ahead(lambda number: make(number, bags), span, device, thread=thread)  # noqa: B023 - used up before bags change
            while True:
                with meter("wait"):
                    ready = next(batches, None)
                if ready is None:
                    break
                epoch = planned.epochs_after(step)
                torch.manual_seed(hash_seed(recipe.seed, "dropout", step, distributed.rank()))
                keys = None
                if average is not None:
                    with meter("teacher"), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        keys = (
                            Targets(average(ready.fresh))
                            if ready.fresh is not None
                            else Targets(*average(ready.views).chunk(2))
                        )
                rate = learning_rate(step, planned.steps, planned.warmup, planned.peak_lr)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                masked = queue.holding(ready.known) if recipe.mask_mates else None
                losses = frugal.step(learn, ready, keys, masked, epoch)
                with meter("student"):
                    optimizer.step()  # not part of what is tried again: what it had updated would be updated twice
                pushed = keys or ready.targets
                assert pushed is not None
                queue.push(distributed.rows(pushed.anchor.float()), ready.anchors)
                if average is not None:
                    average.follow(student, head, planned.average)
                step += 1

                losses = distributed.mean(losses)
                log.add(losses, shown)
                poisoned = torch.where((poisoned < 0) & ~losses["loss"].isfinite(), step, poisoned)
                advance(shown)
                tick()
                end_of_epoch = planned.epochs_after(step) > epoch or step == planned.steps
                scored: dict[str, float] = {}
                if check is not None and end_of_epoch and (due(epoch + 1, recipe) or step == planned.steps):
                    scored["neighbour_recall"] = check(student)
                    student.train()
                    if recipe.keep_best and scored["neighbour_recall"] > best_score:
                        best_score = scored["neighbour_recall"]
                        best = {name: value.detach().clone() for name, value in student.backbone.state_dict().items()}
                # All leave after the same step, or some would wait for ever.
                signals.pass_on(distributed.largest(signals.heard()))
                stop = signals.heard() > 0
                old = time.monotonic() - last_save
                saving = old > 60 * recipe.save_every_minutes or step in (planned.steps, stop_after) or stop
                saving = saving or (end_of_epoch and old > EPOCH_SAVES_APART)
                saving = saving or (bool(recipe.save_every_steps) and step % recipe.save_every_steps == 0)
                if log.due() or end_of_epoch or saving:
                    mean, shares = log.write(step=step, epoch=epoch, lr=rate, **scored)
                    note = ", ".join(f"{part} {shares[part]:.0%}" for part in ("student", "loss", "wait"))
                    advance(0, note=f"epoch {epoch + 1}/{math.ceil(recipe.epochs)}, loss {mean:.3f}; time: {note}")
                    if not math.isfinite(mean):
                        raise BingoError(_not_finite(int(poisoned), planned, recipe, training, names, metrics, saved))
                if saving:
                    if first:
                        save(step)
                    last_save = time.monotonic()
                if stop:
                    console.say(f"asked to stop: saved at step {step:,} of {planned.steps:,}")
                    last = step
                    break
    if first and log.steps:
        console.say(log.describe())
    distributed.barrier()  # the last checkpoint is there for all
    if best and step == planned.steps:
        student.backbone.load_state_dict(best)
    student.eval()
    return made


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


def _not_finite(
    step: int, planned: Plan, recipe: Recipe, training: Tensor, names: Sequence[str], metrics: Path, saved: Path
) -> str:
    """What to say of a step (counted from 1) whose loss was not finite; the names of its images go into a file beside
    the metrics.
    """
    epoch = planned.epochs_after(step - 1)
    images = training[anchors_of(recipe.seed, step - 1, planned.batch_size, len(training))].tolist()
    batch = [names[image] if names else str(image) for image in images]
    file = metrics.with_name("not_finite.json")
    write_text(file, json.dumps({"step": step, "epoch": epoch + 1, "images": batch}, indent=1) + "\n")
    kept = f"the save in {saved.parent} is of an earlier step" if saved.exists() else "nothing was saved yet"
    rate = learning_rate(step - 1, planned.steps, planned.warmup, planned.peak_lr)
    return (
        f"the loss is not finite at step {step} (epoch {epoch + 1}), of the images {', '.join(batch[:3])}, ... (all"
        f" {len(batch)} in {file}); {kept}: look at the images and go on with --resume, or start anew with --overwrite"
        f" and a smaller rate, for example --set lr={rate / 2:.2g}"
    )
