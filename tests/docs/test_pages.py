"""README and docs/ as a whole: how long, how many, and that links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and GitHub make them."""
    heads = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


def test_the_readme_is_short_and_begins_with_what_a_stranger_needs() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    heads = [line for line in lines if line.startswith("## ")]
    assert heads[:4] == ["## Start", "## What came out", "## From Python", "## When not to use it"]


def test_three_commands_lead_from_nothing_to_a_report() -> None:
    """The first block of the README is a clone, an install and a run; then comes the report."""
    _, _, start = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Start")
    block = re.search(r"(?:^ {4}.*\n)+\n(.*)", start, re.MULTILINE)
    assert block and [line.split()[0] for line in block[0].splitlines() if line.startswith("    ")] == [
        "git",
        "pip",
        "bingo-compress",
    ]
    assert "runs/first/report.html" in block[1]


def test_there_are_enough_pages_and_all_are_in_the_site() -> None:
    listed = re.findall(r"[\w]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert len(DOCS) >= 14
    assert sorted(listed) == [page.name for page in DOCS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages_and_headings_that_there_are(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        if "://" in place:
            continue
        there = (page.parent / place) if place else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_the_notebook_has_no_outputs_and_its_python_is_python() -> None:
    book = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 6
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), "tutorial.ipynb", "exec")


def test_the_site_asks_nobody_for_anything() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"] == {"name": "mkdocs", "highlightjs": False}  # its script comes from another host
    assert "://" not in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "://" not in (ROOT / "docs/requirements.txt").read_text(encoding="utf-8")
