"""What the model card says of classes in the files."""

from typing import Any

from bingo_compress.presenting import classes_section

HEAD: dict[str, Any] = {
    "kind": "linear",
    "temperature": 0.75,
    "accuracy": 0.8387,
    "accuracy_interval": [0.8, 0.87],
    "ece": 0.041,
    "ece_uncalibrated": 0.051,
    "threshold": 0.57,
    "false_alarms": 0.04,
    "false_alarms_interval": [0.02, 0.06],
    "test_images": 12,
    "per_class": [
        {"class": "good", "images": 8, "accuracy": 1.0, "accuracy_interval": [0.7, 1.0]},
        {"class": "<b>|bad", "images": 4, "accuracy": 0.25, "accuracy_interval": [0.1, 0.7]},
        {"class": "absent", "images": 0, "accuracy": None},
    ],
}


def test_a_head_is_told_with_its_figures_weakest_class_first() -> None:
    file = {"precision": "float32", "classes": ["good", "<b>|bad", "absent"], "head": HEAD}
    said = "\n".join(classes_section.section([file, {**file, "precision": "int8"}, {"precision": "int8"}]))
    assert (
        "| student.onnx | linear | 0.75 | 0.839 [0.800, 0.870] | 0.041 | 0.051 | 0.570 | 0.040 [0.020, 0.060] |" in said
    )
    assert said.index("0.250 [0.100, 0.700]") < said.index("1.000 [0.700, 1.000]")
    assert "<b>" not in said and "&lt;b&gt;" in said and "| absent" not in said
    assert classes_section.knows([file]) == "It knows 3 classes, by a head in the file."


def test_without_classes_there_is_no_section_and_without_a_test_no_figures() -> None:
    assert classes_section.section([{}]) == [] and "no classes" in classes_section.knows([{}])
    head = {"kind": "knn", "temperature": 0.07}
    said = classes_section.section([{"precision": "float32", "classes": ["a"], "head": head}])
    assert said[-1] == "Not tested on labelled images." and "| knn | 0.07 | - | - | - | - | - |" in said[2]
