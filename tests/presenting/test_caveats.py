"""What makes figures better than they are, or leaves classes out, is told beside them."""

import json
from typing import Any

import torch
from test_model_card import run, section, validated  # noqa: F401  # a fixture

from bingo_compress.evaluation import scores
from bingo_compress.evaluation.scores import Sides
from bingo_compress.presenting import caveats, classes_section, model_card
from bingo_compress.runtime.run_dir import RunDir, write_text

NEAR = {"test_images_near_bank": 3, "test_share_near_bank": 0.075}


def test_near_copies_are_told_where_there_are_some() -> None:
    of = {"test_images": 40}
    for none in ({}, {"test_images_near_bank": 0, "test_share_near_bank": 0.0}, {"classes_of_one_scene": []}):
        assert caveats.near_copies(of | {"near_copies": none}) == caveats.near_copies(of) == []
    (said,) = caveats.near_copies(of | {"near_copies": NEAR})
    assert said.startswith("3 of the 40 test images (7.5%) have a near-copy in the bank")
    (said,) = caveats.near_copies(of | {"near_copies": {"classes_of_one_scene": list("abcdefg")}})
    assert said.startswith("All images of a, b, c, d, e and 2 classes more are near-copies of one another, one scene")


def test_classes_without_a_test_image_are_counted_however_many_there_are() -> None:
    for count in (3, scores.DENSE + 5):
        labels = torch.arange(count - 2)
        sides: Any = Sides.__new__(Sides)
        for key, value in (("classes", [f"c{place}" for place in range(count)]), ("query_labels", labels)):
            object.__setattr__(sides, key, value)
        row = scores.by_class(labels, sides)
        assert caveats.untested(row) == 2
        (said,) = caveats.without_images(row, count)
        assert said == f"2 of the {count:,} classes have no test image; no figure tells of them."
    assert caveats.untested({"per_class": [{"images": 0}, {"images": 2}]}) == 1  # by an earlier version
    assert caveats.without_images({"per_class": [{"images": 2}]}, 1) == []


def test_the_card_tells_of_them(run: RunDir) -> None:  # noqa: F811
    result = validated(run)
    assert "near-copy" not in model_card.card(run, []) and "no test image" not in model_card.card(run, [])
    result["protocol"] |= {"near_copies": NEAR, "classes": ["cat", "dog", "emu"]}
    result["rows"][1]["untested"] = 1
    write_text(run.validation, json.dumps(result))
    said = section(model_card.card(run, []), "Validation")
    assert "3 of the 40 test images (7.5%) have a near-copy in the bank" in said.replace("\\", "")
    assert "1 of the 3 classes has no test image" in said


def test_classes_in_a_file_that_were_not_tested_are_told() -> None:
    each = [{"class": "a", "images": 0, "accuracy": None}]
    each.append({"class": "b", "images": 2, "accuracy": 1.0, "accuracy_interval": [0.3, 1.0]})
    head = {"kind": "knn", "temperature": 0.07, "test_images": 2, "per_class": each}
    said = classes_section.section([{"precision": "float32", "classes": ["a", "b"], "head": head}])
    assert said[-1] == "1 of the 2 classes has no test image; no figure tells of it."
