"""What a run costs by stage, from rates measured on this machine; and the teacher views and epochs that fit into its
time.

They are chosen twice: before the run from a few images and steps, and the epochs for good when only training is left,
from the time that has gone by and from real steps.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bingo_compress.data import augment
from bingo_compress.data.decode import decode_all
from bingo_compress.data.image_list import ImageList
from bingo_compress.data.pixel_store import store_of
from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import Encoder
from bingo_compress.models.trained import Models
from bingo_compress.recipe import whole
from bingo_compress.runtime import console, distributed, machine
from bingo_compress.runtime.devices import saved_bytes
from bingo_compress.training.loader import Lessons
from bingo_compress.training.loop import CHECKS, rehearse
from bingo_compress.training.plan import CHECK_GALLERY, GALLERY_AT_MOST, Plan, held_out, usual_epochs
from bingo_compress.training.state import make_head

SAMPLE = 64  # images that are decoded
VIEWS = {"cpu": 16, "cuda": 128}  # that a student is tried on
TEACHER_VIEWS = {"cpu": 4, "cuda": 64}
QUICK = 1.0  # seconds: what takes less is done once more, warm
AIM = 0.97  # of the time: a little early is better than late
TEACHER_SHARE = 0.25  # of the time, at most, for views that nobody asked for
LITTLE = 1000  # steps, or one epoch: less is hardly training
REHEARSED, AT_MOST = 0.02, 30.0  # of the time, seconds: a busy machine has its moments
UNUSUAL = 3  # times more epochs than usual, or fewer


@dataclass(frozen=True)
class Rates:
    """Seconds: decode: of an image; teacher, plain: of a view through the teacher, or the student; learnt: of one
    through the student and back; teacher_made, made: of cutting a view and changing its colours. activations: bytes
    that the student keeps of a view for the way back.
    """

    decode: float
    teacher: float
    teacher_made: float
    learnt: float
    plain: float
    made: float
    activations: float


def measure(plan: Plan, models: Models, folder: ImageList) -> Rates:
    """The rates of a run, in some seconds; nothing of it changes. Raises BingoError where no image can be decoded."""
    device, sizes = plan.device, (models.teacher.preprocessing.size, models.student.preprocessing.size)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        learnt, plain, activations = _student(plan, copy.deepcopy(models.student))
        teacher, (teacher_made, made) = _teacher(models.teacher, device), (_made(plan, size) for size in sizes)
        return Rates(_decode(folder), teacher, teacher_made, learnt, plain, made, activations)


def step_seconds(plan: Plan, rates: Rates) -> float:
    """Of a training step, the mean over the plan's phases; a free core or a GPU's side stream makes the next batch
    meanwhile.
    """
    own = plan.schedule.batch_size / distributed.world()
    views = own * plan.schedule.student_views
    learning = 0.0
    for start, share in plan.phases:
        each = rates.plain if start < plan.schedule.head_steps else rates.learnt
        learning += share * views * each
    making = views * rates.made + own * plan.asked * rates.teacher
    apart = plan.device.type == "cuda" or machine.free_cores() > torch.get_num_threads() * distributed.world()
    return max(learning, making) if apart else learning + making


def stages(plan: Plan, rates: Rates, count: int, held: int) -> dict[str, float]:
    """Seconds by stage of a run on a folder of `count` images, `held` of them held out."""
    checks, epoch = _training(plan, rates, held, step_seconds(plan, rates))
    return {
        "decode images": count * rates.decode,
        f"teacher, {plan.views + 1} views": _teacher_pass(rates, count, plan.views),
        f"distil, {plan.schedule.steps:,} steps": checks + plan.recipe.epochs * epoch,
        "check held-out images": _closing(plan, rates, held),
    }


def expected(plan: Plan, rates: Rates, count: int, gone: float, *, any_views: bool, refuse: bool = True) -> Plan:
    """The plan with the views, and for now the epochs, that fit into its time, and a line that says so. gone: seconds
    of it; any_views: nobody said how many. refuse: raise BingoError where hardly any training fits.
    """
    recipe, seconds = plan.recipe, machine.parse_time(plan.recipe.time)
    views = fitting_views(plan.views, rates, count, TEACHER_SHARE * seconds) if any_views else plan.views
    held = held_out(recipe, count)
    found = plan.on(count - held).lasting(usual_epochs(recipe), **({"views": str(views)} if views < plan.views else {}))
    checks, epoch = _training(found, rates, held, step_seconds(found, rates))
    other = gone + count * rates.decode + _teacher_pass(rates, count, views) + checks + _closing(found, rates, held)
    least = least_epochs(found)
    epochs = fitting_epochs(AIM * seconds - other, epoch, least)
    late = epochs * epoch + other - seconds
    epochs, late = distributed.from_first(lambda: (epochs, late))
    if refuse and late > 0:
        raise BingoError(
            f"--time {recipe.time}: expected time for all stages and {_told(least)}, found too little: about"
            f" {console.duration((other + least * epoch) / AIM)} here; give that, fewer images, smaller sizes or a"
            " smaller teacher"
        )
    found = found.lasting(epochs)
    stored = f", with {views} stored view{'s' * (views != 1)} of the teacher" if views else ""
    if views < plan.views:
        stored += (
            f" (not {plan.views}: their pass would take {console.duration(_teacher_pass(rates, count, plan.views))})"
        )
    console.say(f"--time {recipe.time}: about {_told(epochs)} fit{stored}; from rates measured now")
    return found


def settled(plan: Plan, rates: Rates, student: Encoder, lessons: Lessons, held: int, began: float) -> Plan:
    """The plan with the epochs that fit into what is left of its time, which began at `began` of the monotonic clock:
    for good, the same for all processes, and no more a plan with a time.
    """
    recipe, seconds = plan.recipe, machine.parse_time(plan.recipe.time)
    console.say(f"--time {recipe.time}: some steps are timed, on a copy of the student")
    getting_ready, step = rehearse(plan, student, lessons, min(REHEARSED * seconds, AT_MOST))
    checks, epoch = _training(plan, rates, held, step)
    gone = time.monotonic() - began
    other = gone + getting_ready + checks + _closing(plan, rates, held)
    epochs = fitting_epochs(AIM * seconds - other, epoch, least_epochs(plan))
    late = other + epochs * epoch - seconds
    gone, step, epochs, late = distributed.from_first(lambda: (gone, step, epochs, late))
    found = plan.lasting(epochs, time="")
    fit = "fit" if late <= 0 else f"are the least, and will end {console.duration(late)} late"
    console.say(
        f"--time {recipe.time}: decode, teacher and bags are done after {console.duration(gone)};"
        f" {_told(epochs)} ({found.schedule.steps:,} steps of {step:.2g} s) {fit}"
    )
    usual = usual_epochs(recipe)
    if epochs > UNUSUAL * usual:
        console.say(f"that is more than {UNUSUAL} times the usual {usual} epochs; so many are not known to be better")
    if epochs < usual / UNUSUAL:
        console.say(f"that is less than a third of the usual {usual} epochs; more time makes a better student")
    return found


def fitting_views(wanted: int, rates: Rates, count: int, seconds: float) -> int:
    """Views of the teacher, at most `wanted` and at least 1 of them, whose pass over `count` images takes so long."""
    first, more = (_teacher_pass(rates, count, views) for views in (0, 1))
    return min(wanted, max(1, int((seconds - first) / max(more - first, 1e-9))))


def fitting_epochs(seconds: float, epoch: float, least: float) -> float:
    """Epochs of `epoch` seconds each, in three digits; at least `least`."""
    return max(least, float(f"{max(seconds, 0) / epoch:.3g}"))


def least_epochs(plan: Plan) -> float:
    """Fewer are hardly training: one, or LITTLE steps of a large folder."""
    return float(f"{min(1.0, LITTLE * plan.schedule.batch_size / plan.schedule.images):.3g}")


def _told(epochs: float) -> str:
    return f"{whole(float(epochs)):,} epoch{'s' * (epochs != 1)}"


def _teacher_pass(rates: Rates, count: int, views: int) -> float:
    image = rates.decode + rates.teacher + views * (rates.teacher + rates.teacher_made)
    return count * image / distributed.world()


def _training(plan: Plan, rates: Rates, held: int, step: float) -> tuple[float, float]:
    """(seconds of the checks whose number no epochs change, seconds of an epoch)."""
    recipe, images, look = plan.recipe, plan.schedule.images, rates.plain / distributed.world()
    check = look * (held + min(images, CHECK_GALLERY))
    epoch = images / plan.schedule.batch_size * step
    epoch += check / recipe.check_every if recipe.check_every else 0
    epoch += look * images / recipe.rebag_epochs if plan.rebags else 0
    return (CHECKS * check if recipe.keep_best and not recipe.check_every else 0.0), epoch


def _closing(plan: Plan, rates: Rates, held: int) -> float:
    """Of the check of the student and of its start."""
    images = held + min(plan.schedule.images, GALLERY_AT_MOST) if held else 0
    return images * (rates.decode + 2 * rates.plain) / distributed.world()


# ---------------------------------------------------------------- measured


def _decode(folder: ImageList) -> float:
    sample = range(0, len(folder.files), max(1, len(folder.files) // SAMPLE))
    start = time.perf_counter()
    good = sum(
        not isinstance(result, Exception) for _, result in decode_all(folder, sample, lambda pixels: pixels.shape)
    )
    if not good:
        raise BingoError(
            f"--data: expected images, found none that can be decoded among {len(sample)} tried in {folder.where}"
        )
    return (time.perf_counter() - start) / len(sample)


def _teacher(teacher: Encoder, device: torch.device) -> float:
    size = teacher.preprocessing.size
    teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = _noise(TEACHER_VIEWS[device.type], size, device)
    with torch.inference_mode():
        return _seconds(lambda: teacher(batch), device) / len(batch)


def _student(plan: Plan, student: Encoder) -> tuple[float, float, float]:
    """`Rates.learnt`, `plain` and `activations`."""
    device, views = plan.device, plan.schedule.batch_size * plan.schedule.student_views
    head = make_head(plan, student.width).to(device)
    student.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    batch = _noise(min(views, VIEWS[device.type]), student.preprocessing.size, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            head(student(batch)).sum().backward()

    saved = saved_bytes(step)  # first: it also warms up
    learnt = _seconds(step, device)
    student.eval()
    with torch.inference_mode():
        plain = _seconds(lambda: student(batch), device)
    return learnt / len(batch), plain / len(batch), saved / len(batch)


def _made(plan: Plan, size: int) -> float:
    """Of a view of `size`, on a CPU: a GPU makes them in a small part of the time that its models take."""
    if plan.device.type == "cuda":
        return 0.0
    count, generator = VIEWS["cpu"], torch.Generator().manual_seed(0)
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (plan.side, plan.side, 3), dtype=np.uint8) for _ in range(count)]
    store = store_of(pictures, torch.ones(count), plan.device)
    drawn = augment.draw(store.aspect, generator, plan.recipe.crop_scale_min)
    return (
        _seconds(lambda: augment.apply(store.crops(torch.arange(count), drawn.box, size), drawn), plan.device) / count
    )


def _noise(count: int, size: int, device: torch.device) -> torch.Tensor:
    return torch.rand(count, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, a large teacher takes seconds; of two the quicker one where it does not."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = once()
    return min(first, once()) if first < QUICK else first
