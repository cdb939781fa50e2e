"""Each figure of a proof: how it is measured, and the words about it that travel with it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bingo_compress.data import image_list
from bingo_compress.evaluation import finetune, intervals, probes, scores
from bingo_compress.evaluation.scores import Sides
from bingo_compress.features import neighbours


@dataclass(frozen=True)
class Extras:
    """What a proof may have beside its plain probes. shots: parts of the labels, such as "1%,10%,5", to probe with as
    well and, with fine_tune, to fine-tune on; literature: the linear probe with augmentation too; against: another
    finished run, whose student is compared on the same images; mistakes: small pictures of test images that the student
    got wrong are kept in the run's work folder.
    """

    shots: str = ""
    fine_tune: bool = False
    literature: bool = False
    against: Path | None = None
    mistakes: bool = False


NO_EXTRAS = Extras()


class Judged(NamedTuple):
    """One model's answers: predicted: (M,) positions in sides.classes by "knn" and by "linear"; own: the same by the
    classes in a file, scores.NONE_OF_THESE and UNKNOWN among them; None of a model without.
    """

    name: str
    sides: Sides
    head: probes.LinearHead
    predicted: dict[str, Tensor]
    own: Tensor | None = None


class Figure(NamedTuple):
    """A figure of the proof. title: of its column, how: how it is measured, both for a bank of so many images;
    measure: its value by its own key with what stands beside it; nothing where it cannot be measured.
    """

    title: Callable[[int], str]
    how: Callable[[int], str]
    measure: Callable[[Judged], dict[str, Any]]


def _balanced(judged: Judged) -> dict[str, Any]:
    labels, predicted = judged.sides.query_labels, judged.predicted["linear"]
    return {
        "linear_balanced": probes.balanced_accuracy(predicted, labels),
        "linear_balanced_interval": intervals.mean_share_interval(predicted == labels, labels),
    }


def _linear(judged: Judged) -> dict[str, Any]:
    found = scores.with_interval("linear", judged.predicted["linear"] == judged.sides.query_labels)
    end = probes.grid_end(judged.head.strength)
    return found | {"linear_strength": judged.head.strength} | ({"linear_at_grid_end": end} if end else {})


def _area(judged: Judged) -> dict[str, Any]:
    if len(judged.sides.classes) != 2:
        return {}
    # Not a softmax: where that rounds to 1, a sure answer and a surer one would be equal.
    logits, positive = judged.head.logits(judged.sides.queries[judged.name]), judged.sides.query_labels == 0
    area = probes.auc(logits[:, 0] - logits[:, 1], positive)
    interval = intervals.area_interval(area, int(positive.sum()), int((~positive).sum()))
    return {"linear_auc": area, "linear_auc_interval": interval}


def _recall(judged: Judged) -> dict[str, Any]:
    bank, queries = judged.sides.bank, judged.sides.queries
    if not neighbours.recall_k(len(bank[judged.name])):
        return {}
    each = probes.neighbour_recalls((queries["teacher"], bank["teacher"]), (queries[judged.name], bank[judged.name]))
    # The teacher finds its own neighbours, whatever the images.
    interval = (1.0, 1.0) if judged.name == "teacher" else intervals.bounded_interval(each)
    return {"neighbour_recall": float(each.mean()), "neighbour_recall_interval": interval}


def _recall_how(bank: int) -> str:
    k = neighbours.recall_k(bank)
    if not k:
        return f"not measured: a bank of {bank:,} is too small (at least {neighbours.RECALL_SHARE})"
    return (
        f"share of the teacher's {k} nearest bank images of each test image that are also the model's; by chance"
        f" {k / bank:.3f}; no labels used"
    )


def _own_classes(judged: Judged) -> dict[str, Any]:
    if judged.own is None:
        return {}
    found = scores.with_interval("own_classes", judged.own == judged.sides.query_labels)
    return found | {"none_of_these": float((judged.own == scores.NONE_OF_THESE).double().mean())}


# Tables, card, protocol and --require take what is here.
FIGURES = {
    "knn": Figure(
        lambda bank: "kNN",
        lambda bank: f"weighted vote exp(cos/{probes.KNN_TEMPERATURE}), k = {probes.KNN_K} (DINO), plain view",
        lambda judged: scores.with_interval("knn", judged.predicted["knn"] == judged.sides.query_labels),
    ),
    "linear": Figure(
        lambda bank: "linear",
        lambda bank: (
            "logistic regression (Newton, float64) on frozen standardised features; L2 strength of"
            f" {min(probes.L2_STRENGTHS):g} to {max(probes.L2_STRENGTHS):g} by stratified {probes.FOLDS}-fold"
            " cross-validation in the bank, the strongest within one standard error of the best, never on the test"
            " set; refitted on the whole bank"
        ),
        _linear,
    ),
    "linear_balanced": Figure(
        lambda bank: "balanced",
        lambda bank: "mean over classes with test images of the linear probe's recall",
        _balanced,
    ),
    "linear_auc": Figure(
        lambda bank: "AUC", lambda bank: "of two classes: area under the linear probe's ROC curve", _area
    ),
    "neighbour_recall": Figure(neighbours.recall_title, _recall_how, _recall),
    "own_classes": Figure(
        lambda bank: "own classes",
        lambda bank: (
            "of a file with classes in it: share of the test images that it names rightly, by the head that it was"
            ' exported with; "none of these" is wrong, and so are images of classes that it does not know'
        ),
        _own_classes,
    ),
}


def figures_of(
    name: str, sides: Sides, head: probes.LinearHead, own: Tensor | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the figures of one model, whether kNN and linear were right on each query, bool (M,)). own: as in `Judged`."""
    nearest = probes.knn_predict(sides.bank[name], sides.labels, sides.queries[name], len(sides.classes))
    judged = Judged(name, sides, head, {"knn": nearest, "linear": head.predict(sides.queries[name])}, own)
    found: dict[str, Any] = {}
    for figure in FIGURES.values():
        found |= figure.measure(judged)
    return found, {key: predicted == sides.query_labels for key, predicted in judged.predicted.items()}


def protocol(sides: Sides, test: image_list.ImageList | None, specs: list[str], extras: Extras) -> dict[str, Any]:
    """What was measured on these sides, key by key. specs: the parts of extras.shots."""
    bank, bank_size = sides.bank_folder.where, len(sides.labels)
    said: dict[str, Any] = {
        "figures": {key: figure.title(bank_size) for key, figure in FIGURES.items()},
        **{key: figure.how(bank_size) for key, figure in FIGURES.items()},
        "recall": neighbours.recall_facts(bank_size),
        "onnx": (
            "an exported file: kNN and linear have a bank and a head of this proof, whatever classes are in the file:"
            " kNN a bank of the file's own features; linear in float the student's head where both see pictures alike,"
            " else, and in int8 always, a head fitted on the file's own features"
        ),
        "intervals": (
            f"95%, over test images: percentile bootstrap, {intervals.DRAWS} draws; of under {intervals.FEW} images"
            " Wilson's for a share and Student's for recall, where all agree Wilson's (balanced: Wilson's of each class"
            " combined, MOVER), Newcombe's for the AUC; bank, weights and heads stay as they are, so that a second run"
            " of distill may land outside"
        ),
        "per_class": "the linear probe's recall of each class; confusion: counts, rows the truth; of more than"
        f" {scores.DENSE} classes the weakest, and the pairs that are confused most",
        "gap_closed": (
            "(student - random) / (teacher - random) of the linear probe; left out where teacher - random is under "
            f"{scores.LEAST_GAP}"
        ),
        "bank": bank,
        "test": test.where if test else f"a quarter of each class of {bank}, set aside by whole scenes of near-copies",
        "bank_digest": sides.bank_folder.fingerprint(),
        "test_digest": sides.query_folder.fingerprint(),
        "bank_images": bank_size,
        "test_images": len(sides.query_labels),
        "classes": sides.classes,
    } | ({"near_copies": sides.near} if sides.near else {})
    return said | _extra_words(said["figures"], specs, extras)


def _extra_words(figures: dict[str, str], specs: list[str], extras: Extras) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if specs:
        said["shots"] = (
            f"the linear probe on a part of each class of the bank ({', '.join(specs)}; at least one image a class):"
            f" mean over {scores.SUBSETS} draws of the part, spread their standard deviation, interval over test images"
        )
    if extras.fine_tune:
        said["fine_tuned"] = (
            "student, start and random weights (the teacher would be expensive), everything trained, on the first of"
            f" the draws alone: random crops of {finetune.SCALE_MIN}-1 and flips, Nesterov SGD, cosine, no weight"
            f" decay, batches of {finetune.TUNE_BATCH}, at least {finetune.TUNE_EPOCHS} epochs and"
            f" {finetune.TUNE_STEPS} steps; learning rate {' or '.join(map(str, finetune.TUNE_LRS))} for the backbone,"
            " whichever does better on a fifth of the part held out, never on the test set, then all of the part;"
            f" {finetune.HEAD_LR} for the classifier, on features of length one"
        )
    if extras.literature:
        said["figures"] = figures | {"literature": "linear, augmented"}
        said["literature"] = (
            "student, start and random weights (the teacher would be expensive): MoCo's linear protocol, SGD with"
            f" learning rate 30 (EfficientNet, MobileNet: 3), no weight decay, batches of {finetune.LINEAR_BATCH},"
            f" {finetune.LINEAR_EPOCHS} epochs, x0.1 at 60% and 80%, random crops of {finetune.SCALE_MIN}-1 and flips"
            " on frozen weights; tested on the plain view"
        )
    if extras.fine_tune or extras.literature:
        said["crops"] = "cut from images stored as squares of 9/8 of the student's input, as in distillation"
    if extras.against:
        said["against"] = f"the student of {extras.against} on the same images, each student with its own input size"
        said["paired"] = (
            "this student minus the other; 95% paired bootstrap over test images; exact two-sided McNemar test"
            " (p_value)"
        )
    return said
