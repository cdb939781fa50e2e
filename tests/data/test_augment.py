"""Augmentation against torchvision operation by operation, its random draws against their probabilities, and CutMix's
share.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import crop
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from bingo_compress.data import augment
from bingo_compress.data.augment import BLUR_SIZE, ORDERS, Draw, apply, blur, cutmix, draw

MANY = 20_000


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, height: int = 11, width: int = 13) -> Tensor:
    """Random colours, and the corners of the colour cube, greys and ties between channels among them."""
    made = torch.rand(count, 3, height, width, generator=seeded(1))
    made[:, :, 0, :8] = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).T
    made[:, :, 1] = made[:, :1, 1]
    made[:, 1, 2] = made[:, 0, 2]
    made[:, 2, 3] = made[:, 1, 3]
    return made


def stored(count: int, side: int) -> Tensor:
    """uint8 (count, side, side, 3): noise over slopes, so that neither an edge nor a shift by one pixel goes unseen."""
    slope = (
        torch.linspace(0, 150, side)[:, None, None] * torch.tensor([1.0, 0.5, 0.2])
        + torch.linspace(0, 60, side)[None, :, None]
    )
    return (slope + 45 * torch.rand(count, side, side, 3, generator=seeded(2))).to(torch.uint8)


@pytest.fixture(scope="module")
def many() -> Draw:
    return draw(torch.ones(MANY), seeded(0))


# ---------------------------------------------------------------- colour


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (augment._brightness, reference.adjust_brightness, [0.6, 0.9, 1.0, 1.4, 2.5]),
        (augment._contrast, reference.adjust_contrast, [0.6, 0.9, 1.0, 1.4, 2.5]),
        (augment._saturation, reference.adjust_saturation, [0.0, 0.6, 1.0, 1.4, 2.5]),
        (augment._hue, reference.adjust_hue, [-1 / 6, -0.1, 0.0, 0.03, 0.1, 1 / 6]),
    ],
)
def test_a_colour_operation_is_torchvisions(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Tensor, float], Tensor], values: list[float]
) -> None:
    batch = images(len(values))
    result = ours(batch.clone(), torch.tensor(values)[:, None, None, None])
    expected = torch.stack([theirs(image, value) for image, value in zip(batch, values, strict=True)])
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=0)
    assert (result - batch).abs().amax((1, 2, 3)).max() > 0.1


def test_saturation_of_nothing_is_torchvisions_grey() -> None:
    result = augment._saturation(images(3), torch.zeros(1))
    torch.testing.assert_close(result, reference.rgb_to_grayscale(images(3), num_output_channels=3), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- crop

BOXES = torch.tensor(
    [
        [0, 0, 1, 1],
        [0.1, 0.2, 0.7, 0.9],
        [0.5, 0.5, 1, 1],
        [0.33, 0, 0.45, 1],
        [0.9, 0.9, 0.97, 0.99],
        [0, 0.4, 1, 0.42],
        [0.7, 0.1, 0.7, 0.1],
    ]
)


def whole_pixels(box: Tensor, side: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(float(value) * side) for value in box)
    return left, top, max(right, left + 1), max(bottom, top + 1)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_crop_is_torchvisions_resized_crop(size: int) -> None:
    pixels = stored(len(BOXES), 47)
    views = crop(pixels, BOXES, size)
    assert (views.shape, views.dtype) == ((len(BOXES), 3, size, size), torch.uint8)
    for view, image, box in zip(views, pixels.permute(0, 3, 1, 2), BOXES, strict=True):
        left, top, right, bottom = whole_pixels(box, 47)
        expected = reference.resized_crop(
            image,
            top,
            left,
            bottom - top,
            right - left,
            [size, size],
            interpolation=InterpolationMode.BILINEAR,
            antialias=True,
        )
        assert (view.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [16, 33, 64])
def test_the_crop_out_of_one_flat_tensor_is_the_same_crop(size: int) -> None:
    pixels = stored(len(BOXES), 47)
    corners = torch.tensor([whole_pixels(box, 47) for box in BOXES])
    start, width = torch.arange(len(BOXES)) * 47 * 47 * 3, torch.full((len(BOXES),), 47)
    views = augment.crop_flat(pixels.flatten(), start, width, corners[:, :2], corners[:, 2:], size)
    assert (views.shape, views.dtype) == ((len(BOXES), 3, size, size), torch.uint8)
    assert (views.int() - crop(pixels, BOXES, size).int()).abs().max() <= 1


def test_a_crop_of_everything_at_its_own_size_changes_nothing() -> None:
    pixels = stored(2, 24)
    assert torch.equal(crop(pixels, torch.tensor([[0.0, 0, 1, 1]]).repeat(2, 1), 24), pixels.permute(0, 3, 1, 2))


def test_a_crop_sees_nothing_outside_of_its_box() -> None:
    pixels = torch.full((1, 40, 40, 3), 255, dtype=torch.uint8)
    pixels[:, 10:20, 5:30] = 0
    box = torch.tensor([[5 / 40, 10 / 40, 30 / 40, 20 / 40]])
    assert crop(pixels, box, 17).max() == 0
    zero, width = torch.tensor([0]), torch.tensor([40])
    assert (
        augment.crop_flat(pixels.flatten(), zero, width, torch.tensor([[5, 10]]), torch.tensor([[30, 20]]), 17).max()
        == 0
    )


# ---------------------------------------------------------------- blur


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.86, 2.0])
def test_blur_is_torchvisions_gaussian_blur(sigma: float) -> None:
    batch = images(2, 21, 17)
    kernel = 2 * math.ceil(3 * sigma) + 1
    expected = reference.gaussian_blur(batch, [kernel, kernel], [sigma, sigma])
    result = blur(batch, torch.full((2,), sigma))
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(augment._blur_one(batch[1], sigma), expected[1], atol=2e-6, rtol=0)
    assert sigma < 0.2 or (result - batch).abs().max() > 0.01


def test_each_image_is_blurred_by_its_own_sigma() -> None:
    sigmas = torch.tensor([0.4, 1.0, 2.0])
    batch = images(3, 21, 21)
    result = blur(batch, sigmas)
    for row, sigma in enumerate(sigmas):
        torch.testing.assert_close(result[row], blur(batch[row : row + 1], sigma[None])[0], atol=1e-6, rtol=0)


def test_blur_keeps_a_plain_image_and_takes_tiny_ones() -> None:
    torch.testing.assert_close(blur(torch.full((1, 3, 9, 9), 0.3), torch.tensor([1.5])), torch.full((1, 3, 9, 9), 0.3))
    tiny = images(1)[:, :, :2, :3]
    assert blur(tiny, torch.tensor([2.0])).isfinite().all()
    torch.testing.assert_close(augment._blur_one(tiny[0], 2.0), blur(tiny, torch.tensor([2.0]))[0], atol=1e-6, rtol=0)


# ---------------------------------------------------------------- draws


def test_probabilities_are_moco_v2s(many: Draw) -> None:
    for name, happened, probability in (
        ("flip", many.flip, 0.5),
        ("jitter", many.order >= 0, 0.8),
        ("grey", many.grey, 0.2),
        ("blur", many.sigma > 0, 0.5),
    ):
        error = math.sqrt(probability * (1 - probability) / MANY)
        assert abs(float(happened.float().mean()) - probability) < 4 * error, name


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
    ],
)
def test_strengths_are_uniform_over_moco_v2s_ranges(many: Draw, name: str, low: float, high: float) -> None:
    values = getattr(many, name)
    values = values[values > 0] if name == "sigma" else values
    assert low <= values.min() and values.max() <= high
    # The largest gap between the shares below each value and a straight line (Kolmogorov-Smirnov); 1.95 is passed once
    # in 1,000.
    shares = ((values.double().sort().values - low) / (high - low)).numpy()
    gap = np.abs(shares - (np.arange(len(shares)) + 0.5) / len(shares)).max()
    assert gap * math.sqrt(len(shares)) < 1.95


def test_all_24_orders_come_equally_often(many: Draw) -> None:
    assert len(set(ORDERS)) == 24
    counts = torch.bincount(many.order[many.order >= 0], minlength=24).double()
    expected = counts.sum() / 24
    assert len(counts) == 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7  # chi squared, 23 degrees of freedom, once in 1,000


def test_no_parameter_follows_another(many: Draw) -> None:
    width = many.box[:, 2] - many.box[:, 0]
    columns = [
        width,
        many.box[:, 0] / (1 - width).clamp(min=1e-6),
        many.flip,
        many.order >= 0,
        many.grey,
        many.sigma > 0,
    ]
    columns += [many.brightness, many.contrast, many.saturation, many.hue]
    table = torch.corrcoef(torch.stack([column.double() for column in columns]))
    assert (table - torch.eye(len(columns))).abs().max() < 4.5 / math.sqrt(MANY)


def test_neighbours_in_a_batch_draw_apart(many: Draw) -> None:
    for name in ("brightness", "hue", "flip", "grey"):
        values = getattr(many, name).double()
        assert abs(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]) < 4.5 / math.sqrt(MANY), name


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    aspect = torch.linspace(0.3, 3, 50)
    first, again, other = (dataclasses.asdict(draw(aspect, seeded(seed))) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_generator_goes_on() -> None:
    generator = seeded(5)
    assert not torch.equal(draw(torch.ones(8), generator).box, draw(torch.ones(8), generator).box)


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize("aspect", [0.2, 0.5, 0.75, 1.0, 4 / 3, 2.0, 5.0])
def test_boxes_are_in_bounds_with_area_and_ratio_as_asked(aspect: float) -> None:
    box = draw(torch.full((4000,), aspect), seeded(3)).box
    left, top, right, bottom = box.unbind(1)
    width, height = right - left, bottom - top
    assert box.min() >= 0 and box.max() <= 1 + 1e-6
    assert width.min() > 0 and height.min() > 0
    ratio = width * aspect / height
    assert ratio.min() > 3 / 4 - 1e-4 and ratio.max() < 4 / 3 + 1e-4
    # The fallback of a picture too long for its ratio: the largest centred box of ratio 3/4 or 4/3.
    nearest = min(max(aspect, 3 / 4), 4 / 3)
    fallback = torch.isclose(width, torch.tensor(min(nearest / aspect, 1.0))) & torch.isclose(
        height, torch.tensor(min(aspect / nearest, 1.0))
    )
    assert (width * height)[~fallback].min() >= 0.2 - 1e-4
    if aspect in (0.2, 5.0):
        assert 0.01 < fallback.double().mean() < 0.9
        torch.testing.assert_close((left + right)[fallback], torch.ones(int(fallback.sum())))
        torch.testing.assert_close((top + bottom)[fallback], torch.ones(int(fallback.sum())))


@pytest.mark.parametrize("aspect", [0.2, 0.75, 1.0, 3.0, 5.0])
def test_boxes_are_distributed_as_torchvisions(aspect: float) -> None:
    count, height = 1500, 1000
    picture = torch.empty(1, height, round(height * aspect))
    torch.manual_seed(4)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    ).double()
    top, left, tall, wide = (theirs / torch.tensor([height, height * aspect, height, height * aspect])).unbind(1)
    ours = draw(torch.full((8000,), aspect), seeded(5)).box.double()
    pairs = {
        "left": (left, ours[:, 0]),
        "top": (top, ours[:, 1]),
        "width": (wide, ours[:, 2] - ours[:, 0]),
        "height": (tall, ours[:, 3] - ours[:, 1]),
        "area": (wide * tall, (ours[:, 2] - ours[:, 0]) * (ours[:, 3] - ours[:, 1])),
    }
    for name, (expected, found) in pairs.items():
        error = math.sqrt(float(expected.var() / count + found.var() / len(found)))
        assert abs(float(expected.mean() - found.mean())) < 4 * error + 1e-3, name  # they round to whole pixels
        assert abs(float(expected.std() - found.std())) < 0.02, name


def test_scale_min_bounds_the_area() -> None:
    box = draw(torch.ones(4000), seeded(6), scale_min=0.7).box
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    assert 0.7 - 1e-5 <= area.min() < 0.71
    assert area.max() > 0.98


# ---------------------------------------------------------------- apply


def one_by_one(pixels: Tensor, drawn: Draw, size: int) -> Tensor:
    """MoCo-v2's pipeline from torchvision's functions, one image at a time."""
    views = []
    for row in range(len(pixels)):
        values: dict[str, Any] = {name: column[row] for name, column in vars(drawn).items()}
        left, top, right, bottom = whole_pixels(values["box"], pixels.shape[1])
        view = reference.resized_crop(
            pixels[row].permute(2, 0, 1), top, left, bottom - top, right - left, [size, size], antialias=True
        )
        view = view.float() / 255
        adjust: list[tuple[Callable[[Tensor, float], Tensor], str]] = [
            (reference.adjust_brightness, "brightness"),
            (reference.adjust_contrast, "contrast"),
            (reference.adjust_saturation, "saturation"),
            (reference.adjust_hue, "hue"),
        ]
        for step in ORDERS[values["order"]] if values["order"] >= 0 else ():
            view = adjust[step][0](view, float(values[adjust[step][1]]))
        view = reference.rgb_to_grayscale(view, 3) if values["grey"] else view
        sigma = float(values["sigma"]) * size / BLUR_SIZE
        if sigma:
            kernel = 2 * math.ceil(3 * sigma) + 1
            view = reference.gaussian_blur(view, [kernel, kernel], [sigma, sigma])
        views.append(view.flip(-1) if values["flip"] else view)
    return torch.stack(views)


def test_apply_is_the_pieces_one_by_one() -> None:
    pixels = stored(60, 72)
    drawn = draw(torch.linspace(0.4, 2.5, 60), seeded(7))
    assert drawn.flip.any() and drawn.grey.any() and (drawn.sigma > 0).any() and (drawn.order < 0).any()
    result = apply(crop(pixels, drawn.box, 64), drawn)
    expected = one_by_one(pixels, drawn, 64)
    difference = (result - expected).abs().amax((1, 2, 3))
    # A level of 255 for the crop's rounding, made up to 2.7 times larger by the jitter, and the reach of the blur's
    # kernel.
    assert difference.max() < 4 / 255
    assert difference.median() < 0.5 / 255


def test_apply_gives_floats_in_0_to_1_and_leaves_the_pixels() -> None:
    pixels = stored(40, 40)
    before = pixels.clone()
    drawn = draw(torch.ones(40), seeded(8))
    result = apply(crop(pixels, drawn.box, 32), drawn)
    assert (result.shape, result.dtype) == ((40, 3, 32, 32), torch.float32)
    assert result.min() >= 0 and result.max() <= 1 + 1e-6
    assert result.std((1, 2, 3)).min() > 0.01
    assert torch.equal(pixels, before)


def test_the_views_do_not_depend_on_their_place_in_the_batch() -> None:
    pixels, drawn = stored(30, 40), draw(torch.ones(30), seeded(9))
    mixed = torch.randperm(30, generator=seeded(10))
    moved = Draw(**{name: column[mixed] for name, column in vars(drawn).items()})
    torch.testing.assert_close(
        apply(crop(pixels[mixed], moved.box, 32), moved),
        apply(crop(pixels, drawn.box, 32), drawn)[mixed],
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("size", [32, 224])
def test_the_order_of_work_that_a_gpu_takes_gives_the_same_views(size: int) -> None:
    views = crop(stored(26, 48), torch.tensor([[0.0, 0, 1, 1]]).repeat(26, 1), size)
    drawn = draw(torch.ones(26), seeded(12))
    found = augment._step_by_step(views, drawn, torch.empty(views.shape).to(memory_format=torch.channels_last))
    expected = apply(views, drawn)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert expected.is_contiguous(memory_format=torch.channels_last) and found.is_contiguous(
        memory_format=torch.channels_last
    )


# ---------------------------------------------------------------- CutMix


def test_cutmix_returns_the_share_that_stays() -> None:
    generator = seeded(11)
    for height, width in ((32, 32), (40, 24), (7, 9)) * 20:
        mixed, share = cutmix(torch.zeros(3, 3, height, width), torch.ones(3, 3, height, width), generator)
        assert 1 - float(mixed.double().mean()) == pytest.approx(share, abs=1e-9)
        assert torch.equal(mixed[0], mixed[2])
        rows, columns = mixed[0, 0].any(1), mixed[0, 0].any(0)
        assert torch.equal(mixed[0, 0].bool(), rows[:, None] & columns[None])  # one rectangle
        assert (rows.int().diff() != 0).sum() <= 2 and (columns.int().diff() != 0).sum() <= 2


def test_cutmix_keeps_every_pixel_in_its_place() -> None:
    first, second = torch.rand(2, 3, 24, 24, generator=seeded(12)), torch.rand(2, 3, 24, 24, generator=seeded(13))
    before = first.clone()
    mixed, share = cutmix(first, second, seeded(14))
    assert 0 < share < 1
    assert ((mixed == first) | (mixed == second)).all()
    assert float((mixed == first).double().mean()) == pytest.approx(share)
    assert torch.equal(first, before)


def test_cutmix_shares_are_beta_2_2_clipped_at_the_border() -> None:
    """lam ~ Beta(2, 2) has mean 0.5; patches that reach over the border leave more, 0.672 on average (by simulation
    here).
    """
    numbers = np.random.default_rng(0)
    side = np.sqrt(1 - numbers.beta(2, 2, 400_000))
    spans = [
        np.minimum(place + side / 2, 1) - np.maximum(place - side / 2, 0) for place in numbers.random((2, 400_000))
    ]
    expected = 1 - spans[0] * spans[1]
    generator, blank = seeded(15), torch.zeros(1, 1, 128, 128)
    found = np.array([cutmix(blank, blank, generator)[1] for _ in range(3000)])
    # A side loses a pixel to rounding on average: one percent of area.
    assert abs(found.mean() - expected.mean()) < 4 * expected.std() / math.sqrt(3000) + 0.01
    assert abs(found.std() - expected.std()) < 0.015
    for share in (0.1, 0.5, 0.9):
        assert abs(np.quantile(found, share) - np.quantile(expected, share)) < 0.03


def test_cutmix_draws_beta_2_2_before_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the centre held in the middle nothing is clipped, so lam itself is seen: mean 0.5, variance 0.05."""
    real, generator, blank = torch.rand, seeded(16), torch.zeros(1, 1, 256, 256)
    monkeypatch.setattr(
        torch,
        "rand",
        lambda count, generator: real(count, generator=generator) if count == 3 else torch.full((2,), 0.5),
    )
    found = np.array([cutmix(blank, blank, generator)[1] for _ in range(4000)])
    assert abs(found.mean() - 0.5) < 4 * math.sqrt(0.05 / 4000) + 0.01
    assert abs(found.var() - 0.05) < 0.005


def test_cutmix_is_drawn_from_the_generator() -> None:
    first, second = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    results = [cutmix(first, second, seeded(seed)) for seed in (17, 17, 18)]
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert results[0][1] != results[2][1]
