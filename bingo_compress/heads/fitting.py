"""The class head of an exported file: fitted on the file's own features of labelled images, or one that was made for it
before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """A head as the device has it, its temperature in it. means: (C, D) float32 of length one, of the embeddings of
    each class; threshold: the distance to the nearest of them from which on an image is of none; both None where they
    are not known; facts: what the file's contract says of it; paths: of a bank's images.
    """

    head: Head
    means: NDArray[np.float32] | None
    threshold: float | None
    facts: dict[str, Any]
    paths: Sequence[str] = ()


def fit(kind: str, features: Tensor, labels: Tensor, classes: Sequence[str], groups: Tensor | None = None) -> Made:
    """A head of KINDS on features (N, D) raw with labels (N,), calibrated on held-out folds of these.

    linear: `probes.fit_linear`, its logits over the temperature. knn: every image of the bank votes exp(cosine /
    temperature) for its class. Both temperatures minimise the negative log-likelihood of each fold under the others.
    groups: as in `probes.folds`.
    """
    count, names = len(classes), np.array(classes)
    units = embeddings(features)
    fold = probes.folds(labels, probes.FOLDS, groups)
    means = calibration.class_means(units, labels, count)
    threshold = calibration.threshold(units, labels, count, fold)
    facts: dict[str, Any] = {"kind": kind, "images": len(labels)}
    if kind == "linear":
        head = probes.fit_linear(features, labels, count, groups=groups)
        logits = probes.held_out_logits(features, labels, count, head.strength, fold)
        heat = calibration.temperature(lambda each: (logits / each).log_softmax(1), labels)
        weight, bias = ((each.double() / heat).float().numpy() for each in (head.weight, head.bias))
        facts |= {"temperature": heat, "strength": head.strength}
        return Made(LinearHead(weight, bias, names), means.numpy(), threshold, facts)
    rows = units.half().float()  # as the npz beside holds them
    heat = _bank_temperature(rows, labels, count, fold)
    facts |= {"temperature": heat, "k": len(labels)}
    bank = BankHead(rows.numpy(), labels.int().numpy(), names, len(labels), heat)
    return Made(bank, means.numpy(), threshold, facts)


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
        extra = {key: held[key] for key in ("means", "threshold", "paths") if key in held.files}
    linear = isinstance(head, LinearHead)
    facts: dict[str, Any] = {"kind": "linear" if linear else "knn", "head_sha256": file_digest(path)}
    facts |= {"temperature": 1.0} if isinstance(head, LinearHead) else {"temperature": head.temperature, "k": head.k}
    means, threshold = _none_of_these(extra, len(head.classes), model.dim)
    return Made(head, means, threshold, facts, extra["paths"].tolist() if "paths" in extra else ())


def of(file: Path) -> Head:
    """The head beside a file, whose classes it has. Raises BingoError."""
    model = exported.opened(file)
    end = {"linear": exported.LINEAR, "knn": exported.BANK}[model.contract["head"]["kind"]]
    return load_head(file.with_suffix(end), model)


def _none_of_these(
    held: Mapping[str, NDArray[Any]], classes: int, dim: int
) -> tuple[NDArray[np.float32] | None, float | None]:
    """(class means, threshold) as `save` wrote them; None, None where they are not there or not sound."""
    means, threshold = held.get("means"), held.get("threshold")
    if means is None or threshold is None or means.shape != (classes, dim) or threshold.shape != ():
        return None, None
    if means.dtype.kind != "f" or threshold.dtype.kind != "f" or not (np.isfinite(means).all() and 0 <= threshold <= 2):
        return None, None
    return means.astype(np.float32), float(threshold)


def save(file: Path, sha256: str, made: Made) -> Path:
    """STEM.linear.npz or STEM.bank.npz beside the exported file of that sha256: the head that is in it, for `--head` of
    `bingo-edge classify` and of `export`. Returns the file.
    """
    arrays: dict[str, Any] = {"model_sha256": sha256, **made.head._asdict()}
    if isinstance(made.head, BankHead):
        arrays["embeddings"] = made.head.embeddings.astype(np.float16)
        if made.paths:
            arrays["paths"] = [path.encode("utf-8", "backslashreplace").decode() for path in made.paths]
    if made.means is not None and made.threshold is not None:
        arrays |= {"means": made.means, "threshold": made.threshold}
    target = file.with_suffix(exported.LINEAR if isinstance(made.head, LinearHead) else exported.BANK)
    with run_dir.atomic(target) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **{key: np.asarray(value) for key, value in arrays.items()})  # type: ignore[arg-type]
    return target
