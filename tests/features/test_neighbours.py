"""The search for neighbours: tiles and blocks, resumed, against brute force in float64; and IVF, whose recall is told
as it is.
"""

import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import clustered, interrupted_at, unit
from torch.nn.functional import normalize

from bingo_compress.errors import BingoError
from bingo_compress.features import neighbours
from bingo_compress.features.memmap import Matrix, Rows, Stored
from bingo_compress.features.neighbours import CPU, Search, load_faiss, mates, nearest_neighbours


@pytest.fixture(params=["faiss", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(neighbours, "load_faiss", lambda: None)
    elif load_faiss() is None:
        pytest.skip("faiss is not installed")
    return str(request.param)


def brute_force(queries: torch.Tensor, gallery: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, indices) of the `count` best by sorting all cosines, in float64."""
    one, other = (normalize(rows.double(), dim=1).numpy() for rows in (queries, gallery))
    cosines = one @ other.T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(cosines, order, 1), order


def brute_mates(rows: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, cosines) of the `count` best others."""
    cosines, order = brute_force(rows, rows, len(rows))
    others = order != np.arange(len(rows))[:, None]
    return order[others].reshape(len(rows), -1)[:, :count], cosines[others].reshape(len(rows), -1)[:, :count]


def features(count: int, dim: int = 24, seed: int = 0) -> torch.Tensor:
    """Rows of very different lengths: only cosines may count."""
    return unit(count, dim, seed=seed) * torch.linspace(0.1, 50, count)[:, None]


def small(monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> None:
    for name, size in sizes.items():
        monkeypatch.setattr(neighbours, name, size)


def same(one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, two, strict=True))


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize(("block", "tile"), [(7, 11), (64, 4), (1, 45), (20, 45), (13, 1)])
def test_tiles_and_blocks_of_any_size_equal_brute_force(
    backend: str, block: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, BLOCK=block, TILE=tile, PRODUCT={"cpu": 5})
    queries, gallery = features(20, seed=1), features(45, seed=2)
    similar, indices = nearest_neighbours(queries, gallery, 6)
    cosines, expected = brute_force(queries, gallery, 6)
    assert np.array_equal(indices.numpy(), expected)
    assert similar.numpy() == pytest.approx(cosines, abs=1e-6)
    assert similar.dtype == torch.float32 and indices.dtype == torch.int64
    assert nearest_neighbours(queries, gallery, 45)[1].sort().values.tolist() == [list(range(45))] * 20


@pytest.mark.parametrize("half", [False, True])
def test_mates_equal_brute_force(backend: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, BLOCK=16, TILE=10)
    rows = features(53).half() if half else features(53)
    bags, similar = mates(rows, 5, Search())
    expected, cosines = brute_mates(rows, 5)
    assert np.array_equal(bags.numpy(), expected)
    assert similar.numpy() == pytest.approx(cosines, abs=1e-6)
    assert bags.dtype == torch.int64


def test_rounding_to_float16_as_on_a_gpu_keeps_the_neighbours() -> None:
    """A GPU multiplies float16 rows of length one: what that changes is measured here, on float32 copies of such
    rows.
    """
    rows = clustered(2000, 128).half()
    rounded = normalize(rows.float(), dim=1).half().float()
    found = (rounded @ rounded.T).topk(6).indices[:, :, None] == torch.from_numpy(brute_force(rows, rows, 6)[1].copy())[
        :, None, :
    ]
    assert float(found.any(2).double().mean()) > 0.99


def test_copies_across_tiles_and_blocks_never_give_the_image_itself(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, BLOCK=8, TILE=6)
    rows, copies = features(30), [3, 7, 11, 19, 20, 21, 28]
    rows[copies] = rows[3].clone()
    bags, similar = mates(rows, 4, Search())
    assert not bool((bags == torch.arange(30)[:, None]).any())
    for image in copies:
        assert set(bags[image].tolist()) <= set(copies) - {image} and len(set(bags[image].tolist())) == 4
        assert similar[image].tolist() == pytest.approx([1.0] * 4, abs=1e-6)


def test_torch_and_faiss_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if load_faiss() is None:
        pytest.skip("faiss is not installed")
    by_faiss = mates(features(70), 9, Search())
    monkeypatch.setattr(neighbours, "load_faiss", lambda: None)
    by_torch = mates(features(70), 9, Search())
    assert torch.equal(by_faiss[0], by_torch[0]) and torch.allclose(by_faiss[1], by_torch[1], atol=1e-6)


def test_rows_of_a_file_give_what_they_give_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, BLOCK=16, TILE=10)
    rows, which = features(60).half(), torch.arange(60)[torch.arange(60) % 4 != 1]
    stored = Stored(tmp_path / "rows.f16", 24)
    stored.reserve(60)
    for start in (40, 0, 20):  # in any order
        stored.write(start, rows[start : start + 20])
    mapped = stored.read(60, 24)
    assert torch.equal(mapped, rows) and stored.path.stat().st_size == 60 * 24 * 2
    matrix: Matrix = Rows(mapped, which)
    assert same(mates(matrix, 5, Search()), mates(rows[which], 5, Search()))
    small(monkeypatch, LISTS=1, TRAIN=4)
    assert same(mates(matrix, 5, Search("ivf")), mates(rows[which], 5, Search("ivf")))


def test_a_folder_of_one_block_writes_nothing(tmp_path: Path, printed: StringIO) -> None:
    for how in ("exact", "ivf"):
        mates(clustered(500), 3, Search(how, CPU, tmp_path / "bags"))
    assert not (tmp_path / "bags").exists()
    mates(clustered(500), 3, Search("exact"))
    assert "images/s" not in printed.getvalue()


@pytest.mark.parametrize("how", ["exact", "ivf"])
def test_an_interrupted_search_goes_on_and_equals_the_whole(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: StringIO
) -> None:
    small(monkeypatch, BLOCK=300, TILE=130)
    rows = clustered(2000)
    whole = mates(rows, 4, Search(how, CPU, tmp_path / "whole"))
    assert same(whole, mates(rows, 4, Search(how)))  # in memory
    search = Search(how, CPU, tmp_path / "parts")
    saves = {"exact": 4, "ivf": 1 + 7 + 4}[how]  # centroids, seven blocks of lists
    with interrupted_at(monkeypatch, neighbours.checkpoint, "save", saves), pytest.raises(KeyboardInterrupt):
        mates(rows, 4, search)
    kept = {file: file.stat().st_mtime_ns for file in search.folder.glob("*")} if search.folder else {}
    assert len(kept) == saves - 1
    assert same(mates(rows, 4, search), whole)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())  # none was made again
    assert "images/s" in printed.getvalue()
    # One that is missing and one that is damaged are made again, and no other.
    files = sorted((tmp_path / "parts").glob("neighbours-*"))
    assert len(files) == 7
    files[2].unlink()
    files[5].write_bytes(files[5].read_bytes()[:-10])
    made: list[Path] = []
    real = neighbours.checkpoint.save
    monkeypatch.setattr(
        neighbours.checkpoint, "save", lambda file, *rest, **facts: (made.append(file), real(file, *rest, **facts))
    )
    assert same(mates(rows, 4, search), whole)
    assert made == [files[2], files[5]]
    assert f"{files[5].name} is damaged and is made again" in printed.getvalue()


# ---------------------------------------------------------------- IVF


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "spread"), [("faiss", 0.4), ("torch", 1.5)], indirect=["backend"])
def test_ivf_tells_its_recall_as_it_is(backend: str, spread: float, printed: StringIO) -> None:
    rows = clustered(6000, spread=spread)
    bags, similar = mates(rows, 5, Search("ivf"))
    expected = brute_mates(rows, 5)[0]
    true = float((bags.numpy()[:, :, None] == expected[:, None, :]).any(2).mean())
    told = re.search(
        r"neighbours: IVF, (\d+) of 187 lists a query, recall@5 (\d\.\d+) on 1,000 exact queries", printed.getvalue()
    )
    assert told is not None
    assert float(told[2]) == pytest.approx(true, abs=0.015)  # three standard errors of 1,000 queries and a little
    assert true > 0.965
    assert int(told[1]) < 187
    # What is given is true of the rows that are given, the best first.
    given = torch.nn.functional.cosine_similarity(rows[:, None], rows[bags], dim=2)
    assert torch.allclose(similar, given, atol=1e-5)
    assert bool((similar.diff(dim=1) <= 0).all()) and not bool((bags == torch.arange(6000)[:, None]).any())
    assert all(len(set(bag)) == 5 for bag in bags.tolist())


def test_ivf_that_may_read_every_list_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, LISTS=0.1, WANTED=1.0, BLOCK=700)  # four lists
    rows = unit(1500, 8)
    assert np.array_equal(mates(rows, 5, Search("ivf"))[0].numpy(), brute_mates(rows, 5)[0])


def test_ivf_that_misses_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, PROBES=1)
    with pytest.raises(
        BingoError,
        match=r"search=ivf: expected a recall@5 of 0.95 or more, found 0\.[0-8]\d* with 1 lists .*--set search=exact",
    ):
        mates(unit(4000, 16), 5, Search("ivf"))


def test_ivf_is_refused_by_what_it_found_not_by_what_it_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    real = neighbours._Lists.search

    def careless(lists: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = real(lists, images)
        return {"indices": found["indices"].roll(1, 0), "similar": found["similar"] - 0.2}

    monkeypatch.setattr(neighbours._Lists, "search", careless)
    with pytest.raises(BingoError, match="search=ivf: expected a recall@5"):
        mates(clustered(3000), 5, Search("ivf"))


def test_ivf_with_copies_in_all_places(printed: StringIO) -> None:
    rows = clustered(600)
    rows[100:500] = rows[100].clone()
    bags, similar = mates(rows, 4, Search("ivf"))
    assert not bool((bags == torch.arange(600)[:, None]).any())
    assert similar[100:500].numpy() == pytest.approx(1, abs=1e-6)
    assert "recall@4 0.9" in printed.getvalue() or "recall@4 1.000" in printed.getvalue()
    assert mates(torch.ones(200, 4), 3, Search("ivf"))[0].shape == (200, 3)


def test_auto_is_exact_up_to_what_a_device_searches_in_minutes(backend: str) -> None:
    name = {"faiss": "faiss-cpu", "torch": "torch"}[backend]
    assert Search().describe(100_000) == f"{name} (exact)"
    assert Search().describe(100_001) == Search("ivf").describe(5) == f"{name} (IVF)"
    assert Search("exact").describe(10**9) == f"{name} (exact)"
    gpu = Search(device=torch.device("cuda"))
    assert [gpu.describe(count) for count in (10_000_000, 10_000_001)] == [
        "torch on cuda (exact)",
        "torch on cuda (IVF)",
    ]


def test_auto_searches_exactly_where_ivf_misses_too_much(
    monkeypatch: pytest.MonkeyPatch, printed: StringIO, tmp_path: Path
) -> None:
    small(monkeypatch, PROBES=1, EXACT_AT_MOST={"cpu": 3000}, BLOCK=1000)
    rows = unit(4000, 16)
    assert np.array_equal(mates(rows, 5, Search(folder=tmp_path))[0].numpy(), brute_mates(rows, 5)[0])
    assert "exact after all" in printed.getvalue() and "found 0." in printed.getvalue()


def test_faiss_absent_is_found_out_by_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert load_faiss() is None
    assert Search().describe(5) == "torch (exact)"
