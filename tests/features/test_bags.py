"""The ways of bagging beside kNN, and the report on bags, against brute force in plain loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import unit

from bingo_compress.data.image_list import ImageList
from bingo_compress.errors import BingoError
from bingo_compress.features import bagging
from bingo_compress.features.bagging import BAGGERS, Seen, mutual, purity, report
from bingo_compress.features.memmap import TeacherPass
from bingo_compress.features.neighbours import load_faiss

faiss = pytest.mark.skipif(load_faiss() is None, reason="faiss is not installed")


def clustered(count: int = 45, dim: int = 6) -> torch.Tensor:
    """Rows in three loose clusters, of very different lengths: only cosines may count."""
    rows = unit(3, dim, seed=7)[torch.arange(count) % 3] + 0.9 * unit(count, dim, seed=8)
    return rows * torch.linspace(0.2, 30, count)[:, None]


def looking(
    features: torch.Tensor,
    own: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    clusters: int = 0,
    seed: int = 0,
) -> Seen:
    count = len(features)
    views = torch.empty(count, 0, 1) if own is None else own[:, :, None]
    folders = [""] * count if labels is None else [f"{int(label)}/" for label in labels]
    # One more, of a class of its own, which is not bagged.
    images = ImageList(Path(), (*(f"{folder}{number}.jpg" for number, folder in enumerate(folders)), "other/0.jpg"), ())
    return Seen(TeacherPass(features, torch.ones(count, 1), views, ""), images, torch.arange(count), clusters, seed)


def cosines(features: torch.Tensor) -> np.ndarray:
    rows = features.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1)[:, None]
    return np.asarray(rows @ rows.T)


def neighbours(similar: np.ndarray, count: int) -> list[list[int]]:
    """The `count` most similar others of each image, best first."""
    return [[j for j in np.argsort(-row, kind="stable").tolist() if j != i][:count] for i, row in enumerate(similar)]


def held(bags: torch.Tensor) -> list[list[int]]:
    """Bags as lists; fails where an empty place is not at the end."""
    lists = []
    for row in bags.tolist():
        size = sum(image >= 0 for image in row)
        assert all(image >= 0 for image in row[:size]) and row[size:] == [-1] * (len(row) - size)
        lists.append(row[:size])
    return lists


# ---------------------------------------------------------------- adaptive


@pytest.mark.parametrize("bag_size", [1, 4, 10])
def test_adaptive_keeps_mutual_neighbours_that_are_as_close_as_the_images_own_views(bag_size: int) -> None:
    features = clustered()
    similar, near = cosines(features), neighbours(cosines(features), bag_size)
    own = 0.75 + 0.25 * torch.rand(len(features), 3, generator=torch.Generator().manual_seed(0))
    expected = [
        [j for j in bag if i in near[j] and similar[i, j] >= min(own[i].tolist())] for i, bag in enumerate(near)
    ]
    bags = BAGGERS["adaptive"](looking(features, own), bag_size)
    assert bags.shape == (45, bag_size) and bags.dtype == torch.int64
    assert held(bags) == expected
    # Each cut takes something away and leaves something.
    only_mutual = sum(i in near[j] for i, bag in enumerate(near) for j in bag)
    assert 0 < sum(map(len, expected)) < only_mutual < 45 * bag_size
    assert any(not bag for bag in expected) and any(expected)


def test_adaptive_without_stored_views_keeps_all_mutual_neighbours() -> None:
    features = clustered()
    near = neighbours(cosines(features), 5)
    assert held(BAGGERS["adaptive"](looking(features), 5)) == [
        [j for j in bag if i in near[j]] for i, bag in enumerate(near)
    ]


def test_adaptive_takes_the_least_similar_own_view_as_its_bound() -> None:
    features = clustered()
    strict, loose = torch.full((45, 2), 1.01), torch.tensor([1.01, -1.0]).expand(45, 2)
    assert held(BAGGERS["adaptive"](looking(features, strict), 5)) == [[]] * 45
    assert torch.equal(BAGGERS["adaptive"](looking(features, loose), 5), BAGGERS["adaptive"](looking(features), 5))


# ---------------------------------------------------------------- k-means, labels, none


def islands(sizes: tuple[int, ...], dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """(features, group of each row): groups around orthogonal axes, in mixed order and of differing lengths."""
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(3))]
    rows = torch.eye(dim)[groups] + 0.1 * unit(len(groups), dim, seed=4)
    return rows * torch.linspace(0.5, 20, len(groups))[:, None], groups


def check_groups(bags: torch.Tensor, groups: torch.Tensor, bag_size: int) -> None:
    """Every mate is another image of the same group, none twice, and as many as the group has."""
    for image, bag in enumerate(held(bags)):
        others = {other for other in range(len(groups)) if groups[other] == groups[image] and other != image}
        assert set(bag) <= others
        assert len(set(bag)) == len(bag) == min(bag_size, len(others))


@faiss
@pytest.mark.parametrize("bag_size", [2, 5, 20])
def test_kmeans_finds_separate_clusters_and_small_ones_leave_places_empty(bag_size: int) -> None:
    features, groups = islands((14, 9, 3))
    bags = BAGGERS["kmeans"](looking(features, clusters=3, seed=1), bag_size)
    assert bags.shape == (26, bag_size) and bags.dtype == torch.int64
    check_groups(bags, groups, bag_size)
    assert bool((bags < 0).any()) == (bag_size > 2)


@faiss
def test_kmeans_depends_on_the_seed_alone() -> None:
    features, _ = islands((14, 9, 3))
    one, two, other = (
        BAGGERS["kmeans"](looking(features, clusters=3, seed=seed), 4) for seed in (2**62 + 1, 2**62 + 1, 5)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


@faiss
def test_kmeans_makes_a_cluster_for_every_twenty_images_unless_told() -> None:
    features = clustered(45)
    wide = BAGGERS["kmeans"](looking(features, seed=0), 44)  # a bag that holds the whole cluster shows it
    clusters = {frozenset([image, *bag]) for image, bag in enumerate(held(wide))}
    assert len(clusters) == 2 and sum(map(len, clusters)) == 45
    single = BAGGERS["kmeans"](looking(features[:7]), 6)
    check_groups(single, torch.zeros(7), 6)
    alone = BAGGERS["kmeans"](looking(features[:7], clusters=100), 3)  # never more clusters than images
    assert held(alone) == [[]] * 7


def test_kmeans_without_faiss_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bingo_compress.features.neighbours.load_faiss", lambda: None)
    with pytest.raises(BingoError, match=r"--bags kmeans: expected faiss, found none; next: pip install .*--bags knn"):
        BAGGERS["kmeans"](looking(clustered()), 5)


@pytest.mark.parametrize("bag_size", [1, 3, 12])
def test_labels_give_images_of_the_same_label_never_the_image_itself(bag_size: int) -> None:
    labels = torch.tensor([0] * 9 + [1] * 4 + [2] * 1 + [3] * 6)[
        torch.randperm(20, generator=torch.Generator().manual_seed(0))
    ]
    bags = BAGGERS["labels"](looking(unit(20, 5), labels=labels, seed=3), bag_size)
    assert bags.shape == (20, bag_size) and bags.dtype == torch.int64
    check_groups(bags, labels, bag_size)
    assert held(bags)[labels.tolist().index(2)] == []
    assert purity(bags, labels) == 1.0


def test_labels_are_drawn_anew_by_seed_and_evenly() -> None:
    labels = torch.zeros(6)
    seen = torch.zeros(6, 6)
    drawn = [BAGGERS["labels"](looking(unit(6, 5), labels=labels, seed=seed), 2) for seed in range(400)]
    assert torch.equal(drawn[7], BAGGERS["labels"](looking(unit(6, 5), labels=labels, seed=7), 2)) and not torch.equal(
        drawn[7], drawn[8]
    )
    for bags in drawn:
        seen.scatter_add_(1, bags, torch.ones(6, 2))
    expected, deviation = 400 * 2 / 5, math.sqrt(400 * 0.4 * 0.6)
    apart = (seen - expected)[~torch.eye(6, dtype=torch.bool)]
    assert float(apart.abs().max()) < 4.5 * deviation
    assert float(seen.diagonal().sum()) == 0


def test_labels_without_labels_are_refused() -> None:
    with pytest.raises(BingoError, match=r"--bags labels: labels: expected one folder a class in .*; use --bags knn"):
        BAGGERS["labels"](looking(clustered()), 5)


def test_none_gives_bags_without_places() -> None:
    bags = BAGGERS["none"](looking(clustered()), 5)
    assert bags.shape == (45, 0) and bags.dtype == torch.int64


# ---------------------------------------------------------------- what bags are like


def patchy(count: int = 30, bag_size: int = 4) -> torch.Tensor:
    """Random bags with empty places at the ends of the rows, some rows empty."""
    generator = torch.Generator().manual_seed(6)
    bags = torch.full((count, bag_size), -1)
    for image in range(count):
        others = torch.tensor([other for other in range(count) if other != image])[
            torch.randperm(count - 1, generator=generator)
        ]
        size = int(torch.randint(bag_size + 1, (), generator=generator))
        bags[image, :size] = others[:size] // 2 * 2 if image % 2 else others[:size]
    return bags


def test_mutual_equals_brute_force() -> None:
    bags = patchy(12)
    expected = [[mate >= 0 and image in bags[mate].tolist() for mate in bag] for image, bag in enumerate(bags.tolist())]
    assert mutual(bags).tolist() == expected
    assert 0 < sum(map(sum, expected)) < int((bags >= 0).sum())
    assert mutual(torch.empty(5, 0, dtype=torch.int64)).shape == (5, 0)
    assert not bool(mutual(torch.full((3, 2), -1)).any())


def test_purity_counts_pairs_with_labels_alone() -> None:
    bags, labels = patchy(), torch.arange(30) % 4 - 1  # a quarter has no label
    pairs = [(image, mate) for image, bag in enumerate(bags.tolist()) for mate in bag if mate >= 0]
    known = [labels[image] == labels[mate] for image, mate in pairs if labels[image] >= 0 and labels[mate] >= 0]
    assert len(known) < len(pairs)
    assert purity(bags, labels) == pytest.approx(sum(map(bool, known)) / len(known))
    assert 0 < purity(bags, labels) < 1
    assert math.isnan(purity(bags, torch.full((30,), -1)))
    assert math.isnan(purity(torch.full((30, 2), -1), labels))


@pytest.mark.parametrize("rows", [1, 1024])
def test_the_report_equals_brute_force(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bagging, "ROWS", rows)  # 1: several blocks
    bags, features, labels = patchy(60), clustered(60), torch.arange(60) % 3
    lists, similar = held(bags), cosines(features)
    pairs = [(image, mate) for image, bag in enumerate(lists) for mate in bag]
    sizes = list(map(len, lists))
    assert len(pairs) > 64
    assert report(bags, features, labels) == pytest.approx(
        {
            "size_mean": sum(sizes) / 60,
            "size_least": min(sizes),
            "size_most": max(sizes),
            "empty": sizes.count(0) / 60,
            "similarity": sum(similar[pair] for pair in pairs) / len(pairs),
            "mutual": sum(image in lists[mate] for image, mate in pairs) / len(pairs),
            "purity": sum(image % 3 == mate % 3 for image, mate in pairs) / len(pairs),
        },
        abs=1e-6,
    )
    assert sizes.count(0) > 0
    assert "purity" not in report(bags, features)


def test_the_report_on_empty_bags_has_sizes_only() -> None:
    for bags in (torch.full((5, 3), -1), torch.empty(5, 0, dtype=torch.int64)):
        assert report(bags, unit(5, 4), torch.arange(5)) == {
            "size_mean": 0,
            "size_least": 0,
            "size_most": 0,
            "empty": 1,
        }
