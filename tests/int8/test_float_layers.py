"""Layers that a rung leaves in float, and what ranges are found on."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bingo_compress.exporters import graph
from bingo_compress.int8 import ladder
from bingo_compress.int8.ladder import Rung
from bingo_compress.models.exported import onnx_runner


def three_layers(path: Path) -> None:
    """Three convolutions of 8 channels; in the second the weights of the channels are far apart."""
    random = np.random.default_rng(0)
    spread = np.geomspace(0.01, 10, 8, dtype=np.float32).reshape(8, 1, 1, 1)
    weights = {
        "first": random.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "second": random.normal(size=(8, 1, 3, 3)).astype(np.float32) * spread,
        "third": random.normal(size=(8, 8, 1, 1)).astype(np.float32) / spread.reshape(1, 8, 1, 1),
    }
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (uint8[1, 16, 16, 3] image) => (float[1, 8] features, float[1, 8] embedding)
        <float[8, 3, 3, 3] first, float[8, 1, 3, 3] second, float[8, 8, 1, 1] third>
        {
            pixels = Transpose <perm = [0, 3, 1, 2]> (image)
            real = Cast <to = 1> (pixels)
            one = Conv (real, first)
            made = Relu (one)
            two = Conv <group = 8> (made, second)
            again = Relu (two)
            three = Conv (again, third)
            features = ReduceMean <axes = [2, 3], keepdims = 0> (three)
            embedding = Identity (features)
        }
    """
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.save(model, path)


@pytest.mark.parametrize(("batch", "shape"), [(1, (1, 16, 16, 3)), (3, (3, 16, 16, 3))])
def test_ranges_are_found_on_one_image_at_a_time_whatever_the_batch(
    batch: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    three_layers(tmp_path / "student.onnx")
    model = onnx.load(tmp_path / "student.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, tmp_path / "student.onnx")
    shown = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reader = ladder._Images(shown, tmp_path / "student.onnx")
    for picture in shown:
        given = reader.get_next()["image"]
        assert given.shape == shape and all((one == picture.numpy()).all() for one in given)
    assert reader.get_next() is None


def test_the_steps_of_a_hard_sigmoid_stay_in_float(tmp_path: Path) -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (uint8[1, 8, 8, 3] image) => (float[1, 4] features, float[1, 4] embedding)
        {
            pixels = Transpose <perm = [0, 3, 1, 2]> (image)
            real = Cast <to = 1> (pixels)
            one = Conv (real, first)
            gate = HardSigmoid <alpha = 0.1666> (one)
            gated = Mul (one, gate)
            two = Conv (gated, second)
            features = ReduceMean <axes = [2, 3], keepdims = 0> (two)
            embedding = Identity (features)
        }
    """
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, shape in (("first", (4, 3, 1, 1)), ("second", (4, 4, 1, 1))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(random.normal(size=shape).astype("f4") / 99, name))
    graph.to_plain(model)
    onnx.save(model, tmp_path / "student.onnx")
    shown = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepared = ladder.prepare(tmp_path / "student.onnx", tmp_path / "prepared.onnx")
    target = tmp_path / "int8.onnx"
    ladder._quantise(tmp_path / "prepared.onnx", target, shown, tmp_path, Rung("first"), ladder._outside(prepared))
    made = onnx.load(target).graph
    kinds = {one.output[0]: one.op_type for one in made.node}
    (clip,) = [node for node in made.node if node.op_type == "Clip"]
    assert kinds[clip.input[0]] == "Add"
    floats = {one.name for one in made.initializer if one.data_type == onnx.TensorProto.FLOAT}
    assert {f"gate_{end}" for end in ("slope", "middle", "least", "most")} <= floats


def test_a_layer_that_is_left_in_float_stays_so_when_onnxruntime_opens_the_file(tmp_path: Path) -> None:
    three_layers(tmp_path / "student.onnx")
    shown = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = ladder.prepare(tmp_path / "student.onnx", tmp_path / "prepared.onnx")

    second = ladder.layers(model, ladder._outside(model))[1]
    assert second[0].endswith("_Conv")
    found = {}
    for name, kept in (("none", ()), ("one", second)):
        file = tmp_path / f"{name}.onnx"
        ladder._quantise(
            tmp_path / "prepared.onnx", file, shown, tmp_path, Rung(name, left=kept), ladder._outside(model)
        )
        for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
            session = onnxruntime.InferenceSession(str(file), options)
            found[name, level] = np.concatenate(
                [session.run(["features"], {"image": one.numpy()})[0] for one in shown.split(1)]
            )
    exact = onnx_runner(tmp_path / "student.onnx")(shown)[1].numpy()
    far = {key: np.abs(rows - exact).max() / np.abs(exact).max() for key, rows in found.items()}
    assert far["one", "ORT_ENABLE_ALL"] < 1.1 * far["one", "ORT_DISABLE_ALL"]
