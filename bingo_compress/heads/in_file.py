"""A class head as the last nodes of an exported file: one output `scores` more, and `distance` where it is known from
which on an image is of none of the classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bingo_edge.heads import BankHead, Head, LinearHead, classify
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from bingo_compress.errors import BingoError
from bingo_compress.models.exported import runner

MAX_DIFFERENCE = 1e-5  # of a probability
LARGEST = 1 << 30  # bytes of a bank in a file: protobuf ends at 2 GiB
REDUCE_AXES_INPUT = 18  # opset from which on a reduction takes its axes as an input
OUTPUTS = {
    "scores": "float32 [batch, classes], calibrated probabilities in the order of classes",
    "distance": "float32 [batch, 1], 1 - largest cosine of embedding to the mean of a class",
}


def with_head(model: onnx.ModelProto, head: Head, means: NDArray[np.float32] | None) -> onnx.ModelProto:
    """`model`, which has outputs embedding and features (B, D), with a head after them: output scores (B, C), as
    `bingo_edge.classify` gives them; with means (C, D) of length one also output distance (B, 1). All in float32.

    A bank that votes as a whole is two products and a softmax; only one whose k is smaller needs TopK and Gather.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    batch = next(one for one in graph.output if one.name == "embedding").type.tensor_type.shape.dim[0]

    def constant(name: str, values: NDArray[Any]) -> str:
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), f"head_{name}"))
        return f"head_{name}"

    def node(kind: str, inputs: list[str], *outputs: str, **settings: Any) -> None:
        graph.node.append(helper.make_node(kind, inputs, outputs, f"head_{len(graph.node)}_{kind}", **settings))

    def result(name: str, width: int) -> None:
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width]))
        graph.output[-1].type.tensor_type.shape.dim[0].CopyFrom(batch)

    if isinstance(head, LinearHead):
        node("Gemm", ["features", constant("weight", head.weight.T), constant("bias", head.bias)], "head_logits")
        node("Softmax", ["head_logits"], "scores", axis=1)
    else:
        _refuse_large(head)
        votes = np.eye(len(head.classes), dtype=np.float32)[head.labels]
        bank = constant("bank", head.embeddings.T / np.float32(head.temperature))
        node("MatMul", ["embedding", bank], "head_cosines")
        if head.k >= len(head.labels):
            node("Softmax", ["head_cosines"], "head_shares", axis=1)
            node("MatMul", ["head_shares", constant("votes", votes)], "scores")
        else:
            k, row, flat = (np.array(shape, np.int64) for shape in ([head.k], [0, 1, head.k], [0, len(head.classes)]))
            node("TopK", ["head_cosines", constant("k", k)], "head_nearest", "head_places", axis=1)
            node("Softmax", ["head_nearest"], "head_shares", axis=1)
            node("Gather", [constant("votes", votes), "head_places"], "head_voices", axis=0)
            node("Reshape", ["head_shares", constant("row", row)], "head_weights")
            node("MatMul", ["head_weights", "head_voices"], "head_sums")
            node("Reshape", ["head_sums", constant("flat", flat)], "scores")
    result("scores", len(head.classes))
    if means is not None:
        node("MatMul", ["embedding", constant("means", means.T)], "head_to_means")
        opset = next(entry.version for entry in made.opset_import if not entry.domain)
        if opset >= REDUCE_AXES_INPUT:
            node("ReduceMax", ["head_to_means", constant("axes", np.array([1], np.int64))], "head_closest", keepdims=1)
        else:
            node("ReduceMax", ["head_to_means"], "head_closest", axes=[1], keepdims=1)
        node("Sub", [constant("one", np.array([[1]], np.float32)), "head_closest"], "distance")
        result("distance", 1)
    onnx.checker.check_model(made, full_check=True)
    return made


def _refuse_large(head: BankHead) -> None:
    size = 4 * head.embeddings.size
    if size > LARGEST:
        raise BingoError(
            f"--head: expected a bank of at most {LARGEST >> 20} MiB to go into the file, found {len(head.labels):,}"
            f" images, {size >> 20} MiB; give --head linear, or fewer --labels"
        )


def write(bare: Path, target: Path, head: Head, means: NDArray[np.float32] | None, images: Tensor) -> dict[str, Any]:
    """Write `target`: what `bare` holds, with a head. images: uint8 (n, S, S, 3), the user's own. Returns how near the
    scores of the file are to those of the head beside it. Raises BingoError (exit status 3) where they are not equal
    to 1e-5.
    """
    onnx.save(with_head(onnx.load(bare), head, means), target)
    run = runner(target, ("embedding", "features", "scores"))
    parts = [[each.numpy() for each in run(batch)] for batch in images.split(32)]
    embedding, features, scores = (np.concatenate(kind) for kind in zip(*parts, strict=True))
    expected = classify(head, embedding, features)[1]
    difference = float(np.abs(scores - expected).max())
    same = float((scores.argmax(1) == expected.argmax(1)).mean())
    # "not <=" and not ">", so that a NaN is refused too.
    if not difference <= MAX_DIFFERENCE:
        raise BingoError(
            f"export refused, no file written: the scores of the file and those of its head beside it differ on"
            f" {len(images)} of your images by {difference:.2g} (at most {MAX_DIFFERENCE:g}); leave --head out, and"
            " report this",
            3,
        )
    return {"images": len(images), "max_difference": difference, "same_class": same}
