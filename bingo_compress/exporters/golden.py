"""Eight pictures that travel with an exported file: what the network must see of each, and what it must answer.

They are drawn here, never taken from the user's photos, and `bingo-edge selftest` checks a device by them.
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bingo_edge.image import load_image, preprocess_from
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn.functional import normalize

from bingo_compress.errors import BingoError
from bingo_compress.runtime.run_dir import atomic_folder

REFUSED = 3
# (height, width) of the pictures.
SHAPES = (
    (150, 240),
    (420, 300),
    (200, 330),
    (230, 180),
    (140, 190),
    (180, 150),
    (110, 170),
    (210, 280),
)


def write_golden(model: Path, contract: dict[str, Any], run: Callable[[Tensor], dict[str, Tensor]]) -> Path:
    """Write `<stem>.golden/` beside `model`, whole or not at all, in place of an older one. Returns the folder.

    run: the model file itself, uint8 (1, S, S, 3) -> its outputs by name, embedding (1, D) L2-normalised and features
    (1, D) or one of them; it is given one picture at a time, as the file's batch may be fixed. In the folder: the
    pictures; of each the network's input NAME.rgb, S x S x 3 bytes by rows; golden.json, which names all with their
    sha256 and holds the outputs, and the embedding in any case. Raises BingoError (exit status 3) for one that is not
    finite.
    """
    entries = []
    with atomic_folder(model.with_suffix(".golden")) as folder:
        for name, picture in drawn().items():
            pixels = preprocess_from(contract, load_image(io.BytesIO(picture)))
            outputs = {key: rows[0].double() for key, rows in run(torch.from_numpy(pixels)[None]).items()}
            if not all(values.isfinite().all() for values in outputs.values()):
                raise BingoError(
                    f"export refused: expected finite embeddings, found others of the drawn picture {name}; try another"
                    " student",
                    REFUSED,
                )
            if "embedding" not in outputs:
                outputs["embedding"] = normalize(outputs["features"], dim=0)
            raw, rgb = pixels.tobytes(), f"{Path(name).stem}.rgb"
            (folder / name).write_bytes(picture)
            (folder / rgb).write_bytes(raw)
            entry = {"file": name, "sha256": _sha256(picture), "rgb": rgb, "rgb_sha256": _sha256(raw)}
            entries.append(entry | {key: values.numpy().round(8).tolist() for key, values in outputs.items()})
        held = {
            "format": 1,
            "model": model.name,
            "sha256": _sha256(model.read_bytes()),
            "run_id": contract.get("run_id", ""),
        }
        held |= {"size": int(contract["input"]["size"]), "images": entries}
        (folder / "golden.json").write_text(json.dumps(held) + "\n", encoding="utf-8")
    return model.with_suffix(".golden")


def drawn() -> dict[str, bytes]:
    """The eight pictures as files, by name; the same on every call. Each is of a kind that decoders differ on."""
    wide, tall, turned, grey, few, clear, deep, inked = (_scene(*shape, seed) for seed, shape in enumerate(SHAPES))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned a quarter clockwise
    ramp = Image.linear_gradient("L")
    alpha, cmyk = _rgb(clear), _rgb(inked).convert("CMYK")
    alpha.putalpha(ramp.resize(alpha.size))
    cmyk = Image.merge("CMYK", (*cmyk.split()[:3], ramp.resize(cmyk.size).point(lambda level: level // 2)))
    # Two colours' alphas; the rest is opaque.
    return {
        "1-landscape.png": _file(_rgb(wide), "PNG"),
        "2-progressive.jpg": _file(_rgb(tall), "JPEG", quality=85, progressive=True),
        "3-turned.jpg": _file(_rgb(turned), "JPEG", quality=85, exif=exif),
        "4-grey.png": _file(_rgb(grey).convert("L"), "PNG"),
        "5-palette.png": _file(_rgb(few).quantize(64), "PNG", transparency=bytes([0, 128])),
        "6-alpha.png": _file(alpha, "PNG"),
        "7-sixteen.png": _file(Image.fromarray(np.rint(deep.mean(axis=2) * 65535).astype(np.uint16)), "PNG"),
        "8-cmyk.jpg": _file(cmyk, "JPEG", quality=85),
    }


def _scene(height: int, width: int, seed: int) -> NDArray[np.float64]:
    """(height, width, 3) in 0..1, unlike itself turned or mirrored: gradients, stripes, a disc and a noisy corner.
    seed: which colours and noise.
    """
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    colours = random.uniform(0, 1, (3, 3))
    scene: NDArray[np.float64] = x[..., None] * colours[0] + y[..., None] * colours[1]
    scene[(np.sin(70 * (x + y / 2)) > 0.3) & (x < y)] = colours[2]
    scene[np.hypot(x - 0.45, y - 0.25) < 0.15] = 1 - colours[2]
    scene += random.normal(0, 0.08, scene.shape) * (x + y > 0.9)[..., None]
    return scene.clip(0, 1)


def _rgb(scene: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.rint(scene * 255).astype(np.uint8))


def _file(image: Image.Image, kind: str, **settings: Any) -> bytes:
    made = io.BytesIO()
    image.save(made, kind, **settings)
    return made.getvalue()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
