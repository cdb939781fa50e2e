"""The sections of the page that show images: bags, changed neighbours, the map, mistakes, near-copies. Of one run."""

import base64
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bingo_compress.html_report.facts import Facts, Row
from bingo_compress.html_report.looks import LARGE, SMALL
from bingo_compress.html_report.sections import Block, Missing, Section, View, chart, text

BARS = 30  # of the histogram of bags
REASONS = 12  # in a table
LEVELS = 65535  # of a place on a map
GONE = "the run's work folder, which holds its pixels and the teacher's embeddings, as distill left it"
KINDS = {
    "best": ("The closest", "bags whose images the teacher finds most alike"),
    "typical": ("Typical", "from the middle"),
    "doubtful": ("The most doubtful", "bags whose images the teacher finds least alike: does one belong to another?"),
}


def bags(facts: Facts, view: View) -> Section | Missing:
    """The best, a typical and the most doubtful bags as contact sheets."""
    what = "Bags as contact sheets"
    if facts.looks is None:
        return Missing(what, GONE)
    found = facts.looks.facts["bags"]
    if not found:
        return Missing(what, f"a method with bags (this run: {facts.recipe.method}, bags {facts.recipe.bags})")
    groups = []
    for kind, (name, note) in KINDS.items():
        sheets = [
            {
                "anchor": _picture(facts, bag["anchor"], view),
                "mates": [
                    _picture(facts, mate, view) | {"note": f"{similar:.2f}"}
                    for mate, similar in zip(bag["mates"], bag["similar"], strict=True)
                ],
            }
            for bag in found[kind]
        ]
        groups.append({"name": name, "note": note, "sheets": sheets})
    low, high = found["means"][0], found["means"][-1]
    counts, edges = np.histogram(found["means"], BARS if high > low else 1)
    middles = [round(float(first + second) / 2, 4) for first, second in itertools.pairwise(edges)]
    rows = [[f"{middle:.3f}", str(count)] for middle, count in zip(middles, counts.tolist(), strict=True)]
    data = {"x": middles, "y": counts.tolist(), "unit": "bags"}
    spread = chart("histogram", "Bags by their mean similarity", data, (("mean similarity", "bags"), rows), wide=True)
    lead = (
        "A bag is an image, first in its row, and those that the teacher sees nearest; below each its cosine similarity"
        f" to the first. Chosen from {len(found['means']):,} bags."
    )
    return Section("bags", "Bags", lead, [{"kind": "bags", "groups": groups}, {"kind": "charts", "charts": [spread]}])


def changed(facts: Facts, view: View) -> Section | Missing:
    """Images whose neighbours changed most, before and after, beside the teacher's."""
    what = "Images whose neighbours changed most"
    if facts.looks is None:
        return Missing(what, GONE)
    found = facts.looks.facts["changed"]
    if not found:
        return Missing(what, "a run of more images")
    ways = (("gained", "Closer to the teacher than before"), ("lost", "Farther from it than before"))
    groups = [
        {"name": name, "images": [_strips(facts, one, found["k"], view) for one in found[way]]}
        for way, name in ways
        if found[way]
    ]
    lead = (
        f"Each row is one image and its nearest others among {len(facts.looks.facts['images']):,}; framed are those"
        f" that are among the teacher's {found['k']:,} nearest. Over all, of these the student had"
        f" {found['start']:.1%} before and has {found['student']:.1%} now."
    )
    return Section("neighbours", "What it sees differently", lead, [{"kind": "strips", "groups": groups}])


def _strips(facts: Facts, one: Mapping[str, Any], k: int, view: View) -> dict[str, Any]:
    teachers = set(one["near"])
    rows = []
    for name, words, share in (
        ("teacher", "teacher", None),
        ("start", "before", one["shares"][0]),
        ("student", "after", one["shares"][1]),
    ):
        pictures = [
            _picture(facts, image, view) | {"shared": name != "teacher" and image in teachers} for image in one[name]
        ]
        rows.append({"name": words, "note": "" if share is None else f"{share * k:.0f} of {k}", "pictures": pictures})
    return {"image": _picture(facts, one["image"], view), "rows": rows}


def plane(facts: Facts, view: View) -> Section | Missing:
    """The map: teacher beside student in one layout."""
    what = "A map of the embedding, teacher beside student"
    if facts.looks is None:
        return Missing(what, GONE)
    if not facts.looks.places:
        return Missing(what, "a run of 50 images or more")
    places, images = facts.looks.places, facts.looks.facts["images"]
    pictures = facts.looks.pictures[SMALL] if view.images else {}
    low = torch.stack([part.amin(0) for part in (places["teacher"], places["student"])]).amin(0)
    high = torch.stack([part.amax(0) for part in (places["teacher"], places["student"])]).amax(0)
    data = {
        "teacher": _packed(places["teacher"], low, high),
        "student": _packed(places["student"], low, high),
        "others": _packed(places["others"], low, high),
        "images": images,
        "names": [facts.looks.facts["names"][str(image)] for image in images] if view.paths else [],
        "pictures": {str(image): base64.b64encode(raw).decode() for image, raw in pictures.items()},
    }
    moved = (places["teacher"] - places["student"]).norm(dim=1) / (high - low).norm()
    rows = [
        ["images in both maps", f"{len(images):,}"],
        ["further ones in the teacher's map, in grey", f"{len(places['others']):,}"],
        ["median way from the teacher's place to the student's, of the maps' diagonal", f"{float(moved.median()):.1%}"],
    ]
    name = "Map of the teacher's embedding beside the student's; an image has the same colour in both"
    block = chart("map", name, data, (("", ""), rows), wide=True)
    lead = (
        "Images that a model sees alike lie together (t-SNE). The student's map begins where the teacher's ended, and a"
        " colour is a place in the teacher's map: where colours mix, the student sees otherwise. Distances between far"
        " groups mean nothing."
    )
    return Section("map", "A map of what they see", lead, [{"kind": "charts", "charts": [block]}])


def _packed(places: Tensor, low: Tensor, high: Tensor) -> str:
    """Places (n, 2) as little-endian uint16 pairs in base64, the box from low to high as 0 to LEVELS."""
    levels = ((places - low) / (high - low).clamp(min=1e-9) * LEVELS).round().clamp(0, LEVELS)
    return base64.b64encode(levels.numpy().astype("<u2").tobytes()).decode()


def wrong(facts: Facts, view: View) -> Section | Missing:
    """The test images that the student was surest of and wrong."""
    if not facts.wrong:
        way = (
            "bingo-compress validate --run RUN --data LABELLED_FOLDER (an earlier one kept none, or nothing was wrong)"
        )
        return Missing("The images that it takes for another class", way)
    items = [
        {
            "picture": _image(each["picture"] if view.images else b"", _name(each, view)),
            "is": each["is"],
            "taken_for": each["taken_for"],
            "sure": f"{each['sure']:.0%}",
        }
        for each in facts.wrong
    ]
    lead = "Test images that the student's linear probe was surest of and wrong: of the student, or of the label?"
    return Section("mistakes", "Where it is wrong", lead, [{"kind": "mistakes", "mistakes": items}])


def unused(facts: Facts, view: View) -> Section:
    """Near-copies, and files that were not used."""
    blocks: list[Block] = []
    counts = facts.summary.get("images", {})
    copies = facts.looks.facts["scenes"] if facts.looks else {}
    if copies.get("images"):
        blocks.append(
            text(f"{copies['images']:,} images are near-copies of others; scenes that they show: {copies['scenes']:,}.")
        )
        scenes = [
            {"pictures": [_picture(facts, image, view) for image in scene["images"]], "more": scene["more"]}
            for scene in copies["shown"]
        ]
        blocks.append({"kind": "scenes", "scenes": scenes})
    elif counts:
        apart = counts["training"] + counts["held_out"] - counts["scenes"]
        blocks.append(
            text(f"{apart:,} images show a scene that another shows already." if apart else "No near-copies.")
        )
    reasons = Counter(_reason(reason, view) for _, reason in facts.bad)
    if view.paths:
        rows = [[name, reason] for name, reason in facts.bad[: 10 * REASONS]]
        blocks.append(
            {"kind": "table", "header": ("file", "why"), "rows": rows} if rows else text("All files were used.")
        )
    elif reasons:
        rows = [[reason, f"{count:,}"] for reason, count in reasons.most_common(REASONS)]
        blocks.append({"kind": "table", "header": ("why a file was not used", "files"), "rows": rows})
    else:
        blocks.append(text("All files were used."))
    told = "How many images there were is not known."
    if counts:
        told = f"{counts['training']:,} images were trained on and {counts['held_out']:,} held out."
    return Section("data", "Near-copies and files left out", told, blocks)


def _reason(reason: str, view: View) -> str:
    """Why a file was not used, without names that may stand in it."""
    if view.paths:
        return reason
    return "exact copy of another" if reason.startswith("exact copy of ") else reason.partition(":")[0]


def _picture(facts: Facts, image: int, view: View) -> dict[str, Any]:
    assert facts.looks is not None
    raw = facts.looks.pictures[LARGE].get(image, b"") if view.images else b""
    name = facts.looks.facts["names"].get(str(image), "")
    return _image(raw, _name({"image": image, "name": name}, view))


def _name(each: Row, view: View) -> str:
    return str(each["name"]) if view.paths and each["name"] else f"image {each['image'] + 1:,}"


def _image(raw: bytes, name: str) -> dict[str, Any]:
    return {"src": f"data:image/webp;base64,{base64.b64encode(raw).decode()}" if raw else "", "name": name}
