"""The float file as another runtime's own: made by its toolchain, proven against the float file, never half there."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import encoder, untrained_run

from bingo_compress import BingoError, converting, export
from bingo_compress.exporters.onnx import PROFILES, export_onnx
from bingo_compress.models import exported
from bingo_compress.toolchains import child
from bingo_compress.toolchains.place import Place

# A Python whose openvino leaves a file and answers as onnxruntime does, but for what `does` changes.
FAKE = """#!{python}
import json, os, sys
import numpy as np, onnxruntime
from pathlib import Path
folder = Path(sys.argv[-1])
if not folder.is_dir():
    print(json.dumps({{"version": "7.8"}}))
    sys.exit()
job, batches = json.loads((folder / "job.json").read_text()), np.load(folder / "batches.npy")
assert job["keep"]
session = onnxruntime.InferenceSession(job["file"])
rows = [session.run(job["outputs"], {{job["input"]: batch}}) for batch in batches]
found = {{name: np.stack([row[at] for row in rows]) for at, name in enumerate(job["outputs"])}}
os.makedirs("converted")
Path("converted/student.xml").write_text("a network")
{does}
np.savez(folder / "outputs.npz", **found)
"""


def fake(path: Path, does: str = "") -> str:
    path.write_text(FAKE.format(python=sys.executable, does=does))
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "student.onnx"
    export_onnx(encoder("test_efficientnet", 32), pictures(), path, {}, PROFILES["edge"])
    return path


def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_what_openvino_makes_lies_beside_with_contract_golden_pictures_and_card(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    run = untrained_run(tmp_path, 2)
    made = export(run=run.path, profile="edge", format="openvino", progress=False)
    xml = run.export / "openvino" / "student.xml"
    assert made.files == (run.export / "student.onnx", xml)
    told = json.loads(xml.with_suffix(".json").read_text())
    exact = exported.contract(run.export / "student.onnx")
    assert told["converted"]["float_sha256"] == exact["sha256"] and set(told["files"]) == {"student.xml", "student.bin"}
    assert told["parity"]["min_cosine"] > 0.9999 and told["input"] == exact["input"]
    golden = json.loads((xml.with_suffix(".golden") / "golden.json").read_text())
    own = json.loads((run.export / "student.golden" / "golden.json").read_text())
    for here, there in zip(golden["images"], own["images"], strict=True):
        assert here["rgb_sha256"] == there["rgb_sha256"]
        assert np.allclose(here["embedding"], there["embedding"], atol=1e-4)
    assert "| openvino/student.xml |" in made.card.read_text()
    # Of another export nothing stays.
    export(run=run.path, profile="edge", outputs="embedding", progress=False)
    assert not xml.parent.exists()


@pytest.mark.slow
def test_openvino_says_nothing_over_the_network(
    float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "sitecustomize.py").write_text(
        f"import socket\ndef spy(*words, **more):\n    open({str(tmp_path / 'asked')!r}, 'a').write(f'{{words}}')\n"
        "    raise OSError\nsocket.getaddrinfo = socket.create_connection = spy\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    file = converting.convert(float_file, Place("openvino", sys.executable, True), "1", pictures())
    assert file.is_file() and not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("found['embedding'] = found['embedding'][::-1]", "expected the float file's answers"),
        ("found['features'] *= 1.1", "expected the float file's answers"),
        ("os.abort()", "crashed: signal 6"),
        ("(folder / 'error.txt').write_text('no layer Foo')", "cannot run it: no layer Foo"),
    ],
)
def test_another_model_is_no_file(does: str, said: str, float_file: Path, tmp_path: Path) -> None:
    place = Place("openvino", fake(tmp_path / "python", does), True)
    with pytest.raises(BingoError, match=said) as caught:
        converting.convert(float_file, place, "7.8", pictures())
    assert caught.value.exit_status == 3
    assert sorted(path.name for path in float_file.parent.iterdir() if path.name != "openvino") == [
        "student.json",
        "student.onnx",
    ]


def test_a_folder_of_another_is_left_alone(float_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "student.onnx"
    copy.write_bytes(float_file.read_bytes())
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "mine.txt").write_text("mine")
    place = Place("openvino", fake(tmp_path / "python"), True)
    with pytest.raises(BingoError, match="move it away"):
        converting.convert(copy, place, "7.8", pictures())
    assert exported.drop(copy, "a test") is None and (tmp_path / "openvino" / "mine.txt").read_text() == "mine"


def test_words_that_do_not_go_together(tmp_path: Path) -> None:
    run = untrained_run(tmp_path, 1)
    for words, said in (
        ({"format": "tflite"}, "--format tflite: expected a fixed batch and float pixels by channels"),
        ({"format": "onnx", "python": ["openvino=/bin/true"]}, "--python: expected --format openvino or tflite"),
        ({"format": "openvino,onnyx"}, "--format: expected onnx, onnx-fp16, onnx-int8, all, openvino, tflite"),
        ({"format": "openvino", "python": [f"tflite={sys.executable}"]}, "openvino alone"),
    ):
        with pytest.raises(BingoError, match=said) as caught:
            export(run=run.path, progress=False, **words)  # type: ignore[arg-type]
        assert caught.value.exit_status == 2 and not run.export.exists()


def test_every_converter_is_a_toolchain() -> None:
    assert {name for name, each in child.TOOLCHAINS.items() if each.convert} == set(exported.CONVERTED)
