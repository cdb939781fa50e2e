"""The gate of an int8 file: on the user's own images it must be the model that its float file is."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from bingo_compress import figures, images, probes, screen
from bingo_compress.encoder import Preprocessing
from bingo_compress.exporters.onnx import onnx_runner
from bingo_compress.exporters.onnx_int8 import Judge
from bingo_compress.neighbours import Search, mates

LEAST_COSINE = 0.99
LEAST_RECALL = 0.80
MAX_LOSS = 0.5  # points of accuracy


def make_judge(
    float_file: Path, gallery: Tensor, preprocessing: Preprocessing, labels: Path | None, test: Path | None, max_loss: float
) -> Judge:
    """A function that compares a quantised file with `float_file`. gallery: uint8 (n, S, S, 3), images that no range was found on.

    Its figures: mean and smallest cosine of the two embeddings of an image; share of an image's k nearest others in `gallery` (`probes.recall_k`) that stay
    its nearest, where the gallery is large enough;
    with a folder of `labels`, kNN and linear accuracy on `test` (without: a quarter of each class, set aside), with the float file's own bank and head,
    which is what a device has. It names those below the gate: LEAST_COSINE, LEAST_RECALL, `max_loss` points of accuracy. Raises BingoError.
    """
    exact = onnx_runner(float_file)
    embedded = exact(gallery)[0]
    k = probes.recall_k(len(gallery) - 1)
    near = mates(embedded, k, Search("exact"))[0] if k else None
    if near is None:
        screen.say(f"the int8 gate does not judge neighbours: {len(gallery)} images are too few (at least {probes.RECALL_SHARE + 1})")
    labelled = _labelled(float_file, preprocessing, labels, test) if labels else None

    def judge(file: Path) -> tuple[dict[str, Any], list[str]]:
        found = onnx_runner(file)(gallery)[0]
        cosines = cosine_similarity(found, embedded)
        told: dict[str, Any] = {
            "images": len(gallery),
            "mean_cosine": float(cosines.mean()),
            "min_cosine": float(cosines.min()),
        }
        missed = []
        # "not >=" and not "<", so that a NaN is refused too.
        if not told["mean_cosine"] >= LEAST_COSINE:
            missed.append(f"mean cosine {told['mean_cosine']:.4f} (at least {LEAST_COSINE})")
        if near is not None:
            kept = (mates(found, k, Search("exact"))[0][:, :, None] == near[:, None, :]).any(2)
            told |= {"recall": float(kept.double().mean()), "recall_k": k, "recall_chance": k / (len(gallery) - 1)}
            if not told["recall"] >= LEAST_RECALL:
                missed.append(f"neighbour recall@{k} {told['recall']:.3f} (at least {LEAST_RECALL}, by chance {told['recall_chance']:.3f})")
        if labelled:
            accuracies = labelled(file)
            told |= accuracies
            for name, pair in accuracies.items():
                lost = 100 * (pair["float"] - pair["int8"])
                if not lost <= max_loss + 1e-9:
                    missed.append(f"{name} accuracy {lost:.2f} points below float's {pair['float']:.4f} (at most {max_loss:g})")
        return told, missed

    return judge


def _labelled(float_file: Path, preprocessing: Preprocessing, labels: Path, test: Path | None) -> Any:
    """A function from a file to {"knn": {"float": .., "int8": ..}, "linear": ..}. Raises BingoError."""
    bank_folder = images.list_folder(labels, "--labels")
    classes, _ = images.labels_of(bank_folder)
    test_folder = images.list_folder(test, "--test") if test else None
    if test_folder:
        images.refuse_other_classes(bank_folder, test_folder, "--labels")
        figures.refuse_shared(bank_folder, test_folder, "--labels")
    exact = onnx_runner(float_file)
    sides = figures.sides({"float": (preprocessing, lambda batch: exact(batch)[1])}, bank_folder, test_folder, classes)
    head = probes.fit_linear(sides.bank["float"], sides.labels, len(classes), groups=sides.groups)

    def accuracies(features: Tensor) -> dict[str, float]:
        nearest = probes.knn_predict(sides.bank["float"], sides.labels, features, len(classes))
        return {
            "knn": probes.accuracy(nearest, sides.query_labels),
            "linear": probes.accuracy(head.predict(features), sides.query_labels),
        }

    before = accuracies(sides.queries["float"])
    screen.say(f"float on {len(sides.query_labels):,} labelled test images: kNN {before['knn']:.4f}, linear {before['linear']:.4f}")

    def judged(file: Path) -> dict[str, dict[str, float]]:
        run = onnx_runner(file)
        model = {"int8": (preprocessing, lambda batch: run(batch)[1])}
        after = accuracies(figures.again(model, sides.query_folder, sides.query_places, "embed test images")["int8"])
        return {name: {"float": before[name], "int8": after[name]} for name in before}

    return judged
