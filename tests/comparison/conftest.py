"""One uninterrupted comparison for the files of this room."""

from functools import partial
from typing import Any

import pytest
import safetensors.torch
from compared import EACH, KINDS, METHODS, Ground, World
from helpers import encoder, photos, recipe

from bingo_compress.comparison import side_by_side
from bingo_compress.evaluation import probes
from bingo_compress.features import teacher_pass

STRENGTHS = (0.1, 1.0)  # fewer fits: quicker


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    root = tmp_path_factory.mktemp("compare")
    weights = root / "teacher.safetensors"
    tensors = encoder("test_resnet", 32, seed=9).backbone.state_dict()
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, weights)
    data = photos(root / "photos", EACH, KINDS)
    return Ground(data, recipe(data=str(data), teacher_weights=str(weights), crop_scale_min=0.2))


@pytest.fixture(scope="session")
def world(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> World:
    out = tmp_path_factory.mktemp("compared") / "out"
    passes = {"_plain_shard": 0, "_view_shard": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "L2_STRENGTHS", STRENGTHS)
        for name in passes:

            def counted(real: Any, name: str, *given: Any) -> Any:
                passes[name] += 1
                return real(*given)

            patch.setattr(teacher_pass, name, partial(counted, getattr(teacher_pass, name), name))
        table = side_by_side.compare(ground.base, ground.data, None, METHODS, [0, 1], out)
    return World(ground.data, ground.base, out, table, dict(passes))


@pytest.fixture(autouse=True)
def as_in_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "L2_STRENGTHS", STRENGTHS)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "train", lambda *_: pytest.fail("something was trained"))
