"""An int8 file on photos in other toolchains: is it as near to its float file there as in onnxruntime?

python benchmarks/int8_elsewhere.py EXPORT_FOLDER ... --photos FOLDER [--with openvino,opencv] [--images 64]
[--python NAME=PYTHON ...]

EXPORT_FOLDER holds student.onnx and student-int8.onnx. `verify` judges by drawn pictures, which no student was
calibrated on; here are photos. Cosines of embeddings, mean and smallest, to the float file in onnxruntime; and the
share of an image's five nearest others that stay.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bingo_edge import Embedder
from bingo_edge.model import network_input
from numpy.typing import NDArray

from bingo_compress.models import exported
from bingo_compress.toolchains.bench import Place, _places, _ran, _version

NEAR = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--with", dest="names", default="openvino,opencv")
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600.0)
    chosen = parser.parse_args()
    places = [place for place in _places(f"onnxruntime,{chosen.names}", chosen.python) if _version(place)]
    photos = sorted(path for path in chosen.photos.rglob("*") if path.is_file())
    photos = photos[:: max(1, len(photos) // chosen.images)][: chosen.images]
    for folder in chosen.folders:
        exact, file = Embedder(folder / exported.name("onnx")), folder / exported.name("onnx-int8")
        pixels = np.stack([pixels_of(exact, photo) for photo in photos])
        expected = exact.infer(pixels)[0]
        print(f"{file} on {len(photos)} photos: {Embedder(file).contract['int8']['rung']}")
        for place in places:
            try:
                found = embeddings(place, file, pixels, chosen.seconds)
            except (OSError, subprocess.SubprocessError) as error:
                print(f"  {place.toolchain} {_version(place)}: no answer ({type(error).__name__})")
                continue
            cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
            print(
                f"  {place.toolchain} {_version(place)}: mean {cosines.mean():.4f}, smallest {cosines.min():.4f},"
                f" {NEAR} nearest that stay {stay(found, expected):.3f}",
                flush=True,
            )


def pixels_of(embedder: Embedder, photo: Path) -> NDArray[np.uint8]:
    from bingo_edge.image import load_image, preprocess_from

    return preprocess_from(embedder.contract, load_image(photo))


def embeddings(place: Place, file: Path, pixels: NDArray[np.uint8], seconds: float) -> NDArray[np.float64]:
    """(n, D), one picture at a time. Raises OSError where none come out."""
    given: Any = network_input(Embedder(file).contract, pixels)[:, None]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").mkdir()
        np.save(folder / "batches.npy", given)
        job = {"file": str(file.resolve()), "input": "image", "outputs": list(Embedder(file).contract["outputs"])}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _ran(place, folder, seconds)
        with np.load(folder / "outputs.npz", allow_pickle=False) as held:
            return np.asarray(held["embedding"].reshape(len(pixels), -1), np.float64)


def stay(found: NDArray[np.float64], expected: NDArray[Any]) -> float:
    """The share of each row's NEAR nearest others that are its nearest in both."""

    def nearest(rows: NDArray[Any]) -> NDArray[np.intp]:
        near = rows @ rows.T
        np.fill_diagonal(near, -np.inf)
        return np.argsort(-near, 1)[:, :NEAR]

    pairs = zip(nearest(found), nearest(expected), strict=True)
    return float(np.mean([len(set(one) & set(other)) / NEAR for one, other in pairs]))


if __name__ == "__main__":
    main()
