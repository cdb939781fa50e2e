"""Seconds to find every image's nearest neighbours: ours against faiss's IndexFlatIP, on clustered synthetic embeddings
of length one. No GPU needed.

python benchmarks/bagging.py [--images 100000] [--dim 128] [--bag-size 5] [--repeats 3] [--threads 0] [--json FILE]
python benchmarks/bagging.py --million [--dim 128] [--search auto|exact|ivf] [--queries-share 0.02] [--json FILE]

--million does it as the tool does: 1,000,000 x 128 in a memory-mapped float16 file, blocks of the result written; with
the peak of resident memory, and the recall of some images against products in float64. On a GPU where there is one; no
faiss is needed. --queries-share searches for that share of the images alone and multiplies the seconds: an
extrapolation, and called so.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bingo_compress.features.memmap import Stored
from bingo_compress.features.neighbours import Search, load_faiss, mates, nearest_neighbours

PART = 65536
CHECKED = 256  # images whose neighbours are found again, in float64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--bag-size", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="the least of so many is taken")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--search", choices=("auto", "exact", "ivf"), default="auto")
    parser.add_argument("--queries-share", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    found = million(chosen) if chosen.million else side_by_side(chosen)
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"threads": torch.get_num_threads(), "dim": chosen.dim, "bag_size": chosen.bag_size} | found)
            + "\n"
        )


def clustered(images: int, dim: int) -> Iterator[Tensor]:
    """Embeddings of length one around images / 100 directions, PART rows at a time."""
    generator = torch.Generator().manual_seed(0)
    centres = normalize(torch.randn(max(images // 100, 1), dim, generator=generator), dim=1)
    for start in range(0, images, PART):
        which = torch.randint(len(centres), (min(PART, images - start),), generator=generator)
        yield normalize(
            centres[which] + 0.7 * normalize(torch.randn(len(which), dim, generator=generator), dim=1), dim=1
        )


def side_by_side(chosen: argparse.Namespace) -> dict[str, Any]:
    """Ours, exact and by lists, against IndexFlatIP, one after the other in every repeat."""
    rows = torch.cat(list(clustered(chosen.images, chosen.dim)))
    faiss: Any = load_faiss()
    if faiss is None:
        raise SystemExit("expected faiss to compare with, found none; pip install faiss-cpu")
    faiss.omp_set_num_threads(torch.get_num_threads())

    def flat() -> Tensor:
        index = faiss.IndexFlatIP(chosen.dim)
        index.add(rows.numpy())
        return torch.from_numpy(index.search(rows.numpy(), chosen.bag_size + 1)[1])

    ways: dict[str, Callable[[], Tensor]] = {
        "faiss IndexFlatIP": flat,
        "ours, exact": lambda: mates(rows, chosen.bag_size, Search("exact"))[0],
        "ours, IVF": lambda: mates(rows, chosen.bag_size, Search("ivf"))[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Tensor] = {}
    for _ in range(chosen.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - began)
    first = results["faiss IndexFlatIP"]
    itself = torch.arange(len(rows))[:, None]
    print(
        f"{chosen.images:,} x {chosen.dim}, {chosen.bag_size} neighbours, {torch.get_num_threads()} threads, least of"
        f" {chosen.repeats}\n"
    )
    print(f"{'':<20}{'seconds':>10}{'ratio':>8}{f'recall@{chosen.bag_size}':>11}")
    table = []
    for name, result in results.items():
        least = min(seconds[name])
        # Of what IndexFlatIP found, the image itself aside.
        both = ((first[:, :, None] == result[:, None, :]).any(2) & (first != itself)).sum() / (first != itself).sum()
        table.append(
            {"name": name, "seconds": least, "ratio": least / min(seconds["faiss IndexFlatIP"]), "recall": float(both)}
        )
        print(f"{name:<20}{least:>10.2f}{table[-1]['ratio']:>8.2f}{float(both):>11.4f}")
    return {"images": chosen.images, "rows": table}


def million(chosen: argparse.Namespace, images: int = 1_000_000) -> dict[str, Any]:
    """A million images as the tool bags them: seconds and peak resident memory."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Stored(Path(folder) / "features.f16", chosen.dim)
        stored.reserve(images)
        for number, part in enumerate(clustered(images, chosen.dim)):
            stored.write(number * PART, part)
        features, before = stored.read(images, chosen.dim), peak_mb()
        began = time.perf_counter()
        queries = round(images * chosen.queries_share)
        if queries < images:
            if chosen.search == "ivf":
                raise SystemExit("--queries-share: IVF makes its lists of all images; expected --search exact with it")
            found = nearest_neighbours(features[:queries], features, chosen.bag_size + 1, DEVICE)[1]
        else:
            found = mates(features, chosen.bag_size, Search(chosen.search, DEVICE, Path(folder) / "bags"))[0]
        seconds, after = time.perf_counter() - began, peak_mb()
        recall = recall_of(found, features)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{images:,} x {chosen.dim}, {chosen.bag_size} neighbours, search={chosen.search}, {where}")
    print(f"{queries:,} images searched for: {seconds:.0f} s")
    if queries < images:
        print(
            f"all images, EXTRAPOLATED from {chosen.queries_share:.1%} of them and not run:"
            f" {seconds * images / queries:.0f} s"
        )
    print(
        f"peak resident memory (VmHWM): {after:.0f} MB, before the search {before:.0f} MB; the mapped file alone is"
        f" {images * chosen.dim * 2 / 1e6:.0f} MB"
    )
    print(f"recall@{chosen.bag_size} of {CHECKED} of them against float64: {recall:.4f}")
    return {
        "images": images,
        "device": where,
        "recall": recall,
        "search": chosen.search,
        "queries": queries,
        "seconds": seconds,
        "seconds_of_all": seconds * images / queries,
        "extrapolated": queries < images,
        "peak_mb": after,
        "peak_before_mb": before,
    }


def recall_of(found: Tensor, features: Any) -> float:
    """The share of the true neighbours, the images themselves aside, that `found` (n, K or K + 1) names; of CHECKED
    images spread over all n.
    """
    which = torch.linspace(0, len(found) - 1, CHECKED).long()
    rows = normalize(features[which].double(), dim=1)
    true = [torch.empty(CHECKED, 0, dtype=kind) for kind in (torch.float64, torch.int64)]
    wanted = found.shape[1]
    for start in range(0, len(features), PART):
        products = rows @ normalize(features[start : start + PART].double(), dim=1).T
        own = which - start
        here = (own >= 0) & (own < products.shape[1])
        products[here.nonzero()[:, 0], own[here]] = -2
        best = products.topk(wanted, dim=1)
        merged = torch.cat((true[0], best.values), 1).topk(wanted, dim=1)
        true = [merged.values, torch.cat((true[1], best.indices + start), 1).gather(1, merged.indices)]
    mine = found[which]
    names = mine != which[:, None]
    wanted = int(names.sum(1).min())
    return float((true[1][:, :wanted, None] == mine[:, None, :]).any(2).double().mean())


def peak_mb() -> float:
    """The most memory that was resident so far, pages of mapped files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
