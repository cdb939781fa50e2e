"""What a step needs and the student does not decide: anchors, mates, views, targets; made ahead, so that the student
does not wait.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from threading import Event
from typing import TypeVar

import torch
from torch import Tensor

from bingo_compress.data import augment
from bingo_compress.data.pixel_store import PixelStore
from bingo_compress.features.targets import TargetOf
from bingo_compress.runtime import distributed
from bingo_compress.runtime.devices import AHEAD
from bingo_compress.runtime.made_of import hash_seed
from bingo_compress.training.losses import Targets
from bingo_compress.training.metrics import Meter
from bingo_compress.training.plan import Plan

Made = TypeVar("Made")


@dataclass(frozen=True)
class Lessons:
    """What a student learns from. training: (n,) images of `pixels`; bags: (n, K) positions in `training`, -1 for an
    empty place; target_of: the teacher's targets (B, D) of images, None for methods without teacher; sources: digests
    of what these were made from, by name; names: of the images of `pixels`, for messages; scenes: (n,) the position in
    `training` of the first image of the same scene, None where every image has a scene to itself.
    """

    pixels: PixelStore
    training: Tensor
    bags: Tensor
    target_of: TargetOf | None
    sources: Mapping[str, str] = field(default_factory=dict)
    names: Sequence[str] = ()
    scenes: Tensor | None = None

    def scenes_of(self, images: Tensor) -> Tensor:
        """Of positions in `training`, of any shape; -1 of -1."""
        return images if self.scenes is None else torch.where(images < 0, -1, self.scenes[images.clamp(min=0)])

    @cached_property
    def turns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of m scenes: (the images (n,) by scene, where each scene begins in them (m,), its images (m,))."""
        assert self.scenes is not None
        _, scene, sizes = self.scenes.unique(return_inverse=True, return_counts=True)
        return scene.argsort(stable=True), sizes.cumsum(0) - sizes, sizes


@dataclass(frozen=True)
class Ready:
    """One step's material. With several processes (W of them) each holds its own share b = B / W of the B anchors,
    views and targets.

    anchors: (B,) positions in the training set, of every process; scenes: (B,) theirs, as in `Lessons`; known: (b, 1 +
    K) those of the anchor and its mates, -1 for none; views: (2b or 3b, 3, S, S); share: CutMix's lam; fresh: (b, 3, S,
    S) one more view of the anchors, where a method wants it; targets: (b, D).
    """

    step: int
    anchors: Tensor
    scenes: Tensor
    known: Tensor
    views: Tensor
    share: float
    fresh: Tensor | None
    targets: Targets | None


@dataclass(frozen=True)
class Maker:
    """Makes the material of step n from (seed, n) alone: any step can be made at any time, in any process, and is the
    same. size: pixels a side of the student's views.
    """

    plan: Plan
    lessons: Lessons
    size: int
    meter: Meter

    def __call__(self, step: int, bags: Tensor) -> Ready:
        """The material of step `step` with these bags (n, K). Every process draws for the whole batch and makes its own
        share.
        """
        seed, batch, loss = self.plan.recipe.seed, self.plan.schedule.batch_size, self.plan.loss
        training, target_of, scenes_of = self.lessons.training, self.lessons.target_of, self.lessons.scenes_of
        generator = torch.Generator().manual_seed(hash_seed(seed, "step", step))
        anchors = shown_in(self.plan, self.lessons, step)
        mates = pick_mates(bags, anchors, generator) if loss.mates else anchors
        images, shown = training[anchors], training[mates]
        mine = own_share(batch)
        views = self._views(torch.cat((images, shown)), torch.cat((mine, mine + batch)), generator)
        share = 1.0
        if loss.official:
            mixed, share = augment.cutmix(views[: len(mine)], views[len(mine) :], generator)
            views = torch.cat((views, mixed)).contiguous(memory_format=torch.channels_last)
        fresh = self._views(images, mine, generator) if loss.momentum == "fresh" else None
        targets = None
        if target_of is not None:
            with self.meter("teacher"):
                targets = Targets(
                    target_of(images, generator, mine), target_of(shown, generator, mine) if loss.both else None
                )
        known = torch.cat((anchors[:, None], bags[anchors]), dim=1) if loss.mates else anchors[:, None]
        return Ready(step, anchors, scenes_of(anchors), scenes_of(known[mine]), views, share, fresh, targets)

    def _views(self, images: Tensor, mine: Tensor, generator: torch.Generator) -> Tensor:
        pixels = self.lessons.pixels
        drawn = augment.rows(augment.draw(pixels.aspect[images], generator, self.plan.recipe.crop_scale_min), mine)
        with self.meter("pixels"):
            crops = pixels.crops(images[mine], drawn.box, self.size)
        with self.meter("augment"):
            return augment.apply(crops, drawn).contiguous(memory_format=torch.channels_last)


def shown_in(plan: Plan, lessons: Lessons, step: int) -> Tensor:
    """`anchors_of` a step, as positions in `lessons.training`: all images in turn, or, with duplicates=near, one of
    each scene and in the next epoch its next one.
    """
    schedule = plan.schedule
    drawn = anchors_of(plan.recipe.seed, step, schedule.batch_size, schedule.images)
    if plan.recipe.duplicates != "near" or lessons.scenes is None:
        return drawn
    images, first, sizes = lessons.turns
    epoch = (step * schedule.batch_size + torch.arange(len(drawn))) // schedule.images
    return images[first[drawn] + epoch % sizes[drawn]]


def anchors_of(seed: int, step: int, batch: int, count: int) -> Tensor:
    """The anchors (batch,) of step `step`, from 0: the orders of all epochs are one row, and each step takes its next
    `batch`. batch: at most `count`.

    So every batch is full and every image an anchor once an epoch. Where an epoch ends within a batch an image may be
    in it twice, as two anchors: no loss sets the rows of a batch against one another, for the negatives are of earlier
    steps.
    """
    epoch, within = divmod(step * batch, count)
    anchors = order_of(seed, epoch, count)[within : within + batch]
    return (
        anchors
        if len(anchors) == batch
        else torch.cat((anchors, order_of(seed, epoch + 1, count)[: batch - len(anchors)]))
    )


@lru_cache(maxsize=2)
def order_of(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which an epoch shows the training images: (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(hash_seed(seed, "order", epoch)))


def own_share(batch: int) -> Tensor:
    """Which rows of a batch this process works on: (batch / processes,)."""
    each = batch // distributed.world()
    return torch.arange(each) + each * distributed.rank()


def pick_mates(bags: Tensor, anchors: Tensor, generator: torch.Generator) -> Tensor:
    """One member of each anchor's bag, drawn uniformly; the anchor itself where the bag is empty. bags: (n, K), its -1
    at the ends of the rows.
    """
    rows = bags[anchors]
    sizes = (rows >= 0).sum(1)
    drawn = torch.rand(len(anchors), generator=generator)
    if not rows.shape[1]:
        return anchors
    picked = (drawn * sizes).long().clamp(max=rows.shape[1] - 1)
    return torch.where(sizes > 0, rows.gather(1, picked[:, None])[:, 0], anchors)


def ahead(make: Callable[[int], Ready], steps: Iterable[int], device: torch.device, *, thread: bool) -> Iterator[Ready]:
    """make(step) for every step, in order, begun before it is asked for.

    On a GPU a batch is made on a side stream while the student's step runs. On a CPU, with `thread`, a thread makes
    AHEAD of them on another core; without, each is made when it is asked for.
    """
    if device.type == "cuda":
        yield from _on_side_stream(make, steps, device)
    elif thread:
        yield from _in_thread(make, steps)
    else:
        yield from map(make, steps)


def _in_thread(make: Callable[[int], Ready], steps: Iterable[int]) -> Iterator[Ready]:
    threads, settled = torch.get_num_threads(), Event()

    def settle() -> None:
        torch.set_num_threads(1)  # its own pool: two pools of all cores would wait for each other by spinning
        settled.set()

    waiting = iter(steps)
    pool = ThreadPoolExecutor(1, initializer=settle)
    try:
        futures: list[Future[Ready]] = [pool.submit(make, step) for step in islice(waiting, AHEAD)]
        settled.wait()
        torch.set_num_threads(threads)  # MKL keeps one number for the whole process: the trainer's
        while futures:
            ready = futures.pop(0).result()
            futures.extend(pool.submit(make, step) for step in islice(waiting, 1))
            yield ready
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@lru_cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One for the whole process: cuBLAS keeps 32 MB for every stream that it has seen."""
    return torch.cuda.Stream(device)


def _on_side_stream(make: Callable[[int], Ready], steps: Iterable[int], device: torch.device) -> Iterator[Ready]:
    side = _side(device)

    def begin(step: int) -> tuple[Ready, torch.cuda.Event]:
        with torch.cuda.stream(side):
            ready = make(step)
            return ready, side.record_event()

    def hand_over(ready: Ready, done: torch.cuda.Event) -> Ready:
        main = torch.cuda.current_stream(device)
        main.wait_event(done)
        targets = ready.targets or Targets(ready.views)
        for tensor in (ready.views, ready.fresh, targets.anchor, targets.mate):
            if tensor is not None and tensor.is_cuda:
                # The side stream must not reuse this memory before the student is done with it.
                tensor.record_stream(main)
        return ready

    waiting = iter(steps)
    made = next((begin(step) for step in waiting), None)
    while made is not None:
        yield hand_over(*made)
        made = next((begin(step) for step in waiting), None)
