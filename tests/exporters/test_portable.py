"""The forms of exporters/portable.py: what they replace is gone, and every value is the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, helper, numpy_helper

from bingo_compress.exporters.portable import to_portable


class Graph:
    """A graph that grows node by node; arrays become weights."""

    def __init__(self, *shape: int) -> None:
        self.given, self.nodes, self.weights = shape, [], []

    def add(self, kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        names = []
        for one in inputs:
            if not isinstance(one, str):
                self.weights.append(numpy_helper.from_array(np.asarray(one), f"w{len(self.weights)}"))
                one = self.weights[-1].name
            names.append(one)
        made = [f"t{len(self.nodes)}_{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, made, **attributes))
        return made[0] if outputs == 1 else made

    def model(self, *outputs: str) -> ModelProto:
        known = onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("image", known, self.given)],
            [helper.make_tensor_value_info(name, known, None) for name in outputs],
            self.weights,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return onnx.shape_inference.infer_shapes(made, strict_mode=True)


def attention(last: list[int]) -> ModelProto:
    """Query, key and value as timm's ViT (last: heads, tokens, width) and EdgeNeXt (heads, width, tokens) take them."""
    graph = Graph(1, 10, 24)
    parted = graph.add("Reshape", "image", [1, 10, 3, 2, -1])
    turned = graph.add("Transpose", parted, perm=[2, 0, *last])
    cuts = [graph.add("Slice", turned, [place], [place + 1], [0]) for place in range(3)]
    return graph.model(*(graph.add("Squeeze", cut, [0]) for cut in cuts))


def pooled() -> ModelProto:
    graph = Graph(1, 6, 4, 4)
    row = graph.add("Reshape", graph.add("ReduceMean", "image", axes=[2, 3]), [-1])
    return graph.model(graph.add("Gather", row, np.arange(6).reshape(1, 6, 1, 1)))


def strided(side: int = 7) -> ModelProto:
    graph = Graph(1, side * side, 5)
    most = np.iinfo(np.int64).max
    rows = graph.add("Slice", graph.add("Reshape", "image", [1, side, side, 5]), [0], [most], [1], [2])
    return graph.model(graph.add("Reshape", graph.add("Slice", rows, [0], [most], [2], [2]), [1, -1, 5]))


def windows() -> ModelProto:
    graph = Graph(1, 8, 12, 5)
    parted = graph.add("Reshape", "image", [1, 2, 4, 3, 4, 5])
    turned = graph.add("Transpose", parted, perm=[0, 1, 3, 2, 4, 5])
    return graph.model(graph.add("Reshape", turned, [6, 16, 5]))


def halves() -> ModelProto:
    graph = Graph(1, 6, 4, 4)
    return graph.model(*graph.add("Split", "image", outputs=2, axis=1))


def positions() -> ModelProto:
    graph = Graph(1, 4, 4)
    table = np.random.default_rng(1).normal(size=(9, 2)).astype(np.float32)
    places = graph.add("Unsqueeze", np.arange(16).reshape(4, 4) % 9, [-1])
    found = graph.add("Transpose", graph.add("GatherND", table, places), perm=[2, 0, 1])
    return graph.model(graph.add("Add", "image", graph.add("Sin", found)))


# What is to be gone, and what is to be there.
CASES: dict[str, tuple[Callable[[], ModelProto], set[str], set[str]]] = {
    "attention of a ViT": (lambda: attention([3, 1, 4]), {"Squeeze"}, {"Slice"}),
    "attention of EdgeNeXt": (lambda: attention([3, 4, 1]), {"Squeeze"}, {"Slice"}),
    "pooled by channels": (pooled, {"Gather"}, {"Reshape"}),
    "every second pixel, odd": (strided, {"Slice"}, {"MaxPool"}),
    "every second pixel, even": (lambda: strided(6), {"Slice"}, {"MaxPool"}),
    "windows": (windows, set(), {"Transpose"}),
    "halves": (halves, set(), {"Split"}),
    "positions": (positions, {"GatherND", "Sin", "Unsqueeze", "Transpose"}, {"Add"}),
}


def run(model: ModelProto) -> list[np.ndarray]:
    shape = [side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": np.random.default_rng(0).normal(size=shape).astype(np.float32)})


@pytest.mark.parametrize(("make", "gone", "there"), CASES.values(), ids=CASES)
def test_another_form_has_the_same_values(make: Callable[[], ModelProto], gone: set[str], there: set[str]) -> None:
    model = make()
    before = run(model)
    to_portable(model)
    onnx.checker.check_model(model, full_check=True)
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & gone and kinds >= there
    for new, old in zip(run(model), before, strict=True):
        assert new.shape == old.shape
        np.testing.assert_array_max_ulp(new, old, 1)  # a sine may round otherwise; all else is moved about
    read = {name for node in model.graph.node for name in node.input}
    assert {one.name for one in model.graph.initializer} <= read


def test_no_transpose_has_more_than_four_axes_beside_the_batch() -> None:
    for make in (windows, lambda: attention([3, 1, 4])):
        model = make()
        to_portable(model)
        turns = [node for node in model.graph.node if node.op_type == "Transpose"]
        assert turns and all(len(helper.get_attribute_value(node.attribute[0])) <= 5 for node in turns)


def test_a_split_says_its_sizes() -> None:
    model = halves()
    to_portable(model)
    (node,) = model.graph.node
    (sizes,) = (numpy_helper.to_array(one) for one in model.graph.initializer if one.name == node.input[1])
    assert sizes.tolist() == [3, 3]


def test_what_only_looks_alike_stays() -> None:
    graph = Graph(6)
    other = graph.model(graph.add("Gather", "image", np.array([1, 0, 2, 3, 4, 5])))
    graph = Graph(1, 10, 24)
    turned = graph.add("Transpose", graph.add("Reshape", "image", [1, 10, 3, 2, 4]), perm=[3, 0, 2, 1, 4])
    heads = graph.model(graph.add("Squeeze", graph.add("Slice", turned, [0], [1], [0]), [0]))
    graph = Graph(1, 6, 6, 5)
    rows = graph.add("Slice", "image", [1], [6], [1], [2])
    late = graph.model(graph.add("Slice", rows, [0], [6], [2], [2]))
    for model in (other, heads, late):
        before = [node.op_type for node in model.graph.node]
        to_portable(model)
        assert [node.op_type for node in model.graph.node] == before
