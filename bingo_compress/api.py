"""The way in, for Python and for the command line: one function a command, with the words of options.py. Each imports
torch when it is called, after what can be refused without it.
"""

import functools
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from bingo_compress import loggers, options, preflight, results
from bingo_compress.errors import BingoError
from bingo_compress.recipe import GIVEN, KEYS, Recipe, load_recipe, make_recipe, parse_setting, recipe_file
from bingo_compress.results import Comparison, Distilled, Exported, Figure, Suggestion, Timing, Validation, Verified
from bingo_compress.runtime import console, run_dir
from bingo_compress.sources.listed import Columns
from bingo_compress.sources.opened import Asked, asked
from bingo_compress.words import Data

if TYPE_CHECKING:
    from bingo_compress.inventory import Inventory
    from bingo_compress.models.encoder import Encoder

P = ParamSpec("P")
Words = TypeVar("Words")
Result = TypeVar("Result")


def _with_words(make: Callable[P, Words]) -> Callable[[Callable[[Words], Result]], Callable[P, Result]]:
    """The function called with the fields of the dataclass `make` by name, instead of with one object of it."""

    def wrap(work: Callable[[Words], Result]) -> Callable[P, Result]:
        @functools.wraps(work)
        def call(*args: P.args, **given: P.kwargs) -> Result:
            words = make(*args, **given)
            with _speaking(getattr(words, "progress", True)):
                return work(words)

        call.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]
        return call

    return wrap


@contextmanager
def _speaking(aloud: bool) -> Iterator[None]:
    """Inside, tables, lines and bars are shown or not; afterwards as before, and the folders that were written are
    free for others.
    """
    before = console.console.quiet
    console.console.quiet = before or not aloud
    try:
        yield
    finally:
        console.console.quiet = before
        run_dir.let_go()


def _place(place: str | Path) -> Path:
    return Path(os.path.expanduser(place))


def _asked(data: Data, words: options.Check | options.Validate | options.Export | Columns, bands: str) -> Asked:
    """Images, with `~` as the home folder, the columns that the words name, and `Asked.bands`."""
    places = asked(data).places
    columns = words if isinstance(words, Columns) else Columns(words.image_column, words.label_column)
    return Asked(tuple(map(os.path.expanduser, places)), columns, bands)


def _maybe(place: str | Path | None) -> Path | None:
    return _place(place) if place is not None else None


@_with_words(options.Check)
def check(words: options.Check) -> "Inventory":
    """Decode every image below `data`: counts, sizes in pixels, each unusable file with its reason; with a `teacher`,
    which is what torch is imported for, near-copies too. Raises BingoError where no image can be used.
    """
    from bingo_compress.inventory import check as look

    bands = make_recipe({"bands": words.bands}, "--bands").bands
    near = None
    if words.teacher:
        from bingo_compress.features import near_copies
        from bingo_compress.features.extract import as_embed
        from bingo_compress.models.names import resolve_name
        from bingo_compress.models.trained import build_teacher
        from bingo_compress.runtime.devices import choose_device

        named = {"teacher": resolve_name(words.teacher, "--teacher"), "teacher_size": words.teacher_size}
        weights = {"teacher_weights": os.path.expanduser(words.teacher_weights)}
        teacher = build_teacher(make_recipe(named | weights, "the command line"))
        near = functools.partial(near_copies.said, as_embed(teacher, choose_device(words.device)))
    return look(_asked(words.data, words, bands), near)


@_with_words(options.Distill)
def distill(words: options.Distill) -> Distilled:
    """Distil a teacher into a student on a folder of images, by BINGO (arXiv 2107.01691) unless told otherwise; they
    see squares of teacher_size and image_size pixels. Raises BingoError.

    teacher, student: a timm model by name, or an `Encoder` around a module of your own, which is left as it is: a run
    with one is resumed, validated and exported with the same module given again. Any other setting of the recipe:
    settings={"lr": 0.01}.
    """
    began = time.monotonic()
    recipe, out = _recipe(words), _place(words.out)
    given = _own(words.teacher, words.student)
    preflight.refuse_early(recipe, out, given, resume=words.resume, overwrite=words.overwrite)
    loggers.refuse_absent(words.logger)

    from bingo_compress import pipeline
    from bingo_compress.html_report import page
    from bingo_compress.models.trained import Given

    _refuse_unread(words, recipe, [recipe])
    run = pipeline.run_distill(
        recipe,
        out,
        resume=words.resume,
        overwrite=words.overwrite,
        given=Given(**given),
        began=began,
        look=words.report,
        logger=words.logger,
    )
    if words.report:
        page.renew(run)
    summary = run_dir.read_json("distill", run.summary)
    return Distilled(
        run.path,
        run.student,
        run.timm if run.timm.is_dir() else None,
        summary.get("run_id", ""),
        summary.get("neighbour_recall", {}),
    )


@_with_words(options.Try)
def dry_run(words: options.Try) -> None:
    """Print what `distill` would cost in bytes and seconds, and write nothing. Raises BingoError if it is too much."""
    began = time.monotonic()
    recipe, out = _recipe(words), _place(words.out)
    given = _own(words.teacher, words.student)
    preflight.refuse_early(recipe, out, given, resume=True, overwrite=False)

    from bingo_compress.dry_run import estimate
    from bingo_compress.models.trained import Given

    _refuse_unread(words, recipe, [recipe])
    estimate(recipe, out, Given(**given), began, words.images)


@_with_words(options.Embed)
def embed(words: options.Embed) -> results.Embedded:
    """Be one of several array jobs that begin a run: make one share of its pixels and, once all are there, of what the
    teacher sees. It is called again until all is `embedded`; `distill` with resume=True goes on. Raises BingoError.
    """
    recipe, out = _recipe(words), _place(words.out)
    given = _own(words.teacher, words.student)
    share = preflight.refuse_alone(recipe, words.shard)
    preflight.refuse_early(recipe, out, given, resume=True, overwrite=False)

    from bingo_compress.embedding import embed as run
    from bingo_compress.models.trained import Given

    _refuse_unread(words, recipe, [recipe])
    return results.Embedded(out, *run(recipe, out, share, Given(**given)))


@_with_words(options.Compare)
def compare(words: options.Compare) -> Comparison:
    """Several methods (sources: training/losses.py), or variants of one, side by side on one folder: accuracies in
    0..1, mean and standard deviation over seeds, each with as many student views. Raises BingoError.
    """
    recipe, out = _recipe(words), _place(words.out)
    numbers = [part.strip() for part in words.seeds.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise BingoError(f"--seeds: expected numbers with commas between, for example 0,1,2; found {words.seeds!r}")
    preflight.refuse_early(recipe, out, {}, resume=True, overwrite=words.overwrite)

    from bingo_compress.comparison.arms import make_arms, refuse_own
    from bingo_compress.comparison.side_by_side import compare as run

    refuse_own(_named(words))
    _refuse_unread(words, recipe, [arm.recipe for arm in make_arms(words.methods, recipe)])
    seeds = list(dict.fromkeys(map(int, numbers)))
    columns = Columns(recipe.image_column, recipe.label_column)
    labels = _asked(words.labels, columns, recipe.bands)
    test = _asked(words.test, columns, recipe.bands) if words.test else None
    table = run(recipe, labels, test, words.methods, seeds, out, overwrite=words.overwrite)
    return Comparison(out, table)


@_with_words(options.Validate)
def validate(words: options.Validate) -> Validation:
    """Probe every model of a run on labelled images: weighted kNN (arXiv 1805.01978), a linear probe of the features,
    and neighbour recall, each in 0..1 with its 95% interval over test images. Raises BingoError; with `require`, also
    where a figure is below what is asked for (exit_status 3), and then all is written.

    teacher, student: the modules of a run that was distilled with your own.
    """
    run, json_file = _place(words.run), _maybe(words.json)
    given = _own(words.teacher, words.student)
    bands = preflight.refuse_run(run, given, ("teacher", "student"), json_file).bands

    from bingo_compress.evaluation.protocol import Extras
    from bingo_compress.html_report import page
    from bingo_compress.models.trained import Given
    from bingo_compress.validation import validate as prove

    with page.renewed(run_dir.RunDir(run) if words.report else None):
        found = prove(
            run,
            _asked(words.data, words, bands),
            _asked(words.test, words, bands) if words.test else None,
            json_file,
            words.device,
            extras=Extras(words.shots, words.fine_tune, words.literature, _maybe(words.against), words.report),
            require=words.require or (),
            given=Given(**given),
        )
    rows = {row["name"]: row for row in found["rows"]}
    figures = {
        name: {
            key: Figure(float(row[key]), *map(float, row[f"{key}_interval"])) for key in row if f"{key}_interval" in row
        }
        for name, row in rows.items()
    }
    return Validation(run_dir.RunDir(run).validation, figures, found["protocol"], tuple(found["rows"]))


@_with_words(options.Export)
def export(words: options.Export) -> Exported:
    """Write the student of a run as ONNX files, proven on your own images: uint8 (B, S, S, 3) or, with profile edge,
    float32 (1, 3, S, S) in 0..1 -> embedding (B, width) of length one and features (B, width). Raises BingoError; with
    exit_status 3 where a file is not the same model, and then it is not there.

    student: the module of a run that was distilled into your own.
    """
    given = _own(None, words.student)
    bands = preflight.refuse_run(_place(words.run), given, ("student",)).bands

    from bingo_compress.exporting import Int8, Shape
    from bingo_compress.exporting import export as write
    from bingo_compress.html_report import page
    from bingo_compress.models import exported
    from bingo_compress.models.trained import Given

    labels, test = (_asked(data, words, bands) if data else None for data in (words.labels, words.test))
    opened = run_dir.RunDir(_place(words.run))
    own = words.out is None or _place(words.out).resolve() == opened.export.resolve()
    form = (words.profile, words.batch, words.opset, words.image_size, words.input, words.outputs)
    shape = Shape(*form, pythons=tuple(words.python or ()))
    with page.renewed(opened if words.report and own else None):
        files = write(
            _place(words.run),
            _maybe(words.out),
            _asked(words.data, words, bands) if words.data else None,
            words.format,
            shape=shape,
            int8=Int8(labels, test, words.max_loss, words.finetune, _maybe(words.calibration_set)),
            given=Given(**given),
            head=words.head,
        )
    return Exported(tuple(files), files[0].with_name(exported.CARD))


@_with_words(options.Report)
def report(words: options.Report) -> Path:
    """Write the page on one finished run, or on several side by side: one HTML file that needs no network. Returns it.
    What it shows of a run's images is taken from the run's work folder, or made anew there where `out` is not given.
    Raises BingoError.
    """
    places, out = list(map(_place, words.runs)), _maybe(words.out)
    for place in places:
        run_dir.open_finished(place)
    if len(places) != 1 and out is None:
        raise BingoError(f"--out: expected a file for the page on {len(places)} runs, found none; give --out runs.html")
    run_dir.refuse_no_file(out, "--out")

    from bingo_compress.html_report import page
    from bingo_compress.html_report.sections import View
    from bingo_compress.runtime.devices import choose_device

    if out is None:
        run_dir.hold(places[0], "--run")
    runs, view = list(map(run_dir.RunDir, places)), View(words.images, words.paths)
    written = page.write(runs, out or runs[0].report, view, choose_device(words.device), keep=out is None)
    console.say(f"report: {written}")
    return written


@_with_words(options.Latency)
def latency(words: options.Latency) -> tuple[Timing, ...]:
    """Time ONNX files that take pictures against each other, in milliseconds, and their bytes. Raises BingoError."""
    json_file = _maybe(words.json)
    run_dir.refuse_no_file(json_file, "--json")

    from bingo_compress.exporters.timing import latency as measure

    rows = measure([_place(file) for file in words.models], words.threads, words.runs, words.warm_up, json_file)
    kept = {field.name for field in fields(Timing)} - {"p50_ratio"}
    return tuple(
        Timing(**{key: row[key] for key in kept}, p50_ratio=Figure(row["p50_ratio"], *row["p50_ratio_range"]))
        for row in rows
    )


@_with_words(options.Verify)
def verify(words: options.Verify) -> tuple[Verified, ...]:
    """Run an exported file in toolchains and compare their answers with its own: the least cosine, in -1..1, and the
    largest error. Raises BingoError; with exit_status 3 where one is wrong, and then all is written.
    """
    from bingo_compress.toolchains.bench import verify as run

    rows = run(_place(words.file), words.toolchains, words.python or (), words.seconds, _maybe(words.json))
    return tuple(Verified(**row) for row in rows)


@_with_words(options.Suggest)
def suggest(words: options.Suggest) -> tuple[Suggestion, ...]:
    """The students within a budget of milliseconds a picture and megabytes, best first, by ImageNet top-1 in percent as
    their authors or timm state it; nothing where `files` are written for a device. Raises BingoError.
    """
    places: Any = {key: _maybe(getattr(words, key)) for key in ("files", "on", "out", "plot", "json")}

    from bingo_compress.suggesting.suggest import suggest as find

    def halving(*given: Any) -> Any:
        from bingo_compress.suggesting import trials

        return trials.halving(*given)

    return tuple(
        Suggestion(row.student, row.px, row.p50_ms, row.bytes, row.parameters, row.stated, row.estimate, dict(recall))
        for row, recall in find(replace(words, **places), halving)
    )


def load_student(run: str | Path, student: "Encoder | None" = None) -> "Encoder":
    """The student of a finished run, in eval mode: float (B, 3, S, S) in 0..1 -> features (B, width); its
    `preprocessing` says how a picture becomes that. Raises BingoError.

    student: the module of a run that was distilled into your own; a copy of it is returned.
    """
    given = _own(None, student)
    preflight.refuse_run(_place(run), given, ("student",))

    from bingo_compress.models import trained

    opened = run_dir.open_finished(_place(run))
    return trained.load_student(load_recipe(opened.as_run), opened.student, student).eval()


def _own(teacher: "str | Encoder | None", student: "str | Encoder | None") -> "dict[str, Encoder]":
    """The modules of the user's own by their roles."""
    roles = {"teacher": teacher, "student": student}
    return {role: model for role, model in roles.items() if model is not None and not isinstance(model, str)}


def _named(words: options.Training) -> dict[str, Any]:
    """The settings that were named, beside a recipe's: first those of `settings`, then words of their own."""
    chosen = words.settings or ()
    named = dict(chosen) if isinstance(chosen, Mapping) else dict(parse_setting(each, "--set") for each in chosen)
    for field in fields(words):
        value = getattr(words, field.name)
        if field.name not in KEYS or value is None:
            continue
        if field.name in ("teacher", "student") and not isinstance(value, str):
            named |= {field.name: value.name, f"{field.name}_weights": GIVEN}
        else:
            named[field.name] = list(asked(value).places) if field.name == "data" else value
    return named


def _recipe(words: options.Run | options.Compare) -> Recipe:
    """Defaults, then the recipe (of a run that goes on: its own), then what was named. Raises BingoError."""
    named, chosen = _named(words), words.recipe
    going_on = words if isinstance(words, options.Distill) and words.resume else None
    if going_on and going_on.overwrite:
        raise BingoError(
            "--overwrite: expected --resume (go on) or --overwrite (start anew), found both; leave one out"
        )
    if isinstance(chosen, Recipe):
        return make_recipe(chosen.model_dump(exclude_unset=True) | named, "the recipe")
    saved = _place(words.out) / "recipe.yaml"
    file = recipe_file(str(chosen)) if chosen else saved if going_on and saved.is_file() else None
    return load_recipe(file, [], named)


def _refuse_unread(words: options.Training, recipe: Recipe, runs: list[Recipe]) -> None:
    """Raise BingoError where a setting was named that none of the runs reads."""
    from bingo_compress.unread import refuse_unread

    refuse_unread(runs, {key: getattr(recipe, key) for key in _named(words)}, "the command line")
