"""What is exported is what was distilled: against torch, through the device's own kit; and what is refused leaves
nothing behind.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import bingo_edge
import numpy as np
import onnx
import pytest
import torch
from helpers import CPU, encoder, photo, photos, shallow, untrained_run
from PIL import Image

from bingo_compress import exporting, validation
from bingo_compress.data import image_list, listing
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import probes
from bingo_compress.evaluation.scores import Sides
from bingo_compress.exporters import onnx as exporter
from bingo_compress.exporters.onnx import Deployed, export_onnx
from bingo_compress.features import extract
from bingo_compress.models import trained
from bingo_compress.recipe import load_recipe
from bingo_compress.runtime import run_dir

FACTS = {"version": "0", "run_id": "abc", "student": "s", "teacher": "t"}


def pictures(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The smallest student as a file, and the student."""
    path = tmp_path_factory.mktemp("exported") / "student.onnx"
    student = encoder("test_efficientnet", 32)
    export_onnx(student, pictures(5, 32), path, FACTS)
    return path, student


def without_metadata(path: Path, copy: Path) -> None:
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, copy)


@pytest.fixture
def quick(exported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing a graph takes seconds: give the one that was written before, of the weights of `exported`."""
    monkeypatch.setattr(
        exporter, "_write_graph", lambda module, shown, path, wanted: without_metadata(exported[0], path)
    )


# ---------------------------------------------------------------- equal


MODELS = [
    pytest.param("test_resnet", 32, marks=pytest.mark.slow),
    pytest.param("mobilenetv3_small_050", 64, marks=pytest.mark.slow),  # a convolution after pooling
    pytest.param("repvit_m0_9", 64, marks=pytest.mark.slow),  # reparameterised
]


@pytest.mark.parametrize(("name", "size"), MODELS)
def test_the_file_equals_torch_through_the_device_kit(name: str, size: int, tmp_path: Path) -> None:
    student = encoder(name, size) if name == "test_resnet" else shallow(encoder(name, size))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    path = tmp_path / "student.onnx"
    export_onnx(student, pictures(3, size), path, {**FACTS, "student": name})
    embedder = bingo_edge.Embedder(path)
    assert embedder.dim == student.width
    for count in (1, 5):  # the batch is dynamic; these are not the pictures that the export checked
        batch = pictures(count, size, seed=count)
        with torch.no_grad():
            embedding, features = Deployed(student)(batch)
        got = embedder.infer(batch.numpy())
        assert got[0].shape == got[1].shape == (count, student.width)
        assert np.abs(got[0] - embedding.numpy()).max() < 1e-4
        assert np.abs(got[1] - features.numpy()).max() < 1e-4 * float(features.abs().max())
        assert np.linalg.norm(got[0], axis=1) == pytest.approx(1, abs=1e-5)
    # Fusing was done on a copy.
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_deployed_is_the_encoder_with_its_own_normalisation() -> None:
    student = encoder("test_resnet", 32)
    batch = pictures(2, 32)
    scaled = (batch.numpy() / 255 - np.array(student.preprocessing.mean)) / np.array(student.preprocessing.std)
    with torch.no_grad():
        embedding, features = Deployed(student)(batch)
        expected = student.backbone(torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float())
    assert torch.allclose(features, expected, atol=1e-4 * float(expected.abs().max()))
    assert torch.allclose(embedding, expected / expected.norm(dim=1, keepdim=True), atol=1e-5)


@pytest.mark.slow
def test_the_graph_takes_uint8_of_any_batch_at_opset_21(exported: tuple[Path, Any]) -> None:
    model = onnx.load(exported[0])
    (image,) = model.graph.input
    assert image.name == "image"
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_value for dim in image.type.tensor_type.shape.dim] == [0, 32, 32, 3]
    assert [output.name for output in model.graph.output] == ["embedding", "features"]
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 21
    assert [path.name for path in sorted(exported[0].parent.iterdir())] == ["student.json", "student.onnx"]


@pytest.mark.slow
def test_the_metadata_is_student_json_without_its_digest_and_size(exported: tuple[Path, Any]) -> None:
    path, student = exported
    contract = json.loads(path.with_suffix(".json").read_text())
    inside = {entry.key: entry.value for entry in onnx.load(path).metadata_props}["bingo_compress"]
    assert contract.pop("sha256") == hashlib.sha256(path.read_bytes()).hexdigest()
    assert contract.pop("bytes") == path.stat().st_size  # of the file with its metadata
    assert json.loads(inside) == contract == bingo_edge.Embedder(path).contract
    assert {key: contract[key] for key in FACTS} == FACTS
    assert contract["embedding_dim"] == student.width
    assert contract["input"]["size"] == 32 and contract["input"]["dtype"] == "uint8"
    assert contract["onnx"]["opset"] == 21
    assert contract["parity"]["images"] == 5
    assert contract["parity"]["max_difference"] <= 1e-4 and contract["parity"]["min_cosine"] >= 0.9999
    assert {**contract["preprocess"], "size": 32} == student.preprocessing.geometry()
    assert contract["normalization"]["mean"] == pytest.approx(student.preprocessing.mean)


# ---------------------------------------------------------------- refused


def refused(path: Path, student: Any = None) -> BingoError:
    with pytest.raises(BingoError, match="export refused") as caught:
        export_onnx(student or encoder("test_efficientnet", 32), pictures(3, 32), path, FACTS)
    assert caught.value.exit_status == 3
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_file_that_differs_is_refused_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "MAX_DIFFERENCE", 0.0)
    assert "3 of your images" in str(refused(tmp_path / "export" / "student.onnx"))
    assert list((tmp_path / "export").iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_refused_export_leaves_an_earlier_good_file_alone(
    exported: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("student.onnx", "student.json"):
        (tmp_path / name).write_bytes((exported[0].parent / name).read_bytes())
    monkeypatch.setattr(exporter, "MIN_COSINE", 1.1)
    refused(tmp_path / "student.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.json", "student.onnx"]
    for name in ("student.onnx", "student.json"):
        assert (tmp_path / name).read_bytes() == (exported[0].parent / name).read_bytes()
    bingo_edge.Embedder(tmp_path / "student.onnx")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("change", ["other weights", "not numbers"])
def test_a_graph_that_is_not_the_student_is_refused(change: str, tmp_path: Path) -> None:
    student = encoder("test_efficientnet", 32, seed=1 if change == "other weights" else 0)
    if change == "not numbers":
        with torch.no_grad():
            next(student.parameters()).view(-1)[0] = float("nan")
    refused(tmp_path / "student.onnx", student)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_same_graph_passes_so_the_refusals_are_not_for_its_being_copied(tmp_path: Path) -> None:
    export_onnx(encoder("test_efficientnet", 32), pictures(3, 32), tmp_path / "student.onnx", FACTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.json", "student.onnx"]


@pytest.mark.slow
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    student = encoder("test_efficientnet", 32)
    with torch.no_grad():
        next(student.parameters()).view(-1)[0] = float("nan")
    refused(tmp_path / "student.onnx", student)
    assert list(tmp_path.iterdir()) == []


def test_a_student_that_torch_cannot_export_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator\nwith\nmany lines")

    monkeypatch.setattr(torch.onnx, "export", failing)
    assert "no such operator" in str(refused(tmp_path / "student.onnx"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_fixed_batch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.onnx.export

    def fixed(*arguments: Any, **settings: Any) -> Any:
        return real(*arguments, **{**settings, "dynamic_shapes": None})

    monkeypatch.setattr(torch.onnx, "export", fixed)
    assert "dynamic batch" in str(refused(tmp_path / "student.onnx"))


# ---------------------------------------------------------------- a run


@pytest.fixture
def finished(tmp_path: Path) -> run_dir.RunDir:
    """A finished run of an untrained student, and its photos."""
    return untrained_run(tmp_path, 3)


@pytest.mark.slow
def test_a_run_is_exported_and_its_file_embeds_its_photos_as_torch_does(
    finished: run_dir.RunDir, tmp_path: Path
) -> None:
    (path,) = exporting.export(finished.path, tmp_path / "elsewhere")
    assert path == tmp_path / "elsewhere" / "student.onnx"
    settings = load_recipe(finished.as_run)
    student = trained.load_student(settings, finished.student)
    folder = listing.list_images(Path(settings.data))
    expected = extract.plain({"s": extract.as_embed(student, CPU)}, folder, range(9), "test")[0]["s"]
    got = bingo_edge.Embedder(path).embed(settings.data)
    assert [str(Path(name).relative_to(settings.data)) for name in got.names] == list(folder.files)
    assert np.abs(got.embeddings - probes.normalised(expected).numpy()).max() < 1e-4
    assert not finished.export.exists()


def test_an_unfinished_run_or_no_run_is_not_exported(finished: run_dir.RunDir, tmp_path: Path) -> None:
    finished.student.unlink()
    with pytest.raises(BingoError, match="unfinished"):
        exporting.export(finished.path)
    with pytest.raises(BingoError, match=r"no recipe\.yaml"):
        exporting.export(tmp_path / "photos")


# ---------------------------------------------------------------- the same pixels on both sides


def golden(folder: Path) -> list[Path]:
    """Non-square, EXIF-rotated, greyscale, palette (with and without transparency) and 16-bit pictures."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rgb = Image.fromarray(photo(2, 0, 53, 91))
    exif = Image.Exif()
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "wide.png": (rgb, {}),
        "tall.jpg": (Image.fromarray(random.integers(0, 256, (120, 33, 3), np.uint8)), {"quality": 95}),
        "grey.png": (rgb.convert("L"), {}),
        "palette.png": (rgb.convert("P", palette=Image.Palette.ADAPTIVE), {}),
        "palette-transparent.gif": (rgb.convert("P", palette=Image.Palette.ADAPTIVE), {"transparency": 0}),
        "alpha.png": (Image.fromarray(random.integers(0, 256, (40, 40, 4), np.uint8)), {}),
        "sixteen.png": (Image.fromarray(random.integers(0, 65536, (44, 70)).astype(np.uint16)), {}),
    }
    for turn in (3, 6, 8):
        exif[0x0112] = turn
        made[f"turned{turn}.jpg"] = (rgb, {"exif": exif.tobytes(), "quality": 95})
    for name, (image, settings) in made.items():
        image.save(folder / name, **settings)
    return sorted(folder / name for name in made)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("test_efficientnet", 32), ("mobilenetv3_small_050", 96), ("test_resnet", 40)]
)
def test_golden_pictures_reach_the_network_the_same_in_the_trainer_and_on_the_device(
    name: str, size: int, exported: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = golden(tmp_path / "golden")
    settings = encoder(name, size).preprocessing
    folder = listing.list_images(tmp_path / "golden")
    trained: list[np.ndarray] = []

    def record(batch: torch.Tensor) -> torch.Tensor:
        trained.extend(batch.numpy())
        return torch.zeros(len(batch), 2)

    extract.plain({"m": (settings, record)}, folder, range(len(files)), "test")
    assert np.array_equal(extract.pixels_of(settings, folder, range(len(files)), len(files)).numpy(), np.stack(trained))

    device: list[np.ndarray] = []
    embedder = bingo_edge.Embedder(exported[0])
    geometry = {key: value for key, value in settings.geometry().items() if key != "size"}
    embedder.contract = {
        **embedder.contract,
        "preprocess": geometry,
        "input": {**embedder.contract["input"], "size": size},
    }

    def run(batch: np.ndarray) -> dict[str, np.ndarray]:
        device.extend(batch)
        return {name: np.ones((len(batch), embedder.dim), np.float32) for name in ("embedding", "features")}

    monkeypatch.setattr(embedder, "run", run)
    names = embedder.embed(str(tmp_path / "golden"), batch_size=4).names
    assert [Path(path).name for path in names] == [path.name for path in files]
    assert len(trained) == len(device) == 10
    for path, one, other in zip(files, trained, device, strict=True):
        assert one.shape == (size, size, 3) and one.std() > 1, path.name
        assert np.array_equal(one, other), path.name
    # Turned clockwise as the EXIF says, JPEG's losses apart; wide.png holds the same picture upright.
    by_name = dict(zip([path.name for path in files], trained, strict=True))
    turned, upright = by_name["turned6.jpg"].astype(int), by_name["wide.png"].astype(int)
    assert np.abs(np.rot90(upright, -1) - turned).mean() < 0.5 * np.abs(upright - turned).mean()


@pytest.mark.slow
def test_the_kit_classifies_as_the_probes_do(exported: tuple[Path, Any], tmp_path: Path) -> None:
    path, student = exported
    folder = listing.list_images(photos(tmp_path / "photos", 12))
    classes, named_as = image_list.labels_of(folder)
    labels, places = torch.tensor(named_as), list(range(36))
    features = extract.plain({"s": extract.as_embed(student, CPU)}, folder, places, "test")[0]["s"]
    head = probes.fit_linear(features, labels, 3)
    embedder = bingo_edge.Embedder(path)
    sides = Sides(classes, {"s": features}, labels, folder, places, {}, labels[:0], folder, [])
    validation.save_heads(tmp_path / "student.onnx", embedder.sha256, head, "s", sides)
    queries = photos(tmp_path / "queries", 5, start=100)
    got = embedder.embed(str(queries))
    asked = extract.plain({"s": extract.as_embed(student, CPU)}, listing.list_images(queries), range(15), "test")[0][
        "s"
    ]
    expected = {
        "student.linear.npz": head.predict(asked),
        "student.bank.npz": probes.knn_predict(features, labels, asked, 3),
    }
    for file, indices in expected.items():
        named, shares = bingo_edge.classify(
            bingo_edge.load_head(tmp_path / file, embedder), got.embeddings, got.features
        )
        assert named.tolist() == [classes[index] for index in indices.tolist()]
        assert len(set(named.tolist())) > 1
        if file == "student.linear.npz":
            heat = float(np.load(tmp_path / file)["temperature"])
            assert shares == pytest.approx((head.logits(asked) / heat).softmax(1).numpy(), abs=1e-3)


@pytest.mark.parametrize(("norms", "told"), [([0.5, 200.0], False), ([0.5, 300.0], True), ([1e-4, 2.0], True)])
def test_lengths_that_half_precision_cannot_square_are_told(
    norms: list[float], told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Any
) -> None:
    parity = {"images": 256, "max_difference": 0.0, "min_cosine": 1.0, "feature_norms": norms}
    monkeypatch.setattr(exporting, "export_onnx", lambda *_: {"parity": parity})
    wanted = exporter.form("edge", None, None)
    exporting._export_float(encoder("test_resnet", 32), pictures(2, 32), tmp_path / "x.onnx", FACTS, wanted)
    assert ("not for half precision: the features of your images have lengths of" in printed.getvalue()) == told
