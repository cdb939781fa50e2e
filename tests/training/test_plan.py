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
