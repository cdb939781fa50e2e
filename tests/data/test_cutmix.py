"""CutMix: the share that stays, every pixel in its place, and Beta(2, 2) draws."""

import math

import numpy as np
import pytest
import torch
from helpers import seeded

from bingo_compress.data.augment import cutmix


def test_cutmix_returns_the_share_that_stays() -> None:
    generator = seeded(11)
    for height, width in ((32, 32), (40, 24), (7, 9)) * 20:
        mixed, share = cutmix(torch.zeros(3, 3, height, width), torch.ones(3, 3, height, width), generator)
        assert 1 - float(mixed.double().mean()) == pytest.approx(share, abs=1e-9)
        assert torch.equal(mixed[0], mixed[2])
        rows, columns = mixed[0, 0].any(1), mixed[0, 0].any(0)
        assert torch.equal(mixed[0, 0].bool(), rows[:, None] & columns[None])  # one rectangle
        assert (rows.int().diff() != 0).sum() <= 2 and (columns.int().diff() != 0).sum() <= 2


def test_cutmix_keeps_every_pixel_in_its_place() -> None:
    first, second = torch.rand(2, 3, 24, 24, generator=seeded(12)), torch.rand(2, 3, 24, 24, generator=seeded(13))
    before = first.clone()
    mixed, share = cutmix(first, second, seeded(14))
    assert 0 < share < 1
    assert ((mixed == first) | (mixed == second)).all()
    assert float((mixed == first).double().mean()) == pytest.approx(share)
    assert torch.equal(first, before)


def test_cutmix_shares_are_beta_2_2_clipped_at_the_border() -> None:
    """lam ~ Beta(2, 2) has mean 0.5; patches that reach over the border leave more, 0.672 on average (by simulation
    here).
    """
    numbers = np.random.default_rng(0)
    side = np.sqrt(1 - numbers.beta(2, 2, 400_000))
    spans = [
        np.minimum(place + side / 2, 1) - np.maximum(place - side / 2, 0) for place in numbers.random((2, 400_000))
    ]
    expected = 1 - spans[0] * spans[1]
    generator, blank = seeded(15), torch.zeros(1, 1, 128, 128)
    found = np.array([cutmix(blank, blank, generator)[1] for _ in range(3000)])
    # A side loses a pixel to rounding on average: one percent of area.
    assert abs(found.mean() - expected.mean()) < 4 * expected.std() / math.sqrt(3000) + 0.01
    assert abs(found.std() - expected.std()) < 0.015
    for share in (0.1, 0.5, 0.9):
        assert abs(np.quantile(found, share) - np.quantile(expected, share)) < 0.03


def test_cutmix_draws_beta_2_2_before_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the centre held in the middle nothing is clipped, so lam itself is seen: mean 0.5, variance 0.05."""
    real, generator, blank = torch.rand, seeded(16), torch.zeros(1, 1, 256, 256)
    monkeypatch.setattr(
        torch,
        "rand",
        lambda count, generator: real(count, generator=generator) if count == 3 else torch.full((2,), 0.5),
    )
    found = np.array([cutmix(blank, blank, generator)[1] for _ in range(4000)])
    assert abs(found.mean() - 0.5) < 4 * math.sqrt(0.05 / 4000) + 0.01
    assert abs(found.var() - 0.05) < 0.005


def test_cutmix_is_drawn_from_the_generator() -> None:
    first, second = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    results = [cutmix(first, second, seeded(seed)) for seed in (17, 17, 18)]
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert results[0][1] != results[2][1]
