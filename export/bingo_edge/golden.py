"""A model's own check: pictures exported with it, the pixels the network must see of each and the embedding it must
answer.
"""

import hashlib
import io
import json
import re
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bingo_edge.errors import EdgeError
from bingo_edge.image import ImageError, load_image, preprocess_from
from bingo_edge.model import AGAIN, Embedder, both, network_input

FAILED = 3
TODO = {
    "damaged": "copy the golden folder again",
    "pixels": "install the Pillow version of the machine that exported",
    "embedding": f"update onnxruntime or {AGAIN}",
    "features": f"update onnxruntime or {AGAIN}",
    "scores": f"update onnxruntime or {AGAIN}",
}
# Of a probability, by precision, where embeddings differ by no more than `tolerance` allows: 16 bits alone move one by
# 0.001, and more where a head is sure.
MAX_SCORE_DIFFERENCE = {"float32": 0.01, "float16": 0.1}


class Check(NamedTuple):
    """One golden picture. failed: which of "damaged", "pixels", "embedding", "features", "scores"; empty where all is
    well. None where there is no such number.

    pixel_difference: largest difference of the network's input, in levels of 255; 0 is equal to the bit. cosine, and
    difference, the largest of a value: of the embedding here and the exported one.
    """

    file: str
    failed: tuple[str, ...]
    pixel_difference: int | None
    cosine: float | None
    difference: float | None


class _Golden(NamedTuple):
    file: str
    sha256: str
    rgb: str
    rgb_sha256: str
    embedding: NDArray[np.float64]
    features: NDArray[np.float64]  # (0,) where none are held
    scores: NDArray[np.float64]  # the same


def selftest(embedder: Embedder, folder: str | PathLike[str] | None = None) -> list[Check]:
    """Check a model on the pictures exported with it, in `<stem>.golden` beside it unless `folder` says where.

    The network sees the exported pixels, so that a wrong embedding is never the decoder's fault. A picture that fails
    is in the result, with `failed`. Raises EdgeError where there are no pictures, or not this very file's.
    """
    home = Path(embedder.path).with_suffix(".golden") if folder is None else Path(folder)
    return [_check(embedder, home, golden) for golden in _read(embedder, home / "golden.json")]


def tolerance(contract: dict[str, Any]) -> tuple[float, float]:
    """(smallest cosine, largest difference of a value) at which two embeddings pass for the same."""
    precision = contract.get("precision", "float32")
    if precision == "float32":
        return 0.9999, 1e-4
    if precision == "float16":  # whose steps are a two-thousandth of a value
        return 0.999, 0.02
    # Int8 kernels differ between processors; no value of two vectors of length one differs by more than 2.
    return (
        0.99,
        2.0,
    )


def refuse_failed(checks: list[Check]) -> None:
    """Raise EdgeError (exit status 3) that says how many pictures failed, and how."""
    kinds = {kind: sum(kind in check.failed for check in checks) for kind in TODO}
    if any(kinds.values()):
        bad = sum(bool(check.failed) for check in checks)
        found = f"{bad} that do not ({', '.join(f'{kind} {count}' for kind, count in kinds.items() if count)})"
        raise EdgeError(
            f"{len(checks)} golden pictures to pass",
            found,
            ", ".join(TODO[kind] for kind in kinds if kinds[kind]),
            FAILED,
        )


def _check(embedder: Embedder, home: Path, golden: _Golden) -> Check:
    size = int(embedder.contract["input"]["size"])
    picture, raw = _intact(home / golden.file, golden.sha256), _intact(home / golden.rgb, golden.rgb_sha256)
    if raw is None or len(raw) != size * size * 3:
        return Check(golden.file, ("damaged",), None, None, None)
    expected = np.frombuffer(raw, np.uint8).reshape(size, size, 3)
    pixel_difference = None if picture is None else _pixel_difference(embedder.contract, picture, expected)
    found = embedder.run(network_input(embedder.contract, expected[None]))
    embedding, features = (rows[0].astype(np.float64) for rows in both(found, 1))
    cosine, difference = _compared(embedding, golden.embedding)
    near = _near(embedder.contract, cosine, difference)
    same = True
    if golden.features.size and features.size:
        largest = max(float(np.abs(golden.features).max()), 1e-12)
        same = _near(embedder.contract, *_compared(features / largest, golden.features / largest))
    wrong = {"damaged": picture is None, "pixels": picture is not None and pixel_difference != 0}
    wrong |= {"embedding": not near, "features": not same}
    wrong["scores"] = "scores" in found and not _same_scores(embedder.contract, found["scores"][0], golden.scores)
    return Check(golden.file, tuple(kind for kind in wrong if wrong[kind]), pixel_difference, cosine, difference)


def _compared(found: NDArray[np.float64], golden: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Cosine and largest difference of a value; None where a value is not finite."""
    if found.shape != golden.shape or not np.isfinite(found).all():
        return None, None
    lengths = float(np.linalg.norm(found) * np.linalg.norm(golden))
    return float(found @ golden) / max(lengths, 1e-12), float(np.abs(found - golden).max())


def _same_scores(contract: dict[str, Any], found: NDArray[Any], golden: NDArray[np.float64]) -> bool:
    """Whether scores are probabilities, and of a file in float those that were exported: of an int8 file they may be
    others on another processor, as its embeddings may.
    """
    if found.shape != golden.shape or not (np.isfinite(found).all() and abs(float(found.sum()) - 1) < 1e-3):
        return False
    allowed = MAX_SCORE_DIFFERENCE.get(contract.get("precision", "float32"), 1.0)
    return float(np.abs(found - golden).max()) <= allowed


def _near(contract: dict[str, Any], cosine: float | None, difference: float | None) -> bool:
    min_cosine, max_difference = tolerance(contract)
    return cosine is not None and difference is not None and cosine >= min_cosine and difference <= max_difference


def _pixel_difference(contract: dict[str, Any], picture: bytes, expected: NDArray[np.uint8]) -> int | None:
    try:
        seen = preprocess_from(contract, load_image(io.BytesIO(picture)))
    except ImageError:
        return None
    return int(np.abs(seen.astype(int) - expected).max())


def _intact(path: Path, sha256: str) -> bytes | None:
    """What is in a file, None where that is not what was exported."""
    try:
        data = path.read_bytes() if path.is_file() else b""  # a pipe would be waited for
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _golden(entry: dict[str, Any]) -> _Golden:
    words = {key: entry[key] for key in ("file", "sha256", "rgb", "rgb_sha256")}
    return _Golden(
        **words,
        embedding=np.array(entry["embedding"], np.float64),
        features=np.array(entry.get("features", []), np.float64),  # files of before 2026-11-27 held none
        scores=np.array(entry.get("scores", []), np.float64),
    )


def _read(embedder: Embedder, path: Path) -> list[_Golden]:
    """The pictures that golden.json names. Raises EdgeError unless it is whole, and of this very model file."""
    todo = f"{AGAIN}, or copy the whole folder along"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        version, made_for = held["format"], held["sha256"]
        found = [_golden(entry) for entry in held["images"]]
    except (FileNotFoundError, NotADirectoryError):
        raise EdgeError(
            "golden pictures of the model", f"no file at {path}", f"{todo}, or name it with --golden"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise EdgeError("a whole golden.json", f"{path} ({type(error).__name__}: {error})", todo) from None
    if version != 1:
        raise EdgeError("golden.json of format 1", f"format {version} in {path}", "update bingo-edge")
    if made_for != embedder.sha256:
        raise EdgeError(
            f"golden pictures of the model with sha256 {embedder.sha256}", f"those of {made_for} in {path}", todo
        )
    for name in (name for golden in found for name in (golden.file, golden.rgb)):
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):  # a path could lead out of the folder
            raise EdgeError("plain file names in golden.json", f"{name!r} in {path}", todo)
    lengths = [float(np.linalg.norm(golden.embedding)) for golden in found if golden.embedding.shape == (embedder.dim,)]
    if not found or len(lengths) < len(found) or not all(abs(length - 1) < 0.01 for length in lengths):
        raise EdgeError(f"pictures with embeddings of {embedder.dim} values and length one", f"others in {path}", todo)
    return found
