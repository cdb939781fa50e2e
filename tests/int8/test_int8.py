"""The int8 ladder and its gate."""

import json
from pathlib import Path
from typing import Any

import bingo_edge
import numpy as np
import onnx
import pytest
import torch
from helpers import encoder, photos, shallow, untrained_run
from torch import nn

from bingo_compress import exporting
from bingo_compress.errors import BingoError
from bingo_compress.exporters.onnx import PROFILES, Deployed, Form, export_onnx, form
from bingo_compress.exporting import Int8, Shape
from bingo_compress.int8 import gate, ladder
from bingo_compress.int8.ladder import LadderEnds, Rung, quantise, sensitivity
from bingo_compress.models.exported import onnx_runner
from bingo_compress.runtime import run_dir

FACTS = {"version": "0", "run_id": "abc", "student": "s", "teacher": "t"}
SIZE = 32


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Noise over colours of their own: unlike plain noise, no two look the same to a random network."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(30, 226, (count, 1, 1, 3), generator=generator)
    return (colours + torch.randint(-30, 30, (count, SIZE, SIZE, 3), generator=generator)).to(torch.uint8)


@pytest.fixture(scope="module", params=["modern", "edge"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Form]:
    path = tmp_path_factory.mktemp(request.param) / "student.onnx"
    export_onnx(encoder("test_efficientnet", SIZE), pictures(8), path, FACTS, PROFILES[request.param])
    return path, PROFILES[request.param]


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "student.onnx"
    export_onnx(encoder("test_efficientnet", SIZE), pictures(8), path, FACTS)
    return path


def passing(_: Path) -> tuple[dict[str, Any], list[str]]:
    return {}, []


def domains(file: Path) -> dict[str, int]:
    return {entry.domain: entry.version for entry in onnx.load(file).opset_import}


# ---------------------------------------------------------------- the form of a file


@pytest.mark.slow
def test_a_profile_is_what_the_file_turns_out_to_be(exported: tuple[Path, Form]) -> None:
    path, wanted = exported
    model = onnx.load(path)
    assert domains(path) == {"": wanted.opset}
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == wanted.batch
    assert not wanted.ir or model.ir_version <= wanted.ir
    assert not {"BatchNormalization", "Gather", "Shape"} & {node.op_type for node in model.graph.node}
    assert json.loads(path.with_suffix(".json").read_text())["onnx"]["batch"] == (wanted.batch or "dynamic")
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.slow
def test_a_fixed_batch_gives_what_a_dynamic_one_gives(exported: tuple[Path, Form]) -> None:
    student, batch = encoder("test_efficientnet", SIZE), pictures(5, seed=3)
    with torch.no_grad():
        expected = Deployed(student)(batch)
    for got, want in zip(onnx_runner(exported[0])(batch), expected, strict=True):
        assert got.shape == want.shape and torch.allclose(got, want, atol=1e-4)
    embedded = bingo_edge.Embedder(exported[0]).embed([picture.numpy() for picture in batch]).embeddings
    assert embedded.shape == expected[0].shape


@pytest.mark.parametrize(
    ("profile", "batch", "opset", "match"),
    [
        ("old", None, None, "--profile: expected modern or edge"),
        ("edge", "0", None, "--batch: expected dynamic or a number"),
        ("edge", "many", None, "--batch: expected dynamic or a number"),
        ("edge", None, 12, "--opset: expected 13"),
        ("edge", None, 99, "--opset: expected 13"),
    ],
)
def test_a_form_that_cannot_be_is_refused(profile: str, batch: str | None, opset: int | None, match: str) -> None:
    with pytest.raises(BingoError, match=match):
        form(profile, batch, opset)


def test_an_input_or_an_output_that_is_not_known_is_refused() -> None:
    with pytest.raises(BingoError, match="--input: expected uint8-nhwc, float32-nchw, float32-nchw-normalised, found"):
        form("edge", None, None, "float16")
    with pytest.raises(BingoError, match="--outputs: expected some of embedding, features, scores, distance with"):
        form("edge", None, None, None, "embedding,logits")


def test_a_profile_may_be_bent() -> None:
    assert form("edge", "dynamic", 18) == Form(18, 8, 0, "float32-nchw", True)
    assert form("modern", "4", None) == Form(PROFILES["modern"].opset, 0, 4)
    assert form("edge", None, None, "uint8-nhwc", "features") == Form(17, 8, 1, "uint8-nhwc", True, ("features",))


# ---------------------------------------------------------------- the ladder


@pytest.mark.slow
def test_the_first_rung_is_taken_where_it_passes(exported: tuple[Path, Form], tmp_path: Path) -> None:
    path, wanted = exported
    file, rung, tried = quantise(path, pictures(6), wanted, tmp_path, passing)
    assert rung == Rung("weights by channel") and len(tried) == 1
    assert domains(file) == {"": wanted.opset}
    assert not wanted.ir or onnx.load(file).ir_version <= wanted.ir
    model = onnx.load(file)
    held = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    weights = [value for value in held.values() if value.dtype == np.int8 and value.ndim == 4]
    assert weights and all(np.abs(value.astype(int)).max() <= 64 for value in weights)  # 7 bits
    assert len(weights) == sum(node.op_type == "Conv" for node in model.graph.node)
    rescaled = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in held]
    # By channel.
    assert all(
        held[node.input[1]].shape == held[node.input[0]].shape[:1] for node in rescaled if held[node.input[0]].ndim == 4
    )
    # Pixels, features and the length of the embedding are worked out in float.
    made = {name: node for node in model.graph.node for name in node.output}
    assert made["features"].op_type != "DequantizeLinear"
    image = next(node for node in model.graph.node if "image" in node.input)
    assert image.op_type != "QuantizeLinear" and made["embedding"].op_type == "Div"


@pytest.mark.slow
def test_rungs_come_in_their_order_and_the_ladder_ends(float_file: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def failing(file: Path) -> tuple[dict[str, Any], list[str]]:
        model = onnx.load(file)
        seen.append(sum(node.op_type == "QuantizeLinear" for node in model.graph.node))
        return {"recall": 0.1}, ["recall 0.1 (at least 0.9)"]

    with pytest.raises(LadderEnds, match=r"misses recall 0\.1") as caught:
        quantise(float_file, pictures(6), PROFILES["modern"], tmp_path, failing, "tuned, ")
    assert caught.value.exit_status == 3
    names = [row["rung"] for row in caught.value.tried]
    assert names == [
        "tuned, weights by channel",
        "tuned, ranges of 99.99%",
        *(f"tuned, {count} layer{'s' if count > 1 else ''} in float" for count in ladder.LEFT_IN_FLOAT),
        "tuned, activations of 16 bits",
    ]
    assert seen[2:7] == sorted(seen[2:7], reverse=True) and seen[6] < seen[1]  # fewer and fewer are rounded
    types = {one.data_type for one in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert onnx.TensorProto.UINT16 in types


@pytest.mark.slow
def test_a_layer_that_rounding_harms_is_found(tmp_path: Path) -> None:
    student = encoder("test_resnet", SIZE)
    block = student.backbone.layer2[0]
    for name, value in student.backbone.named_parameters():
        if "bn" in name and "weight" in name:
            nn.init.ones_(value)  # the last of a block begins at zero, which hides the block

    def ratios() -> tuple[dict[tuple[str, ...], float], onnx.ModelProto]:
        export_onnx(student, pictures(8), tmp_path / "student.onnx", FACTS)
        model = onnx.load(tmp_path / "student.onnx")
        found = sensitivity(tmp_path / "student.onnx", pictures(8), tmp_path, ladder._outside(model))
        assert [ratio for _, ratio in found] == sorted(ratio for _, ratio in found)
        for cache in tmp_path.glob("percentile*"):
            cache.unlink()
        return dict(found), model

    before, _ = ratios()
    # The same function, but one channel between the two convolutions is so wide that the others vanish in its steps.
    with torch.no_grad():
        for value in (block.bn1.weight, block.bn1.bias):
            value[0] *= 3000
        block.conv2.weight[:, 0] /= 3000
    after, model = ratios()
    assert set(after) == set(before) and len(after) > 10
    worst = max(after, key=lambda name: before[name] - after[name])
    weights = {node.name: node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    shape = {one.name: tuple(one.dims) for one in model.graph.initializer}
    assert before[worst] - after[worst] > 6 and shape[weights[worst[0]]] in (
        tuple(block.conv1.weight.shape),
        tuple(block.conv2.weight.shape),
    )


@pytest.mark.slow
def test_what_is_left_in_float_is_not_rounded(float_file: Path, tmp_path: Path) -> None:
    """The products of a squeeze-and-excite block are neighbours of convolutions that stay rounded; each layer goes with
    what follows it.
    """
    model = onnx.load(float_file)
    parts = ladder.layers(model, set())
    kinds = {node.name: node.op_type for node in model.graph.node}
    assert [kinds[part[0]] for part in parts] == [
        node.op_type for node in model.graph.node if node.op_type in ladder.LAYERS
    ]
    assert all(kinds[name] not in ladder.LAYERS for part in parts for name in part[1:])
    everything = tuple(name for part in parts for name in part)
    shown, outside = pictures(6), ladder._outside(model)
    files = {"none": (), "one": parts[3], "all": everything}
    for name, left in files.items():
        ladder._quantise(float_file, tmp_path / f"{name}.onnx", shown, tmp_path, Rung(name, left=left), outside)
    exact = onnx_runner(float_file)(shown)[0]
    far = [float((onnx_runner(tmp_path / f"{name}.onnx")(shown)[0] - exact).norm()) for name in files]
    assert far[0] != far[1] and far[2] < 1e-5 < far[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "profile"), [("mobilenetv3_small_050", "modern"), ("mobilenetv4_conv_small", "edge")])
def test_features_after_pooling_and_a_last_layer_are_neither_rounded_nor_changed(
    name: str, profile: str, tmp_path: Path
) -> None:
    """One ends with Hardswish, whose parts onnxruntime leaves without names; the other with a ReLU, which it takes away
    where a rounding does its work.
    """
    student = shallow(encoder(name, SIZE))
    torch.manual_seed(0)
    for module in student.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)  # without, a random network's features are near zero
    float_file, prepared = tmp_path / "student.onnx", tmp_path / "prepared.onnx"
    export_onnx(student, pictures(8), float_file, FACTS, PROFILES[profile])
    model = ladder.prepare(float_file, prepared)
    onnx.checker.check_model(model, full_check=True)
    assert "Gemm" in {node.op_type for node in model.graph.node}  # the last convolution
    for got, wanted in zip(onnx_runner(prepared)(pictures(8)), onnx_runner(float_file)(pictures(8)), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    names = [node.name for node in model.graph.node]
    assert all(names) and len(set(names)) == len(names)
    ladder._quantise(prepared, tmp_path / "int8.onnx", pictures(8), tmp_path, Rung("first"), ladder._outside(model))
    made = {made: node for node in onnx.load(tmp_path / "int8.onnx").graph.node for made in node.output}
    assert made["features"].op_type != "DequantizeLinear"
    exact, found = onnx_runner(float_file)(pictures(8))[1], onnx_runner(tmp_path / "int8.onnx")(pictures(8))[1]
    assert float(torch.cosine_similarity(exact, found).min()) > 0.9
    assert len(found.unique()) > 1000  # 8 bits would be 256 values
    assert float(found.min()) >= float(exact.min()) - 0.05 * float(exact.abs().max())


def test_features_that_a_layer_gives_directly_are_not_rounded(tmp_path: Path) -> None:
    """onnxruntime gives what a rounded result was another name."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        g (uint8[N, 4, 4, 3] image) => (float[N, 12] features, float[N, 12] embedding)
        <int64[2] flat = {0, -1}, int64[1] last = {-1}> {
            pixels = Cast<to = 1>(image)
            row = Reshape(pixels, flat)
            features = MatMul(row, weight)
            norm = ReduceL2(features, last)
            embedding = Div(features, norm)
        }""")
    weight = np.random.default_rng(0).normal(size=(48, 12)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    onnx.save(model, tmp_path / "student.onnx")
    shown = torch.randint(0, 256, (8, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    outside = ladder._outside(ladder.prepare(tmp_path / "student.onnx", tmp_path / "prepared.onnx"))
    ladder._quantise(tmp_path / "prepared.onnx", tmp_path / "int8.onnx", shown, tmp_path, Rung("first"), outside)
    nodes = onnx.load(tmp_path / "int8.onnx").graph.node
    assert {made: node.op_type for node in nodes for made in node.output}["features"] == "MatMul"
    assert any(node.op_type == "QuantizeLinear" for node in nodes)


# ---------------------------------------------------------------- the gate


def judged(float_file: Path, other: Path, gallery: torch.Tensor, **labels: Any) -> tuple[dict[str, Any], list[str]]:
    student = encoder("test_efficientnet", SIZE)
    folders = gate.open_labelled(labels["labels"], labels["test"]) if labels else None
    judges = gate.make_gate(float_file, gallery, student.preprocessing, folders, labels.get("max_loss", 0.5))
    told, missed = judges.choose(other)
    reported, under = judges.report(other)
    assert {*told} & {"knn", "linear"} == {*reported} & {"knn", "linear"}
    return told | reported, missed or under


@pytest.mark.slow
def test_a_file_is_itself(float_file: Path) -> None:
    told, missed = judged(float_file, float_file, pictures(40, seed=5))
    assert missed == [] and told["mean_cosine"] == pytest.approx(1) and told["recall"] == 1.0
    assert (told["images"], told["recall_k"], told["recall_chance"]) == (40, 3, pytest.approx(3 / 39))
    assert "recall" not in judged(float_file, float_file, pictures(10, seed=5))[0]  # too few to judge neighbours by


@pytest.mark.slow
def test_other_weights_are_below_the_gate_and_so_are_no_numbers(
    float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_onnx(encoder("test_efficientnet", SIZE, seed=9), pictures(8), tmp_path / "other.onnx", FACTS)
    told, missed = judged(float_file, tmp_path / "other.onnx", pictures(40, seed=5))
    assert told["mean_cosine"] < 0.9 and missed[0].startswith("mean cosine 0.")
    real = gate.cosine_similarity
    monkeypatch.setattr(gate, "cosine_similarity", lambda one, two: real(one, two) * float("nan"))
    assert "mean cosine nan" in judged(float_file, float_file, pictures(40, seed=5))[1][0]


@pytest.mark.slow
def test_with_labels_lost_points_count(float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, test = photos(tmp_path / "bank", 6), photos(tmp_path / "test", 4, start=50)
    told, missed = judged(float_file, float_file, pictures(24), labels=bank, test=test)
    assert (
        missed == []
        and told["knn"]["float"] == told["knn"]["int8"]
        and told["linear"]["float"] == told["linear"]["int8"]
    )
    export_onnx(encoder("test_efficientnet", SIZE, seed=9), pictures(8), tmp_path / "other.onnx", FACTS)
    monkeypatch.setattr(gate, "LEAST_COSINE", -1.0)
    monkeypatch.setattr(gate, "LEAST_WORST", -1.0)
    monkeypatch.setattr(gate, "LEAST_RECALL", 0.0)
    told, missed = judged(float_file, tmp_path / "other.onnx", pictures(24), labels=bank, test=test)
    lost = 100 * (told["linear"]["float"] - told["linear"]["int8"])
    assert lost > 10 and any(f"linear accuracy {lost:.2f} points below" in line for line in missed)
    assert judged(float_file, tmp_path / "other.onnx", pictures(24), labels=bank, test=test, max_loss=100)[1] == []


# ---------------------------------------------------------------- a run


@pytest.fixture
def finished(tmp_path: Path) -> run_dir.RunDir:
    """A finished run of an untrained student, and its photos."""
    return untrained_run(tmp_path, 12)


@pytest.mark.slow
def test_all_formats_leave_files_that_the_device_kit_checks_itself_against(
    finished: run_dir.RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "LEAST_RECALL", 0.3)  # an untrained student's neighbours are close to ties
    files = exporting.export(finished.path, fmt="all", shape=Shape("edge"))
    assert [file.name for file in files] == ["student.onnx", "student-fp16.onnx", "student-int8.onnx"]
    contract = json.loads(files[2].with_suffix(".json").read_text())
    assert contract["precision"] == "int8" and contract["int8"]["gate"]["images"] == 24
    assert contract["bytes"] == files[2].stat().st_size < 0.7 * files[0].stat().st_size
    assert bingo_edge.Embedder(files[2]).contract["int8"] == contract["int8"]
    from bingo_edge.cli import main

    for file in files:
        assert main(["selftest", str(file)]) == 0
    card = (finished.export / "MODEL_CARD.md").read_text()
    assert "student-int8.onnx" in card and "weights by channel" in card.replace("\\", "")
    assert not [path for path in finished.export.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_an_int8_file_below_the_gate_is_not_published(
    finished: run_dir.RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "LEAST_COSINE", 1.1)
    monkeypatch.setattr(ladder, "LEFT_IN_FLOAT", ())
    with pytest.raises(BingoError, match=r"export refused, no int8 file written: 3 ways .*--finetune") as caught:
        exporting.export(finished.path, fmt="onnx-int8")
    assert caught.value.exit_status == 3 and list(finished.export.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fmt": "onnx-int4"}, "--format: expected onnx, onnx-fp16, onnx-int8, all"),
        ({"int8": Int8(finetune=True)}, "--finetune: expected --format onnx-int8 or all"),
        ({"int8": Int8(max_loss=2.0)}, "--max-loss: expected --labels and --format onnx-int8 or all"),
        ({"fmt": "onnx-int8", "int8": Int8(max_loss=2.0)}, "found onnx-int8 and no labels"),
        ({"int8": Int8(Path("x"))}, "--labels: expected --format"),
        ({"fmt": "all", "int8": Int8(test=Path("x"))}, "--test: expected --labels"),
    ],
)
def test_what_makes_no_sense_together_is_refused_before_anything(
    finished: run_dir.RunDir, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(BingoError, match=match):
        exporting.export(finished.path, **settings)
