"""The page where figures must not be read as they stand: other machines, banks, counts and batches, near-copies."""

from typing import Any

from helpers import recipe

from bingo_compress.html_report import page, sections, verdict
from bingo_compress.html_report.facts import Facts
from bingo_compress.html_report.sections import Section, View

NEAR = {"test_images_near_bank": 3, "test_share_near_bank": 0.075}


def machine(processor: str) -> dict[str, Any]:
    return {"processor": processor, "cores": 4, "system": "Linux", "onnxruntime": "1", "python": "3", "int8": "VNNI"}


def known(name: str, recall: dict[str, Any] | None = None, *, proof: Any = None, timed: Any = None) -> Facts:
    """timed: (processor, milliseconds, batch)."""
    files, rows = [], []
    if timed:
        files = [{"sha256": "s", "bytes": 5_000_000, "precision": "float32"}]
        processor, ms, batch = timed
        rows = [{"sha256": "s", "threads": 1, "p50_ms": ms, "batch": batch, "machine": machine(processor)}]
    summary = {"neighbour_recall": recall} if recall else {}
    return Facts(name, "", recipe(), summary, [], 0.0, proof or {}, [], files, rows, [], None)


def found(k: int, gallery: int, queries: int = 50) -> dict[str, Any]:
    return {"k": k, "gallery": gallery, "queries": queries, "start": 0.4, "student": 0.5}


def proven(linear: float, **of: Any) -> dict[str, Any]:
    row = {"name": "student", "linear": linear, "linear_interval": [linear - 0.1, linear], "knn": 0.5, "per_class": []}
    protocol = {"figures": {"linear": "linear"}, "linear": "probe", "intervals": "95%", "test": "t", "test_images": 40}
    return {"rows": [row], "protocol": protocol | {"bank": "b", "bank_images": 60, "classes": ["x", "y"]} | of}


def section(made: Any) -> tuple[str, list[list[str]], list[str]]:
    """(its lead, the labels in each of its charts, its paragraphs)."""
    assert isinstance(made, Section)
    charts = [chart for block in made.blocks for chart in block.get("charts", ())]
    labels = [[point["name"] for point in chart["data"]["points"]] for chart in charts]
    return made.lead, labels, [block["text"] for block in made.blocks if block["kind"] == "text"]


def test_recall_of_other_counts_has_its_own_chart_and_words() -> None:
    runs = [known("Run 1", found(5, 57)), known("Run 2", found(20, 1000)), known("Run 3", found(5, 57))]
    lead, labels, _ = section(sections.proof(runs))
    assert "Run 1, Run 3: 50 held-out images, each sought among 57; by chance 0.088." in lead
    assert "Run 2: 50 held-out images, each sought among 1,000; by chance 0.020." in lead and "do not compare" in lead
    assert [{label.partition(":")[0] for label in each} for each in labels] == [{"Run 1", "Run 3"}, {"Run 2"}]
    assert "compare" not in section(sections.proof(runs[::2]))[0]


def test_proofs_of_another_bank_have_their_own_charts() -> None:
    runs = [known("Run 1", proof=proven(0.5)), known("Run 2", proof=proven(0.6, bank="other"))]
    lead, labels, _ = section(sections.proof(runs))
    assert "do not compare" in lead and [len(each) for each in labels] == [1, 1]
    runs = [known("Run 1", proof=proven(0.5)), known("Run 2", proof=proven(0.6))]
    lead, labels, _ = section(sections.proof(runs))
    assert "compare" not in lead and [len(each) for each in labels] == [2]


def test_each_machine_is_named_with_its_runs() -> None:
    runs = [known("Run 1", timed=("Pi", 82.0, 1)), known("Run 2", timed=("EPYC", 8.0, 8))]
    lead = section(sections.files(runs))[0]
    assert "Run 1: timed on Pi, 4 cores" in lead and "Run 2: timed on EPYC, 4 cores" in lead
    assert "VNNI, in batches of 8." in lead and "do not compare" in lead
    runs = [known("Run 1", timed=("Pi", 82.0, 1)), known("Run 2", timed=("Pi", 8.0, 1)), known("Run 3")]
    lead = section(sections.files(runs))[0]
    assert lead.count("Timed on Pi") == 1 and "compare" not in lead


def test_the_time_of_a_picture_is_its_share_of_the_batch() -> None:
    run = known("This run", found(5, 57), timed=("Pi", 48.0, 32))
    assert {"value": "1.5 ms", "note": "one thread in batches of 32", "name": "a picture"} in page._tiles(run)
    assert "1.5 ms a picture in batches of 32" in verdict.aside(run)[-1]
    made = sections.files([run])
    assert isinstance(made, Section) and made.blocks[0]["charts"][0]["data"]["points"][0]["ms"] == 1.5
    assert made.blocks[1]["rows"][0][2] == "1.50" and made.lead.endswith("in batches of 32.")
    assert "48.0" not in page.render([run], View()).partition("<main")[2].partition("<script")[0]


def test_near_copies_are_in_the_verdict_and_beside_the_figures() -> None:
    near, clean = known("This run", proof=proven(1.0, near_copies=NEAR)), known("This run", proof=proven(1.0))
    said = "3 of the 40 test images (7.5%) have a near-copy in the bank"
    assert verdict.aside(near)[0].startswith(said) and section(sections.proof([near]))[2][0].startswith(said)
    assert page.render([near], View()).count(said) == 2
    assert "near-copy" not in page.render([clean], View()).partition("<script")[0]


def test_classes_without_test_images_are_in_their_section_and_beside_the_figures() -> None:
    proof = proven(1.0)
    entry = {"class": "x", "images": 40, "accuracy": 1.0, "accuracy_interval": [0.9, 1.0], "mistaken_for": None}
    proof["rows"][0] |= {"per_class": [entry, entry | {"class": "y", "images": 0}], "untested": 1}
    run, said = known("This run", proof=proof), "1 of the 2 classes has no test image"
    assert said in section(sections.classes([run]))[0] and section(sections.proof([run]))[2][0].startswith(said)
