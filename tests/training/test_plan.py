"""What is left to the method is settled by it."""

from typing import Any

import pytest
from helpers import recipe

from bingo_compress.errors import BingoError
from bingo_compress.training.losses import settled
from bingo_compress.training.plan import settle


@pytest.mark.parametrize(("method", "own"), [("bingo", 0.1), ("seed", 0.01)])
def test_the_teachers_temperature_is_settled_by_the_method_too(method: str, own: float) -> None:
    found = [
        settled(method, recipe(method=method, teacher_temperature=given).model_dump())["teacher_temperature"]
        for given in (0.0, 0.03)
    ]
    assert found == [own, 0.03]
    assert settle(settle(recipe(method=method))) == settle(recipe(method=method)) != recipe(method=method)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "mean"),
        ({"variant": "paper"}, "drawn"),
        ({"method": "seed"}, "drawn"),
        ({"method": "seed", "stored_views": "mean"}, "mean"),
        ({"stored_views": "drawn"}, "drawn"),
        ({"views": "online"}, "drawn"),
    ],
)
def test_what_a_target_is_is_settled_by_the_variant(changes: dict[str, Any], expected: str) -> None:
    assert settle(recipe(**changes)).stored_views == expected


def test_the_mean_of_views_that_are_not_stored_is_refused() -> None:
    with pytest.raises(BingoError, match=r"stored_views=mean.*--views online"):
        settle(recipe(stored_views="mean", views="online"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"student_weights": "random"}, 0.6),
        ({"student_weights": "random", "crop_scale_min": 0.2}, 0.2),
        ({"student_weights": "student.safetensors"}, 0.2),
        ({"student_weights": "random", "method": "moco"}, 0.2),
        ({"student_weights": "random", "method": "seed"}, 0.6),
    ],
)
def test_how_much_a_crop_keeps_follows_from_the_start(changes: dict[str, Any], expected: float) -> None:
    assert settle(recipe(**changes)).crop_scale_min == expected
