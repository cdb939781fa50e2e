"""Bags: which images belong together, as the teacher sees it. A way of bagging is one function and one line in BAGGERS."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from bingo_compress.errors import BingoError

ROWS = 1024
CLUSTER = 20  # images in a k-means cluster, on average


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


@dataclass(frozen=True)
class Seen:
    """What a way of bagging may look at: features (N, D); own (N, V) cosine of each image's plain view with its augmented views (V may be 0);
    labels (N,) by folder name, or None; clusters: 0 for one in every CLUSTER images; seed of the random draws."""

    features: Tensor
    own: Tensor
    labels: Tensor | None
    clusters: int
    seed: int


def by_neighbours(seen: Seen, bag_size: int) -> Tensor:
    """Bags (N, K) of `knn`."""
    return knn(seen.features, bag_size)[0]


def by_trust(seen: Seen, bag_size: int) -> Tensor:
    """The paper's limit is small data and few true neighbours: of the K nearest, only mutual ones that are as close as the image's own views.

    j stays in i's bag if i is among j's K nearest too, and cos(i, j) is at least the smallest cosine of i to one of its own augmented views (where views
    are stored). Bags (N, K), -1 for an empty place; a bag may be empty.
    """
    bags, similar = knn(seen.features, bag_size)
    trusted = mutual(bags)
    if seen.own.shape[1]:
        trusted &= similar >= seen.own.min(1).values[:, None]
    return _packed(torch.where(trusted, bags, -1))


def by_clusters(seen: Seen, bag_size: int) -> Tensor:
    """K members, drawn at random, of the image's spherical k-means cluster (faiss). Bags (N, K), -1 where the cluster has fewer. Raises BingoError."""
    faiss = load_faiss()
    if faiss is None:
        raise BingoError("--bags kmeans: expected faiss, found none; next: pip install 'bingo-compress[cpu]', or --bags knn")
    rows = normalize(seen.features.float(), dim=1).cpu().numpy()
    count = min(seen.clusters or max(len(rows) // CLUSTER, 1), len(rows))
    means = faiss.Kmeans(
        rows.shape[1],
        count,
        niter=25,
        nredo=3,
        spherical=True,
        seed=seen.seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    means.train(rows)
    return _drawn(torch.from_numpy(means.index.search(rows, 1)[1][:, 0]), bag_size, seen.seed)


def by_labels(seen: Seen, bag_size: int) -> Tensor:
    """An oracle, for ablation only: K images of the same folder name, drawn at random. Raises BingoError without at least two folders."""
    if seen.labels is None:
        raise BingoError("--bags labels: expected a folder a class in --data, found none; use --bags knn")
    return _drawn(seen.labels, bag_size, seen.seed)


def without(seen: Seen, bag_size: int) -> Tensor:
    """Empty bags, (N, 0): the intra-sample term alone."""
    return torch.empty(len(seen.features), 0, dtype=torch.int64)


def _drawn(groups: Tensor, bag_size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed % 2**63)
    bags = torch.full((len(groups), bag_size), -1)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        for place, image in enumerate(members.tolist()):
            others = torch.cat((members[:place], members[place + 1 :]))
            chosen = others[torch.randperm(len(others), generator=generator)[:bag_size]]
            bags[image, : len(chosen)] = chosen
    return bags


def _packed(bags: Tensor) -> Tensor:
    """The same bags with their empty places (-1) last."""
    return bags.gather(1, (bags < 0).int().argsort(dim=1, stable=True))


def mutual(bags: Tensor) -> Tensor:
    """(N, K) bool: the anchor is also in its mate's bag; False for an empty place."""
    anchors = torch.arange(len(bags))[:, None, None]
    return (bags[bags.clamp(min=0)] == anchors).any(2) & (bags >= 0)


def purity(bags: Tensor, labels: Tensor) -> float:
    """Share of (anchor, mate) pairs with the same label, -1 being no label; NaN where no pair has labels."""
    mates = labels[bags.clamp(min=0)]
    known = (bags >= 0) & (mates >= 0) & (labels >= 0)[:, None]
    return float((mates == labels[:, None])[known].double().mean())


def report(bags: Tensor, features: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    """What the bags are like: size (mean, least, most), share that is empty, mean similarity, share of mutual mates, and with labels the purity."""
    sizes = (bags >= 0).sum(1)
    anchors, places = (bags >= 0).nonzero(as_tuple=True)
    mates = bags[anchors, places]
    pairs = zip(anchors.split(ROWS * 8), mates.split(ROWS * 8), strict=True)
    similar = sum(float(cosine_similarity(features[one].float(), features[other].float()).sum()) for one, other in pairs)
    facts = {
        "size_mean": float(sizes.double().mean()),
        "size_least": float(sizes.min()),
        "size_most": float(sizes.max()),
        "empty": float((sizes == 0).double().mean()),
    }
    if len(mates):
        facts["similarity"] = similar / len(mates)
        facts["mutual"] = float(mutual(bags)[anchors, places].double().mean())
        if labels is not None:
            facts["purity"] = purity(bags, labels)
    return facts


BAGGERS = {"knn": by_neighbours, "adaptive": by_trust, "kmeans": by_clusters, "labels": by_labels, "none": without}
