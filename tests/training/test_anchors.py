"""Every image is an anchor once an epoch, whatever the batch size; epochs end where the plan says; checks come as often
as is said.
"""

from collections import Counter

import pytest
import torch
from helpers import CPU, filled_store, planned, recipe

from bingo_compress.runtime import distributed
from bingo_compress.training import loop, plan
from bingo_compress.training.loader import Lessons, Maker, anchors_of
from bingo_compress.training.metrics import Meter

SIZES = [(255, 128, 2, 1), (7, 4, 5, 1), (7, 4, 4, 2), (30, 30, 2, 3), (33, 8, 3, 4), (20, 6, 2.5, 3)]


@pytest.mark.parametrize(("images", "batch", "epochs", "processes"), SIZES)
def test_every_image_is_an_anchor_once_an_epoch(
    images: int, batch: int, epochs: float, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world", lambda: processes)
    chosen = recipe(method="seed", seed=3, batch_size=batch, epochs=epochs, crop_scale_min=1.0)
    steps = plan.schedule(chosen, images).steps
    training = torch.arange(images).flip(0)
    bags = torch.empty(images, 0, dtype=torch.int64)
    lessons = Lessons(filled_store(images, 8), training, bags, None)
    make = Maker(planned(chosen, images), lessons, 4, Meter(CPU))
    shown: list[int] = []
    for step in range(steps):
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            own = make(step, bags)
            shown += own.known[:, 0].tolist()
            assert len(own.known) * processes == len(own.anchors) == batch
    wanted = round(images * epochs)
    assert wanted <= len(shown) < wanted + batch
    for epoch in range(int(epochs)):
        assert sorted(shown[epoch * images : (epoch + 1) * images]) == list(range(images))
    rest = Counter(shown[int(epochs) * images :])
    assert all(count == 1 for count in rest.values())


def test_an_epoch_ends_with_the_step_that_shows_its_last_image() -> None:
    for images in (3, 7, 20, 255):
        for batch in range(2, images + 1):
            planned = plan.schedule(recipe(batch_size=batch, epochs=6, bag_size=1), images)
            ends = [
                step
                for step in range(1, planned.steps + 1)
                if planned.epochs_after(step) > planned.epochs_after(step - 1)
            ]
            assert ends == [planned.steps_of(epoch) for epoch in range(1, 7)] and ends[-1] == planned.steps
            assert all((end - 1) * batch < images * epoch <= end * batch for epoch, end in enumerate(ends, 1))


def test_a_step_has_the_same_anchors_whenever_it_is_made() -> None:
    whole = [anchors_of(5, step, 6, 10).tolist() for step in range(20)]
    assert [anchors_of(5, step, 6, 10).tolist() for step in reversed(range(20))] == whole[::-1]
    assert whole != [anchors_of(6, step, 6, 10).tolist() for step in range(20)]


@pytest.mark.parametrize("epochs", [1, 2, 9, 10, 11, 15, 19, 20, 66.7, 100, 199])
def test_without_an_interval_there_are_ten_checks(epochs: float) -> None:
    chosen = recipe(epochs=epochs, keep_best=True)
    checked = [epoch for epoch in range(1, int(epochs) + 1) if loop.due(epoch, chosen)]
    last = [] if epochs == int(epochs) else [epochs]  # the loop checks after the last step in any case
    assert len(checked + last) == min(10, int(epochs))
    assert (checked + last)[-1] == epochs
