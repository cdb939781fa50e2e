"""A class head as the last nodes of an exported file: one output `scores` more, and `distance` where it is known from
which on an image is of none of the classes.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from bingo_edge.heads import BankHead, Head, LinearHead, classify
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from bingo_compress.errors import BingoError
from bingo_compress.evaluation import scores
from bingo_compress.exporters.onnx import REFUSED, Form, publish
from bingo_compress.heads import calibration, fitting
from bingo_compress.heads.fitting import Made
from bingo_compress.models import exported
from bingo_compress.models.encoder import Preprocessing
from bingo_compress.runtime import console

MAX_DIFFERENCE = 1e-5  # of a probability, between a file and the head beside it; see `_allowed`
LARGEST = 1 << 30  # bytes of a bank in a file: protobuf ends at 2 GiB
REDUCE_AXES_INPUT = 18  # opset from which on a reduction takes its axes as an input
OUTPUTS = {
    "scores": "float32 [batch, classes], probabilities in the order of classes",
    "distance": "float32 [batch, 1], 1 - largest cosine of the embedding to the mean of a class",
}


@dataclass(frozen=True)
class Classes:
    """What the head of every file of an export is made of. kind: of fitting.KINDS, or "" where one is `given`; sides:
    labelled images with the features "float" of the float file; tested: whether sides.queries are unknown to the head;
    images: uint8 (n, S, S, 3), the user's own, that a file is proven on.
    """

    kind: str
    given: Made | None
    sides: scores.Sides | None
    tested: bool
    preprocessing: Preprocessing
    images: Tensor


def with_head(model: onnx.ModelProto, head: Head) -> onnx.ModelProto:
    """`model`, which has outputs embedding and features (B, D), with a head after them: output scores (B, C), as
    `bingo_edge.classify` gives them; of a head with means also output distance (B, 1). All in float32.

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
    if head.means is not None:
        node("MatMul", ["embedding", constant("means", head.means.T)], "head_to_means")
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


def publish_with_head(
    bare: Path, path: Path, contract: dict[str, Any], wanted: Form, classes: Classes
) -> dict[str, Any]:
    """`onnx.publish` of the graph `bare` with a head after it, and the same head as an npz file beside it: fitted on
    the file's own features of the labelled images, as `validate` does, or the one that was given. Returns the contract.

    Raises BingoError (exit status 3) where scores of the file and of the head beside it differ by more than `_allowed`,
    on the user's images or on the test images, or their accuracies differ at all.
    """
    name = "float" if contract["precision"] == "float32" else contract["precision"]
    sides = classes.sides
    if sides and name not in sides.bank:
        sides = _seen_by(bare, name, sides, classes.preprocessing)
    made = classes.given or _fitted(classes.kind, sides, name)
    headed = path.with_name(f"{path.stem}-head.onnx")
    onnx.save(with_head(onnx.load(bare), made.head), headed)
    facts = made.facts | {"parity": _prove(headed, made.head, classes.images)}
    if made.head.threshold is not None:
        facts["threshold"] = made.head.threshold
    if sides and classes.tested:
        facts |= _tested(headed, made, sides, name, classes.preprocessing)
    outputs = {key: what for key, what in OUTPUTS.items() if key == "scores" or made.head.means is not None}
    contract = contract | {"classes": made.head.classes.tolist(), "head": facts}
    contract["outputs"] = contract["outputs"] | outputs
    contract = publish(headed, path, contract, wanted)
    headed.unlink()
    fitting.save(path, contract["sha256"], made)
    _say(path, contract, made.head)
    return contract


def _fitted(kind: str, sides: scores.Sides | None, name: str) -> Made:
    assert sides is not None, "a head is fitted on labelled images"
    made = fitting.fit(kind, sides.bank[name], sides.labels, sides.classes, sides.groups)
    seen = sides.bank_folder.only(sides.places)
    named = (f"{digest} {sides.classes[label]}" for digest, label in zip(seen.digests, sides.labels, strict=True))
    told = hashlib.sha256("\n".join(sorted(named)).encode("utf-8", "surrogateescape")).hexdigest()
    return replace(made, facts=made.facts | {"labels_sha256": told}, paths=seen.files)


def _seen_by(file: Path, name: str, sides: scores.Sides, preprocessing: Preprocessing) -> scores.Sides:
    """`sides` with the features of another file of the same student."""
    run = exported.onnx_runner(file)
    model = {name: (preprocessing, lambda batch: run(batch)[1])}
    parts = ((sides.bank_folder, sides.places), (sides.query_folder, sides.query_places))
    bank, queries = (scores.again(model, folder, places, f"embed in {name}") for folder, places in parts)
    return replace(sides, bank=bank, queries=queries)


def _prove(headed: Path, head: Head, images: Tensor) -> dict[str, Any]:
    """How near the scores of a file are to those of the head beside it. Raises BingoError."""
    run = exported.runner_by_name(headed)
    parts = [run(batch) for batch in images.split(32)]
    found = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    expected = classify(head, found["embedding"], found["features"])[1]
    allowed = _allowed(head, found["features"])
    difference = _difference(found["scores"], expected, allowed, "of your images")
    return {"images": len(images), "max_difference": difference, "allowed": allowed}


def _allowed(head: Head, features: NDArray[Any]) -> float:
    """MAX_DIFFERENCE, or where logits are so large that float32 cannot hold them as exactly, its relative error times
    the largest: the head beside the file is computed in float64, which devices do not have.
    """
    if isinstance(head, LinearHead):
        largest = float(np.abs(features.astype(np.float64) @ head.weight.T + head.bias).max())
    else:
        largest = 1 / head.temperature
    return max(MAX_DIFFERENCE, largest * float(np.finfo(np.float32).eps))


def _difference(found: NDArray[Any], expected: NDArray[Any], allowed: float, what: str) -> float:
    difference = float(np.abs(found - expected).max())
    # "not <=" and not ">", so that a NaN is refused too.
    if not difference <= allowed:
        raise BingoError(
            f"export refused, no file written: the scores of the file and of the head beside it differ on {len(found)}"
            f" {what} by {difference:.2g} (at most {allowed:.2g}); leave --head out, and report this",
            REFUSED,
        )
    return difference


def _tested(headed: Path, made: Made, sides: scores.Sides, name: str, preprocessing: Preprocessing) -> dict[str, Any]:
    """`_figures` of the file's own answers to test images. Raises BingoError where they are not the head's."""
    model = {"file": (preprocessing, exported.classes_runner(headed))}
    found = scores.again(model, sides.query_folder, sides.query_places, "classify test images")["file"]
    count = len(made.head.classes)
    probabilities, distance = found[:, :count], found[:, count] if made.head.means is not None else None
    rows = sides.queries[name]
    expected = classify(made.head, fitting.embeddings(rows).numpy(), rows.numpy())[1]
    _difference(probabilities.numpy(), expected, _allowed(made.head, rows.numpy()), "test images")
    told = _figures(probabilities, distance, made, sides)
    beside = float((torch.from_numpy(expected).argmax(1) == sides.query_labels).double().mean())
    if told["accuracy"] != beside:
        raise BingoError(
            f"export refused, no file written: accuracy {told['accuracy']:.4f} of the file's scores, {beside:.4f} of"
            " the head beside it; leave --head out, and report this",
            REFUSED,
        )
    return told


def _figures(probabilities: Tensor, distance: Tensor | None, made: Made, sides: scores.Sides) -> dict[str, Any]:
    """What a head does on sides.queries: accuracy with interval, by class, calibration error, and how many of these
    images of known classes are taken for none; and the share of them with a near-copy among the labelled images, with
    which the others are too good. probabilities: (M, C); distance: (M,).
    """
    predicted = probabilities.argmax(1)
    found: dict[str, Any] = {"test_images": len(predicted)}
    found |= scores.with_interval("accuracy", predicted == sides.query_labels)
    found |= {"ece": calibration.calibration_error(probabilities, sides.query_labels), "ece_bins": calibration.BINS}
    if isinstance(made.head, LinearHead) and "temperature" in made.facts:
        # softmax(temperature x log p): the same head without its temperature
        plain = (probabilities.double().clamp(min=1e-45).log() * made.facts["temperature"]).softmax(1)
        found["ece_uncalibrated"] = calibration.calibration_error(plain, sides.query_labels)
    if distance is not None and made.head.threshold is not None:
        found |= scores.with_interval("false_alarms", distance > made.head.threshold)
    found |= {key: sides.near[key] for key in ("test_share_near_bank",) if key in sides.near}
    classes = scores.by_class(predicted, sides)
    return found | {key: classes[key] for key in ("per_class", "untested") if key in classes}


def _say(path: Path, contract: dict[str, Any], head: Head) -> None:
    facts = contract["head"]
    heat = f"temperature {facts['temperature']:.3g}" if "temperature" in facts else "temperature not known"
    console.say(
        f"{path.name}: head {facts['kind']} of {len(contract['classes']):,} classes, {heat}; its scores equal those of"
        f" the head beside it to {facts['parity']['max_difference']:.1g}"
    )
    if "calibrated" not in facts:
        console.say(
            f"{path.name}: whether its scores are calibrated is not known: an earlier version made the head;"
            " export without --head, validate, and export with it again"
        )
    elif not facts["calibrated"]:
        console.say(f"{path.name}: its scores are not calibrated; {_mended(facts)} whose scores are")
    if isinstance(head, BankHead):
        console.say(
            f"{path.name}: the bank is {console.size(4 * head.embeddings.size)} of it; --head linear needs"
            f" {console.size(4 * len(head.classes) * head.embeddings.shape[1])}"
        )
        if head.k < len(head.labels):
            console.say(
                f"{path.name}: a vote of {head.k} nearest needs TopK and Gather, which onnxruntime and OpenVINO have"
                " and many device converters have not; --head knn --labels makes one without"
            )
    if "accuracy" in facts:
        low, high = facts["accuracy_interval"]
        console.say(
            f"{path.name}: accuracy {facts['accuracy']:.4f} [{low:.4f}, {high:.4f}] on {facts['test_images']:,} test"
            f" images, expected calibration error {facts['ece']:.4f}"
            + (f" ({facts['ece_uncalibrated']:.4f} before the temperature)" if "ece_uncalibrated" in facts else "")
        )
    if "false_alarms" in facts:
        low, high = facts["false_alarms_interval"]
        console.say(
            f"{path.name}: none of these from a distance of {facts['threshold']:.4f}; {facts['false_alarms']:.1%}"
            f" [{low:.1%}, {high:.1%}] of the test images, whose classes are known, are refused"
        )
    elif "threshold" not in facts:
        console.say(f'{path.name}: says no "none of these": the head knows no threshold; {_mended(facts)} that does')


def _mended(facts: dict[str, Any]) -> str:
    """How to get another head."""
    if "head_sha256" in facts:
        return "--head linear or knn, with --labels, makes one"
    return "all labelled images show one scene; others make one"
