"""Odd pictures are the same to the bit for the network in the device's own process and in the trainer's."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import photo
from onnx import TensorProto, helper
from PIL import ExifTags, Image, features

from bingo_compress.data import listing
from bingo_compress.features import extract
from bingo_compress.models.encoder import Preprocessing

EXPORT = Path(__file__).parents[2] / "export"
SIZE = 24
RULES = {
    f"{mode}-{kind}": {"crop_pct": crop_pct, "interpolation": kind, "crop_mode": mode}
    for mode, crop_pct in (("center", 0.875), ("squash", 1.0))
    for kind in ("bicubic", "bilinear")
}
DEVICE = """
import sys
from pathlib import Path
import bingo_edge, numpy as np
export, folder, out, *models = sys.argv[1:]
assert Path(bingo_edge.__file__).parent.parent == Path(export), bingo_edge.__file__
found = [bingo_edge.Embedder(model).embed(folder) for model in models]
assert not [one.skipped for one in found if one.skipped], found[0].skipped
assert not {"torch", "torchvision", "timm", "bingo_compress"} & set(sys.modules)
np.savez(out, names=np.array(found[0].names), **{Path(model).stem: one.features for model, one in zip(models, found)})
"""


def odd_pictures(folder: Path) -> list[str]:
    """Files of every shape, orientation, mode and coding that a folder of photos may hold. Returns their names,
    sorted.
    """
    folder.mkdir()
    random = np.random.default_rng(0)
    made: dict[str, tuple[Any, dict[str, Any]]] = {}
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = turn
        made[f"turn{turn}-wide.jpg"] = (photo(turn, 1, 60, 97), {"exif": exif})
        made[f"turn{turn}-tall.png"] = (photo(turn, 2, 91, 34), {"exif": exif})
    for height, width in (
        (1, 1),
        (2, 3),
        (1, 300),
        (300, 1),
        (7, 5),
        (64, 64),
        (200, 41),
        (23, 25),
        (24, 24),
        (48, 96),
    ):
        made[f"{height}x{width}.png"] = (random.integers(0, 256, (height, width, 3), np.uint8), {})
    rgb, alpha = Image.fromarray(photo(0, 3, 53, 91)), Image.fromarray(photo(1, 3, 53, 91)[..., 0])
    paletted, clear, cmyk = rgb.quantize(40), rgb.copy(), rgb.convert("CMYK")
    clear.putalpha(alpha)
    deep = random.integers(0, 65536, (44, 70)).astype(np.uint16)
    made |= {
        "grey.png": (rgb.convert("L"), {}),
        "grey.jpg": (rgb.convert("L"), {}),
        "grey-alpha.png": (clear.convert("LA"), {}),
        "one-bit.png": (rgb.convert("1"), {}),
        "palette.png": (paletted, {}),
        "palette-clear.png": (paletted, {"transparency": 3}),
        "palette-alphas.png": (paletted, {"transparency": bytes(range(0, 240, 6))}),
        "alpha.png": (clear, {}),
        "all-clear.png": (Image.new("RGBA", (30, 20), (0, 0, 0, 0)), {}),
        "sixteen.png": (deep, {}),
        "sixteen-dark.png": (deep // 200, {}),
        "sixteen.tif": (deep, {}),
        "integers.tif": (deep.astype(np.int32), {}),
        "floats.tif": ((deep / 65535).astype(np.float32), {}),
        "cmyk.jpg": (cmyk, {}),
        "cmyk-progressive.jpg": (cmyk, {"progressive": True}),
        "cmyk.tif": (cmyk, {}),
        "progressive.jpg": (photo(2, 4, 120, 77), {"progressive": True}),
        "progressive-420.jpg": (photo(0, 4, 77, 121), {"progressive": True, "subsampling": 2}),
        "422.jpg": (photo(1, 4, 61, 83), {"subsampling": 1}),
        "444.jpg": (photo(2, 5, 61, 83), {"subsampling": 0}),
        "coarse.jpg": (photo(0, 5, 99, 50), {"quality": 3}),
        "first-frame.gif": (paletted, {"save_all": True, "append_images": [paletted.rotate(90)], "duration": 100}),
        "clear.gif": (paletted, {"transparency": 0}),
        "plain.bmp": (rgb, {}),
        "huge.jpg": (np.tile(photo(1, 6, 120, 160), (10, 10, 1)), {}),
        "huge-panorama.png": (np.tile(photo(2, 6, 30, 160), (1, 40, 1)), {}),
    }
    if features.check("webp"):
        made |= {"lossy.webp": (rgb, {"quality": 60}), "alpha.webp": (clear, {"lossless": True})}
    for name, (picture, settings) in made.items():
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(folder / name, **settings)
    return sorted(made)


def mirror(path: Path, rule: dict[str, Any]) -> str:
    """A model whose features are its input, so that what comes out of the kit is the very pixels the network saw."""
    width = SIZE * SIZE * 3
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [-1, width])
    nodes = [
        helper.make_node("Cast", ["image"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["real", "shape"], ["features"]),
        helper.make_node("Identity", ["features"], ["embedding"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in ("embedding", "features")
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "mirror", [image], outputs, [shape]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    given = {"name": "image", "layout": "NHWC", "dtype": "uint8", "color": "RGB", "size": SIZE}
    contract = {"format": 1, "embedding_dim": width, "input": given, "preprocess": rule}
    helper.set_model_props(model, {"bingo_compress": json.dumps(contract)})
    onnx.save(model, path)
    return str(path)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, np.ndarray]]:
    """(folder, names, pixels uint8 (n, SIZE, SIZE, 3) by rule), the pixels as a process of the kit alone gave them to
    the network.
    """
    root = tmp_path_factory.mktemp("odd")
    names = odd_pictures(root / "pictures")
    models = [mirror(root / f"{name}.onnx", rule) for name, rule in RULES.items()]
    environment = {**os.environ, "PYTHONPATH": str(EXPORT)}
    words = [sys.executable, "-c", DEVICE, str(EXPORT), str(root / "pictures"), str(root / "seen.npz"), *models]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(io.BytesIO((root / "seen.npz").read_bytes())) as held:
        assert [Path(name).name for name in held["names"]] == names
        seen = {name: held[name].reshape(-1, SIZE, SIZE, 3).astype(np.uint8) for name in RULES}
    return root / "pictures", names, seen


@pytest.mark.parametrize("name", RULES)
def test_the_device_sees_what_the_trainer_sees_to_the_bit(
    name: str, odd: tuple[Path, list[str], dict[str, np.ndarray]]
) -> None:
    root, names, seen = odd
    assert len(names) >= 40
    settings = Preprocessing(size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, **RULES[name])
    folder = listing.list_images(root)
    assert list(folder.files) == names and not folder.bad
    validated: list[torch.Tensor] = []

    def record(batch: torch.Tensor) -> torch.Tensor:
        validated.append(batch)
        return torch.zeros(len(batch), 1)

    assert extract.plain({"student": (settings, record)}, folder, range(len(names)), "test")[1] == list(
        range(len(names))
    )
    exported = extract.pixels_of(settings, folder, range(len(names)), len(names))
    for trainer in (torch.cat(validated).numpy(), exported.numpy()):
        assert trainer.dtype == np.uint8 and trainer.shape == seen[name].shape
        differ = [
            one for one, mine, other in zip(names, trainer, seen[name], strict=True) if not np.array_equal(mine, other)
        ]
        assert differ == []


def test_the_pictures_and_the_rules_differ(odd: tuple[Path, list[str], dict[str, np.ndarray]]) -> None:
    """Otherwise equal pixels would prove little."""
    _, names, seen = odd
    pixels = seen["center-bicubic"]
    assert len({one.tobytes() for one in pixels}) >= 40  # some hold one picture in two codings
    for one, other in (
        ("center-bicubic", "center-bilinear"),
        ("squash-bicubic", "squash-bilinear"),
        ("center-bicubic", "squash-bicubic"),
    ):
        assert (seen[one] != seen[other]).any(axis=(1, 2, 3)).mean() > 0.8
    turned = {turn: pixels[names.index(f"turn{turn}-tall.png")].astype(int) for turn in (1, 6)}
    assert turned[1].std() > 5 and not np.array_equal(turned[1], turned[6])
