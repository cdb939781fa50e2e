"""A Parquet file with a column of images as bytes, as the hubs lay out theirs; read by pyarrow, which is an extra."""

import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from bingo_compress.errors import BingoError, nearest
from bingo_compress.sources.listed import Columns, Listed, Names, stamp_of

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "png", "bytes")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "fine_label")
HELD = 2  # groups of rows in memory: images are asked for in order, by several threads


def matches(path: Path) -> bool:
    """Whether it is a Parquet file by its name."""
    return path.name.lower().endswith(".parquet") and os.path.isfile(path)


def listed(path: Path, columns: Columns) -> Listed:
    """Images of a Parquet file, named by their rows, and their labels where there is such a column. Raises
    BingoError.
    """
    try:
        import pyarrow.parquet as reader
    except ImportError:
        raise BingoError(
            f"expected pyarrow to read {path}, found none; pip install 'bingo-compress[parquet]'"
        ) from None
    try:
        file = reader.ParquetFile(path)
    except Exception as error:  # pyarrow's own have no common base
        raise BingoError(f"expected a Parquet file, found something else: {path} ({error})") from None
    schema = file.schema_arrow
    image = _image_column(path, schema, columns.image)
    label = _label_column(path, schema, columns.label)
    groups = _Groups(file, image)
    count = file.metadata.num_rows
    width = max(6, len(str(max(count - 1, 0))))
    return Listed(
        Names(f"{number:0{width}d}" for number in range(count)),
        (),
        groups.read,
        lambda index: stamp_of(path),
        partial(_labels, file, label) if label else lambda: [""] * count,
    )


def _is_binary(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary")


def _holds_images(kind: Any) -> bool:
    """Whether a column is of bytes, or of a struct that has bytes."""
    if _is_binary(kind):
        return True
    try:
        return _is_binary(kind.field("bytes").type)
    except (AttributeError, KeyError, TypeError):
        return False


def _image_column(path: Path, schema: Any, wanted: str) -> str:
    held = [name for name in schema.names if _holds_images(schema.field(name).type)]
    if wanted:
        if wanted not in held:
            raise BingoError(
                f"--image-column {wanted}: expected a column of images as bytes in {path}, which has"
                f" {', '.join(held) or 'none'}"
            )
        return wanted
    if not held:
        raise BingoError(
            f"expected a column of images as bytes in {path}, found columns {', '.join(schema.names)}; give the images"
            " as a folder or a list"
        )
    return next((name for name in IMAGE_NAMES if name in held), held[0])


def _label_column(path: Path, schema: Any, wanted: str) -> str:
    if wanted and wanted not in schema.names:
        raise BingoError(
            f"--label-column {wanted}: expected a column of {path}, which has {', '.join(schema.names)}; the"
            f" nearest is {nearest(wanted, schema.names, 1)[0]}"
        )
    return wanted or next((name for name in LABEL_NAMES if name in schema.names), "")


def _labels(file: Any, column: str) -> Sequence[str]:
    """Class names: of the hubs' metadata where a class is a number in them, else the values themselves."""
    values = file.read(columns=[column])[column].to_pylist()
    said = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    names = said.get("info", {}).get("features", {}).get(column, {}).get("names") if isinstance(said, dict) else None
    if isinstance(names, list):
        return [str(names[value]) if isinstance(value, int) and 0 <= value < len(names) else "" for value in values]
    return ["" if value is None else str(value) for value in values]


class _Groups:
    """Images by their rows, a few groups of rows in memory."""

    def __init__(self, file: Any, column: str) -> None:
        self.file, self.column = file, column
        counts = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        self.starts = [0, *accumulate(counts)]
        self.held: OrderedDict[int, Any] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, row: int) -> bytes:
        number = bisect_right(self.starts, row) - 1
        with self.lock:
            if number not in self.held:
                try:
                    self.held[number] = self.file.read_row_group(number, columns=[self.column])[self.column]
                except Exception as error:
                    raise OSError(f"damaged in its file ({error})") from None
                while len(self.held) > HELD:
                    self.held.popitem(last=False)
            values = self.held[number]
        value = values[row - self.starts[number]].as_py()
        found = value.get("bytes") if isinstance(value, dict) else value
        if not found:
            raise OSError("no bytes in this row")
        return bytes(found)
