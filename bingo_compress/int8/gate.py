"""The gate of an int8 file: on the user's own images it must be the model that its float file is."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bingo_edge.heads import Head, classify
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bingo_compress.data import image_list
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import intervals, probes, scores
from bingo_compress.exporters.onnx import Gate
from bingo_compress.features import near_copies, neighbours
from bingo_compress.features.neighbours import Search, mates
from bingo_compress.models.encoder import Preprocessing
from bingo_compress.models.exported import onnx_runner
from bingo_compress.runtime import console
from bingo_compress.sources.opened import Data

LEAST_COSINE, LEAST_WORST = 0.99, 0.9  # mean of all images, and the worst: a mean of 0.9927 hid one of 0.826
GALLERY_LEAST = 256
LEAST_RECALL = 0.80
LEAST_SAME_CLASS = 0.90
MAX_LOSS = 0.5  # points of accuracy
CHOOSE_SHARE = 0.25  # of each class of --labels that is in the bank

# The bank, and the test images where these have a folder of their own.
Labels = tuple[image_list.ImageList, image_list.ImageList | None]
Accuracies = dict[str, dict[str, float]]  # of "knn" and "linear": {"float": .., "int8": ..}


class Known(NamedTuple):
    """What the class head of the float file is, and `sides_of` the labelled images, where there are such."""

    head: Head
    sides: scores.Sides | None


def make_gate(
    float_file: Path,
    gallery: Tensor,
    preprocessing: Preprocessing,
    labels: Labels | None,
    max_loss: float,
    known: Known | None = None,
) -> Gate:
    """What compares a quantised file with `float_file`. gallery: uint8 (n, S, S, 3), images that no range was found on;
    labels: of `open_labelled`.

    Figures of `choose`: mean and smallest cosine of the two embeddings of an image; share of an image's k nearest
    others in `gallery` (`probes.recall_k`) that stay its nearest, where the gallery is large enough; with `known`,
    share of the images that its head takes for the same class; with `labels`, kNN and linear accuracy on a part of each
    of its classes. Of `report`, with `labels`: the same two accuracies on the test images (without a folder of these: a
    quarter of each class, set aside from the start). Always with the float file's own bank and head, as the int8 file
    is to take its place. They name those below the gate: LEAST_COSINE, LEAST_WORST, LEAST_RECALL, LEAST_SAME_CLASS,
    `max_loss` points of accuracy. Raises BingoError.
    """
    if len(gallery) < GALLERY_LEAST:
        console.say(
            f"int8 is judged on {len(gallery)} images (expected {GALLERY_LEAST} or more): there are no more to spare"
        )
    embedded, features = onnx_runner(float_file)(gallery)
    others = [_neighbour_judge(embedded), *([_class_judge(known.head, embedded, features)] if known else [])]
    sides = known.sides if known and known.sides else None
    labelled = _labelled(float_file, preprocessing, labels, sides) if labels else None

    def choose(file: Path) -> tuple[dict[str, Any], list[str]]:
        found, features = onnx_runner(file)(gallery)
        cosines = cosine_similarity(found, embedded)
        told: dict[str, Any] = {
            "images": len(gallery),
            "mean_cosine": float(cosines.mean()),
            "min_cosine": float(cosines.min()),
        }
        missed: list[str] = []
        # "not >=" and not "<", so that a NaN is refused too.
        if not told["mean_cosine"] >= LEAST_COSINE:
            missed.append(f"mean cosine {told['mean_cosine']:.4f} (at least {LEAST_COSINE})")
        if not told["min_cosine"] >= LEAST_WORST:
            missed.append(f"smallest cosine {told['min_cosine']:.4f} (at least {LEAST_WORST})")
        for judge in others:
            figures, below = judge(found, features)
            told, missed = told | figures, missed + below
        if not labelled:
            return told, missed
        accuracies = labelled.choose(file)
        return told | accuracies, missed + _lost(accuracies, max_loss)

    def report(file: Path) -> tuple[dict[str, Any], list[str]]:
        if not labelled:
            return {}, []
        accuracies = labelled.report(file)
        changes = [f"{name} {pair['float']:.4f} to {pair['int8']:.4f}" for name, pair in accuracies.items()]
        console.say(f"int8 on the labelled test images: {', '.join(changes)}")
        return {**accuracies, "test_images": labelled.tests}, _lost(accuracies, max_loss)

    return Gate(choose, report, labelled.files if labelled else set(), partial(_lost_classes, most=max_loss))


# Embeddings and features of the gallery to figures, and the names of those below the gate.
GalleryJudge = Callable[[Tensor, Tensor], tuple[dict[str, Any], list[str]]]


def _neighbour_judge(embedded: Tensor) -> GalleryJudge:
    k = neighbours.recall_k(len(embedded) - 1)
    if not k:
        console.say(
            f"the int8 gate does not judge neighbours: {len(embedded)} images are too few (at least"
            f" {neighbours.RECALL_SHARE + 1})"
        )
        return lambda found, features: ({}, [])
    near, chance = mates(embedded, k, Search("exact"))[0], k / (len(embedded) - 1)

    def judge(found: Tensor, features: Tensor) -> tuple[dict[str, Any], list[str]]:
        kept = (mates(found, k, Search("exact"))[0][:, :, None] == near[:, None, :]).any(2)
        recall = float(kept.double().mean())
        missed = f"neighbour recall@{k} {recall:.3f} (at least {LEAST_RECALL}, by chance {chance:.3f})"
        told = {"recall": recall, "recall_k": k, "recall_chance": chance}
        return told, [] if recall >= LEAST_RECALL else [missed]

    return judge


def _class_judge(head: Head, embedded: Tensor, features: Tensor) -> GalleryJudge:
    """Coarse: the head may have been fitted on the gallery's images, which are easy then. What int8 costs on images
    that it has not seen is `_lost_classes`.
    """
    before = classify(head, embedded.numpy(), features.numpy())[0]

    def judge(found: Tensor, features: Tensor) -> tuple[dict[str, Any], list[str]]:
        same = float((classify(head, found.numpy(), features.numpy())[0] == before).mean())
        missed = f"the same class for {same:.3f} of the images (at least {LEAST_SAME_CLASS})"
        return {"same_class": same}, [] if same >= LEAST_SAME_CLASS else [missed]

    return judge


def _lost_classes(before: dict[str, Any], after: dict[str, Any], most: float) -> str:
    if not {"accuracy"} <= before.keys() & after.keys():
        return ""
    return ", ".join(_lost({"scores": {"float": before["accuracy"], "int8": after["accuracy"]}}, most))


def _lost(accuracies: Accuracies, most: float) -> list[str]:
    lost = {name: 100 * (pair["float"] - pair["int8"]) for name, pair in accuracies.items()}
    return [
        f"{name} accuracy {points:.2f} points below float's {accuracies[name]['float']:.4f} (at most {most:g})"
        for name, points in lost.items()
        if not points <= most + 1e-9
    ]


class _Labelled(NamedTuple):
    choose: Callable[[Path], Accuracies]
    report: Callable[[Path], Accuracies]
    files: set[str]
    tests: int


def open_labelled(labels: Data, test: Data | None, work: Path | None = None) -> Labels:
    """`scores.open_labelled`: of each class one image is to choose by, one to report on and one for the bank."""
    return scores.open_labelled(labels, test, "--labels", 3, work)


def sides_of(float_file: Path, preprocessing: Preprocessing, labels: Labels) -> scores.Sides:
    """The labelled images with the features "float" of a file. Raises BingoError."""
    exact = onnx_runner(float_file)
    model = {"float": (preprocessing, lambda batch: exact(batch)[1])}
    return scores.sides(model, *labels, image_list.labels_of(labels[0])[0], parts=3)


def _labelled(
    float_file: Path, preprocessing: Preprocessing, labels: Labels, known: scores.Sides | None = None
) -> _Labelled:
    """The accuracies to choose by and those to report, the sha256 of the images behind both, and how many are reported
    on. known: `sides_of` these, where it is there already. Raises BingoError.
    """
    bank_folder, test_folder = labels
    sides = known or sides_of(float_file, preprocessing, labels)
    classes = sides.classes
    bank, labelled_as, places = sides.bank["float"], sides.labels, torch.tensor(sides.places)
    labelled_images = bank_folder.only(sides.places)
    contents, groups = labelled_images.digests, near_copies.same_bytes(labelled_images.contents.digests)
    if sides.groups is not None:
        groups, _ = near_copies.parted(sides.groups, labelled_as, groups)
    aside = _part(labelled_as, groups)
    if len(labelled_as[~aside].unique()) < len(labelled_as.unique()):
        raise BingoError(
            f"--labels: expected {'two' if test_folder else 'three'} different images or more in every class of"
            f" {bank_folder.where}, so that a file can be chosen by one and not the others; add images"
        )
    tests = sides.query_folder.only(sides.query_places).digests

    def compared(
        kept: Tensor, queries: Tensor, wanted: Tensor, folder: image_list.ImageList, which: list[int], what: str
    ) -> Callable[[Path], Accuracies]:
        head = probes.fit_linear(bank[kept], labelled_as[kept], len(classes), groups=groups[kept])

        def accuracies(features: Tensor) -> dict[str, float]:
            nearest = probes.knn_predict(bank[kept], labelled_as[kept], features, len(classes))
            return {"knn": probes.accuracy(nearest, wanted), "linear": probes.accuracy(head.predict(features), wanted)}

        before = accuracies(queries)
        console.say(f"float on {len(wanted):,} {what}: kNN {before['knn']:.4f}, linear {before['linear']:.4f}")

        def judged(file: Path) -> Accuracies:
            run = onnx_runner(file)
            model = {"int8": (preprocessing, lambda batch: run(batch)[1])}
            after = accuracies(scores.again(model, folder, which, f"embed {what}")["int8"])
            return {name: {"float": before[name], "int8": after[name]} for name in before}

        return judged

    choose = compared(
        ~aside, bank[aside], labelled_as[aside], bank_folder, places[aside].tolist(), "labelled images to choose by"
    )
    everything = torch.ones_like(aside)
    report = compared(
        everything,
        sides.queries["float"],
        sides.query_labels,
        sides.query_folder,
        sides.query_places,
        "labelled test images",
    )
    return _Labelled(choose, report, {*tests, *(contents[row] for row in aside.nonzero()[:, 0].tolist())}, len(tests))


def _part(labels: Tensor, groups: Tensor) -> Tensor:
    """CHOOSE_SHARE of each class, at random but always the same, images of one group all on one side. labels, groups:
    (N,). Returns bool (N,).
    """
    generator = torch.Generator().manual_seed(0)
    chosen: set[int] = set()
    for rows in intervals.rows_by_class(labels):
        different = list(dict.fromkeys(groups[rows].tolist()))
        take = max(1, int(len(different) * CHOOSE_SHARE))
        chosen |= {different[place] for place in torch.randperm(len(different), generator=generator)[:take].tolist()}
    return torch.tensor([group in chosen for group in groups.tolist()])
