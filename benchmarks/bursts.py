"""Bursts made of photos, and whether near-copies are found: pairwise precision and recall against the bursts that were
made, and how many of the photos themselves are called near-copies.

python benchmarks/bursts.py --photos ../shared/data/clothing/train --teacher tf_efficientnet_lite2 \
    --teacher-weights FILE --teacher-size 128 [--each 30] [--keep FOLDER] [--montage FILE]

Each photo becomes FRAMES frames: small shifts, exposure, noise, blur, JPEG. --each: photos of a class. --keep: the
bursts stay there, to be distilled on. --montage: a picture of the pairs of photos that were called near-copies, to be
looked at.
"""

import argparse
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from bingo_compress.data import listing
from bingo_compress.data.image_list import ImageList
from bingo_compress.features import extract, near_copies
from bingo_compress.models.encoder import Preprocessing, build
from bingo_compress.runtime.devices import choose_device

FRAMES = 8
# At most: share of a side that a frame is shifted by, stops, levels of noise, pixels of blur (half of the frames), of
# photos of 240 px a short side.
SHIFT, STOPS, NOISE, BLUR = 0.06, 0.3, 8.0, 1.2
THUMB = 130


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, nargs="+", required=True)
    parser.add_argument("--teacher", default="tf_efficientnet_lite2")
    parser.add_argument("--teacher-weights", default="pretrained")
    parser.add_argument("--teacher-size", type=int, default=128)
    parser.add_argument("--each", type=int, default=30)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--montage", type=Path)
    chosen = parser.parse_args()
    teacher = build(chosen.teacher, chosen.teacher_size, chosen.teacher_weights, "--teacher-weights")
    model = extract.as_embed(teacher, choose_device("auto"))
    with tempfile.TemporaryDirectory() as temporary:
        bursts = chosen.keep or Path(temporary)
        make(chosen.photos[0], bursts, chosen.each)
        folder = listing.list_images(bursts)
        true = [name.rpartition("_")[0] for name in folder.files]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(true))}
        precision, recall = pairwise(scenes_of(model, folder), torch.tensor([numbers[name] for name in true]))
        print(
            f"{len(folder.files):,} frames of {len(numbers):,} photos, {chosen.teacher}, {chosen.teacher_size} px:"
            f" precision {precision:.4f}, recall {recall:.4f}"
        )
    for place in chosen.photos:
        folder = listing.list_images(place)
        groups = near_copies.groups(scenes_of(model, folder))
        count = sum(map(len, groups))
        print(
            f"{place}: {count:,} of {len(folder.files):,} photos ({count / len(folder.files):.2%}) called near-copies"
        )
        for group in groups:
            print("  " + ", ".join(folder.files[image] for image in group))
        if chosen.montage and groups:
            montage(folder, groups).save(chosen.montage)


def make(photos: Path, into: Path, each: int) -> None:
    """`each` photos of every class below `photos` as bursts in `into`, NAME_0.jpg, NAME_1.jpg, ..."""
    for kind in sorted(path for path in photos.iterdir() if path.is_dir()):
        (into / kind.name).mkdir(parents=True, exist_ok=True)
        for file in sorted(kind.iterdir())[:each]:
            random = np.random.default_rng(zlib.crc32(file.name.encode()))
            photo = Image.open(file).convert("RGB")
            for number in range(FRAMES):
                frame(photo, random).save(into / kind.name / f"{file.stem}_{number}.jpg", quality=90)


def frame(photo: Image.Image, random: np.random.Generator) -> Image.Image:
    """One frame of a burst."""
    width, height = photo.size
    wide, high = (1 - SHIFT) * width, (1 - SHIFT) * height
    left, top = random.uniform(0, SHIFT, 2) * (width, height)
    shifted = photo.resize((round(wide), round(high)), Image.Resampling.BICUBIC, (left, top, left + wide, top + high))
    if random.random() < 0.5:
        shifted = shifted.filter(ImageFilter.GaussianBlur(random.uniform(0.3, BLUR)))
    levels = np.asarray(shifted, float) * 2 ** random.uniform(-STOPS, STOPS)
    levels += random.normal(0, random.uniform(0, NOISE), levels.shape)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def scenes_of(model: tuple[Preprocessing, extract.Embed], folder: ImageList) -> Tensor:
    """The scenes of a folder, all of whose images can be decoded, as a teacher sees them."""
    features, _ = extract.plain({"teacher": model}, folder, range(len(folder.files)), "teacher")
    return near_copies.in_folders(model, [(features["teacher"], folder)])


def pairwise(found: Tensor, true: Tensor) -> tuple[float, float]:
    """(precision, recall) of the pairs of images that share a scene. found, true: (N,)."""
    both, mine, theirs = (
        int((names.unique(dim=1, return_counts=True)[1].double().square().sum() - len(found)).item())
        for names in (torch.stack((found, true)), found[None], true[None])
    )
    return both / mine if mine else 1.0, both / theirs


def montage(folder: ImageList, groups: list[list[int]]) -> Image.Image:
    """Every group in a row, its first images."""
    across = min(max(map(len, groups)), 8)
    sheet = Image.new("RGB", (across * THUMB, len(groups) * THUMB), "white")
    for row, group in enumerate(groups):
        for column, image in enumerate(group[:across]):
            raw = folder.read_raw(image)
            assert isinstance(raw, Path)
            sheet.paste(Image.open(raw).convert("RGB").resize((THUMB, THUMB)), (column * THUMB, row * THUMB))
    return sheet


if __name__ == "__main__":
    main()
