"""How each figure of a proof was made, in words that travel with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bingo_compress.data import image_list
from bingo_compress.evaluation import finetune, intervals, probes, scores
from bingo_compress.evaluation.scores import Sides
from bingo_compress.features import neighbours


@dataclass(frozen=True)
class Extras:
    """What a proof may have beside its plain probes. shots: parts of the labels, such as "1%,10%,5", to probe with as
    well and, with fine_tune, to fine-tune on; literature: the linear probe with augmentation too; against: another
    finished run, whose student is compared on the same images.
    """

    shots: str = ""
    fine_tune: bool = False
    literature: bool = False
    against: Path | None = None


NO_EXTRAS = Extras()


def protocol(sides: Sides, test: image_list.ImageList | None, specs: list[str], extras: Extras) -> dict[str, Any]:
    """What was measured on these sides, key by key. specs: the parts of extras.shots."""
    bank = sides.bank_folder.where
    said: dict[str, Any] = {
        "knn": f"weighted vote exp(cos/{probes.KNN_TEMPERATURE}), k = {probes.KNN_K} (DINO), plain view",
        "linear": (
            "logistic regression (Newton, float64) on frozen standardised features; L2 strength of"
            f" {min(probes.L2_STRENGTHS):g} to {max(probes.L2_STRENGTHS):g} by stratified {probes.FOLDS}-fold"
            " cross-validation in the bank, the strongest within one standard error of the best, never on the test"
            " set; refitted on the whole bank"
        ),
        "neighbour_recall": _recall_text(len(sides.labels)),
        "recall": neighbours.recall_facts(len(sides.labels)),
        "onnx": (
            "an exported file: kNN with a bank of its own features; in float the student's linear head where both see"
            " pictures alike, else, and in int8 always, a head fitted on the file's own features"
        ),
        "linear_balanced": "mean over classes of the linear probe's recall",
        "intervals": (
            f"95%, over test images: percentile bootstrap, {intervals.DRAWS} draws; Wilson's for a share of under"
            f" {intervals.FEW} images or where all agree (balanced: Wilson's of each class combined, MOVER), Newcombe's"
            " for the AUC; bank, weights and heads stay as they are, so that a second run of distill may land outside"
        ),
        "per_class": "the linear probe's recall of each class; confusion: counts, rows the truth; of more than"
        f" {scores.DENSE} classes the weakest, and the pairs that are confused most",
        "gap_closed": (
            "(student - random) / (teacher - random) of the linear probe; left out where teacher - random is under "
            f"{scores.LEAST_GAP}"
        ),
        "bank": bank,
        "test": test.where
        if test
        else f"a quarter of each class of {bank}, set aside by scenes: near-copies stay together",
        "bank_images": len(sides.labels),
        "test_images": len(sides.query_labels),
        "classes": sides.classes,
    } | ({"near_copies": sides.near} if sides.near else {})
    return said | _extra_words(specs, extras)


def _extra_words(specs: list[str], extras: Extras) -> dict[str, Any]:
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


def _recall_text(bank: int) -> str:
    k = neighbours.recall_k(bank)
    if not k:
        return f"not measured: a bank of {bank:,} is too small (at least {neighbours.RECALL_SHARE})"
    return (
        f"share of the teacher's {k} nearest bank images of each test image that are also the model's; by chance"
        f" {k / bank:.3f}; no labels used"
    )
