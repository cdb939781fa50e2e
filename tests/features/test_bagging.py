"""Bags and neighbours, against a brute force in float64 numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import digests_of, listed, unit

from bingo_compress.data.image_list import ImageList
from bingo_compress.errors import BingoError
from bingo_compress.features import neighbours
from bingo_compress.features.bagging import BAGGERS, Seen, knn, load, save
from bingo_compress.features.memmap import TeacherPass
from bingo_compress.runtime import checkpoint
from bingo_compress.runtime.made_of import made_of

BACKENDS = ["faiss", "torch"]


def test_saved_bags_say_whose_they_are(tmp_path: Path) -> None:
    made = made_of("bags", images="some")
    for names in (["a/1.jpg", "ö\udcff.png", ""], [], [""]):
        bags = torch.arange(2 * len(names)).reshape(-1, 2) - 1
        save(tmp_path / "bags.safetensors", bags, listed(names), made)
        found = load(tmp_path / "bags.safetensors")
        assert torch.equal(found.bags, bags) and found.names == tuple(names)
        assert np.array_equal(found.digests, digests_of(names))
        assert checkpoint.made_of(tmp_path / "bags.safetensors") == made


@pytest.mark.parametrize(
    "changes",
    [
        {"ends": torch.tensor([2, 1])},
        {"ends": torch.tensor([1, 3])},
        {"ends": torch.tensor([-1, 2])},
        {"ends": torch.tensor([2])},
        {"digests": torch.zeros(1, 32, dtype=torch.uint8)},
        {"names": torch.zeros(2)},
        {"bags": torch.zeros(2)},
    ],
)
def test_bags_of_other_images_than_they_say_are_refused(changes: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save(tmp_path / "bags.safetensors", torch.zeros(2, 1), listed(["a", "b"]))
    tensors, _ = checkpoint.load(tmp_path / "bags.safetensors")
    checkpoint.save(tmp_path / "bags.safetensors", tensors | changes)
    with pytest.raises(BingoError, match=r"bags\.safetensors"):
        load(tmp_path / "bags.safetensors")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(neighbours, "load_faiss", lambda: None)
    elif neighbours.load_faiss() is None:
        pytest.skip("faiss is not installed")
    return str(request.param)


def brute_force(
    queries: np.ndarray, gallery: np.ndarray, count: int, exclude_self: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, indices) of the `count` best by sorting all cosines."""
    queries, gallery = queries.astype(np.float64), gallery.astype(np.float64)
    cosines = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        gallery / np.linalg.norm(gallery, axis=1)[:, None]
    ).T
    if exclude_self:
        np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(cosines, order, 1), order


def features(count: int, dim: int = 24, seed: int = 0) -> torch.Tensor:
    """Rows of very different lengths: only cosines may count."""
    lengths = torch.linspace(0.1, 50, count)[:, None]
    return unit(count, dim, seed=seed) * lengths


@pytest.mark.parametrize("bag_size", [1, 5, 59])
def test_knn_equals_brute_force_and_never_holds_the_image_itself(backend: str, bag_size: int) -> None:
    rows = features(60)
    bags, similar = knn(rows, bag_size)
    cosines, indices = brute_force(rows.numpy(), rows.numpy(), bag_size, exclude_self=True)
    assert bags.shape == similar.shape == (60, bag_size)
    assert bags.dtype == torch.int64
    assert np.array_equal(bags.numpy(), indices)
    assert similar.numpy() == pytest.approx(cosines, abs=1e-6)
    assert not bool((bags == torch.arange(60)[:, None]).any())


def test_half_precision_features_give_the_neighbours_of_their_values(backend: str) -> None:
    rows = unit(50, 16, seed=2).half()
    assert np.array_equal(knn(rows, 4)[0].numpy(), brute_force(rows.numpy(), rows.numpy(), 4, exclude_self=True)[1])


def test_an_image_with_many_copies_gets_copies_never_itself(backend: str) -> None:
    rows = features(30)
    rows[[3, 7, 11, 19, 20, 21, 28]] = rows[3].clone()
    bags, similar = knn(rows, 4)
    assert bags.shape == (30, 4)
    assert not bool((bags == torch.arange(30)[:, None]).any())
    copies = {3, 7, 11, 19, 20, 21, 28}
    for image in copies:
        assert set(bags[image].tolist()) <= copies - {image}
        assert len(set(bags[image].tolist())) == 4
    assert similar[3].tolist() == pytest.approx([1.0] * 4, abs=1e-6)


def test_all_images_the_same_still_gives_bags_without_the_image_itself(backend: str) -> None:
    bags, _ = knn(torch.ones(12, 8), 3)
    assert all(len(set(bag)) == 3 and row not in bag for row, bag in enumerate(bags.tolist()))


def test_a_larger_bag_goes_on_where_the_smaller_ends(backend: str) -> None:
    rows = features(40)
    assert torch.equal(knn(rows, 20)[0][:, :5], knn(rows, 5)[0])


@pytest.mark.parametrize("name", sorted(set(BAGGERS) - {"none"}))
def test_every_way_of_bagging_gives_other_images_and_empty_places_last(name: str) -> None:
    images = ImageList(Path(), tuple(f"{number % 3}/{number}.jpg" for number in range(25)), ())
    taught = TeacherPass(features(25), features(25), torch.empty(25, 0, 8), "")
    seen = Seen(taught, images, torch.arange(25), 3, seed=0)
    bags = BAGGERS[name](seen, 5)
    assert bags.shape == (25, 5) and bags.dtype == torch.int64
    assert int(bags.min()) >= -1 and int(bags.max()) < 25
    assert not bool((bags == torch.arange(25)[:, None]).any())
    assert bool((bags >= 0).any())
    for row in bags.tolist():
        held = [image for image in row if image >= 0]
        assert len(set(held)) == len(held) and row[: len(held)] == held
