"""Broken and hostile input, seeded: recipes, pictures and the edge kit's files answer with a result or with their one
kind of error.

A long run: python tests/fuzz.py --inputs 100000 [--seed 0] [--targets recipe,image,...]
"""

import argparse
import io
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import corpus
import corpus_bytes
import numpy as np
import yaml
from bingo_edge.errors import EdgeError
from bingo_edge.golden import selftest
from bingo_edge.heads import classify, load_head, load_index
from bingo_edge.image import ImageError, load_image
from bingo_edge.model import read_contract
from PIL import Image

from bingo_compress.errors import BingoError
from bingo_compress.recipe import KEYS, RECIPES_DIR, Recipe, load_recipe

SMALL = 1 << 20  # pixels: a mutated size is refused above this, so that a long run needs little memory
DIM = 8
TOKENS = [
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"Infinity",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"9" * 30,
    b"1" * 5000,
    b"!!python/object:os.system {}",
    b"&a [*a]",
]
TOKENS += [
    b"\0",
    b"\xff",
    b"../../x",
    b"/etc/passwd",
    b"~",
    b"2020-01-01",
    b"\xf0\x9f\x98\x80",
    b"[" * 3000,
    b"{a: " * 300,
    b"- " * 500,
    b"<<: 1",
    b"? x",
]
CONTRACT = {
    "format": 1,
    "run_id": "x",
    "embedding_dim": DIM,
    "input": {"name": "image", "layout": "NHWC", "dtype": "uint8", "color": "RGB", "size": 4},
    "preprocess": {"crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center"},
}


def mutated(raw: bytes, random: np.random.Generator) -> bytes:
    """`raw` after one to five small damages."""
    data = bytearray(raw)
    for _ in range(random.integers(1, 6)):
        place, length = int(random.integers(0, len(data) + 1)), int(random.integers(1, 17))
        match random.integers(0, 6):
            case 0 if data:
                data[min(place, len(data) - 1)] ^= 1 << int(random.integers(0, 8))
            case 1:
                data[place : place + length] = random.bytes(length)
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = TOKENS[random.integers(0, len(TOKENS))]
            case 4:
                data[place:place] = data[place // 2 : place // 2 + 4 * length]
            case _ if random.integers(0, 4) == 0:
                del data[place:]
    return bytes(data)


def document(random: np.random.Generator, depth: int = 0) -> Any:
    """A random thing that YAML and JSON can hold."""
    kind = int(random.integers(0, 9 if depth < 3 else 7))
    if kind == 7:
        return [document(random, depth + 1) for _ in range(random.integers(0, 4))]
    if kind == 8:
        return {_key(random): document(random, depth + 1) for _ in range(random.integers(0, 4))}
    number = int(random.integers(-(2**62), 2**62)) >> int(random.integers(0, 62))
    return (
        None,
        True,
        number,
        number * 1.5e300,
        float("nan"),
        _key(random),
        "".join(map(chr, random.integers(1, 0xD000, 6))),
    )[kind]


def _key(random: np.random.Generator) -> str:
    return KEYS[random.integers(0, len(KEYS))]


def recipe_target(home: Path) -> Callable[[np.random.Generator], None]:
    """Shipped recipes damaged, and random documents under real keys; also as --set."""
    seeds = [path.read_bytes() for path in sorted(RECIPES_DIR.glob("*.yaml"))]
    file = home / "recipe.yaml"

    def once(random: np.random.Generator) -> None:
        if random.integers(0, 3):
            raw = mutated(seeds[random.integers(0, len(seeds))], random)
        else:
            held = (
                {_key(random): document(random) for _ in range(random.integers(1, 5))}
                if random.integers(0, 4)
                else document(random)
            )
            raw = yaml.safe_dump(held, allow_unicode=True).encode("utf-8", "surrogatepass")
        file.write_bytes(raw)
        words = mutated(f"{_key(random)}={document(random)}".encode("utf-8", "replace"), random).decode(
            "utf-8", "replace"
        )
        for settings, source in (([], file), ([words], None)):
            try:
                assert isinstance(load_recipe(source, settings, {}), Recipe)
            except BingoError as error:
                assert "\n" not in str(error)  # noqa: PT017

    return once


def image_target(home: Path) -> Callable[[np.random.Generator], None]:
    """Valid pictures of many formats damaged."""
    seeds = [
        kind.make
        for kind in corpus.KINDS.values()
        if kind.used and isinstance(kind.make, bytes) and max(kind.size) < 1000
    ]
    seeds += [
        corpus_bytes.encoded(corpus.PICTURE, kind)
        for kind in ("TGA", "PPM", "SGI", "PCX", "ICO", "DDS", "JPEG2000", "GIF", "WEBP")
    ]

    def once(random: np.random.Generator) -> None:
        raw = mutated(seeds[random.integers(0, len(seeds))], random)
        try:
            pixels = load_image(io.BytesIO(raw), int(random.integers(0, 2)) * 16)
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size
        except ImageError:
            pass

    return once


def npz_target(home: Path) -> Callable[[np.random.Generator], None]:
    """Index and heads: an npz file damaged, or whole with arrays that are not what they should be."""
    rows = np.eye(DIM, dtype=np.float32)
    names = np.array([f"{number}.jpg" for number in range(DIM)])
    model: Any = SimpleNamespace(path="student.onnx", sha256="x")
    digest = {"model_sha256": np.array("x")}
    files: list[dict[str, Any]] = [
        {"paths": names, "embeddings": rows, **digest},
        {"weight": rows, "bias": rows[0], "classes": names, **digest},
        {
            "embeddings": rows,
            "labels": np.arange(DIM),
            "classes": names,
            "k": np.array(3),
            "temperature": np.array(0.1),
            **digest,
        },
    ]
    odd = [
        np.array([]),
        np.array(None),
        np.array("x"),
        np.array(np.nan),
        rows[0],
        rows.astype(complex),
        rows * 7,
        names[:2],
        np.array(10**18),
    ]
    odd += [
        np.array(b"\xff"),
        rows.astype(bool),
        np.zeros((2, 2, 2)),
        np.array(-1),
        np.array(["1", "a"]),
        np.array("2020", "datetime64[D]"),
    ]
    file = home / "x.npz"

    def once(random: np.random.Generator) -> None:
        held = dict(files[random.integers(0, len(files))])
        if random.integers(0, 2):
            held[list(held)[random.integers(0, len(held))]] = odd[random.integers(0, len(odd))]
        buffer = io.BytesIO()
        np.savez(buffer, **held)
        raw = buffer.getvalue()
        file.write_bytes(mutated(raw, random) if random.integers(0, 2) else raw)
        for read in (lambda: load_index(file, model), lambda: classify(load_head(file, model), rows, rows)):
            try:
                read()
            except EdgeError as error:
                assert "\n" not in str(error)  # noqa: PT017

    return once


def _replaced(held: Any, random: np.random.Generator) -> Any:
    """`held` with one thing in it, at any depth, made into another."""
    if not isinstance(held, dict | list) or not held or random.integers(0, 6) == 0:
        return document(random)
    place = list(held if isinstance(held, dict) else range(len(held)))[random.integers(0, len(held))]
    copy = held.copy()
    copy[place] = _replaced(held[place], random)
    return copy


def contract_target(home: Path) -> Callable[[np.random.Generator], None]:
    """The metadata of an ONNX file."""
    seed = json.dumps(CONTRACT).encode()

    def once(random: np.random.Generator) -> None:
        raw = mutated(seed, random) if random.integers(0, 2) else json.dumps(_replaced(CONTRACT, random)).encode()
        try:
            contract = read_contract(raw.decode("utf-8", "replace"), "x.onnx")
            assert int(contract["embedding_dim"]) > 0 and contract["input"]["size"] > 0
        except EdgeError as error:
            assert "\n" not in str(error)  # noqa: PT017

    return once


def golden_target(home: Path) -> Callable[[np.random.Generator], None]:
    """golden.json and the files that it names."""
    import hashlib

    picture, raw = (
        corpus_bytes.encoded(corpus_bytes.plain(corpus_bytes.RED, size=(4, 4)), "PNG"),
        bytes(corpus_bytes.RED) * 16,
    )
    (home / "0.png").write_bytes(picture)
    (home / "0.rgb").write_bytes(raw)
    row = [1.0] + [0.0] * (DIM - 1)
    digests = [hashlib.sha256(part).hexdigest() for part in (b"model", picture, raw)]
    told = {"path": str(home / "x.onnx"), "sha256": digests[0], "dim": DIM, "contract": CONTRACT}
    entry = {"file": "0.png", "sha256": digests[1], "rgb": "0.rgb", "rgb_sha256": digests[2]}
    entry |= dict.fromkeys(("embedding", "features", "scores"), row)
    whole = {"format": 1, "sha256": digests[0], "images": [entry]}
    answer = np.array([row], np.float32)
    outputs = dict.fromkeys(("embedding", "features", "scores"), answer)
    embedder: Any = SimpleNamespace(**told, run=lambda batch: outputs)
    (home / "golden.json").write_text(json.dumps(whole))
    assert not selftest(embedder, home)[0].failed

    def once(random: np.random.Generator) -> None:
        text = (
            mutated(json.dumps(whole).encode(), random)
            if random.integers(0, 2)
            else json.dumps(_replaced(whole, random)).encode()
        )
        (home / "golden.json").write_bytes(text)
        try:
            selftest(embedder, home)
        except EdgeError as error:
            assert "\n" not in str(error)  # noqa: PT017

    return once


TARGETS = {
    "recipe": recipe_target,
    "image": image_target,
    "npz": npz_target,
    "contract": contract_target,
    "golden": golden_target,
}


def failures(target: str, inputs: Iterable[int], seed: int = 0) -> list[tuple[int, str]]:
    """(number of the input, what came instead of a result or the one kind of error), for those that failed."""
    found = []
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, SMALL // 2
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        once = TARGETS[target](Path(home))
        for number in inputs:
            try:
                once(np.random.default_rng([seed, number]))
            except Exception as error:
                found.append((number, f"{type(error).__name__}: {error}"[:200]))
    Image.MAX_IMAGE_PIXELS = before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default=",".join(TARGETS))
    given = parser.parse_args()
    bad = 0
    for target in given.targets.split(","):
        found = failures(target, range(given.inputs), given.seed)
        bad += len(found)
        print(f"{target}: {given.inputs:,} inputs, {len(found)} failures", flush=True)
        for kind, count in Counter(text for _, text in found).most_common(10):
            print(f"  {count} x {kind} (input {next(number for number, text in found if text == kind)})", flush=True)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
