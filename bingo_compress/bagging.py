"""Bags: which images belong together, as the teacher sees it. A way of bagging is one function and one line in BAGGERS."""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROWS = 1024


def load_faiss() -> ModuleType | None:
    """faiss where one of the extras `cpu` and `gpu` brought it."""
    try:
        import faiss
    except ImportError:
        return None
    module: ModuleType = faiss
    return module


def describe_backend() -> str:
    """Which nearest-neighbour search `nearest_neighbours` uses here."""
    faiss = load_faiss()
    if faiss is None:
        return "torch (exact)"
    return "faiss-gpu (exact)" if _faiss_gpus(faiss) else "faiss-cpu (exact)"


def nearest_neighbours(queries: Tensor, gallery: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most cosine-similar gallery rows of each query, exactly. queries: (M, D); gallery: (N, D), any float type, not normalised.

    Returns (similarities (M, count) float32, indices (M, count) int64) on the CPU, best first.
    """
    faiss = load_faiss()
    if faiss is None:
        return _torch_search(queries, gallery, count)
    index = faiss.IndexFlatIP(gallery.shape[1])
    if _faiss_gpus(faiss):
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(normalize(gallery.float(), dim=1).cpu().numpy())
    found = [index.search(normalize(rows.float(), dim=1).cpu().numpy(), count) for rows in queries.split(ROWS)]
    return torch.cat([torch.from_numpy(similar) for similar, _ in found]), torch.cat([torch.from_numpy(indices) for _, indices in found])


def _faiss_gpus(faiss: ModuleType) -> int:
    # faiss.StandardGpuResources() does not fail without a GPU; get_num_gpus is what tells (and faiss-cpu has 0).
    return int(faiss.get_num_gpus())


def _torch_search(queries: Tensor, gallery: Tensor, count: int) -> tuple[Tensor, Tensor]:
    columns = normalize(gallery.float(), dim=1).T
    found = [(normalize(rows.float(), dim=1) @ columns).topk(count, dim=1) for rows in queries.split(ROWS)]
    return torch.cat([pair.values for pair in found]).cpu(), torch.cat([pair.indices for pair in found]).cpu()


def knn(features: Tensor, bag_size: int) -> tuple[Tensor, Tensor]:
    """The paper's bags: the K most cosine-similar other images. features: (N, D). Returns (bags (N, K) int64, similarities (N, K))."""
    similar, indices = nearest_neighbours(features, features, bag_size + 1)
    other = indices != torch.arange(len(features))[:, None]
    # An image with many exact copies may not find itself: then its last, least similar neighbour goes instead.
    other[other.all(dim=1), -1] = False
    return indices[other].view(-1, bag_size), similar[other].view(-1, bag_size)


BAGGERS = {"knn": knn}
