"""The proof on screen."""

from pathlib import Path
from typing import Any

import pytest

from bingo_compress.models import exported
from bingo_compress.presenting import tables
from bingo_compress.runtime.run_dir import RunDir


def test_a_student_that_agrees_less_than_before_is_not_called_worse(printed: Any) -> None:
    for recall in ({}, {"start": 0.4, "student": 0.4}, {"start": 0.4, "student": 0.5}):
        tables.say_agreement(recall)
    assert not printed.getvalue()
    tables.say_agreement({"start": 0.392, "student": 0.377})
    assert "does not say that it is worse" in " ".join(printed.getvalue().split())


@pytest.mark.parametrize("contract", [{}, {"classes": ["a", "b"]}])
def test_the_next_command_names_a_head_only_where_validate_writes_one(
    contract: dict[str, Any], tmp_path: Path, printed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with classes in it has the head that it was exported with: of kNN there is no linear one."""
    monkeypatch.setattr(exported, "files", lambda _: {"onnx": tmp_path / "student.onnx"})
    monkeypatch.setattr(exported, "contract", lambda _: contract)
    tables._next(RunDir(tmp_path))
    said = "".join(printed.getvalue().split())
    assert said.endswith("student.onnxPHOTOS" if contract else f"--head{tmp_path}/student.linear.npzPHOTOS")
