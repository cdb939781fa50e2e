"""The file of 16 bits."""

from pathlib import Path
from typing import Any

import bingo_edge
import onnx
import pytest
import torch
from helpers import encoder, untrained_run

from bingo_compress import exporting
from bingo_compress.errors import BingoError
from bingo_compress.exporters import fp16
from bingo_compress.exporters.onnx import Making, export_onnx, form
from bingo_compress.exporting import Int8, Shape
from bingo_compress.models import exported
from bingo_compress.models.exported import onnx_runner

PIXELS = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["modern", "edge"])
def test_the_weights_are_of_16_bits_and_the_model_is_the_same(profile: str, tmp_path: Path) -> None:
    wanted = form(profile, None, None)
    export_onnx(encoder("test_efficientnet", 32), PIXELS, tmp_path / "whole.onnx", {}, wanted)
    making = Making(tmp_path / "whole.onnx", tmp_path / "whole.onnx", PIXELS, wanted, tmp_path, None)  # type: ignore[arg-type]
    path = fp16.make(making)
    kinds = {one.data_type for one in onnx.load(path).graph.initializer if len(one.dims) == 4}
    assert path.name == "student-fp16.onnx" and kinds == {onnx.TensorProto.FLOAT16}
    assert path.stat().st_size < 0.7 * (tmp_path / "whole.onnx").stat().st_size
    exact, found = onnx_runner(tmp_path / "whole.onnx")(PIXELS)[0], onnx_runner(path)(PIXELS)[0]
    assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 5e-3
    contract = bingo_edge.Embedder(path).contract
    assert contract["precision"] == "float16" and contract["fp16"]["min_cosine"] > 0.999
    assert contract["fp16"]["float_sha256"] == exported.contract(tmp_path / "whole.onnx")["sha256"]


def test_values_beyond_16_bits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = iter([torch.full((4, 3), torch.inf), torch.ones(4, 3)])

    def runner(path: Path) -> Any:
        rows = next(outputs)
        return lambda batch: (rows, rows)

    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "none", [], [])), tmp_path / "whole.onnx")
    monkeypatch.setattr(fp16, "onnx_runner", runner)
    making = Making(tmp_path / "whole.onnx", tmp_path / "whole.onnx", PIXELS, form("edge", None, None), tmp_path, None)  # type: ignore[arg-type]
    with pytest.raises(BingoError, match=r"no fp16 file written: expected a cosine of 0\.999") as caught:
        fp16.make(making)
    assert caught.value.exit_status == 3 and not (tmp_path / "student-fp16.onnx").exists()


@pytest.mark.slow
def test_export_writes_it_with_its_pictures_card_and_calibration_set(tmp_path: Path) -> None:
    run = untrained_run(tmp_path, 24)
    files = exporting.export(
        run.path, fmt="onnx-fp16", shape=Shape("edge"), int8=Int8(calibration_set=tmp_path / "set")
    )
    assert [file.name for file in files] == ["student-fp16.onnx"]
    assert not any(check.failed for check in bingo_edge.selftest(bingo_edge.Embedder(files[0])))
    assert "student-fp16.onnx" in (run.export / exported.CARD).read_text()
    assert len((tmp_path / "set" / "images.txt").read_text().split()) == 24  # a third of the photos
