"""Golden pictures: what is written beside a model, what the device's self-test makes of it, and models whose batch is
fixed.
"""

import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bingo_edge
import numpy as np
import pytest
import torch
from bingo_edge import EdgeError, Embedder, load_image, preprocess, selftest
from bingo_edge import golden as kit
from bingo_edge.model import latency_ms
from edge_models import contract, make_model, plain, run
from PIL import ExifTags, Image

from bingo_compress.errors import BingoError
from bingo_compress.exporters import golden
from bingo_compress.exporters.golden import drawn, write_golden


def runner(model: str) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    embedder = Embedder(model)

    def infer(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        assert batch.dtype == torch.uint8 and batch.shape == (1, 8, 8, 3)
        return {name: torch.from_numpy(rows) for name, rows in embedder.run(batch.numpy()).items()}

    return infer


def make(folder: Path, batch: int | str = "batch", **changes: object) -> tuple[str, Path]:
    """A model, the mean colour of its picture being the feature, and its golden folder."""
    meta = contract(**changes)
    model = make_model(folder / "student.onnx", meta, batch=batch)
    return model, write_golden(Path(model), meta, runner(model))


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    """The pictures take most of the time of writing a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golden, "drawn", functools.cache(drawn))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make(folder)
    return folder


@pytest.fixture
def sound(made: Path, tmp_path: Path) -> tuple[str, Path]:
    """What `make` gives, in this test's own folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return str(tmp_path / "student.onnx"), tmp_path / "student.golden"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    held = json.loads((folder / "golden.json").read_text())
    change(held)
    (folder / "golden.json").write_text(json.dumps(held))


def turned(embedding: list[float], cosine: float) -> list[float]:
    """The unit vector at that cosine to a unit vector."""
    start = np.array(embedding)
    other = np.eye(3)[np.abs(start).argmin()]
    across = other - (other @ start) * start
    return list(cosine * start + np.sqrt(1 - cosine**2) * across / np.linalg.norm(across))


# ---------------------------------------------------------------- the pictures


def test_eight_pictures_each_of_its_kind() -> None:
    files = drawn()
    opened = [Image.open(io.BytesIO(data)) for data in files.values()]
    kinds = [(one.format, one.mode) for one in opened]
    png, jpeg = "PNG", "JPEG"
    expected = [
        (png, "RGB"),
        (jpeg, "RGB"),
        (jpeg, "RGB"),
        (png, "L"),
        (png, "P"),
        (png, "RGBA"),
        (png, "I;16"),
        (jpeg, "CMYK"),
    ]
    assert kinds == expected
    assert opened[0].width > opened[0].height and opened[1].width < opened[1].height
    assert opened[1].info["progressive"]
    assert opened[2].getexif()[ExifTags.Base.Orientation] == 6
    alphas = np.asarray(opened[4].convert("RGBA"))[..., 3]
    assert {0, 128, 255} == set(np.unique(alphas).tolist())
    assert np.unique(np.asarray(opened[6])).size > 1000  # more than eight bits can say
    assert all(100 <= side <= 500 for one in opened for side in one.size)
    assert sum(map(len, files.values())) < 300_000
    assert files == drawn()
    seen = [
        preprocess(load_image(io.BytesIO(data)), size=32, crop_pct=1, interpolation="bicubic").astype(float)
        for data in files.values()
    ]
    for one in seen:
        assert one.std() > 20  # structure
        assert (
            min(np.abs(one - other).mean() for other in (one[::-1], one[:, ::-1], np.rot90(one), np.rot90(one, -1))) > 5
        )
    assert min(np.abs(seen[i] - seen[j]).mean() for i in range(8) for j in range(i)) > 5


def test_the_folder_holds_the_networks_input_and_the_files_own_answers(tmp_path: Path, sound: tuple[str, Path]) -> None:
    model, folder = sound
    assert folder == tmp_path / "student.golden"
    held = json.loads((folder / "golden.json").read_text())
    entries = held.pop("images")
    digest = hashlib.sha256(Path(model).read_bytes()).hexdigest()
    assert held == {"format": 1, "model": "student.onnx", "sha256": digest, "run_id": "run-a", "size": 8}
    assert [entry["file"] for entry in entries] == list(drawn())
    named = {entry[key] for entry in entries for key in ("file", "rgb")} | {"golden.json"}
    assert len(named) == 17 and set(os.listdir(folder)) == named
    for entry in entries:
        raw = (folder / entry["rgb"]).read_bytes()
        pixels = preprocess(load_image(folder / entry["file"]), size=8, crop_pct=0.875, interpolation="bicubic")
        assert raw == pixels.tobytes() and len(raw) == 8 * 8 * 3
        assert hashlib.sha256(raw).hexdigest() == entry["rgb_sha256"]
        assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        mean = pixels.mean(axis=(0, 1))
        np.testing.assert_allclose(entry["embedding"], mean / np.linalg.norm(mean), atol=1e-6)


def test_the_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    model = make_model(tmp_path / "student.onnx")
    infer, calls = runner(model), []

    def stopping(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return infer(batch)

    with pytest.raises(KeyboardInterrupt):
        write_golden(Path(model), contract(), stopping)
    assert os.listdir(tmp_path) == ["student.onnx"]
    folder = write_golden(Path(model), contract(), infer)
    (folder / "old").touch()
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        write_golden(Path(model), contract(), stopping)
    assert (folder / "old").exists() and len(os.listdir(folder)) == 18  # the older one is as it was
    (tmp_path / f".student.golden.{os.getpid()}.tmp").mkdir()  # left by a process that was killed
    write_golden(Path(model), contract(), infer)
    assert len(os.listdir(folder)) == 17 and sorted(os.listdir(tmp_path)) == ["student.golden", "student.onnx"]


def test_an_embedding_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "student.onnx")
    outputs = {"embedding": torch.full((1, 3), torch.nan), "features": torch.ones(1, 3)}
    with pytest.raises(BingoError, match="finite") as caught:
        write_golden(Path(model), contract(), lambda batch: outputs)
    assert caught.value.exit_status == golden.REFUSED == 3
    assert os.listdir(tmp_path) == ["student.onnx"]


# ---------------------------------------------------------------- the self-test


def refused(capfd: pytest.CaptureFixture[str], status: int, *words: object) -> str:
    code, _, err = run(capfd, "selftest", *words)
    assert code == status and err.startswith("error: expected ") and err.count("\n") == 1, (code, err)
    return err


def test_a_sound_model_passes(capfd: pytest.CaptureFixture[str], tmp_path: Path, sound: tuple[str, Path]) -> None:
    model, folder = sound
    checks = selftest(Embedder(model))
    assert bingo_edge.selftest is kit.selftest
    assert [check.file for check in checks] == list(drawn())
    assert all(check[1:3] == ((), 0) and check.cosine > 0.999999 and check.difference < 1e-6 for check in checks)
    code, out, err = run(capfd, "selftest", model, "--threads", 2)
    assert (code, err) == (0, "") and len(out.splitlines()) == 9
    assert out.startswith("1-landscape.png\tok\tpixels differ by 0\tcosine 1.000000\tdifference ")
    assert out.splitlines()[-1].startswith("8 of 8 golden pictures pass")
    folder.rename(tmp_path / "elsewhere")
    assert "no file at" in refused(capfd, 2, model)
    code, out, _ = run(capfd, "selftest", model, "--golden", tmp_path / "elsewhere", "--json")
    document = json.loads(out)
    assert (
        code == 0 and document["passed"] is True and document["min_cosine"] == 0.9999 and len(document["pictures"]) == 8
    )


def test_damaged_files_are_named(capfd: pytest.CaptureFixture[str], sound: tuple[str, Path]) -> None:
    model, folder = sound
    (folder / "2-progressive.jpg").write_bytes((folder / "3-turned.jpg").read_bytes())
    (folder / "4-grey.png").unlink()
    raw = folder / "6-alpha.rgb"
    raw.write_bytes(bytes([raw.read_bytes()[0] ^ 1]) + raw.read_bytes()[1:])
    checks = selftest(Embedder(model))
    assert [check.file[0] for check in checks if check.failed] == ["2", "4", "6"]
    assert {check.failed for check in checks} == {(), ("damaged",)}
    # Its .rgb is whole, so the network is checked all the same.
    assert checks[1].pixel_difference is None and checks[1].cosine is not None
    err = refused(capfd, 3, model)
    assert "expected 8 golden pictures to pass, found 3 that do not (damaged 3); copy the golden folder again" in err


def test_another_decoder_fails_by_pixels_alone(
    capfd: pytest.CaptureFixture[str], sound: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = sound
    real = kit.load_image
    monkeypatch.setattr(kit, "load_image", lambda file: np.minimum(real(file), 254) + 1)
    checks = selftest(Embedder(model))
    assert {check.failed for check in checks} == {("pixels",)}
    assert all(0 < check.pixel_difference <= 2 and check.cosine > 0.999999 for check in checks)
    assert "8 that do not (pixels 8); install the Pillow version" in refused(capfd, 3, model)

    def none(_: object) -> np.ndarray:
        raise bingo_edge.ImageError("no decoder")

    monkeypatch.setattr(kit, "load_image", none)
    assert {check[1:3] for check in selftest(Embedder(model))} == {(("pixels",), None)}


def test_other_features_fail_by_themselves(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, folder = make(tmp_path)
    edit(folder, lambda held: held["images"][1].update(features=[1.001 * v for v in held["images"][1]["features"]]))
    assert [check.failed for check in selftest(Embedder(model))][:3] == [(), ("features",), ()]
    assert "1 that do not (features 1)" in refused(capfd, 3, model)


def test_pictures_of_an_earlier_version_hold_no_features_and_pass(tmp_path: Path) -> None:
    model, folder = make(tmp_path)
    edit(folder, lambda held: [entry.pop("features") for entry in held["images"]])
    assert not any(check.failed for check in selftest(Embedder(model)))


CASES = [  # precision, cosine, whether it passes
    ({}, 1 - 1e-10, True),  # values differ by 1.4e-5
    ({}, 1 - 1e-7, False),  # by 4.5e-4
    ({"precision": "float32"}, 0.995, False),
    ({"precision": "int8"}, 0.995, True),
    ({"precision": "int8"}, 0.985, False),
]


@pytest.mark.parametrize(("precision", "cosine", "passes"), CASES)
def test_an_embedding_must_be_as_near_as_the_precision_allows(
    precision: dict[str, str], cosine: float, passes: bool, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, folder = make(tmp_path, **precision)
    edit(folder, lambda held: held["images"][2].update(embedding=turned(held["images"][2]["embedding"], cosine)))
    checks = selftest(Embedder(model))
    assert checks[2].cosine == pytest.approx(cosine, abs=1e-6)
    assert [check.failed for check in checks if check.failed] == ([] if passes else [("embedding",)])
    if not passes:
        assert "1 that do not (embedding 1); update onnxruntime" in refused(capfd, 3, model)
    code, out, _ = run(capfd, "selftest", model, "--json")
    document = json.loads(out)
    assert (code, document["passed"]) == ((0, True) if passes else (3, False))
    # Whether it passes or not.
    printed = run(capfd, "selftest", model)[1].splitlines()[2].partition("cosine ")[2].split()[0]
    assert float(printed) == pytest.approx(cosine, abs=2e-6)


def test_an_answer_that_is_not_finite_fails(sound: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(sound[0])
    monkeypatch.setattr(
        embedder,
        "run",
        lambda batch: {"embedding": np.full((1, 3), np.nan, np.float32), "features": np.ones((1, 3), np.float32)},
    )
    assert {check[1:] for check in selftest(embedder)} == {(("embedding", "features"), 0, None, None)}


def test_another_models_pictures_are_refused(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, sound: tuple[str, Path]
) -> None:
    _, folder = sound
    other = make_model(tmp_path / "other.onnx", contract(run_id="run-b"))
    assert "golden pictures of the model with sha256" in refused(capfd, 2, other, "--golden", folder)
    assert "no file at" in refused(capfd, 2, other)
    assert "no file at" in refused(capfd, 2, tmp_path / "gone.onnx")


@pytest.mark.parametrize("key", ["file", "rgb"])
def test_a_name_that_could_lead_out_of_the_folder_is_refused(key: str, tmp_path: Path, sound: tuple[str, Path]) -> None:
    folder, embedder = sound[1], Embedder(sound[0])
    (tmp_path / "secret").write_bytes((folder / "4-grey.png").read_bytes())
    for name in (
        "../secret",
        "/etc/passwd",
        "a/b.png",
        "..",
        ".hidden",
        "",
        "a\\b.png",
        "c:x",
        "a\nb",
        "a\0b",
        5,
        None,
    ):
        edit(folder, lambda held, name=name: held["images"][3].update({key: name}))
        with pytest.raises(EdgeError, match="plain file names"):
            selftest(embedder)


MALFORMED: dict[str, Callable[[dict[str, Any]], object]] = {
    "format 2": lambda held: held.update(format=2),
    "KeyError": lambda held: held.pop("images"),
    "TypeError": lambda held: held.update(images=5),
    "'rgb_sha256'": lambda held: held["images"][1].pop("rgb_sha256"),
    "ValueError": lambda held: held["images"][1].update(embedding=["x", "y", "z"]),
    "others": lambda held: held["images"].clear(),
    "of 3 values": lambda held: held["images"][1]["embedding"].append(0.0),
    "length one": lambda held: held["images"][1].update(embedding=[0.5, 0.5, 0.5]),
    "and length": lambda held: held["images"][1].update(embedding=[float("nan"), 0, 1]),
}


@pytest.mark.parametrize("sign", MALFORMED)
def test_a_malformed_golden_json_is_refused(
    sign: str, capfd: pytest.CaptureFixture[str], sound: tuple[str, Path]
) -> None:
    model, folder = sound
    edit(folder, MALFORMED[sign])
    assert sign in refused(capfd, 2, model)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_an_unreadable_golden_json_is_refused(
    text: str, capfd: pytest.CaptureFixture[str], sound: tuple[str, Path]
) -> None:
    model, folder = sound
    (folder / "golden.json").write_bytes(os.fsencode(text))
    assert "a whole golden.json" in refused(capfd, 2, model)


# ---------------------------------------------------------------- a fixed batch


@pytest.mark.parametrize("fixed", [1, 4])
def test_a_fixed_batch_changes_no_number(fixed: int, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    noise = np.random.default_rng(2)
    arrays = [noise.integers(0, 256, (20 + i, 31, 3), np.uint8) for i in range(6)]
    free = Embedder(make_model(tmp_path / "free.onnx"))
    model, _ = make(tmp_path, batch=fixed, onnx={"batch": fixed})
    embedder = Embedder(model)
    assert (free.batch, embedder.batch) == (None, fixed)
    with pytest.raises(EdgeError, match="the network to run"):
        embedder._run(np.zeros((3, 8, 8, 3), np.uint8))  # the graph itself takes nothing else
    expected, got = free.embed(arrays), embedder.embed([*arrays[:5], "gone.png", arrays[5]], batch_size=16)
    np.testing.assert_allclose(got.features, expected.features, rtol=1e-6)
    np.testing.assert_allclose(got.embeddings, expected.embeddings, atol=1e-6)
    assert got.names == ["array 0", "array 1", "array 2", "array 3", "array 4", "array 6"] and len(got.skipped) == 1
    assert max(len(batch.names) for batch in embedder.stream(arrays, batch_size=3)) == fixed
    for count in (0, 1, 5):
        batch = noise.integers(0, 256, (count, 8, 8, 3), np.uint8)
        for one, other in zip(embedder.infer(batch), free.infer(batch), strict=True):
            assert one.shape == (count, 3)
            np.testing.assert_allclose(one, other, rtol=1e-6)
    assert latency_ms(embedder, 2).shape == (2,)
    assert not any(check.failed for check in selftest(embedder))
    red = tmp_path / "red.png"
    Image.fromarray(plain((255, 0, 0))).save(red)
    arrays = {"weight": np.eye(3, dtype="f4"), "bias": np.zeros(3, "f4"), "classes": np.array(["red", "green", "blue"])}
    np.savez(tmp_path / "linear.npz", **arrays, model_sha256=np.array(Embedder(model).sha256))
    code, out, _ = run(capfd, "classify", model, "--head", tmp_path / "linear.npz", red, red, red)
    assert (code, out) == (0, f"{red}\tred\t1.0000\n" * 3)
