"""Parts of a graph that some toolchain cannot read, in forms that all read and that compute the same: nothing is
rounded otherwise, and nothing is left to be worked out on the device that is known here. What each is for, and which
toolchains were tried: docs/devices.md.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bingo_compress.exporters.graph import constants, drop_unread


class Known:
    """What is known of a graph's tensors by name: values of the constant ones, shapes, and the nodes that make them."""

    def __init__(self, model: ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.values = constants(model)
        self.shapes = {
            one.name: [side.dim_value for side in one.type.tensor_type.shape.dim]
            for one in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        self.makers = {name: node for node in model.graph.node for name in node.output}

    def chain(self, node: NodeProto, *kinds: str) -> list[NodeProto] | None:
        """`node` and what it is made of, by first inputs, where these are of just these kinds."""
        found: list[NodeProto] = []
        maker: NodeProto | None = node
        for kind in kinds:
            if maker is None or maker.op_type != kind:
                return None
            found.append(maker)
            maker = self.makers.get(maker.input[0])
        return found

    def numbers(self, node: NodeProto) -> list[list[int]] | None:
        """What a node is given beside its first input, where all of it is constant."""
        given = [self.values.get(name) for name in node.input[1:]]
        return (
            None if any(one is None for one in given) else [np.ravel(one).tolist() for one in given if one is not None]
        )


# New nodes in place of one, with the values that they read by name; None where it is to stay.
Change = tuple[list[NodeProto], dict[str, list[int]]] | None


def to_portable(model: ModelProto) -> None:
    """Rewrite a graph of fixed batch in place."""
    _fold(model)
    for change in (_counted, _sized, _taken_apart, _strided, _many_axes):
        _rewrite(model, change)
    drop_unread(model)


def _fold(model: ModelProto) -> None:
    """What is computed of weights alone becomes a weight: tables of relative positions by GatherND, which OpenCV 4
    lacks, and sines of positions, whose convolution none of OpenCV's versions reads.
    """
    values, kept = constants(model), []
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        if node.op_type == "Constant" or not node.input or not all(name in values for name in node.input if name):
            kept.append(node)
            continue
        given = {name: values[name] for name in node.input if name}
        found = ReferenceEvaluator(node, opsets=opsets).run(None, given)
        for name, value in zip(node.output, found, strict=True):
            values[name] = np.ascontiguousarray(value)
            model.graph.initializer.append(numpy_helper.from_array(values[name], name))
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _rewrite(model: ModelProto, change: Callable[[NodeProto, Known], Change]) -> None:
    nodes, known = [], Known(model)
    for node in model.graph.node:
        made = change(node, known)
        nodes += [node] if made is None else made[0]
        for name, values in (made[1] if made else {}).items():
            model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _counted(node: NodeProto, known: Known) -> Change:
    """A Gather of all of a row in its order is a Reshape. Torch writes one where it pools a tensor whose channels are
    last in memory; ncnn has no Gather.
    """
    index: NDArray[Any] | None = known.values.get(node.input[1]) if node.op_type == "Gather" else None
    if index is None or _attribute(node, "axis", 0) != 0 or known.shapes.get(node.input[0]) != [index.size]:
        return None
    if not np.array_equal(index.ravel(), np.arange(index.size)):
        return None
    shape = f"{node.output[0]}_shape"
    return [helper.make_node("Reshape", [node.input[0], shape], node.output)], {shape: list(index.shape)}


def _sized(node: NodeProto, known: Known) -> Change:
    """A Split into equal parts says their sizes. pnnx takes it for a Split into none, and ncnn crashes."""
    if node.op_type != "Split" or len(node.input) > 1:
        return None
    axis, name = _attribute(node, "axis", 0), f"{node.output[0]}_sizes"
    sizes = [known.shapes.get(output, [0] * (axis + 1))[axis] for output in node.output]
    if not all(sizes):
        return None
    return [helper.make_node("Split", [node.input[0], name], node.output, axis=axis)], {name: sizes}


def _taken_apart(node: NodeProto, known: Known) -> Change:
    """Query, key and value: (.., 3 x heads x width) made (.., 3, heads, width), turned, and one of three taken; here
    that third is cut out first. ncnn knows no more than four axes.
    """
    parts = known.chain(node, "Squeeze", "Slice", "Transpose", "Reshape")
    if parts is None:
        return None
    _, cut, turn, view = parts
    shape, source = known.shapes.get(view.output[0], []), known.shapes.get(view.input[0], [])
    perm, squeezed, bounds = _attribute(turn, "perm"), known.numbers(node), known.numbers(cut)
    axis = perm[0]
    size = prod(shape[axis + 1 :])
    if squeezed != [[0]] or bounds is None or len(bounds) < 3 or bounds[2] != [0] or bounds[3:] not in ([], [[1]]):
        return None
    place = bounds[0][0]
    if bounds[1] != [place + 1] or not 0 <= place < shape[axis]:
        return None
    if axis != len(source) - 1 or shape[:axis] != source[:-1] or not all(shape) or source[-1] != shape[axis] * size:
        return None
    name = node.output[0]
    values = {
        f"{name}_first": [place * size],
        f"{name}_end": [(place + 1) * size],
        f"{name}_axis": [axis],
        f"{name}_shape": shape[:axis] + shape[axis + 1 :],
    }
    first, end, along, parted = values
    return [
        helper.make_node("Slice", [view.input[0], first, end, along], [f"{name}_cut"]),
        helper.make_node("Reshape", [f"{name}_cut", parted], [f"{name}_parted"]),
        helper.make_node("Transpose", [f"{name}_parted"], [name], perm=[old - (old > axis) for old in perm[1:]]),
    ], values


def _strided(node: NodeProto, known: Known) -> Change:
    """Every second row and column of (B, H, W, C), by two Slices with a step, is what pooling of single pixels leaves.
    ncnn has no steps, and tract loses its way among them.
    """
    parts = known.chain(node, "Slice", "Slice")
    if parts is None:
        return None
    shape = known.shapes.get(parts[1].input[0], [])
    given = [known.numbers(part) for part in (parts[1], node)]
    steps = []
    for axis, numbers in zip((1, 2), given, strict=True):
        if len(shape) != 4 or numbers is None or len(numbers) != 4 or numbers[0] != [0] or numbers[2] != [axis]:
            return None
        if numbers[1][0] < shape[axis] or numbers[3][0] < 2:
            return None
        steps.append(numbers[3][0])
    name = node.output[0]
    return [
        helper.make_node("Transpose", [parts[1].input[0]], [f"{name}_first"], perm=[0, 3, 1, 2]),
        helper.make_node("MaxPool", [f"{name}_first"], [f"{name}_fewer"], kernel_shape=[1, 1], strides=steps),
        helper.make_node("Transpose", [f"{name}_fewer"], [name], perm=[0, 2, 3, 1]),
    ], {}


def _many_axes(node: NodeProto, known: Known) -> Change:
    """Windows are made by a Reshape, a Transpose of six axes and a Reshape: axes that stay neighbours are one axis
    here, but for the batch. ncnn knows no more than four beside it.
    """
    parts = known.chain(node, "Reshape", "Transpose", "Reshape")
    if parts is None:
        return None
    _, turn, view = parts
    shape, perm = known.shapes.get(view.output[0], []), _attribute(turn, "perm")
    target = known.shapes.get(node.output[0], [])
    if len(shape) < 6 or perm[0] != 0 or not all(shape) or not all(target):
        return None
    groups = [[perm[0]]]
    for old in perm[1:]:
        if old == groups[-1][-1] + 1 and groups[-1] != [0]:
            groups[-1].append(old)
        else:
            groups.append([old])
    order = sorted(groups)
    name = node.output[0]
    values = {f"{name}_fewer": [prod(shape[old] for old in group) for group in order], f"{name}_shape": target}
    fewer, back = values
    return [
        helper.make_node("Reshape", [view.input[0], fewer], [f"{name}_parted"]),
        helper.make_node(
            "Transpose", [f"{name}_parted"], [f"{name}_turned"], perm=[order.index(group) for group in groups]
        ),
        helper.make_node("Reshape", [f"{name}_turned", back], [name]),
    ], values
