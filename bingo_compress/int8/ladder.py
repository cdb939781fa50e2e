"""A float ONNX file to int8, by a ladder that ends at the first rung that passes the gate. onnxruntime's quantiser
quantises; here is what it is asked for.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from bingo_edge.model import network_input
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from bingo_compress.errors import BingoError
from bingo_compress.exporters import graph
from bingo_compress.exporters.onnx import REFUSED, Form, Judge, described
from bingo_compress.models.exported import onnx_runner
from bingo_compress.runtime import console

CALIBRATION = 128  # images that the ranges are found on
SENSITIVITY = 32  # of them, images that a layer's noise is measured on
PERCENTILE = 99.99
LEFT_IN_FLOAT = (1, 2, 4, 8, 16)  # layers, the noisiest first
SIXTEEN_BITS_FROM = 21  # opset
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True)
class Rung:
    """One way of quantising. percentile: ranges without the outermost PERCENTILE, else smallest to largest; left: nodes
    that stay float; sixteen: activations of 16 bits.
    """

    name: str
    percentile: bool = False
    left: tuple[str, ...] = ()
    sixteen: bool = False


def quantise(
    float_file: Path, calibration: Tensor, wanted: Form, work: Path, judge: Judge, prefix: str = ""
) -> tuple[Path, Rung, list[dict[str, Any]]]:
    """Climb the ladder until `judge` finds nothing below the gate. calibration: uint8 (n, S, S, 3), the user's own
    images; work: an empty folder; prefix: of the rungs' names.

    Returns (the file, its rung, every rung tried with its figures: {"rung", "missed", ...}). Raises BingoError (exit
    status 3) where no rung passes.
    """
    prepared, quantised = work / "prepared.onnx", work / "int8.onnx"
    outside = _outside(prepare(float_file, prepared))
    tried: list[dict[str, Any]] = []
    for rung in _rungs(prepared, calibration, wanted, work, outside):
        rung = replace(rung, name=prefix + rung.name)
        console.say(f"int8: {rung.name} ...")
        _quantise(prepared, quantised, calibration, work, rung, outside)
        _only_needed_domains(quantised, wanted)
        described(quantised, wanted)
        figures, missed = judge(quantised)
        tried.append({"rung": rung.name, "missed": missed, **figures, "bytes": quantised.stat().st_size})
        if not missed:
            return quantised, rung, tried
    raise LadderEnds(tried)


class LadderEnds(BingoError):
    """No rung passed the gate; `tried` is what each gave."""

    def __init__(self, tried: list[dict[str, Any]]) -> None:
        # Of two that miss as much the later, which loses less.
        least = min(reversed(tried), key=lambda row: len(row["missed"]))
        super().__init__(
            f"export refused, no int8 file written: {len(tried)} ways were tried; the nearest ({least['rung']}) misses"
            f" {', '.join(least['missed'])}",
            REFUSED,
        )
        self.tried = tried


def prepare(float_file: Path, prepared: Path) -> onnx.ModelProto:
    """onnxruntime's simplified form of a float file, written to `prepared`. Every node has a name of its own: rungs are
    told by names, and onnxruntime leaves nodes that it made itself without.
    """
    with _quietly():
        quant_pre_process(float_file, prepared, skip_symbolic_shape=True)
    model = onnx.shape_inference.infer_shapes(_last_layer_as_product(onnx.load(prepared)))
    del model.metadata_props[:]
    model.metadata_props.extend(onnx.load(float_file).metadata_props)
    for number, node in enumerate(model.graph.node):
        node.name = f"{number}_{node.op_type}"
    onnx.save(model, prepared)
    return model


def _last_layer_as_product(model: onnx.ModelProto) -> onnx.ModelProto:
    """A last 1 x 1 convolution after pooling as the product of matrices that it is. onnxruntime multiplies int8
    matrices to a float result, but convolves int8 only to an int8 one: features in float would make it work in float,
    with its weights converted anew for every picture.
    """
    flat, leading = _flat(model), _leading(model)
    weights = {one.name: one for one in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" else None
        pointwise = weight is not None and list(weight.dims[2:]) == [1, 1] and _groups(node) == 1
        if weight is None or not pointwise or not {node.input[0], node.output[0]} <= flat or node.output[0] in leading:
            nodes.append(node)
            continue
        result = node.output[0]
        del weight.dims[2:]
        for stale in [one for one in model.graph.value_info if one.name == weight.name]:
            model.graph.value_info.remove(stale)
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.array(shape, dtype=np.int64), f"{result}_{name}")
            for name, shape in (("row", (0, -1)), ("map", (0, -1, 1, 1)))
        )
        nodes += (
            onnx.helper.make_node("Reshape", [node.input[0], f"{result}_row"], [f"{result}_in"]),
            onnx.helper.make_node("Gemm", [f"{result}_in", *node.input[1:]], [f"{result}_out"], transB=1),
            onnx.helper.make_node("Reshape", [f"{result}_out", f"{result}_map"], [result]),
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _groups(node: onnx.NodeProto) -> int:
    return next((int(one.i) for one in node.attribute if one.name == "group"), 1)


def _rungs(prepared: Path, calibration: Tensor, wanted: Form, work: Path, outside: set[str]) -> Iterator[Rung]:
    """The ladder; what a later rung has to measure is measured only when it is reached."""
    yield Rung("weights by channel")
    yield Rung(f"ranges of {PERCENTILE}%", percentile=True)
    noisy = [part for part, _ in sensitivity(prepared, calibration[:SENSITIVITY], work, outside)]
    for count in LEFT_IN_FLOAT:
        if count < len(noisy):
            left = tuple(dict.fromkeys(name for part in noisy[:count] for name in part))
            yield Rung(f"{count} {'layer' if count == 1 else 'layers'} in float", percentile=True, left=left)
    if wanted.opset >= SIXTEEN_BITS_FROM:
        yield Rung("activations of 16 bits", sixteen=True)
    else:
        console.say(f"int8: activations of 16 bits need opset {SIXTEEN_BITS_FROM}, this file has {wanted.opset}")


def sensitivity(prepared: Path, images: Tensor, work: Path, outside: set[str]) -> list[tuple[tuple[str, ...], float]]:
    """Each of `layers` and the signal-to-noise ratio in dB of the embedding when it alone is quantised, the noisiest
    first.
    """
    exact = onnx_runner(prepared)(images)[0]
    quantised = work / "one.onnx"
    found: list[tuple[tuple[str, ...], float]] = []
    parts = layers(onnx.load(prepared), outside)
    with console.bar("noise of each layer", len(parts)) as advance:
        for part in parts:
            _quantise(prepared, quantised, images, work, Rung("one", percentile=True), outside, only=part)
            noise = onnx_runner(quantised)(images)[0] - exact
            found.append((part, float(10 * torch.log10(exact.square().sum() / noise.square().sum().clamp(min=1e-20)))))
            advance(1)
    return sorted(found, key=lambda pair: pair[1])


def layers(model: onnx.ModelProto, outside: set[str]) -> list[tuple[str, ...]]:
    """Names of each convolution or product of matrices, with those of the nodes that work on its output up to the next.
    A node that adds two layers up belongs to both: alone it could not be left in float, as its neighbours would round
    what goes in and out.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in model.graph.node:
        if node.op_type in LAYERS and node.name not in outside:
            part, waiting = {node.name: None}, list(node.output)
            while waiting:
                for follower in readers.get(waiting.pop(), []):
                    if follower.op_type not in LAYERS and follower.name not in outside and follower.name not in part:
                        part[follower.name] = None
                        waiting += follower.output
            found.append(tuple(part))
    return found


def _quantise(
    prepared: Path, target: Path, images: Tensor, work: Path, rung: Rung, outside: set[str], only: Sequence[str] = ()
) -> None:
    """One call of onnxruntime's quantiser. Ranges are measured once and kept in `work`."""
    method = CalibrationMethod.Percentile if rung.percentile else CalibrationMethod.MinMax
    with _quietly():
        quantize_static(
            prepared,
            target,
            _Images(images, prepared),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt16 if rung.sixteen else QuantType.QUInt8,
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Weights of 7 bits: with 8, sums of two products overflow 16 bits on processors without int8 dot products
            # (x86 before VNNI), and the same file would be another model there.
            reduce_range=True,
            nodes_to_quantize=list(only),
            nodes_to_exclude=sorted(outside | set(rung.left)),
            calibrate_method=method,
            calibration_cache_path=work / f"{method.name.lower()}.json",
            # One image at a time: the calibrator holds every activation of a stride.
            extra_options={"CalibPercentile": PERCENTILE, "CalibStridedMinMax": 1},
        )
    _result_in_float(target)
    if rung.left:
        _fence(target, set(rung.left))


def _fence(file: Path, left: set[str]) -> None:
    """A Clip that cuts nothing off before a layer that is left in float. onnxruntime quantises the weights of a layer
    between a DequantizeLinear and a QuantizeLinear by itself, one scale a layer, when it opens the file
    (WeightBiasQuantization, its pull requests 22969 and 25673): EfficientNet-Lite0 with one layer in float had a cosine
    of 0.905 by it, 0.984 without.
    """
    model = onnx.load(file)
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    most = float(np.finfo(np.float32).max)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name in left and node.op_type in LAYERS and node.input[0] in rounded:
            free = f"{node.output[0]}_in"
            nodes.append(onnx.helper.make_node("Clip", [node.input[0], "fence_least", "fence_most"], [free], free))
            node.input[0] = free
        nodes.append(node)
    if len(nodes) > len(model.graph.node):
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.array(value, np.float32), name)
            for name, value in (("fence_least", -most), ("fence_most", most))
        )
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        onnx.save(model, file)


def _outside(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that stay float in every rung: the normalisation of pixels before the first layer, what
    follows pooling and the last layer, the normalisation of the embedding, and the steps of a HardSigmoid.
    """
    nodes, before, after = model.graph.node, {"image"}, {"features"}
    flat, leading = _flat(model), _leading(model)
    # Their constants would be rounded, too, and OpenCV 4 reads no scalar that was.
    outside = graph.hard_sigmoids(model)
    for node in nodes:
        if node.op_type not in LAYERS and any(name in before for name in node.input):
            before |= set(node.output)
            outside.add(node.name)
        if any(name in after for name in node.input):
            after |= set(node.output)
            outside.add(node.name)
        # onnxruntime takes a ReLU away where the rounding after it does its work: where that rounding is taken away,
        # the ReLU must stay.
        if (
            node.op_type not in LAYERS
            and any(name in flat for name in node.input)
            and not any(name in leading for name in node.output)
        ):
            outside.add(node.name)
    return outside


def _result_in_float(file: Path) -> None:
    """Take away the rounding of what comes after pooling and after the last layer: the features themselves. It would
    save nothing and cost accuracy.
    """
    model = onnx.load(file)
    flat, leading = _flat(model), _leading(model)
    nodes = list(model.graph.node)
    made = {name: node for node in nodes for name in node.output}
    instead: dict[str, str] = {}
    for node in nodes:
        rounding = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if rounding is None or rounding.op_type != "QuantizeLinear" or node.output[0] in leading:
            continue
        # Of a rounded result, the name that is known is the one after the rounding.
        if rounding.input[0] in flat or node.output[0] in flat:
            # One after the other: what the second rounds is what the first would have.
            instead[node.output[0]] = instead.get(rounding.input[0], rounding.input[0])
            model.graph.node.remove(node)
    if not instead:
        return
    results = {output.name for output in model.graph.output}
    # A result keeps its name: whoever makes it takes that.
    renamed = {instead[name]: name for name in results & instead.keys()}
    for node in model.graph.node:
        node.input[:] = [renamed.get(source, source) for source in (instead.get(name, name) for name in node.input)]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    read = {name for node in model.graph.node for name in node.input} | results
    for node in [node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.output[0] not in read]:
        model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    for one in [one for one in model.graph.initializer if one.name not in read]:
        model.graph.initializer.remove(one)
    onnx.save(model, file)


def _leading(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors from which a layer is reached."""
    leading = {name for node in model.graph.node if node.op_type in LAYERS for name in node.input}
    for node in reversed(model.graph.node):
        if any(name in leading for name in node.output):
            leading |= set(node.input)
    return leading


def _flat(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors that hold one number a channel and image: (B, C), (B, C, 1, 1)."""
    shaped = [*model.graph.value_info, *model.graph.output]
    return {
        value.name
        for value in shaped
        if len(dims := value.type.tensor_type.shape.dim) >= 2 and all(dim.dim_value == 1 for dim in dims[2:])
    }


def _only_needed_domains(file: Path, wanted: Form) -> None:
    """onnxruntime names its own domains in every file it quantises, used or not, and writes its own IR version."""
    model = onnx.load(file)
    used = {node.domain for node in model.graph.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    if wanted.ir:
        model.ir_version = min(model.ir_version, wanted.ir)
    onnx.save(model, file)


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Images one by one, as onnxruntime's calibrators ask for them."""

    def __init__(self, images: Tensor, file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        told = {one.key: one.value for one in model.metadata_props}
        # Of a graph of bytes without a contract, what can be meant alone.
        self._contract = json.loads(told.get("bingo_compress", '{"input": {"dtype": "uint8"}}'))
        self._times = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
        self._images = np.ascontiguousarray(images.numpy())
        self.set_range(0, len(images))

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._left, None)
        if image is None:
            return None
        # A fixed batch is filled with the one image: the ranges are its own.
        return {"image": network_input(self._contract, self._images[[image] * self._times])}


@contextmanager
def _quietly() -> Iterator[None]:
    """onnxruntime's quantiser warns through the root logger of what is done here already, and prints a line a
    tensor.
    """
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
