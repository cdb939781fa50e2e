"""The proof on screen."""

from typing import Any

from bingo_compress.presenting import tables


def test_a_student_that_agrees_less_than_before_is_not_called_worse(printed: Any) -> None:
    for recall in ({}, {"start": 0.4, "student": 0.4}, {"start": 0.4, "student": 0.5}):
        tables.say_agreement(recall)
    assert not printed.getvalue()
    tables.say_agreement({"start": 0.392, "student": 0.377})
    assert "does not say that it is worse" in " ".join(printed.getvalue().split())
