"""Looking at a run's images for its page: small pictures, bags, changed neighbours, maps. At the end of `distill`, or
when the page is first asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bingo_compress.data import shards as shard_files
from bingo_compress.data.pixel_store import Pictures, PixelStore
from bingo_compress.features import bagging, embedding_map, extract, near_copies
from bingo_compress.features.memmap import Rows
from bingo_compress.features.neighbours import nearest_neighbours, recall_k
from bingo_compress.html_report.looks import LARGE, QUALITY, SMALL, Looks, webp
from bingo_compress.models.encoder import Encoder
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import checkpoint, console
from bingo_compress.runtime.made_of import hash_seed
from bingo_compress.runtime.run_dir import RunDir, made_by
from bingo_compress.training.material import split

SAMPLE = 3000  # images that the students are run on
OTHERS = 100_000  # further ones in the teacher's map, at most
SMALL_BYTES = 2_800_000  # of all small pictures: a page stays under 6 MB
BAGS = 2  # shown of each kind
STRIP = 6  # neighbours shown of an image
CHANGED = 4  # images shown whose neighbours changed, each way
SCENES, OF_SCENE = 6, 6  # shown at most, and images of each


@dataclass(frozen=True)
class Left:
    """N images of a run. store: their pixels; features: (N, D) float16 of the teacher's plain view; scenes: (N,) as
    `near_copies.find` names them; training: (n,) positions of the images trained on; bags: (n, K) positions among
    those, -1 for an empty place; names: of the N images, "" where they are not known any more.
    """

    store: PixelStore
    features: Tensor
    scenes: Tensor
    training: Tensor
    bags: Tensor
    names: Sequence[str]


def find(run: RunDir, recipe: Recipe) -> Left | None:
    """What is left in a run's work folder; None where the pixels, the teacher's embeddings or the bags are not there
    any more (the folder was deleted, or the run kept no pixels), or the bags do not say whose they are. Raises
    BingoError for files that are not the run's.
    """
    pixels = _one(run.work, "pixels-*")
    teacher = _one(run.work, "teacher-*/features.f16") or _one(run.work, "teacher_features-*/features.f16")
    copies = _one(run.work, "near-copies-*/scenes.safetensors")
    if not (pixels and teacher and copies and run.bags.is_file()):
        return None
    with made_by("distill", pixels):
        store = _store(pixels)
        scenes = checkpoint.load(copies)[0]["scenes"]
        width = teacher.stat().st_size // (2 * len(store))
        shape = (len(store), width)
        features = torch.from_numpy(np.memmap(teacher, np.float16, "c", shape=shape))
        bags, listed, _ = bagging.load(run.bags)
        if len(bags) and not listed:  # of an earlier version
            return None
        training = split(scenes, recipe)[1]
        assert len(scenes) == len(store) and len(training) == len(listed) == len(bags)
        names = [""] * len(store)
        for place, name in zip(training.tolist(), listed, strict=True):
            names[place] = name
        return Left(store, features, scenes, training, bags, names)


def _one(work: Path, pattern: str) -> Path | None:
    """The one file or folder of a pattern; None where there is none, or where nobody can tell which is meant."""
    found = list(work.glob(pattern))
    return found[0] if len(found) == 1 else None


def _store(shards: Path) -> PixelStore:
    """The pixel store in a folder of shards, on the CPU, read from disk as it is used."""
    files = sorted(shards.glob("*.json"))
    ranges = [range(int(file.stem), int(file.stem) + 1) for file in files]
    found = [shard_files.read_columns(shards, rows) for rows in ranges]
    height, width, aspect = (
        torch.from_numpy(shard_files.column(found, name)) for name in (*shard_files.SIDES, "aspect")
    )
    read = shard_files.reader(shards, ranges, found, mapped=False)
    return PixelStore(Pictures(height, width, aspect, read, shards.name), torch.device("cpu"), "disk")


def make(left: Left, encoders: dict[str, Encoder], seed: int, device: torch.device) -> Looks:
    """Look at a sample of a run's images. encoders: "start" and "student"; seed: of the draw."""

    def see(name: str, images: Tensor) -> Tensor:
        return extract.store_features(extract.on(encoders[name], device), left.store, images, device)

    return look(left, see, seed)


def look(left: Left, see: Callable[[str, Tensor], Tensor], seed: int) -> Looks:
    """`make` with any way to see: of "start" or "student" and images (n,) to features (n, D)."""
    generator = torch.Generator().manual_seed(hash_seed(seed, "looks"))
    order = torch.randperm(len(left.store), generator=generator)
    images = order[:SAMPLE].sort().values
    seen = {"teacher": left.features[images].float()} | {name: see(name, images) for name in ("start", "student")}
    facts: dict[str, Any] = {
        "images": images.tolist(),
        "of": len(left.store),
        "bags": _bags(left, images),
        "changed": _changed(seen, images),
        "scenes": _scenes(left.scenes),
    }
    places = _maps(seen, Rows(left.features, order[SAMPLE : SAMPLE + OTHERS].sort().values), seed)
    shown = sorted({*_shown(facts)})
    pictures = {
        SMALL: _within(_pictures(left, images.tolist(), SMALL), SMALL_BYTES) if places else {},
        LARGE: _pictures(left, shown, LARGE),
    }
    facts["names"] = {str(image): left.names[image] for image in sorted({*shown, *images.tolist()})}
    return Looks(facts, places, pictures)


def _bags(left: Left, images: Tensor) -> dict[str, Any]:
    """Of the bags of those of the images that were trained on: "means": the mean similarity of each, ascending, and
    BAGS of the "best", the "typical" and the most "doubtful", each {"anchor", "mates", "similar"}. {} where there are
    no bags.
    """
    rows = torch.isin(left.training, images).nonzero()[:, 0]
    rows = rows[(left.bags[rows] >= 0).any(1)] if left.bags.shape[1] else rows[:0]
    if not len(rows):
        return {}
    bags = left.bags[rows]
    anchors, there = left.training[rows], bags >= 0
    mates = left.training[bags.clamp(min=0)]
    similar = torch.stack(
        [
            cosine_similarity(left.features[anchors].float(), left.features[column].float(), dim=1)
            for column in mates.unbind(1)
        ],
        dim=1,
    )
    means = torch.where(there, similar, 0).sum(1) / there.sum(1)
    order = means.argsort(descending=True, stable=True)
    middle = max(0, min(len(order) // 2 - BAGS // 2, len(order) - BAGS))
    kinds = {"best": order[:BAGS], "typical": order[middle : middle + BAGS], "doubtful": order[-BAGS:].flip(0)}

    def told(row: int) -> dict[str, Any]:
        kept = there[row]
        best = similar[row][kept].argsort(descending=True)
        return {
            "anchor": int(anchors[row]),
            "mates": mates[row][kept][best].tolist(),
            "similar": similar[row][kept][best].tolist(),
        }

    return {"means": means[order.flip(0)].tolist()} | {
        kind: [told(row) for row in which.tolist()] for kind, which in kinds.items()
    }


def _changed(seen: dict[str, Tensor], images: Tensor) -> dict[str, Any]:
    """How many of the teacher's k nearest of the other images each model has too: "k", the means of "start" and
    "student", and the images that "gained" and that "lost" most, each {"image", "near": all k of the teacher's,
    "teacher", "start", "student": the STRIP nearest, "shares": of start and student}. {} where there are too few
    images.
    """
    k = recall_k(len(images) - 1)
    if not k:
        return {}
    near = {name: _others(features, k) for name, features in seen.items()}
    shares = {
        name: (near["teacher"][:, :, None] == near[name][:, None, :]).any(2).double().mean(1)
        for name in ("start", "student")
    }
    change = shares["student"] - shares["start"]
    order = change.argsort(descending=True, stable=True)

    def told(row: int) -> dict[str, Any]:
        strips = {name: images[found[row, :STRIP]].tolist() for name, found in near.items()}
        near_teacher = images[near["teacher"][row]].tolist()
        return {
            "image": int(images[row]),
            "near": near_teacher,
            **strips,
            "shares": [float(shares[name][row]) for name in shares],
        }

    return {
        "k": k,
        **{name: float(share.mean()) for name, share in shares.items()},
        "gained": [told(row) for row in order[:CHANGED].tolist() if change[row] > 0],
        "lost": [told(row) for row in order[-CHANGED:].flip(0).tolist() if change[row] < 0],
    }


def _others(features: Tensor, k: int) -> Tensor:
    """The k nearest other rows (n, k) of each row."""
    found = nearest_neighbours(features, features, k + 1)[1]
    own = found == torch.arange(len(found))[:, None]
    own[~own.any(1), -1] = True  # of an image with many exact copies
    return found[~own].view(len(found), k)


def _scenes(scenes: Tensor) -> dict[str, Any]:
    """The scenes of near-copies: how many "images" and "scenes", and the largest, "shown"."""
    found = sorted(near_copies.groups(scenes), key=len, reverse=True)
    return {
        "images": sum(map(len, found)),
        "scenes": len(found),
        "shown": [{"images": each[:OF_SCENE], "more": max(0, len(each) - OF_SCENE)} for each in found[:SCENES]],
    }


def _maps(seen: dict[str, Tensor], others: Rows, seed: int) -> dict[str, Tensor]:
    count = len(seen["teacher"])
    if count < embedding_map.LEAST:
        return {}
    generator = torch.Generator().manual_seed(hash_seed(seed, "map"))
    drawn = torch.randperm(count, generator=generator)[: embedding_map.DRAWN].sort().values
    rest = torch.tensor(sorted({*range(count)} - {*drawn.tolist()}), dtype=torch.int64)

    def whole(features: Tensor, places: Tensor) -> Tensor:
        found = torch.empty(count, 2)
        found[drawn] = places
        found[rest] = embedding_map.placed(features[rest], features[drawn], places)
        return found

    first = embedding_map.first(seen["teacher"][drawn], seed)
    second = embedding_map.again(seen["student"][drawn], first, seed)
    # t-SNE's scales mean nothing: both maps are given one.
    first, second = (places / places.std() for places in (first - first.mean(0), second - second.mean(0)))
    return {
        "teacher": whole(seen["teacher"], first),
        "student": whole(seen["student"], second),
        "others": embedding_map.placed(others, seen["teacher"][drawn], first),
    }


def _shown(facts: dict[str, Any]) -> list[int]:
    """The images that have a large picture."""
    bags, changed = facts["bags"], facts["changed"]
    kinds = [bag for kind in ("best", "typical", "doubtful") for bag in bags.get(kind, ())]
    strips = [one for way in ("gained", "lost") for one in changed.get(way, ())]
    found = [image for bag in kinds for image in (bag["anchor"], *bag["mates"])]
    found += [image for one in strips for image in (one["image"], *one["teacher"], *one["start"], *one["student"])]
    return found + [image for scene in facts["scenes"]["shown"] for image in scene["images"]]


def _pictures(left: Left, images: Sequence[int], side: int) -> dict[int, bytes]:
    """The middle square of each image as WebP."""
    found: dict[int, bytes] = {}
    for rows in torch.tensor(images, dtype=torch.int64).split(extract.BATCH):
        aspect = left.store.aspect[rows]
        share = torch.stack((1 / aspect, aspect), dim=1).clamp(max=1)  # of width and height
        crops = left.store.crops(rows, torch.cat((1 - share, 1 + share), dim=1) / 2, side)
        for image, crop in zip(rows.tolist(), crops.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            found[image] = webp(Image.fromarray(crop), QUALITY[side])
    return found


def _within(pictures: dict[int, bytes], most: int) -> dict[int, bytes]:
    """As many of the pictures as fit into so many bytes."""
    kept, total = {}, 0
    for image, raw in pictures.items():
        total += len(raw)
        if total > most:
            break
        kept[image] = raw
    return kept


@contextmanager
def spared(run: RunDir) -> Iterator[None]:
    """Whatever goes wrong in the block is said in one line, and is not the end of a command whose work is done."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or "no more is known"
        console.complain(
            f"the report was not written ({type(error).__name__}: {said}); all else of {run.path} is whole. To try"
            f" again, and see more: bingo-compress report {run.path}"
        )
