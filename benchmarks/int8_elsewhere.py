"""An int8 file on photos in other toolchains: is it as near to its float file there as in onnxruntime?

python benchmarks/int8_elsewhere.py EXPORT_FOLDER ... --photos FOLDER [--with openvino,opencv] [--images 64]
[--python NAME=PYTHON ...]

EXPORT_FOLDER holds student.onnx and student-int8.onnx. `verify` judges by drawn pictures, which no student was
calibrated on; here are photos. Cosines of embeddings, mean and smallest, to the float file in onnxruntime; and the
share of an image's five nearest others that stay.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from bingo_edge import Embedder
from bingo_edge.model import network_input
from numpy.typing import NDArray

from bingo_compress.models import exported
from bingo_compress.toolchains.place import NoAnswer, answers, places, version

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
    tried = [place for place in places(f"onnxruntime,{chosen.names}", chosen.python) if version(place)]
    photos = sorted(path for path in chosen.photos.rglob("*") if path.is_file())
    photos = photos[:: max(1, len(photos) // chosen.images)][: chosen.images]
    for folder in chosen.folders:
        exact, file = Embedder(folder / exported.name("onnx")), folder / exported.name("onnx-int8")
        pixels = np.stack([pixels_of(exact, photo) for photo in photos])
        expected = exact.infer(pixels)[0]
        print(f"{file} on {len(photos)} photos: {Embedder(file).contract['int8']['rung']}")
        for place in tried:
            try:
                outputs, _ = answers(place, file, network_input(Embedder(file).contract, pixels), chosen.seconds)
            except NoAnswer as nothing:
                print(f"  {place.toolchain} {version(place)}: {nothing}")
                continue
            found = outputs["embedding"]
            cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
            print(
                f"  {place.toolchain} {version(place)}: mean {cosines.mean():.4f}, smallest {cosines.min():.4f},"
                f" {NEAR} nearest that stay {stay(found, expected):.3f}",
                flush=True,
            )


def pixels_of(embedder: Embedder, photo: Path) -> NDArray[np.uint8]:
    from bingo_edge.image import load_image, preprocess_from

    return preprocess_from(embedder.contract, load_image(photo))


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
