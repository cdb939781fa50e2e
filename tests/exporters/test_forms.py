"""What a file takes and gives, and the operators in it: always the same model."""

import json
from pathlib import Path
from typing import Any

import bingo_edge
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bingo_edge.model import network_input
from helpers import encoder
from onnx import TensorProto, helper

from bingo_compress.errors import BingoError
from bingo_compress.exporters import graph
from bingo_compress.exporters.golden import write_golden
from bingo_compress.exporters.onnx import INPUTS, Deployed, export_onnx, form, published
from bingo_compress.models import exported
from bingo_compress.models.exported import onnx_runner, runner_by_name

PIXELS = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=INPUTS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("written") / "student.onnx"
    student = encoder("test_efficientnet", 32)
    export_onnx(student, PIXELS, path, {}, form("edge", "2", None, request.param))
    return path, student


@pytest.mark.slow
def test_whatever_a_file_takes_it_is_the_same_model(written: tuple[Path, Any]) -> None:
    path, student = written
    with torch.no_grad():
        embedding, features = Deployed(student)(PIXELS)
    for found in (onnx_runner(path)(PIXELS), bingo_edge.Embedder(path).infer(PIXELS.numpy())):
        assert np.abs(np.asarray(found[0]) - embedding.numpy()).max() < 1e-5
        assert np.abs(np.asarray(found[1]) - features.numpy()).max() < 1e-5 * float(features.abs().max())


@pytest.mark.slow
def test_the_contract_alone_says_what_goes_in(written: tuple[Path, Any]) -> None:
    """As someone with another runtime would, by student.json."""
    path, student = written
    told = json.loads(path.with_suffix(".json").read_text())["input"]
    pixels = PIXELS[:2].numpy()
    if told["dtype"] == "float32":
        mean, std = (np.array(told[key]) for key in ("mean", "std"))
        pixels = np.stack([((picture - mean) / std).transpose(2, 0, 1) for picture in pixels]).astype(np.float32)
    (given,) = onnxruntime.InferenceSession(str(path)).get_inputs()
    assert (given.name, list(given.shape)) == (told["name"], list(pixels.shape))
    (found,) = onnxruntime.InferenceSession(str(path)).run(["embedding"], {given.name: pixels})
    with torch.no_grad():
        assert np.abs(found - Deployed(student)(PIXELS[:2])[0].numpy()).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("outputs", ["embedding", "features"])
def test_a_file_with_one_output_is_a_part_of_the_whole(written: tuple[Path, Any], outputs: str, tmp_path: Path) -> None:
    whole, _ = written
    told = json.loads(whole.with_suffix(".json").read_text())
    taken = {"NHWC": "uint8-nhwc"}.get(told["input"]["layout"], "float32-nchw")
    path = published(whole, tmp_path / "student.onnx", form("edge", "2", None, taken, outputs))
    model = onnx.load(path)
    assert [output.name for output in model.graph.output] == [outputs]
    assert len(model.graph.node) < len(onnx.load(whole).graph.node) or outputs == "embedding"
    assert list(json.loads(path.with_suffix(".json").read_text())["outputs"]) == [outputs]
    assert torch.equal(runner_by_name(path)(PIXELS)[outputs], runner_by_name(whole)(PIXELS)[outputs])
    embedder = bingo_edge.Embedder(path)
    embeddings, features = embedder.infer(PIXELS.numpy())
    assert np.abs(embeddings - onnx_runner(whole)(PIXELS)[0].numpy()).max() < 1e-6
    assert features.shape == ((5, embedder.dim) if outputs == "features" else (5, 0))
    write_golden(path, embedder.contract, runner_by_name(path))
    assert not any(check.failed for check in bingo_edge.selftest(embedder))
    if outputs == "embedding":
        with pytest.raises(BingoError, match="expected an output features, found embedding; export it with --outputs"):
            onnx_runner(path)


def test_floats_by_channels_are_pixels_less_mean_by_std() -> None:
    told = {"input": {"dtype": "float32", "mean": [10, 20, 30], "std": [2, 4, 5]}}
    pixels = np.zeros((1, 2, 3, 3), np.uint8)
    pixels[0, 1, 2] = (14, 28, 45)
    found = network_input(told, pixels)
    assert found.dtype == np.float32 and found.shape == (1, 3, 2, 3) and found.flags.c_contiguous
    assert found[0, :, 1, 2].tolist() == [2, 2, 3] and found[0, :, 0, 0].tolist() == [-5, -5, -6]


def test_floats_without_a_word_on_how_they_are_meant_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    onnx.save(small([helper.make_node("Identity", ["image"], ["features"])], "features"), path)
    with pytest.raises(BingoError, match="expected a file that `bingo-compress export` writes"):
        onnx_runner(path)
    assert not exported.files(tmp_path) or exported.files(tmp_path) == {"onnx": path}


# ---------------------------------------------------------------- operators


def small(nodes: list[onnx.NodeProto], result: str, *held: onnx.TensorProto) -> onnx.ModelProto:
    """(2, 1, 1, 9) -> the same."""
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 1, 1, 9]) for name in ("image", result))
    made_graph = helper.make_graph(nodes, "small", [given], [made], held)
    return helper.make_model(made_graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def answer(model: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    rows = np.linspace(-7, 7, 18, dtype=np.float32).reshape(2, 1, 1, 9)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.asarray(session.run(None, {"image": rows})[0])


def constant(name: str, value: float) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.array(value, np.float32), name)


@pytest.mark.parametrize("given", [{}, {"alpha": 1 / 6, "beta": 0.5}, {"alpha": 0.3}])
def test_a_hard_sigmoid_is_written_in_three_plain_steps(given: dict[str, float]) -> None:
    model = small([helper.make_node("HardSigmoid", ["image"], ["out"], **given)], "out")
    before = answer(model)
    graph.to_plain(model)
    assert [node.op_type for node in model.graph.node] == ["Mul", "Add", "Clip"]
    assert np.abs(answer(model) - before).max() < 1e-6 and before.min() == 0 and before.max() == 1


@pytest.mark.parametrize("turned", [False, True])
def test_a_gelu_halves_its_input_first(turned: bool) -> None:
    def two(*names: str) -> list[str]:
        return list(reversed(names)) if turned else list(names)

    nodes = [
        helper.make_node("Div", ["image", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", two("erf", "one"), ["sum"]),
        helper.make_node("Mul", two("half", "sum"), ["inner"]),
        helper.make_node("Mul", two("image", "inner"), ["out"]),
    ]
    model = small(nodes, "out", constant("root", 2**0.5), constant("one", 1), constant("half", 0.5))
    before = answer(model)
    graph.to_plain(model)
    assert [node.op_type for node in model.graph.node] == ["Div", "Erf", "Add", "Mul", "Mul"]
    made = {node.output[0]: node for node in model.graph.node}
    assert {made[name].op_type for name in made["out"].input if name in made} == {"Add", "Mul"}
    assert set(made["out_half"].input) == {"image", "half"}
    assert np.abs(answer(model) - before).max() < 1e-6


def test_a_product_that_is_no_gelu_stays() -> None:
    nodes = [
        helper.make_node("Add", ["image", "one"], ["sum"]),
        helper.make_node("Mul", ["half", "sum"], ["inner"]),
        helper.make_node("Mul", ["image", "inner"], ["out"]),
    ]
    model = small(nodes, "out", constant("one", 1), constant("half", 0.5))
    held = model.SerializeToString()
    graph.to_plain(model)
    assert model.SerializeToString() == held


def test_what_no_output_is_made_of_goes_with_it() -> None:
    nodes = [helper.make_node("Mul", ["image", "half"], ["out"]), helper.make_node("Add", ["out", "one"], ["other"])]
    model = small(nodes, "out", constant("half", 0.5), constant("one", 1))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [2, 1, 1, 9]))
    graph.keep_outputs(model, ["out"])
    assert [node.op_type for node in model.graph.node] == ["Mul"]
    assert [one.name for one in model.graph.initializer] == ["half"]
