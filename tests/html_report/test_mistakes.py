"""The section of the images that the student was surest of and wrong."""

from types import SimpleNamespace
from typing import Any, cast

from bingo_compress.html_report import page
from bingo_compress.html_report.facts import Facts
from bingo_compress.html_report.picture_sections import wrong
from bingo_compress.html_report.sections import Section, View


def test_wrong_answers_are_shown_with_what_they_were_taken_for() -> None:
    answers = [{"image": 4, "name": "a.jpg", "is": "cat", "taken_for": "dog", "sure": 0.91, "picture": b"webp"}]
    section = wrong(cast(Facts, SimpleNamespace(wrong=answers)), View())
    assert isinstance(section, Section)
    around: dict[str, Any] = {key: [] for key in ("verdicts", "tiles", "missing", "charts")}
    shown = page._template().render(
        title="", several=False, sections=[section], version="", asset=lambda name: "", **around
    )
    assert "taken for dog" in shown and "91% sure" in shown and "data:image/webp;base64," in shown
