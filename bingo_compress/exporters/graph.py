"""What is rewritten in an ONNX graph for those who read it: an older opset, operators that every toolchain has right,
fewer outputs.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

TORCH_LEAST = 18  # torch writes no lower opset, whatever it is asked for: lower ones are converted from it
# (name, text, number) of what opset 18 added.
RESIZE_DEFAULTS = {
    ("keep_aspect_ratio_policy", b"stretch", 0),
    ("antialias", b"", 0),
}
# The IR version of the onnx release that brought the opset (onnx/docs/Versioning.md).
IR_OF_OPSET = {
    17: 8,
    16: 8,
    15: 8,
}


def lowered(model: onnx.ModelProto, opset: int, ir: int) -> onnx.ModelProto:
    """At an opset that torch does not write, and IR version `ir` (0: the opset's own): to 17 here (onnx's own converter
    has no way for Split), further down by onnx's converter, whose errors it raises.
    """
    if opset < TORCH_LEAST:
        _to_opset_17(model)
        onnx.checker.check_model(model, full_check=True)  # refuses what opset 17 does not know
    if opset < 17:
        model = onnx.version_converter.convert_version(model, opset)
    model.ir_version = ir or IR_OF_OPSET.get(opset, model.ir_version)
    return model


def to_plain(model: onnx.ModelProto) -> None:
    """In place, what toolchains get wrong, in an equal form that all have right (docs/devices.md): HardSigmoid as Mul,
    Add and Clip (OpenCV answers otherwise, without a word), GELU as (x * 0.5) * (1 + erf) instead of
    x * (0.5 * (1 + erf)) (OpenCV crashes where it reads that one).
    """
    nodes: list[onnx.NodeProto] = []
    made = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "HardSigmoid":
            nodes += _hard_sigmoid(model, node)
        elif node.op_type == "Mul" and (parts := _gelu(model, node, made)):
            x, half, one_and_erf = parts
            nodes.append(onnx.helper.make_node("Mul", [x, half], [f"{node.output[0]}_half"]))
            nodes.append(onnx.helper.make_node("Mul", [f"{node.output[0]}_half", one_and_erf], node.output))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unread(model)


def _hard_sigmoid(model: onnx.ModelProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """max(0, min(1, alpha x + beta)), the definition in ONNX's operator list."""
    given = {attribute.name: attribute.f for attribute in node.attribute}
    name = node.output[0]
    numbers = {"slope": given.get("alpha", 0.2), "middle": given.get("beta", 0.5), "least": 0.0, "most": 1.0}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(value, np.float32), f"{name}_{key}") for key, value in numbers.items()
    )
    return [
        onnx.helper.make_node("Mul", [node.input[0], f"{name}_slope"], [f"{name}_scaled"]),
        onnx.helper.make_node("Add", [f"{name}_scaled", f"{name}_middle"], [f"{name}_moved"]),
        onnx.helper.make_node("Clip", [f"{name}_moved", f"{name}_least", f"{name}_most"], [name]),
    ]


def hard_sigmoids(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that `to_plain` wrote for a HardSigmoid."""
    ends = ("_slope", "_middle", "_least")
    steps = {one.name for one in model.graph.initializer if not one.dims and one.name.endswith(ends)}
    return {node.name for node in model.graph.node if steps & set(node.input[1:])}


def _gelu(model: onnx.ModelProto, node: onnx.NodeProto, made: dict[str, onnx.NodeProto]) -> tuple[str, str, str] | None:
    """(x, the name of 0.5, the name of 1 + erf) where a node is the last product of x * (0.5 * (1 + erf(..)))."""
    numbers = constants(model)
    for x, inner in (tuple(node.input), tuple(node.input)[::-1]):
        product = made.get(inner)
        if product is None or product.op_type != "Mul":
            continue
        for half, rest in (tuple(product.input), tuple(product.input)[::-1]):
            sum_ = made.get(rest)
            value = numbers.get(half)
            if sum_ is None or sum_.op_type != "Add" or value is None or value.size != 1 or float(value.item()) != 0.5:
                continue
            if any(name in made and made[name].op_type == "Erf" for name in sum_.input):
                return x, half, rest
    return None


def constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """The values of initializers and Constant nodes by name."""
    values = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    return values | {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in model.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }


def keep_outputs(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """In place, only these outputs, and what they are made of."""
    kept = set(names)
    for output in [output for output in model.graph.output if output.name not in kept]:
        model.graph.output.remove(output)
    drop_unread(model)


def drop_unread(model: onnx.ModelProto) -> None:
    """In place, without nodes, weights and shapes from which no output is reached."""
    read = {output.name for output in model.graph.output}
    for node in reversed(model.graph.node):
        if read & set(node.output):
            read |= set(node.input)
    for kept in (model.graph.node, model.graph.initializer, model.graph.value_info):
        names = [set(one.output) if isinstance(one, onnx.NodeProto) else {one.name} for one in kept]
        for one in [one for one, its in zip(kept, names, strict=True) if not its & read]:
            kept.remove(one)


def _to_opset_17(model: onnx.ModelProto) -> None:
    """From opset 18, in place: the axes of reductions become an attribute again, and Split loses its count of outputs,
    which says what is there to see.
    """
    values = constants(model)
    for node in model.graph.node:
        gone = {"num_outputs"} if node.op_type == "Split" else set()
        if node.op_type == "Resize":  # what these say by default is what opset 17 does
            gone = {
                attribute.name
                for attribute in node.attribute
                if (attribute.name, attribute.s, attribute.i) in RESIZE_DEFAULTS
            }
        # ReduceSum has taken its axes as an input since opset 13.
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            gone = {"noop_with_empty_axes"}
            if len(node.input) > 1:
                axes = values[node.input.pop()].tolist()
                node.attribute.append(onnx.helper.make_attribute("axes", axes))
        kept = [attribute for attribute in node.attribute if attribute.name not in gone]
        del node.attribute[:]
        node.attribute.extend(kept)
    drop_unread(model)
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = 17
