"""Out of memory: each rung of the ladder gives the same student, and the last one says what to do."""

import copy
from typing import Any

import pytest
import torch
from helpers import dropping, encoder
from timm.layers import EvoNorm2dB0
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bingo_compress.errors import BingoError
from bingo_compress.runtime import distributed
from bingo_compress.training.out_of_memory import Frugal

VIEWS = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(name: str, failures: int, drop: bool = False, late: bool = False) -> tuple[dict[str, Tensor], Frugal]:
    """Two steps of SGD; the first `failures` passes run out of memory: after the forward pass, or (late) after the
    backward pass.
    """
    student = (dropping(encoder(name, 32)) if drop else encoder(name, 32)).train()
    model = nn.Sequential(student, nn.Linear(student.width, 4))
    torch.manual_seed(1)
    nn.init.normal_(model[1].weight, std=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    left = failures

    def spend() -> None:
        nonlocal left
        if left:
            left -= 1
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    def run(views: Tensor) -> Tensor:
        found: Tensor = model(views)  # BatchNorm has seen the views when memory runs out
        if not late:
            spend()
        return found

    frugal = Frugal(model, student.backbone, run)

    def work(views: Tensor) -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = frugal(views).square().mean()
        with frugal.backward():
            loss.backward()
        spend()
        optimizer.step()

    for step in range(2):
        torch.manual_seed(step)
        frugal.step(work, VIEWS)
    return copy.deepcopy(model.state_dict()), frugal


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_recomputed_activations_give_the_same_student_bit_for_bit(
    name: str, drop: bool, late: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, _ = trained(name, 0, drop)
    found, frugal = trained(name, 1, drop, late)
    assert frugal.recomputes and frugal.parts == 1
    assert "out of memory: activations are recomputed from here on; slower, the same result" in capsys.readouterr().out
    assert all(torch.equal(value, found[key]) for key, value in plain.items())


@pytest.mark.parametrize(("failures", "parts"), [(2, 2), (3, 4)])
def test_micro_batches_give_the_same_student(failures: int, parts: int, capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = trained("test_vit", 0)
    found, frugal = trained("test_vit", failures)
    assert frugal.recomputes and frugal.parts == parts
    assert "the same result but for dropout's draws" in capsys.readouterr().out
    assert all(torch.allclose(value, found[key], atol=1e-5) for key, value in plain.items())
    assert not torch.allclose(
        *(model["1.weight"] for model in (trained("test_vit", 2, drop=True)[0], trained("test_vit", 0, drop=True)[0])),
        atol=1e-5,
    )


def test_a_student_with_batchnorm_is_not_cut_into_micro_batches() -> None:
    with pytest.raises(
        BingoError,
        match=r"out of memory, also with recomputed activations \(tried to allocate 20.00 GiB\); lower --batch-size",
    ):
        trained("test_resnet", 2)


def test_the_ladder_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BingoError, match="out of memory"):
        trained("test_vit", 100)
    assert capsys.readouterr().out.count("micro-batches") == 6


class Recomputing(nn.Module):
    """A backbone with a norm of any kind, whose activations can be recomputed as timm does."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.again = False

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.again = enable

    def forward(self, views: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.layers, views, use_reentrant=False) if self.again else self.layers(views)
        return found


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, EvoNorm2dB0, lambda width: nn.BatchNorm2d(width, momentum=None)])
def test_running_statistics_of_any_norm_learn_once_a_step_and_forbid_micro_batches(norm: Any) -> None:
    states = []
    for failures in (0, 1):
        torch.manual_seed(0)
        model = Recomputing(norm(4)).train()
        frugal = Frugal(model, model)

        def work(views: Tensor, model: Recomputing = model, frugal: Frugal = frugal) -> None:
            model.zero_grad()
            loss = frugal(views).square().sum()
            with frugal.backward():
                loss.backward()
            nonlocal failures
            if failures:
                failures -= 1
                raise torch.OutOfMemoryError("none left")

        for _ in range(2):
            frugal.step(work, VIEWS)
        states.append(
            {
                **model.state_dict(),
                **{name: value.grad for name, value in model.named_parameters() if value.grad is not None},
            }
        )
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["layers.1.running_var"], torch.ones(4))
    assert frugal.recomputes and model.again
    failures = 1
    with pytest.raises(BingoError, match="also with recomputed activations"):
        frugal.step(work, VIEWS)


def test_a_norm_of_each_view_alone_allows_micro_batches() -> None:
    model = Recomputing(nn.GroupNorm(2, 4)).train()
    frugal = Frugal(model, model)
    left = 2

    def work(views: Tensor) -> None:
        nonlocal left
        frugal(views)
        left -= 1
        if left >= 0:
            raise torch.OutOfMemoryError("none left")

    frugal.step(work, VIEWS)
    assert frugal.parts == 2


def test_one_of_several_processes_does_not_take_a_step_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with pytest.raises(
        BingoError, match=r"out of memory in process 1 of 2 \(tried to allocate 20.00 GiB\); lower --batch-size"
    ):
        trained("test_vit", 1)
