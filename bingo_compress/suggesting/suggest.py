"""Which student for a budget: files made once and kept, measured here or on the device, a table, a picture, and what to
type next. torch is imported where something is to be made or trained.
"""

import json
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bingo_edge import EdgeError
from bingo_edge.measuring import measure

from bingo_compress import options, preflight
from bingo_compress.errors import BingoError
from bingo_compress.models.names import FAMILIES
from bingo_compress.presenting.plots import scatter
from bingo_compress.recipe import make_recipe, parse_setting
from bingo_compress.runtime import console, run_dir
from bingo_compress.sources.opened import asked
from bingo_compress.suggesting import cached
from bingo_compress.suggesting.cached import Size
from bingo_compress.suggesting.ranking import MB, RULE, SOURCES, Budget, Row, measured, ranked, read_profile
from bingo_compress.suggesting.students import SIZES, STUDENTS

# Of (rows, the settings of all, passes of the first round, a folder): recall by passes of each, the best first.
Halving = Callable[[Sequence[Row], Mapping[str, Any], float, Path], dict[Row, dict[float, float]]]
OF_A_TRIAL = {"data", "teacher", "student", "image_size", "epochs", "time"}
SHOWN = 15
BUSY = 1.25  # p90 as a multiple of the median
HEADER = ("", "px", "ms", "MB (float)", "parameters", "top-1 stated", "estimate here")


def suggest(
    words: options.Suggest, try_out: Halving, sizes: Sequence[int] = SIZES
) -> list[tuple[Row, dict[float, float]]]:
    """The students within the budget, best first; with data, those that were tried first, each with its neighbour
    recall by passes. With `files` nothing is measured: they are written there, and the list is empty.

    try_out: `trials.halving`, which imports torch when it is called. Raises BingoError.
    """
    asked_for = [name.strip() for name in words.students.split(",") if name.strip()]
    names = _meant(asked_for) or list(STUDENTS)
    named = _refused(words, names)
    profile = read_profile(Path(words.on)) if words.on else None
    where = cached.folder()
    found = _made(names, sizes, where, make=profile is None)
    if words.files:
        _hand_over(found, where, Path(words.files))
        return []
    about = profile or _measured(found, where)
    rows = measured(found, about, str(words.on or where))
    if left := len(found) - len(rows):
        console.say(f"{left} of {len(found)} files are not in {words.on}; they are left out")
    budget = Budget(words.latency_ms, words.size_mb)
    best = ranked(rows, budget)
    _show(best, budget, about)
    _say_how(rows, where / "profile.json" if profile is None else None)
    tried = try_out(best[: words.top], named, words.epochs, Path(words.out)) if words.data else {}
    if tried:
        _show_tried(tried)
    order = [*tried.items(), *((row, dict[float, float]()) for row in best if row not in tried)]
    _write(words, rows, order, budget, about)
    _say_next(words, order[0][0])
    return order


def _meant(words: Sequence[str]) -> list[str]:
    """timm's names of what was asked for, each once: figures are stated of those, not of families."""
    for word in words:
        if word in FAMILIES:
            console.say(f"student: {word} means {FAMILIES[word]}")
    return list(dict.fromkeys(FAMILIES.get(word, word) for word in words))


def _refused(words: options.Suggest, names: Sequence[str]) -> dict[str, Any]:
    """The settings that all trials share, once all is refused that can be known to be wrong."""
    for option, value in (("--latency-ms", words.latency_ms), ("--size-mb", words.size_mb), ("--epochs", words.epochs)):
        if value is not None and not value > 0:
            raise BingoError(f"{option}: expected a number above 0, found {value:g}; give a larger one")
    if words.top < 1:
        raise BingoError(f"--top: expected at least 1, found {words.top}; give a larger number")
    if words.on and words.files:
        raise BingoError("--files: expected --files (before a device measures) or --on (after it), found both")
    after = {"--json": words.json, "--plot": words.plot, "--data": words.data}
    if words.files and (later := [option for option, given in after.items() if given]):
        raise BingoError(
            f"--files: expected no {later[0]} beside it, since nothing is measured yet, found one; give it with --on,"
            " once the device has measured"
        )
    if strange := [name for name in names if not re.fullmatch(r"[\w.-]+", name)]:
        raise BingoError(f"--students: expected names of timm's with commas between, found {strange[0]!r}")
    if words.plot and Path(words.plot).suffix.lower() != ".svg":
        raise BingoError(f"--plot: expected a name that ends in .svg, found {words.plot}; name FILE.svg")
    for option, file in (("--plot", words.plot), ("--json", words.json)):
        run_dir.refuse_no_file(Path(file) if file else None, option)
    if not words.data:
        if words.teacher or words.settings:
            option = "--teacher" if words.teacher else "--set"
            raise BingoError(f"{option}: expected --data beside it, images to try students on, found none")
        return {}
    chosen = words.settings or ()
    settings = dict(chosen) if isinstance(chosen, Mapping) else dict(parse_setting(each, "--set") for each in chosen)
    if own := sorted(OF_A_TRIAL & settings.keys()):
        raise BingoError(f"--set: expected settings that all trials share, found {own[0]}; leave it out")
    named = settings | {"data": list(asked(words.data).places), "teacher": words.teacher or ""}
    recipe = make_recipe({**named, "student": names[0], "epochs": words.epochs}, "the command line")
    preflight.refuse_early(recipe, Path(words.out), {}, resume=True, overwrite=False)

    from bingo_compress.unread import refuse_unread

    refuse_unread([recipe], {key: getattr(recipe, key) for key in settings}, "--set")
    return named


def _made(names: Sequence[str], sizes: Sequence[int], where: Path, *, make: bool) -> list[Size]:
    """The files of these students; those that are not there yet are made, where they may be."""
    known = {name: found for name in names if (found := cached.sizes_of(name, where))}
    missing = [name for name in names if name not in known]
    if missing and not make:
        if not known:
            raise BingoError(
                f"--on: expected the files that were measured in {where}, found none for these versions of timm, torch"
                " and onnx; write them with suggest --files FOLDER and measure again"
            )
        console.say(f"students without files in {where}, left out: {', '.join(missing)}")
    elif missing:
        _make(missing, sizes, where)
        known |= {name: cached.sizes_of(name, where) or [] for name in missing}
    return [size for name in names for size in known.get(name, ())]


def _make(missing: Sequence[str], sizes: Sequence[int], where: Path) -> None:
    where.mkdir(parents=True, exist_ok=True)
    run_dir.hold(where, "the cache")
    console.say(f"exporting students with random weights ({len(missing)}), once; they are kept in {where}")
    from bingo_compress.models.names import resolve_name
    from bingo_compress.suggesting.making import make

    for name in missing:
        resolve_name(name, "--students")  # a wrong one is said before minutes go into the others
    for left in where.glob(f"{cached.MAKING}*"):  # by a process that was killed
        shutil.rmtree(left)
    began = time.monotonic()
    for place, name in enumerate(missing, 1):
        make(name, sizes, where)
        gone = time.monotonic() - began
        for px, why in cached.refused(name, where).items():
            console.say(f"{name} is not measured at {px} px: {why}")
        more = console.duration(gone / place * (len(missing) - place))
        console.say(f"{name} ({place} of {len(missing)}), {console.duration(gone)} gone, about {more} left")


def _measured(sizes: Sequence[Size], where: Path) -> dict[str, Any]:
    """The profile of this machine, with all of these files in it."""
    last = time.monotonic()

    def told(done: int, count: int, name: str, times: Mapping[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= console.PLAIN_SECONDS:
            last = time.monotonic()
            console.say(f"measuring, one thread: {done} of {count} files, {name} {times['p50_ms']:.3g} ms")

    try:
        return measure(where, where / "profile.json", told=told, names={size.file for size in sizes})
    except EdgeError as error:
        raise BingoError(str(error)) from None


def _hand_over(sizes: Sequence[Size], where: Path, target: Path) -> None:
    cached.copy(sizes, where, target)
    total = console.size(sum((target / size.file).stat().st_size for size in sizes))
    console.say(
        f"{len(sizes)} files ({total}) in {target}. On the device, where bingo-edge is installed (pip install"
        f" ./export, no torch): bingo-edge measure {target.name}"
    )
    console.say(f"then here: bingo-compress suggest --on {target.name}/profile.json --latency-ms 10")


def _show(best: Sequence[Row], budget: Budget, about: Mapping[str, Any]) -> None:
    threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    where = f"{about['machine']['name']} ({about['machine']['architecture']}), {about['runtime']}, {threads}"
    console.table(f"students {budget.describe()}: {len(best)}; {where}", HEADER, [_cells(row) for row in best[:SHOWN]])
    if len(best) > SHOWN:
        console.say(f"the first {SHOWN} of {len(best)}; --json FILE has all")
    console.say(RULE)
    console.say(SOURCES)


def _say_how(rows: Sequence[Row], here: Path | None) -> None:
    """Whether the times can be trusted, and where those of this machine are."""
    spread = statistics.median(row.p90_ms / row.p50_ms for row in rows)
    if spread > BUSY:
        console.say(f"warning: something else ran beside: one run in ten took {spread:.1f} times the median or more")
    if here:
        console.say(f"times: {here}; delete it to measure again")


def _cells(row: Row) -> tuple[str, ...]:
    stated = f"{row.stated:.1f} at {row.stated_px}" if row.stated else "not stated"
    estimate = f"{row.estimate:.1f}" if row.estimate else "-"
    count = f"{row.parameters / 1e6:.2f} M"
    return row.student, str(row.px), f"{row.p50_ms:.2f}", f"{row.bytes / MB:.1f}", count, stated, estimate


def _show_tried(tried: Mapping[Row, Mapping[float, float]]) -> None:
    passes = sorted({each for found in tried.values() for each in found})
    cells = [
        [row.student, str(row.px), f"{row.p50_ms:.2f}"]
        + [f"{found[each]:.3f}" if each in found else "-" for each in passes]
        for row, found in tried.items()
    ]
    heads = [f"recall, {each:g} pass{'es' if each != 1 else ''}" for each in passes]
    console.table("distilled briefly on your images: neighbour recall held out", ("", "px", "ms", *heads), cells)


def _write(
    words: options.Suggest,
    rows: Sequence[Row],
    order: Sequence[tuple[Row, Mapping[float, float]]],
    budget: Budget,
    about: Mapping[str, Any],
) -> None:
    """--json and --plot."""
    if words.json:
        told = {
            "budget": budget._asdict(),
            "rule": RULE,
            "sources": SOURCES,
            "measured": {key: value for key, value in about.items() if key != "files"},
            "students": [
                row._asdict() | {"recall_by_passes": {f"{key:g}": value for key, value in found.items()}}
                for row, found in order
            ],
        }
        run_dir.write_text(Path(words.json), json.dumps(told, indent=2) + "\n")
    if words.plot:
        shown = {row for row, _ in order[:SHOWN]}
        dots = [
            {"name": f"{row.student} {row.px} px", "x": row.p50_ms, "y": row.estimate, "size": row.bytes / MB}
            | {"marked": row in shown}
            for row in rows
            if row.estimate is not None
        ]
        if not dots:
            raise BingoError("--plot: expected a student with a stated top-1, found none; leave --plot out")
        titles = ("ms, median", "ImageNet top-1 in percent, estimated at this input size")
        where = f"{about['machine']['name']}, {about['runtime']}; area: MB; named: the first {len(shown)}"
        run_dir.write_text(Path(words.plot), scatter(dots, titles, where))
        console.say(f"picture: {words.plot}")


def _say_next(words: options.Suggest, best: Row) -> None:
    places = asked(words.data).places if words.data else ("PHOTOS",)
    data = " ".join(f"--data {place}" for place in places)
    teacher = words.teacher or "dinov2"
    console.say(
        f"next: bingo-compress distill --teacher {teacher} --student {best.student} --image-size {best.px} {data} --out"
        f" runs/{best.name}"
    )
