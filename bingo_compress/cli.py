"""The command line: the words of options.py asked for by typer, the functions of api.py called with them, and what is
said at the end. torch is imported inside, so that --help is quick.
"""

import inspect
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from bingo_compress import __version__, options
from bingo_compress.errors import BingoError
from bingo_compress.runtime import machine, signals
from bingo_compress.words import GROUPS, Word

INTERRUPTED = 130
CLOSED_PIPE = 1  # as typer and rich end where they notice it
UsageError: type[Any] = typer.BadParameter.__bases__[
    0
]  # typer brings its own click or uses the one that is installed, by version
# How a command that was stopped goes on.
AGAIN = {
    "distill": "the same command with --resume goes on",
    "embed": "the same command goes on",
    "compare": "the same command goes on",
    "validate": "the same command goes on",
    "suggest": "the same command goes on",
    "export": "the same command begins the export anew; files that were finished before it stand",
    "demo": "demo --overwrite begins anew (stored pixels and embeddings that fit are used again)",
}

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Shrink a vision model with photos and no labels: distil any timm teacher into any timm student (BINGO), prove"
        " it, export it."
    ),
)


class _Grouped(TyperCommand):
    """A command whose --help has its options under the headings of GROUPS, in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                groups[getattr(parameter, "rich_help_panel", None) or "run"].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name.capitalize()):
                    formatter.write_dl(records)


def _command(name: str, words: type, work: Callable[..., object] | None = None) -> None:
    """Make `work`, or api.py's function of that name, a command: it is called with those fields of the dataclass
    `words` that have a Word.
    """

    def run(**given: Any) -> None:
        from bingo_compress import api

        (work or getattr(api, name))(**given)

    asked = {field.name: _parameter(field, found) for field in fields(words) if (found := _word(field))}
    run.__signature__ = inspect.Signature(list(asked.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {key: parameter.annotation for key, parameter in asked.items()}
    app.command(name, cls=_Grouped, help=inspect.getdoc(words))(run)


def _word(field: Any) -> Word | None:
    return next((part for part in getattr(field.type, "__metadata__", ()) if isinstance(part, Word)), None)


def _parameter(field: Any, word: Word) -> inspect.Parameter:
    """A field as typer reads it."""
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    kind = word.kind
    if default in ((), None):
        kind, default = kind | None, None
    if word.positional:
        info = typer.Argument(help=word.help, metavar=word.metavar, rich_help_panel=word.group)
    else:
        name = word.name or f"--{field.name.replace('_', '-')}"
        info = typer.Option(name, help=word.help, metavar=word.metavar, rich_help_panel=word.group)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _distill(*, dry_run: bool, images: int, **given: Any) -> None:
    from bingo_compress import api

    if dry_run:
        api.dry_run(images=images, **given)
    elif images:
        raise BingoError(f"--images: expected --dry-run beside it, found {images:,} alone; a run takes all of --data")
    else:
        api.distill(**given)


def _demo(**given: Any) -> None:
    from bingo_compress.demo import demo

    demo(options.Demo(**given))


def _runs(folder: Path, json: Path | None) -> None:
    from bingo_compress.run_table import runs

    runs(folder, json)


def _models(pattern: str) -> None:
    from bingo_compress.models.catalogue import show

    show(pattern)


_command("check", options.Check)
_command("distill", options.DistillOrTry, _distill)
_command("embed", options.Embed)
_command("compare", options.Compare)
_command("validate", options.Validate)
_command("export", options.Export)
_command("report", options.Report)
_command("latency", options.Latency)
_command("verify", options.Verify)
_command("suggest", options.Suggest)
_command("runs", options.Runs, _runs)
_command("demo", options.Demo, _demo)
_command("models", options.Models, _models)


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


def _again() -> str:
    """How the command that was asked for goes on."""
    name = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return AGAIN.get(name, "the same command begins anew")


def _told(error: BaseException) -> int:
    """Say in one line why the command ends: its exit status. What nobody foresaw is raised again."""
    from bingo_compress.runtime import console
    from bingo_compress.runtime.run_dir import is_full

    other = f"process {rank}: " if (rank := os.environ.get("RANK", "0")) != "0" else ""
    if isinstance(error, UsageError):
        where = error.ctx.command_path if error.ctx else "bingo-compress"
        said = " ".join(error.format_message().split())
        extra = re.search(r"unexpected extra argument\S* \((\S+)", said)
        expanded = extra and os.path.exists(extra[1].rstrip(")"))
        hint = "; a pattern that the shell expanded? Give the folder, or --data before each" if expanded else ""
        print(f"error: {said}{hint} (see {where} --help)", file=sys.stderr)
        return 2
    if isinstance(error, BingoError):
        console.complain(f"{other}error: {error}")
        return error.exit_status
    if isinstance(error, BrokenPipeError):  # whoever read has seen enough
        _drop_output()
        return CLOSED_PIPE
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
            f"error: no space: the disk is full, {where} could not be written; free some, then {_again()}",
            file=sys.stderr,
        )
        return 2
    # A library may turn what a signal raises within it into an error of its own.
    if isinstance(error, KeyboardInterrupt) or signals.heard():
        if not other:
            print(f"\nstopped; what is finished is kept: {_again()}", file=sys.stderr)
        return signals.status()
    if machine.processes() > 1:
        from bingo_compress.runtime import distributed

        if distributed.lost(error):
            print(
                f"{other}error: another process of this run has ended or cannot be reached; see what it said;"
                f" {_again()}",
                file=sys.stderr,
            )
            return 1
    raise error


def _drop_output() -> None:
    """From now on standard output leads nowhere: Python flushes it once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run() -> int:
    """The command that sys.argv asks for: its exit status."""
    if machine.processes() > 1:
        signals.end_with_parent()
    # A file name may hold bytes that the terminal's encoding has no character for.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("RANK", "0") != "0":
        from bingo_compress.runtime import console

        console.be_quiet()
    status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    if status == INTERRUPTED:  # what typer makes of Ctrl-C
        raise KeyboardInterrupt
    sys.stdout.flush()
    return status or 0


def main() -> None:
    """Run the command line; a BingoError becomes one line and its exit status."""
    machine.keep_memory()
    signals.listen()
    try:
        sys.exit(_run())
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(_told(error))
    finally:
        signals.leave()
        if "torch" in sys.modules:
            from bingo_compress.runtime import distributed

            distributed.stop()
