"""A whole run, decided before it begins: what a recipe leaves open, filled in, and all that follows from it. What no
run can do is refused here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bingo_compress.data import pixel_store, quarantine
from bingo_compress.data.hashing import hashed
from bingo_compress.data.image_list import ImageList
from bingo_compress.data.listing import list_images
from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import Encoder
from bingo_compress.models.names import resolve_names
from bingo_compress.models.trained import Models
from bingo_compress.recipe import GIVEN, Recipe, whole
from bingo_compress.runtime import console, devices, distributed, machine
from bingo_compress.sources.opened import of_recipe
from bingo_compress.training.losses import Loss, make_loss, settled

SLOW_AVERAGE, QUICK_AVERAGE = 0.999, 0.99
ADAMW_BELOW = 50_000
FEW_STEPS = 50  # AdamW's first steps are as long as its rate, whatever the gradient
HELD_AT_MOST = 1000
GALLERY_AT_MOST, CHECK_GALLERY = 20_000, 2000  # images that those are sought among: at the end, during training


def begin(recipe: Recipe) -> tuple[Recipe, ImageList, torch.device]:
    """(the recipe with names and settings filled in, the files of its folder, the device): all that is known before
    there are models. Raises BingoError for what no run could do.
    """
    device = devices.choose_device(recipe.device)
    folder = take(recipe)
    schedule(recipe, len(folder.files))
    refuse_few_held(recipe, held_out(recipe, len(folder.files)))
    return resolve(recipe), folder, device


def take(recipe: Recipe) -> ImageList:
    """The files of recipe.data, exact copies counted on screen and dropped where the recipe says so, with the recipe's
    limit on bad files. Raises BingoError.
    """
    folder = replace(hashed(list_images(of_recipe(recipe))), max_bad=recipe.max_bad)
    found = quarantine.copies(folder)
    quarantine.say_copies(found, recipe.duplicates)
    if recipe.duplicates == "drop":
        left_out = {name for name, _ in found}
        kept = [index for index, name in enumerate(folder.files) if name not in left_out]
        folder = replace(folder.only(kept), copies=tuple(found))
    return folder


def held_out(recipe: Recipe, images: int) -> int:
    """How many of so many images are kept out of training."""
    return min(int(images * recipe.hold_out), HELD_AT_MOST)


def refuse_few_held(recipe: Recipe, held: int) -> None:
    """Raise BingoError where checks are asked for and `held` images are too few to choose by and to report on."""
    if (recipe.keep_best and held < 2) or (recipe.check_every and not held):
        raise BingoError(
            f"--keep-best: expected 2 or more images held out, found {held}; add images or raise --set hold_out=0.05"
        )


def resolve(recipe: Recipe, say: Callable[[str], None] = console.say) -> Recipe:
    """`resolve_names` and `settle`."""
    return settle(resolve_names(recipe, say))


def settle(recipe: Recipe) -> Recipe:
    """What was left to the method is filled in: temperatures, and what a target is. Raises BingoError."""
    chosen = recipe.stored_views
    if chosen == "auto":
        chosen = "mean" if loss_of(recipe).averaged and recipe.views != "online" else "drawn"
    if chosen == "mean" and recipe.views == "online":
        raise BingoError(
            "--set stored_views=mean: expected stored views to take the mean of, found --views online; give --views 4"
        )
    fills = fills_queue(recipe) and loss_of(recipe).averaged
    start = recipe.queue_start if recipe.queue_start != "auto" else "targets" if fills else "empty"
    filled = settled(recipe.method, recipe.model_dump()) | {"stored_views": chosen, "queue_start": start}
    return recipe.model_copy(update=filled | by_start(recipe))


def knows(recipe: Recipe) -> bool:
    """Whether a resolved recipe's student knows something already."""
    return recipe.student_weights not in ("random", GIVEN)


def usual_epochs(recipe: Recipe) -> int:
    """Epochs of a resolved recipe that leaves them open."""
    return 10 if knows(recipe) else 100


def by_start(recipe: Recipe) -> dict[str, Any]:
    """What is left open of how a student learns that knows something already (docs/results.md, "Pretrained starts"),
    and one that does not. A module of the user's own counts as one that does not.
    """
    known = knows(recipe)
    return {
        "epochs": recipe.epochs or (0 if recipe.time else usual_epochs(recipe)),
        "crop_scale_min": recipe.crop_scale_min or (0.2 if known or not loss_of(recipe).teacher else 0.6),
        "backbone_lr": recipe.backbone_lr or (0.1 if known else 1.0),
        "head_first": recipe.head_first if recipe.head_first >= 0 else 0.25 if known else 0.0,
        "norms": recipe.norms if recipe.norms != "auto" else "frozen" if known else "learnt",
    }


def fills_queue(recipe: Recipe) -> bool:
    """Whether there are stored targets that the queue can begin with."""
    loss = loss_of(recipe)
    return loss.negatives and loss.teacher and not loss.momentum and recipe.views != "online"


@dataclass(frozen=True)
class Schedule:
    """Steps and rates for a training set of `images`: nothing in it is a setting, all of it follows.

    Every batch is full (`anchors_of`): an epoch may end within one, and the run's last one is filled up with images of
    the epoch that would come next. A smaller last batch would let BatchNorm learn from a few views, and could not be
    shared among processes.
    """

    images: int
    batch_size: int
    steps: int
    warmup: int
    head_steps: int
    optimizer: str
    peak_lr: float
    backbone_lr: float
    queue_size: int
    student_views: int
    average: float

    def steps_of(self, epochs: float) -> int:
        """Steps after which so many epochs are complete."""
        return steps_of(epochs, self.images, self.batch_size)

    def epochs_after(self, steps: int) -> int:
        """Epochs that are complete after so many steps: also the number, from 0, of the epoch that the next step's
        first anchor belongs to.
        """
        return steps * self.batch_size // self.images

    def backbone_rate(self, step: int) -> float:
        """Learning rate of the student under its head in the step after `step`; it waits for its own beginning."""
        own, steps = step - self.head_steps, self.steps - self.head_steps
        return learning_rate(own, steps, self.warmup, self.backbone_lr) if own >= 0 else 0.0

    def describe(self) -> str:
        """One line for the screen."""
        known = f", of the student under its head {self.backbone_lr:.3g}" if self.backbone_lr != self.peak_lr else ""
        known += f" from step {self.head_steps:,} on" if self.head_steps else ""
        return (
            f"{self.steps:,} steps of {self.batch_size} anchors x {self.student_views} student views; {self.optimizer},"
            f" peak learning rate {self.peak_lr:.3g}{known}, warm-up {self.warmup:,} steps; queue {self.queue_size:,}"
        )


def steps_of(epochs: float, images: int, batch: int) -> int:
    """Batches that hold each of the images an anchor `epochs` times, the last one filled up."""
    return -(-round(epochs * images) // batch)


def schedule(recipe: Recipe, images: int) -> Schedule:
    """The schedule for a training set of `images`. Raises BingoError when there are too few for the bags."""
    if bagged(recipe) and images <= recipe.bag_size:
        raise BingoError(
            f"--data: expected more images than a bag holds ({recipe.bag_size}), found {images} to train on; add images"
            " or lower --bag-size"
        )
    if images < 2:
        raise BingoError(f"--data: expected images, found {images} to train on; add some")
    batch = min(recipe.batch_size, images)
    if batch % distributed.world():
        raise BingoError(f"--batch-size: expected a multiple of the {distributed.world()} processes, found {batch}")
    steps = steps_of(recipe.epochs, images, batch)
    optimizer = recipe.optimizer if recipe.optimizer != "auto" else "adamw" if steps < ADAMW_BELOW else "sgd"
    peak = recipe.lr or (0.03 * batch / 256 if optimizer == "sgd" else 0.003 * math.sqrt(batch / 128))
    if optimizer == "adamw" and not recipe.lr and knows(recipe):
        peak *= min(1, steps / FEW_STEPS)
    warmup = (
        round(recipe.warmup_epochs * images / batch)
        if recipe.warmup_epochs >= 0
        else 0
        if optimizer == "sgd"
        else round(0.05 * steps)
    )
    average = recipe.average or (SLOW_AVERAGE if steps >= ADAMW_BELOW else QUICK_AVERAGE)
    views = student_views(loss_of(recipe))
    head_steps = round(max(recipe.head_first, 0) * steps)
    return Schedule(
        images,
        batch,
        steps,
        warmup,
        head_steps,
        optimizer,
        peak,
        peak * (recipe.backbone_lr or 1),
        min(recipe.queue_size, images),
        views,
        average,
    )


def student_views(loss: Loss) -> int:
    """Views of an anchor that the student sees in a step."""
    return 3 if loss.official else 2


def loss_of(recipe: Recipe) -> Loss:
    """The recipe's method with its settings."""
    return make_loss(recipe.method, recipe.model_dump())


def bagged(recipe: Recipe) -> bool:
    """Whether an image has mates."""
    return loss_of(recipe).mates and recipe.bags != "none"


@dataclass(frozen=True)
class TeacherShape:
    """What a plan has to know of a teacher. width: dimensions of its features; embedding: of what targets are made of,
    which is something else where its checkpoint brought a projection head (projected).
    """

    width: int
    embedding: int
    projected: bool


def shape_of(teacher: Encoder) -> TeacherShape:
    """Asks a teacher with a projection head once."""
    return TeacherShape(teacher.width, teacher.embedding_width(), teacher.projection is not None)


@dataclass(frozen=True)
class Plan:
    """A run with nothing left open. Run, dry run and comparison read it and decide nothing of this themselves.

    recipe: its names, sizes and threads filled in; online: the teacher is run in every step; views: of the teacher that
    are stored an image, 0 where it is online or there is none; target: what is made of the teacher's embeddings, "" for
    a method without teacher; dim: dimensions of a target and of what the student's head gives; step_bytes: memory of a
    training step beside the pixels.
    """

    recipe: Recipe
    device: torch.device
    teacher: TeacherShape
    schedule: Schedule
    loss: Loss
    online: bool
    views: int
    target: str
    dim: int
    step_bytes: int

    def on(self, images: int) -> "Plan":
        """The same run on another number of images to train on: some cannot be decoded, some are held out. Raises
        BingoError for too few.
        """
        return replace(make_plan(self.recipe, images, self.device, self.teacher), step_bytes=self.step_bytes)

    @property
    def side(self) -> int:
        """Pixels of the short side of the stored pictures."""
        return pixel_store.store_side(self.recipe.image_size, self.recipe.teacher_size)

    @property
    def packed(self) -> bool:
        """Whether stored views are in the target space, a byte a number."""
        return self.views > 0 and self.recipe.stored_as == "int8"

    @property
    def stored_bytes(self) -> int:
        """That the teacher's pass stores an image: features, embedding and views."""
        return 2 * (self.teacher.width + self.teacher.embedding) + self.views * self.view_bytes

    @property
    def joined_bytes(self) -> int:
        """The same of a run that goes on with what array jobs stored: until all views are packed, they are there as the
        teacher gave them, too.
        """
        return self.stored_bytes + (2 * self.views * self._source if self.packed else 0)

    @property
    def view_bytes(self) -> int:
        """That it stores an image and view; packed: numbers, their step and how close the view is to the image."""
        return self.dim + 2 + 4 if self.packed else 2 * self._source

    @property
    def target_bytes(self) -> int:
        """That targets take an image beside the views that they are made of."""
        kept = min(self.views, 1) if self.recipe.stored_views == "mean" else self.views
        return 0 if self.packed else 2 * self.dim * kept

    @property
    def asked(self) -> int:
        """Teacher views an anchor and step: 0 unless the teacher is online."""
        return (2 if self.loss.both else 1) if self.online else 0

    @property
    def rebags(self) -> bool:
        """Whether bags are rebuilt from the student's own moving average."""
        return bool(self.loss.momentum) and bagged(self.recipe)

    @property
    def _source(self) -> int:
        return self.teacher.width if self.loss.regression else self.teacher.embedding

    @property
    def phases(self) -> list[tuple[int, float]]:
        """(first step, share of all steps) of each stretch within which all steps cost the same: of the head alone or
        not.
        """
        alone, steps = self.schedule.head_steps, self.schedule.steps
        shares = ((0, alone / steps), (alone, (steps - alone) / steps))
        return [(start, share) for start, share in shares if share]

    def lasting(self, epochs: float, **changes: Any) -> "Plan":
        """The same run for so many epochs, with other `changes` of its recipe."""
        recipe = self.recipe.model_copy(update={"epochs": whole(float(epochs))} | changes)
        return replace(self, recipe=recipe).on(self.schedule.images)

    def describe(self) -> str:
        """One line for the screen."""
        target = f"targets: {self.target}" if self.target else "targets: the moving average's"
        about = "about " if self.recipe.time else ""
        return f"{about}{self.schedule.describe()}; {target}, {self.dim} wide"


def make_plan(recipe: Recipe, images: int, device: torch.device, teacher: TeacherShape) -> Plan:
    """The plan of a resolved recipe for a training set of `images`. Raises BingoError."""
    loss = loss_of(recipe)
    online = loss.teacher and recipe.views == "online"
    views = int(recipe.views) if loss.teacher and not online else 0
    target, dim = "", recipe.target_dim
    if loss.teacher:
        plain = "raw" if loss.regression or teacher.projected else "pca"
        target = plain if recipe.target == "auto" else recipe.target
        width = teacher.width if loss.regression else teacher.embedding
        dim = min(recipe.target_dim, width, images - 1) if target in ("pca", "whitened") else width
    when = schedule(recipe, images)
    return Plan(recipe, device, teacher, when, loss, online, views, target, dim, pixel_store.WORK)


def plan_run(models: Models, images: int, device: torch.device, threads: int = 0) -> Plan:
    """The plan for these models: threads settled, a step's memory measured. threads: of the run that goes on. Raises
    BingoError over --memory.
    """
    student = models.student
    recipe = devices.use_threads(models.recipe, student, student.preprocessing.size, device, threads)
    made = make_plan(recipe, images, device, shape_of(models.teacher))
    return replace(made, step_bytes=_step_bytes(made, student))


def _step_bytes(plan: Plan, student: Encoder) -> int:
    """Bytes of memory that this process needs for a training step, beside what it holds and the pixels. Raises
    BingoError over recipe.memory.
    """
    if plan.device.type == "cuda":
        return pixel_store.WORK
    batch = plan.schedule.batch_size
    step, limit, held = (
        devices.step_bytes(
            student, student.preprocessing.size, batch * plan.schedule.student_views // distributed.world()
        ),
        machine.parse_memory(plan.recipe.memory),
        machine.resident(),
    )
    if limit and held + step > limit:
        fits = int(batch * (limit - held - devices.BESIDE) / (step - devices.BESIDE))
        way = f"lower --batch-size to {fits}" if fits >= 2 else "lower --image-size"
        raise BingoError(
            f"--memory: expected room for a step of {batch} anchors, about {console.size(step)} beside the"
            f" {console.size(held)} in use, found {console.size(limit)}; {way}, or raise --memory"
        )
    return step


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to zero at `total` (SGDR without restarts). step counts from
    0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
