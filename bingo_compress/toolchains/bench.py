"""An exported file in every toolchain that is at hand: its golden pictures in, what comes out against golden.json."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bingo_edge.golden import tolerance
from bingo_edge.model import network_input
from numpy.typing import NDArray

from bingo_compress.errors import BingoError
from bingo_compress.models import exported
from bingo_compress.presenting import model_card
from bingo_compress.presenting.toolchain_table import HEADER, cells
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import RunDir, made_by, read_json, refuse_no_file, write_text
from bingo_compress.toolchains import child
from bingo_compress.toolchains.judging import HALF, judged
from bingo_compress.toolchains.place import NoAnswer, Outputs, Place, answers, places, version, way

WRONG = 3


@dataclass(frozen=True)
class Golden:
    """n pictures as uint8 (n, S, S, 3), and what the file answered to them: (n, D) by the names of its outputs."""

    pixels: NDArray[np.uint8]
    outputs: Outputs


def verify(
    file: Path, names: str, pythons: Sequence[str], seconds: float, json_file: Path | None = None
) -> list[dict[str, Any]]:
    """Run the golden pictures of an exported file in toolchains, one after another, each in a process of its own; print
    a table. Returns its rows: toolchain, version, verdict (right, wrong, cannot run it, crashed, too slow, not
    installed), cause, and, where something came out, what `judged` tells.

    names: toolchains with commas between, "" for all that are installed. pythons: NAME=PYTHON, where a toolchain is
    installed elsewhere. seconds: that one may take. All rows go to `json_file`; those that ran are kept beside the file
    and told in its card. Raises BingoError: exit status 3 where an answer is wrong, or where a toolchain that was named
    gives none.
    """
    refuse_no_file(json_file, "--json")
    if not seconds > 0:
        raise BingoError(f"--seconds: expected more than 0, found {seconds:g}; give a larger number")
    tried = places(names, pythons)
    contract = exported.contract(file)
    golden = _golden(file, contract)
    versions = [version(place) for place in tried]
    rows = []
    for place, there in zip(tried, versions, strict=True):
        if there:
            console.say(f"{place.toolchain} {there} ...")
        row = {"toolchain": place.toolchain, "version": there or "", "verdict": "not installed", "cause": ""}
        found = _tried(place, file, contract, golden, seconds) if there else {"cause": way(place.toolchain)}
        rows.append(row | found)
    console.table(f"{file}: {len(golden.pixels)} golden pictures", HEADER, cells(rows))
    _keep(file, contract["sha256"], [row for row in rows if row["version"]])
    if json_file:
        held = {"file": file.name, "sha256": contract["sha256"], "pictures": len(golden.pixels), "rows": rows}
        write_text(json_file, json.dumps(held, indent=2) + "\n")
    _refuse(file, rows, tried)
    return rows


def _golden(file: Path, contract: dict[str, Any]) -> Golden:
    """The golden pictures beside a file. Raises BingoError where they are not whole, or another file's."""
    path = file.with_suffix(exported.GOLDEN) / "golden.json"
    if not path.is_file():
        raise BingoError(f"FILE: expected its golden pictures at {path}, found none; export again, or copy them along")
    held, size = read_json("export", path), int(contract["input"]["size"])
    with made_by("export", path):
        if held["sha256"] != contract["sha256"]:
            raise ValueError(f"golden pictures of another file than {file.name}")
        raws = [_intact(path.parent, entry) for entry in held["images"]]
        pixels = np.stack([np.frombuffer(raw, np.uint8).reshape(size, size, 3) for raw in raws])
        outputs = {
            name: np.array([entry[name] for entry in held["images"]], np.float64)
            for name in _outputs(file)
            if all(name in entry for entry in held["images"])
        }
        if not outputs or not all(values.ndim == 2 and np.isfinite(values).all() for values in outputs.values()):
            raise ValueError("no finite output of each picture")
    return Golden(pixels, outputs)


def _intact(folder: Path, entry: dict[str, Any]) -> bytes:
    """The network's input of a golden picture; its name may not lead out of the folder."""
    if not re.fullmatch(r"\w[\w.-]*", entry["rgb"]):
        raise ValueError(f"the file name {entry['rgb']!r}")
    path = folder / entry["rgb"]
    raw = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(raw).hexdigest() != entry["rgb_sha256"]:
        raise ValueError(f"{path.name} is missing or damaged")
    return raw


def _outputs(file: Path) -> list[str]:
    return [output.name for output in onnx.load(file, load_external_data=False).graph.output]


def _tried(place: Place, file: Path, contract: dict[str, Any], golden: Golden, seconds: float) -> dict[str, Any]:
    """What came of a toolchain that is installed: verdict, cause and figures."""
    try:
        found, _ = answers(place, file, network_input(contract, golden.pixels), seconds)
    except NoAnswer as nothing:
        return {"verdict": nothing.verdict, "cause": nothing.cause}
    least = tolerance(contract)[0]
    if child.TOOLCHAINS[place.toolchain].half:
        least = min(least, HALF)
    told = judged(golden.outputs, {name: found[name] for name in golden.outputs}, least)
    return told | {"cause": told.get("cause", "") or _hint(place, contract, told["verdict"])}


def _hint(place: Place, contract: dict[str, Any], verdict: str) -> str:
    """What is known of a wrong answer."""
    if verdict == "wrong" and place.toolchain == "opencv" and contract.get("precision") == "int8":
        return "OpenCV 5's new engine has int8 wrong: read the file with cv2.dnn.ENGINE_CLASSIC"
    return ""


def _keep(file: Path, sha256: str, rows: list[dict[str, Any]]) -> None:
    """Put what ran beside the file, in place of what the same toolchains said before; and renew its card."""
    path = file.with_suffix(exported.TOOLCHAINS)
    before = read_json("verify", path)
    with made_by("verify", path):
        old = before["rows"] if before.get("sha256") == sha256 else []
        again = {(row["toolchain"], row["version"]) for row in rows}
        all_rows = [row for row in old if (row["toolchain"], row["version"]) not in again] + rows
        ran = {row["toolchain"] for row in all_rows}
    held = {"sha256": sha256, "rows": all_rows, "not_run": [name for name in child.TOOLCHAINS if name not in ran]}
    write_text(path, json.dumps(held, indent=2) + "\n")
    run = RunDir(file.resolve().parent.parent)
    if run.export == file.resolve().parent and run.as_run.is_file() and (run.export / exported.CARD).is_file():
        model_card.renew(run, run.export)


def _refuse(file: Path, rows: list[dict[str, Any]], places: list[Place]) -> None:
    """Raise BingoError (exit status 3) for a wrong answer, or none where one was asked for."""
    bad = [
        f"{row['toolchain']} {row['version']}: {row['verdict']}"
        for row, place in zip(rows, places, strict=True)
        if row["verdict"] == "wrong" or (place.asked and row["verdict"] != "right")
    ]
    if bad:
        raise BingoError(
            f"{file}: expected the answers of its golden pictures, found {'; '.join(bad)}; do not use the file there,"
            " try --profile edge or another student",
            WRONG,
        )
