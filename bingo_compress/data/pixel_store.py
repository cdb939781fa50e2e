"""The pixel store: every image decoded once and kept as uint8 in its own proportions; on the GPU, in memory, on disk,
encoded again and much smaller, or not at all and decoded anew each time.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from bingo_edge.image import ImageError, Pixels
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from bingo_compress.data import augment, decode, quarantine
from bingo_compress.data import shards as shard_files
from bingo_compress.data.decode import decode_all
from bingo_compress.data.image_list import ImageList
from bingo_compress.data.shards import KINDS, SIDES, Kind, Read
from bingo_compress.errors import BingoError
from bingo_compress.runtime import console, distributed, machine
from bingo_compress.runtime.machine import in_threads, sent
from bingo_compress.runtime.made_of import made_of
from bingo_compress.runtime.run_dir import atomic, drop_stale, need_space, write_text

SHARD = 512  # images in a file, more in a large folder: a build goes on after the last whole one
SHARDS_AT_MOST = 200
LONGEST = 2  # sides: a longer panorama is squeezed, or one picture could be as large as a folder
WORK = 1 << 30  # bytes for the models and a step, where nobody has measured them
# torch's resizing takes half as long as Pillow's where it has vector code, and twice as long elsewhere. They round
# alike, to one level; Pillow's shortcut for much larger pictures (reducing_gap) is a few levels off on noise.
VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX")
PLACES = ("gpu", "memory", "disk", "encoded", "stream")
# An encoded picture is about so many times smaller than a raw one (7 to 12 for photos, less for noise), and a header.
SMALLER, HEADER = 8, 640
Bad = list[tuple[int, str]]  # files that cannot be used, each with its reason


@dataclass(frozen=True)
class Pictures:
    """N pictures as they are kept. height, width: (N,) of each; aspect: (N,) width / height of the original; read:
    gives their rows; made_of: a name for all that they depend on, for what is made from them.
    """

    height: Tensor
    width: Tensor
    aspect: Tensor
    read: Read
    made_of: str = ""


class PixelStore:
    """N images in their own proportions. height, width, aspect, made_of: of its `pictures`.

    Crops are shares of the whole original image, so no corner of it is out of reach. where: one of PLACES; the crops
    are the same in each, bit for bit on a CPU, but for `encoded`, which loses a little. by_gpu: crops what it can
    before the pictures are read.
    """

    def __init__(
        self, pictures: Pictures, device: torch.device, where: str = "memory", by_gpu: decode.Crops | None = None
    ) -> None:
        self.pictures = pictures
        self.height, self.width, self.aspect = pictures.height, pictures.width, pictures.aspect
        self.where, self.made_of = where, pictures.made_of
        self._by_gpu = by_gpu
        self._device = device
        self._flat: Tensor | None = None
        if where == "gpu":
            self._offset = torch.cat(
                (torch.zeros(1, dtype=torch.int64), (self.height.long() * self.width * 3).cumsum(0))
            )
            self._flat = torch.empty(int(self._offset[-1]), dtype=torch.uint8, device=device)
            for image in range(len(self)):
                rows = pictures.read(image, 0, int(self.height[image]))
                self._flat[self._offset[image] : self._offset[image + 1]] = rows.reshape(-1).to(device)

    def __len__(self) -> int:
        return len(self.height)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return int((self.height.long() * self.width).sum()) * 3

    def crops(self, indices: Tensor, boxes: Tensor, size: int) -> Tensor:
        """Antialiased bilinear crops of the images `indices` (B,): uint8 (B, 3, size, size) on the run's device.

        boxes: (B, 4) left, top, right, bottom as shares of the image; a box is rounded to whole pixels of the picture
        as it is kept.
        """
        if self._by_gpu is None:
            return self._crops(indices, boxes, size)
        done, views = self._by_gpu(indices, boxes, size)
        left = (~done).nonzero()[:, 0]
        if len(left):
            views[sent(left, views.device)] = self._crops(indices[left], boxes[left], size)
        return views

    def _crops(self, indices: Tensor, boxes: Tensor, size: int) -> Tensor:
        height, width = self.height[indices].long(), self.width[indices].long()
        low, high = decode.window(boxes, height, width)
        if self._flat is not None:
            return augment.crop_flat(self._flat, self._offset[indices], width, low, high, size)
        where = zip(indices.tolist(), low.tolist(), high.tolist(), strict=True)
        if self.where in ("encoded", "stream"):  # each is decoded: worth a thread
            pieces = (piece for _, piece in in_threads(lambda item: self._piece(*item), where))
        else:
            pieces = (self._piece(*item) for item in where)
        return sent(augment.resize(pieces, len(indices), size), self._device)

    def _piece(self, image: int, low: tuple[int, int], high: tuple[int, int]) -> Tensor:
        return self.pictures.read(image, low[1], high[1])[:, low[0] : high[0]]


def store_of(pictures: Sequence[Pixels], aspect: Tensor, device: torch.device) -> PixelStore:
    """A store of pictures that are in memory already, each uint8 (height, width, 3)."""
    height, width = (torch.tensor([picture.shape[axis] for picture in pictures]) for axis in (0, 1))
    read = lambda image, top, bottom: torch.from_numpy(pictures[image][top:bottom])  # noqa: E731
    return PixelStore(Pictures(height, width, aspect, read), device)


def store_side(image_size: int, teacher_size: int) -> int:
    """Pixels of the short side of the store: a little over the largest crop, a multiple of 8.

    Crops are cut from pictures of this size wherever they are kept, never from the file: a crop of 20-40% of the area
    is enlarged and has 57% of the gradient energy of one from the file, a crop of all but the edges 87% (measured
    2026-11-26). A larger side keeps more and costs memory and time.
    """
    return -(-max(image_size, teacher_size) * 9 // 64) * 8


def kept_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) as kept: the short side `side`, the long one at most LONGEST times that; never enlarged."""
    scale = min(1.0, side / min(height, width))
    return tuple(max(1, min(round(length * scale), LONGEST * side)) for length in (height, width))  # type: ignore[return-value]


def build(
    folder: ImageList,
    side: int,
    work: Path,
    device: torch.device,
    wanted: str = "auto",
    memory: int = 0,
    step: int = WORK,
) -> tuple[PixelStore, ImageList]:
    """Decode `folder` into work/pixels-KEY (or find it there). Returns the store and the folder without the files that
    could not be decoded.

    wanted: one of PLACES, or auto: one that changes no crop, so never `encoded`; memory: bytes that this process may
    hold at most, 0 for 80% of what is free; step: bytes of them that are not for pixels. Shards are written as they
    finish, shared out among the processes; an interrupted build goes on after the last. Files that could not be decoded
    are tried again each time. Raises BingoError when the disk is too small, and as soon as more are bad than
    folder.max_bad allows (quarantine.csv).
    """
    each = max(SHARD, -(-len(folder.files) // SHARDS_AT_MOST))
    ranges = [range(start, min(start + each, len(folder.files))) for start in range(0, len(folder.files), each)]
    kind, shards, key = _place_of_shards(folder, ranges, side, work, wanted)
    listed = work.parent / "quarantine.csv"
    _make_missing(folder, distributed.mine(distributed.of_job(ranges)), shards, side, kind, listed)
    distributed.barrier()
    distributed.refuse_unfinished("decoded", ranges, lambda rows: shard_files.is_there(shards, rows, kind))
    found = [shard_files.read_columns(shards, rows) for rows in ranges]
    bad = shard_files.bad(folder, (facts["bad"] for facts in found))
    quarantine.refuse_bad(folder, bad, listed)
    good, height, width, aspect = (shard_files.column(found, name) for name in ("good", *SIDES, "aspect"))
    _refuse_none(good, folder)
    decode.say_oddities([oddity for facts in found for oddity in facts["oddities"]])
    kept = replace(folder.only(good), bad=bad)
    total = int((height.astype(np.int64) * width).sum()) * 3
    by_gpu = None
    if kind == "streamed":
        sizes = np.stack((height, width), axis=1)
        where, why, read = "stream", "the files are decoded again for every crop", _from_files(kept, side, sizes)
        if decode.on_gpu(device):
            jpegs = shard_files.column(found, "jpeg")
            by_gpu = decode.crops_of(kept, jpegs, sizes, side, device)
            why += f", {np.count_nonzero(jpegs):,} of them by nvJPEG"
    else:
        where, why = place(total, device, wanted, memory, step)
        why += _smaller(found, total) if kind == "encoded" else ""
        read = shard_files.reader(shards, ranges, found, mapped=where != "disk")
    console.say(
        f"pixels: {console.size(total)} of {len(good):,} images, {where} ({why}); views are cut from pictures shrunk to"
        f" a short side of {side} px"
    )
    pictures = Pictures(torch.from_numpy(height), torch.from_numpy(width), torch.from_numpy(aspect), read, key)
    return PixelStore(pictures, device, where, by_gpu), kept


def _place_of_shards(
    folder: ImageList, ranges: Sequence[range], side: int, work: Path, wanted: str
) -> tuple[Kind, Path, str]:
    """(how pictures are kept, their folder, made, and without stale ones beside it, the name of what they are made
    from).
    """
    made = partial(made_of, "pixels", images=folder.fingerprint(), side=side)
    key = made().key
    # What stands has taken its part of the disk already.
    lacking = [rows for rows in ranges if not shard_files.facts_file(work / f"pixels-{key}", rows).exists()]
    kind = kind_of(wanted, sum(map(len, lacking)), side, work)
    if kind == "encoded":
        key = made(encoded=shard_files.CODEC).key
    stem = "sizes" if kind == "streamed" else "pixels"
    shards = work / f"{stem}-{key}"
    if distributed.rank() == 0:
        if distributed.jobs() == 1:
            drop_stale(work, stem, {shards.name})
        shards.mkdir(exist_ok=True)
    distributed.barrier()
    return kind, shards, key


def _refuse_none(good: NDArray[np.int64], folder: ImageList) -> None:
    if not len(good):
        raise BingoError(
            f"--data: expected images, found none that can be decoded among {len(folder.files) + len(folder.bad)} files"
            f" in {folder.where}"
        )


def _smaller(found: list[dict[str, Any]], total: int) -> str:
    encoded = sum(int(shard_files.sizes(facts).sum()) for facts in found)
    return f": {console.size(encoded)} of JPEGs, {total / encoded:.1f} times smaller, decoded for every crop"


def _make_missing(
    folder: ImageList, ranges: Sequence[range], shards: Path, side: int, kind: Kind, listed: Path
) -> None:
    """Decode those of the shards `ranges` that do not stand. Raises BingoError as soon as too many files are bad; all
    that are known by then are in the file `listed`.
    """
    standing = [(rows, _standing(folder, rows, side, shards, kind)) for rows in ranges]
    missing = [rows for rows, bad in standing if bad is None]
    done = [bad for _, bad in standing if bad is not None]
    count = sum(map(len, missing))
    quarantine.refuse_bad(folder, shard_files.bad(folder, done), listed)
    if not missing:
        return
    if kind != "streamed":
        need_space(shards.parent, guess(count, side, kind), "the pixel store")
    whole = sum(map(len, ranges))
    with console.bar("check images" if kind == "streamed" else "decode images", whole, whole - count) as advance:
        for rows in missing:
            done.append(_fill(folder, rows, side, shards, kind, advance))
            quarantine.refuse_bad(folder, shard_files.bad(folder, done), listed)


def _standing(folder: ImageList, rows: range, side: int, shards: Path, kind: Kind) -> Bad | None:
    """The bad files of a whole shard, with today's reasons; None for a shard to be made: it is not whole, or a bad file
    can be decoded now.
    """
    if not shard_files.is_whole(shards, rows, kind):
        return None
    facts = shard_files.read_facts(shards, rows)
    again = list(decode_all(folder, [index for index, _ in facts["bad"]], lambda pixels: None, at_least=side))
    mended = [folder.files[index] for index, result in again if result is None]
    if mended:
        console.say(
            f"{len(mended):,} files that could not be used can be now, for example {mended[0]}: {len(rows):,} images"
            " are decoded again"
        )
        return None
    reasons = [(index, str(result)) for index, result in again]
    if reasons != [tuple(told) for told in facts["bad"]]:
        write_text(shard_files.facts_file(shards, rows), json.dumps(facts | {"bad": reasons}))
    return reasons


def place(total: int, device: torch.device, wanted: str, memory: int, step: int = WORK) -> tuple[str, str]:
    """(where pixels of `total` bytes are kept, why). Raises BingoError for a GPU that is asked for and cannot hold
    them.
    """
    if device.type == "cuda":
        room = int(0.4 * torch.cuda.mem_get_info(device)[0])
        if wanted == "gpu" or (wanted == "auto" and total < room):
            return "gpu", f"40% of the GPU's free memory is {console.size(room)}"
    elif wanted == "gpu":
        raise BingoError("--pixels gpu: expected a CUDA GPU, found none; use --pixels auto")
    if wanted != "auto":
        return wanted, "as asked for"
    room = (memory or machine.free_memory() * 4 // 5) - machine.resident() - step
    if total <= room:
        return "memory", f"there is room for {console.size(room)}"
    return "disk", f"memory has room for {console.size(max(room, 0))}; just the rows of a crop are read"


def guess(count: int, side: int, kind: Kind = "raw") -> int:
    """Bytes on disk of `count` images of 4:3, before any is opened."""
    return {"raw": count * side * side * 4, "encoded": count * (side * side * 4 // SMALLER + HEADER), "streamed": 0}[
        kind
    ]


def choose(count: int, side: int, work: Path, beside: int) -> str:
    """What `auto` means for a new run of `count` images: encoded where the disk of `work` holds no raw store but an
    encoded one, else auto. beside: bytes that other stages need there; what stands in `work` is used again or deleted.
    """
    beside -= sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    raw, encoded = (_has_room(work, guess(count, side, kind) + beside) for kind in KINDS[:2])
    return "encoded" if encoded and not raw else "auto"


def kind_of(wanted: str, count: int, side: int, work: Path) -> Kind:
    """How `build` keeps `count` pictures in `work`, where `wanted` is what `build` takes."""
    if wanted == "encoded":
        return "encoded"
    streamed = wanted == "stream" or (wanted == "auto" and not _has_room(work, guess(count, side)))
    return "streamed" if streamed else "raw"


def _has_room(work: Path, size: int) -> bool:
    try:
        need_space(work, size, "the pixel store")
    except BingoError:
        return False
    return True


def _shrink(pixels: Pixels, side: int) -> tuple[Pixels, float]:
    """(the picture as it is kept, width / height of the original)."""
    height, width = pixels.shape[:2]
    small = kept_size(height, width, side)
    if small != (height, width):
        if VECTORS:
            planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            pixels = interpolate(planes, small, mode="bicubic", antialias=True)[0].permute(1, 2, 0).contiguous().numpy()
        else:
            pixels = np.array(Image.fromarray(pixels).resize(small[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0))
    return pixels, width / height


def _fill(folder: ImageList, rows: range, side: int, shards: Path, kind: Kind, advance: console.Advance) -> Bad:
    """Make a shard; its bad files."""
    lists = ("good", "height", "width", "aspect", "jpeg", "bad", "oddities", *shard_files.LISTS[kind])
    facts: dict[str, Any] = {"tried": len(rows), "crc32": 0, **{name: [] for name in lists}}

    keep: dict[Kind, Callable[[Pixels], bytes]] = {
        "raw": lambda kept: kept.tobytes(),
        "encoded": shard_files.as_jpeg,
        "streamed": lambda _: b"",
    }

    def shrink(pixels: Pixels) -> tuple[bytes, dict[str, Any]]:
        small, aspect = _shrink(pixels, side)
        return keep[kind](small), {"height": small.shape[0], "width": small.shape[1], "aspect": aspect}

    with atomic(shard_files.data_file(shards, rows)) as temporary, temporary.open("wb") as handle:
        for index, result in decode_all(folder, rows, shrink, side, facts["oddities"]):
            if isinstance(result, ImageError):
                facts["bad"].append((index, str(result)))
            else:
                raw, told = result
                if kind == "streamed":
                    told["jpeg"] = _jpeg(folder, index, side)
                elif kind == "encoded":
                    told["encoded"] = len(raw)
                for name, value in (told | {"good": index}).items():
                    facts[name].append(value)
                facts["crc32"] = zlib.crc32(raw, facts["crc32"])
                handle.write(raw)
            advance(1, note=f"{len(facts['bad'])} bad" if facts["bad"] else None)
    facts["oddities"].sort()  # threads found them
    # After the pixels: what it says is there, is there.
    write_text(shard_files.facts_file(shards, rows), json.dumps(facts))
    return cast(Bad, facts["bad"])


def _jpeg(folder: ImageList, index: int, side: int) -> int:
    """`plain_jpeg` of an image that was decoded a moment ago."""
    try:
        return decode.plain_jpeg(folder.read_raw(index), side)
    except OSError:
        return 0


def _from_files(folder: ImageList, side: int, sizes: NDArray[np.int32]) -> Read:
    """Rows of images decoded anew, shrunk as the store would. sizes: (N, 2) height and width that each had when it was
    checked.
    """

    def read(image: int, top: int, bottom: int) -> Tensor:
        try:
            pixels = _shrink(decode.picture(folder, image, side).pixels, side)[0]
        except ImageError as error:
            folder.refuse_changed(image)
            raise decode.changed(folder.place(image), str(error)) from None
        folder.refuse_changed(image)
        if pixels.shape[:2] != tuple(sizes[image]):
            raise decode.changed(folder.place(image), "it is another picture")
        return torch.from_numpy(pixels)[top:bottom]

    return read
