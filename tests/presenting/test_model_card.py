"""MODEL_CARD.md: what is known stands in it, what is not is said, text from elsewhere is only text, and no place on
this machine is named.
"""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import digests_of, listed, recipe, unit
from markdown_it import MarkdownIt

from bingo_compress.data.image_list import ImageList
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import probes, protocol, scores
from bingo_compress.evaluation.scores import Sides
from bingo_compress.features import bagging
from bingo_compress.models import exported
from bingo_compress.presenting.model_card import card, licence, plain, renew
from bingo_compress.recipe import recipe_text
from bingo_compress.runtime import checkpoint, run_dir

NASTY = (
    "<script>alert(1)</script> [x](http://evil.example) ![y](z) `code` | *bold* _em_ www.evil.example a@b.example &lt;"
    " \\ # ~~no~~\n# heading"
)
MACHINE = {"processor": "Some CPU", "cores": 2, "system": "Linux x86_64", "onnxruntime": "1.0", "int8": "AVX2 only"}
FLOAT = {
    "precision": "float32",
    "parameters": 1_234_567,
    "embedding_dim": 64,
    "input": {"name": "image", "layout": "NHWC", "dtype": "uint8", "color": "RGB", "size": 32},
    "preprocess": {"crop_pct": 0.875, "interpolation": "bicubic"},
    "preprocess_rule": "upright RGB; the middle",
    "normalization": {"where": "in the graph", "scale": "1/255", "mean": [0.5], "std": [0.25]},
    "outputs": {"embedding": "float32 [batch, embedding_dim], L2-normalised"},
    "onnx": {"opset": 18, "ir_version": 10, "batch": "dynamic"},
    "bytes": 5_000_000,
    "sha256": "f" * 64,
    "parity": {"images": 256, "max_difference": 1.2e-6, "min_cosine": 0.999999},
}
GATE = {"images": 200, "mean_cosine": 0.9912, "recall": 0.943, "recall_k": 20, "knn": {"float": 0.81, "int8": 0.802}}
INT8 = {
    **FLOAT,
    "precision": "int8",
    "bytes": 1_400_000,
    "sha256": "8" * 64,
    "int8": {"rung": "weights by channel", "gate": GATE, "float_sha256": "f" * 64},
}
del INT8["parity"]  # it is the float file's


def timed(file: str, p50: float, count: int) -> dict[str, Any]:
    ratio = {"p50_ratio": p50 / 2, "p50_ratio_range": [0.9, 1.1], "bytes_ratio": count / 5_000_000}
    digest = INT8["sha256"] if "int8" in file else FLOAT["sha256"]
    row = {
        "file": file,
        "sha256": digest,
        "bytes": count,
        "batch": 1,
        "threads": 1,
        "runs": 500,
        "p50_ms": p50,
        "p90_ms": 3.5,
        "p99_ms": 4.5,
    }
    return row | ratio | {"load_ms": 20.0, "peak_bytes": 60_000_000, "baseline_bytes": 50_000_000, "machine": MACHINE}


@pytest.fixture
def run(tmp_path: Path) -> run_dir.RunDir:
    """What a finished run leaves, as far as the card reads it."""
    made = run_dir.open_new(tmp_path / "run", resume=False, overwrite=False)
    settings = recipe(data=str(tmp_path / "secret-photos"), temperature=0.1, memory="3GB")
    run_dir.write_text(made.recipe, recipe_text(settings))
    recall = {"k": 20, "queries": 50, "gallery": 900, "start": 0.123, "student": 0.456}
    summary = {
        "version": "0.5",
        "run_id": "abc123",
        "images": {"training": 950, "held_out": 50, "unusable": 3},
        "neighbour_recall": recall,
    }
    run_dir.write_text(made.summary, json.dumps(summary))
    checkpoint.save(made.student, {"weight": torch.zeros(2)})
    bagging.save(made.bags, torch.zeros(2, 1), listed(["cat/private-1.jpg", "dog/2.jpg"]))
    return made


def change(run: run_dir.RunDir, **settings: Any) -> None:
    run_dir.write_text(run.recipe, recipe_text(recipe(**settings)))


@cache
def judged() -> tuple[Sides, str]:
    """Features drawn by hand, and the rows (JSON) that `validate` makes of them."""
    generator = torch.Generator().manual_seed(0)
    labels, asked = torch.arange(60) % 2, torch.arange(40) % 2
    centres = unit(2, 8, seed=1)
    features = {
        name: [centres[of] + spread * torch.randn(len(of), 8, generator=generator) for of in (labels, asked)]
        for name, spread in (("teacher", 0.2), ("student", 0.5), ("random", 100.0))
    }
    folder = ImageList(Path("/home/me/secret-labelled"), (), ())
    bank, queries = ({name: pair[side] for name, pair in features.items()} for side in (0, 1))
    sides = Sides(["cat", "dog"], bank, labels, folder, [], queries, asked, folder, [])
    rows = []
    for name in features:
        head = probes.LinearHead(centres, torch.zeros(2), 1.0)
        found, _ = protocol.figures_of(name, sides, head)
        rows.append(
            {
                "name": name,
                **found,
                **(scores.by_class(head.predict(queries[name]), sides) if name == "student" else {}),
            }
        )
    rows[1] |= {"gap_closed": 0.8, "gap_closed_interval": (0.7, 0.9)}
    return sides, json.dumps(rows)


def validated(run: run_dir.RunDir, test: ImageList | None = None) -> dict[str, Any]:
    """Put RUN/validation.json there, as `validate` makes it."""
    sides, rows = judged()
    result = {
        "protocol": protocol.protocol(sides, test, [], protocol.Extras(against=run.path / "secret-run")),
        "rows": json.loads(rows),
    }
    result["rows"][1]["weights"] = exported.weights_digest(run.student)
    run.validation.write_text(json.dumps(result))
    return result


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def html(text: str) -> str:
    return str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


# ---------------------------------------------------------------- known and not known


def test_a_bare_run_says_what_is_not_known_and_how_to_find_out(run: run_dir.RunDir) -> None:
    text = card(run, [], None)
    assert text.startswith("# test\\_efficientnet, distilled from test\\_resnet\n")
    proof = section(text, "Validation")
    assert "Not validated on labels yet" in proof and "bingo-compress validate --run RUN" in proof
    assert "the student has 0.456, before distillation 0.123 (50 images in a gallery of 900; by chance 0.022)" in proof
    assert "Not exported yet" in section(text, "Files") and "Not measured" in section(text, "Latency")
    assert "950 images without labels to train on, 50 held out, 3 files" in section(text, "Data")
    assert "run abc123." in text and "run abc123, 2026-01-02." in card(run, [], None, (), "2026-01-02")
    assert text == card(run, [], None)


def test_a_run_without_summary_and_work_says_so(run: run_dir.RunDir) -> None:
    run.summary.unlink()
    run.bags.unlink()
    text = card(run, [FLOAT], None)
    assert "not known: the run has no summary.json" in text and "A hash of the list of images was not kept" in text
    assert "run unknown" in text


def test_the_list_of_images_is_there_by_count_and_hash_alone(run: run_dir.RunDir) -> None:
    before = section(card(run, [], None), "Data")
    (digest,) = re.findall(r"`([0-9a-f]{64})`", before)
    bagging.save(run.bags, torch.ones(2, 1), listed(["cat/private-1.jpg", "dog/2.jpg"], digests_of("ab")))
    assert digest in card(run, [], None)
    bagging.save(run.bags, torch.zeros(2, 1), listed(["cat/private-1.jpg", "dog/3.jpg"]))
    assert digest not in card(run, [], None)
    checkpoint.save(run.bags, {"bags": torch.zeros(2, 1)}, files=["as an earlier version wrote them"])
    assert "A hash of the list of images was not kept" in card(run, [], None)


def test_the_settings_that_differ_are_in_it_and_the_others_are_not(run: run_dir.RunDir) -> None:
    method = section(card(run, [], None), "Method")
    assert "| temperature | 0.1 | 0.0 |" in method and "| target\\_dim | 16 | 256 |" in method
    for absent in ("| seed |", "| memory |", "| threads |", "| data |", "| teacher |"):
        assert absent not in method, absent


def test_validation_is_a_table_with_intervals_and_its_protocol(run: run_dir.RunDir) -> None:
    student = validated(run)["rows"][1]
    said = section(card(run, [], None), "Validation")
    low, high = student["linear_interval"]
    assert f"{student['linear']:.3f} [{low:.3f}, {high:.3f}]" in said
    assert "|  | kNN | linear | balanced | AUC | recall\\@6 (chance 0.100) |" in said
    assert "| student (distilled) |" in said and "| student, random weights |" in said
    assert "40 test images (a quarter of each class, set aside), bank of 60, 2 classes: cat, dog." in said
    assert "the student closed 80% [70%, 90%] of the gap" in said
    assert "- knn: weighted vote" in said and "Not validated" not in said
    assert "- onnx:" not in said and "- literature:" not in said  # nothing of them in the table
    assert "| cat | 20 |" in said
    validated(run, test=ImageList(Path("/secret/test"), (), ()))
    assert "40 test images (a folder of their own)" in card(run, [], None)


def test_files_and_int8_with_what_it_costs(run: run_dir.RunDir) -> None:
    files = section(card(run, [FLOAT, INT8], None), "Files")
    assert (
        "| student.onnx | 5 MB | 1,234,567 | 64 | 18, IR 10, dynamic | 256 images: largest difference 1e-06, smallest"
        " cosine 0.999999" in files
    )
    assert "| student-int8.onnx | 1.4 MB | 1,234,567 | 64 | 18, IR 10, dynamic | - |" in files
    assert "which is not the one above" not in files
    assert "that it was made of, which is not the one above" in card(run, [FLOAT | {"sha256": "a" * 64}, INT8], None)
    assert (
        "| student-int8.onnx | weights by channel | 200 | 0.9912 | 0.943 (k = 20, chance 0.101) | 0.810 to 0.802 | - |"
        in files
    )
    assert "int8" not in section(card(run, [FLOAT], None), "Files")
    assert "student.onnx" not in card(run, [INT8], None) and "bingo-edge embed    student-int8.onnx" in card(
        run, [INT8], None
    )


def test_latency_has_its_machine_and_its_ratios(run: run_dir.RunDir) -> None:
    rows = [timed("/home/me/student.onnx", 2.0, 5_000_000), timed("/home/me/student-int8.onnx", 2.6, 1_400_000)]
    said = section(card(run, [FLOAT, INT8], rows), "Latency")
    assert "500 runs" in said and "Some CPU, 2 cores" in said and "AVX2 only" in said
    assert re.search(r"\| student-int8\.onnx \| 1\.4 MB \| 1 \| 2\.60 \|", said)
    shown = re.sub("<[^>]+>", "", html(said))
    assert (
        "student-int8.onnx against student.onnx: 1.30 [0.90, 1.10] times its p50 with 1 thread; 0.28 times its bytes"
        in shown
    )
    assert "Not measured" not in said
    assert "against" not in section(card(run, [FLOAT], rows[:1]), "Latency")


def test_use_names_the_heads_that_are_there_and_the_contract(run: run_dir.RunDir) -> None:
    without = section(card(run, [FLOAT], None), "Use")
    assert (
        "bingo-edge embed    student.onnx photos/" in without
        and "bingo-edge classify" not in without
        and "student-int8" not in without
    )
    assert "- input image: uint8 (batch, 32, 32, 3), NHWC, RGB" in without and "crop\\_pct 0.875" in without
    fixed = FLOAT | {"onnx": {**FLOAT["onnx"], "batch": 1}}
    assert "- input image: uint8 (1, 32, 32, 3)" in card(run, [fixed], None)
    both = section(card(run, [FLOAT, INT8], None, ["student.linear.npz", "student-int8.bank.npz"]), "Use")
    assert (
        "classify student.onnx --head student.linear.npz" in both
        and "classify student-int8.onnx --head student-int8.bank.npz" in both
    )
    assert "student.bank.npz" not in both and "student-int8.onnx can stand" in both


def test_figures_are_shown_of_files_that_are_there_and_of_no_other(run: run_dir.RunDir) -> None:
    """A file that was deleted, or replaced, is told by its sha256; so is the student."""
    result = validated(run)
    for name, sha256 in (("onnx", FLOAT["sha256"]), ("onnx-int8", INT8["sha256"])):
        result["rows"].append({**result["rows"][1], "name": name, "sha256": sha256})
    run.validation.write_text(json.dumps(result))
    rows = [timed("student.onnx", 2.0, 5_000_000), timed("student-int8.onnx", 2.6, 1_400_000)]
    whole = card(run, [FLOAT, INT8], rows)
    assert (
        "| exported ONNX file |" in whole and "| exported int8 file |" in whole and "- onnx: an exported file" in whole
    )
    assert "Not proven" not in whole
    replaced = card(run, [FLOAT | {"sha256": "a" * 64}, INT8], rows)
    proof, times = section(replaced, "Validation"), section(replaced, "Latency")
    assert (
        "| exported ONNX file |" not in proof
        and "| exported int8 file |" in proof
        and "Not proven: student.onnx. Run validate:" in proof
    )
    assert "| student.onnx |" not in times and "| student-int8.onnx |" in times and "times its p50" not in times
    checkpoint.save(run.student, {"weight": torch.ones(2)})
    proof = section(card(run, [FLOAT, INT8], rows), "Validation")
    assert "since the student was trained again" in proof and "| student (distilled) |" not in proof


def test_the_card_is_written_whole(run: run_dir.RunDir, tmp_path: Path) -> None:
    file = renew(run, tmp_path)
    assert file == tmp_path / "MODEL_CARD.md" and file.read_text() == card(run, [])


# ---------------------------------------------------------------- licences


def test_licences_are_what_timm_states_or_that_it_states_none(
    run: run_dir.RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert licence("vit_small_patch14_dinov2.lvd142m", "pretrained") == "apache-2.0"
    assert licence("no_such_model", "pretrained") == "timm states none"
    assert licence("test_resnet", "random") == "none: random weights"
    assert licence("test_resnet", "/home/me/weights.pth") == "file given by the user: licence unknown to us"
    change(run, teacher_weights="/home/me/moco_v2.pth")
    models = section(card(run, [], None), "Models")
    assert (
        "| teacher | test\\_resnet | the file moco\\_v2.pth | 32 px | file given by the user: licence unknown to us |"
        in models
    )
    assert "learns nothing from the teacher" not in models
    change(run, method="moco")
    assert "moco, learns nothing from the teacher" in card(run, [], None)


# ---------------------------------------------------------------- text from elsewhere


def test_text_from_elsewhere_shows_as_it_is_and_as_nothing_else() -> None:
    shown = html(f"| a |\n| --- |\n| {plain(NASTY)} |\n\n{plain(NASTY)}\n\n- {plain(NASTY)}\n")
    assert not re.search(r"<(?!/?(table|thead|tbody|tr|th|td|p|ul|li)>)", shown)
    expected = " ".join(NASTY.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert shown.count(expected) == 3
    assert not re.search(r"www\.|https?:|\w@\w", plain(NASTY))  # what GitHub would make a link of
    assert plain("a\u202eb\x1b[0m\udcff") == "a\\\\u202eb\\\\x1b\\[0m\\\\udcff"


def test_nothing_in_a_card_can_be_markup_of_someone_else(run: run_dir.RunDir) -> None:
    change(run, teacher=NASTY, student=NASTY, teacher_weights=f"/x/{NASTY}", temperature=0.1)
    result = validated(run)
    result["rows"][0]["name"] = result["protocol"]["knn"] = NASTY
    result["protocol"]["classes"][0] = result["rows"][1]["per_class"][0]["class"] = NASTY
    run.validation.write_text(json.dumps(result))
    nasty = INT8 | {"int8": {"rung": NASTY, "gate": GATE}, "outputs": {NASTY: NASTY}}
    nasty |= {"preprocess_rule": NASTY, "preprocess": {NASTY: NASTY}}
    rows = [timed(NASTY, 2.0, 5_000_000), timed("b-int8.onnx", 2.0, 5_000_000)]
    for row in rows:
        row["machine"] = {**MACHINE, "processor": NASTY}
    shown = html(card(run, [FLOAT, nasty], rows, (), NASTY))
    assert not re.search(r"<(?!/?(table|thead|tbody|tr|th|td|p|ul|li|h1|h2|pre|code)>)", shown)
    assert "alert(1)" in shown and "# heading" in shown
    assert shown.count("<h1>") == 1 and shown.count("<h2>") == 8


def leaves(held: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value is that is no list and no dict."""
    if isinstance(held, dict | list):
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            yield from leaves(value, (*path, key))
    else:
        yield path


def changed(held: Any, path: tuple[Any, ...], value: Any) -> Any:
    found = copy.deepcopy(held)
    inside = found
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return found


@pytest.mark.slow
@pytest.mark.parametrize("value", ["<script>alert(1)</script>", {"<b>": 1}, ["<b>"], None, 1e999])
def test_any_value_of_the_wrong_kind_is_plain_or_refused(value: Any, run: run_dir.RunDir) -> None:
    whole = {
        "summary": json.loads(run.summary.read_text()),
        "proof": validated(run),
        "files": [FLOAT, INT8],
        "latency": [timed("a.onnx", 2.0, 5_000_000), timed("b-int8.onnx", 3.0, 2_000_000)],
    }
    tried = 0
    for path in leaves(whole):
        tried += 1
        given = changed(whole, path, value)
        run.summary.write_text(json.dumps(given["summary"]))
        run.validation.write_text(json.dumps(given["proof"]))
        with suppress(BingoError):
            made = card(run, given["files"], given["latency"])
            assert "<script" not in made and "<b>" not in made, path
    assert tried > 150


def test_no_place_on_this_machine_and_no_image_is_named(run: run_dir.RunDir, tmp_path: Path) -> None:
    change(
        run,
        data=str(tmp_path / "secret-photos"),
        teacher_weights=str(tmp_path / "secret-weights" / "w.pth"),
        memory="3GB",
    )
    rows = [timed(str(run.export / "student.onnx"), 2.0, 5_000_000)]
    for test in (None, ImageList(tmp_path / "secret-test", (), ())):
        validated(run, test=test)
        shown = html(card(run, [FLOAT, INT8], rows))  # rendered, so that no backslash hides a path
        assert "0.999999" in shown and "weighted vote" in shown
        assert "secret" not in shown and "private" not in shown and str(tmp_path) not in shown
        assert not re.search(r"(^|[\s(>])/\w", shown)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"protocol": {}, "rows": []}'])
def test_a_validation_that_is_none_is_refused_in_one_line(text: str, run: run_dir.RunDir) -> None:
    run.validation.write_text(text)
    with pytest.raises(BingoError, match=r"validation\.json: expected what .* writes"):
        card(run, [], None)
