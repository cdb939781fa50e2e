"""A GPU's views in five launches: crops, the mean that the contrast needs, all colours, and blur across and down.

What they compute is what `augment` does step by step; there each step would read and write all pixels once more.
Written in Triton, which torch brings along on Linux. Sums are taken in a fixed order, so that a run is the same bit for
bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bingo_compress.runtime.machine import (
    sent,
)

BLOCK = 512  # pixels a program works on
BRIGHTNESS, CONTRAST, SATURATION, HUE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _crop(flat, offset, stride, low, high, views, size, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size * size
    left, top = tl.load(low + 2 * image), tl.load(low + 2 * image + 1)
    width = (tl.load(high + 2 * image) - left).to(tl.int32)
    height = (tl.load(high + 2 * image + 1) - top).to(tl.int32)
    scale_x, scale_y = width.to(tl.float32) / size, height.to(tl.float32) / size
    reach_x, reach_y = tl.maximum(scale_x, 1.0), tl.maximum(scale_y, 1.0)
    centre_x, centre_y = (place % size + 0.5) * scale_x, (place // size + 0.5) * scale_y
    first_x = tl.floor(centre_x - reach_x + 0.5).to(tl.int32)
    first_y = tl.floor(centre_y - reach_y + 0.5).to(tl.int32)
    red = tl.zeros([BLOCK], tl.float32)
    green = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    start, wide = tl.load(offset + image), tl.load(stride + image)
    for down in range(0, tl.ceil(2 * reach_y).to(tl.int32) + 1):
        y = first_y + down
        weight_y = tl.where((y >= 0) & (y < height) & inside, 1 - tl.abs(y + 0.5 - centre_y) / reach_y, 0.0)
        for across in range(0, tl.ceil(2 * reach_x).to(tl.int32) + 1):
            x = first_x + across
            weight = tl.maximum(tl.where((x >= 0) & (x < width), 1 - tl.abs(x + 0.5 - centre_x) / reach_x, 0.0), 0.0)
            weight = weight * tl.maximum(weight_y, 0.0)
            pixel = flat + start + ((top + y) * wide + left + x) * 3
            red += weight * tl.load(pixel, mask=weight > 0, other=0).to(tl.float32)
            green += weight * tl.load(pixel + 1, mask=weight > 0, other=0).to(tl.float32)
            blue += weight * tl.load(pixel + 2, mask=weight > 0, other=0).to(tl.float32)
            total += weight
    total = tl.maximum(total, 1e-6)
    target = views + image * 3 * size * size + place
    tl.store(target, tl.floor(red / total + 0.5).to(tl.uint8), mask=inside)
    tl.store(target + size * size, tl.floor(green / total + 0.5).to(tl.uint8), mask=inside)
    tl.store(target + 2 * size * size, tl.floor(blue / total + 0.5).to(tl.uint8), mask=inside)


@triton.jit
def _clamp(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def _grey(red, green, blue):
    return red * 0.2989 + green * 0.587 + blue * 0.114


@triton.jit
def _turned(hue, chroma, value, centre):
    away = tl.abs(tl.abs(hue - centre * chroma) - 3 * chroma) - 2 * chroma
    return value + tl.maximum(tl.minimum(away, 0.0), -chroma)


@triton.jit
def _colours(views, orders, factors, flips, greys, means, out, size, MEASURE: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    area = size * size
    inside = place < area
    column = place % size
    source = views + image * 3 * area + tl.where(tl.load(flips + image) != 0, place + size - 1 - 2 * column, place)
    red = tl.load(source, mask=inside, other=0).to(tl.float32) / 255
    green = tl.load(source + area, mask=inside, other=0).to(tl.float32) / 255
    blue = tl.load(source + 2 * area, mask=inside, other=0).to(tl.float32) / 255
    for stage in tl.static_range(4):
        step, factor = tl.load(orders + image * 4 + stage), tl.load(factors + image * 4 + stage)
        if step == BRIGHTNESS:
            red, green, blue = _clamp(red * factor), _clamp(green * factor), _clamp(blue * factor)
        if step == CONTRAST:
            shift = tl.load(means + image) * (1 - factor)
            red, green, blue = (
                _clamp(red * factor + shift),
                _clamp(green * factor + shift),
                _clamp(blue * factor + shift),
            )
        if step == SATURATION:
            shade = _grey(red, green, blue) * (1 - factor)
            red, green, blue = (
                _clamp(red * factor + shade),
                _clamp(green * factor + shade),
                _clamp(blue * factor + shade),
            )
        if step == HUE:  # the reasoning is at augment._hue
            value = tl.maximum(tl.maximum(red, green), blue)
            chroma = value - tl.minimum(tl.minimum(red, green), blue)
            side, below = green - blue, value - red
            hue = tl.abs(side) + below + 2 * tl.minimum(chroma - tl.abs(side), below)
            hue = tl.where(side < 0, -hue, hue) + chroma * factor * 6
            red, green, blue = (
                _turned(hue, chroma, value, 0),
                _turned(hue, chroma, value, 2),
                _turned(hue, chroma, value, -2),
            )
    if MEASURE:
        tl.store(
            out + image * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(inside, _grey(red, green, blue), 0.0))
        )
    else:
        if tl.load(greys + image) != 0:
            red = _clamp(_grey(red, green, blue))
            green = red
            blue = red
        target = out + (image * area + place) * 3
        tl.store(target, red, mask=inside)
        tl.store(target + 1, green, mask=inside)
        tl.store(target + 2, blue, mask=inside)


@triton.jit
def _blur(source, source_rows, target, target_rows, sigmas, radii, size, DOWN: tl.constexpr, BLOCK: tl.constexpr):
    which = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size * size
    row, column = place // size, place % size
    sigma, radius = tl.load(sigmas + which), tl.load(radii + which)
    image = source + tl.load(source_rows + which) * size * size * 3
    red = tl.zeros([BLOCK], tl.float32)
    green = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    total = 0.0
    for offset in range(-radius, radius + 1):
        share = offset / sigma
        weight = tl.exp(-0.5 * share * share)
        total += weight
        if DOWN:
            other = tl.abs(row + offset)
            pixel = image + (tl.minimum(other, 2 * (size - 1) - other) * size + column) * 3
        else:
            other = tl.abs(column + offset)
            pixel = image + (row * size + tl.minimum(other, 2 * (size - 1) - other)) * 3
        red += weight * tl.load(pixel, mask=inside, other=0)
        green += weight * tl.load(pixel + 1, mask=inside, other=0)
        blue += weight * tl.load(pixel + 2, mask=inside, other=0)
    written = target + (tl.load(target_rows + which) * size * size + place) * 3
    tl.store(written, red / total, mask=inside)
    tl.store(written + 1, green / total, mask=inside)
    tl.store(written + 2, blue / total, mask=inside)


def _grid(images: int, size: int) -> tuple[int, int]:
    return images, triton.cdiv(size * size, BLOCK)


def crop(flat: Tensor, offset: Tensor, width: Tensor, low: Tensor, high: Tensor, size: int) -> Tensor:
    """Antialiased bilinear crops, uint8 (B, 3, size, size). Arguments as in `augment.crop_flat`."""
    views = torch.empty((len(offset), 3, size, size), dtype=torch.uint8, device=flat.device)
    places = (sent(values, flat.device) for values in (offset, width, low, high))
    _run(_crop, _grid(len(offset), size), flat, *places, views, size)
    return views


def colours(views: Tensor, orders: Tensor, factors: Tensor, flips: Tensor, greys: Tensor, out: Tensor) -> None:
    """Flip, jitter and grey of views, uint8 (B, 3, S, S), into `out`, float32 of the same shape in 0..1, channels last.

    orders: (B, 4) the step that comes first, second, ...: its place in augment.STEPS, -1 for none; factors: (B, 4) what
    that step takes; flips, greys: (B,) bool.
    """
    count, size = len(views), views.shape[-1]
    contrast = orders == CONTRAST.value
    before = torch.where(contrast.cummax(1).values, -1, orders)  # what comes before the contrast, whose mean is of that
    there = [sent(values, views.device) for values in (factors, flips.byte(), greys.byte())]
    sums = torch.empty(_grid(count, size), device=views.device)
    views = views.contiguous()
    _run(_colours, _grid(count, size), views, sent(before.int(), views.device), *there, sums, sums, size, MEASURE=True)
    means = sums.sum(1) / (size * size)
    _run(_colours, _grid(count, size), views, sent(orders.int(), views.device), *there, means, out, size, MEASURE=False)


def blur(images: Tensor, which: Tensor, sigma: Tensor, radius: Tensor) -> None:
    """Gaussian blur, in place, of images[which] (b,); images: float32 (B, 3, S, S), channels last. sigma: (b,) pixels;
    radius: (b,) where its kernel ends.
    """
    count, size = len(which), images.shape[-1]
    between = torch.empty((count, size, size, 3), device=images.device)
    places, rows = sent(which, images.device), torch.arange(count, device=images.device)
    shape = sent(sigma, images.device), sent(radius.int(), images.device), size
    _run(_blur, _grid(count, size), images, places, between, rows, *shape, DOWN=False)
    _run(_blur, _grid(count, size), between, rows, images, places, *shape, DOWN=True)


def _run(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants, BLOCK=BLOCK)
