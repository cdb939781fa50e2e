"""MoCo-v2's augmentation, batched, every parameter drawn for each image on its own: one function draws, one applies.

Parameters come from a CPU generator, so the same seed gives the same views on CPU and GPU.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import permutations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

ORDERS = tuple(permutations(range(4)))
GREY = (0.2989, 0.587, 0.114)
FLAT_ROWS = 64  # views cropped at once on a GPU: their windows are held in float32
BLUR_SIZE = 224  # MoCo-v2's sigma of 0.1-2.0 is in pixels of a 224 px crop; smaller crops get proportionally less.


@dataclass(frozen=True)
class Draw:
    """The random parameters of B views. All float32 (B,) unless said.

    box: (B, 4) left, top, right, bottom as shares of the image; flip, grey: bool; order: index into ORDERS, -1 for no colour jitter;
    brightness, contrast, saturation: factors; hue: shift in turns; sigma: blur in pixels of a 224 px crop, 0 for none.
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


def draw(aspect: Tensor, generator: torch.Generator, scale_min: float = 0.2) -> Draw:
    """Parameters for one view of each image. aspect: (B,) width / height. MoCo-v2: crop scale 0.2-1, jitter 0.4/0.4/0.4/0.1 p 0.8, grey p 0.2, blur p 0.5."""
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
    """torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest centred box with a ratio in 3/4..4/3."""
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
    """All but the crop. views: uint8 (B, 3, size, size), cropped to drawn.box. Returns float32 of the same shape in 0..1 on the same device."""
    size = views.shape[-1]
    views[drawn.flip.to(views.device)] = views[drawn.flip.to(views.device)].flip(-1)
    out = torch.empty(views.shape, dtype=torch.float32, device=views.device)
    # Images that share an order of the jitter go together: small enough for a CPU's cache, whole enough for a GPU.
    for order in drawn.order.unique().tolist():
        rows = (drawn.order == order).nonzero()[:, 0]
        here = rows.to(views.device)
        batch = views[here].float().div_(255)
        if order >= 0:
            for step in ORDERS[order]:
                batch = (_brightness, _contrast, _saturation, _hue)[step](
                    batch, _column((drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue)[step][rows], batch)
                )
        batch = torch.where(_column(drawn.grey[rows], batch), _grey(batch), batch)
        out[here] = blur(batch, drawn.sigma[rows] * (size / BLUR_SIZE))
    return out


def window(box: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """(left, top) and (right, bottom), each (B, 2) int64: the whole pixels that boxes (B, 4), in shares, mean in pictures of height and width (B,)."""
    sides = torch.stack((width, height), dim=1)
    low = torch.minimum((box[:, :2] * sides).round().long().clamp(min=0), sides - 1)
    return low, torch.maximum(torch.minimum((box[:, 2:] * sides).round().long(), sides), low + 1)


def crop(pixels: Tensor, box: Tensor, size: int) -> Tensor:
    """Antialiased bilinear crops. pixels: uint8 (B, H, W, 3); box: (B, 4) shares, rounded to whole pixels. Returns uint8 (B, 3, size, size)."""
    sides = torch.tensor(pixels.shape[1:3]).expand(len(pixels), 2)
    low, high = window(box, sides[:, 0], sides[:, 1])
    places = zip(pixels, low.tolist(), high.tolist(), strict=True)
    return resize((image[top:bottom, left:right] for image, (left, top), (right, bottom) in places), len(pixels), size)


def resize(pieces: Iterable[Tensor], count: int, size: int) -> Tensor:
    """`count` pieces, each uint8 (h, w, 3) of its own size, antialiased to uint8 (count, 3, size, size)."""
    views = torch.empty((count, 3, size, size), dtype=torch.uint8)
    for row, piece in enumerate(pieces):
        views[row] = interpolate(piece.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True)[0]
    return views


def crop_flat(flat: Tensor, offset: Tensor, width: Tensor, low: Tensor, high: Tensor, size: int) -> Tensor:
    """The same crops for a GPU, out of ragged pictures in one flat uint8 tensor, as two batched matrix products: no loop over images.

    offset, width: (B,) start in `flat` and width of each picture; low, high: (B, 2) of `window`. All but `flat` are on the CPU, so that the sizes
    of the tensors are known without waiting for the device. Returns uint8 (B, 3, size, size) on the device of `flat`.
    """
    views = []
    for rows in torch.arange(len(offset)).split(FLAT_ROWS):
        wide, high_ = (int(side) for side in (high[rows] - low[rows]).amax(0))
        start, stride, first, last = (values[rows].to(flat.device, non_blocking=True) for values in (offset, width, low, high))
        # A window of the largest size for all; where a picture's own ends, its last pixel is repeated, and has no weight.
        across = torch.minimum(first[:, :1] + torch.arange(wide, device=flat.device), last[:, :1] - 1)
        down = torch.minimum(first[:, 1:] + torch.arange(high_, device=flat.device), last[:, 1:] - 1)
        pixel = start[:, None, None] + (down[:, :, None] * stride[:, None, None] + across[:, None, :]) * 3
        planes = torch.stack([flat[pixel + channel] for channel in range(3)], dim=1).float()
        sides = last - first
        views.append(
            _resize_weights(sides[:, 1], high_, size)[:, None] @ planes @ _resize_weights(sides[:, 0], wide, size).transpose(1, 2)[:, None]
        )
    return torch.cat(views).round_().clamp_(0, 255).to(torch.uint8)


def _resize_weights(length: Tensor, side: int, size: int) -> Tensor:
    """Triangle-filter weights (B, size, side) that resize the first `length` (B,) of `side` pixels to `size`, as Pillow and torch do with antialiasing."""
    scale = length[:, None, None] / size
    pixel = torch.arange(side, device=length.device)[None, None]
    centre = (torch.arange(size, device=length.device)[None, :, None] + 0.5) * scale
    weights = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * (pixel < length[:, None, None])
    return weights / weights.sum(-1, keepdim=True)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device)[:, None, None, None]


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(images).mean((1, 2, 3), keepdim=True)
    return (images * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).add_(_grey(images) * (1 - factor)).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` turns; value and saturation stay."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == red, (green - blue) / safe, torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4))
    hue = hue + shift[:, 0] * 6
    # One channel of HSV -> RGB is value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + hue) mod 6 and n = 5, 3, 1.
    out = torch.empty_like(images)
    for channel, offset in enumerate((5.0, 3.0, 1.0)):
        k = (hue + offset).remainder_(6)
        out[:, channel] = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return out


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur. images: (B, C, H, W); sigma: (B,) pixels, 0 for none. Edges are reflected; the kernel reaches three sigma."""
    rows = (sigma > 0).nonzero()[:, 0].to(images.device)
    if len(rows) == 0:
        return images
    chosen = images[rows]
    count, channels, height, width = chosen.shape
    radius = min(math.ceil(3 * float(sigma.max())), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.to(images.device)[rows][:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    kernel = kernel.repeat_interleave(channels, 0)[:, None, None]
    planes = torch.nn.functional.pad(chosen.reshape(1, count * channels, height, width), (radius,) * 4, mode="reflect")
    planes = torch.conv2d(planes, kernel, groups=count * channels)
    planes = torch.conv2d(planes, kernel.transpose(2, 3), groups=count * channels)
    images = images.clone()
    images[rows] = planes.view_as(chosen)
    return images


def cutmix(images: Tensor, others: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """The official code's CutMix: one patch of `others` (B, 3, H, W) in every image. Returns the images and lam, the area share that stays.

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
