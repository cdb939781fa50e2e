"""The GPU's kernels, run by Triton's interpreter on a CPU, against what `augment` computes there. On a GPU itself:
test_gpu.py.
"""

import io
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import photo
from interpreter import INTERPRETED, all_pass, inside, outside
from torch import Tensor

from bingo_compress.data import augment, decode

pytest.importorskip("triton", reason="torch brings no Triton here")


@pytest.mark.slow
@outside
def test_in_a_process_with_the_interpreter() -> None:
    all_pass(__file__, 4)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from bingo_compress.kernels import views as kernels

    return kernels


@inside
@pytest.mark.parametrize(("side", "size"), [(30, 20), (20, 30), (40, 9)])
def test_crops(kernels: ModuleType, side: int, size: int) -> None:
    pictures = [photo(number, number, side, side + number) for number in range(4)]
    flat = torch.from_numpy(np.concatenate([picture.reshape(-1) for picture in pictures]))
    width = torch.tensor([picture.shape[1] for picture in pictures])
    offset = torch.cat((torch.zeros(1, dtype=torch.int64), (width * side * 3).cumsum(0)[:-1]))
    box = augment.draw(width / side, torch.Generator().manual_seed(0)).box
    corners = decode.window(box, torch.full((4,), side), width)
    pieces = [
        torch.from_numpy(picture)[y:bottom, x:right]
        for picture, (x, y), (right, bottom) in zip(pictures, *map(Tensor.tolist, corners), strict=True)
    ]
    found, expected = kernels.crop(flat, offset, width, *corners, size), augment.resize(pieces, 4, size)
    assert (found.int() - expected.int()).abs().max() <= 1


@inside
def test_colours_and_blur(kernels: ModuleType) -> None:
    count, size = 48, 20  # every order of the jitter, and none
    views = (
        torch.from_numpy(np.stack([photo(number, number, size, size) for number in range(count)]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )
    drawn = augment.draw(torch.ones(count), torch.Generator().manual_seed(3))
    drawn.order[:24] = torch.arange(24)
    drawn.sigma.mul_(augment.BLUR_SIZE / size)
    out = torch.empty(views.shape, memory_format=torch.channels_last)
    augment._fused(views, drawn, out)
    assert (drawn.order < 0).any() and drawn.grey.any() and drawn.flip.any() and (drawn.sigma > 0).any()
    torch.testing.assert_close(out, augment.apply(views, drawn), atol=1e-5, rtol=0)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="here they can be used")
def test_where_they_cannot_be_used_it_is_said_once(printed: io.StringIO) -> None:
    augment.fused.cache_clear()
    assert augment.fused() is None and augment.fused() is None
    augment.fused.cache_clear()
    assert printed.getvalue().count("warning: Triton cannot be used (") == 1
