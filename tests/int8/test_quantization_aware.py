"""Training with rounded numbers: what is rounded while it lasts, and that it brings the student nearer."""

from pathlib import Path

import pytest
import torch
from helpers import encoder, photos, recipe
from torch import nn

from bingo_compress.data import listing
from bingo_compress.features import extract
from bingo_compress.int8 import quantization_aware
from bingo_compress.models.encoder import Encoder

SIZE = 32


def test_inside_weights_stand_on_the_steps_of_their_channel_and_outside_they_are_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = torch.randn(5, 3, 4, 4)
    exact = model(batch)
    with quantization_aware.rounded(model):
        weight = model[0].weight
        steps = weight / (before["0.weight"].abs().flatten(1).amax(1) / 63)[:, None, None, None]
        assert torch.allclose(steps, steps.round(), atol=1e-4) and not torch.equal(weight, before["0.weight"])
        found = model(batch)
        assert 0 < float((found - exact).abs().max()) < 0.1
        found.square().sum().backward()
        assert all(
            parameter.grad is not None and float(parameter.grad.abs().sum()) > 0 for parameter in model.parameters()
        )
    assert set(model.state_dict()) == set(before) and all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )
    assert torch.equal(model(batch), exact)


def test_inputs_are_rounded_to_256_steps_of_a_range_that_holds_zero() -> None:
    hook = quantization_aware._Input()
    module = nn.Conv2d(1, 1, 1)
    (found,) = hook(module, (torch.linspace(2, 10, 5000),))
    assert (
        len(found.unique()) <= 256 and float((found - torch.linspace(2, 10, 5000)).abs().max()) <= 10 / 255 / 2 + 1e-6
    )
    assert float(hook(module, (torch.zeros(3),))[0].abs().max()) == 0
    with torch.no_grad():
        wide = hook(module, (torch.tensor([50.0]),))[0]
    assert float(wide) < 11  # only training moves the range


def test_a_hardswish_after_pooling_is_not_rounded_as_in_the_file() -> None:
    hook = quantization_aware._Input()
    pooled, before = torch.rand(4, 9, 1, 1), torch.rand(4, 9, 2, 2)
    assert torch.equal(hook(nn.Hardswish(), (pooled,))[0], pooled)
    assert not torch.equal(hook(nn.Hardswish(), (before,))[0], before)
    assert not torch.equal(quantization_aware._Input()(nn.Conv2d(9, 9, 1), (pooled,))[0], pooled)


@pytest.mark.slow
def test_finetuning_brings_the_rounded_student_nearer_to_what_it_is_in_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = listing.list_images(photos(tmp_path / "photos", 24))
    student = encoder("test_efficientnet", SIZE)
    shown = extract.pixels_of(student.preprocessing, folder, range(len(folder.files)), len(folder.files))

    def rounded(tuned: Encoder) -> torch.Tensor:
        with quantization_aware.rounded(tuned.backbone), torch.no_grad():
            return tuned(extract.to_float(shown))

    with torch.no_grad():
        exact = student.eval()(extract.to_float(shown))
    before = {key: value.clone() for key, value in student.backbone.state_dict().items()}
    far = 1 - torch.cosine_similarity(rounded(student), exact).mean()
    monkeypatch.setattr(quantization_aware, "EPOCHS", 8)
    (tmp_path / "work").mkdir()
    tuned = quantization_aware.finetune(recipe(data=str(folder.root)), student, folder, tmp_path / "work", set())
    assert 1 - torch.cosine_similarity(rounded(tuned), exact).mean() < 0.9 * far
    after = tuned.backbone.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    # Statistics stay: the file has them folded in.
    assert moved and not any("running" in key or "num_batches" in key for key in moved)
