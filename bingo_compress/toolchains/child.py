"""An exported file in one toolchain, in a process of its own: a toolchain may crash, and may need another Python.

    python child.py TOOLCHAIN           says, as JSON, its version, or what of it is not installed
    python child.py TOOLCHAIN FOLDER    runs job.json on batches.npy, both in FOLDER; writes outputs.npz or error.txt

job.json: the file, the names of its input and of its outputs in the file's order, and whether the toolchain's own file
is wanted, which then answers and lies in CONVERTED with what there is to say of it in TOLD. batches.npy: (runs, *what
the file takes). outputs.npz: of each output (runs, ...). Both lie in the working directory, with all that a toolchain
writes. Imports nothing of ours, so that any Python with numpy and the toolchain runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

CONVERTED, TOLD = "converted", "told.json"


class Job(NamedTuple):
    """file: absolute; batches: array (runs, batch, ...), each what the file takes; outputs: names, as in the file."""

    file: str
    input: str
    outputs: list[str]
    batches: Any


# One entry a run: the outputs in the order of the file's names.
Outputs = Iterator[list[Any]]


class Toolchain(NamedTuple):
    """parts: modules it needs, each with the packages that may bring it; half: it computes in half precision; convert:
    as run, by a file of its own that is left in CONVERTED.
    """

    run: Callable[[Job], Outputs]
    parts: dict[str, tuple[str, ...]]
    half: bool = False
    convert: Callable[[Job], Outputs] | None = None


def _onnxruntime(job: Job) -> Outputs:
    import onnxruntime

    session = onnxruntime.InferenceSession(job.file, providers=["CPUExecutionProvider"])
    for batch in job.batches:
        yield session.run(job.outputs, {job.input: batch})


def _silent_openvino() -> Any:
    """The module; its import sends word of itself over the network, unless the package that does so is not there."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


def _openvino(job: Job) -> Outputs:
    openvino = _silent_openvino()
    # Processors with half-precision units would compute in it by default.
    model = openvino.Core().compile_model(job.file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in job.batches:
        found = model({job.input: batch})
        yield [found[name] for name in job.outputs]


def _openvino_file(job: Job) -> Outputs:
    openvino = _silent_openvino()
    file = os.path.join(CONVERTED, "student.xml")
    openvino.save_model(openvino.Core().read_model(job.file), file, compress_to_fp16=False)
    return _openvino(job._replace(file=file))


def _opencv(job: Job) -> Outputs:
    import cv2

    net = cv2.dnn.readNetFromONNX(job.file)
    for batch in job.batches:
        net.setInput(batch, job.input)
        yield list(net.forward(job.outputs))


def _tract(job: Job) -> Outputs:
    import tract

    model = tract.onnx().load(job.file).into_model().into_runnable()
    for batch in job.batches:
        yield [found.to_numpy() for found in model.run([batch])]


def _ncnn(job: Job) -> Outputs:
    import ncnn
    import numpy

    if len(job.batches[0]) != 1:
        raise ValueError("ncnn takes one picture at a time")
    (home,) = util.find_spec("pnnx").submodule_search_locations  # type: ignore[union-attr, misc]
    os.symlink(job.file, "model.onnx")
    kind = {"uint8": "u8", "float32": "f32"}[str(job.batches.dtype)]
    shape = f"[{','.join(map(str, job.batches[0].shape))}]{kind}"
    # fp16: of the weights as they are stored
    subprocess.run([os.path.join(home, "pnnx"), "model.onnx", f"inputshape={shape}", "fp16=0"], check=True)
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param("model.ncnn.param") or net.load_model("model.ncnn.bin"):
        raise ValueError("ncnn cannot load what pnnx made of it")
    for batch in job.batches:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(batch[0]).clone())
        found = [extractor.extract(f"out{place}") for place in range(len(job.outputs))]
        if any(status for status, _ in found):
            raise ValueError("ncnn cannot compute an output")
        yield [numpy.array(mat) for _, mat in found]


def _mnn(job: Job) -> Outputs:
    # MNN's own mnnconvert asks pip for a package when it is imported; this is what it calls.
    import _tools
    import MNN.expr
    import MNN.nn

    _tools.mnnconvert(["", "-f", "ONNX", "--modelFile", job.file, "--MNNModel", "model.mnn", "--bizCode", "bingo"])
    if not os.path.exists("model.mnn"):
        raise ValueError("MNN's converter wrote no file")
    net = MNN.nn.load_module_from_file("model.mnn", [job.input], job.outputs)
    kind = {"uint8": MNN.expr.uint8, "float32": MNN.expr.float}[str(job.batches.dtype)]
    for batch in job.batches:
        given = MNN.expr.const(batch.copy(), list(batch.shape), MNN.expr.NCHW, kind)
        yield [found.read().copy() for found in net.forward([given])]


def _tflite(job: Job) -> Outputs:
    import numpy

    # onnx2tf tries its graph on pictures; it would fetch them from elsewhere if this file did not lie here.
    noise = numpy.random.default_rng(0).random((20, 128, 128, 3), numpy.float32)
    numpy.save("calibration_image_sample_data_20x128x128x3_float32.npy", noise)
    import onnx2tf
    from ai_edge_litert.interpreter import Interpreter

    onnx2tf.convert(job.file, output_folder_path="tflite")
    (made,) = Path("tflite").glob("*_float32.tflite")
    model = Interpreter(str(made.rename(Path(CONVERTED, "student.tflite"))))
    # By its signature: the order of its tensors is that of the names, not the file's.
    ((signature, names),) = model.get_signature_list().items()
    if sorted(names["outputs"]) != sorted(job.outputs) or names["inputs"] != [job.input]:
        raise ValueError(f"a signature of other names: {names}")
    runner = model.get_signature_runner(signature)
    shape = runner.get_input_details()[job.input]["shape"].tolist()
    Path(TOLD).write_text(json.dumps({"signature": signature, "shape": shape}), encoding="utf-8")
    for batch in job.batches:
        given = batch if list(batch.shape) == shape else batch.transpose(0, 2, 3, 1)
        found = runner(**{job.input: numpy.ascontiguousarray(given)})
        yield [found[name].copy() for name in job.outputs]


def _rknn(job: Job) -> Outputs:
    from rknn.api import RKNN

    net = RKNN()
    # No mean and no standard deviation: the input is what the file takes.
    net.config(target_platform="rk3588")
    shapes = [list(job.batches[0].shape)]
    steps: list[tuple[Callable[..., int], dict[str, Any]]] = [
        (net.load_onnx, {"model": job.file, "inputs": [job.input], "input_size_list": shapes}),
        (net.build, {"do_quantization": False}),
        (net.init_runtime, {}),  # the simulator
    ]
    for step, words in steps:
        if step(**words):
            raise ValueError(f"{step.__name__} failed")
    for batch in job.batches:
        yield net.inference(inputs=[batch], data_format=["nchw"])


TOOLCHAINS = {
    "onnxruntime": Toolchain(_onnxruntime, {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")}),
    "openvino": Toolchain(_openvino, {"openvino": ("openvino",)}, convert=_openvino_file),
    "opencv": Toolchain(
        _opencv,
        {
            "cv2": (
                "opencv-python-headless",
                "opencv-python",
                "opencv-contrib-python-headless",
                "opencv-contrib-python",
            )
        },
    ),
    "tract": Toolchain(_tract, {"tract": ("tract",)}),
    "ncnn": Toolchain(_ncnn, {"ncnn": ("ncnn",), "pnnx": ("pnnx",)}),
    "mnn": Toolchain(_mnn, {"MNN": ("mnn",)}),
    "tflite": Toolchain(_tflite, {"onnx2tf": ("onnx2tf",), "ai_edge_litert": ("ai-edge-litert",)}, convert=_tflite),
    "rknn": Toolchain(_rknn, {"rknn": ("rknn-toolkit2",)}, half=True),
}


def find(name: str) -> dict[str, str]:
    """{"version": ..} of a toolchain in this Python, or {"absent": the module that is not installed}."""
    versions = []
    for module, packages in TOOLCHAINS[name].parts.items():
        if util.find_spec(module) is None:
            return {"absent": module}
        versions.append(next(filter(None, map(_version, packages)), "unknown"))
    return {"version": " + ".join(versions)}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def run(name: str, folder: Path) -> None:
    """Do the job in `folder`."""
    import numpy

    asked = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    answer = TOOLCHAINS[name].convert if asked.pop("keep") else TOOLCHAINS[name].run
    job = Job(**asked, batches=numpy.load(folder / "batches.npy", allow_pickle=False))
    os.makedirs(CONVERTED)
    try:
        rows = list(answer(job))  # type: ignore[misc]
        if any(len(row) != len(job.outputs) for row in rows):
            raise ValueError(f"outputs: {len(rows[0])} instead of {len(job.outputs)}")
        outputs: dict[str, Any] = {key: numpy.stack([row[at] for row in rows]) for at, key in enumerate(job.outputs)}
    except Exception as error:  # a toolchain's own share no base class
        # Some put a whole traceback into their message; its last line says what is wrong.
        said = str(error).strip()
        said = said.splitlines()[-1] if "Traceback" in said else said
        (folder / "error.txt").write_text(f"{type(error).__name__}: {said}", encoding="utf-8")
        return
    numpy.savez(folder / "outputs.npz", **outputs)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(find(sys.argv[1])))
    else:
        run(sys.argv[1], Path(sys.argv[2]))
