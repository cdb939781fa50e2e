"""Small networks and their contracts, as an export would write them, for the tests of the edge kit."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from bingo_edge import Embedder
from bingo_edge.cli import main
from bingo_edge.heads import LinearHead
from onnx import TensorProto, helper
from PIL import Image

from bingo_compress.exporters.head import with_head

RED, GREEN = (255, 0, 0), (0, 255, 0)


def units(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plain(color: tuple[int, int, int], height: int = 6, width: int = 9) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def save(path: Path, pixels: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")
    return str(path)


def contract(**changes: object) -> dict[str, object]:
    return {
        "format": 1,
        "run_id": "run-a",
        "embedding_dim": 3,
        "input": {"name": "image", "layout": "NHWC", "dtype": "uint8", "color": "RGB", "size": 8},
        "preprocess": {"crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center"},
        **changes,
    }


def make_model(path: Path, meta: object = None, size: int = 8, dim: int | str = 3, batch: int | str = "batch") -> str:
    """features = the mean colour, embedding = features / |features|: a plain picture's numbers are known, a black one
    gives NaN.
    """
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["image"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["real", "hw"], ["features"], keepdims=0),
        helper.make_node("ReduceL2", ["features", "c"], ["norm"], keepdims=1),
        helper.make_node("Div", ["features", "norm"], ["embedding"]),
    ]
    axes = [helper.make_tensor(name, TensorProto.INT64, [len(v)], v) for name, v in (("hw", [1, 2]), ("c", [1]))]
    outputs = [value(name, TensorProto.FLOAT, [batch, dim]) for name in ("embedding", "features")]
    graph = helper.make_graph(nodes, "tiny", [value("image", TensorProto.UINT8, [batch, size, size, 3])], outputs, axes)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if meta is not False:
        helper.set_model_props(
            model, {"bingo_compress": meta if isinstance(meta, str) else json.dumps(meta or contract())}
        )
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return str(path)


def write_heads(
    folder: Path, sha256: str, rng: np.random.Generator, dim: int = 3, **changes: object
) -> tuple[str, str, dict[str, np.ndarray]]:
    classes = np.array(["ant", "bee", "cow", "dog"])
    linear = {
        "weight": rng.normal(size=(4, dim)).astype("f4"),
        "bias": rng.normal(size=4).astype("f4"),
        "classes": classes,
    }
    bank = {
        "embeddings": units(rng.normal(size=(50, dim))).astype("f2"),
        "labels": rng.integers(0, 4, 50, np.int32),
        "classes": classes,
    }
    bank |= {
        "paths": np.array([f"p{i}" for i in range(50)]),
        "k": np.array(7),
        "temperature": np.array(0.07),
        **changes,
    }
    np.savez(folder / "linear.npz", **linear, model_sha256=np.array(sha256))
    np.savez(folder / "bank.npz", **bank, model_sha256=np.array(sha256))
    return str(folder / "linear.npz"), str(folder / "bank.npz"), linear | bank


def run(capfd: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main([str(arg) for arg in argv])
    return code, *capfd.readouterr()


def headed(model: Path, copy: Path, pictures: list[str], *, between: bool) -> tuple[Path, Embedder]:
    """`model` with four classes in it, and open. between: it knows a distance above which a picture is of none of them,
    one that some of the pictures pass.
    """
    held = Embedder(model)
    random = np.random.default_rng(3)
    means = units(held.embed(pictures[:4]).embeddings + random.normal(size=(4, held.dim)) * 0.01).astype(np.float32)
    head = LinearHead(means * 20, np.zeros(4, np.float32), np.array(["ant", "bee", "cow", "dog"]), means)
    made = with_head(onnx.load(model), head)
    told = held.contract | {"classes": head.classes.tolist(), "head": {}}
    told["outputs"] = dict.fromkeys(("embedding", "features", "scores", "distance"), "float32")
    if between:
        far = 1 - (held.embed(pictures).embeddings @ means.T).max(axis=1)
        told["head"]["threshold"] = float(np.median(far))
    helper.set_model_props(made, {"bingo_compress": json.dumps(told)})
    onnx.save(made, copy)
    return copy, Embedder(copy)
