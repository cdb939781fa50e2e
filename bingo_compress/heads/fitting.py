"""The class head of an exported file: fitted on the file's own features of labelled images, or one that was made for it
before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bingo_edge import EdgeError, Embedder, load_head
from bingo_edge.heads import BankHead, Head, LinearHead
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from bingo_compress.errors import BingoError
from bingo_compress.evaluation import probes
from bingo_compress.heads import calibration
from bingo_compress.models import exported
from bingo_compress.runtime import run_dir
from bingo_compress.runtime.made_of import file_digest

KINDS = ("linear", "knn")
COMPARED = 20_000_000  # similarities that a bank's temperature is found by, at most
LEAST_COMPARED = 256  # images


@dataclass(frozen=True)
class Made:
    """A head as the device has it, its temperature in it. facts: what the file's contract says of it, "calibrated" and
    a linear head's "temperature" among it where they are known; paths: of a bank's images.
    """

    head: Head
    facts: dict[str, Any]
    paths: Sequence[str] = ()


def fit(
    kind: str,
    features: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    groups: Tensor | None = None,
    fitted: probes.LinearHead | None = None,
) -> Made:
    """A head of KINDS on features (N, D) raw with labels (N,), calibrated on held-out folds of these.

    linear: `probes.fit_linear`, its logits over the temperature. knn: every image of the bank votes exp(cosine /
    temperature) for its class. Both temperatures minimise the negative log-likelihood of each fold under the others.
    groups: as in `probes.folds`; fitted: the linear head where there is one of these rows already. Where all rows are
    one group there are no folds: then the temperature is the proof's own, and the head says that it is not calibrated.
    """
    count = len(classes)
    fold = probes.folds(labels, probes.FOLDS, groups)
    apart = len(fold.unique()) > 1
    if kind == "linear":
        head = fitted or probes.fit_linear(features, labels, count, groups=groups)
        heat = 1.0
        if apart:
            logits = probes.held_out_logits(features, labels, count, head.strength, fold)
            heat = calibration.temperature(lambda each: (logits / each).log_softmax(1), labels)
        weight, bias = ((each.double() / heat).float().numpy() for each in (head.weight, head.bias))
        facts = {"kind": kind, "images": len(labels), "calibrated": apart}
        facts |= {"temperature": heat, "strength": head.strength}
        return Made(LinearHead(weight, bias, np.array(classes), *_none_of_these(features, labels, count, fold)), facts)
    rows = embeddings(features).half().float()  # as the npz beside holds them
    heat = _bank_temperature(rows, labels, count, fold) if apart else probes.KNN_TEMPERATURE
    made = _bank(features, labels, classes, fold, len(labels), heat)
    return replace(made, facts=made.facts | {"calibrated": apart})


def knn(features: Tensor, labels: Tensor, classes: Sequence[str], groups: Tensor | None = None) -> Made:
    """The bank of a proof's kNN: of KNN_K nearest at KNN_TEMPERATURE, so that it is right as often as the proof says.
    Its shares of the vote are not calibrated: no temperature makes less than sure of a vote that is unanimous.
    """
    fold = probes.folds(labels, probes.FOLDS, groups)
    return _bank(features, labels, classes, fold, probes.KNN_K, probes.KNN_TEMPERATURE)


def _bank(features: Tensor, labels: Tensor, classes: Sequence[str], fold: Tensor, k: int, temperature: float) -> Made:
    rows, whose = embeddings(features).half().float().numpy(), labels.int().numpy()
    none_of_these = _none_of_these(features, labels, len(classes), fold)
    facts = {"kind": "knn", "images": len(labels), "calibrated": False, "temperature": temperature, "k": k}
    return Made(BankHead(rows, whose, np.array(classes), k, temperature, *none_of_these), facts)


def _none_of_these(
    features: Tensor, labels: Tensor, classes: int, fold: Tensor
) -> tuple[NDArray[np.float32] | None, float | None]:
    """(class means, the threshold of the distance to them); None, None where there is one fold alone."""
    if len(fold.unique()) < 2:
        return None, None
    units = embeddings(features)
    means = calibration.class_means(units, labels, classes)
    return means.numpy(), calibration.threshold(units, labels, classes, fold)


def embeddings(features: Tensor) -> Tensor:
    """Rows of length one, as the file's own output."""
    return probes.normalised(features)


def _bank_temperature(rows: Tensor, labels: Tensor, classes: int, fold: Tensor) -> float:
    """The temperature at which the rows (N, D) of the other folds vote best for each row, or for each of a part of
    them where there are many.
    """
    asked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    asked = asked[: max(LEAST_COMPARED, COMPARED // len(rows))]
    cosines = (rows[asked] @ rows.T).masked_fill(fold[asked][:, None] == fold[None], -torch.inf)
    votes = one_hot(labels, classes).float()

    # Of a class with one image there is no other to vote: its share is 0.
    return calibration.temperature(
        lambda heat: ((cosines / heat).softmax(1) @ votes).clamp(min=1e-12).log(), labels[asked]
    )


def read(path: Path, student_weights: str, preprocess: Mapping[str, Any]) -> Made:
    """The head in STEM.linear.npz or STEM.bank.npz, made for STEM.onnx beside it. student_weights, preprocess: digest
    of the student that is exported and what it is shown, size among it: those of STEM.onnx too. Raises BingoError.
    """
    end = next((end for end in (exported.LINEAR, exported.BANK) if path.name.endswith(end)), "")
    file = path.with_name(f"{path.name.removesuffix(end)}.onnx")
    if not end or not path.is_file() or not file.is_file():
        found = f"no file at {file if end and path.is_file() else path}" if end else repr(str(path))
        raise BingoError(
            f"--head: expected {', '.join(KINDS)}, or a head of `bingo-compress validate` with its file beside it,"
            f" student{exported.LINEAR} or student{exported.BANK} with student.onnx; found {found}"
        )
    try:
        model = Embedder(file)
        head = load_head(path, model)
    except EdgeError as error:
        raise BingoError(f"--head: {error}") from None
    seen = {**model.contract["preprocess"], "size": model.contract["input"]["size"]}
    if (model.contract.get("student_weights"), seen) != (student_weights, dict(preprocess)):
        raise BingoError(
            f"--head: expected a head of the run's student as it is exported here, found one of {file}, which is of"
            " another student or input; run validate on this run again"
        )
    with np.load(path, allow_pickle=False) as held:
        extra = {key: held[key] for key in ("calibrated", "temperature", "paths") if key in held.files}
    facts: dict[str, Any] = {"kind": "linear" if isinstance(head, LinearHead) else "knn"}
    facts |= {"head_sha256": file_digest(path)} | _said(extra, path)
    facts |= {} if isinstance(head, LinearHead) else {"k": head.k}
    return Made(head, facts, extra["paths"].tolist() if "paths" in extra else ())


def _said(held: Mapping[str, NDArray[Any]], path: Path) -> dict[str, Any]:
    """What `save` wrote of how a head was fitted; earlier versions wrote less. Raises BingoError."""
    try:
        told: dict[str, Any] = {"calibrated": bool(held["calibrated"])} if "calibrated" in held else {}
        told |= {"temperature": float(held["temperature"])} if "temperature" in held else {}
        assert 0 < told.get("temperature", 1.0) < np.inf
    except (AssertionError, TypeError, ValueError):
        found = ", ".join(f"{key} {held[key].dtype} {held[key].shape}" for key in held)
        raise BingoError(
            f"--head: expected a head with one temperature above 0, found {found} in {path}; run validate on this run"
            " again"
        ) from None
    return told


def of(file: Path) -> Head:
    """The head beside a file, whose classes it has. Raises BingoError."""
    model = exported.opened(file)
    end = {"linear": exported.LINEAR, "knn": exported.BANK}[model.contract["head"]["kind"]]
    return load_head(file.with_suffix(end), model)


def save(file: Path, sha256: str, made: Made) -> Path:
    """STEM.linear.npz or STEM.bank.npz beside the exported file of that sha256: the head that is in it, for `--head` of
    `bingo-edge classify` and of `export`. Returns the file.
    """
    arrays: dict[str, Any] = {key: value for key, value in made.head._asdict().items() if value is not None}
    arrays |= {"model_sha256": sha256} | {
        key: made.facts[key] for key in ("calibrated", "temperature") if key in made.facts
    }
    if isinstance(made.head, BankHead):
        arrays["embeddings"] = made.head.embeddings.astype(np.float16)
        if made.paths:
            arrays["paths"] = [path.encode("utf-8", "backslashreplace").decode() for path in made.paths]
    target = file.with_suffix(exported.LINEAR if isinstance(made.head, LinearHead) else exported.BANK)
    with run_dir.atomic(target) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **{key: np.asarray(value) for key, value in arrays.items()})  # type: ignore[arg-type]
    return target
