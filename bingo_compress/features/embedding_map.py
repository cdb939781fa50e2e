"""Embeddings as points of a plane: t-SNE (van der Maaten and Hinton 2008) of a sample, the others placed beside their
nearest sampled images. scikit-learn is imported when a map is made.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bingo_compress.features.memmap import Matrix, blocks
from bingo_compress.features.neighbours import nearest_neighbours

LEAST = 50  # images of which a map can say anything
DRAWN = 2000  # images whose places t-SNE finds, at most
PERPLEXITY = 30.0
COMPONENTS = 50  # of the embeddings, that t-SNE sees
ROUNDS, ROUNDS_AGAIN = 500, 250  # of t-SNE: for the first map, and from its places on for the second
NEAR = 5  # sampled images that place another
SHARP = 20.0  # how much more the nearest of them counts
BLOCK = 8192


def first(features: Tensor, seed: int) -> Tensor:
    """A map (n, 2) of features (n, D)."""
    return _tsne(_reduced(features, seed), "pca", 12.0, ROUNDS, seed)


def again(features: Tensor, places: Tensor, seed: int) -> Tensor:
    """A map (n, 2) of other features (n, D) of the same images that begins where `places` (n, 2), another map, left
    them: what both see alike stays where it is.
    """
    return _tsne(_reduced(features, seed), places.numpy(), 1.0, ROUNDS_AGAIN, seed)


def placed(others: Matrix, drawn: Tensor, places: Tensor) -> Tensor:
    """Places (m, 2) of other features (m, D): the weighted mean of those of their NEAR nearest drawn images. drawn: (n,
    D); places: (n, 2).
    """
    found = []
    for _, rows in blocks(others, BLOCK):
        similar, indices = nearest_neighbours(rows, drawn, min(NEAR, len(drawn)))
        weights = torch.softmax(SHARP * similar, dim=1)
        found.append((places[indices] * weights[:, :, None]).sum(1))
    return torch.cat(found) if found else places.new_empty(0, 2)


def _reduced(features: Tensor, seed: int) -> NDArray[np.float32]:
    """The largest principal components (n, COMPONENTS) of rows of length one."""
    rows = torch.nn.functional.normalize(features.float(), dim=1)
    rows = rows - rows.mean(0)
    kept = min(COMPONENTS, *rows.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, _, turn = torch.pca_lowrank(rows, kept, center=False)
    reduced: NDArray[np.float32] = (rows @ turn).numpy()
    return reduced


def _tsne(rows: NDArray[np.float32], start: object, exaggeration: float, rounds: int, seed: int) -> Tensor:
    from sklearn.manifold import TSNE

    # The data's spread does not change the neighbours that t-SNE keeps, but starts from "pca" want a common scale.
    fit = TSNE(
        2,
        perplexity=min(PERPLEXITY, (len(rows) - 1) / 3),
        early_exaggeration=exaggeration,
        init=start,
        max_iter=rounds,
        angle=0.6,
        random_state=seed % 2**32,
    )
    return torch.from_numpy(fit.fit_transform(rows)).float()
