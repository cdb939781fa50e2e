"""The card's section on toolchains: what ran which file, and what did not run."""

from bingo_compress.presenting.markdown import plain
from bingo_compress.presenting.toolchain_table import section


def test_toolchains_are_told_of_the_file_that_they_ran() -> None:
    figures = {"min_cosine": 0.99999912, "max_difference": 2e-6, "max_of_spread": 1e-5}
    rows = [
        {"toolchain": "openvino", "version": "2026.4", "verdict": "right", "cause": "", **figures},
        {"toolchain": "rknn", "version": "2.5", "verdict": "crashed", "cause": "signal 6"},
    ]
    told = {"sha256": "f", "rows": rows, "not_run": ["ncnn", "tflite"]}
    shown = "\n\n".join(section({"f": "student.onnx", "8": "student-int8.onnx"}, [told, {}]))
    assert "| openvino | 2026.4 | 0.9999991 | 2.0e-06 | 1.0e-05 | right |" in shown.replace("\\", "")
    assert "| rknn | 2.5 | - | - | - | crashed: signal 6 |" in shown.replace("\\", "")
    assert "Not run: ncnn, tflite." in shown
    assert "    bingo-compress verify student-int8.onnx" in shown and "verify student.onnx" not in shown


def test_what_was_told_of_another_file_is_not_shown() -> None:
    told = {"sha256": "0", "rows": [{"toolchain": "openvino", "version": "2026.4", "verdict": "right"}], "not_run": []}
    shown = section({"f": "student.onnx"}, [told])
    assert not any("openvino" in block for block in shown) and "    bingo-compress verify student.onnx" in shown
    assert "    bingo-compress verify student.onnx" in section({}, [])


def test_what_a_toolchain_said_is_text_alone() -> None:
    nasty = "<b>|[x](y)"
    rows = [dict.fromkeys(("toolchain", "version", "verdict", "cause"), nasty)]
    (_, line, table) = section({"f": "student.onnx"}, [{"sha256": "f", "rows": rows, "not_run": [nasty]}])
    assert "<b>" not in line + table and plain(nasty) in line and table.count(plain(nasty)) == 4
