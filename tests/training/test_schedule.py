"""The learning rate, and a run's state on disk."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from bingo_compress.errors import BingoError
from bingo_compress.runtime import checkpoint
from bingo_compress.training.plan import learning_rate

# ---------------------------------------------------------------- learning rate


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    assert [learning_rate(step, 100, 5, 0.1) for step in range(5)] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])


def test_the_cosine_starts_at_the_peak_and_ends_near_zero() -> None:
    assert learning_rate(0, 1000, 0, 0.3) == pytest.approx(0.3)
    assert learning_rate(500, 1000, 0, 0.3) == pytest.approx(0.15)
    assert learning_rate(250, 1000, 0, 0.3) == pytest.approx(0.3 * (1 + math.sqrt(0.5)) / 2)
    assert 0 < learning_rate(999, 1000, 0, 0.3) < 1e-5
    assert learning_rate(1000, 1000, 0, 0.3) == pytest.approx(0, abs=1e-12)
    assert learning_rate(5000, 1000, 0, 0.3) == pytest.approx(0, abs=1e-12)


def test_after_the_warm_up_it_only_falls() -> None:
    rates = [learning_rate(step, 60, 10, 1.0) for step in range(61)]
    assert max(rates) == rates[9] == rates[10] == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert all(later > earlier for earlier, later in pairwise(rates[:10]))


def test_it_is_a_pure_function_and_linear_in_the_peak() -> None:
    steps = [7, 3, 50, 3, 7]
    assert [learning_rate(step, 80, 4, 0.2) for step in steps] == [learning_rate(step, 80, 4, 0.2) for step in steps]
    assert learning_rate(33, 80, 4, 0.4) == pytest.approx(2 * learning_rate(33, 80, 4, 0.2))


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 2), (3, 5)])
def test_short_runs_have_finite_rates_within_the_peak(total: int, warmup: int) -> None:
    assert all(0 < learning_rate(step, total, warmup, 0.1) <= 0.1 + 1e-12 for step in range(total))


# ---------------------------------------------------------------- checkpoint


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.arange(6.0).view(2, 3).T,  # not contiguous
        "b.c": torch.tensor(7),
        "half": torch.tensor([0.1, 65504.0]).half(),
        "flag": torch.tensor([True, False]),
        "channels": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }


def test_save_and_load_give_back_tensors_and_facts(tmp_path: Path) -> None:
    tensors = some_tensors()
    checkpoint.save(tmp_path / "x.safetensors", tensors, step=12, name="naïve", nested={"list": [1, 2]})
    found, facts = checkpoint.load(tmp_path / "x.safetensors")
    assert facts == {"step": 12, "name": "naïve", "nested": {"list": [1, 2]}}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "header"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, some_tensors(), step=1)
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[:-20], "empty": b"", "garbage": b"garbage" * 40, "header": b"\xff" * 8 + whole[8:]}[damage]
    )
    with pytest.raises(BingoError, match=r"x\.safetensors") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_a_safetensors_file_of_another_program_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(BingoError, match="theirs"):
        checkpoint.load(tmp_path / "theirs.safetensors")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BingoError, match="none"):
        checkpoint.load(tmp_path / "none.safetensors")


def test_the_old_file_stays_when_a_save_fails_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"a": torch.ones(3)}, step=1)
    before = path.read_bytes()

    def half(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        Path(file).write_bytes(b"half of a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"a": torch.zeros(3)}, step=2)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert checkpoint.load(path)[1] == {"step": 1}


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(BingoError, match="no space"):
        checkpoint.save(tmp_path / "x.safetensors", {"a": torch.zeros(1000)})
    assert list(tmp_path.iterdir()) == []


def test_under_takes_whole_prefixes_only() -> None:
    tensors = {"head.a": torch.zeros(1), "head.b.c": torch.ones(1), "header.a": torch.zeros(1), "x": torch.zeros(1)}
    assert set(checkpoint.under(tensors, "head")) == {"a", "b.c"}


Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Maker] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(
        [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}], lr=0.01
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_an_optimizer_goes_on_bit_for_bit_after_a_round_trip(kind: str, tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
        return made.to(memory_format=torch.channels_last)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()

    whole = network()
    one = OPTIMIZERS[kind](list(whole.parameters()))
    train(whole, one, range(6))

    first = network()
    two = OPTIMIZERS[kind](list(first.parameters()))
    train(first, two, range(3))
    checkpoint.save(
        tmp_path / "o.safetensors",
        checkpoint.optimizer_tensors(two) | {f"m.{k}": v for k, v in first.state_dict().items()},
    )
    tensors, _ = checkpoint.load(tmp_path / "o.safetensors")
    second = network()
    second.load_state_dict(checkpoint.under(tensors, "m"))
    three = OPTIMIZERS[kind](list(second.parameters()))
    checkpoint.load_optimizer(three, {name: tensor for name, tensor in tensors.items() if not name.startswith("m.")})
    train(second, three, range(3, 6))

    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and bool(a.isfinite().all())
    fresh = network()
    fresh.load_state_dict(checkpoint.under(tensors, "m"))
    train(fresh, OPTIMIZERS[kind](list(fresh.parameters())), range(3, 6))
    assert not torch.equal(next(fresh.parameters()), next(whole.parameters()))  # the state does matter
