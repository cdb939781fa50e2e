"""The queue of negatives, against a plain list."""

from collections import deque

import pytest
import torch

from bingo_compress.training.state import FeatureQueue

CPU = torch.device("cpu")


def rows(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings that say which image they are of: image i is (i, -i)."""
    images = torch.arange(first, first + count)
    return torch.stack((images, -images), dim=1).float(), images


def held(queue: FeatureQueue) -> list[int]:
    negatives = queue.negatives()
    assert torch.equal(negatives[:, 0], -negatives[:, 1])
    return sorted(negatives[:, 0].int().tolist())


def test_starts_empty_and_grows_only_by_what_is_pushed() -> None:
    queue = FeatureQueue(5, 2, CPU)
    assert len(queue) == 0
    assert queue.negatives().shape == (0, 2)
    assert queue.holding(torch.tensor([[0, -1]])).shape == (1, 0)
    queue.push(*rows(1, 3))
    assert len(queue) == 3
    assert held(queue) == [1, 2, 3]


@pytest.mark.parametrize("size", [4, 5, 7])
def test_first_in_first_out_over_many_wraps(size: int) -> None:
    queue, expected = FeatureQueue(size, 2, CPU), deque[int](maxlen=size)
    first = 1
    for count in (3, 2, 4, 1, 9, 3, 20, 2, 4):  # some larger than the queue itself
        queue.push(*rows(first, count))
        expected.extend(range(first, first + count))
        first += count
        assert held(queue) == sorted(expected)
        assert len(queue) == len(expected)


def test_one_push_larger_than_the_queue_leaves_its_last_rows() -> None:
    queue = FeatureQueue(4, 2, CPU)
    queue.push(*rows(1, 1))
    queue.push(*rows(10, 11))
    assert held(queue) == [17, 18, 19, 20]
    queue.push(*rows(30, 1))
    assert held(queue) == [18, 19, 20, 30]


def test_holding_marks_exactly_the_rows_of_the_images_asked_for() -> None:
    queue = FeatureQueue(6, 2, CPU)
    queue.push(*rows(1, 4))
    queue.push(*rows(2, 1))  # image 2 twice
    asked = torch.tensor([[2, 4], [9, 9], [1, 77], [3, 3]])
    found = queue.holding(asked)
    assert found.shape == (4, 5)
    in_queue = queue.negatives()[:, 0].int().tolist()
    assert found.tolist() == [[image in wanted for image in in_queue] for wanted in asked.tolist()]
    assert found.sum(1).tolist() == [3, 0, 1, 1]


def test_holding_follows_the_rows_that_were_replaced() -> None:
    queue = FeatureQueue(3, 2, CPU)
    queue.push(*rows(1, 3))
    queue.push(*rows(8, 1))
    assert int(queue.holding(torch.tensor([[1]])).sum()) == 0
    assert int(queue.holding(torch.tensor([[8]])).sum()) == 1


def test_pushed_rows_are_copies() -> None:
    queue = FeatureQueue(3, 2, CPU)
    embeddings, images = rows(1, 2)
    queue.push(embeddings, images)
    embeddings.zero_()
    assert held(queue) == [1, 2]


@pytest.mark.parametrize("pushed", [0, 2, 5, 12])
def test_state_round_trip_goes_on_as_the_first_queue_does(pushed: int) -> None:
    first, second = FeatureQueue(5, 2, CPU), FeatureQueue(5, 2, CPU)
    if pushed:
        first.push(*rows(1, pushed))
    second.push(*rows(50, 4))
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for step in range(4):
        assert len(second) == len(first)
        assert torch.equal(second.negatives(), first.negatives())
        asked = torch.arange(30).view(10, 3)
        assert torch.equal(second.holding(asked), first.holding(asked))
        for queue in (first, second):
            queue.push(*rows(20 + step, 2))
