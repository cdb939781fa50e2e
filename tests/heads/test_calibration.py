"""Temperature, calibration error and the distance of "none of these", against numbers worked out here."""

import math

import pytest
import torch
from helpers import unit

from bingo_compress.evaluation import probes
from bingo_compress.heads import calibration


def test_the_calibration_error_is_the_one_worked_out_by_hand() -> None:
    """Of 15 bins (0.4, 0.467] holds one image, wrong; (0.6, 0.667] two, one right; (0.933, 1] two, both right."""
    sure = torch.tensor([0.45, 0.61, 0.65, 0.95, 1.0])
    shares = torch.stack([sure, *[(1 - sure) / 3] * 3], 1)
    labels = torch.tensor([1, 0, 2, 0, 0])
    by_hand = (1 * 0.45 + 2 * abs(0.5 - 0.63) + 2 * (1 - 0.975)) / 5
    assert calibration.calibration_error(shares, labels) == pytest.approx(by_hand, abs=1e-6)


def test_a_probability_at_the_edge_of_a_bin_is_in_the_lower_one_and_zero_in_the_first() -> None:
    shares = torch.tensor([[3 / 15, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert calibration.calibration_error(shares, torch.tensor([0, 0])) == pytest.approx((0.8 + 1.0) / 2)


def test_the_temperature_of_logits_that_are_too_sure_is_found() -> None:
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 4, generator=random, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=random)[:, 0]
    for heat in (0.3, 1.0, 3.0):
        found = calibration.temperature(lambda each, heat=heat: (heat * logits / each).log_softmax(1), labels)
        assert found == pytest.approx(heat, rel=0.05)
    before = calibration.calibration_error((3 * logits).softmax(1), labels)
    after = calibration.calibration_error(logits.softmax(1), labels)
    assert after < 0.02 < before


def test_a_head_that_is_always_right_is_not_taken_for_certain() -> None:
    logits = torch.eye(3, dtype=torch.float64).repeat(10, 1) * 5
    found = calibration.temperature(lambda each: (logits / each).log_softmax(1), torch.arange(3).repeat(10))
    # By hand: odds of the true class to one other are e^(5 / T) = (31 / 32) / (1 / 64).
    assert found == pytest.approx(5 / math.log(62), rel=1e-3)


def test_the_stated_share_of_held_out_images_is_beyond_the_threshold() -> None:
    centres, labels = unit(4, 16, seed=1), torch.arange(400) % 4
    rows = probes.normalised(centres[labels] + 0.8 * unit(400, 16, seed=2))
    limit = calibration.threshold(rows, labels, 4, torch.arange(400) // 4 % 5)
    means = calibration.class_means(rows, labels, 4)
    assert means.norm(dim=1).tolist() == pytest.approx([1] * 4)
    assert 0.02 <= float((calibration.distances(rows, means) > limit).double().mean()) <= 0.06
    strangers = probes.normalised(-centres[labels] + 0.8 * unit(400, 16, seed=3))
    assert float((calibration.distances(strangers, means) > limit).double().mean()) > 0.9
    assert calibration.class_means(rows, labels, 5)[4].tolist() == [0] * 16
