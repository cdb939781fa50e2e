"""The pictures for a device maker's quantiser."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bingo_compress.errors import BingoError
from bingo_compress.exporters import calibration_set

PIXELS = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BYTES = {"name": "image", "layout": "NHWC", "dtype": "uint8", "color": "RGB", "size": 16}
FLOATS = BYTES | {"layout": "NCHW", "dtype": "float32", "mean": [10.0, 20.0, 30.0], "std": [2.0, 4.0, 5.0]}


@pytest.mark.parametrize("given", [BYTES, FLOATS])
def test_the_set_is_what_the_file_takes_and_the_pictures_before_it(given: dict[str, object], tmp_path: Path) -> None:
    folder = calibration_set.write(tmp_path / "set", PIXELS, {"input": given, "sha256": "ab", "run_id": "r"})
    rows = np.load(folder / "input.npy", allow_pickle=False)
    expected = PIXELS.numpy() if given is BYTES else None
    if expected is None:
        expected = ((PIXELS.numpy() - np.array([10.0, 20, 30])) / np.array([2.0, 4, 5])).transpose(0, 3, 1, 2)
    assert rows.dtype == given["dtype"] and np.abs(rows - expected).max() < 1e-5
    names = (folder / "images.txt").read_text().split()
    assert len(names) == 3
    for name, picture in zip(names, PIXELS.numpy(), strict=True):
        with Image.open(folder / name) as opened:
            assert opened.size == (16, 16) and np.abs(np.asarray(opened).astype(int) - picture).mean() < 2
    told = json.loads((folder / "calibration.json").read_text())
    assert told["sha256"] == "ab" and told["input"] == given
    words = (folder / "README.md").read_text()
    assert "input.npy" in words and str(given.get("mean", [0, 0, 0])) in words


def test_an_earlier_set_is_replaced_and_nothing_else_ever(tmp_path: Path) -> None:
    folder = calibration_set.write(tmp_path / "set", PIXELS, {"input": BYTES, "sha256": "ab"})
    calibration_set.refuse_foreign(folder)
    calibration_set.refuse_foreign(tmp_path / "new")
    assert (
        len(
            (calibration_set.write(folder, PIXELS[:1], {"input": BYTES, "sha256": "cd"}) / "images.txt")
            .read_text()
            .split()
        )
        == 1
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(BingoError, match="--calibration-set: expected a new folder or an earlier set, found files in"):
        calibration_set.refuse_foreign(tmp_path / "mine")
    with pytest.raises(BingoError, match="--calibration-set: expected a folder, found a file at"):
        calibration_set.refuse_foreign(tmp_path / "mine" / "thesis.txt")
