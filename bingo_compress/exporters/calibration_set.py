"""The pictures that our own int8 finds its ranges on, for a device maker's quantiser."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from bingo_edge.model import network_input
from PIL import Image
from torch import Tensor

from bingo_compress.errors import BingoError
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import atomic_folder

TOLD = "calibration.json"
ARRAY, LIST, IMAGES = "input.npy", "images.txt", "images"


def refuse_foreign(folder: Path) -> None:
    """Raise BingoError where `folder` holds something that is not an earlier set, which would be lost."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / TOLD).is_file():
        raise BingoError(f"--calibration-set: expected a new folder or an earlier set, found files in {folder}")
    if folder.exists() and not folder.is_dir():
        raise BingoError(f"--calibration-set: expected a folder, found a file at {folder}")


def write(folder: Path, pixels: Tensor, contract: dict[str, Any]) -> Path:
    """Put the set at `folder`, whole or not at all. pixels: uint8 (n, S, S, 3), preprocessed; contract: of the file
    that is to be quantised. Returns the folder.

    In it: ARRAY, all pictures as the file takes them (its contract's input), one after the other; IMAGES/NNNN.jpg, the
    same pictures before mean and std, and LIST, their paths a line each; TOLD, which file it is for; README.md, what to
    type.
    """
    given = contract["input"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as made:
        (made / IMAGES).mkdir()
        np.save(made / ARRAY, network_input(contract, np.ascontiguousarray(pixels.numpy())))
        names = [f"{IMAGES}/{place:04}.jpg" for place in range(len(pixels))]
        for name, picture in zip(names, pixels.numpy(), strict=True):
            Image.fromarray(picture).save(made / name, quality=100, subsampling=0)
        (made / LIST).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        told = {"format": 1, "images": len(pixels), "input": given, "run_id": contract.get("run_id", "")}
        (made / TOLD).write_text(json.dumps(told | {"sha256": contract["sha256"]}, indent=2) + "\n", encoding="utf-8")
        (made / "README.md").write_text(_readme(given, len(pixels)), encoding="utf-8")
    console.say(f"{folder}: {len(pixels)} pictures for a device maker's quantiser; README.md there says what to type")
    return folder


def _readme(given: dict[str, Any], count: int) -> str:
    size, name = given["size"], given["name"]
    shape = [1, size, size, 3] if given["layout"] == "NHWC" else [1, 3, size, size]
    # What a quantiser that reads pictures itself must do to them; a file of bytes does it in its graph.
    mean, std = given.get("mean", [0, 0, 0]), given.get("std", [1, 1, 1])
    return f"""# {count} pictures to calibrate by

They are the user's own photos, cropped and resized as the file wants them. Send them to nobody who may not see them.

- `{ARRAY}`: {given["dtype"]}, {count} x {" x ".join(map(str, shape[1:]))}, as the file's input `{name}` takes them.
- `{IMAGES}/`, `{LIST}`: the same as JPEG, {size} x {size} RGB, before any mean and std.

A value of the input is (pixel - mean) / std, a channel each: mean {mean}, std {std}.
Export with `--profile edge --input float32-nchw-normalised` where the tool wants mean and std for itself.

## OpenVINO (nncf)

    import nncf, numpy, openvino
    rows = numpy.load("{ARRAY}")
    model = openvino.Core().read_model("student.onnx")
    data = nncf.Dataset([row[None] for row in rows])
    openvino.save_model(nncf.quantize(model, data, subset_size={count}), "student-int8.xml")

## RKNN (rknn-toolkit2; run it in this folder)

    from rknn.api import RKNN
    rknn = RKNN()
    rknn.config(target_platform="rk3588", mean_values=[{mean}], std_values=[{std}])
    rknn.load_onnx("student.onnx", inputs=["{name}"], input_size_list=[{shape}])
    rknn.build(do_quantization=True, dataset="{LIST}")
    rknn.export_rknn("student.rknn")

## TFLite (onnx2tf; it fetches sample pictures from the network unless their file lies here)

    numpy.save("nhwc.npy", numpy.load("{ARRAY}").transpose(0, 2, 3, 1))
    onnx2tf -i student.onnx -oiqt -cind {name} nhwc.npy "[[[[0,0,0]]]]" "[[[[1,1,1]]]]"

## TensorRT (polygraphy)

    # data.py: def load_data(): yield from ({{"{name}": row[None]}} for row in numpy.load("{ARRAY}"))
    polygraphy convert student.onnx --int8 --data-loader-script data.py -o student.engine

## Hailo (Dataflow Compiler)

    runner.optimize(numpy.load("{ARRAY}").transpose(0, 2, 3, 1))
"""
