"""A student as one ONNX file that takes uint8 pixels, published only when onnxruntime and torch agree on the user's own images."""

import contextlib
import copy
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from bingo_compress.encoder import Encoder
from bingo_compress.errors import BingoError
from bingo_compress.run_dir import atomic, write_text

OPSET = 18
MAX_DIFFERENCE = 1e-4
MIN_COSINE = 0.9999
IMAGES = 256
REFUSED = 3


class Deployed(nn.Module):
    """What the device runs. forward: uint8 (B, S, S, 3) RGB -> (embedding (B, D) L2-normalised, features (B, D) raw)."""

    def __init__(self, student: Encoder) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pixels to (embedding, features)."""
        features = self.student(image.permute(0, 3, 1, 2).to(torch.float32) / 255)
        return normalize(features, dim=1), features


def export_onnx(student: Encoder, images: Tensor, path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write `path` and the readable `path`.json. images: uint8 (n, S, S, 3), the user's own, preprocessed. Returns the contract that both hold.

    Raises BingoError (exit status 3), leaving nothing behind, unless embeddings agree to 1e-4 and a cosine of 0.9999.
    """
    student = student.cpu().eval()
    with torch.inference_mode():
        expected = [Deployed(student)(batch) for batch in images.split(32)]
    fused = copy.deepcopy(student).float()
    fused.backbone = timm.utils.reparameterize_model(fused.backbone)
    contract = _contract(student, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        _write_graph(Deployed(fused).eval(), images[:2], temporary)
        contract["onnx"] = _described(temporary)
        contract["parity"] = _parity(
            temporary, images, torch.cat([pair[0] for pair in expected]), torch.cat([pair[1] for pair in expected])
        )
        model = onnx.load(temporary)
        entry = model.metadata_props.add()
        entry.key, entry.value = "bingo_compress", json.dumps(contract)
        onnx.save(model, temporary)
        onnx.checker.check_model(temporary)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        path.with_suffix(".json").unlink(missing_ok=True)
    write_text(path.with_suffix(".json"), json.dumps(contract | {"sha256": digest}, indent=2) + "\n")
    return contract


def _contract(student: Encoder, facts: dict[str, Any]) -> dict[str, Any]:
    preprocessing = student.preprocessing
    return {
        "format": 1,
        **facts,
        "embedding_dim": student.width,
        "parameters": student.parameters_count(),
        "input": {"name": "image", "layout": "NHWC", "dtype": "uint8", "color": "RGB", "size": preprocessing.size},
        "preprocess": {key: value for key, value in preprocessing.geometry().items() if key != "size"},
        "preprocess_rule": "upright RGB; centred square of side crop_pct x the shorter side (crop_mode squash: the whole picture); "
        "resized to size x size with Pillow's antialiased interpolation",
        "normalization": {"where": "in the graph", "scale": "1/255", "mean": list(preprocessing.mean), "std": list(preprocessing.std)},
        "outputs": {"embedding": "float32 [batch, embedding_dim], L2-normalised", "features": "float32 [batch, embedding_dim], raw"},
    }


def _write_graph(module: nn.Module, example: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch")
    # The exporter talks at length on stdout and through loggers; what matters is checked in the file below.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                module,
                (example,),
                path,
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["embedding", "features"],
                dynamic_shapes={"image": {0: batch}},
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise BingoError(f"export refused: torch cannot export this student to ONNX ({why}); choose another student", REFUSED) from None


def _described(path: Path) -> dict[str, Any]:
    """Opset, IR version and batch as the written file has them, which is not always what was asked for."""
    model = onnx.load(path)
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if first.dim_value or opsets.get("ai.onnx") != OPSET:
        raise BingoError(
            f"export refused: expected a dynamic batch and opset {OPSET}, the file has batch {first.dim_value or 'dynamic'} and opsets {opsets}",
            REFUSED,
        )
    return {"opset": opsets["ai.onnx"], "ir_version": model.ir_version, "batch": "dynamic", "bytes": path.stat().st_size}


def _parity(path: Path, images: Tensor, embedding: Tensor, features: Tensor) -> dict[str, Any]:
    run = onnx_runner(path)
    pairs = [run(batch) for batch in images.split(32)]
    got_embedding, got_features = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    difference = float((got_embedding - embedding).abs().max())
    cosine = float(cosine_similarity(got_embedding, embedding).min())
    relative = float((got_features - features).abs().max() / features.abs().max().clamp(min=1e-12))
    result = {"images": len(images), "max_difference": difference, "min_cosine": cosine, "features_max_relative_difference": relative}
    # "not <=" and not ">", so that a NaN is refused too.
    if not (difference <= MAX_DIFFERENCE and cosine >= MIN_COSINE and relative <= MAX_DIFFERENCE):
        raise BingoError(
            f"export refused, no file written: onnxruntime and torch differ on {len(images)} of your images: largest difference {difference:.2g} "
            f"(at most {MAX_DIFFERENCE:g}), smallest cosine {cosine:.6f} (at least {MIN_COSINE}), features {relative:.2g} of their largest value "
            f"(at most {MAX_DIFFERENCE:g}); try another student, or report this with its name",
            REFUSED,
        )
    return result


def onnx_runner(path: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The file in onnxruntime on the CPU, as a function of uint8 (B, S, S, 3) -> (embedding, features)."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> tuple[Tensor, Tensor]:
        embedding, features = session.run(["embedding", "features"], {"image": np.ascontiguousarray(batch.numpy())})
        return torch.from_numpy(embedding), torch.from_numpy(features)

    return run


EXPORTERS = {"onnx": export_onnx}
