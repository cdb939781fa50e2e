"""Nearest neighbours by cosine: exact, tile by tile, or among the nearest lists (IVF) with a recall that is measured.
Memory stays bounded.

Of a matrix that lies in a file only one block of queries and one tile of the gallery are held as float32; results are
written block by block.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bingo_compress.errors import BingoError
from bingo_compress.features.memmap import Matrix, blocks
from bingo_compress.runtime import checkpoint, console, distributed

RECALL_K, RECALL_SHARE = 20, 10  # neighbours at most, and gallery images for each of them at least

CPU = torch.device("cpu")
BLOCK = 16384  # queries searched, and written, together
TILE = 16384  # gallery rows held at once
EXACT_AT_MOST = {"cpu": 100_000, "cuda": 10_000_000}  # images that `auto` searches exactly
# Queries whose similarities to a tile torch holds at once: of a CPU, what its cache holds.
PRODUCT = {
    "cpu": 256,
    "cuda": 4096,
}

Part = dict[str, Tensor]  # of a block, by name
Mates = tuple[Tensor, Tensor, Tensor]  # rows, their neighbours' indices and similarities

# IVF: about LISTS * sqrt(N) lists, k-means on TRAIN rows a list; as many lists a query as WANTED recall takes.
LISTS = 4
TRAIN = 32
ROUNDS = 10
PROBES = 1024  # lists a query reads at most
SAMPLE = 1000  # exact queries that choose the number of lists, and as many others that measure the recall
WANTED = 0.98
LEAST = 0.95


@dataclass(frozen=True)
class Search:
    """How neighbours are searched: auto, exact or ivf; on which device; folder: where blocks of the result go (None:
    nothing is written).
    """

    how: str = "auto"
    device: torch.device = CPU
    folder: Path | None = None

    def exact(self, images: int) -> bool:
        """Whether a folder of `images` is searched exactly."""
        return self.how == "exact" or (self.how == "auto" and images <= EXACT_AT_MOST[self.device.type])

    def describe(self, images: int) -> str:
        """What searches, in a few words."""
        backend = "torch on cuda" if self.device.type == "cuda" else "faiss-cpu" if load_faiss() else "torch"
        return f"{backend} ({'exact' if self.exact(images) else 'IVF'})"


IN_MEMORY = Search()


def load_faiss() -> ModuleType | None:
    """faiss where one of the extras `cpu` and `gpu` brought it."""
    try:
        import faiss
    except ImportError:
        return None
    module: ModuleType = faiss
    return module


def nearest_neighbours(
    queries: Matrix, gallery: Matrix, count: int, device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """The `count` most cosine-similar gallery rows of each query, exactly. queries: (M, D); gallery: (N, D), any float
    type, not normalised.

    Returns (similarities (M, count) float32, indices (M, count) int64) on the CPU, best first.
    """
    found = [_nearest(rows, gallery, count, device) for _, rows in blocks(queries, BLOCK)]
    return torch.cat([similar for similar, _ in found]), torch.cat([indices for _, indices in found])


def mates(features: Matrix, count: int, search: Search) -> tuple[Tensor, Tensor]:
    """The `count` most cosine-similar other rows of each row. features: (N, D). Returns (indices (N, count) int64,
    similarities (N, count) float32).

    A folder of more than one block goes on after the last block that `search.folder` holds, and several processes share
    the blocks. Where IVF misses too many neighbours, `auto` searches exactly, and `ivf` raises BingoError.
    """
    shape = (len(features), min(count, len(features) - 1))
    indices, similar = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
    for rows, near, close in mates_by_block(features, count, search):
        indices[rows], similar[rows] = near.long(), close
    return indices, similar


def mates_by_block(features: Matrix, count: int, search: Search) -> Iterator[Mates]:
    """`mates` by blocks, of which one at a time is in memory where they are in files: (rows (n,), their indices (n,
    count) int32, similarities (n, count) float32).
    """
    folder = search.folder if len(features) > BLOCK else None
    if not search.exact(len(features)):
        try:
            return _by_lists(features, count, search, folder)
        except BingoError as error:
            if search.how == "ivf":
                raise
            console.say(f"neighbours: exact after all, which takes long; {str(error).partition('; use')[0]}")

    def block(start: int, stop: int) -> dict[str, Tensor]:
        similar, indices = _nearest(features[start:stop], features, count + 1, search.device)
        return _others(torch.arange(start, stop), similar, indices)

    parts = _in_blocks("neighbours", len(features), folder, block)
    return _with_rows(torch.arange(len(features)), parts())


def _with_rows(rows: Tensor, parts: Iterable[Part]) -> Iterator[Mates]:
    for block, part in zip(rows.split(BLOCK), parts, strict=True):
        yield block, part["indices"], part["similar"]


def _nearest(queries: Tensor, gallery: Matrix, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`nearest_neighbours` of one block: the best of the tiles so far, merged with those of the next."""
    # float16 stays float16 on a GPU (with sums in float32); a CPU multiplies float32 faster.
    dtype = (
        torch.float16 if device.type == "cuda" and queries.dtype == gallery.dtype == torch.float16 else torch.float32
    )
    rows = _unit(queries, device, dtype)
    similar, indices = (
        torch.empty(len(rows), 0, device=device),
        torch.empty(len(rows), 0, dtype=torch.int64, device=device),
    )
    for start, tile in blocks(gallery, TILE):
        more, where = _best(rows, _unit(tile, device, dtype), min(count, len(tile)))
        similar, indices = _merged((similar, indices), (more, where + start), count)
    return similar.cpu(), indices.cpu()


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of two lists of (similarities, indices) a query, best first."""
    similar, indices = torch.cat((one[0], other[0]), dim=1), torch.cat((one[1], other[1]), dim=1)
    similar, places = similar.topk(min(count, similar.shape[1]), dim=1)
    return similar, indices.gather(1, places)


def _unit(rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return normalize(rows.to(device).float(), dim=1).to(dtype)


def _best(queries: Tensor, tile: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(similarities, places in the tile) of the `count` largest products of each query, best first."""
    faiss = load_faiss() if queries.device.type == "cpu" else None
    if faiss is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
        values, places = faiss.knn(queries.numpy(), tile.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(values), torch.from_numpy(places)
    found = [_product(rows, tile.T).topk(count, dim=1) for rows in queries.split(PRODUCT[queries.device.type])]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _product(one: Tensor, other: Tensor) -> Tensor:
    # A float16 result could not tell apart what is nearer than 0.0005.
    return torch.mm(one, other, out_dtype=torch.float32) if one.dtype == torch.float16 else one @ other


def _others(images: Tensor, similar: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """Neighbours (n, K + 1) of `images` (n,) without the images themselves: (n, K) each, as they are stored."""
    other = indices != images[:, None]
    # An image with many exact copies may not find itself: then its last, least similar neighbour goes instead.
    other[other.all(dim=1), -1] = False
    shape = (len(images), indices.shape[1] - 1)
    return {"indices": indices[other].view(shape).int(), "similar": similar[other].view(shape)}


def _in_blocks(
    stem: str, count: int, folder: Path | None, make: Callable[[int, int], Part]
) -> Callable[[], Iterator[Part]]:
    """Gives make(start, stop) for every BLOCK of `count` rows in turn; a finished block is a file in `folder`, and is
    read when its turn comes.
    """
    spans = [(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    if folder is None:
        parts = [make(*span) for span in spans]
        return lambda: iter(parts)
    folder.mkdir(parents=True, exist_ok=True)
    files = {span: folder / f"{stem}-{span[0]:012d}.safetensors" for span in spans}
    # Asked once: while one process looks, another may be writing.
    missing = distributed.from_first(lambda: [span for span in spans if not checkpoint.is_sound(files[span])])
    mine = distributed.mine(missing)
    if mine:
        with console.bar(stem.partition("-")[0], sum(stop - start for start, stop in mine)) as advance:
            for start, stop in mine:
                checkpoint.save(files[start, stop], make(start, stop))
                advance(stop - start)
    distributed.barrier()
    return lambda: (checkpoint.load(file)[0] for file in files.values())


def _by_lists(features: Matrix, count: int, search: Search, folder: Path | None) -> Iterator[Mates]:
    """`mates_by_block` by IVF: every row belongs to the list of its nearest centroid; a row is compared with the lists
    whose centroids are nearest to it.

    Rows are taken in the order of their lists: those of a block read much the same lists, and each list is compared at
    once with all that read it. Raises BingoError.
    """
    lists = _Lists(features, count, search.device, folder)

    def block(start: int, stop: int) -> Part:
        return lists.search(lists.order[start:stop])

    # Blocks of other lists than these would hold other rows.
    parts = _in_blocks(f"neighbours-{zlib.crc32(lists.home.numpy().data):08x}", len(features), folder, block)
    # What is told is measured on the result, with queries that had no say in the number of lists.
    queries, wanted = lists.measured
    recall = _recall(wanted, _of(queries, _with_rows(lists.order, parts())))
    console.say(
        f"neighbours: IVF, {lists.probes} of {len(lists.sizes):,} lists a query, recall@{count} {recall:.3f} on"
        f" {len(lists.measured[0]):,} exact queries"
    )
    _refuse_under(recall, count, lists.probes)
    return _with_rows(lists.order, parts())


def _of(queries: Tensor, found: Iterator[Mates]) -> Tensor:
    """The similarities (S, K) that were found of the rows `queries` (S,)."""
    kept = [(rows[asked], similar[asked]) for rows, _, similar in found for asked in [torch.isin(rows, queries)]]
    rows, similar = (torch.cat(part) for part in zip(*kept, strict=True))
    return similar[rows.argsort()[queries.argsort().argsort()]]


def _recall(wanted: Tensor, similar: Tensor) -> float:
    """Share of the exact neighbours, by their similarities (S, K), that were found with `similar` (S, K); equally
    similar rows count as the same.
    """
    return float((similar >= wanted[:, -1:] - 1e-6).double().mean())


def _refuse_under(recall: float, count: int, probes: int) -> None:
    if recall < LEAST:
        raise BingoError(
            f"search=ivf: expected a recall@{count} of {LEAST} or more, found {recall:.3f} with {probes:,} lists a"
            " query; use --set search=exact"
        )


class _Lists:
    """Lists of rows by nearest centroid. home: (N,) int32 list of each row; order: (N,) rows by list; sizes: (L,) rows
    of each list; probes: lists a query reads; measured: (queries (S,), similarities (S, K)) of exact queries. Raises
    BingoError.
    """

    def __init__(self, features: Matrix, count: int, device: torch.device, folder: Path | None) -> None:
        self._features, self._count, self._device = features, count, device
        self._centroids = _centroids(features, device, folder)

        def block(start: int, stop: int) -> dict[str, Tensor]:
            return {"home": _nearest(features[start:stop], self._centroids, 1, device)[1][:, 0].int()}

        self.home = torch.cat([part["home"] for part in _in_blocks("lists", len(features), folder, block)()])
        self.order = self.home.argsort(stable=True)
        self.sizes = self.home.bincount(minlength=len(self._centroids))
        self._ends = self.sizes.cumsum(0)
        self._choose()

    def _near(self, images: Tensor, lists: int) -> Tensor:
        """The `lists` lists nearest to each of `images`: (n, lists), nearest first."""
        return nearest_neighbours(self._features[images], self._centroids, min(lists, len(self.sizes)), self._device)[1]

    def _choose(self) -> None:
        """The fewest lists a query that reach the WANTED recall. A neighbour is found if its list is read: no search is
        needed to know.
        """
        drawn = torch.randperm(len(self._features), generator=torch.Generator().manual_seed(1))[: 2 * SAMPLE].clone()
        exact = _others(
            drawn, *nearest_neighbours(self._features[drawn], self._features, self._count + 1, self._device)
        )
        half = len(drawn) // 2
        near = self._near(drawn[:half], PROBES)
        same = near[:, None, :] == self.home[exact["indices"][:half].long()][:, :, None]
        # Lists a query has to read for each of its neighbours; beyond all that may be read where it is not among them.
        needed = torch.where(same.any(2), same.int().argmax(2) + 1, near.shape[1] + 1).flatten().sort().values
        self.probes = min(int(needed[math.ceil(WANTED * len(needed)) - 1]), near.shape[1])
        _refuse_under(float((needed <= self.probes).double().mean()), self._count, self.probes)
        self.measured = drawn[half:], exact["similar"][half:]

    def search(self, images: Tensor) -> dict[str, Tensor]:
        """Neighbours of rows `images` (n,) in the `probes` lists nearest to each, or in as many more as hold enough
        rows.
        """
        near = self._near(images, self.probes)
        if bool((self.sizes[near].sum(1) <= self._count).any()):
            near = self._near(images, PROBES)
            held = self.sizes[near].cumsum(1)
            if int(held[:, -1].min()) <= self._count:
                raise BingoError(
                    f"search=ivf: expected lists of more than {self._count} images together, found"
                    f" {int(held[:, -1].min())}; use --set search=exact"
                )
            near = near[:, : max(self.probes, int((held <= self._count).sum(1).max()) + 1)]
        queries = _unit(self._features[images], self._device, torch.float32)
        similar = torch.full((len(images), self._count + 1), -math.inf)
        indices = torch.zeros_like(similar, dtype=torch.int64)
        # One list after the other, with the queries that read it.
        lists, pairs = near.flatten().sort(stable=True)
        read, readers = lists.unique_consecutive(return_counts=True)
        for other, asking in zip(read.tolist(), (pairs // near.shape[1]).split(readers.tolist()), strict=True):
            which = self.order[self._ends[other] - self.sizes[other] : self._ends[other]]
            if len(which):
                rows = _unit(self._features[which], self._device, torch.float32)
                # In parts: nearly all images may be in one list, and all queries read it.
                more, places = _best(queries[asking], rows, min(self._count + 1, len(which)))
                best = (similar[asking], indices[asking])
                similar[asking], indices[asking] = _merged(best, (more.cpu(), which[places.cpu()]), self._count + 1)
        return _others(images, similar, indices)


def _centroids(features: Matrix, device: torch.device, folder: Path | None) -> Tensor:
    """Centroids (L, D) of the lists, trained once and kept in `folder`."""
    count = max(min(round(LISTS * math.sqrt(len(features))), len(features) // TRAIN), 1)
    if folder is None:
        return _kmeans(features, count, device)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "centroids.safetensors"

    def train() -> None:
        if not checkpoint.is_sound(file):
            console.say(f"neighbours: training {count:,} lists")
            checkpoint.save(file, {"centroids": _kmeans(features, count, device)})

    distributed.from_first(train)
    return checkpoint.load(file)[0]["centroids"]


def _kmeans(features: Matrix, count: int, device: torch.device) -> Tensor:
    """`count` centroids (L, D) float32 of length one, by spherical k-means on TRAIN rows a centroid."""
    generator = torch.Generator().manual_seed(0)
    rows = features[torch.randperm(len(features), generator=generator)[: TRAIN * count].sort().values]
    centroids = _unit(rows[torch.randperm(len(rows), generator=generator)[:count]], CPU, torch.float32)
    for _ in range(ROUNDS):
        sums = torch.zeros_like(centroids)
        for _, part in blocks(rows, BLOCK):
            points = _unit(part, CPU, torch.float32)
            sums.index_add_(0, _nearest(points, centroids, 1, device)[1][:, 0], points)
        # A centroid that no row is nearest to stays where it is.
        centroids = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=1), centroids)
    return centroids


def recall_k(gallery: int) -> int:
    """How many neighbours recall asks for in a gallery of so many images: RECALL_K, and a tenth of them at most, or
    much would be found by chance.

    0 where there are too few images to ask.
    """
    return min(RECALL_K, gallery // RECALL_SHARE)


def recall_title(gallery: int) -> str:
    """Neighbour recall at the head of a table, with the k that `recall_k` gives and what a model finds by chance."""
    k = recall_k(gallery)
    return f"recall@{k} (chance {k / gallery:.3f})" if k else "recall"


def recall_facts(gallery: int) -> dict[str, float]:
    """The same for JSON: k, the gallery's size, and the recall that is found by chance."""
    k = recall_k(gallery)
    return {"k": k, "gallery": gallery, "chance": k / gallery if k else 1.0}
