"""MoCo-v2's augmentation, batched, every parameter drawn for each image on its own: one function draws, one applies.

Parameters come from a CPU generator, so the same seed gives the same views on CPU and GPU.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import permutations
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bingo_compress.runtime import console
from bingo_compress.runtime.machine import (
    sent,
)

ORDERS = tuple(permutations(range(4)))
GREY = (0.2989, 0.587, 0.114)
FLAT_ROWS = 256  # views cropped at once on a GPU: their windows are held in float16
CACHED = 6 << 16  # numbers of one image, or of several small ones, that a CPU works on at once
BLUR_SIZE = 224  # MoCo-v2's sigma of 0.1-2.0 is in pixels of a 224 px crop; smaller crops get proportionally less.


@dataclass(frozen=True)
class Draw:
    """The random parameters of B views. All float32 (B,) unless said.

    box: (B, 4) left, top, right, bottom as shares of the image; flip, grey: bool; order: index into ORDERS, -1 for no
    colour jitter; brightness, contrast, saturation: factors; hue: shift in turns; sigma: blur in pixels of a 224 px
    crop, 0 for none.
    """

    box: Tensor
    flip: Tensor
    order: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grey: Tensor
    sigma: Tensor

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What each of STEPS takes."""
        return self.brightness, self.contrast, self.saturation, self.hue


def draw(aspect: Tensor, generator: torch.Generator, scale_min: float = 0.2) -> Draw:
    """Parameters for one view of each image. aspect: (B,) width / height. MoCo-v2: crop scale 0.2-1, jitter
    0.4/0.4/0.4/0.1 p 0.8, grey p 0.2, blur p 0.5.
    """
    count = len(aspect)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=generator) < probability

    jitter = chance(0.8)
    order = torch.randint(len(ORDERS), (count,), generator=generator)
    return Draw(
        box=_boxes(aspect, generator, scale_min),
        flip=chance(0.5),
        order=torch.where(jitter, order, -1),
        brightness=uniform(0.6, 1.4),
        contrast=uniform(0.6, 1.4),
        saturation=uniform(0.6, 1.4),
        hue=uniform(-0.1, 0.1),
        grey=chance(0.2),
        sigma=torch.where(chance(0.5), uniform(0.1, 2.0), 0.0),
    )


def rows(drawn: Draw, which: Tensor) -> Draw:
    """The parameters of the views `which` (b,) alone."""
    return Draw(*(getattr(drawn, field.name)[which] for field in fields(drawn)))


def _boxes(aspect: Tensor, generator: torch.Generator, scale_min: float) -> Tensor:
    """torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest centred box with a ratio in
    3/4..4/3.
    """
    tries = (len(aspect), 10)
    wide = aspect[:, None]  # the image is `aspect` wide and 1 high
    area = wide * torch.empty(tries).uniform_(scale_min, 1.0, generator=generator)
    ratio = torch.exp(torch.empty(tries).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator))
    width, height = torch.sqrt(area * ratio) / wide, torch.sqrt(area / ratio)
    fits = (width <= 1) & (height <= 1)
    first = fits.float().argmax(dim=1, keepdim=True)
    fallback = aspect.clamp(3 / 4, 4 / 3)
    width = torch.where(fits.any(1), width.gather(1, first)[:, 0], (fallback / aspect).clamp(max=1))
    height = torch.where(fits.any(1), height.gather(1, first)[:, 0], (aspect / fallback).clamp(max=1))
    place = torch.rand((len(aspect), 2), generator=generator)
    place[~fits.any(1)] = 0.5
    left, top = place[:, 0] * (1 - width), place[:, 1] * (1 - height)
    return torch.stack((left, top, left + width, top + height), dim=1)


def apply(views: Tensor, drawn: Draw) -> Tensor:
    """All but the crop. views: uint8 (B, 3, size, size), cropped to drawn.box. Returns float32 of the same shape in
    0..1 on the same device, channels last.
    """
    out = torch.empty(views.shape, dtype=torch.float32, device=views.device, memory_format=torch.channels_last)
    if not views.is_cuda:
        return _image_by_image(views, drawn, out)
    return (_step_by_step if fused() is None else _fused)(views, drawn, out)


@lru_cache
def fused() -> ModuleType | None:
    """The kernels of a GPU, or, said once, None where Triton is missing or has no compiler."""
    try:
        from bingo_compress.kernels import views as kernels

        drawn = draw(torch.ones(2), torch.Generator().manual_seed(0))
        device, corners = torch.device("cuda"), torch.tensor([[0, 0], [8, 8]])
        flat, places = torch.zeros(8 * 8 * 3, dtype=torch.uint8, device=device), torch.zeros(2, dtype=torch.int64)
        views = kernels.crop(flat, places, places + 8, corners[[0, 0]], corners[[1, 1]], 8)
        kernels.colours(
            views, torch.tensor(ORDERS)[:2], torch.stack(drawn.factors, 1), drawn.flip, drawn.grey, views.float()
        )
        return kernels
    except Exception as error:  # Whatever the compiler raises.
        console.say(
            f"warning: Triton cannot be used ({(str(error).splitlines() or [''])[0][:120]}); views are made step by"
            " step, which takes longer"
        )
        return None


def _fused(views: Tensor, drawn: Draw, out: Tensor) -> Tensor:
    """For a GPU: all steps in one reading of the pixels. The same result."""
    from bingo_compress.kernels import views as kernels

    size = views.shape[-1]
    orders = _orders(drawn)
    kernels.colours(
        views, orders, torch.stack(drawn.factors, 1).gather(1, orders.clamp(min=0)), drawn.flip, drawn.grey, out
    )
    which = (drawn.sigma > 0).nonzero()[:, 0]
    if len(which):
        sigma = drawn.sigma[which] * (size / BLUR_SIZE)
        kernels.blur(out, which, sigma, (3 * sigma).ceil().clamp(max=size - 1))
    return out


def _orders(drawn: Draw) -> Tensor:
    """The steps of the jitter of each view in their order, (B, 4), -1 where there is none."""
    return torch.where(drawn.order[:, None] < 0, -1, torch.tensor(ORDERS)[drawn.order])


def _image_by_image(views: Tensor, drawn: Draw, out: Tensor) -> Tensor:
    """For a CPU: all steps of a few images that share an order of the jitter, in place, while they are in the cache."""
    size = views.shape[-1]
    at_once = max(1, CACHED // (3 * size * size))
    flips, greys, sigmas = drawn.flip.tolist(), drawn.grey.tolist(), (drawn.sigma * (size / BLUR_SIZE)).tolist()
    nothing = torch.zeros(1)
    for order in drawn.order.unique().tolist():
        for images in (drawn.order == order).nonzero()[:, 0].split(at_once):
            places = images.tolist()
            batch = torch.empty(len(places), *views.shape[1:])
            for image, place in zip(batch, places, strict=True):
                image.copy_(views[place].flip(-1) if flips[place] else views[place])
            batch.div_(255)
            for step in ORDERS[order] if order >= 0 else ():
                STEPS[step](batch, _column(drawn.factors[step][images], batch))
            for image, place in zip(batch, places, strict=True):
                if greys[place]:
                    _saturation(image[None], nothing)
                out[place] = _blur_one(image, sigmas[place]) if sigmas[place] > 0 else image
    return out


def _step_by_step(views: Tensor, drawn: Draw, out: Tensor) -> Tensor:
    """For a GPU without Triton: one step of all images that take it next, so that few and large kernels are launched.
    The same result.
    """
    size = views.shape[-1]
    out.copy_(torch.where(_column(drawn.flip, views), views.flip(-1), views)).div_(255)
    for now in _orders(drawn).unbind(1):
        for step, work in enumerate(STEPS):
            _some(out, now == step, partial(_stepped, work, drawn.factors[step]))
    _some(out, drawn.grey, lambda batch, which: _saturation(batch, torch.zeros(1, device=batch.device)))
    _some(out, drawn.sigma > 0, lambda batch, which: blur(batch, drawn.sigma[which] * (size / BLUR_SIZE)))
    return out


def _stepped(work: Callable[[Tensor, Tensor], Tensor], factors: Tensor, batch: Tensor, which: Tensor) -> Tensor:
    return work(batch, _column(factors[which], batch))


def _some(images: Tensor, chosen: Tensor, work: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the images that are chosen, (B,) bool on the CPU, by work(those images, their positions)."""
    which = chosen.nonzero()[:, 0]
    if len(which):
        there = sent(which, images.device)
        images[there] = work(images[there].contiguous(), which)


def resize(pieces: Iterable[Tensor], count: int, size: int) -> Tensor:
    """`count` pieces, each uint8 (h, w, 3) of its own size, antialiased to uint8 (count, 3, size, size)."""
    views = torch.empty((count, 3, size, size), dtype=torch.uint8)
    for row, piece in enumerate(pieces):
        views[row] = interpolate(piece.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True)[0]
    return views


def crop_flat(flat: Tensor, offset: Tensor, width: Tensor, low: Tensor, high: Tensor, size: int) -> Tensor:
    """The same crops as `resize` gives, for a GPU, out of ragged pictures in one flat uint8 tensor, as two batched
    matrix products: no loop over images.

    offset, width: (B,) start in `flat` and width of each picture; low, high: (B, 2) of `decode.window`. All but `flat`
    are on the CPU, so that the sizes of the tensors are known without waiting for the device. Returns uint8 (B, 3,
    size, size) on the device of `flat`.
    """
    if flat.is_cuda and fused() is not None:
        from bingo_compress.kernels import views as kernels

        return kernels.crop(flat, offset, width, low, high, size)
    views = []
    for rows in torch.arange(len(offset)).split(FLAT_ROWS):
        wide, high_ = (int(side) for side in (high[rows] - low[rows]).amax(0))
        start, stride, first, last = (sent(values[rows], flat.device) for values in (offset, width, low, high))
        # A window of the largest size for all; where a picture's own ends, its last pixel is repeated, and has no
        # weight.
        across = torch.minimum(first[:, :1] + torch.arange(wide, device=flat.device), last[:, :1] - 1)
        down = torch.minimum(first[:, 1:] + torch.arange(high_, device=flat.device), last[:, 1:] - 1)
        pixel = start[:, None, None] + (down[:, :, None] * stride[:, None, None] + across[:, None, :]) * 3
        # float16 holds 0 to 255 exactly, and the sums to a sixteenth: half of the traffic, and the GPU's matrix units.
        planes = (
            flat.as_strided((len(flat) - 2, 3), (1, 1))[pixel]
            .permute(0, 3, 1, 2)
            .to(torch.float16, memory_format=torch.contiguous_format)
        )
        sides = last - first
        views.append(
            _resize_weights(sides[:, 1], high_, size)[:, None]
            @ planes
            @ _resize_weights(sides[:, 0], wide, size).transpose(1, 2)[:, None]
        )
    return torch.cat(views).round_().clamp_(0, 255).to(torch.uint8)


def _resize_weights(length: Tensor, side: int, size: int) -> Tensor:
    """Triangle-filter weights (B, size, side) that resize the first `length` (B,) of `side` pixels to `size`, as Pillow
    and torch do with antialiasing.
    """
    scale = length[:, None, None] / size
    pixel = torch.arange(side, device=length.device)[None, None]
    centre = (torch.arange(size, device=length.device)[None, :, None] + 0.5) * scale
    weights = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * (pixel < length[:, None, None])
    return (weights / weights.sum(-1, keepdim=True)).half()


def _column(values: Tensor, like: Tensor) -> Tensor:
    return sent(values, like.device)[:, None, None, None]


@lru_cache
def _grey(device: torch.device) -> Tensor:
    return torch.tensor(GREY, device=device)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = (images.flatten(2).mean(2) @ _grey(images.device))[:, None, None, None]
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    grey = (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])
    return images.mul_(factor).addcmul_(grey[:, None], 1 - factor).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` turns (at most 1/6); value and saturation stay.

    Without branches and divisions. In units of the chroma c (largest less smallest channel), the hue's distance from
    red, going round a circle of 6, is |g - b| + (v - r) + 2 min(c - |g - b|, v - r); its sign is that of g - b. A
    channel whose own hue is d away is v - min(max(d - c, 0), c).
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    side = green - blue
    hue, below = side.abs(), value - red
    nearest = torch.minimum(chroma - hue, below)
    hue = torch.copysign(hue.add_(below).add_(nearest, alpha=2), side).addcmul_(chroma, shift[:, 0] * 6)
    least = torch.neg(chroma, out=below)
    for channel, centre in enumerate((0, 2, -2)):
        # 3c - | |u| - 3c | is the distance of u from 0 on the circle, for |u| up to 6c.
        away = torch.add(hue, chroma, alpha=-centre, out=side).abs_().sub_(chroma, alpha=3).abs_().sub_(chroma, alpha=2)
        torch.add(value, torch.maximum(away.clamp_(max=0), least, out=away), out=images[:, channel])
    return images


# Each in place, on planes (B, 3, H, W); the order that Draw.factors has.
STEPS = (
    _brightness,
    _contrast,
    _saturation,
    _hue,
)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur. images: (B, C, H, W); sigma: (B,) pixels above 0, on the CPU. Edges are reflected; a kernel
    reaches three of its own sigma.
    """
    count, channels, height, width = images.shape
    radius = _radius(float(sigma.max()), height, width)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2) * (offsets.abs() <= (3 * sigma[:, None]).ceil())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, None]
    kernel = sent(kernel, images.device)
    planes = torch.nn.functional.pad(images.reshape(1, count * channels, height, width), (radius,) * 4, mode="reflect")
    planes = torch.conv2d(planes, kernel, groups=count * channels)
    return torch.conv2d(planes, kernel.transpose(2, 3), groups=count * channels).view_as(images)


def _blur_one(image: Tensor, sigma: float) -> Tensor:
    """`blur` of one image (C, H, W) on a CPU, as sums of shifted copies: on planes this narrow several times faster
    than a convolution.
    """
    channels, height, width = image.shape
    radius = _radius(sigma, height, width)
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    padded = torch.nn.functional.pad(image[None], (radius,) * 4, mode="reflect")
    tall, wide = padded.shape[2:]
    flat = padded.flatten()
    for shift in (wide, 1):  # down, then across: of a flat plane both are shifts; what wraps around lands in the margin
        middle, length = radius * shift, len(flat) - 2 * radius * shift
        sums = flat[middle : middle + length] * (weights[0] / total)
        for offset in range(1, radius + 1):
            for start in (middle - offset * shift, middle + offset * shift):
                sums.add_(flat[start : start + length], alpha=weights[offset] / total)
        flat = sums
    return flat.as_strided((channels, height, width), (tall * wide, wide, 1))


def _radius(sigma: float, height: int, width: int) -> int:
    return min(math.ceil(3 * sigma), height - 1, width - 1)


def cutmix(images: Tensor, others: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """The official code's CutMix: one patch of `others` (B, 3, H, W) in every image. Returns the images and lam, the
    area share that stays.

    lam ~ Beta(2, 2), one draw a batch; it is recomputed from the patch after clipping at the border.
    """
    height, width = images.shape[2:]
    # The median of three uniform numbers is Beta(2, 2).
    share = float(torch.rand(3, generator=generator).median())
    side = math.sqrt(1 - share)
    centre_x, centre_y = (torch.rand(2, generator=generator) * torch.tensor([width, height])).int().tolist()
    half_w, half_h = int(width * side) // 2, int(height * side) // 2
    left, right = max(centre_x - half_w, 0), min(centre_x + half_w, width)
    top, bottom = max(centre_y - half_h, 0), min(centre_y + half_h, height)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, 1 - (right - left) * (bottom - top) / (width * height)
