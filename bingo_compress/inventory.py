"""What is in a folder: decoded to the last file, nothing written."""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bingo_edge.image import ImageError

from bingo_compress.data import decode, image_list, listing, quarantine
from bingo_compress.data.image_list import ImageList
from bingo_compress.errors import BingoError
from bingo_compress.runtime import console
from bingo_compress.sources.opened import Data, asked

SHOWN = 50


@dataclass(frozen=True)
class Inventory:
    """What is in a folder. images: how many can be used; bad: (relative path, reason) of every file that cannot;
    short_sides: pixels, ascending, one an image; copies: (relative path, the first file of the very same bytes);
    classes: how many images each folder has, where folder names could be labels; scenes: the names of the images of
    every scene that more than one shows, where a teacher looked for near-copies.
    """

    images: int
    bad: tuple[tuple[str, str], ...]
    short_sides: tuple[int, ...]
    copies: tuple[tuple[str, str], ...]
    classes: Mapping[str, int]
    scenes: tuple[tuple[str, ...], ...] | None = None


def check(data: Data, look: Callable[[ImageList], list[list[int]]] | None = None) -> Inventory:
    """Decode every image of `data` and print counts, sizes and each unusable file with its reason. Raises BingoError
    when none is usable.

    look: finds the near-copies among usable images, and says how many.
    """
    folder = listing.list_images(data)
    if asked(data).columns.label:
        folder.labels()  # a column that is not there is refused before all is decoded
    image_list.say_passed(folder)
    image_list.say_splits(folder)
    bad = list(folder.bad)
    sides: list[tuple[int, int]] = []
    usable: list[int] = []
    oddities: list[decode.Oddity] = []
    with console.bar("decode", len(folder.files)) as advance:
        for index, result in decode.decode_all(
            folder, range(len(folder.files)), lambda pixels: (pixels.shape[1], pixels.shape[0]), oddities=oddities
        ):
            if isinstance(result, ImageError):
                bad.append((folder.files[index], str(result)))
            else:
                sides.append(result)
                usable.append(index)
            advance(1)
    if bad:
        console.table(f"{len(bad):,} files cannot be used", ("file", "reason"), [*sorted(bad)[:SHOWN]])
        if len(bad) > SHOWN:
            console.say(f"... and {len(bad) - SHOWN:,} more; distill writes all of them to quarantine.csv")
        for line in quarantine.reasons(bad, 5):
            console.say(f"  {line}")
    if not sides:
        raise BingoError(
            f"--data: expected images, found none that can be decoded among {len(bad)} files in {folder.where}"
        )
    short = sorted(min(side) for side in sides)
    console.say(
        f"{len(sides):,} usable images in {folder.where}; short side {short[0]} to {short[-1]} px, half of them"
        f" {short[len(short) // 2]} px or more"
    )
    decode.say_oddities(oddities)
    copies = quarantine.copies(folder)
    quarantine.say_copies(copies, "keep")
    good = folder.only(usable)
    scenes = tuple(tuple(good.files[image] for image in scene) for scene in look(good)) if look else None
    known = _said_classes(folder)
    given = " ".join(f"--data {shlex.quote(place)}" for place in asked(data).places)
    console.say(f"next: bingo-compress distill {given} --teacher resnet152 --student mobilenetv3 --out runs/first")
    return Inventory(len(sides), tuple(sorted(bad)), tuple(short), tuple(copies), known, scenes)


def _said_classes(folder: ImageList) -> dict[str, int]:
    """How many images each class has; none where there are no labels, which is said."""
    try:
        folder.labels()
    except BingoError as error:
        console.say(f"no labels ({error}); none are needed to distil")
        return {}
    try:
        classes, labels = image_list.labels_of(folder)
    except BingoError:
        hint = image_list.other_root(folder)
        console.say(f"no folder names that could be labels{f' ({hint})' if hint else ''}; none are needed to distil")
        return {}
    counts = Counter(labels)
    console.say(
        f"as labels (only `validate` reads them): {len(classes)} folders of {min(counts.values()):,} to"
        f" {max(counts.values()):,} images"
    )
    return {name: counts[number] for number, name in enumerate(classes)}
