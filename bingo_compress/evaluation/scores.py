"""What `validate` measures on features: every figure with its 95% interval, classes, few labels, two students, the
bags' purity.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo_compress.data.hashing import hashed
from bingo_compress.data.image_list import UNREADABLE, ImageList, labels_of, refuse_other_classes, say_splits
from bingo_compress.data.listing import list_images
from bingo_compress.errors import BingoError
from bingo_compress.evaluation import finetune, intervals, probes
from bingo_compress.features import bagging, extract, near_copies
from bingo_compress.models.encoder import Preprocessing
from bingo_compress.runtime import console
from bingo_compress.runtime.run_dir import made_by
from bingo_compress.sources.opened import Data

LEAST_GAP = 0.05
DENSE = 200  # classes up to which a confusion matrix is written; above, this many classes and pairs
NAMED = 5  # classes in a message
SUBSETS = 3  # draws of few labels
TEST_SHARE = 0.25  # of each class, where no test images are given
NONE_OF_THESE, UNKNOWN = -1, -2  # what the classes in a file may answer beside those of a proof; UNKNOWN: others


@dataclass(frozen=True)
class Sides:
    """Bank and test images as every model sees them.

    bank, queries: features (N, D) and (M, D) by model; labels, query_labels: (N,) and (M,), positions in `classes`.
    places, query_places: which files of bank_folder and query_folder the N and M rows are; groups: (N,) the same for
    images that no split sets apart, exact copies or near-copies; near: near-copies as the protocol tells them.
    """

    classes: list[str]
    bank: dict[str, Tensor]
    labels: Tensor
    bank_folder: ImageList
    places: list[int]
    queries: dict[str, Tensor]
    query_labels: Tensor
    query_folder: ImageList
    query_places: list[int]
    groups: Tensor | None = None
    near: dict[str, Any] = field(default_factory=dict)


def with_interval(key: str, values: Tensor) -> dict[str, Any]:
    """The mean of per-query votes (M,) in 0-1 as {key: share, key_interval: (low, high)}."""
    return {key: float(values.double().mean()), f"{key}_interval": intervals.share_interval(values)}


def embedded(
    models: Mapping[str, tuple[Preprocessing, extract.Embed]],
    folder: ImageList,
    classes: list[str],
    what: str,
    keep: extract.Keep | None = None,
) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """(features by model, labels as positions in `classes`, which files) of the images of a labelled folder that can be
    decoded; says how many cannot.

    keep: as in `embed.plain`.
    """
    features, good = extract.plain(models, folder, range(len(folder.files)), what, keep)
    if len(good) < len(folder.files) or folder.bad:
        console.say(
            f"{len(folder.files) - len(good) + len(folder.bad):,} files in {folder.where} cannot be used and are left"
            " out; `bingo-compress check` names them"
        )
    names, labels = labels_of(folder)
    place = {name: position for position, name in enumerate(classes)}
    return features, torch.tensor([place[names[labels[index]]] for index in good]), good


def again(
    models: Mapping[str, tuple[Preprocessing, extract.Embed]], folder: ImageList, places: Sequence[int], what: str
) -> dict[str, Tensor]:
    """Features by model of images that could be decoded before. Raises BingoError where one cannot be now: all rows
    after it would have another's label.
    """
    features, good = extract.plain(models, folder, places, what)
    if len(good) < len(places):
        lost = folder.place(next(index for index in places if index not in set(good)))
        raise BingoError(
            f"{lost} could be read before and cannot be now; bring it back, or start the command again without it"
        )
    return features


def sides(
    models: Mapping[str, tuple[Preprocessing, extract.Embed]],
    bank_folder: ImageList,
    test_folder: ImageList | None,
    classes: list[str],
    keep: extract.Keep | None = None,
    parts: int = 2,
) -> Sides:
    """Every labelled image embedded by every model; without a test folder a quarter of each class of the bank is set
    aside, near-copies on one side, as the teacher, or where there is none the first model, sees them.

    keep: as in `embedded`; parts: as in `near_copies.parted`, without a test folder.
    """
    seer = "teacher" if "teacher" in models else next(iter(models))
    bank, labels, places = embedded(models, bank_folder, classes, "embed labelled images", keep)
    groups = near_copies.same_bytes(bank_folder.only(places).contents.digests)
    if len(groups.unique()) < len(groups):
        console.say(
            f"{len(groups) - len(groups.unique()):,} labelled images are exact copies of others; copies stay on one"
            " side of every split"
        )
    if test_folder:
        queries, query_labels, query_places = embedded(models, test_folder, classes, "embed test images", keep)
        seen = ((bank[seer], bank_folder.only(places)), (queries[seer], test_folder.only(query_places)))
        scenes = scenes_of(models[seer], seen)
        near, groups = near_bank(scenes, len(places)), scenes[: len(places)]
        return Sides(
            classes, bank, labels, bank_folder, places, queries, query_labels, test_folder, query_places, groups, near
        )
    refuse_small(classes, labels.tolist(), groups.tolist(), "--data", 2)  # some could not be decoded
    scenes = scenes_of(models[seer], ((bank[seer], bank_folder.only(places)),))
    groups, whole = near_copies.parted(scenes, labels, groups, parts)
    near = near_data(scenes, [classes[label] for label in whole], parts)
    chosen = _quarter(labels, groups)
    queries, bank = ({name: rows[part] for name, rows in bank.items()} for part in (chosen, ~chosen))
    query_places, places = (torch.tensor(places)[part].tolist() for part in (chosen, ~chosen))
    return Sides(
        classes,
        bank,
        labels[~chosen],
        bank_folder,
        places,
        queries,
        labels[chosen],
        bank_folder,
        query_places,
        groups[~chosen],
        near,
    )


def scenes_of(model: tuple[Preprocessing, extract.Embed], parts: Sequence[tuple[Tensor, ImageList]]) -> Tensor:
    """The scene (N,) of every image of `parts` (the model's features, images), as the model sees them; says what it
    found.
    """
    scenes = near_copies.in_folders(model, parts)
    names = [folder.place(index) for _, folder in parts for index in range(len(folder.files))]
    if told := near_copies.describe(scenes, names, "labelled images"):
        console.say(f"{told}; a scene stays on one side of every split")
    return scenes


def near_bank(scenes: Tensor, bank: int) -> dict[str, Any]:
    """How many of the images to test on, which stand behind `bank` others in `scenes` (N + M,), have a near-copy among
    those; says so.
    """
    shared = torch.isin(scenes[bank:], scenes[:bank])
    count, share = int(shared.sum()), float(shared.double().mean())
    if count:
        console.say(
            f"warning: {count:,} of {len(shared):,} test images ({share:.0%}) have a near-copy in the bank, which is"
            " found, not recognised: every model looks better than it is; put whole scenes on one side"
        )
    return {"test_images_near_bank": count, "test_share_near_bank": share}


def near_data(scenes: Tensor, whole: Sequence[str], parts: int = 2) -> dict[str, Any]:
    """What is told of a split in `parts` by scenes (N,), of which `whole` classes are fewer each; says so."""
    found = near_copies.groups(scenes)
    if whole:
        more = f" and {len(whole) - NAMED:,} classes more" if len(whole) > NAMED else ""
        scene = "one scene" if parts == 2 else f"fewer than {parts} scenes"
        console.say(
            f"warning: all images of {', '.join(whole[:NAMED])}{more} are near-copies of one another, {scene}, and on"
            " both sides of the split: every model looks better than it is; give --test with other scenes"
        )
    return {"images": sum(map(len, found)), "scenes": len(found), "classes_of_one_scene": list(whole)}


def open_labelled(
    data: Data, test: Data | None, option: str, least: int = 2, work: Path | None = None
) -> tuple[ImageList, ImageList | None]:
    """(the bank, which `option` gives, the test images or None). Raises BingoError for what no figure can come of:
    images without labels, test images of other classes or that are in the bank, a class of fewer than `least` different
    images. work: as in `list_images`.
    """
    bank = list_images(data, option, work)
    say_splits(bank)
    labels_of(bank)
    tested = list_images(test, "--test", work) if test else None
    if tested:
        refuse_other_classes(bank, tested, option)
    bank, tested = hashed(bank), hashed(tested) if tested else None
    if tested:
        refuse_shared(bank, tested, option)
    refuse_few(bank, tested, option, least)
    return bank, tested


def refuse_shared(bank: ImageList, test: ImageList, option: str) -> None:
    """Raise BingoError if images of `test` (--test) are, by content, also in `bank` (given by `option`): they would be
    found, not recognised.
    """
    names = dict(zip(bank.digests, bank.files, strict=True))
    names.pop(UNREADABLE, None)  # what nobody could read is not the same picture
    shared = [(name, names[digest]) for name, digest in zip(test.files, test.digests, strict=True) if digest in names]
    if shared:
        raise BingoError(
            f"--test: expected images that are not in {option}, found {len(shared):,} of {len(test.files):,} in both "
            f"({shared[0][0]} is {shared[0][1]}); take them out of one, or leave --test out"
        )


def refuse_few(bank: ImageList, test: ImageList | None, option: str, least: int = 2) -> None:
    """Raise BingoError if a class of `bank` (given by `option`) has fewer than `least` different images; with a `test`
    none is tested on, and one less will do. Files are read, nothing is decoded.
    """
    classes, labels = labels_of(bank)
    refuse_small(classes, labels, bank.digests, option, least - bool(test))


def refuse_small(
    classes: Sequence[str], labels: Sequence[int], contents: Sequence[Any], option: str, least: int
) -> None:
    """Raise BingoError with the names of the classes of fewer than `least` different images. labels, contents: of each
    image, its position in `classes` and what is equal for copies.
    """
    different: list[set[Any]] = [set() for _ in classes]
    for label, content in zip(labels, contents, strict=True):
        if content != UNREADABLE:
            different[label].add(content)
    small = [f"{len(found)} in {name}" for name, found in zip(classes, different, strict=True) if len(found) < least]
    if small:
        more = f" and in {len(small) - NAMED:,} classes more" if len(small) > NAMED else ""
        way = ", or give --test" if least > 1 else ""
        raise BingoError(
            f"{option}: expected at least {('one', 'two', 'three')[least - 1]} different images in every class, so that"
            f" one can be tested on and another kept; found {', '.join(small[:NAMED])}{more}; add images, take the"
            f" class out{way}"
        )


def trained_on(bags: Path, folder: ImageList) -> int | None:
    """How many images of a folder are, by content, among those that a run was trained on, without labels; None where
    the run does not say. bags: the run's.
    """
    trained = set(map(bytes, bagging.load(bags).digests))
    return sum(bytes(digest) in trained for digest in folder.contents.digests) if trained else None


def _quarter(labels: Tensor, groups: Tensor) -> Tensor:
    """A quarter of each class, at random but always the same, as the test set; copies (equal groups, (N,)) stay
    together, and a group goes where it brings the test set nearer to a quarter.

    Returns bool (N,). Raises BingoError for a class of which not one image can be tested on and another kept.
    """
    generator = torch.Generator().manual_seed(0)
    taken: set[int] = set()
    classes: list[Counter[int]] = []
    for rows in intervals.rows_by_class(labels):
        take = max(1, int(len(rows) * TEST_SHARE))
        sizes = Counter(groups[rows[torch.randperm(len(rows), generator=generator)]].tolist())
        held, smallest = sum(size for group, size in sizes.items() if group in taken), min(sizes.values())
        for group, size in sizes.items():
            if group not in taken and (2 * held + size <= 2 * take or (not held and size == smallest)):
                taken.add(group)
                held += size
        classes.append(sizes)
    if not all(0 < len(taken & sizes.keys()) < len(sizes) for sizes in classes):
        raise BingoError(
            "--data: expected at least two different images in every class, so that one can be tested on; add images or"
            " give --test"
        )
    return torch.tensor([group in taken for group in groups.tolist()])


def by_class(predicted: Tensor, sides: Sides) -> dict[str, Any]:
    """Per class: test images, share found, and the class it is most often taken for; how many classes are untested, of
    no image; and the confusion matrix, rows the truth. Of more than DENSE classes the weakest, and the pairs that are
    confused most, as [truth, taken for, images].
    """
    classes, labels, count = sides.classes, sides.query_labels, len(sides.classes)
    images = torch.bincount(labels, minlength=count).tolist()
    right = torch.bincount(labels[predicted == labels], minlength=count).tolist()
    shares = [found / there if there else None for found, there in zip(right, images, strict=True)]
    cells, times = (labels * count + predicted).unique(return_counts=True)
    wrong = [
        (index // count, index % count, number)
        for index, number in zip(cells.tolist(), times.tolist(), strict=True)
        if index // count != index % count
    ]
    wrong.sort(key=lambda pair: -pair[2])
    taken_for: dict[int, int] = {}
    for truth, guess, _ in wrong:
        taken_for.setdefault(truth, guess)
    shown = list(range(count))
    if count > DENSE:
        shown = sorted((index for index in shown if images[index]), key=lambda index: shares[index] or 0.0)[:DENSE]
    entries: list[dict[str, Any]] = []
    for index in shown:
        mistaken = classes[taken_for[index]] if index in taken_for else None
        entry = {"class": classes[index], "images": images[index], "accuracy": shares[index], "mistaken_for": mistaken}
        if images[index]:
            entry["accuracy_interval"] = intervals.share_interval(predicted[labels == index] == index)
        entries.append(entry)
    told = {"per_class": entries, "untested": images.count(0)}
    if count > DENSE:
        pairs = [[classes[truth], classes[guess], number] for truth, guess, number in wrong[:DENSE]]
        return told | {"confused_most": pairs}
    return told | {"confusion": intervals.confusion(predicted, labels, count).tolist()}


def gap_closed(low: Tensor, value: Tensor, high: Tensor) -> dict[str, Any]:
    """How far a model got from `low` to `high`, each right or wrong on the same queries (M,); nothing where there is
    hardly a gap.
    """
    if float(high.double().mean() - low.double().mean()) < LEAST_GAP:
        return {}

    def closed(drawn: Tensor) -> float:
        return probes.gap_closed(*(float(right[drawn].double().mean()) for right in (low, value, high)))

    return {"gap_closed": closed(torch.arange(len(low))), "gap_closed_interval": intervals.interval(closed, len(low))}


def few_labels(name: str, sides: Sides, spec: str) -> dict[str, Any]:
    """The linear probe of one model on a part of the labels: mean and spread over SUBSETS draws of the part, interval
    over the queries.
    """
    right = []
    for seed in range(SUBSETS):
        chosen = finetune.subset(sides.labels, spec, seed)
        groups = None if sides.groups is None else sides.groups[chosen]
        head = probes.fit_linear(sides.bank[name][chosen], sides.labels[chosen], len(sides.classes), groups=groups)
        right.append(head.predict(sides.queries[name]) == sides.query_labels)
    _, spread = intervals.mean_and_spread([float(each.double().mean()) for each in right])
    return (
        {"images": len(chosen)}
        | with_interval("linear", torch.stack(right).double().mean(0))
        | {"linear_spread": spread}
    )


def compared(a: Tensor, b: Tensor) -> dict[str, Any]:
    """`evidence.paired` as JSON."""
    found = intervals.paired(a, b)
    return {
        "difference": found.difference,
        "difference_interval": (found.low, found.high),
        "only_this": found.only_a,
        "only_other": found.only_b,
        "p_value": found.p_value,
    }


def bag_purity(file: Path, labelled: ImageList) -> dict[str, Any]:
    """Share of (anchor, mate) pairs of a run's bags with the same label, of those that `labelled` has both labels for;
    nothing where it has none.
    """
    bags, _, digests = bagging.load(file)
    known = dict(zip(map(bytes, labelled.contents.digests), labels_of(labelled)[1], strict=True))
    with made_by("distill", file):
        labels = torch.tensor([known.get(bytes(digest), -1) for digest in digests] or [-1] * len(bags))
        mates = torch.where(bags >= 0, labels[bags.clamp(min=0)], -1)
    pairs = (mates >= 0) & (labels >= 0)[:, None]
    anchors = pairs.any(1)
    if not anchors.any():
        return {}
    same, counts = ((part & pairs)[anchors].sum(1).double() for part in (mates == labels[:, None], pairs))
    each = torch.bincount(labels[labels >= 0]).double()
    return {
        "bag_purity": float(same.sum() / counts.sum()),
        "bag_purity_interval": intervals.interval(
            lambda drawn: float(same[drawn].sum() / counts[drawn].sum()), len(same)
        ),
        "bag_purity_chance": float((each * (each - 1)).sum() / (each.sum() * (each.sum() - 1))),
    }
