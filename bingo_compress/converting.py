"""The float file in the form of a runtime of its own: what its toolchain makes of it, and the proof that it is the same
model.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bingo_edge.image import load_image, preprocess_from
from bingo_edge.model import network_input
from torch import Tensor

from bingo_compress.errors import BingoError
from bingo_compress.exporters.golden import drawn, write_golden
from bingo_compress.exporters.onnx import MIN_COSINE, REFUSED, Form
from bingo_compress.models import exported
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import atomic_folder, write_text
from bingo_compress.toolchains.judging import judged
from bingo_compress.toolchains.place import NoAnswer, Place, answers, places, version

SECONDS = 1800.0  # for a toolchain to convert a file and to run it on all pictures


def opened(rows: list[str], pythons: tuple[str, ...], wanted: Form) -> list[tuple[Place, str]]:
    """The toolchains that some of `rows` need, each with its version. pythons: NAME=PYTHON, where it is installed
    elsewhere. Raises BingoError where one is not there, or cannot take a file of this form.
    """
    names = [row for row in rows if row in exported.CONVERTED]
    if pythons and not names:
        raise BingoError(f"--python: expected --format {' or '.join(exported.CONVERTED)} beside it, found none")
    if "tflite" in names and (wanted.taken == "uint8-nhwc" or not wanted.batch):
        raise BingoError(
            "--format tflite: expected a fixed batch and float pixels by channels, found another form; give --profile"
            " edge"
        )
    if strange := {each.partition("=")[0] for each in pythons} - set(names):
        raise BingoError(f"--python: expected {' or '.join(names)} alone, found {', '.join(sorted(strange))}")
    # Asked for by name, so one that is not installed is refused there.
    return [(place, version(place) or "") for place in places(",".join(names), pythons, "--format") if names]


def convert(float_file: Path, place: Place, what: str, images: Tensor) -> Path:
    """Write the folder NAME beside the float file, whole or not at all, in place of an older one: what the toolchain
    NAME made of it, with its contract and golden pictures. Returns the file.

    what: the toolchain's version; images: uint8 (n, S, S, 3), the user's own. Raises BingoError (exit status 3) unless
    it answers to them, and to the golden pictures, what the float file does: outputs at a cosine of 0.9999, their
    lengths included.
    """
    name, target = place.toolchain, float_file.parent / place.toolchain
    if target.exists() and name not in exported.converted(target.parent):
        raise BingoError(f"{target}: expected no such folder, or one of an earlier export; move it away")
    console.say(f"{name} {what} makes a file of its own ...")
    contract = exported.contract(float_file)
    golden = [preprocess_from(contract, load_image(io.BytesIO(picture))) for picture in drawn().values()]
    pixels = torch.cat([images, torch.from_numpy(np.stack(golden))])
    expected = exported.runner_by_name(float_file)(pixels)
    with atomic_folder(target) as folder:
        try:
            given = network_input(contract, pixels.numpy())
            found, told = answers(place, float_file, given, SECONDS, folder)
        except NoAnswer as nothing:
            raise BingoError(f"export refused, no {name} file written: {nothing}", REFUSED) from None
        exact = {key: values.reshape(len(pixels), -1).double().numpy() for key, values in expected.items()}
        parity = judged(exact, found, MIN_COSINE)
        if parity["verdict"] != "right":
            why = parity.get("cause") or f"smallest cosine {parity['min_cosine']:.6f}"
            raise BingoError(
                f"export refused, no {name} file written: expected the float file's answers, found others ({why}); use"
                " the ONNX file",
                REFUSED,
            )
        file = folder / exported.CONVERTED[name]
        contract["converted"] = {"by": f"{name} {what}", "float_sha256": contract["sha256"]}
        made = _files(folder)
        contract |= {"file": file.name, "files": made, **made[file.name]}
        contract["parity"] = {"images": len(images), **{key: parity[key] for key in ("min_cosine", "max_difference")}}
        _take_over(contract, told)
        rows = iter(range(len(images), len(pixels)))

        def answer(_: Tensor) -> dict[str, Tensor]:
            row = next(rows)
            return {key: torch.from_numpy(values[row : row + 1]) for key, values in found.items()}

        write_golden(file, contract, answer)
        write_text(file.with_suffix(exported.CONTRACT), json.dumps(contract, indent=2) + "\n")
    console.say(
        f"{target / file.name}: {console.size(sum(each['bytes'] for each in contract['files'].values()))}; smallest"
        f" cosine to the ONNX file {parity['min_cosine']:.6f} on {len(images)} of your images"
    )
    return target / file.name


def _take_over(contract: dict[str, Any], told: dict[str, Any]) -> None:
    """By which signature the toolchain's file is called, and where it takes the channels."""
    if told:
        contract["signature"] = told["signature"]
        contract["input"] |= {"layout": "NHWC" if told["shape"][3] == 3 else "NCHW"}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file in a folder."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    }
