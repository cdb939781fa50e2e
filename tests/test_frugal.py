"""Out of memory: each rung of the ladder gives the same student, and the last one says what to do."""

import copy
from typing import Any

import pytest
import torch
from helpers import encoder
from torch import Tensor, nn

from bingo_compress.errors import BingoError
from bingo_compress.frugal import Frugal

VIEWS = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(name: str, failures: int) -> tuple[dict[str, Tensor], Frugal]:
    """Two steps of SGD; the first `failures` forward passes run out of memory half-way."""
    student = encoder(name, 32).train()
    model = nn.Sequential(student, nn.Linear(student.width, 4))
    torch.manual_seed(1)
    nn.init.normal_(model[1].weight, std=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    left = failures

    def run(views: Tensor) -> Tensor:
        nonlocal left
        found: Tensor = model(views)  # BatchNorm has seen the views when memory runs out
        if left:
            left -= 1
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return found

    frugal = Frugal(model, student.backbone, run)

    def work(views: Tensor) -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = frugal(views).square().mean()
        with frugal.backward():
            loss.backward()
        optimizer.step()

    for _ in range(2):
        frugal.step(work, VIEWS)
    return copy.deepcopy(model.state_dict()), frugal


@pytest.mark.parametrize(("name", "failures", "parts"), [("test_resnet", 1, 1), ("test_vit", 1, 1), ("test_vit", 2, 2), ("test_vit", 3, 4)])
def test_every_rung_gives_the_same_student(name: str, failures: int, parts: int, capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = trained(name, 0)
    found, frugal = trained(name, failures)
    assert frugal.recomputes and frugal.parts == parts
    assert "out of memory" in capsys.readouterr().out
    for key, value in plain.items():
        if "num_batches_tracked" not in key:
            assert torch.allclose(value, found[key], atol=1e-5), key


def test_a_student_with_batchnorm_is_not_cut_into_micro_batches() -> None:
    with pytest.raises(
        BingoError, match=r"out of memory, also with recomputed activations \(tried to allocate 20.00 GiB\); lower --batch-size"
    ):
        trained("test_resnet", 2)


def test_the_ladder_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BingoError, match="out of memory"):
        trained("test_vit", 100)
    assert capsys.readouterr().out.count("micro-batches") == 6


def test_statistics_stand_still_in_the_backward_pass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    frugal = Frugal(model, model)
    with frugal.backward():
        model(VIEWS)
    assert torch.equal(model[1].running_mean, torch.zeros(4)) and model[1].momentum == 0.1
    model(VIEWS)
    assert not torch.equal(model[1].running_mean, torch.zeros(4))
