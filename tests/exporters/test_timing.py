"""`latency`: files in turn, what the figures are, that no word says more than they do, processors by their flags, and
bad input before any timing.
"""

import ast
import io
import json
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bingo_compress.errors import BingoError
from bingo_compress.exporters import timing
from bingo_compress.exporters.timing import interleaved, latency
from bingo_compress.runtime.machine import from_cpuinfo, from_sysctl, int8, processor

Side = int | str
MACHINE = {
    "processor": "Some CPU",
    "cores": 4,
    "int8": "AVX2 only: int8 has no dot-product instruction here",
    "int8_flags": ["avx2"],
}


def network(
    path: Path, shape: tuple[Side, ...] = ("batch", 8, 8, 3), kind: int = TensorProto.UINT8, inputs: int = 1
) -> Path:
    """A file that sums what each of its inputs holds."""
    names = [f"image{number}" for number in range(inputs)]
    nodes = []
    for name in names:
        nodes += [helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT)]
        nodes += [helper.make_node("Mul", [f"{name}.float", "scale"], [f"{name}.scaled"])]
        nodes += [helper.make_node("ReduceSum", [f"{name}.scaled"], [f"{name}.sum"])]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info(name, kind, shape) for name in names],
        [helper.make_tensor_value_info(f"{name}.sum", TensorProto.FLOAT, None) for name in names],
        [numpy_helper.from_array(np.array([2.0], np.float32), "scale")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[list[float]]]:
    """Nothing is timed: `interleaved` gives these milliseconds in turn, one entry for each count of threads, and a
    fresh process takes no time.
    """
    found: dict[int, list[list[float]]] = {}

    def given(runners: Any, runs: int, warm_up: int, advance: Any) -> np.ndarray:
        for runner in runners:
            runner()
        return np.array(found.pop(min(found)))

    fresh = {"load_ms": 12.0, "baseline_bytes": 30_000_000, "peak_bytes": 45_000_000}
    monkeypatch.setattr(timing, "interleaved", given)
    monkeypatch.setattr(timing, "_fresh", lambda model: fresh)
    monkeypatch.setattr(timing, "processor", lambda: dict(MACHINE))
    return found


# ---------------------------------------------------------------- in turn


def test_every_round_runs_every_file_once_and_starts_one_further_on() -> None:
    order: list[str] = []
    told: list[int] = []
    times = interleaved(
        [lambda name=name: order.append(name) for name in "abc"], runs=4, warm_up=2, advance=told.append
    )
    assert ["".join(order[place : place + 3]) for place in range(0, 18, 3)] == ["abc", "bca", "cab"] * 2
    assert times.shape == (3, 4)
    assert told == [3] * 6


def test_each_run_is_timed_by_itself_in_milliseconds_and_the_warm_up_is_left_out() -> None:
    now = 0.0
    calls = count(1)

    def runner(seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds if next(calls) > 2 else 100.0  # the first round is slow

        return run

    def clock() -> float:
        nonlocal now
        now += 0.5  # whatever else takes time
        return now

    times = interleaved([runner(1.0), runner(3.0)], runs=3, warm_up=1, clock=clock)
    assert times.tolist() == [[1500.0] * 3, [3500.0] * 3]


# ---------------------------------------------------------------- figures


def test_figures_are_percentiles_and_the_ratio_to_the_first_with_its_range() -> None:
    first = np.array([float(value) for value in range(1, 101)])
    found = timing.figures(2 * first, first)
    assert (found["p50_ms"], found["p90_ms"], found["p99_ms"]) == pytest.approx((101.0, 180.2, 198.02))
    assert found["p50_ratio"] == pytest.approx(2) and found["p50_ratio_range"] == pytest.approx([2, 2])
    drifting = first * np.repeat([1.0, 3.0], 50)
    low, high = timing.figures(drifting, first)["p50_ratio_range"]
    assert (low, high) == pytest.approx((1, 3))
    assert timing.figures(np.array([3.0]), np.array([2.0]))["p50_ratio_range"] == [1.5, 1.5]


def test_the_table_the_lines_and_the_file_say_the_same(tmp_path: Path, measured: Any, printed: io.StringIO) -> None:
    files = [network(tmp_path / "student.onnx"), network(tmp_path / "student-int8.onnx")]
    longer = onnx.load(files[1])
    longer.doc_string = "x" * files[1].stat().st_size
    onnx.save(longer, files[1])  # about twice the bytes, the same network
    measured |= {1: [[2.0] * 20, [3.0] * 10 + [3.4] * 10], 2: [[1.0] * 20, [0.5] * 20]}
    rows = latency(files, [1, 2, 1], runs=20, warm_up=0, json_file=tmp_path / "latency.json")
    assert [(row["file"], row["threads"], row["p50_ms"]) for row in rows] == [
        ("student.onnx", 1, 2.0),
        ("student-int8.onnx", 1, pytest.approx(3.2)),
        ("student.onnx", 2, 1.0),
        ("student-int8.onnx", 2, 0.5),
    ]
    text = printed.getvalue()
    assert (
        "student-int8.onnx against student.onnx: 1.60 [1.50, 1.70] times its p50 with 1 thread, 0.50 [0.50, 0.50]"
        f" times its p50 with 2 threads; {files[1].stat().st_size / files[0].stat().st_size:.2f} times its bytes"
        in text
    )
    assert re.search(r"│ student-int8.onnx +│ +\d+ B │ +1 │ +3\.20 │ +3\.40 │ +3\.40 │ +12 │ +45 MB │", text)
    assert "20 runs" in text and "of the peak memory 30 MB before the file is loaded" in text
    assert "Some CPU, 4 cores" in text and "AVX2 only: int8 has no dot-product instruction here" in text
    written = json.loads((tmp_path / "latency.json").read_text())
    assert written["rows"] == rows
    assert {"order", "runs", "warm_up", "load_ms", "peak_bytes", "session"} <= set(written["protocol"])
    assert set(rows[0]) == {
        *(
            "file",
            "sha256",
            "bytes",
            "bytes_ratio",
            "input",
            "batch",
            "threads",
            "runs",
            "p50_ms",
            "p90_ms",
            "p99_ms",
            "p50_ratio",
            "p50_ratio_range",
        ),
        *("load_ms", "baseline_bytes", "peak_bytes", "machine"),
    }
    assert rows[0]["input"] == "image0: uint8 [1, 8, 8, 3]"
    assert set(MACHINE) | {"system", "onnxruntime", "numpy", "python"} == set(rows[0]["machine"])


def test_no_word_says_more_than_its_figure(tmp_path: Path, measured: Any, printed: io.StringIO) -> None:
    files = [network(tmp_path / name) for name in ("a.onnx", "b.onnx", "c.onnx")]
    measured |= {1: [[2.0], [1.0], [4.0]]}
    latency(files, [1], runs=1, warm_up=0)
    assert not re.search(r"\b(faster|slower|quicker|smaller|larger|better|worse|speed-?up)\b", printed.getvalue())
    assert re.findall(r"(\w\.onnx) against a\.onnx: (\S+) ", printed.getvalue()) == [
        ("b.onnx", "0.50"),
        ("c.onnx", "2.00"),
    ]


def test_files_of_one_name_are_told_apart_and_one_file_is_compared_with_none(
    tmp_path: Path, measured: Any, printed: io.StringIO
) -> None:
    files = [network(tmp_path / run / "student.onnx") for run in ("one", "two")]
    measured |= {1: [[1.0], [1.0]]}
    assert [row["file"] for row in latency(files, [1], runs=1, warm_up=0)] == list(map(str, files))
    printed.truncate(0)
    measured |= {1: [[1.0]]}
    assert [row["file"] for row in latency(files[:1], [1], runs=1, warm_up=0)] == ["student.onnx"]
    assert "against" not in printed.getvalue() and "brackets" not in printed.getvalue()


def test_a_fixed_batch_is_run_whole_and_said(tmp_path: Path, measured: Any, printed: io.StringIO) -> None:
    measured |= {1: [[1.0]]}
    (row,) = latency([network(tmp_path / "a.onnx", (4, 8, 8, 3))], [1], runs=1, warm_up=0)
    assert (row["batch"], row["input"]) == (4, "image0: uint8 [4, 8, 8, 3]")
    assert "4 pictures a run" in printed.getvalue()


def test_without_threads_one_and_all_cores_are_taken(tmp_path: Path, measured: Any, printed: io.StringIO) -> None:
    measured |= {1: [[1.0]], 2: [[1.0]]}
    assert [row["threads"] for row in latency([network(tmp_path / "a.onnx")], runs=1, warm_up=0)] == [1, 4]


# ---------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("shape", "kind"),
    [(("batch", 8, 8, 3), TensorProto.UINT8), ((1, 3, 8, 8), TensorProto.FLOAT), ((1, 3, 8, 8), TensorProto.FLOAT16)],
)
def test_a_file_is_timed_whatever_its_picture_is(
    shape: Any, kind: int, tmp_path: Path, printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "LOADS", 1)
    (row,) = latency([network(tmp_path / "a.onnx", shape, kind)], [1], runs=3, warm_up=1)
    assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    assert row["load_ms"] > 0
    assert 5_000_000 < row["baseline_bytes"] <= row["peak_bytes"]
    assert row["peak_bytes"] < 300_000_000  # torch alone is more


def test_the_fresh_process_imports_what_a_device_has() -> None:
    modules = {
        alias.name for node in ast.walk(ast.parse(timing.PROBE)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert modules == {"json", "sys", "time", "resource", "numpy", "onnxruntime"}


def test_weights_beside_a_file_count(tmp_path: Path) -> None:
    model = onnx.load(network(tmp_path / "a.onnx"))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(5000, np.float32), "scale"))
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="b.data", size_threshold=0)
    assert timing._bytes(tmp_path / "b.onnx") == (tmp_path / "b.onnx").stat().st_size + 20_000


# ---------------------------------------------------------------- refused


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything that takes time fails."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr(timing, "interleaved", never)
    monkeypatch.setattr(timing, "_fresh", never)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"threads": [0]}, "--threads: expected at least 1, found 0"),
        ({"threads": [1, -2]}, "--threads: expected at least 1, found -2"),
        ({"runs": 0}, "--runs: expected at least 1, found 0"),
        ({"warm_up": -1}, "--warm-up: expected at least 0, found -1"),
        ({"models": []}, "MODEL: expected at least one ONNX file"),
        ({"json_file": Path("/nowhere/latency.json")}, "--json: expected a file in a folder that is there"),
    ],
)
def test_numbers_that_cannot_be_are_refused_at_once(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BingoError, match=re.escape(said)):
        latency(**{"models": [network(tmp_path / "a.onnx")], **settings})


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "found no file at"),
        (lambda path: path.mkdir(), "found no file at"),
        (lambda path: path.write_text("these are words"), "expected an ONNX file that onnxruntime"),
        (lambda path: path.write_bytes(b""), "expected an ONNX file that onnxruntime"),
        (lambda path: network(path, ("batch", "height", 8, 3)), "of a known size, found ['batch', 'height', 8, 3]"),
        (lambda path: network(path, inputs=2), "expected one input, pictures, found 2"),
        (lambda path: network(path, kind=TensorProto.INT64), "found tensor(int64)"),
        (lambda path: network(path, ()), "expected pictures as uint8, float16, float"),
    ],
)
def test_a_file_that_cannot_be_timed_is_refused_before_the_others_are(
    make: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    good, bad = network(tmp_path / "good.onnx"), tmp_path / "bad.onnx"
    make(bad)
    with pytest.raises(BingoError, match=re.escape(said)) as caught:
        latency([good, bad], [1], runs=1)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("untimed")
def test_files_of_different_batches_are_not_compared(tmp_path: Path) -> None:
    files = [network(tmp_path / "a.onnx"), network(tmp_path / "b.onnx", (4, 8, 8, 3))]
    with pytest.raises(BingoError, match=r"MODEL: expected files of one batch, found 1 in a\.onnx and 4 in b\.onnx"):
        latency(files, [1], runs=1)


def test_a_fresh_process_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PROBE", "raise MemoryError('no memory')")
    with pytest.raises(BingoError, match=r"a\.onnx: .* found MemoryError: no memory"):
        latency([network(tmp_path / "a.onnx")], [1], runs=1)


# ---------------------------------------------------------------- the processor

X86 = "processor\t: {0}\nmodel name\t: Some CPU @ 2.00GHz\nflags\t\t: fpu avx {1}\n\n"
ARM = "processor\t: {0}\nFeatures\t: fp asimd {1}\nCPU part\t: 0xd0b\n\n"


def test_linux_says_the_name_and_what_all_cores_share() -> None:
    assert from_cpuinfo(X86.format(0, "avx2 avx_vnni") + X86.format(1, "avx2")) == (
        "Some CPU @ 2.00GHz",
        {"fpu", "avx", "avx2"},
    )
    name, flags = from_cpuinfo(ARM.format(0, "asimddp i8mm") + ARM.format(1, "asimddp") + "Model\t\t: Raspberry Pi 5\n")
    assert name == "Raspberry Pi 5" and "asimddp" in flags and "i8mm" not in flags
    assert from_cpuinfo("") == ("", set())


def test_a_mac_says_the_same_in_other_words() -> None:
    text = "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nmachdep.cpu.brand_string: Apple M1\n"
    assert from_sysctl(text) == ("Apple M1", {"asimddp"})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("avx avx2", "AVX2 only: int8 has no dot-product instruction here"),
        ("avx2 avx512bw", "AVX-512 without VNNI: int8 has no dot-product instruction here"),
        ("avx2 avx_vnni", "AVX-VNNI: int8 has a dot-product instruction here"),
        ("avx2 avx512bw avx512_vnni", "AVX-512 VNNI: int8 has a dot-product instruction here"),
        ("avx2 avx512_vnni amx_int8", "AMX: int8 has tile products here"),
        ("asimd asimddp", "Arm dotprod: int8 has a dot-product instruction here"),
        ("asimddp i8mm", "Arm i8mm: int8 has matrix products here"),
        ("sse2", "neither AVX2 nor a dot-product instruction for int8 here"),
        ("", "unknown: this system does not say what its processor can do"),
    ],
)
def test_int8_in_words(flags: str, words: str) -> None:
    assert int8(set(flags.split())) == words


def test_this_processor_has_a_name_and_cores() -> None:
    found = processor()
    assert found["processor"] and found["cores"] >= 1
    assert set(found["int8_flags"]) <= {"amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp", "avx512bw", "avx2"}
