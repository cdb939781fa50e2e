"""`verify`: an exported file in toolchains, each in a process of its own, which may crash, hang or be wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_models import contract, make_model
from helpers import Ran, untrained_run
from test_cli import one_error

from bingo_compress import BingoError, verify
from bingo_compress.exporters.golden import write_golden
from bingo_compress.models import exported
from bingo_compress.presenting import toolchain_table
from bingo_compress.toolchains import bench, child
from bingo_compress.toolchains.judging import judged
from bingo_compress.toolchains.place import Place

# A Python that has just this toolchain: what `child.py NAME` says, then what becomes of `child.py NAME FOLDER`.
FAKE = """#!{python}
import json, os, sys, time
import numpy as np
from pathlib import Path
if not os.path.isdir(sys.argv[-1]):
    print(json.dumps({found}))
    sys.exit()
folder = Path(sys.argv[-1])
job, batches = json.loads((folder / "job.json").read_text()), np.load(folder / "batches.npy")
features = batches.astype(np.float32).mean((2, 3))
embedding = features / np.linalg.norm(features, axis=2, keepdims=True)
def answer(embedding, features):
    np.savez(folder / "outputs.npz", embedding=embedding, features=features)
{does}
"""
RIGHT = "answer(embedding, features)"


def fake(path: Path, does: str, found: object = None) -> str:
    """A stand-in for openvino's Python."""
    said = found if found is not None else {"version": "7.8"}
    path.write_text(FAKE.format(python=sys.executable, does=does, found=said))
    path.chmod(0o755)
    return f"openvino={path}"


def model(folder: Path, batch: int | str = "batch") -> Path:
    file = Path(make_model(folder / "student.onnx", batch=batch))
    write_golden(file, contract(), exported.runner_by_name(file))
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return model(tmp_path)


@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_right_answers_pass_whatever_the_batch(batch: int | str, tmp_path: Path) -> None:
    python = fake(tmp_path / "python", RIGHT)
    rows = verify(file=model(tmp_path, batch), toolchains="openvino,onnxruntime", python=[python], progress=False)
    found = {row.toolchain: row for row in rows}
    assert found["openvino"].verdict == found["onnxruntime"].verdict == "right"
    assert found["openvino"].version == "7.8" and found["onnxruntime"].min_cosine > 0.9999999


WRONG = {
    "other embeddings": ("answer(embedding[::-1], features)", "wrong"),
    "not finite": ("answer(embedding * np.nan, features)", "wrong: values that are not finite"),
    "another shape": ("answer(embedding[..., :2], features)", "wrong: outputs of another shape: embedding [2]"),
    "twice as long": ("answer(embedding * 2, features)", "wrong"),
    "refused": ("(folder / 'error.txt').write_text('ValueError: no layer Foo\\nat 3')", "no layer Foo at 3"),
    "segmentation fault": ("os.kill(os.getpid(), 11)", "crashed: signal 11"),
    "abort": (
        "print('\\33[1;31mNot Support Dtype: 2\\33[0m', flush=True); os.abort()",
        "crashed: signal 6 (Not Support Dtype: 2)",
    ),
    "silent end": ("sys.exit(0)", "crashed: exit status 0"),
    "for ever": ("time.sleep(600)", "too slow: no answer in 1 s"),
}


@pytest.mark.parametrize(("does", "said"), WRONG.values(), ids=WRONG)
def test_whatever_a_toolchain_does_it_is_told_and_the_others_go_on(
    does: str, said: str, file: Path, tmp_path: Path
) -> None:
    python = fake(tmp_path / "python", does)
    with pytest.raises(BingoError, match=r"openvino 7\.8") as caught:
        verify(file=file, toolchains="openvino,onnxruntime", python=[python], seconds=1 if "sleep" in does else 60)
    assert caught.value.exit_status == 3
    held = json.loads(file.with_suffix(".toolchains.json").read_text())
    assert [each["toolchain"] for each in held["rows"]] == ["openvino", "onnxruntime"]
    assert said in toolchain_table.cells(held["rows"])[0][-1]
    assert held["rows"][1]["verdict"] == "right" and "openvino" not in held["not_run"] and "ncnn" in held["not_run"]


def test_a_toolchain_that_writes_over_its_file_does_not_reach_ours(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    python = fake(tmp_path / "python", f"Path(job['file']).write_bytes(b'another'); {RIGHT}")
    (row,) = verify(file=file, toolchains="openvino", python=[python], progress=False)
    assert row.verdict == "right" and file.read_bytes() == before


def test_what_a_toolchain_started_does_not_outlive_it(file: Path, tmp_path: Path) -> None:
    does = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, file=open('PID', 'w')); time.sleep(600)"
    python = fake(tmp_path / "python", does.replace("PID", str(tmp_path / "pid")))
    with pytest.raises(BingoError, match="too slow"):
        verify(file=file, python=[python], toolchains="openvino", seconds=2, progress=False)
    pid = (tmp_path / "pid").read_text().strip()
    state = Path("/proc", pid, "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_scale_is_an_error_that_a_cosine_does_not_see() -> None:
    values = {"features": np.random.default_rng(0).normal(size=(8, 16))}
    assert judged(values, values, 0.9999)["verdict"] == "right"
    double = judged(values, {"features": values["features"] * 2}, 0.9999)
    assert double["verdict"] == "wrong" and double["min_cosine"] == pytest.approx(1)
    near = {"features": values["features"] * 1.01}
    assert judged(values, near, 0.9999)["verdict"] == "right"
    assert judged(values, near, 0.99999)["verdict"] == "wrong"


def test_an_error_as_large_as_what_tells_pictures_apart_is_wrong_at_any_cosine() -> None:
    random = np.random.default_rng(0)
    alike = {"embedding": 1 + random.normal(size=(8, 64)) / 1000}
    near = {"embedding": alike["embedding"] + random.normal(size=(8, 64)) / 2000}
    found = judged(alike, near, 0.9999)
    assert found["min_cosine"] > 0.99999 and found["verdict"] == "wrong" and found["max_of_spread"] > 0.3
    assert judged(alike, alike, 0.9999)["max_of_spread"] == 0


def test_an_absent_toolchain_is_told_or_refused_where_it_was_named(file: Path, tmp_path: Path, bingo: Any) -> None:
    python = fake(tmp_path / "python", RIGHT, {"absent": "openvino"})
    one_error(bingo("verify", file, "--with", "openvino", "--python", python), "no module openvino", "[openvino]")
    assert not file.with_suffix(".toolchains.json").exists()


def test_words_that_say_nothing(file: Path, bingo: Any, tmp_path: Path) -> None:
    one_error(bingo("verify", file, "--with", "openvin"), "--with", "'openvin'", "did you mean openvino?")
    one_error(bingo("verify", file, "--python", "openvino"), "--python", "TOOLCHAIN=PYTHON")
    one_error(bingo("verify", file, "--python", "openvino=/none"), "--python", "/none")
    one_error(bingo("verify", file, "--python", "openvino=/bin/false"), "Python 3.8 or newer at /bin/false")
    one_error(bingo("verify", file, "--seconds", "0"), "--seconds", "more than 0")
    one_error(bingo("verify", tmp_path / "none.onnx"), "no file")
    one_error(bingo("verify", file, "--json", tmp_path), "--json")


def test_golden_pictures_that_are_missing_damaged_or_anothers(file: Path, bingo: Any) -> None:
    golden = file.with_suffix(".golden")
    rgb = golden / "4-grey.rgb"
    rgb.write_bytes(rgb.read_bytes()[::-1])
    one_error(bingo("verify", file), "4-grey.rgb is missing or damaged")
    held = json.loads((golden / "golden.json").read_text())
    held["images"][0]["rgb"] = "../../secret"
    (golden / "golden.json").write_text(json.dumps(held))
    one_error(bingo("verify", file), "../../secret")
    (golden / "golden.json").write_text(json.dumps(held | {"sha256": "0" * 64}))
    one_error(bingo("verify", file), "golden pictures of another file")
    (golden / "golden.json").unlink()
    one_error(bingo("verify", file), "golden pictures", "found none")


def test_what_was_run_before_is_kept_until_it_is_run_again(file: Path, tmp_path: Path, bingo: Any) -> None:
    python = fake(tmp_path / "python", RIGHT)
    said: Ran = bingo("verify", file, "--with", "openvino", "--python", python, "--json", tmp_path / "out.json")
    assert said.status == 0 and "right" in said.out
    assert json.loads((tmp_path / "out.json").read_text())["pictures"] == 8
    verify(file=file, toolchains="onnxruntime", progress=False)
    held = json.loads(file.with_suffix(".toolchains.json").read_text())
    assert [each["toolchain"] for each in held["rows"]] == ["openvino", "onnxruntime"]
    exported.drop(file, "a test")
    assert not list(tmp_path.glob("student*"))


def test_the_child_needs_nothing_of_ours(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(Path(child.__file__).read_text())
    code = (
        f"import sys, runpy; sys.argv = ['child.py', 'onnxruntime']; runpy.run_path({str(script)!r}, None, '__main__')"
    )
    code += "; assert not {'numpy', 'torch', 'bingo_compress'} & sys.modules.keys()"
    ran = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and "version" in json.loads(ran.stdout), ran.stderr


@pytest.mark.slow
def test_the_card_of_a_run_tells_it_until_the_file_is_exported_anew(tmp_path: Path, bingo: Any) -> None:
    run = untrained_run(tmp_path, 14)
    assert bingo("export", "--run", run.path, "--profile", "edge").status == 0
    file, told = run.export / "student.onnx", run.export / "student.toolchains.json"
    assert "    bingo-compress verify student.onnx" in (run.export / exported.CARD).read_text()
    (row,) = verify(file=file, toolchains="onnxruntime", progress=False)
    card = (run.export / exported.CARD).read_text()
    assert f"| onnxruntime | {row.version} |" in card and "Not run: openvino" in card and told.is_file()
    assert bingo("export", "--run", run.path, "--profile", "modern").status == 0
    assert not told.exists() and "| onnxruntime |" not in (run.export / exported.CARD).read_text()


def test_a_wrong_answer_of_opencvs_new_engine_to_int8_says_the_way() -> None:
    place = Place("opencv", "python", asked=False)
    assert "cv2.dnn.ENGINE_CLASSIC" in bench._hint(place, {"precision": "int8"}, "wrong")
    assert bench._hint(place, {"precision": "int8"}, "right") == bench._hint(place, {}, "wrong") == ""
