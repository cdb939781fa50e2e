"""Near-copies: frames of a burst, of a video or of a time lapse, and other pictures of one and the same scene.

The teacher's embeddings say which images may show one scene, the pixels which do: the normalised cross-correlation of
small pictures without what is coarse in them, at the best of some shifts. A garment on a plain sheet is the teacher's
and the eye's neighbour of many another; its creases are its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import torch
from bingo_edge.image import ImageError, Pixels, preprocess
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, pad

from bingo_compress.data import augment, image_list
from bingo_compress.data.decode import decode_all
from bingo_compress.data.image_list import ImageList
from bingo_compress.data.pixel_store import PixelStore, store_of
from bingo_compress.features import extract, neighbours
from bingo_compress.features.memmap import Matrix, scratch
from bingo_compress.models.encoder import Preprocessing
from bingo_compress.runtime import console, distributed
from bingo_compress.runtime.made_of import hash_seed

SIDE = 64  # pixels of a picture that is compared
COARSE = 7  # pixels: what is larger in it than this is taken off
REACH = 4  # pixels that one may be shifted against the other, each way
NEIGHBOURS = 16  # of an image are looked at
PAIRS = 64  # compared at once: more of them leave the cache
ROWS = 4096  # images whose pairs are listed at once
ROUNDS = 64  # after each of which those of one scene are joined: only one round's pairs are in memory
PICTURES = 10_000  # kept at most, of a folder
SAMPLE = 128  # images that the limits are fitted to
# What a burst does to a picture: share of each side that is kept, exposure in stops, noise of 255 levels, blur as in
# augment.Draw.
KEPT, STOPS, NOISE, BLUR = 0.94, 0.3, 8.0, 1.5
MISSED = 0.1  # share of pairs of a scene that may lie beyond each limit: two images have many ways to meet
LEAST = 0.7  # however much a small picture loses to noise: lookalikes among photos of clothes reach 0.78
# Where any two pictures are all but alike (parts on one fixture), one scene cannot be told from another: the limit is
# so many median deviations above what two pictures have in common at random.
STRANGERS, DEVIATIONS = 4, 4

Look = Callable[[Tensor], Tensor]  # images (B,) to their pictures, float32 (B, 3, SIDE, SIDE)


@dataclass(frozen=True)
class Photos:
    """Images as they are looked at here. features: (N, D) the teacher's plain view; digests: (N, 32) of their files;
    look: gives their pictures.
    """

    features: Matrix
    digests: NDArray[np.uint8]
    look: Look


@dataclass(frozen=True)
class Limits:
    """From where on two images are near-copies. similar: cosine of their features; alike: `correlation` of their
    pictures, over 1 where no two can be called so.
    """

    similar: float
    alike: float


def find(photos: Photos, limits: Limits, search: neighbours.Search = neighbours.IN_MEMORY) -> Tensor:
    """The scene (N,) of each image, named by the first image that shows it: N different ones where there are no
    near-copies.

    Images are joined by their nearest neighbours, and those of one scene need not all be alike: the first frame of a
    video and the last. Exact copies are always one scene. Several processes share the pairs that are compared, and each
    gets all.
    """
    count = len(photos.features)
    scenes = same_bytes(photos.digests)
    wanted = min(NEIGHBOURS, count - 1)
    if wanted < 1 or limits.alike > 1:
        return scenes
    # The first process lists the pairs for all: on another processor the last bits of a similarity may be others.
    first = distributed.rank() == 0
    # In memory, a large folder's would be most of all that is there.
    home = search.folder if first and count > neighbours.BLOCK else None
    near = scratch((count, wanted), torch.int32, home, "near-copies")
    found = neighbours.mates_by_block(photos.features, wanted, search)
    for rows, mates, similar in found if first else ():
        near[rows] = torch.where(similar >= limits.similar, mates, -1)
    del found  # in the others it may hold what a search in memory found
    for images in torch.arange(count).chunk(ROUNDS):
        pairs = distributed.from_first(partial(_pairs_of, near, scenes, images))
        pairs = torch.stack((pairs // count, pairs % count))
        if pairs.shape[1]:
            scenes = _joined(scenes, pairs[:, _compared(photos.look, pairs, limits.alike)])
    return scenes


def fit(model: tuple[Preprocessing, extract.Embed], folder: ImageList, seed: int = 0) -> Limits:
    """The limits that all but MISSED of the pairs of a folder's own images keep, each under two of a burst's
    disturbances. model: the teacher. Raises BingoError where no image can be decoded.
    """
    preprocessing, embed = model
    generator = torch.Generator().manual_seed(hash_seed(seed, "near-copies"))
    order = torch.randperm(len(folder.files), generator=generator).tolist()
    plain = extract.pixels_of(preprocessing, folder, order, SAMPLE)
    views = [_disturbed(plain, generator) for _ in range(2)]
    seen, again = (torch.cat([embed(part) for part in view.split(extract.BATCH)]) for view in views)
    one, other = (_fine(_small(view)) for view in views)
    alike = max(LEAST, float(correlation(one, other).quantile(MISSED)))
    if len(plain) > 1:
        shifts = range(1, min(STRANGERS, len(plain) - 1) + 1)
        strange = torch.cat([correlation(one, other.roll(by, 0)) for by in shifts])
        usual = strange.median()
        alike = max(alike, float(usual + DEVIATIONS * (strange - usual).abs().median()))
    return Limits(float(cosine_similarity(seen, again).quantile(MISSED)), alike)


def _joined_photos(one: Photos, other: Photos) -> Photos:
    """The images of both, one after the other, in memory."""
    first = len(one.features)

    def look(images: Tensor) -> Tensor:
        mine = images < first
        found = torch.empty(len(images), 3, SIDE, SIDE)
        for part, where, start in ((one, mine, 0), (other, ~mine, first)):
            if bool(where.any()):
                found[where] = part.look(images[where] - start)
        return found

    features = torch.cat((one.features[:], other.features[:]))
    return Photos(features, np.concatenate((one.digests, other.digests)), look)


def within(scenes: Tensor, which: Tensor) -> Tensor:
    """The scenes of the images `which` (n,) alone, each named by its first image's position in `which`."""
    _, scene = scenes[which].unique(return_inverse=True)
    first = torch.full((len(which),), len(which)).scatter_reduce(0, scene, torch.arange(len(which)), "amin")
    return first[scene]


def in_folders(model: tuple[Preprocessing, extract.Embed], parts: Sequence[tuple[Tensor, ImageList]]) -> Tensor:
    """`find` among the images of all `parts`, one after the other, with limits fitted to the first. model: the teacher;
    parts: its features of the images of a folder.
    """
    photos = reduce(_joined_photos, (of_folder(features, folder) for features, folder in parts))
    return find(photos, distributed.from_first(lambda: fit(model, parts[0][1])))


def said(model: tuple[Preprocessing, extract.Embed], folder: ImageList) -> list[list[int]]:
    """`groups` of a folder as a teacher sees it; says how many, or that there are none."""
    features, good = extract.plain({"teacher": model}, folder, range(len(folder.files)), "teacher")
    scenes = in_folders(model, [(features["teacher"], folder.only(good))])
    console.say(describe(scenes, [folder.files[image] for image in good]) or "no near-copies, as this teacher sees it")
    return [[good[image] for image in scene] for scene in groups(scenes)]


def parted(scenes: Tensor, labels: Tensor, copied: Tensor, parts: int = 2) -> tuple[Tensor, list[int]]:
    """(groups (N,) that a split in `parts` leaves together, labels of fewer scenes than parts): the scenes, but of such
    a label, which could else not be split, the exact copies. labels, copied: (N,), copied the same for exact copies.
    """
    found, whole = scenes.clone(), []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        if len(scenes[rows].unique()) < min(parts, len(copied[rows].unique())):
            found[rows] = len(scenes) + copied[rows]
            whole.append(label)
    return found, whole


def groups(scenes: Tensor) -> list[list[int]]:
    """The images of every scene that more than one image shows."""
    found: dict[int, list[int]] = {}
    for image in (scenes.bincount(minlength=1)[scenes] > 1).nonzero()[:, 0].tolist():
        found.setdefault(int(scenes[image]), []).append(image)
    return list(found.values())


def describe(scenes: Tensor, names: Sequence[str], images: str = "images") -> str:
    """One line for the screen, "" where there are no near-copies. names: of the images."""
    found = groups(scenes)
    if not found:
        return ""
    examples = " and ".join(f"{names[each[0]]} with {names[each[1]]}" for each in found[:2])
    return (
        f"near-copies: {sum(map(len, found)):,} of {len(scenes):,} {images} are of {len(found):,} scenes that more than"
        f" one shows (bursts, video frames, copies), for example {examples}"
    )


def of_folder(features: Matrix, folder: ImageList) -> Photos:
    """The images of a folder, whose pictures are decoded when they are looked at."""

    seen: dict[int, Tensor] = {}

    def look(images: Tensor) -> Tensor:
        wanted = images.tolist()
        if len(seen) > PICTURES:
            seen.clear()
        for image, found in decode_all(folder, [image for image in wanted if image not in seen], _squashed):
            # What has become unreadable looks like nothing.
            seen[image] = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8) if isinstance(found, ImageError) else found
        return torch.stack([seen[image] for image in wanted]).float()

    return Photos(features, folder.contents.digests, look)


def of_store(features: Matrix, folder: ImageList, pixels: PixelStore) -> Photos:
    """The same images in the pixel store, which decodes nothing again."""
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])

    def look(images: Tensor) -> Tensor:
        return pixels.crops(images, whole.expand(len(images), 4), SIDE).cpu().float()

    return Photos(features, folder.contents.digests, look)


def _squashed(pixels: Pixels) -> Tensor:
    small = preprocess(pixels, size=SIDE, crop_pct=1.0, interpolation="bilinear", crop_mode="squash")
    return torch.from_numpy(small).permute(2, 0, 1).contiguous()


def _small(views: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) to what `Look` gives."""
    return interpolate(views.permute(0, 3, 1, 2).float(), (SIDE, SIDE), mode="bilinear", antialias=True)


def _fine(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, SIDE, SIDE) without what is coarse: lookalikes share silhouettes, near-copies the texture."""
    return pictures - _window_means(pad(pictures, (COARSE // 2,) * 4, mode="reflect"), COARSE)


def _window_means(pictures: Tensor, side: int) -> Tensor:
    """The mean of every square of `side` pixels, of sums along rows and columns: pooling takes thirty times as long."""
    for axis in (-1, -2):
        sums = pictures.cumsum(axis)
        first = sums.narrow(axis, side - 1, 1)
        count = sums.shape[axis] - side
        later = sums.narrow(axis, side, count) - sums.narrow(axis, 0, count)
        pictures = torch.cat((first, later), axis) / side
    return pictures


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """The normalised cross-correlation (B,) of pictures (B, 3, SIDE, SIDE), the largest of all shifts by up to REACH
    pixels (Lewis 1995: numerators by Fourier transform, sums of squares by window).
    """
    inner, steps = SIDE - 2 * REACH, 2 * REACH + 1
    template = one[:, :, REACH:-REACH, REACH:-REACH]
    template = template - template.mean((2, 3), keepdim=True)
    template = template / template.flatten(1).norm(dim=1).clamp(min=1e-6)[:, None, None, None]
    spectrum = torch.fft.rfft2(other) * torch.fft.rfft2(template, s=(SIDE, SIDE)).conj()
    # No shift within reach leads around the edge: inner + steps - 1 is SIDE.
    products = torch.fft.irfft2(spectrum.sum(1), s=(SIDE, SIDE))[:, :steps, :steps]
    variance = _window_means(other.square(), inner) - _window_means(other, inner).square()
    found: Tensor = products / (inner * inner * variance.sum(1)).clamp(min=1e-6).sqrt()
    return found.flatten(1).amax(1)


def repeats(fine: Tensor) -> Tensor:
    """The correlation (B,) of pictures (B, 3, SIDE, SIDE) with themselves, the largest of all shifts by far more than
    REACH: near 1 for a texture, under 0.62 for 876 photos of clothes and of objects (2026-11-27).
    """
    apart = fine - fine.mean((2, 3), keepdim=True)
    power = torch.fft.irfft2(torch.fft.rfft2(apart).abs().square().sum(1), s=(SIDE, SIDE))
    near = torch.zeros(SIDE, dtype=torch.bool)
    near[torch.arange(-2 * REACH, 2 * REACH + 1)] = True
    found: Tensor = (power / power[:, :1, :1].clamp(min=1e-6))[:, ~(near[:, None] & near)].amax(1)
    return found


def _compared(look: Look, pairs: Tensor, alike: float) -> Tensor:
    """`_are_copies` of pairs (2, P), by PAIRS at once whatever the number of processes, and so with the same bits."""
    blocks = distributed.stretch(pairs.split(PAIRS, dim=1))

    def answers() -> Iterator[list[Tensor]]:
        # Kept apart, each answer would pin the large blocks that were freed below it in the heap.
        found = torch.empty(sum(block.shape[1] for block in blocks), dtype=torch.bool)
        for start, block in enumerate(blocks):
            found[start * PAIRS :][:PAIRS] = _are_copies(look, block, alike)
        yield [found]

    (found,) = distributed.joined(answers())
    return found


def _are_copies(look: Look, pairs: Tensor, alike: float) -> Tensor:
    """bool (B,): whether pairs (2, B) show one scene. Two pieces of one fabric are alike without doing so: what a
    picture has in common with itself elsewhere tells nothing, and half of the rest must be there too.
    """
    images, place = pairs.unique(return_inverse=True)
    fine = _fine(look(images))
    common = correlation(fine[place[0]], fine[place[1]])
    found = common >= alike
    if bool(found.any()):
        doubtful, place = place[:, found].unique(return_inverse=True)
        found[found.clone()] = common[found] >= (1 + repeats(fine[doubtful])[place].amax(0)) / 2
    return found


def _disturbed(plain: Tensor, generator: torch.Generator) -> Tensor:
    """Images, uint8 (B, S, S, 3), as another frame of a burst would show them."""
    count, size = len(plain), plain.shape[1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape or (count,)).uniform_(low, high, generator=generator)

    corner = uniform(0, 1 - KEPT, count, 2)
    crops = store_of(list(plain.numpy()), torch.ones(count), torch.device("cpu")).crops(
        torch.arange(count), torch.cat((corner, corner + KEPT), dim=1), size
    )
    blurred = augment.blur(crops.float(), uniform(0, BLUR))
    noise = torch.randn(crops.shape, generator=generator) * uniform(0, NOISE, count, 1, 1, 1)
    found = blurred * 2 ** uniform(-STOPS, STOPS, count, 1, 1, 1) + noise
    return found.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def same_bytes(digests: NDArray[np.uint8]) -> Tensor:
    """`find` by exact copies alone."""
    return torch.from_numpy(image_list.same_bytes(digests))


def _pairs_of(near: Tensor, scenes: Tensor, images: Tensor) -> Tensor:
    """`_pairs` (P,) of a round's `images`, those of an image side by side: what is worked out of its picture serves all
    of a block.
    """
    found: Tensor = torch.cat([_pairs(near, scenes, part, images[0]) for part in images.split(ROWS)]).unique()
    return found


def _pairs(near: Tensor, scenes: Tensor, images: Tensor, first: Tensor) -> Tensor:
    """The pairs of `images` (n,) with those `near` them (N, K) that may be of another scene, each as N times the lower
    image plus the higher. first: of all images that are looked at in this round.
    """
    row, place = (near[images] >= 0).nonzero(as_tuple=True)
    image, other = images[row], near[images][row, place].long()
    # What the rounds before have looked at from the other side, or joined, needs no second look.
    asked = (near[other] == image[:, None]).any(1) & (other < first)
    wanted = ~asked & (scenes[image] != scenes[other])
    low, high = torch.stack((image, other))[:, wanted].sort(dim=0).values
    found: Tensor = low * len(near) + high
    return found


def _joined(scenes: Tensor, pairs: Tensor) -> Tensor:
    """Scenes (N,) with those of each pair (2, P) of images made one, under the lower of their names."""
    while True:
        low, high = scenes[pairs].sort(dim=0).values
        if bool((low == high).all()):
            return scenes
        scenes = scenes.scatter_reduce(0, high, low, "amin")
        while bool((scenes[scenes] != scenes).any()):
            scenes = scenes[scenes]
