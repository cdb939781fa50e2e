"""The page itself: sections of what is known, in one file with everything in it that shows them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import torch

from bingo_compress import __version__
from bingo_compress.errors import BingoError
from bingo_compress.html_report import facts as known
from bingo_compress.html_report import looking, looks, picture_sections, sections, verdict
from bingo_compress.html_report.facts import Facts
from bingo_compress.html_report.sections import Missing, Section, View
from bingo_compress.models import trained
from bingo_compress.presenting import timing_table
from bingo_compress.presenting.markdown import name_of
from bingo_compress.recipe import GIVEN, load_recipe
from bingo_compress.runtime import console, distributed
from bingo_compress.runtime.devices import choose_device
from bingo_compress.runtime.run_dir import RunDir, write_text

ASSETS = Path(__file__).with_name("assets")
JUDGED = 3  # the exit status of a file, or a student, that is not as good as asked for


def write(runs: Sequence[RunDir], target: Path, view: View, device: torch.device, *, keep: bool = True) -> Path:
    """Write the page on finished runs to `target`, whole or not at all. keep: what is made anew of a run's images is
    put into its work folder. Raises BingoError.
    """
    several = len(runs) > 1
    told = []
    for number, run in enumerate(runs, 1):
        seen = None if several else _looks(run, device, keep)
        named = f"Run {number}" if several else "This run"
        told.append(known.read(run, f"{named} ({run.path.name})" if several and view.paths else named, seen))
    try:
        html = render(told, view)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, jinja2.UndefinedError) as error:
        raise BingoError(
            f"{runs[0].path}: no page can be made of what is in it ({type(error).__name__}: {error}); if all of it is"
            " as bingo-compress wrote it, this is a bug of ours: please tell us"
        ) from error
    write_text(target, html)
    return target


def _looks(run: RunDir, device: torch.device, keep: bool) -> looks.Looks | None:
    """What the run kept of its images, or made anew of what is left; None where too little is."""
    if found := looks.load(run):
        return found
    recipe = load_recipe(run.as_run)
    left = looking.find(run, recipe)
    if left is None or not run.start.is_file() or recipe.student_weights == GIVEN:
        return None
    encoders = {
        "start": trained.load_start(recipe, run),
        "student": trained.load_student(recipe, run.student).eval(),
    }
    found = looking.make(left, encoders, recipe.seed, device)
    if keep:
        looks.save(found, run)
    return found


def renew(run: RunDir) -> None:
    """Write a run's own page with what the run has now; a failure is said, and the command's work stands."""

    def again() -> None:
        with looking.spared(run):
            console.say(f"report: {write([run], run.report, View(), choose_device('auto'))}")

    distributed.from_first(again)


@contextmanager
def renewed(run: RunDir | None) -> Iterator[None]:
    """After the block `renew` the page of a run; also where the block ends with a judgement, whose figures stand then.
    None: nothing.
    """
    try:
        yield
    except BingoError as error:
        if run and error.exit_status == JUDGED:
            renew(run)
        raise
    if run:
        renew(run)


def render(runs: Sequence[Facts], view: View) -> str:
    """The page as HTML; the same for the same facts."""
    found = _sections(runs, view)
    shown = [section for section in found if isinstance(section, Section)]
    charts = _number_charts(shown)
    heading, tiles = f"{len(runs)} runs side by side", []
    if len(runs) == 1:
        tiles = _tiles(runs[0])
        heading = f"{runs[0].recipe.student}, taught by {runs[0].recipe.teacher}"
    return _template().render(
        title=heading,
        verdicts=[
            {"name": facts.name, "sentence": verdict.sentence(facts), "aside": verdict.aside(facts)} for facts in runs
        ],
        several=len(runs) > 1,
        tiles=tiles if len(tiles) > 1 else [],
        sections=shown,
        missing=list(dict.fromkeys(section for section in found if isinstance(section, Missing))),
        charts=charts,
        version=__version__,
        asset=_asset,
    )


def _sections(runs: Sequence[Facts], view: View) -> list[Section | Missing]:
    if len(runs) > 1:
        return [sections.proof(runs), sections.training(runs), sections.files(runs), sections.recipe(runs, view)]
    (facts,) = runs
    seen: list[Callable[[Facts, View], Section | Missing]] = [
        picture_sections.bags,
        picture_sections.changed,
        picture_sections.plane,
    ]
    found = [sections.proof(runs), sections.files(runs), *(section(facts, view) for section in seen)]
    found += [sections.classes(runs), picture_sections.wrong(facts, view)]
    return [*found, sections.training(runs), picture_sections.unused(facts, view), sections.recipe(runs, view)]


def _number_charts(shown: Sequence[Section]) -> list[dict[str, Any]]:
    """What assets/page.js draws, in the order of the page; each chart is given its place in it."""
    charts: list[dict[str, Any]] = []
    for section in shown:
        for block in section.blocks:
            for chart in block.get("charts", ()):
                chart["number"] = len(charts)
                charts.append({"type": chart["type"], "name": chart["name"], "data": chart["data"]})
    return charts


def _tiles(facts: Facts) -> list[dict[str, str]]:
    """The figures that one looks for first."""
    tiles = []
    student, recall = facts.row("student"), facts.summary.get("neighbour_recall")
    if student:
        for key, name in (("linear", "linear probe"), ("knn", "nearest neighbours")):
            whole = verdict.percent(student, key)
            tiles.append({"value": whole.partition(" ")[0], "note": whole.partition(" ")[2], "name": name})
    if recall:
        whole = verdict.percent(recall, "student")
        name = f"of the teacher's {recall['k']:,} neighbours"
        tiles.append({"value": whole.partition(" ")[0], "note": whole.partition(" ")[2], "name": name})
    if counts := facts.summary.get("parameters"):
        ratio, millions = counts["teacher"] / counts["student"], counts["student"] / 1e6
        tiles.append(
            {"value": f"{ratio:.1f}x", "note": f"{millions:.1f} M parameters", "name": "smaller than its teacher"}
        )
    if facts.files:
        contract = facts.files[-1]
        time = facts.timing(contract)
        tiles.append(
            {"value": console.size(contract["bytes"]), "note": name_of(contract), "name": "file for the device"}
        )
        if time:
            value = f"{timing_table.milliseconds(timing_table.picture_ms(time))} ms"
            tiles.append({"value": value, "note": f"one thread{timing_table.batches(time)}", "name": "a picture"})
    return tiles[:5]


@cache
def _template() -> jinja2.Template:
    place = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined
    )
    place.trim_blocks = place.lstrip_blocks = True
    return place.get_template("page.html")


@cache
def _asset(name: str) -> str:
    """A file that goes into the page as it is."""
    return (ASSETS / name).read_text(encoding="utf-8")
