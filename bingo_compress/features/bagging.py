"""Bags: which images belong together, as the teacher sees it. A way of bagging is one function and one line in
BAGGERS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from bingo_compress.data.image_list import ImageList, labels_of
from bingo_compress.errors import BingoError
from bingo_compress.features import neighbours
from bingo_compress.features.memmap import Matrix, Rows, TeacherPass, blocks
from bingo_compress.features.neighbours import IN_MEMORY, Search
from bingo_compress.runtime import checkpoint, console
from bingo_compress.runtime.made_of import MadeOf
from bingo_compress.runtime.run_dir import made_by
from bingo_compress.sources.listed import Names

ROWS = 1024
BLOCK = 8192  # rows of the teacher's pass in memory
CLUSTER = 20  # images in a k-means cluster, on average


def knn(features: Matrix, bag_size: int, search: Search = IN_MEMORY) -> tuple[Tensor, Tensor]:
    """The paper's bags: the K most cosine-similar other images. features: (N, D). Returns (bags (N, K) int64,
    similarities (N, K)).
    """
    return neighbours.mates(features, bag_size, search)


@dataclass(frozen=True)
class Seen:
    """What a way of bagging may look at: N images, `rows` (N,) of the teacher's pass and of the list; clusters: 0 for
    one in every CLUSTER images; seed of the random draws; how neighbours are searched.
    """

    teacher: TeacherPass
    images: ImageList
    rows: Tensor
    clusters: int
    seed: int
    search: Search = IN_MEMORY

    @property
    def features(self) -> Matrix:
        """The teacher's features (N, D)."""
        return Rows(self.teacher.features, self.rows)


def by_neighbours(seen: Seen, bag_size: int) -> Tensor:
    """Bags (N, K) of `knn`."""
    return knn(seen.features, bag_size, seen.search)[0]


def by_trust(seen: Seen, bag_size: int) -> Tensor:
    """The paper's limit is small data and few true neighbours: of the K nearest, only mutual ones that are as close as
    the image's own views.

    j stays in i's bag if i is among j's K nearest too, and cos(i, j) is at least the smallest cosine of i to one of its
    own augmented views (where views are stored). Bags (N, K), -1 for an empty place; a bag may be empty.
    """
    bags, similar = knn(seen.features, bag_size, seen.search)
    trusted = mutual(bags)
    if seen.teacher.views.shape[1] and not seen.teacher.projected:
        own = [seen.teacher.closeness(rows) for rows in seen.rows.split(BLOCK)]
        trusted &= similar >= torch.cat(own).min(1).values[:, None]
    return _packed(torch.where(trusted, bags, -1))


def by_clusters(seen: Seen, bag_size: int) -> Tensor:
    """K members, drawn at random, of the image's spherical k-means cluster (faiss). Bags (N, K), -1 where the cluster
    has fewer. Raises BingoError.
    """
    faiss = neighbours.load_faiss()
    if faiss is None:
        raise BingoError(
            "--bags kmeans: expected faiss, found none; next: pip install 'bingo-compress[cpu]', or --bags knn"
        )
    rows = normalize(seen.features[:].float(), dim=1).numpy()
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
    """An oracle, for ablation only: K images of the same folder name, drawn at random. Raises BingoError without at
    least two folders.
    """
    try:
        names, labels = labels_of(seen.images)
    except BingoError as error:
        raise BingoError(f"--bags labels: {error}; use --bags knn") from None
    console.say(f"warning: bags by {len(names)} folder names are an oracle for comparison; a real run has no labels")
    return _drawn(torch.tensor(labels)[seen.rows], bag_size, seen.seed)


def without(seen: Seen, bag_size: int) -> Tensor:
    """Empty bags, (N, 0): the intra-sample term alone."""
    return torch.empty(len(seen.features), 0, dtype=torch.int64)


def _drawn(groups: Tensor, bag_size: int, seed: int) -> Tensor:
    """`bag_size` others of each image's group, or all where there are fewer, any set of them as likely as any other.
    groups: (N,). Bags (N, K).
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    order, size, first = group.argsort(stable=True), sizes[group], (sizes.cumsum(0) - sizes)[group]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))) - first
    others = size - 1
    # Floyd's way to draw without putting back, for all images at once; what is drawn is how far on in its group the
    # mate stands.
    steps = torch.full((len(groups), bag_size), -1)
    for column in range(bag_size):
        last = others - others.clamp(max=bag_size) + column
        drawn = (torch.rand(len(groups), generator=generator, dtype=torch.float64) * (last + 1)).long()
        steps[:, column] = torch.where((steps == drawn[:, None]).any(1), last, drawn)
    mates = order[first[:, None] + (place[:, None] + 1 + steps) % size[:, None]]
    return torch.where(torch.arange(bag_size) < others[:, None], mates, -1)


def over_scenes(make: Callable[[Tensor], Tensor], scenes: Tensor) -> Tensor:
    """Bags (n, K) whose mates are all of other scenes: near-copies would fill them up. scenes: (n,) as
    `near_copies.find` names them; make: bags (R, K), or narrower, of R images, one a scene, in positions among them.

    All images of a scene have the same scenes for mates; which image of a mate's scene it is goes round. Where every
    image has a scene to itself, bags are what `make` makes of all.
    """
    firsts, scene, sizes = scenes.unique(return_inverse=True, return_counts=True)
    bags = make(firsts)
    if len(firsts) == len(scenes):
        return bags
    starts, order = sizes.cumsum(0) - sizes, scene.argsort(stable=True)
    mates = bags[scene]
    some = mates.clamp(min=0)
    turn = torch.arange(len(scenes))[:, None] % sizes[some]
    return torch.where(mates >= 0, order[starts[some] + turn], -1)


def _packed(bags: Tensor) -> Tensor:
    """The same bags with their empty places (-1) last."""
    return bags.gather(1, (bags < 0).int().argsort(dim=1, stable=True))


def mutual(bags: Tensor, scenes: Tensor | None = None) -> Tensor:
    """(N, K) bool: the anchor, or with `scenes` (N,) an image of its scene, is also in its mate's bag; False for an
    empty place.
    """
    named = torch.arange(len(bags)) if scenes is None else scenes
    held = torch.where(bags >= 0, named[bags.clamp(min=0)], -1)
    anchors = named[:, None, None].split(ROWS)
    found = [(held[rows.clamp(min=0)] == images).any(2) for rows, images in zip(bags.split(ROWS), anchors, strict=True)]
    return torch.cat(found) & (bags >= 0)


def purity(bags: Tensor, labels: Tensor) -> float:
    """Share of (anchor, mate) pairs with the same label, -1 being no label; NaN where no pair has labels."""
    mates = labels[bags.clamp(min=0)]
    known = (bags >= 0) & (mates >= 0) & (labels >= 0)[:, None]
    return float((mates == labels[:, None])[known].double().mean())


def report(
    bags: Tensor, features: Matrix, labels: Tensor | None = None, scenes: Tensor | None = None
) -> dict[str, float]:
    """What the bags are like: size (mean, least, most), share that is empty, mean similarity, share of mutual mates,
    and with labels the purity.
    """
    sizes = (bags >= 0).sum(1)
    similar = 0.0
    for start, rows in blocks(bags, ROWS):
        anchors, places = (rows >= 0).nonzero(as_tuple=True)
        one, other = features[start + anchors], features[rows[anchors, places]]
        similar += float(cosine_similarity(one.float(), other.float()).double().sum())
    facts = {
        "size_mean": float(sizes.double().mean()),
        "size_least": float(sizes.min()),
        "size_most": float(sizes.max()),
        "empty": float((sizes == 0).double().mean()),
    }
    if int(sizes.sum()):
        facts["similarity"] = similar / int(sizes.sum())
        facts["mutual"] = int(mutual(bags, scenes).sum()) / int(sizes.sum())
        if labels is not None:
            facts["purity"] = purity(bags, labels)
    return facts


BAGGERS = {"knn": by_neighbours, "adaptive": by_trust, "kmeans": by_clusters, "labels": by_labels, "none": without}


class Saved(NamedTuple):
    """Bags (N, K) with the names of the N images and the digests (N, 32) of their files; none of either where an
    earlier version wrote them as JSON.
    """

    bags: Tensor
    names: Names = Names()
    digests: NDArray[np.uint8] = np.empty((0, 32), np.uint8)


def save(path: Path, bags: Tensor, images: ImageList, made: MadeOf | None = None) -> None:
    """Write bags of `images` to a file that says whose they are; made: what they were made from. As tensors: as JSON a
    million names and digests are half a gigabyte for a moment.
    """
    letters, ends = Names(images.files).parts
    told = {
        "names": torch.frombuffer(letters or bytearray(1), dtype=torch.uint8)[: len(letters)],
        "ends": torch.tensor(ends, dtype=torch.int64),
        "digests": torch.from_numpy(images.contents.digests),
    }
    checkpoint.save(path, {"bags": bags} | told, made)


def load(path: Path) -> Saved:
    """What `save` wrote. Raises BingoError for a file that is damaged or not ours."""
    tensors = checkpoint.load(path)[0]
    with made_by("distill", path):
        bags = tensors["bags"]
        if "digests" not in tensors:
            return Saved(bags)
        letters, ends, digests = (tensors[name].numpy() for name in ("names", "ends", "digests"))
        assert bags.ndim == 2 and letters.dtype == digests.dtype == np.uint8 and digests.shape == (len(bags), 32)
        assert ends.shape == (len(bags),) and (np.diff(ends, prepend=0, append=letters.size) >= 0).all()
        return Saved(bags, Names.of(letters.tobytes(), ends.tolist()), digests)
