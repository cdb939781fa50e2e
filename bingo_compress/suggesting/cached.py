"""Where the students' files are kept, and what is known of each: NAME-PX.onnx.xz, and NAME.json, which is written
last. What a device measures is a copy of this folder.
"""

import os
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from bingo_compress.errors import BingoError
from bingo_compress.runtime import run_dir
from bingo_compress.runtime.made_of import file_digest

FORMAT = 2  # of the files: raised where they are made otherwise
PACKED = ".onnx.xz"
MAKING = ".making-"  # what the folders begin with in which files are made


class Size(NamedTuple):
    """A student at one input size. file: its packed ONNX file, sha256: of that; bytes: of the float file unpacked;
    made: how.
    """

    student: str
    px: int
    parameters: int
    file: str
    sha256: str
    bytes: int
    made: str


def folder() -> Path:
    """The folder of these versions of what the files are made by, in the user's cache."""
    own = os.environ.get("XDG_CACHE_HOME", "")
    mac = Path("~/Library/Caches") if sys.platform == "darwin" else Path("~/.cache")
    makers = "-".join(f"{name}{version(name)}" for name in ("timm", "torch", "onnx"))
    return (Path(own) if os.path.isabs(own) else mac.expanduser()) / "bingo-compress" / f"edge{FORMAT}-{makers}"


def sizes_of(student: str, where: Path) -> list[Size] | None:
    """What is in the folder of a student; None where it is not there, or not as it was written."""
    try:
        told = run_dir.read_json("suggest", where / f"{student}.json")
        found = [Size(**entry) for entry in told["sizes"]]
        whole = all(file_digest(where / each.file) == each.sha256 for each in found)
    except (BingoError, KeyError, TypeError, OSError):
        return None
    return found if whole else None


def refused(student: str, where: Path) -> dict[str, str]:
    """Why there is no file of a student at some sizes, by size."""
    told: dict[str, Any] = run_dir.read_json("suggest", where / f"{student}.json")
    return dict(told.get("refused", {}))


def copy(sizes: Iterable[Size], where: Path, target: Path) -> None:
    """Copy the files of these sizes to a folder, each whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for each in sizes:
        with run_dir.atomic(target / each.file) as temporary:
            shutil.copyfile(where / each.file, temporary)
