"""What is tried out before a run: it chooses what was measured to be faster, and leaves the student alone."""

import copy

import pytest
import torch
from helpers import encoder

from bingo_compress.runtime import devices, machine


@pytest.mark.parametrize(
    ("times", "wanted"), [([1.0, 0.5, 0.3], 4), ([1.0, 0.95, 0.3], 4), ([1.0, 0.95, 0.94], 1), ([1.0, 9.0, 0.1], 1)]
)
def test_the_threads_are_those_measured_fastest(
    times: list[float], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_cores", lambda: 4)
    asked = iter(times)
    monkeypatch.setattr(devices, "seconds", lambda work, times=3: next(asked))
    before = torch.get_num_threads()
    assert devices.choose_threads(encoder(), 32) == wanted
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_the_calibration_leaves_the_student_as_it_was() -> None:
    student = encoder()
    before = copy.deepcopy(student.state_dict())
    assert 1 <= devices.choose_threads(student, 32) <= machine.free_cores()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert not student.training


def test_a_compiler_that_fails_is_said_and_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object, **settings: object) -> None:
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    assert devices.compiled_if_faster(encoder(), torch.rand(2, 3, 32, 32), "on") is None
    assert capsys.readouterr().out == "torch.compile: not used, it failed (no compiler here)\n"


def test_what_a_backward_pass_needs_is_counted_once() -> None:
    weight = torch.nn.Parameter(torch.rand(8, 8))
    rows = torch.rand(16, 8)
    # The product keeps its input, not its weight; the sigmoid its result; the square (a power) its input, which is that
    # result.
    assert devices.saved_bytes(lambda: (rows @ weight).sigmoid().square()) == (16 * 8 + 16 * 8) * 4
    student = encoder()
    one, two = devices.step_bytes(student, 32, 64), devices.step_bytes(student, 32, 128)
    weights = 16 * sum(parameter.numel() for parameter in student.parameters())
    assert one - devices.BESIDE - weights > 0
    assert (two - devices.BESIDE - weights) / (one - devices.BESIDE - weights) == pytest.approx(2, rel=1e-3)
    assert not student.training


@pytest.mark.parametrize(
    ("compiled", "wanted", "used"), [(0.5, "auto", True), (0.95, "auto", False), (2.0, "on", True)]
)
def test_compile_is_used_where_it_was_measured_to_pay(
    compiled: float, wanted: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    asked = iter([compiled, 1.0])
    monkeypatch.setattr(devices, "seconds", lambda work, times=3: next(asked))
    student = encoder()
    assert (devices.compiled_if_faster(student, torch.rand(2, 3, 32, 32), wanted) is student) == used
