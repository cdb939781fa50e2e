"""Files of the edge profile in the toolchains that are installed: here, or each in an environment below $TOOLCHAINS.
One has classes in it: four outputs.
"""

import os
from pathlib import Path

import pytest
import torch
from edge_models import headed
from helpers import encoder

from bingo_compress import verify
from bingo_compress.exporters.golden import drawn, write_golden
from bingo_compress.exporters.onnx import PROFILES, export_onnx
from bingo_compress.models import exported
from bingo_compress.models.exported import runner_by_name
from bingo_compress.toolchains import child
from bingo_compress.toolchains.place import way

STUDENTS = ("test_efficientnet", "test_vit")


@pytest.fixture(scope="module", params=STUDENTS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "student.onnx"
    size = 160 if request.param == "test_vit" else 64
    pixels = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    contract = export_onnx(encoder(request.param, size), pixels, path, {}, PROFILES["edge"])
    if request.param == "test_efficientnet":
        contract = headed(path, path, picture_files(path.parent), between=True)[1].contract
    write_golden(path, contract, runner_by_name(path))
    return path


def picture_files(folder: Path) -> list[str]:
    for name, picture in drawn().items():
        (folder / name).write_bytes(picture)
    return [str(folder / name) for name in drawn()]


@pytest.mark.slow
@pytest.mark.parametrize("name", child.TOOLCHAINS)
def test_a_file_of_the_edge_profile_is_right(name: str, file: Path) -> None:
    elsewhere = Path(os.environ.get("TOOLCHAINS", "/none"), name, "bin", "python")
    if not elsewhere.is_file() and "absent" in child.find(name):
        pytest.skip(f"{name} is not installed: {way(name)}")
    if child.TOOLCHAINS[name].half and "classes" in exported.contract(file):
        pytest.skip("a step of half precision is as large as what the classes of a random network differ by")
    python = [f"{name}={elsewhere}"] if elsewhere.is_file() else []
    (row,) = verify(file=file, toolchains=name, python=python, progress=False)
    assert row.verdict == "right" and row.min_cosine > 0.999
