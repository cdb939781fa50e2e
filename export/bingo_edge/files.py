"""Finding pictures, and reading and writing npz files."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from bingo_edge.errors import EdgeError
from bingo_edge.image import ImageError, Pixels, load_image
from bingo_edge.tiff import Bands

MOST_PACKED = 20  # times: embeddings hardly pack at all; what packs a thousandfold is there to fill the memory

Source = str | PathLike[str] | Pixels
# A name, and a load that returns uint8 (height, width, 3) or raises ImageError.
Picture = tuple[str, Callable[[], Pixels]]


def pictures(sources: Source | Iterable[Source], bands: Bands = ()) -> Iterator[Picture]:
    """Every picture of a path, a folder, an array, or an iterable of these, in order and lazily.

    Arrays are uint8 (height, width, 3) and are named "array 0", "array 1", .. by their place.
    bands: as in `load_image`. Nothing is decoded here.
    """
    single = isinstance(sources, str | PathLike) or (isinstance(sources, np.ndarray) and sources.ndim == 3)
    many: Iterable[Any] = [sources] if single else sources  # type: ignore[assignment]
    for place, source in enumerate(many):
        if isinstance(source, np.ndarray):
            yield f"array {place}", partial(_checked, source)
        else:
            yield from walk(os.fspath(source), bands)


def walk(top: str, bands: Bands = ()) -> Iterator[Picture]:
    """Every regular file under `top` (or `top` itself), sorted by name folder by folder, whatever its suffix.

    Links are followed, and each real file or folder is met once, so a loop of links ends. A broken link and a folder
    that cannot be listed are yielded too, to be reported; pipes and devices inside a folder are passed over.
    """
    seen: set[str] = set()
    stack = [top]
    while stack:
        path = stack.pop()
        if not os.path.exists(path):
            yield path, partial(load_image, path, bands=bands)
            continue
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        if os.path.isdir(path):
            try:
                names = sorted(os.listdir(path), reverse=True)
            except OSError as error:
                yield path, partial(_refuse, f"folder cannot be listed: {error.strerror}")
            else:
                stack.extend(os.path.join(path, name) for name in names)
        elif os.path.isfile(path):
            yield path, partial(load_image, path, bands=bands)
        elif path == top:
            yield path, partial(_refuse, "not a regular file")


def _checked(pixels: NDArray[Any]) -> Pixels:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ImageError(f"{pixels.dtype} array {pixels.shape}, not uint8 (height, width, 3)")
    return pixels


def _refuse(reason: str) -> NoReturn:
    raise ImageError(reason)


def read_npz(
    path: str | PathLike[str], what: str, makers: dict[str, tuple[str, ...]], sha256: str, todo: str
) -> tuple[str, dict[str, NDArray[Any]]]:
    """Read an npz file without pickle; `makers` gives the keys each kind of file must have, and the first kind that
    fits wins.

    sha256: of the open model file, which `model_sha256` in the npz file must be: another file's numbers would mean
    nothing to it; todo: what to do where it is not. Returns the kind and every array of the file. Raises EdgeError.
    """
    needed = " or ".join(f"{kind} ({', '.join(keys)})" for kind, keys in makers.items())
    try:
        with np.load(path, allow_pickle=False) as file:
            unpacked = sum(entry.file_size for entry in file.zip.infolist())
            if unpacked > MOST_PACKED * os.path.getsize(path) + (1 << 24):
                raise ValueError(f"{unpacked:,} bytes when unpacked, from a file of {os.path.getsize(path):,}")
            found = next((kind for kind, keys in makers.items() if set(keys) <= set(file.files)), "")
            arrays = {key: file[key] for key in file.files} if found else {}
            held = ", ".join(file.files) or "nothing"
    except FileNotFoundError:
        raise EdgeError(what, f"no file at {os.fspath(path)}", "check the path") from None
    except Exception as error:
        raise EdgeError(
            what, f"{os.fspath(path)} ({error or type(error).__name__})", "make the npz file again"
        ) from None
    if not found:
        raise EdgeError(f"{what}: {needed}", f"{os.fspath(path)} with {held}", "give another npz file")
    made_for = str(arrays["model_sha256"]) if "model_sha256" in arrays else ""
    if made_for != sha256:
        whose = f"that of {made_for[:64]}" if made_for else "one that does not say whose it is"
        raise EdgeError(f"{what} of the model file with sha256 {sha256}", f"{whose} in {os.fspath(path)}", todo)
    return found, arrays


def unit_rows(embeddings: NDArray[Any], path: str | PathLike[str]) -> NDArray[np.float32]:
    """float (N, D) rows as float32, after a check that they are L2-normalised. Raises EdgeError."""
    found = f"{embeddings.dtype} {embeddings.shape} in {os.fspath(path)}"
    if embeddings.ndim != 2 or 0 in embeddings.shape or embeddings.dtype.kind != "f":
        raise EdgeError("embeddings of shape (N, D) with N, D > 0", found, "make the npz file again")
    rows = embeddings.astype(np.float32)
    if not (
        np.abs(np.linalg.norm(rows, axis=1) - 1) < 0.01
    ).all():  # float16 rounding stays far below 0.01; a NaN fails too
        raise EdgeError(
            "L2-normalised embeddings", f"rows of another length in {os.fspath(path)}", "make the npz file again"
        )
    return rows


def check_out(path: Path) -> None:
    """Raise EdgeError now rather than after an hour of work when `path` cannot be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise EdgeError("a file name in a folder that can be written", str(path), "choose another --out")


def write_npz(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays whole or not at all: a reader never sees half a file, and a failure leaves the old one. Raises
    EdgeError.
    """
    _write(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def write_text(path: Path, text: str) -> None:
    """The same of text."""
    _write(path, lambda file: file.write(text.encode()))


def _write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise EdgeError(
            f"to write {path}", error.strerror or str(error), "free space or choose another --out"
        ) from None
    finally:
        beside.unlink(missing_ok=True)
