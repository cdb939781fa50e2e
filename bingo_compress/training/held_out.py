"""Which images are kept out of training, and which of them choose a student and which judge it."""

import torch
from torch import Tensor

from bingo_compress.features.extract import hash_seed
from bingo_compress.recipe import Recipe

AT_MOST = 1000


def split(count: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(held out, training): positions of the images, each ascending, the same for every seed; the share is the recipe's, at most AT_MOST."""
    keep = min(int(count * recipe.hold_out), AT_MOST)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(hash_seed("hold-out")))
    return order[:keep].sort().values, order[keep:].sort().values


def halves(held: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(images that the checks during training are of, images that the closing figure is of): both `held`, but its halves where the checks choose.

    The best of ten students by some images looks better on them than it is.
    """
    return (held[::2], held[1::2]) if recipe.keep_best else (held, held)
