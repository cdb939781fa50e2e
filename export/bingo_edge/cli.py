"""The commands. numpy, Pillow and onnxruntime are imported inside them, so that --help answers at once."""

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bingo_edge import __version__
from bingo_edge.errors import EdgeError

if TYPE_CHECKING:
    from bingo_edge.golden import Check
    from bingo_edge.model import Embedded, Embedder


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise EdgeError("arguments as in the help", message, f"see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document")
    common.add_argument("--threads", type=int, default=1, metavar="N", help="threads of the network (default 1)")
    shared = _Parser(add_help=False, parents=[common])
    shared.add_argument("model", metavar="MODEL", help="the ONNX file made by bingo-compress")
    top = _Parser(
        prog="bingo-edge", description="Picture embeddings, nearest pictures and classes from an ONNX student."
    )
    top.add_argument("--version", action="version", version=f"bingo-edge {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, about: str, parent: _Parser = shared) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[parent], help=about, description=about)
        command.set_defaults(run=run)
        return command

    command = add("embed", _embed, "embed pictures and whole folders")
    command.add_argument("paths", nargs="+", metavar="PATH")
    command.add_argument(
        "--out", type=Path, metavar="FILE.npz", help="write paths and embeddings here instead of printing them"
    )
    command = add("nearest", _nearest, "the pictures of an index most similar to one picture")
    command.add_argument("query", metavar="QUERY")
    command.add_argument(
        "--index",
        required=True,
        metavar="FILE.npz|FOLDER",
        help="a file from embed --out, the model's bank.npz, or a folder",
    )
    command.add_argument("--k", type=int, default=5, help="how many (default 5)")
    command = add("classify", _classify, "the class of pictures, with its probability")
    command.add_argument("paths", nargs="+", metavar="PATH")
    command.add_argument(
        "--head",
        metavar="HEAD.npz",
        help="the model's linear.npz or bank.npz from bingo-compress validate; default: the classes in the file",
    )
    command = add(
        "time", _time, "time of a picture, or of a batch fixed in the file, in the network; preprocessing not included"
    )
    command.add_argument("--runs", type=int, default=200, metavar="N", help="timed runs after a warm-up (default 200)")
    command = add("measure", _measure, "time of every ONNX file in a folder, for bingo-compress suggest --on", common)
    command.add_argument("folder", metavar="FOLDER", help="what bingo-compress suggest --files wrote")
    command.add_argument(
        "--out", type=Path, metavar="FILE.json", help="the profile to bring back (default: FOLDER/profile.json)"
    )
    add("info", _info, "the contract inside an ONNX file")
    command = add(
        "selftest",
        _selftest,
        "the model on the pictures exported with it: same pixels, same embeddings; exit status 3 if not",
    )
    command.add_argument(
        "--golden", metavar="FOLDER", help="where those pictures are (default: MODEL's name with .golden, beside it)"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0, or 2 with one line on stderr for an error that the user can mend, or 3 for a self-test that
    failed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file's name must not end a run where the terminal cannot show it.
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged EXIF and the like: the picture itself is fine
    try:
        args = parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()
        return 0
    except EdgeError as error:
        print(f"error: {_shown(str(error))}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has left, as `head` does; the flush at exit must not complain about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _embed(args: argparse.Namespace) -> None:
    from bingo_edge.files import check_out, write_npz

    if args.out:
        check_out(args.out)
    embedder = _open(args)
    result = _Collector()
    for batch in _batches(embedder, args.paths, result):
        if args.out or args.json:
            result.names += batch.names
            result.embeddings.append(batch.embeddings)
        else:
            for name, row in zip(batch.names, batch.embeddings, strict=True):
                print(_shown(name), *(f"{value:.6g}" for value in row), sep="\t")
    if not (args.out or args.json):
        return
    import numpy as np

    embeddings = np.concatenate(result.embeddings)
    report: dict[str, Any] = {"pictures": len(embeddings), "embedding_dim": embedder.dim, "skipped": result.skipped}
    if args.out:
        write_npz(args.out, paths=np.array(result.names), embeddings=embeddings, model_sha256=np.array(embedder.sha256))
        report["out"] = str(args.out)
    else:
        report |= {"paths": result.names, "embeddings": embeddings.tolist()}
    _report(args, report, f"{len(embeddings)} pictures x {embedder.dim} in {args.out}, {len(result.skipped)} skipped")


def _nearest(args: argparse.Namespace) -> None:
    from bingo_edge.heads import load_index, nearest

    if args.k < 1:
        raise EdgeError("--k of at least 1", str(args.k), "give a positive number")
    if os.path.isdir(args.query):
        raise EdgeError("one picture as QUERY", f"the folder {args.query}", "give a file")
    embedder = _open(args)
    query = embedder.embed(args.query)
    if not query.names:
        raise EdgeError("a readable picture as QUERY", ": ".join(query.skipped[0]), "give another file")
    result = _Collector()
    if os.path.isdir(args.index):
        import numpy as np

        for batch in _batches(embedder, [args.index], result):
            result.names += batch.names
            result.embeddings.append(batch.embeddings)
        rows, paths = np.concatenate(result.embeddings), np.array(result.names)
    else:
        rows, paths = load_index(args.index, embedder)
    if rows.shape[1] != embedder.dim:
        raise EdgeError(
            f"an index of {embedder.dim} values a picture",
            f"{rows.shape[1]} in {args.index}",
            "make it with this model",
        )
    places, cosines = nearest(query.embeddings, rows, args.k)
    found = [
        {"path": str(paths[place]), "cosine": float(cosine)}
        for place, cosine in zip(places[0], cosines[0], strict=True)
    ]
    lines = "\n".join(f"{one['cosine']:.6f}\t{_shown(str(one['path']))}" for one in found)
    _report(args, {"query": args.query, "nearest": found, "skipped": result.skipped}, lines)


def _classify(args: argparse.Namespace) -> None:
    from bingo_edge.heads import load_head, named

    embedder = _open(args)
    head = load_head(args.head, embedder) if args.head else None
    if head is None and not embedder.classes:
        stem = os.path.splitext(args.model)[0]
        raise EdgeError(
            "a model with classes in it, or --head",
            f"neither of {args.model}",
            f"give --head {stem}.linear.npz, or export it with bingo-compress export --head linear",
        )
    result = _Collector()
    found: list[dict[str, Any]] = []
    for batch in _batches(embedder, args.paths, result):
        for name, answer in zip(batch.names, named(embedder, batch, head), strict=True):
            if args.json:
                far = {} if answer.distance is None else {"known": answer.known, "distance": answer.distance}
                found.append({"path": name, "class": answer.label, "probability": answer.probability, **far})
            elif answer.known:
                print(_shown(name), _shown(answer.label), f"{answer.probability:.4f}", sep="\t")
            else:
                nearest = f"nearest: {_shown(answer.label)}"
                print(_shown(name), "none of these", f"{answer.probability:.4f}", nearest, sep="\t")
    if args.json:
        _report(args, {"pictures": found, "skipped": result.skipped}, "")


def _time(args: argparse.Namespace) -> None:
    import numpy as np

    from bingo_edge.model import latency_ms

    embedder = _open(args)
    p50, p90, p99 = (float(value) for value in np.percentile(latency_ms(embedder, args.runs), [50, 90, 99]))
    load_ms = embedder.load_seconds * 1e3
    batch = embedder.batch or 1
    report = {
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "load_ms": load_ms,
        "runs": args.runs,
        "threads": args.threads,
    }
    report |= {"batch": batch, "p50_ms_per_picture": p50 / batch, "pictures_per_second": 1e3 * batch / p50}
    text = f"p50 {p50:.3f} ms\np90 {p90:.3f} ms\np99 {p99:.3f} ms\nload {load_ms:.1f} ms\n"
    text += f"{p50 / batch:.3f} ms a picture, {1e3 * batch / p50:.1f} pictures a second\n"
    pictures = "one picture a run" if batch == 1 else f"{batch} pictures a run (the batch is fixed in the file)"
    text += f"{pictures}, {args.runs} runs after a warm-up, threads {args.threads}, preprocessing not included"
    _report(args, {**report, "preprocessing_included": False}, text)


def _measure(args: argparse.Namespace) -> None:
    from bingo_edge.files import check_out
    from bingo_edge.measuring import measure

    out = args.out or Path(args.folder, "profile.json")
    check_out(out)

    def told(done: int, count: int, name: str, times: dict[str, Any]) -> None:
        print(f"{done} of {count}\t{_shown(name)}\t{times['p50_ms']:.3f} ms", file=sys.stderr, flush=True)

    profile = measure(args.folder, out, args.threads, told)
    text = f"{len(profile['files'])} files on {profile['machine']['name']}, threads {args.threads}: bring back {out}\n"
    _report(args, profile | {"out": str(out)}, f"{text}then: bingo-compress suggest --on {out.name} --latency-ms 10")


def _info(args: argparse.Namespace) -> None:
    embedder = _open(args)
    facts = {"file": args.model, "bytes": os.path.getsize(args.model), "sha256": embedder.sha256}
    report = facts | embedder.contract | facts
    lines = (f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in report.items())
    _report(args, report, "\n".join(map(_shown, lines)))


def _selftest(args: argparse.Namespace) -> None:
    from bingo_edge.golden import refuse_failed, selftest, tolerance

    embedder = _open(args)
    checks = selftest(embedder, args.golden)
    min_cosine, max_difference = tolerance(embedder.contract)
    passed = sum(not check.failed for check in checks)
    lines = [f"{check.file}\t{', '.join(check.failed) or 'ok'}\t{_measured(check)}" for check in checks]
    lines.append(
        f"{passed} of {len(checks)} golden pictures pass: equal pixels, cosine at least {min_cosine}, difference at"
        f" most {max_difference:g}"
    )
    report = {"model": args.model, "pictures": [check._asdict() for check in checks], "passed": passed == len(checks)}
    _report(args, {**report, "min_cosine": min_cosine, "max_difference": max_difference}, "\n".join(lines))
    refuse_failed(checks)


def _measured(check: "Check") -> str:
    levels = "pixels not comparable" if check.pixel_difference is None else f"pixels differ by {check.pixel_difference}"
    numbers = (
        "no embedding" if check.cosine is None else f"cosine {check.cosine:.6f}\tdifference {check.difference:.2g}"
    )
    return f"{levels}\t{numbers}"


class _Collector:
    """What a command gathers over its batches."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.embeddings: list[Any] = []
        self.skipped: list[dict[str, str]] = []


def _open(args: argparse.Namespace) -> "Embedder":
    from bingo_edge.model import Embedder

    return Embedder(args.model, threads=args.threads)


def _batches(embedder: "Embedder", paths: list[str], result: _Collector) -> Iterator["Embedded"]:
    """The batches that hold a picture, skipped ones reported on stderr; no picture at all is one error instead of many
    lines.
    """
    told, good = 0, False
    for batch in embedder.stream(paths):
        result.skipped += [one._asdict() for one in batch.skipped]
        good = good or bool(batch.names)
        if good:
            for one in result.skipped[told:]:
                print(f"skipped {_shown(one['name'])}: {_shown(one['reason'])}", file=sys.stderr)
            told = len(result.skipped)
            yield batch
    if not good:
        first = "".join(f"; the first, {one['name']}: {one['reason']}" for one in result.skipped[:1])
        raise EdgeError(
            "at least one readable picture", f"{len(result.skipped)} that are not{first}", "give other paths"
        )


def _report(args: argparse.Namespace, report: dict[str, Any], text: str) -> None:
    print(json.dumps(report, indent=None if "embeddings" in report else 2) if args.json else text, flush=True)


def _shown(text: str) -> str:
    """One line that is safe to print, whatever a file is called."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
