"""A student with random weights as the files that its sizes would be deployed as: what is measured are these graphs,
and no weights are needed.
"""

import json
import lzma
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from bingo_compress.errors import BingoError
from bingo_compress.exporters.onnx import MAX_DIFFERENCE, PROFILES, export_onnx
from bingo_compress.models.encoder import Encoder, build
from bingo_compress.models.exported import onnx_runner
from bingo_compress.models.names import resolve_name
from bingo_compress.runtime import run_dir
from bingo_compress.runtime.made_of import file_digest
from bingo_compress.suggesting.cached import MAKING, PACKED, Size

EXPORTED, SAME_GRAPH = "exported", "the graph of another size, equal to torch at this one"
# Weights of so many values over and over pack to nothing, and onnxruntime takes as long with them: its kernels do not
# look at what they multiply.
PERIOD = 251
SILENT, WARNINGS = 4, 2  # severities of onnxruntime's log, the second its default


def make(student: str, sizes: Sequence[int], where: Path) -> None:
    """Write STUDENT-PX.onnx.xz of each size that the student takes, in the profile edge, and then STUDENT.json.

    Most graphs are the same at every size but for their input: then it is traced once, and what it gives at another
    size is compared with torch. Raises BingoError where no size can be exported.
    """
    model = resolve_name(student, "--students")
    made: list[Size] = []
    refused: dict[str, str] = {}
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=MAKING, dir=where) as name:
        traced: tuple[Path, int] | None = None
        for px in sorted(sizes, reverse=True):
            file = Path(name, f"{student}-{px}.onnx")
            try:
                torch.manual_seed(0)
                encoder = build(model, px, "random", "--students")
                pixels = torch.randint(0, 256, (1, px, px, 3), dtype=torch.uint8)
                if traced and _reshaped(*traced, px, file, encoder, pixels):
                    how = SAME_GRAPH
                else:
                    export_onnx(encoder, pixels, file, {"student": student}, PROFILES["edge"])
                    traced, how = traced or (file, px), EXPORTED
            except BingoError as error:
                refused[str(px)] = str(error)
                continue
            packed = where / f"{student}-{px}{PACKED}"
            with run_dir.atomic(packed) as temporary:
                temporary.write_bytes(lzma.compress(_with_plain_weights(file), preset=0))
            size = file.stat().st_size
            made.append(Size(student, px, encoder.parameters_count(), packed.name, file_digest(packed), size, how))
    if not made:
        raise BingoError(f"--students: {student} cannot be measured: {refused[str(max(sizes))]}; name another student")
    told = {"sizes": [each._asdict() for each in made], "refused": refused}
    run_dir.write_text(where / f"{student}.json", json.dumps(told, indent=2) + "\n")


def _reshaped(graph: Path, side: int, px: int, file: Path, encoder: Encoder, pixels: Tensor) -> bool:
    """Whether the graph of `side` pixels, told that its input has `px`, gives what the encoder gives; then it is in
    `file`. pixels: uint8 (1, px, px, 3).
    """
    model = onnx.load(graph)
    for dimension in model.graph.input[0].type.tensor_type.shape.dim:
        if dimension.dim_value == side:
            dimension.dim_value = px
    del model.graph.value_info[:]
    (said,) = [entry for entry in model.metadata_props if entry.key == "bingo_compress"]
    contract = json.loads(said.value)
    contract["input"]["size"] = px
    said.value = json.dumps(contract)
    onnx.save(model, file)
    with torch.inference_mode():
        expected = encoder(pixels.permute(0, 3, 1, 2).float() / 255)
    onnxruntime.set_default_logger_severity(SILENT)  # a graph of one size alone fails here, and that is no error
    try:
        _, found = onnx_runner(file)(pixels)
    except Exception:  # onnxruntime's own exceptions share no base class
        return False
    finally:
        onnxruntime.set_default_logger_severity(WARNINGS)
    return bool((found - expected).abs().max() <= MAX_DIFFERENCE * expected.abs().max())


def _with_plain_weights(file: Path) -> bytes:
    """The file with the first PERIOD values of each tensor over and over."""
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size > PERIOD:
            plain = np.resize(values.ravel()[:PERIOD], values.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(plain, tensor.name))
    return bytes(model.SerializeToString())
