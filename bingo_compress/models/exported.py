"""Exported files and what belongs to each: STEM.onnx has STEM.json, STEM.golden/, STEM.linear.npz, STEM.bank.npz and
STEM.toolchains.json beside it, which name its sha256.

Where student.onnx and student-int8.onnx are both in a folder, the second is the first in int8 and was judged against
it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from bingo_edge import EdgeError, Embedder
from bingo_edge.model import network_input
from torch import Tensor
from torch.nn.functional import normalize

from bingo_compress.errors import BingoError
from bingo_compress.runtime import checkpoint, console
from bingo_compress.runtime.made_of import file_digest
from bingo_compress.runtime.run_dir import atomic, atomic_folder

STEM = "student"
# What is ours, the float file first: a user may keep others beside, student-old.onnx.
ROWS = ("onnx", "onnx-fp16", "onnx-int8")
# What a toolchain made of the float file, for its own runtime: each in a folder with its contract and golden pictures.
CONVERTED = {"openvino": "student.xml", "tflite": "student.tflite"}
CONTRACT, GOLDEN = ".json", ".golden"
LINEAR, BANK = ".linear.npz", ".bank.npz"
TOOLCHAINS = ".toolchains.json"
LATENCY, CARD = "latency.json", "MODEL_CARD.md"  # of all files in a folder


def files(folder: Path) -> dict[str, Path]:
    """The exported files in a folder by their rows in a proof, the float file first."""
    return {row: folder / name(row) for row in ROWS if (folder / name(row)).is_file()}


def name(row: str) -> str:
    """The file of a row in a proof: student.onnx of "onnx", student-int8.onnx of "onnx-int8"; openvino/student.xml."""
    return f"{row}/{CONVERTED[row]}" if row in CONVERTED else f"{STEM}{row.removeprefix('onnx')}.onnx"


def converted(folder: Path) -> dict[str, dict[str, Any]]:
    """The contracts of what toolchains made of the float file in a folder, by their rows. A folder of another's that is
    only called so is not among them.
    """
    found = {}
    for row in CONVERTED:
        with contextlib.suppress(OSError, ValueError):
            told = json.loads((folder / name(row)).with_suffix(CONTRACT).read_text(encoding="utf-8"))
            if isinstance(told, dict) and "float_sha256" in told.get("converted", {}):
                found[row] = told
    return found


def opened(file: Path) -> Embedder:
    """An exported file as a device opens it. Raises BingoError."""
    try:
        return Embedder(file)
    except EdgeError as error:
        raise BingoError(f"{file}: {error}; or delete it") from None


def contract(file: Path) -> dict[str, Any]:
    """What an exported file says of itself, as a device reads it, and "file", "bytes" and "sha256" as it is now. Raises
    BingoError.
    """
    held = opened(file)
    return held.contract | {"file": file.name, "bytes": file.stat().st_size, "sha256": held.sha256}


def weights_digest(file: Path) -> str:
    """A hash of the tensors in a safetensors file. Equal weights have one, while the file's bytes differ from save to
    save: safetensors writes what it says of itself in any order. Raises BingoError.
    """
    tensors, _ = checkpoint.load(file)
    return hashlib.sha256(
        "".join(f"{name} {checkpoint.tensor_digest(tensors[name])}\n" for name in sorted(tensors)).encode()
    ).hexdigest()


def heads(file: Path, sha256: str) -> list[Path]:
    """The heads beside a file that were made for just this one."""
    return [path for path in map(file.with_suffix, (LINEAR, BANK)) if path.is_file() and _made_for(path) == sha256]


def _made_for(path: Path) -> str:
    """The digest that a head names; "" where it is not one of ours."""
    try:
        with np.load(path, allow_pickle=False) as held:
            return str(held["model_sha256"])
    except Exception:  # zipfile's, numpy's and zlib's have no common base
        return ""


def put(made: Path, target: Path) -> Path:
    """Move a file with its contract, golden pictures and head to `target`, after all that belonged to another file
    there. Returns `target`.

    A kill in between leaves a file without some of what belongs to it, never one with what belongs to another.
    """
    if not target.is_file() or file_digest(target) != file_digest(made):
        gone = _clear(target)
        if any(name.endswith(".npz") for name in gone):
            console.say(
                f"removed {', '.join(name for name in gone if name.endswith('.npz'))}, of an older {target.name}: run"
                " validate again"
            )
    with atomic(target) as temporary:
        os.replace(made, temporary)
    with atomic_folder(target.with_suffix(GOLDEN)) as folder:
        for path in made.with_suffix(GOLDEN).iterdir():
            os.replace(path, folder / path.name)
    for end in (CONTRACT, LINEAR, BANK):
        if made.with_suffix(end).is_file():
            with atomic(target.with_suffix(end)) as temporary:
                os.replace(made.with_suffix(end), temporary)
    return target


def keep_pair(newest: Path) -> None:
    """Drop what is beside `newest` and not of its export: files that were made of another float file than the one that
    is there; says so.
    """
    found = files(newest.parent)
    exact = found.pop("onnx", None)
    if exact is None:
        return
    others = [file for row, file in found.items() if _made_from(row, file) != file_digest(exact)]
    for file in [exact] if newest in others else others:
        drop(file, f"{newest.name} is of another export; --format all makes all")


def _made_from(row: str, file: Path) -> str | None:
    """The digest of the float file that a file in less precision names."""
    try:
        said: str | None = contract(file).get(row.removeprefix("onnx-"), {}).get("float_sha256")
    except BingoError:
        return None
    return said


def drop(file: Path, why: str) -> None:
    """Delete an exported file, if it is there, with all that belongs to it; says so."""
    gone = [file.name] if file.exists() else []
    file.unlink(missing_ok=True)
    gone += _clear(file)
    if gone:
        console.say(f"removed {', '.join(gone)}: {why}")


def _clear(file: Path) -> list[str]:
    """Delete what belongs to a file, and what tells of all files in its folder. Returns the names of the former."""
    for told in (LATENCY, CARD):
        (file.parent / told).unlink(missing_ok=True)
    gone = []
    for path in map(file.with_suffix, (CONTRACT, GOLDEN, LINEAR, BANK, TOOLCHAINS)):
        if path.exists():
            gone.append(path.name)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for row in converted(file.parent) if file.name == name("onnx") else ():
        gone.append(f"{row}/")
        shutil.rmtree(file.parent / row)
    return gone


def _session(path: Path) -> tuple[onnxruntime.InferenceSession, dict[str, Any], list[str]]:
    """(the file in onnxruntime on the CPU, how its contract says that it takes pixels, its outputs). Raises BingoError
    where it is not one of ours.
    """
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (taken,), names = session.get_inputs(), [output.name for output in session.get_outputs()]
        told = session.get_modelmeta().custom_metadata_map.get("bingo_compress")
        # A graph of bytes can be meant in one way only.
        given = json.loads(told)["input"] if told else {"dtype": taken.type[7:-1]}
        fits = told or given["dtype"] == "uint8"
        if taken.name != "image" or len(taken.shape) != 4 or not fits or not {"embedding", "features"} & set(names):
            raise ValueError(f"{taken.name} {taken.type} {taken.shape} in, {', '.join(sorted(names))} out")
    except Exception as error:  # onnxruntime's have no base of their own
        raise BingoError(
            f"{path}: expected a file that `bingo-compress export` writes, found something else"
            f" ({str(error).partition(chr(10))[0]}); export again or delete it"
        ) from None
    return session, given, names


def runner_by_name(path: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """The file in onnxruntime on the CPU, as a function of uint8 (B, S, S, 3), whatever it takes itself -> its outputs
    by name; a fixed batch is filled up and cut again. Raises BingoError where it is not one of ours.
    """
    return _runner(*_session(path))


def _runner(
    session: onnxruntime.InferenceSession, given: dict[str, Any], names: list[str]
) -> Callable[[Tensor], dict[str, Tensor]]:
    """`runner_by_name` of what `_session` gives."""
    fixed = session.get_inputs()[0].shape[0]

    def once(batch: Tensor) -> list[Tensor]:
        pixels = network_input({"input": given}, np.ascontiguousarray(batch.numpy()))
        return [torch.from_numpy(found) for found in session.run(names, {"image": pixels})]

    def run(batch: Tensor) -> dict[str, Tensor]:
        size = fixed if isinstance(fixed, int) else max(len(batch), 1)
        parts = [once(part[torch.arange(size) % len(part)]) for part in batch.split(size)]
        return {name: torch.cat(kind)[: len(batch)] for name, kind in zip(names, zip(*parts, strict=True), strict=True)}

    return run


def classes_runner(path: Path) -> Callable[[Tensor], Tensor]:
    """`runner_by_name` of a file with classes in it, as a function of uint8 (B, S, S, 3) -> its scores (B, C), with its
    distances as one column more where it has them.
    """
    run = runner_by_name(path)

    def answers(batch: Tensor) -> Tensor:
        found = run(batch)
        return torch.cat([found[name] for name in ("scores", "distance") if name in found], 1)

    return answers


def onnx_runner(path: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """`runner_by_name` as a function of uint8 (B, S, S, 3) -> (embedding, features). Of a file with features alone the
    embedding is made of them. Raises BingoError, for a file without features too.
    """
    session, given, names = _session(path)
    if "features" not in names:
        raise BingoError(
            f"{path}: expected an output features, found {', '.join(names)}; export it with --outputs"
            " embedding,features"
        )
    run = _runner(session, given, names)

    def both(batch: Tensor) -> tuple[Tensor, Tensor]:
        found = run(batch)
        features = found["features"]
        return found["embedding"] if "embedding" in found else normalize(features, dim=1), features

    return both
