"""A student as one ONNX file that takes uint8 pixels, published only when onnxruntime and torch agree on the user's own
images.
"""

import contextlib
import copy
import hashlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import timm
import torch
from bingo_edge.model import network_input
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from bingo_compress.errors import BingoError, first_line
from bingo_compress.exporters import graph
from bingo_compress.exporters.graph import TORCH_LEAST
from bingo_compress.exporters.portable import to_portable
from bingo_compress.models.encoder import Encoder, Preprocessing
from bingo_compress.models.exported import onnx_runner
from bingo_compress.runtime.run_dir import atomic, is_full, write_text

MAX_DIFFERENCE = 1e-4
MIN_COSINE = 0.9999
IMAGES = 256
REFUSED = 3
# What a file takes: bytes as they lie in a picture; or floats by channels, of 0 to 1, or less the mean and by the std.
INPUTS = ("uint8-nhwc", "float32-nchw", "float32-nchw-normalised")
OUTPUTS = ("embedding", "features", "scores", "distance")  # the last two where the file has a class head

# Of a quantised file: its figures, and the names of those that are below the gate.
Judge = Callable[[Path], tuple[dict[str, Any], list[str]]]
# Takes a graph, where to put it, its contract and its form; returns the contract as it was written.
Publish = Callable[[Path, Path, dict[str, Any], "Form"], dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """What a file is to look like. opset: of the ONNX domain, the only one in it; ir: at most this IR version, 0:
    whatever torch writes; batch: 0 is dynamic; taken: one of INPUTS; plain: without the operators that some toolchain
    gets wrong (`graph.to_plain`) or cannot read (`portable`); outputs: those that the published file has.
    """

    opset: int
    ir: int
    batch: int
    taken: str = "uint8-nhwc"
    plain: bool = False
    outputs: tuple[str, ...] = OUTPUTS


class Gate(NamedTuple):
    """Of a quantised file: `choose` by what it is chosen, `report` how it does on test images that choose nothing, each
    its figures and those below the gate. labelled: sha256 of the labelled images that either judges by; lost: what is
    below it of two files' own heads, float's and the quantised one's, as their contracts tell of them.
    """

    choose: Judge
    report: Judge
    labelled: set[str]
    lost: Callable[[dict[str, Any], dict[str, Any]], str] = lambda before, after: ""


# modern: the first opset whose own QuantizeLinear takes 16 bits; edge: what RKNN, CANN, TensorRT, Hailo and old Triton
# servers read, and float pixels, as ncnn and RKNN know no others (docs/devices.md).
PROFILES = {"modern": Form(21, 0, 0), "edge": Form(17, 8, 1, "float32-nchw", True)}


def form(
    profile: str, batch: str | None, opset: int | None, taken: str | None = None, outputs: str | None = None
) -> Form:
    """A profile with what the user wants otherwise. batch: "dynamic" or a number; outputs: names with commas between.
    Raises BingoError.
    """
    if profile not in PROFILES:
        raise BingoError(f"--profile: expected {' or '.join(PROFILES)}, found {profile!r}")
    chosen = PROFILES[profile]
    if batch is not None:
        if batch != "dynamic" and not (batch.isdecimal() and int(batch)):
            raise BingoError(f"--batch: expected dynamic or a number of at least 1, found {batch!r}")
        chosen = replace(chosen, batch=0 if batch == "dynamic" else int(batch))
    if opset is not None:
        newest = onnx.defs.onnx_opset_version()
        if not 13 <= opset <= newest:
            raise BingoError(
                f"--opset: expected 13 (the first with int8 by channels) to {newest} (the newest that onnx"
                f" {onnx.__version__} knows), found {opset}"
            )
        chosen = replace(chosen, opset=opset)
    if taken is not None:
        if taken not in INPUTS:
            raise BingoError(f"--input: expected {', '.join(INPUTS)}, found {taken!r}")
        chosen = replace(chosen, taken=taken)
    if outputs is not None:
        names = [name.strip() for name in outputs.split(",")]
        if not set(names) <= set(OUTPUTS):
            raise BingoError(f"--outputs: expected some of {', '.join(OUTPUTS)} with commas between, found {outputs!r}")
        chosen = replace(chosen, outputs=tuple(name for name in OUTPUTS if name in names))
    return chosen


class Deployed(nn.Module):
    """What the device runs. forward: pixels in one of INPUTS, uint8 (B, S, S, 3) RGB or float (B, 3, S, S) ->
    (embedding (B, D) L2-normalised, features (B, D) raw).
    """

    def __init__(self, student: Encoder, taken: str = "uint8-nhwc") -> None:
        super().__init__()
        self.student = student
        self.taken = taken

    def extra_repr(self) -> str:
        """What is printed of it."""
        return self.taken

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels to (embedding, features)."""
        if self.taken == "uint8-nhwc":
            # contiguous: pooling of channels-last tensors is exported with an as_strided, a Gather that devices need
            # not know.
            image = image.permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255
        normalised = self.taken == "float32-nchw-normalised"
        features = self.student.backbone(image) if normalised else self.student(image)
        # As torch's normalize, in four nodes: that one is exported with shapes that are looked up, ranged over and
        # expanded.
        return features / features.norm(dim=1, keepdim=True).clamp(min=1e-12), features


def export_onnx(
    student: Encoder, images: Tensor, path: Path, facts: dict[str, Any], wanted: Form = PROFILES["modern"]
) -> dict[str, Any]:
    """Write `path` and the readable `path`.json. images: uint8 (n, S, S, 3), the user's own, preprocessed. Returns what
    path.json holds.

    Raises BingoError (exit status 3), leaving nothing behind, unless the file is of the form that is wanted and
    embeddings agree to 1e-4 and a cosine of 0.9999.
    """
    student = student.cpu().eval()
    with torch.inference_mode():
        expected = [Deployed(student)(batch) for batch in images.split(32)]
    fused = copy.deepcopy(student).float()
    fused.backbone = timm.utils.reparameterize_model(fused.backbone)
    contract = _contract(student, facts, wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder:
        raw = Path(folder, "student.onnx")
        pixels = torch.from_numpy(network_input(contract, images.numpy()))
        _write_graph(Deployed(fused, wanted.taken).eval(), pixels, raw, wanted)
        _save(onnx.load(raw), raw, contract)
        contract["parity"] = _parity(
            raw, images, torch.cat([pair[0] for pair in expected]), torch.cat([pair[1] for pair in expected])
        )
        return publish(raw, path, contract, wanted)


def publish(raw: Path, path: Path, contract: dict[str, Any], wanted: Form) -> dict[str, Any]:
    """Put what `raw` holds at `path`, less the outputs that are not wanted, with the contract and what the graph turned
    out to be in its metadata; and the readable `path`.json, which holds the same and "bytes" and "sha256" of `path`.
    Returns what it holds. Raises BingoError (exit status 3) unless the graph is of the form that is wanted.
    """
    kept = {name: what for name, what in contract["outputs"].items() if name in wanted.outputs}
    contract = contract | {"outputs": kept, "onnx": described(raw, wanted)}
    model = onnx.load(raw)
    graph.keep_outputs(model, kept)
    with atomic(path) as temporary:
        _save(model, temporary, contract)
        onnx.checker.check_model(temporary)
        contract |= {"bytes": temporary.stat().st_size, "sha256": hashlib.sha256(temporary.read_bytes()).hexdigest()}
        path.with_suffix(".json").unlink(missing_ok=True)
    write_text(path.with_suffix(".json"), json.dumps(contract, indent=2) + "\n")
    return contract


class Making(NamedTuple):
    """What a file in less precision is made of, in the folder `work`. whole: the float file with all its outputs;
    float_file: with those that are published; calibration: uint8 (n, S, S, 3), images that ranges are found on; tuned:
    makes a whole float file that loses less, where that is asked for; put: publishes a graph, `publish` or as it.
    """

    whole: Path
    float_file: Path
    calibration: Tensor
    form: Form
    work: Path
    gate: Gate
    tuned: Callable[[], Path] | None = None
    put: Publish = publish


def published(whole: Path, path: Path, wanted: Form, put: Publish = publish) -> Path:
    """A file with all outputs, published at `path` by `put` in the form that is wanted. Returns `path`."""
    contract = json.loads(whole.with_suffix(".json").read_text(encoding="utf-8"))
    put(whole, path, {key: value for key, value in contract.items() if key not in ("bytes", "sha256")}, wanted)
    return path


def _save(model: onnx.ModelProto, path: Path, contract: dict[str, Any]) -> None:
    """With the contract in the metadata: whoever runs a file is told by it how it takes pixels."""
    onnx.helper.set_model_props(model, {"bingo_compress": json.dumps(contract)})
    onnx.save(model, path)


def _input(preprocessing: Preprocessing, taken: str) -> dict[str, Any]:
    """How pixels become what the file takes, as `bingo_edge.model.network_input` does it."""
    given: dict[str, Any] = {"name": "image", "layout": "NHWC", "dtype": "uint8", "color": "RGB"}
    given["size"] = preprocessing.size
    if taken != "uint8-nhwc":
        mean, std = ((0.0,) * 3, (1.0,) * 3) if taken == "float32-nchw" else (preprocessing.mean, preprocessing.std)
        given |= {"layout": "NCHW", "dtype": "float32"}
        given |= {"mean": [255 * value for value in mean], "std": [255 * value for value in std]}
    return given


def _contract(student: Encoder, facts: dict[str, Any], wanted: Form) -> dict[str, Any]:
    preprocessing = student.preprocessing
    return {
        "format": 1,
        **facts,
        "precision": "float32",
        "embedding_dim": student.width,
        "parameters": student.parameters_count(),
        "input": _input(preprocessing, wanted.taken),
        "preprocess": {key: value for key, value in preprocessing.geometry().items() if key != "size"},
        "preprocess_rule": (
            "upright RGB; centred square of side crop_pct x the shorter side (crop_mode squash: the whole picture); "
            "resized to size x size with Pillow's antialiased interpolation"
        ),
        "normalization": {
            "where": "before the graph" if wanted.taken == "float32-nchw-normalised" else "in the graph",
            "scale": "1/255",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
        },
        "outputs": {
            "embedding": "float32 [batch, embedding_dim], L2-normalised",
            "features": "float32 [batch, embedding_dim], raw",
        },
    }


def _write_graph(module: nn.Module, images: Tensor, path: Path, wanted: Form) -> None:
    # Two pictures where the batch is dynamic: torch takes a size of 1 for a constant.
    count = wanted.batch or 2
    example = images[torch.arange(count) % len(images)]
    batch = None if wanted.batch else {"image": {0: torch.export.Dim("batch")}}
    # The exporter talks at length on stdout and through loggers; what matters is checked in the file below.
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                module,
                (example,),
                path,
                dynamo=True,
                opset_version=max(wanted.opset, TORCH_LEAST),
                input_names=["image"],
                output_names=["embedding", "features"],
                dynamic_shapes=batch,
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            if is_full(error):
                raise
            why = first_line(error)
            raise BingoError(
                f"export refused: torch cannot export this student to ONNX ({why}); choose another student", REFUSED
            ) from None
    model = onnx.load(path)
    if wanted.opset < TORCH_LEAST or wanted.ir:
        model = _lowered(model, wanted)
    if wanted.plain:
        graph.to_plain(model)
        to_portable(model)
    onnx.save(model, path)


def _lowered(model: onnx.ModelProto, wanted: Form) -> onnx.ModelProto:
    """At an opset that torch does not write. Raises BingoError (exit status 3)."""
    try:
        return graph.lowered(model, wanted.opset, wanted.ir)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise BingoError(
            f"export refused: this student cannot be written at opset {wanted.opset} ({why}); give --opset"
            f" {TORCH_LEAST} or more, or --profile modern",
            REFUSED,
        ) from None


def described(path: Path, wanted: Form) -> dict[str, Any]:
    """Opset, IR version and batch as the written file has them, which is not always what was asked for. Raises
    BingoError (exit status 3).
    """
    model = onnx.load(path)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    foreign = sorted(
        {node.domain for node in model.graph.node if node.domain} | {function.domain for function in model.functions}
    )
    found = (batch, opsets, foreign)
    if found != (wanted.batch, {"ai.onnx": wanted.opset}, []) or (wanted.ir and model.ir_version > wanted.ir):
        raise BingoError(
            f"export refused: expected a {f'batch of {wanted.batch}' if wanted.batch else 'dynamic batch'}, opset"
            f" {wanted.opset} and no other domain{f', IR version {wanted.ir} at most' if wanted.ir else ''}; the file"
            f" has batch {batch or 'dynamic'}, opsets {opsets}, nodes of {foreign or 'no other domain'}, IR version"
            f" {model.ir_version}; try another --opset, --batch or --profile",
            REFUSED,
        )
    return {"opset": wanted.opset, "ir_version": model.ir_version, "batch": batch or "dynamic"}


def _parity(path: Path, images: Tensor, embedding: Tensor, features: Tensor) -> dict[str, Any]:
    run = onnx_runner(path)
    pairs = [run(batch) for batch in images.split(32)]
    got_embedding, got_features = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    difference = float((got_embedding - embedding).abs().max())
    cosine = float(cosine_similarity(got_embedding, embedding).min())
    relative = float((got_features - features).abs().max() / features.abs().max().clamp(min=1e-12))
    result = {
        "images": len(images),
        "max_difference": difference,
        "min_cosine": cosine,
        "features_max_relative_difference": relative,
        "feature_norms": [float(norm) for norm in features.norm(dim=1).aminmax()],
    }
    # "not <=" and not ">", so that a NaN is refused too.
    if not (difference <= MAX_DIFFERENCE and cosine >= MIN_COSINE and relative <= MAX_DIFFERENCE):
        raise BingoError(
            f"export refused, no file written: onnxruntime and torch differ on {len(images)} of your images: largest"
            f" difference {difference:.2g} (at most {MAX_DIFFERENCE:g}), smallest cosine {cosine:.6f} (at least"
            f" {MIN_COSINE}), features {relative:.2g} of their largest value (at most {MAX_DIFFERENCE:g}); try another"
            " student, or report this with its name",
            REFUSED,
        )
    return result
