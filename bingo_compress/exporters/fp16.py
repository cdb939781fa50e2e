"""A float ONNX file in half precision: half the size, for GPUs and NPUs that compute in it. onnxruntime's converter
converts; here is what it is asked for, and the proof.
"""

import json
from pathlib import Path

import onnx
import torch
from torch.nn.functional import cosine_similarity

from bingo_compress.errors import BingoError, first_line
from bingo_compress.exporters.onnx import REFUSED, Making
from bingo_compress.models import exported
from bingo_compress.models.exported import onnx_runner
from bingo_compress.runtime import console

MIN_COSINE = 0.999


def make(making: Making) -> Path:
    """The float file with weights and steps of 16 bits; what goes in and comes out is of 32 bits still. Raises
    BingoError (exit status 3) unless every calibration image's embedding has a cosine of 0.999 to the float file's.
    """
    # Here, as it takes a second and no other format needs it.
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    raw = making.work / "half.onnx"
    try:
        half = OnnxModel(convert_float_to_float16(onnx.load(making.whole), keep_io_types=True))
        half.topological_sort()  # the casts of what goes in stand last
        onnx.save(half.model, raw)
        found, exact = onnx_runner(raw)(making.calibration), onnx_runner(making.whole)(making.calibration)
    except BingoError as error:
        raise BingoError(f"export refused, no fp16 file written: {error}", REFUSED) from None
    except Exception as error:  # the converter's have no base of their own
        raise BingoError(f"export refused, no fp16 file written: {first_line(error)}", REFUSED) from None
    cosine = float(cosine_similarity(found[0], exact[0]).min())
    finite = bool(torch.cat([found[0], found[1]], dim=1).isfinite().all())
    if not (finite and cosine >= MIN_COSINE):
        raise BingoError(
            f"export refused, no fp16 file written: expected a cosine of {MIN_COSINE} or more to the float file on"
            f" {len(making.calibration)} of your images, found {cosine:.4f}: values leave the range of 16 bits; use"
            " --format onnx, or onnx-int8",
            REFUSED,
        )
    contract = json.loads(making.float_file.with_suffix(exported.CONTRACT).read_text(encoding="utf-8"))
    contract["precision"] = "float16"
    contract["fp16"] = {f"float_{key}": contract.pop(key) for key in ("sha256", "bytes", "parity")}
    contract["fp16"] |= {"images": len(making.calibration), "min_cosine": cosine}
    target = making.work / exported.name("onnx-fp16")
    contract = making.put(raw, target, contract, making.form)
    console.say(
        f"{target.name}: {contract['bytes'] / contract['fp16']['float_bytes']:.2f} of the float file's size; smallest"
        f" cosine to it {cosine:.6f} on {len(making.calibration)} of your images"
    )
    return target
