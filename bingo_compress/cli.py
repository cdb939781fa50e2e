"""The command line: one function a command that parses, calls and prints. torch is imported inside, so that --help is
quick.
"""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bingo_compress import __version__
from bingo_compress.errors import BingoError
from bingo_compress.runtime import signals
from bingo_compress.runtime.machine import keep_memory

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Shrink a vision model with photos and no labels: distil any timm teacher into any timm student (BINGO), prove"
        " it, export it."
    ),
)

Data = Annotated[Path, typer.Option(help="folder of images, searched to any depth")]
Run = Annotated[Path, typer.Option(help="the --out folder of a finished distill")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
RecipeName = Annotated[
    str | None, typer.Option(help="a YAML file, or the name of a recipe that comes with the package")
]
BatchSize = Annotated[int | None, typer.Option(help="anchors a step")]
Views = Annotated[str | None, typer.Option(help="teacher views stored an image, or online")]
ImageSize = Annotated[int | None, typer.Option(help="pixels a side for the student; default: its own")]
TeacherSize = Annotated[int | None, typer.Option(help="pixels a side for the teacher; default: its own")]
TeacherWeights = Annotated[str | None, typer.Option(help="pretrained (default), a file, or random")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: a short calibration picks")]
PixelsIn = Annotated[str | None, typer.Option(help="where decoded images are kept: auto, gpu, memory, disk or stream")]
Memory = Annotated[str | None, typer.Option(help="memory the run may hold at most, for example 4GB")]
DeviceSetting = Annotated[str | None, typer.Option(help="auto, cpu or cuda")]
INTERRUPTED = 130
UsageError: type[Any] = typer.BadParameter.__bases__[
    0
]  # typer brings its own click or uses the one that is installed, by version


@app.command()
def check(data: Data) -> None:
    """Say what is in a folder, what cannot be used and why."""
    from bingo_compress.data.inventory import check as run

    run(data)


@app.command()
def distill(
    data: Annotated[
        str | None, typer.Option(help="folder of images, searched to any depth; labels are not needed")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="a timm model or family, for example resnet152")] = None,
    student: Annotated[str | None, typer.Option(help="a timm model or family, for example mobilenetv3")] = None,
    out: Annotated[Path, typer.Option(help="folder for all that the run makes")] = Path("runs/first"),
    recipe: RecipeName = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any setting of the recipe; may be repeated")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="bingo, or one to compare with: seed, disco, compress, simreg, coss, moco, self")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the folder")] = None,
    batch_size: BatchSize = None,
    bags: Annotated[str | None, typer.Option(help="knn, adaptive, kmeans, labels or none")] = None,
    bag_size: Annotated[int | None, typer.Option(help="nearest neighbours that make an image's bag")] = None,
    queue_size: Annotated[int | None, typer.Option(help="teacher embeddings kept as negatives")] = None,
    temperature: Annotated[float | None, typer.Option(help="tau of the loss")] = None,
    views: Views = None,
    image_size: ImageSize = None,
    teacher_size: TeacherSize = None,
    teacher_weights: TeacherWeights = None,
    student_weights: Annotated[
        str | None,
        typer.Option(help="auto (pretrained where timm has weights, else random), pretrained, random, or a file"),
    ] = None,
    device: DeviceSetting = None,
    max_bad: Annotated[
        str | None,
        typer.Option(
            help="end the run if more files cannot be used: a share such as 5%, or a number; default: no limit"
        ),
    ] = None,
    threads: Threads = None,
    pixels: PixelsIn = None,
    memory: Memory = None,
    profile: Annotated[
        bool | None, typer.Option("--profile", help="write a trace of ten steps, trace.json, beside metrics.jsonl")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="source of all random numbers")] = None,
    keep_best: Annotated[
        bool | None,
        typer.Option("--keep-best", help="leave the student with the best neighbour recall on held-out images"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="start the run in --out anew (stored pixels and embeddings that fit are used again)"
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print settings, sizes, steps, memory and time, then stop")
    ] = False,
) -> None:
    """Distil a teacher into a student on a folder of images."""
    given = dict(locals())
    from bingo_compress.preflight import refuse_early
    from bingo_compress.recipe import KEYS, given_keys, load_recipe, recipe_file

    flags = {key: value for key, value in given.items() if key in KEYS}
    if resume and overwrite:
        raise BingoError(
            "--overwrite: expected --resume (go on) or --overwrite (start anew), found both; leave one out"
        )
    saved = out / "recipe.yaml"
    file = recipe_file(recipe) if recipe else saved if resume and saved.is_file() else None
    chosen = load_recipe(file, settings or [], flags)
    refuse_early(chosen, out, resume, overwrite, dry_run)

    from bingo_compress import pipeline
    from bingo_compress.dry_run import estimate
    from bingo_compress.training import plan

    named = {key: getattr(chosen, key) for key in given_keys(settings or [], flags)}
    plan.refuse_unread([chosen], named, "the command line")
    if dry_run:
        estimate(chosen, out)
    else:
        pipeline.run_distill(chosen, out, resume=resume, overwrite=overwrite)


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="folder of images to distil on")],
    labels: Annotated[Path, typer.Option(help="labelled images, one folder a class: the bank of the probes")],
    teacher: Annotated[str, typer.Option(help="a timm model or family")],
    student: Annotated[str, typer.Option(help="a timm model or family")],
    test: Annotated[
        Path | None, typer.Option(help="labelled images to judge on; default: --labels, cross-validated")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="names with commas between; settings after colons make a variant: bingo:bag_size=1:bags=kmeans"
        ),
    ] = "bingo,seed,disco,compress,simreg,coss,moco,self",
    seeds: Annotated[str, typer.Option(help="numbers with commas between")] = "0,1,2",
    out: Annotated[
        Path, typer.Option(help="folder for tables and shared stages; the same command again goes on where it was")
    ] = Path("runs/compare"),
    recipe: RecipeName = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="any setting of the recipe, for all; may be repeated"),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="passes over the folder, two student views an image; every method gets as many views"),
    ] = None,
    batch_size: BatchSize = None,
    bag_size: Annotated[int | None, typer.Option(help="images that make an image's bag")] = None,
    views: Views = None,
    image_size: ImageSize = None,
    teacher_size: TeacherSize = None,
    teacher_weights: TeacherWeights = None,
    student_weights: Annotated[str | None, typer.Option(help="auto, pretrained, random, or a file")] = None,
    device: DeviceSetting = None,
    threads: Threads = None,
    pixels: PixelsIn = None,
    memory: Memory = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="run everything anew (pixels and teacher embeddings are used again)")
    ] = False,
) -> None:
    """Several methods, or variants of one, side by side: equal student passes, several seeds, one table."""
    given = dict(locals())
    from bingo_compress.preflight import refuse_early
    from bingo_compress.recipe import KEYS, given_keys, load_recipe, recipe_file

    flags = {key: value for key, value in given.items() if key in KEYS}
    chosen = load_recipe(recipe_file(recipe) if recipe else None, settings or [], flags)
    numbers = [part.strip() for part in seeds.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise BingoError(f"--seeds: expected numbers with commas between, for example 0,1,2; found {seeds!r}")
    refuse_early(chosen, out, resume=True, overwrite=overwrite, dry_run=False)

    from bingo_compress.comparison.arms import make_arms
    from bingo_compress.comparison.side_by_side import compare as run
    from bingo_compress.training.plan import (
        refuse_unread,
    )

    named = {key: getattr(chosen, key) for key in given_keys(settings or [], flags)}
    refuse_unread([arm.recipe for arm in make_arms(methods, chosen)], named, "the command line")
    run(chosen, labels, test, methods, list(dict.fromkeys(map(int, numbers))), out, overwrite=overwrite)


@app.command()
def validate(
    run: Run,
    data: Annotated[Path, typer.Option(help="labelled images, one folder a class")],
    test: Annotated[
        Path | None, typer.Option(help="labelled images to test on; default: a quarter of --data is set aside")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write protocol and figures to this file")] = None,
    shots: Annotated[
        str,
        typer.Option(
            help="probe on a part of the labels as well: shares or images a class with commas between, 1%,10%,5"
        ),
    ] = "",
    fine_tune: Annotated[
        bool,
        typer.Option(
            "--fine-tune", help="with --shots: also train the whole of student, start and random weights on each part"
        ),
    ] = False,
    literature: Annotated[
        bool,
        typer.Option(
            "--literature", help="also the literature's linear probe: 100 epochs of crops and flips; costs time"
        ),
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="the --out folder of another run: compare the two students on the same images")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help=(
                "end with status 3 where an exported file (without one: the student) is below; knn=0.58, linear=0.60;"
                " may be repeated"
            ),
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Prove a run: kNN, linear probe and neighbour recall of teacher, student, start, random weights and the exported
    file.
    """
    from bingo_compress.evaluation.validation import validate as prove

    prove(
        run,
        data,
        test,
        json_file,
        device,
        shots=shots,
        fine_tune=fine_tune,
        literature=literature,
        against=against,
        require=require or [],
    )


@app.command()
def export(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="folder for the files; default: RUN/export")] = None,
    data: Annotated[Path | None, typer.Option(help="where the run's images are now, if they moved")] = None,
    fmt: Annotated[str, typer.Option("--format", help="onnx, onnx-int8 or all")] = "onnx",
    profile: Annotated[
        str,
        typer.Option(
            help="modern (opset 21, any batch) or edge (opset 17, IR 8, batch 1, for converters of device makers)"
        ),
    ] = "modern",
    batch: Annotated[str | None, typer.Option(help="dynamic or a number, instead of the profile's")] = None,
    opset: Annotated[int | None, typer.Option(help="opset of the ONNX domain, instead of the profile's")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="pixels a side of the file's input; default: the run's")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="labelled images, one folder a class: int8 may lose --max-loss points of accuracy on them"),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="with --labels: labelled images to test on; default: a quarter is set aside")
    ] = None,
    max_loss: Annotated[float, typer.Option(help="points of kNN and linear accuracy that int8 may lose")] = 0.5,
    finetune: Annotated[
        bool,
        typer.Option(
            "--finetune",
            help="where no way of quantising passes: train the quantised student on the run's own images, no labels",
        ),
    ] = False,
) -> None:
    """Write the student as ONNX files, float and int8, proven on your own images to be the same model."""
    from bingo_compress.exporters.exporting import export as write

    write(
        run,
        out,
        data,
        fmt,
        profile=profile,
        batch=batch,
        opset=opset,
        image_size=image_size,
        labels=labels,
        test=test,
        max_loss=max_loss,
        finetune=finetune,
    )


@app.command()
def latency(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL...", help="ONNX files; each is compared with the first")
    ],
    threads: Annotated[
        list[int] | None, typer.Option(help="threads inside an operator; may be repeated; default: 1 and all cores")
    ] = None,
    runs: Annotated[int, typer.Option(help="timed runs of each file")] = 500,
    warm_up: Annotated[int, typer.Option(help="runs of each file before those")] = 50,
    json_file: Annotated[Path | None, typer.Option("--json", help="write protocol and figures to this file")] = None,
) -> None:
    """Time ONNX files against each other on this processor, run by run in turn: p50, p90, p99, load time, memory."""
    from bingo_compress.exporters.timing import latency as measure

    measure(models, threads, runs, warm_up, json_file)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for all that the demo makes")] = Path("runs/demo"),
    epochs: Annotated[int | None, typer.Option(help="passes over the photos; fewer is quicker and worse")] = None,
    device: DeviceSetting = None,
    seed: Annotated[int | None, typer.Option(help="source of all random numbers")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier demo in --out")] = False,
) -> None:
    """The whole road on photos of solar cells that come with the package's `demo` extra; nothing to prepare."""
    from bingo_compress.demo import demo as show

    show(out, {"epochs": epochs, "device": device, "seed": seed}, overwrite=overwrite)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="part of a name, or with * and ?; default: a short list")] = "",
) -> None:
    """List models that can be a teacher or a student, with parameters and size."""
    from bingo_compress.models.catalogue import show

    show(pattern)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bingo-compress {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


AGAIN = "the same command goes on, `distill` with --resume"


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1  # as distributed.asked_for, without the import of torch


def _told(error: BaseException) -> int:
    """Say in one line why the command ends: its exit status. What nobody foresaw is raised again."""
    from bingo_compress.runtime import console
    from bingo_compress.runtime.run_dir import is_full

    other = f"process {rank}: " if (rank := os.environ.get("RANK", "0")) != "0" else ""
    if isinstance(error, UsageError):
        where = error.ctx.command_path if error.ctx else "bingo-compress"
        print(f"error: {' '.join(error.format_message().split())} (see {where} --help)", file=sys.stderr)
        return 2
    if isinstance(error, BingoError):
        console.complain(f"{other}error: {error}")
        return error.exit_status
    # Torch's, of a GPU; where a step ran out of it, frugal.py has tried less.
    if type(error).__name__ == "OutOfMemoryError":
        found = str(error).partition(". ")[0]
        console.complain(
            f"{other}error: out of the GPU's memory ({found}); lower --batch-size or --image-size, or end what else"
            " runs on it"
        )
        return 2
    if is_full(error):
        where = getattr(error, "filename", None) or "the run"
        print(
            f"error: no space: the disk is full, {where} could not be written; free some, then {AGAIN}", file=sys.stderr
        )
        return 2
    # A library may turn what a signal raises within it into an error of its own.
    if isinstance(error, KeyboardInterrupt) or signals.heard():
        if not other:
            print(f"\nstopped; what is finished is kept: {AGAIN}", file=sys.stderr)
        return signals.status()
    if _several():
        from bingo_compress.runtime import distributed

        if distributed.lost(error):
            print(
                f"{other}error: another process of this run has ended or cannot be reached; see what it said; {AGAIN}",
                file=sys.stderr,
            )
            return 1
    raise error


def main() -> None:
    """Run the command line; a BingoError becomes one line and its exit status."""
    keep_memory()
    signals.listen()
    if _several():
        signals.end_with_parent()
    # A file name may hold bytes that the terminal's encoding has no character for.
    for stream in (
        sys.stdout,
        sys.stderr,
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("RANK", "0") != "0":
        from bingo_compress.runtime import console

        console.be_quiet()
    try:
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        if status == INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(status or 0)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(_told(error))
    finally:
        if _several():
            from bingo_compress.runtime import distributed

            distributed.stop()
