"""A list of images: a text file with a path a line, a label behind it or not, or a table with a column of paths."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from bingo_compress.errors import BingoError, nearest
from bingo_compress.runtime import console
from bingo_compress.sources.listed import Columns, Listed, Names, refusal, stamp_of

IMAGE_NAMES = (
    "image",
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "img",
    "image_id",
)
LABEL_NAMES = ("label", "class", "class_name", "category", "target", "species")


def matches(path: Path) -> bool:
    """Whether it is a list by its name."""
    return path.suffix.lower() in (".txt", ".csv", ".tsv") and os.path.isfile(path)


def listed(path: Path, columns: Columns) -> Listed:
    """The files that a list names, in its order, each once; paths are relative to the list's folder. Labels are of the
    label's column; without one, of the first folder that tells images apart. Raises BingoError.
    """
    is_text = path.suffix.lower() == ".txt"
    lines, said = _text_list(path) if is_text else _table(path, columns)
    files = Names()
    labels: list[str] = []
    bad: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    repeated = 0
    two: tuple[str, str, str] | None = None
    for number, line in enumerate(lines):
        place = path.parent / os.path.expanduser(line)
        label = said[number] if said else ""
        if line in seen:
            repeated += 1
            if two is None and seen[line] != label:
                two = line, seen[line], label
            continue
        seen[line] = label
        if reason := refusal(line) or _unusable(place):
            bad.append((line, reason))
            continue
        files.append(line)
        if said:
            labels.append(label)
    base = path.parent

    def told() -> Sequence[str] | None:
        if columns.label and is_text:
            console.say(f"--label-column {columns.label}: not of {path}, a list without columns")
        if two:
            raise BingoError(
                f"labels: expected one label an image in {path}, found {two[0]} as {two[1]!r} and as {two[2]!r}; leave"
                " one of the two lines out"
            )
        return labels if said else None

    return Listed(
        files,
        tuple(bad),
        lambda index: base / os.path.expanduser(files[index]),
        lambda index: stamp_of(base / os.path.expanduser(files[index])),
        told,
        repeated=repeated,
        wrapped=True,
    )


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises BingoError."""
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _text_list(path: Path) -> tuple[list[str], list[str]]:
    """(paths, labels): a label stands after a path and a space, where the first line is no file but would be without
    its last word.
    """
    lines = lines_of(path)
    first = lines[0].rsplit(maxsplit=1) if lines else []
    if len(first) < 2 or _there(path, lines[0]) or not _there(path, first[0]):
        return lines, []
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    return [pair[0] for pair in pairs], [pair[1] if len(pair) > 1 else "" for pair in pairs]


def _there(path: Path, line: str) -> bool:
    return os.path.isfile(path.parent / os.path.expanduser(line))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BingoError(f"expected a list in UTF-8, found other bytes in {path}; save it as UTF-8") from None
    except OSError as error:
        raise BingoError(f"{path} cannot be read ({error.strerror})") from None


def _table(path: Path, columns: Columns) -> tuple[list[str], list[str]]:
    """(the column of images, the column of labels, empty where there is none)."""
    text = _text(path)
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=text.partition("\n")[0].count)
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=separator) if any(row)]
    if not rows:
        raise BingoError(f"expected a table with a line of names, found an empty file: {path}")
    header = [name.strip() for name in rows[0]]
    image = _column(path, header, columns.image, IMAGE_NAMES, "image-column")
    if image is None:
        raise BingoError(
            f"expected a column of image files in {path}, found columns {', '.join(header)}; say which with"
            " --image-column NAME"
        )
    label = _column(path, header, columns.label, LABEL_NAMES, "label-column")
    for number, row in enumerate(rows[1:], 2):
        if len(row) <= max(image, label or 0):
            raise BingoError(f"{path}, line {number}: expected {len(header)} values, found {len(row)}; mend the table")
    images = [row[image].strip() for row in rows[1:]]
    return images, [] if label is None else [row[label].strip() for row in rows[1:]]


def _column(path: Path, header: Sequence[str], wanted: str, known: Sequence[str], setting: str) -> int | None:
    if wanted:
        if wanted not in header:
            raise BingoError(
                f"--{setting} {wanted}: expected a column of {path}, which has {', '.join(header)}; the nearest is"
                f" {nearest(wanted, header, 1)[0]}"
            )
        return header.index(wanted)
    lower = [name.lower() for name in header]
    found = next((lower.index(name) for name in known if name in lower), None)
    return 0 if found is None and len(header) == 1 and setting == "image-column" else found


def _unusable(place: Path) -> str:
    size = stamp_of(place)[0]
    return "no such file" if size < 0 else "not a regular file" if not place.is_file() else "" if size else "empty file"
