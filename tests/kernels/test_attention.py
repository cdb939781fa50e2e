"""The queue's kernel, run by Triton's interpreter on a CPU, against the plain way. On a GPU itself: test_gpu.py."""

import io
from typing import Any

import pytest
import torch
from helpers import unit
from interpreter import all_pass, inside, outside

from bingo_compress.kernels import negatives

pytest.importorskip("triton", reason="torch brings no Triton here")
from bingo_compress.kernels import attention

CASES = [(70, 300, 24, 0.2), (5, 64, 16, 0.1), (64, 1000, 256, 0.04), (3, 1, 16, 0.2)]


@pytest.mark.slow
@outside
def test_in_a_process_with_the_interpreter() -> None:
    all_pass(__file__, 2 * len(CASES) + 2)


def by_kernel(monkeypatch: pytest.MonkeyPatch, tile: attention.Tile | None) -> None:
    monkeypatch.setattr(negatives, "_by_kernel", lambda _: tile is not None)
    monkeypatch.setattr(negatives, "_tile", lambda *_: tile)


@inside
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(("rows", "queue", "dim", "temperature"), CASES)
def test_energy_key_and_gradient(
    rows: int, queue: int, dim: int, temperature: float, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, others = unit(rows, dim), unit(queue, dim, seed=1)
    masked = torch.rand(rows, queue, generator=torch.Generator().manual_seed(2)) < 0.3 if hidden else None
    found = []
    monkeypatch.setattr(attention, "PROGRAMS", 6)
    for tile in (None, *attention.TILES):
        by_kernel(monkeypatch, tile)
        asked = query.clone().requires_grad_()
        energy = negatives.negatives_energy(asked, others, masked, temperature)
        energy.square().sum().backward()
        key = negatives.expected_key(query, others, masked, temperature)
        found.append((energy.detach(), asked.grad, key))
    for plain, *fused in zip(*found, strict=True):
        for one in fused:
            assert (one - plain).norm() < 3e-3 * plain.norm()  # float16's fraction, and TF32's


@inside
def test_a_row_whose_every_negative_is_hidden_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    by_kernel(monkeypatch, attention.TILES[0])
    query, others = unit(2, 16).requires_grad_(), unit(100, 16, seed=1)
    masked = torch.zeros(2, 100, dtype=torch.bool)
    masked[0] = True
    energy = negatives.negatives_energy(query, others, masked, 0.2)
    torch.logaddexp(torch.zeros(2), energy).sum().backward()
    assert energy[0] < -9e8 and query.grad is not None
    assert query.grad[0].abs().max() == 0 and query.grad[1].abs().max() > 0


@inside
def test_a_tile_that_a_card_has_no_room_for_is_left_to_the_next(
    monkeypatch: pytest.MonkeyPatch, printed: io.StringIO
) -> None:
    whole, tried, room = attention.attended, [], [0]

    def small(*arguments: Any) -> Any:
        tried.append(arguments[-1])
        if arguments[-1].rows > room[0]:
            raise RuntimeError("out of resource: shared memory")
        return whole(*arguments)

    monkeypatch.setattr(attention, "attended", small)
    for rows, expected in ((128, attention.TILES[0]), (32, attention.TILES[2]), (0, None)):
        room[0] = rows
        negatives._tile.cache_clear()
        assert negatives._tile(torch.device("cpu"), 16) == expected
    assert printed.getvalue().count("warning: Triton cannot be used (out of resource: shared memory)") == 1
    tried.clear()
    negatives._tile.cache_clear()
    assert negatives._tile(torch.device("cpu"), 512) is None and not tried
    negatives._tile.cache_clear()
