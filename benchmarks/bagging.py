"""Exact nearest neighbours of the tool against plain faiss IndexFlatIP, and IVF with its recall; or a million embeddings in bounded memory.

python benchmarks/bagging.py [--count 100000] [--dim 128] [--threads 2] [--json FILE]
python benchmarks/bagging.py --million [--json FILE]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from bingo_compress import meter, neighbours

K = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--million", action="store_true", help="1,000,000 embeddings by IVF, from a memory-mapped file, blocks written")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    faiss.omp_set_num_threads(chosen.threads)
    facts = million(chosen.dim) if chosen.million else exact(chosen.count, chosen.dim)
    print("\n".join(f"{name:<16}{value:>14,.2f}" for name, value in facts.items()))
    if chosen.json:
        chosen.json.write_text(json.dumps({"threads": chosen.threads, **facts}, indent=2) + "\n")


def clustered(count: int, dim: int) -> torch.Tensor:
    """float16 (count, dim) of length one: a cluster for every hundred rows."""
    random = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(max(count // 100, 1), dim, generator=random), dim=1)
    rows = torch.empty(count, dim, dtype=torch.float16)
    for part in torch.arange(count).split(65536):
        noisy = centres[part % len(centres)] + 0.07 * torch.randn(len(part), dim, generator=random)
        rows[part] = torch.nn.functional.normalize(noisy, dim=1).half()
    return rows


def exact(count: int, dim: int) -> dict[str, float]:
    """Seconds of each, and the tool's time as a share of faiss's; the neighbours' agreement."""
    rows = clustered(count, dim)
    start = time.perf_counter()
    index = faiss.IndexFlatIP(dim)
    plain = torch.nn.functional.normalize(rows.float(), dim=1).numpy()
    index.add(plain)
    theirs = np.concatenate([index.search(plain[first : first + 1024], K)[1] for first in range(0, count, 1024)])
    faiss_s = time.perf_counter() - start
    start = time.perf_counter()
    ours = neighbours.mates(rows, K - 1, neighbours.Search("exact"))[0]
    ours_s = time.perf_counter() - start
    start = time.perf_counter()
    lists = neighbours.mates(rows, K - 1, neighbours.Search("ivf"))[0]
    ivf_s = time.perf_counter() - start
    same = float(np.mean([len(set(one) & set(two)) / (K - 1) for one, two in zip(ours.tolist(), theirs[:, 1:].tolist(), strict=True)]))
    recall = float((lists[:, :, None] == ours[:, None, :]).any(2).float().mean())
    return {
        "count": count, "dim": dim, "faiss_flat_s": faiss_s, "ours_s": ours_s, "ours/faiss": ours_s / faiss_s, "agreement": same,
        "ivf_s": ivf_s, "ivf_recall": recall,
    }  # fmt: skip


def million(dim: int) -> dict[str, float]:
    """A million embeddings in a memory-mapped file; what the process held before, and at most."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "embeddings.f16"
        clustered(1_000_000, dim).numpy().tofile(file)
        rows = torch.from_numpy(np.memmap(file, np.float16, "c").reshape(-1, dim))
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        before = peak()
        start = time.perf_counter()
        neighbours.mates(rows, K - 1, neighbours.Search("ivf", folder=Path(folder) / "blocks"))
        return {"count": len(rows), "dim": dim, "seconds": time.perf_counter() - start, "before_MB": before / 1e6, "peak_MB": peak() / 1e6,
                "peak_ever_MB": meter.peak_memory(torch.device("cpu")) / 1e6}  # fmt: skip


def peak() -> int:
    """Bytes: the most this process held since the mark was set."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
