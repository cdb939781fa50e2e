"""The training loop, top to bottom. It owns all state; every random number comes from (seed, epoch, step), so a resumed run draws the same."""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bingo_compress import augment, checkpoint, screen
from bingo_compress.bagging import knn
from bingo_compress.embed import hash_seed, store_features
from bingo_compress.encoder import Encoder, ProjectionHead, RegressionHead
from bingo_compress.errors import BingoError
from bingo_compress.feature_queue import FeatureQueue
from bingo_compress.losses import Batch, Loss, Queries, Targets, make_loss
from bingo_compress.pixels import PixelStore
from bingo_compress.recipe import Recipe
from bingo_compress.schedule import learning_rate

LOG_SECONDS = 5.0
ADAMW_BELOW = 50_000
SLOW_AVERAGE, QUICK_AVERAGE = 0.999, 0.99
TargetOf = Callable[[Tensor, torch.Generator], Tensor]
Check = Callable[[Encoder], float]


@dataclass(frozen=True)
class Plan:
    """What a recipe means for a folder of a given size: nothing in it is a setting, all of it follows."""

    batch_size: int
    steps_per_epoch: int
    steps: int
    warmup: int
    optimizer: str
    peak_lr: float
    queue_size: int
    student_views: int
    average: float

    def describe(self) -> str:
        """One line for the screen."""
        return (
            f"{self.steps:,} steps of {self.batch_size} anchors x {self.student_views} student views; {self.optimizer}, peak learning rate {self.peak_lr:.3g}, "
            f"warm-up {self.warmup:,} steps; queue {self.queue_size:,}"
        )


def plan(recipe: Recipe, images: int) -> Plan:
    """The plan for a training set of `images`. Raises BingoError when there are too few for the bags."""
    if images < recipe.bag_size + 1 or images < 2:
        raise BingoError(
            f"--data: expected more images than a bag holds ({recipe.bag_size}), found {images} to train on; add images or lower --bag-size"
        )
    batch = min(recipe.batch_size, images)
    each = images // batch
    steps = each * recipe.epochs
    optimizer = recipe.optimizer if recipe.optimizer != "auto" else "adamw" if steps < ADAMW_BELOW else "sgd"
    peak = recipe.lr or (0.03 * batch / 256 if optimizer == "sgd" else 0.003 * math.sqrt(batch / 128))
    warmup = round(recipe.warmup_epochs * each) if recipe.warmup_epochs >= 0 else 0 if optimizer == "sgd" else round(0.05 * steps)
    average = recipe.average or (SLOW_AVERAGE if steps >= ADAMW_BELOW else QUICK_AVERAGE)
    views = 3 if loss_of(recipe).official else 2
    return Plan(batch, each, steps, warmup, optimizer, peak, min(recipe.queue_size, images), views, average)


def loss_of(recipe: Recipe) -> Loss:
    """The recipe's method with its settings."""
    return make_loss(recipe.method, recipe.model_dump())


def make_head(recipe: Recipe, width: int, dim: int) -> nn.Module:
    """The student's head for training, random by the recipe's seed: the paper's, or what the method defines."""
    torch.manual_seed(hash_seed(recipe.seed, "head"))
    if loss_of(recipe).regression:
        return RegressionHead(width, recipe.head_hidden, dim)
    return ProjectionHead(width, recipe.head_hidden, dim)


def pick_mates(bags: Tensor, anchors: Tensor, generator: torch.Generator) -> Tensor:
    """One member of each anchor's bag, drawn uniformly; the anchor itself where the bag is empty. bags: (n, K), its -1 at the ends of the rows."""
    rows = bags[anchors]
    sizes = (rows >= 0).sum(1)
    drawn = torch.rand(len(anchors), generator=generator)
    if not rows.shape[1]:
        return anchors
    picked = (drawn * sizes).long().clamp(max=rows.shape[1] - 1)
    return torch.where(sizes > 0, rows.gather(1, picked[:, None])[:, 0], anchors)


class Average:
    """The moving average of student and head (MoCo's key encoder), buffers included and always in eval mode (EMAN, arXiv 2101.08482): no batch leaks in."""

    def __init__(self, student: Encoder, head: nn.Module) -> None:
        self.student, self.head = copy.deepcopy(student).eval(), copy.deepcopy(head).eval()

    @torch.no_grad()
    def follow(self, student: Encoder, head: nn.Module, share: float) -> None:
        """Keep `share` of the average, take the rest from the models; counters are copied."""
        for mine, theirs in ((self.student, student), (self.head, head)):
            for own, new in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
                if own.is_floating_point():
                    own.lerp_(new, 1 - share)
                else:
                    own.copy_(new)

    @torch.no_grad()
    def __call__(self, views: Tensor) -> Tensor:
        """Keys (B, dim) of length one."""
        keys: Tensor = self.head(self.student(views))
        return normalize(keys.float(), dim=1)


def make_optimizer(recipe: Recipe, planned: Plan, modules: list[nn.Module]) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 as in the paper, or AdamW, which leaves biases and norms undecayed."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    fused = parameters[0].is_cuda
    if planned.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=planned.peak_lr, momentum=0.9, weight_decay=recipe.weight_decay, fused=fused)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=planned.peak_lr, fused=fused)


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
    stop_after: int | None = None,
) -> None:
    """Train `student` in place on the images `training` (n,) of `pixels`; go on from the checkpoint `saved` if it is there.

    bags: (n, K) positions in `training`, -1 for an empty place. target_of: the teacher's embedding (B, dim) of images, None for methods without
    teacher. metrics: appended to, one JSON object a line. check: scores the student every recipe.check_every epochs; with recipe.keep_best
    the best-scored student is what is left. stop_after: leave after this many steps, as an interruption would (tests).
    Raises BingoError when the loss is not finite.
    """
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
        checkpoint.save(saved, tensors, step=step, steps=planned.steps, best_score=best_score)

    step = 0
    if saved.exists():
        tensors, facts = checkpoint.load(saved)
        if "best_score" not in facts:
            raise BingoError(f"--resume: {saved} is of an earlier version, whose held-out images were others; start anew with --overwrite")
        if (facts["steps"], len(tensors["queue.rows"])) != (planned.steps, planned.queue_size):
            raise BingoError(f"--resume: {saved} is of a run on another number of images; start anew with --overwrite")
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
    _forget_after(metrics, step)

    size, batch = student.preprocessing.size, planned.batch_size
    log = _Log(metrics, planned.student_views)
    last_save = time.monotonic()
    with screen.bar("distil", planned.steps * batch * planned.student_views) as advance:
        advance(step * batch * planned.student_views)
        order = torch.empty(0, dtype=torch.int64)
        while step < planned.steps and step != stop_after:
            epoch, within = divmod(step, planned.steps_per_epoch)
            if within == 0 or not len(order):
                order = torch.randperm(len(training), generator=torch.Generator().manual_seed(hash_seed(recipe.seed, "order", epoch)))
            if within == 0 and epoch % recipe.rebag_epochs == 0 and average is not None and loss_function.mates and recipe.bags != "none":
                bags = knn(store_features(average.student, pixels, training, device), recipe.bag_size)[0]
            seed = hash_seed(recipe.seed, "step", step)
            generator = torch.Generator().manual_seed(seed)
            torch.manual_seed(seed)  # for students with dropout

            def view(images: Tensor, drawing: torch.Generator = generator) -> Tensor:
                drawn = augment.draw(pixels.aspect[images], drawing, recipe.crop_scale_min)
                return augment.apply(pixels.batch(images), drawn, size).contiguous(memory_format=torch.channels_last)

            anchors = order[within * batch : (within + 1) * batch]
            mates = pick_mates(bags, anchors, generator) if loss_function.mates else anchors
            images, shown = training[anchors], training[mates]
            views = view(torch.cat((images, shown)))
            share = 1.0
            if loss_function.official:
                mixed, share = augment.cutmix(views[:batch], views[batch:], generator)
                views = torch.cat((views, mixed)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                embedded = head(student(views)).float()
                keys = None
                if average is not None:
                    keys = Targets(*average(views).split(batch)) if loss_function.momentum == "views" else Targets(average(view(images)))
            embedded = embedded if loss_function.lengths else normalize(embedded, dim=1)
            queries = Queries(*embedded.split(batch), share=share)  # type: ignore[misc]
            targets = None
            if target_of is not None:
                targets = Targets(target_of(images, generator), target_of(shown, generator) if loss_function.both else None)
            known = torch.cat((anchors[:, None], bags[anchors]), dim=1) if loss_function.mates else anchors[:, None]
            masked = queue.holding(known) if recipe.mask_mates else None
            terms = loss_function(Batch(queries, targets, keys, queue.negatives(), masked, epoch))
            loss = torch.stack(list(terms.values())).sum()

            rate = learning_rate(step, planned.steps, planned.warmup, planned.peak_lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            pushed = keys or targets
            assert pushed is not None
            queue.push(pushed.anchor, anchors)
            if average is not None:
                average.follow(student, head, planned.average)
            step += 1

            log.add(loss, terms, batch * planned.student_views)
            advance(batch * planned.student_views)
            end_of_epoch = step % planned.steps_per_epoch == 0
            scored: dict[str, float] = {}
            if check is not None and end_of_epoch and ((epoch + 1) % recipe.check_every == 0 or step == planned.steps):
                scored["neighbour_recall"] = check(student)
                student.train()
                if recipe.keep_best and scored["neighbour_recall"] > best_score:
                    best_score = scored["neighbour_recall"]
                    best = {name: value.detach().clone() for name, value in student.backbone.state_dict().items()}
            saving = time.monotonic() - last_save > 60 * recipe.save_every_minutes or step in (planned.steps, stop_after)
            if log.due() or end_of_epoch or saving:
                mean = log.write(step=step, epoch=epoch, lr=rate, **scored)
                advance(0, note=f"epoch {epoch + 1}/{recipe.epochs}, loss {mean:.3f}")
                if not math.isfinite(mean):
                    raise BingoError(
                        f"the loss is not finite at step {step} (epoch {epoch + 1}); the last checkpoint is in {saved.parent}: lower --set lr={rate / 2:.2g} "
                        f"and start anew with --overwrite, or look at the images of this batch: {', '.join(map(str, training[anchors][:5].tolist()))}, ..."
                    )
            if saving:
                save(step)
                last_save = time.monotonic()
    if best and step == planned.steps:
        student.backbone.load_state_dict(best)
    student.eval()


class _Log:
    """Losses summed on the device and read only when a line is due, so that the GPU is not waited for in every step."""

    def __init__(self, path: Path, student_views: int) -> None:
        self._path = path
        self._start = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._since = time.monotonic()

    def add(self, loss: Tensor, terms: dict[str, Tensor], images: int) -> None:
        for name, value in {"loss": loss, **terms}.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self._steps += 1
        self._images += images

    def due(self) -> bool:
        return time.monotonic() - self._since >= LOG_SECONDS

    def write(self, step: int, epoch: int, lr: float, **scored: float) -> float:
        """Append one line of means since the last one, and what was scored; images_per_s counts student views. Returns the mean loss."""
        means = {name: float(value) / self._steps for name, value in self._sums.items()}
        now = time.monotonic()
        line = {
            "step": step,
            "epoch": epoch,
            **means,
            **scored,
            "lr": lr,
            "images_per_s": self._images / (now - self._since),
            "seconds": now - self._start,
        }
        rounded = {key: _short(value) for key, value in line.items()} | {"time": round(time.time(), 3)}
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(rounded) + "\n")
        self._clear()
        return means["loss"]


def _short(value: float) -> float | None:
    """Six digits; None (JSON's null) for what JSON has no number for."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that will be run again."""
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        metrics.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step), encoding="utf-8")
