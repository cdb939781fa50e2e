"""The C++ example against the Python kit: the same pixels bit for bit, and the same embeddings."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bingo_edge import Embedder
from bingo_edge.heads import named
from bingo_edge.image import load_image, preprocess_from
from edge_models import headed
from helpers import RULES, SHAPES, encoder
from PIL import Image

from bingo_compress.exporters.onnx import export_onnx, form

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[2] / "export" / "cpp"
SIZE = 96
FACTS = {"version": "0", "run_id": "abc", "student": "s", "teacher": "t"}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built example. Only what the machine lacks is skipped: with ONNXRUNTIME_ROOT set, a failure to configure is a
    failure.
    """
    root = os.environ.get("ONNXRUNTIME_ROOT")
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    build = tmp_path_factory.mktemp("build")
    configure = ["cmake", "-S", str(SOURCE), "-B", str(build), "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"]
    done = subprocess.run([*configure, f"-DONNXRUNTIME_ROOT={root or ''}"], capture_output=True, text=True)
    if done.returncode and not root and "CMakeLists.txt" in done.stderr:
        pytest.skip("needs onnxruntime's headers and library, and nlohmann-json: set ONNXRUNTIME_ROOT")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", str(build)], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    return build / "embed"


@pytest.fixture(scope="module", params=["uint8-nhwc", "float32-nchw-normalised"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "student.onnx"
    images = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = form("modern", None, None, request.param)
    export_onnx(encoder("mobilenetv3_small_050", SIZE), images, path, FACTS, wanted)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Noise, which shows any wrong weight, as PPM."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for width, height in SHAPES:
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{width}x{height}.ppm")
    return sorted(map(str, folder.iterdir()))


def changed(model: Path, copy: Path, **changes: Any) -> Path:
    """The same graph under another contract."""
    made = onnx.load(model)
    entry = next(entry for entry in made.metadata_props if entry.key == "bingo_compress")
    entry.value = json.dumps({**json.loads(entry.value), **changes})
    onnx.save(made, copy)
    return copy


def run(program: Path, *words: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([program, *map(str, words)], capture_output=True)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
def test_the_pixels_are_those_of_the_python_kit(
    program: Path, model: Path, pictures: list[str], rule: dict[str, Any], tmp_path: Path
) -> None:
    path = changed(model, tmp_path / "student.onnx", preprocess=rule)
    contract = Embedder(path).contract
    done = run(program, "--pixels", path, *pictures)
    assert done.returncode == 0, done.stderr
    found = np.frombuffer(done.stdout, np.uint8).reshape(len(pictures), SIZE, SIZE, 3)
    for picture, pixels in zip(pictures, found, strict=True):
        assert np.array_equal(pixels, preprocess_from(contract, load_image(picture))), picture


def test_the_embeddings_are_those_of_the_python_kit(
    program: Path, model: Path, pictures: list[str], tmp_path: Path
) -> None:
    embedder = Embedder(model)
    expected = embedder.embed(pictures).embeddings
    ready = tmp_path / "ready.rgb"
    ready.write_bytes(preprocess_from(embedder.contract, load_image(pictures[0])).tobytes())
    done = run(program, model, *pictures, ready)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert [row[0] for row in rows] == [*pictures, str(ready)]
    found = np.array([row[1:] for row in rows], np.float32)
    assert np.abs(found - np.vstack([expected, expected[:1]])).max() <= 1e-5
    assert np.abs(expected[0] - expected[-1]).max() > 1e-3  # the pictures do differ


@pytest.mark.parametrize("threshold", [None, "between"])
def test_the_classes_are_those_of_the_python_kit(
    threshold: str | None, program: Path, model: Path, pictures: list[str], tmp_path: Path
) -> None:
    path, embedder = headed(model, tmp_path / "headed.onnx", pictures, between=threshold is not None)
    expected = named(embedder, embedder.embed(pictures))
    done = run(program, "--classes", path, *pictures)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert [row[0] for row in rows] == pictures
    assert [row[1] for row in rows] == [one.label if one.known else "none of these" for one in expected]
    assert np.allclose([float(row[2]) for row in rows], [one.probability for one in expected], atol=1e-5)
    assert {one.known for one in expected} == ({True} if threshold is None else {True, False})
    assert {len(row) for row in rows} == {3 if threshold is None else 4}
    assert run(program, "--classes", model, pictures[0]).returncode == 2  # no classes in it


def test_what_cannot_be_used_is_one_line(program: Path, model: Path, pictures: list[str], tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    commented = write("commented.ppm", b"P6 # a comment\n2\n# another 9\n1 255\n" + bytes(6))
    assert run(program, model, commented).returncode == 0
    box = changed(model, tmp_path / "box.onnx", preprocess={"crop_pct": 1.0, "interpolation": "box"})
    later = changed(model, tmp_path / "later.onnx", format=2)
    bad = [
        (model, tmp_path / "gone.ppm"),
        (model, write("text.ppm", b"P3\n1 1\n255\n0 0 0\n")),
        (model, write("wide.ppm", b"P6\n1 1\n65535\n" + bytes(6))),
        (model, write("empty.ppm", b"")),
        (model, write("header.ppm", b"P6\n5")),
        (model, write("huge.ppm", b"P6\n999999999 999999999\n255\n" + bytes(6))),
        (model, write("short.ppm", b"P6\n2 2\n255\n" + bytes(11))),
        (model, write("short.rgb", bytes(11))),
        (tmp_path / "gone.onnx", pictures[0]),
        (write("junk.onnx", b"junk"), pictures[0]),
        (box, pictures[0]),
        (later, pictures[0]),
    ]
    for words in bad:
        done = run(program, *words)
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1), (words, done)
        assert done.stderr.startswith(b"error: "), done.stderr
    assert run(program).returncode == 2
