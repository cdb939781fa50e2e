"""The page on a run: what it shows of what the run has, and what of the user's own is never in it."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Ran, command, photo
from PIL import Image

import bingo_compress
from bingo_compress import exporting
from bingo_compress.errors import BingoError
from bingo_compress.html_report import looks, page, sections, verdict
from bingo_compress.html_report.facts import Facts, measured_on
from bingo_compress.html_report.sections import View
from bingo_compress.runtime import checkpoint
from bingo_compress.runtime.run_dir import RunDir

pytestmark = pytest.mark.slow
HUSH = "hush-hush"
NASTY = """a <b>&"'c'</script>"""
EACH = 30  # photos of a class: enough for a map
SECTIONS = ("figures", "bags", "neighbours", "map", "training", "data", "recipe")


class Page(HTMLParser):
    """What a browser makes of a page: the ids of its sections, the sources of its pictures, its words, its scripts."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.html = file.read_text(encoding="utf-8")
        self.sections: list[str] = []
        self.pictures: list[str] = []
        self.words = ""
        self.charts: list[dict[str, Any]] = []
        self._inside = ""
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._inside = "charts" if given.get("type") == "application/json" else tag
        if tag == "section":
            self.sections.append(str(given["id"]))
        if tag == "img":
            self.pictures.append(str(given["src"]))
            assert given["alt"]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "charts":
            self.charts = json.loads(data)
        elif self._inside not in ("script", "style"):
            self.words += data


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HUSH/ with photos of two classes, one with a name that is markup; run/, distilled on them."""
    root = tmp_path_factory.mktemp("report")
    for kind, name in enumerate((NASTY.replace("/", "-"), "plain")):
        (root / HUSH / name).mkdir(parents=True)
        for number in range(EACH):
            Image.fromarray(photo(kind, number)).save(root / HUSH / name / f"whisper-{number}.jpg", quality=90)
    (root / HUSH / "broken-whisper.jpg").write_bytes(b"\xff\xd8\xff none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bingo-compress"])
        bingo_compress.distill(
            data=root / HUSH,
            teacher="test_resnet",
            student="test_efficientnet",
            settings={"teacher_weights": "random", "student_weights": "random", "teacher_size": 32, "image_size": 32}
            | {"head_hidden": 32, "target_dim": 16, "batch_size": 8, "bag_size": 3, "views": "1", "epochs": 1}
            | {"hold_out": 0.2, "device": "cpu", "threads": 1},
            out=root / "run",
            progress=False,
        )
    return root


@pytest.fixture
def run(world: Path, tmp_path: Path) -> RunDir:
    """A copy that a test may change."""
    shutil.copytree(world / "run", tmp_path / "run")
    return RunDir(tmp_path / "run")


def test_the_page_of_a_run_without_labels(world: Path) -> None:
    shown = Page(world / "run" / "report.html")
    assert tuple(shown.sections) == (*SECTIONS, "missing")
    assert "of the teacher's" in shown.words and "which of them is right" in shown.words
    for way in ("validate --run RUN --data LABELLED_FOLDER", "export --run RUN --format all"):
        assert way in shown.words
    recall = json.loads((world / "run" / "summary.json").read_text())["neighbour_recall"]
    low, high = recall["student_interval"]
    assert low <= recall["student"] <= high
    assert f"{100 * recall['student']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]" in shown.words
    kinds = [chart["type"] for chart in shown.charts]
    assert kinds == ["intervals", "histogram", "map", "lines", "lines", "bars"]


def test_nothing_of_the_users_paths_is_in_it_unless_asked(world: Path, run: RunDir, tmp_path: Path) -> None:
    html = (world / "run" / "report.html").read_text()
    for word in (HUSH, "whisper", str(world), "/tmp", "/home"):
        assert word not in html
    assert "image 1" in html and "why a file was not used" in html
    named = bingo_compress.report(runs=[run.path], out=tmp_path / "named.html", paths=True, progress=False)
    shown = Page(named)
    assert "broken-whisper.jpg" in shown.words and "whisper-" in shown.html and str(run.path) in shown.words


def test_names_of_strangers_are_text(run: RunDir, tmp_path: Path) -> None:
    found = looks.load(run)
    assert found is not None
    for image in found.facts["names"]:
        found.facts["names"][image] = f"{NASTY}<img src=x onerror=alert(1)>"
    looks.save(found, run)
    summary = json.loads(run.summary.read_text())
    run.summary.write_text(json.dumps(summary | {"machine": {NASTY: NASTY}}))
    shown = Page(bingo_compress.report(runs=[run.path], out=tmp_path / "page.html", paths=True, progress=False))
    assert shown.html.count("</script>") == 3 and "<b>" not in shown.html and "<img src=x" not in shown.html
    assert NASTY in shown.words
    assert all(source.startswith("data:image/webp;base64,") for source in shown.pictures)
    assert NASTY in shown.charts[2]["data"]["names"][0]


def test_pictures_are_left_out_when_asked(world: Path, run: RunDir, tmp_path: Path) -> None:
    whole = Page(world / "run" / "report.html")
    assert len(whole.pictures) > 20 and whole.charts[2]["data"]["pictures"]
    plain = Page(bingo_compress.report(runs=[run.path], out=tmp_path / "p.html", images=False, progress=False))
    assert not plain.pictures and "data:image" not in plain.html.partition("<script>")[0]
    assert not plain.charts[2]["data"]["pictures"] and "image 1" in plain.words
    assert plain.sections == whole.sections


def test_the_same_run_gives_the_same_page(world: Path, run: RunDir) -> None:
    bingo_compress.report(runs=[run.path], progress=False)
    assert run.report.read_bytes() == (world / "run" / "report.html").read_bytes()


def test_without_its_work_folder_a_run_has_a_smaller_page(run: RunDir) -> None:
    shutil.rmtree(run.work)
    shown = Page(bingo_compress.report(runs=[run.path], progress=False))
    assert tuple(shown.sections) == ("figures", "training", "data", "recipe", "missing")
    assert shown.words.count("work folder") == 3


def test_bags_of_an_earlier_version_leave_a_smaller_page(run: RunDir) -> None:
    bags = checkpoint.load(run.bags)[0]["bags"]
    checkpoint.save(run.bags, {"bags": bags}, files=["1.jpg"] * len(bags), digests=["ab" * 32] * len(bags))
    run.looks.unlink()
    shown = Page(bingo_compress.report(runs=[run.path], progress=False))
    assert tuple(shown.sections) == ("figures", "training", "data", "recipe", "missing")


def test_what_was_not_kept_is_made_again_the_same(run: RunDir) -> None:
    kept = looks.load(run)
    run.looks.unlink()
    bingo_compress.report(runs=[run.path], progress=False)
    again = looks.load(run)
    assert kept and again and kept.facts["bags"] == again.facts["bags"]
    assert kept.facts["changed"] == again.facts["changed"] and kept.pictures == again.pictures
    assert again.facts["images"] == sorted(again.facts["images"]) and len(again.facts["images"]) == 2 * EACH


def test_another_student_is_looked_at_anew(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = looks.load(run)
    tensors, facts = checkpoint.load(run.student)
    generator = torch.Generator().manual_seed(3)
    other = {
        name: torch.randn(value.shape, generator=generator) * 0.1 if value.ndim > 1 else value
        for name, value in tensors.items()
    }
    made = checkpoint.made_of(run.student)
    checkpoint.save(run.student, other, made, **{key: value for key, value in facts.items() if key != "made_of"})
    assert looks.load(run) is None
    assert "made from something else (student)" in capsys.readouterr().out
    bingo_compress.report(runs=[run.path], progress=False)
    after = looks.load(run)
    assert before and after and before.facts["changed"] != after.facts["changed"]
    assert before.facts["bags"] == after.facts["bags"]


def test_validate_and_export_write_it_again_and_say_so(
    run: RunDir, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = world / HUSH
    (labelled / "broken-whisper.jpg").unlink(missing_ok=True)
    ran = command(monkeypatch, capsys, "validate", "--run", run.path, "--data", labelled, "--report")
    assert ran.status == 0 and ran.out.rstrip().endswith(f"report: {run.report}")
    shown = Page(run.report)
    row = next(row for row in json.loads(run.validation.read_text())["rows"] if row["name"] == "student")
    assert verdict.percent(row, "linear") in shown.words
    assert "classes" in shown.sections and NASTY.replace("/", "-") in shown.words and "<b>" not in shown.html
    assert any(word in shown.words for word in ("No clear difference", "Better than before", "Worse than before"))
    wrong = sum(sum(line) for line in row["confusion"]) - sum(line[at] for at, line in enumerate(row["confusion"]))
    assert ("mistakes" in shown.sections) == (wrong > 0)
    assert HUSH not in shown.html and "whisper" not in shown.html

    ran = command(monkeypatch, capsys, "export", "--run", run.path, "--report")
    assert ran.status == 0 and ran.out.rstrip().endswith(f"report: {run.report}")
    shown = Page(run.report)
    assert "files" in shown.sections and "Exported: student.onnx" in shown.words


def test_several_runs_stand_side_by_side(run: RunDir, world: Path, tmp_path: Path, bingo: Callable[..., Ran]) -> None:
    changed = run.resolved.read_text().replace("epochs: 1", "epochs: 7")
    run.resolved.write_text(changed)
    ran = bingo("report", run.path, world / "run")
    assert ran.status == 2 and "--out" in ran.err
    ran = bingo("report", run.path, world / "run", "--out", tmp_path / "both.html")
    assert ran.status == 0, ran.err
    shown = Page(tmp_path / "both.html")
    assert tuple(shown.sections) == ("figures", "training", "recipe", "missing")
    assert "Run 1" in shown.words and "Run 2: student before" in shown.words
    assert re.search(r"epochs\s*7\s*1", shown.words) and "do not compare" not in shown.words


def test_a_page_that_cannot_be_written_is_said_and_loses_nothing(
    run: RunDir, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of a\nbug")

    monkeypatch.setattr(page, "render", broken)
    monkeypatch.setattr(exporting, "export", lambda *_, **__: [run.export / "student.onnx"])
    ran = command(monkeypatch, capsys, "export", "--run", run.path, "--report")
    assert ran.status == 0
    (line,) = ran.err.splitlines()
    assert (
        "report was not written (ZeroDivisionError: of a bug)" in line and f"bingo-compress report {run.path}" in line
    )
    with pytest.raises(ZeroDivisionError):
        bingo_compress.report(runs=[run.path], progress=False)


def test_no_report_is_none(run: RunDir, monkeypatch: pytest.MonkeyPatch, bingo: Callable[..., Ran]) -> None:
    run.report.unlink()
    monkeypatch.setattr(exporting, "export", lambda *_, **__: [run.export / "student.onnx"])
    assert bingo("export", "--run", run.path).status == 0 and not run.report.exists()
    ran = bingo("export", "--run", run.path, "--report")
    assert ran.status == 0 and ran.out == f"report: {run.report}\n" and run.report.exists()


def test_a_judgement_ends_the_command_and_is_on_the_page(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, bingo: Callable[..., Ran]
) -> None:
    status = 3

    def refused(*_: Any, **__: Any) -> None:
        raise BingoError("not good enough", status)

    monkeypatch.setattr(exporting, "export", refused)
    for status, there in ((3, True), (2, False)):
        run.report.unlink(missing_ok=True)
        ran = bingo("export", "--run", run.path, "--report")
        assert ran.status == status and "not good enough" in ran.err and run.report.exists() == there


def test_a_place_on_the_map_is_packed_within_a_level() -> None:
    from base64 import b64decode

    from bingo_compress.html_report.picture_sections import LEVELS, _packed

    places = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * 7 - 3
    low, high = places.amin(0), places.amax(0)
    found = np.frombuffer(b64decode(_packed(places, low, high)), "<u2").reshape(-1, 2) / LEVELS
    assert np.abs(found * (high - low).numpy() + low.numpy() - places.numpy()).max() < 7 / LEVELS


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", '{"images": {"training": "<script>"}}'),
        ("summary.json", '{"neighbour_recall": [1]}'),
        ("metrics.jsonl", '{"step": 1}'),
        ("quarantine.csv", "path,reason\n1,2,3"),
        ("validation.json", '{"rows": [{"name": 1}]}'),
    ],
)
def test_a_run_that_holds_something_else_is_one_error(
    file: str, content: str, run: RunDir, bingo: Callable[..., Ran]
) -> None:
    before = run.report.read_bytes()
    (run.path / file).write_text(content)
    ran = bingo("report", run.path)
    assert ran.status in (0, 2) and "<script>" not in ran.out
    if file != "validation.json":  # which is of no student of this run
        assert ran.status == 2 and ran.err.count("\n") == 1 and run.report.read_bytes() == before


def _facts(recall: dict[str, Any], proof: dict[str, Any]) -> Facts:
    from helpers import recipe

    summary = {"neighbour_recall": recall} if recall else {}
    return Facts("This run", "", recipe(), summary, [], 0.0, proof, [], [], [], [], None)


def test_what_it_took_for_something_else_is_shown_with_a_picture() -> None:
    wrong = {"image": 4, "name": "whisper.jpg", "is": NASTY, "taken_for": "plain", "sure": 0.875, "picture": b"abc"}
    facts = replace(_facts({}, {}), wrong=[wrong])
    html = page.render([facts], View())
    assert 'id="mistakes"' in html and "data:image/webp;base64,YWJj" in html and "88% sure" in html
    assert "whisper" not in html and "<b>" not in html and "taken for plain" in html
    assert "whisper.jpg" in page.render([facts], View(paths=True))
    assert "YWJj" not in page.render([facts], View(images=False))


@pytest.mark.parametrize(
    ("interval", "said"),
    [([0.01, 0.05], "sees more"), ([-0.05, -0.01], "sees less"), ([-0.01, 0.05], "neither clearly more nor less")],
)
def test_the_verdict_claims_no_more_than_its_interval(interval: list[float], said: str) -> None:
    recall = {"k": 20, "gallery": 1000, "queries": 50, "start": 0.3, "student": 0.32, "gain_interval": interval}
    facts = _facts(recall | {"student_interval": [0.3, 0.34]}, {})
    assert said in verdict.sentence(facts) and "32.0% [30.0, 34.0]" in verdict.sentence(facts)
    rows = [{"name": "student", "linear": 0.7, "linear_interval": [0.6, 0.8]}]
    gain = {"linear": {"difference": 0.02, "difference_interval": interval}}
    labelled = _facts({}, {"rows": rows, "gain": gain, "protocol": {"test_images": 9}})
    better = {"sees more": "Better", "sees less": "Worse"}.get(said, "No clear difference")
    assert verdict.sentence(labelled).startswith(better) and "70.0% [60.0, 80.0]" in verdict.sentence(labelled)
    assert "nothing was measured" in verdict.sentence(_facts({}, {}))


def test_a_curve_is_thinned_to_means() -> None:
    points = [(step, float(step)) for step in range(1000)]
    thin = sections._thinned(points)
    assert len(thin) <= sections.POINTS and thin[0] == (2, 1.0) and thin[-1][0] == 999
    assert sections._thinned([]) == []


def test_settings_show_no_place_on_the_disk() -> None:
    from helpers import recipe

    mine = recipe(data="/home/me/photos", teacher_weights="/home/me/w.pth")
    assert "/home" not in str(sections.masked(mine, View())) and sections.masked(mine, View(paths=True)) == mine


def test_the_drawing_code_is_the_one_that_its_note_names() -> None:
    note = (page.ASSETS / "echarts.txt").read_text()
    assert hashlib.sha256((page.ASSETS / "echarts.min.js").read_bytes()).hexdigest() in note
    version = re.search(r"version ([0-9.]+),", note)
    assert version and f'version="{version[1]}"' in (page.ASSETS / "echarts.min.js").read_text()
    assert "Apache License" in (page.ASSETS / "echarts.LICENSE").read_text()


def test_figures_of_other_images_do_not_compare_and_the_page_says_so() -> None:
    of = {"test": "a", "test_images": 9, "bank_images": 30, "classes": ["x", "y"]}
    one, alike, other = (
        _facts({}, {"protocol": protocol, "rows": []}) for protocol in (of, of, {**of, "test": "b", "test_images": 5})
    )
    assert measured_on([one, alike]) == "9 test images, a bank of 30, 2 classes."
    said = measured_on([one, other])
    assert "5 test images" in said and "do not compare" in said
