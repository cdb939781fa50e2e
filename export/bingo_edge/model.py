"""The student network: an ONNX file that carries its own contract."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bingo_edge.errors import EdgeError
from bingo_edge.files import Source, pictures
from bingo_edge.image import ImageError, Pixels, preprocess_from

Floats = NDArray[np.float32]
AGAIN = "export the model again with bingo-compress"
OUTPUTS = ("embedding", "features", "scores", "distance")


class Skipped(NamedTuple):
    """A picture that could not be used."""

    name: str
    reason: str


class Embedded(NamedTuple):
    """n pictures that worked, in order: embeddings float32 (n, D) L2-normalised, features float32 (n, D) raw, n names;
    and the rest. Of a file with classes (`Embedder.classes`) scores float32 (n, C), their probabilities, and where the
    file knows it distances float32 (n,) to the nearest class, else None.
    """

    embeddings: Floats
    features: Floats
    names: list[str]
    skipped: list[Skipped]
    scores: Floats | None = None
    distances: Floats | None = None


class Embedder:
    """An open student network: `path`, `sha256` of the file as it was opened, `contract` (what it says of itself),
    `dim` (D), `outputs` (which of OUTPUTS it has), `load_seconds`; `classes` (names, in the order of scores) of a file
    that has them, and `threshold`, the distance above which a picture is of none of these, or None.

    `batch`: how many pictures the graph takes at once where that is fixed in the file, else None. Callers need not
    care: any number may be given.
    """

    def __init__(self, model: str | PathLike[str], *, threads: int = 1) -> None:
        """Open an ONNX file made by bingo-compress; raises EdgeError for any other file."""
        path = os.fspath(model)
        if threads < 1:
            raise EdgeError("at least 1 thread", str(threads), "give a positive number")
        if not os.path.isfile(path):
            raise EdgeError("an ONNX file", f"no file at {path}", "check the path")
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # its errors come as exceptions too; the log would repeat them on stderr
        try:
            with open(path, "rb") as file:
                held = file.read()  # once: what is hashed is what runs, whatever is put in the file's place later
        except OSError as error:
            raise EdgeError(
                "an ONNX file that can be read", f"{path} ({error.strerror})", "check its permissions"
            ) from None
        self.sha256 = hashlib.sha256(held).hexdigest()
        start = time.perf_counter()
        try:
            self._session = ort.InferenceSession(held, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base class below Exception
            found = f"{path} ({error})"
            raise EdgeError(
                f"an ONNX file that onnxruntime {ort.__version__} can open", found, f"{AGAIN} or update onnxruntime"
            ) from None
        self.load_seconds = time.perf_counter() - start
        self.path = path
        self.contract = read_contract(self._session.get_modelmeta().custom_metadata_map.get("bingo_compress"), path)
        self.dim = int(self.contract["embedding_dim"])
        self.outputs = tuple(name for name in OUTPUTS if name in self.contract["outputs"])
        self.classes: tuple[str, ...] = tuple(self.contract["classes"]) if "scores" in self.outputs else ()
        self.threshold = self.contract.get("head", {}).get("threshold") if "distance" in self.outputs else None
        _check_graph(self._session, self.contract, path)
        first = self._session.get_inputs()[0].shape[0]
        self.batch = first if isinstance(first, int) and first > 0 else None

    def infer(self, batch: Pixels) -> tuple[Floats, Floats]:
        """Run preprocessed pictures, uint8 (n, S, S, 3): embeddings and features, each float32 (n, D). Raises
        EdgeError.

        A file with features alone has their embeddings too; of one without features these are float32 (n, 0).
        """
        return both(self.run(network_input(self.contract, batch)), len(batch))

    def run(self, batch: NDArray[Any]) -> dict[str, Floats]:
        """Run what `network_input` makes, any number of pictures: the file's outputs by name. Raises EdgeError."""
        if self.batch is None:
            return self._run(batch)
        runs = []
        for start in range(0, max(len(batch), 1), self.batch):
            part = batch[start : start + self.batch]
            short = self.batch - len(part)
            runs.append(self._run(np.pad(part, ((0, short), (0, 0), (0, 0), (0, 0))) if short else part))
        return {name: np.concatenate([part[name] for part in runs])[: len(batch)] for name in self.outputs}

    def _run(self, batch: NDArray[Any]) -> dict[str, Floats]:
        try:
            found = self._session.run(list(self.outputs), {self.contract["input"]["name"]: batch})
        except Exception as error:  # as above
            raise EdgeError("the network to run", f"{error}", f"{AGAIN} or use a smaller batch") from None
        return dict(zip(self.outputs, found, strict=True))

    def stream(self, sources: Source | Iterable[Source], batch_size: int = 16) -> Iterator[Embedded]:
        """As `embed`, batch by batch: memory holds one batch of small inputs and one decoded picture, however many
        there are.

        A batch that is fixed in the file takes the place of `batch_size`.
        """
        if batch_size < 1:
            raise EdgeError("a batch of at least 1", str(batch_size), "give a positive number")
        batch_size = self.batch or batch_size
        names: list[str] = []
        rows: list[Pixels] = []
        skipped: list[Skipped] = []
        for name, load in pictures(sources, tuple(self.contract.get("bands", ()))):
            try:
                rows.append(preprocess_from(self.contract, load()))
                names.append(name)
            except ImageError as error:
                skipped.append(Skipped(name, " ".join(str(error).split())))
            if len(rows) == batch_size:
                yield self._batch(rows, names, skipped)
                names, rows, skipped = [], [], []
        if rows or skipped:
            yield self._batch(rows, names, skipped)

    def _batch(self, rows: list[Pixels], names: list[str], skipped: list[Skipped]) -> Embedded:
        if not rows:
            nothing, none = np.empty((0, self.dim), np.float32), np.empty((0, len(self.classes)), np.float32)
            return self._embedded(nothing, nothing, names, skipped, {"scores": none, "distance": none[:, :1]})
        found = self.run(network_input(self.contract, np.stack(rows)))
        embeddings, features = both(found, len(rows))
        fine = np.isfinite(np.hstack([embeddings, features, *found.values()])).all(axis=1)
        skipped += [Skipped(names[row], "the network's output is not finite") for row in np.flatnonzero(~fine)]
        found = {name: values[fine] for name, values in found.items()}
        good = [names[row] for row in np.flatnonzero(fine)]
        return self._embedded(embeddings[fine], features[fine], good, skipped, found)

    def _embedded(
        self,
        embeddings: Floats,
        features: Floats,
        names: list[str],
        skipped: list[Skipped],
        found: dict[str, Floats],
    ) -> Embedded:
        scores = found["scores"] if "scores" in self.outputs else None
        distances = found["distance"][:, 0] if "distance" in self.outputs else None
        return Embedded(embeddings, features, names, skipped, scores, distances)

    def embed(self, sources: Source | Iterable[Source], batch_size: int = 16) -> Embedded:
        """Embed a path, a folder, a uint8 (height, width, 3) array, or an iterable of these.

        Returns Embedded: row i of embeddings and features belongs to names[i]. A picture that cannot be used never ends
        the run: it is in `skipped` with its reason and has no row.
        """
        batches = list(self.stream(sources, batch_size)) or [self._batch([], [], [])]
        embeddings, features, names, skipped, scores, distances = zip(*batches, strict=True)
        return Embedded(
            np.concatenate(embeddings),
            np.concatenate(features),
            list(chain(*names)),
            list(chain(*skipped)),
            np.concatenate(scores) if "scores" in self.outputs else None,
            np.concatenate(distances) if "distance" in self.outputs else None,
        )


def both(found: dict[str, Floats], count: int) -> tuple[Floats, Floats]:
    """(embeddings, features) of `count` pictures, from those of the two that the file has."""
    features = found.get("features", np.empty((count, 0), np.float32))
    if "embedding" in found:
        return found["embedding"], features
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12), features


def latency_ms(embedder: Embedder, runs: int, warm_up: int = 20) -> NDArray[np.float64]:
    """Milliseconds of each of `runs` inferences after a warm-up, shape (runs,): of one picture, or of the batch that is
    fixed in the file. Preprocessing is not included.
    """
    if runs < 1:
        raise EdgeError("at least 1 run", str(runs), "give a positive number")
    size = embedder.contract["input"]["size"]
    pictures = np.random.default_rng(0).integers(0, 256, (embedder.batch or 1, size, size, 3), np.uint8)
    given = network_input(embedder.contract, pictures)
    times = np.empty(warm_up + runs)
    for run in range(warm_up + runs):
        start = time.perf_counter()
        embedder.run(given)
        times[run] = (time.perf_counter() - start) * 1e3
    return times[warm_up:]


def network_input(contract: dict[str, Any], pixels: Pixels) -> NDArray[Any]:
    """What the file takes, of preprocessed pictures uint8 (n, S, S, 3): those, or float32 (n, 3, S, S), less the
    contract's `mean` and by its `std`, which are on the scale of 0 to 255.
    """
    given = contract["input"]
    if given["dtype"] == "uint8":
        return pixels
    mean, std = (np.array(given[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
    return (np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) - mean) / std


def read_contract(text: str | None, path: str) -> dict[str, Any]:
    """The contract from the text in an ONNX file's metadata; raises EdgeError unless this version can honour all of
    it.
    """
    if text is None:
        raise EdgeError('an ONNX file with "bingo_compress" metadata', f"{path} without it", AGAIN)
    try:
        contract = json.loads(text)
        version, given, rule = contract["format"], contract["input"], contract["preprocess"]
        kind = (given["layout"], given["dtype"], given["color"])
        size, crop, mode, dim = (
            given["size"],
            rule["crop_pct"],
            rule.get("crop_mode", "center"),
            contract["embedding_dim"],
        )
        sound = (
            isinstance(given["name"], str) and isinstance(size, int) and size > 0 and isinstance(dim, int) and dim > 0
        )
        sound = sound and 0 < crop <= 1 and mode in ("center", "squash")
        known = {"embedding", "features"} & set(contract.setdefault("outputs", {"embedding": "", "features": ""}))
        sound = sound and _classes_sound(contract)
        bands = contract.get("bands", [1, 1, 1])
        sound = sound and len(bands) == 3 and all(isinstance(band, int) and band > 0 for band in bands)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EdgeError(
            "a whole contract in the metadata", f"{path} ({type(error).__name__}: {error})", AGAIN
        ) from None
    if version != 1:
        raise EdgeError("contract format 1", f"format {version} in {path}", "update bingo-edge")
    if kind not in (("NHWC", "uint8", "RGB"), ("NCHW", "float32", "RGB")):
        raise EdgeError("an NHWC uint8 or NCHW float32 RGB input", f"{' '.join(map(str, kind))} in {path}", AGAIN)
    if not known:
        raise EdgeError("an output embedding or features", f"{list(contract['outputs'])} in {path}", AGAIN)
    # the rule is tried on a dot, so that one this version does not know is refused here and not at the first picture
    try:
        dot = preprocess_from({**contract, "input": {"size": 1}}, np.zeros((2, 2, 3), np.uint8))
        sound = sound and bool(np.isfinite(network_input(contract, dot[None])).all())
    except (ValueError, TypeError, KeyError, OverflowError):
        sound = False
    if not sound:
        found = f"size {size!r}, embedding_dim {contract['embedding_dim']!r}, preprocess {json.dumps(rule)} in {path}"
        raise EdgeError("sizes, classes and a preprocessing rule that this version knows", found, "update bingo-edge")
    return dict(contract)


def _classes_sound(contract: dict[str, Any]) -> bool:
    """Whether what stands beside outputs scores and distance is what they are read by. Raises KeyError, TypeError."""
    classes, head = contract.get("classes", []), contract.get("head", {})
    threshold = head.get("threshold")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    known = threshold is None or (isinstance(threshold, int | float) and 0 <= threshold <= 2)
    return named and known and (len(classes) > 0 or not {"scores", "distance"} & set(contract.get("outputs", ())))


def _check_graph(session: Any, contract: dict[str, Any], path: str) -> None:
    """Refuse a graph that is not what its contract says, before a wrong number can come out of it."""
    size, dim, name = contract["input"]["size"], contract["embedding_dim"], contract["input"]["name"]
    inputs = [(node.name, node.type, *node.shape[1:]) for node in session.get_inputs()]
    outputs = {node.name: (node.type, *node.shape[1:]) for node in session.get_outputs()}
    uint8 = contract["input"]["dtype"] == "uint8"
    given = (name, "tensor(uint8)", size, size, 3) if uint8 else (name, "tensor(float)", 3, size, size)
    widths = {"embedding": dim, "features": dim, "scores": len(contract.get("classes", ())), "distance": 1}
    named = {key: width for key, width in widths.items() if key in contract["outputs"]}
    fits = inputs == [given] and all(outputs.get(key) == ("tensor(float)", width) for key, width in named.items())
    if not fits:
        expected = f"input {name} {given[1]} (batch, {', '.join(map(str, given[2:]))}), outputs"
        expected += f" {', '.join(f'{key} float32 (batch, {width})' for key, width in named.items())}"
        raise EdgeError(expected, f"inputs {inputs}, outputs {outputs} in {path}", AGAIN)
