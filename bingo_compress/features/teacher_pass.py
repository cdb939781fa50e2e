"""The teacher's one pass over a folder: plain features, embeddings and augmented views, by shards that are never made
twice.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from bingo_edge.image import ImageError, preprocess
from torch import Tensor
from torch.nn.functional import normalize

from bingo_compress.data import augment
from bingo_compress.data.decode import decode_all
from bingo_compress.data.image_list import ImageList
from bingo_compress.data.pixel_store import PixelStore
from bingo_compress.errors import BingoError
from bingo_compress.features import extract
from bingo_compress.features.memmap import Stored, TeacherPass
from bingo_compress.features.targets import packed
from bingo_compress.models import encoder
from bingo_compress.models.encoder import Encoder
from bingo_compress.runtime import console, distributed
from bingo_compress.runtime.made_of import hash_seed, made_of
from bingo_compress.runtime.run_dir import drop_stale, need_space

SHARD = 1024
ROWS = 1024  # of a sample
TOO_ALIKE = 1 - 1.6e-5  # the mean cosine at which float16's rounding is 5% of the images' spread
LARGE = 512  # images that the teacher is given at once on a GPU; halved until they fit
VIEWS = "views.f16"  # as the teacher gave them


def run(
    teacher: Encoder,
    folder: ImageList,
    pixels: PixelStore,
    views: int,
    scale_min: float,
    work: Path,
    device: torch.device,
    *,
    of_features: bool = False,
) -> TeacherPass:
    """Embed the plain view and `views` augmented views of every image of `folder`, by shards of rows in
    work/teacher-KEY that are never made twice.

    Several processes share the shards. folder and pixels hold the same images in the same order. View v of an image is
    the same whatever `views` and the run's seed are, so that runs share them. of_features: views are backbone features,
    not embeddings. Raises BingoError when the disk is too small, and for an image that the teacher makes no numbers of.
    """
    apart = of_features and teacher.projection is not None
    key = _key(teacher, folder, pixels, scale_min, apart)
    stem = "teacher_features" if apart else "teacher"
    shards = work / f"{stem}-{key}"
    if distributed.jobs() == 1:
        distributed.from_first(lambda: drop_stale(work, stem, {shards.name}))
    shards.mkdir(exist_ok=True)
    count = len(folder.files)
    viewed = Stored(shards / VIEWS, teacher.width if of_features else teacher.embedding_width())
    plain = (
        Stored(shards / "features.f16", teacher.width),
        Stored(shards / "embeddings.f16", teacher.embedding_width()),
    )
    files = _Files(plain, (viewed,), count, of_features)
    made = _complete(files, Viewing(teacher, folder, pixels, scale_min, device, of_features), range(-1, views), work)
    features, embeddings = (part.read(count, part.width) for part in plain)
    if made:
        _say_alike(embeddings)
    seen = files.views(views)[0] if views else embeddings.new_empty(count, 0, embeddings.shape[1])
    return TeacherPass(features, embeddings, seen, key, projected=teacher.projection is not None, home=shards)


@dataclass(frozen=True)
class Viewing:
    """Whose views of what, and how they are drawn and made. folder and pixels hold the same images in the same order;
    of_features: as in `run`.
    """

    teacher: Encoder
    folder: ImageList
    pixels: PixelStore
    scale_min: float
    device: torch.device
    of_features: bool


def with_packed_views(
    seen: TeacherPass, viewing: Viewing, views: int, project: Callable[[Tensor], Tensor], home: Path
) -> TeacherPass:
    """`seen`, a pass without views, with the views that `run` would have made, in the target space alone, as `project`
    gives it: `targets.packed`, with their `closeness`. By shards of rows in the folder `home`, that are never made
    twice; whoever names it answers for `project` being always the same there. The teacher is not asked for views that
    `run` has stored beside `seen`, as array jobs do.

    Raises BingoError as `run` does.
    """
    count, plain = len(seen.features), seen.features if viewing.of_features else seen.embeddings
    kept = (
        Stored(home / "views.i8", project(plain[:1]).shape[1] + 2, torch.int8),
        Stored(home / "close.f32", 1, torch.float32),
    )

    def pack(rows: range, made: Tensor) -> tuple[Tensor, ...]:
        close = torch.einsum("nd,nd->n", plain[rows.start : rows.stop].float(), made.float())
        return packed(project(made)), close[:, None]

    files = _Files((), kept, count, viewing.of_features, pack, Stored(seen.home / VIEWS, plain.shape[1]))
    _complete(files, viewing, range(views), home)
    found, close = files.views(views)
    return replace(seen, views=found, close=close[:, :, 0])


def drop_views(seen: TeacherPass) -> None:
    """Delete the views that `run` has stored beside `seen`: `with_packed_views` has packed them."""
    Stored(seen.home / VIEWS, seen.embeddings.shape[1]).drop()


Shard = tuple[range, int]  # images, and which augmented view of them, -1 for the plain one


def _complete(files: "_Files", viewing: Viewing, views: range, work: Path) -> bool:
    """Make what is missing in `files` of these views of all images; whether anything was. Raises BingoError."""
    ranges = [range(start, min(start + SHARD, files.count)) for start in range(0, files.count, SHARD)]
    whole = [(rows, view) for view in views for rows in ranges]
    wanted = distributed.of_job(whole)
    mine = distributed.mine(wanted)
    lacking = set(chain(*distributed.exchange([shard for shard in mine if not files.sound(*shard)])))
    if missing := [shard for shard in wanted if shard in lacking]:
        teacher, folder, device = viewing.teacher, viewing.folder, viewing.device
        distributed.from_first(lambda: need_space(work, files.size(missing), "the teacher's embeddings"))
        files.reserve(views.stop)
        teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        fit = _Fit(LARGE if device.type == "cuda" else extract.BATCH)
        mine = distributed.mine(missing)
        with console.bar(f"teacher, {len(views)} views", sum(len(rows) for rows, _ in mine)) as advance:
            for rows, view in mine:
                if made := files.as_given(rows, view):
                    advance(len(rows))
                else:
                    batches = (
                        _plain_shard(teacher, folder, rows, device)
                        if view < 0
                        else _view_shard(teacher, viewing.pixels, rows, view, viewing.scale_min)
                    )
                    made = files.kinds(view, *_embedded(teacher, batches, fit, advance))
                for kind in made:
                    _refuse_no_direction(kind, folder, rows, teacher)
                files.write(rows, view, made)
    distributed.barrier()
    distributed.refuse_unfinished("embedded", whole, lambda shard: files.there(*shard))
    return bool(missing)


def _key(teacher: Encoder, folder: ImageList, pixels: PixelStore, scale_min: float, apart: bool) -> str:
    """A name for all that a pass depends on. apart: its views are features of a teacher with a projection head."""
    return made_of(
        "teacher",
        images=folder.fingerprint(),
        pictures=pixels.made_of,
        teacher=encoder.weights_digest(teacher),
        preprocessing=asdict(teacher.preprocessing),
        scale_min=scale_min,
        of_features=apart,
    ).key


@dataclass(frozen=True)
class _Files:
    """What a pass over `count` images writes. plain: features and embeddings, (N, width); viewed: what `pack` makes of
    the augmented views' features or embeddings, or those as they are; view by view, so that more views go on at the
    end, (V, N, width). given: where another pass may have stored what `pack` takes.
    """

    plain: tuple[Stored, ...]
    viewed: tuple[Stored, ...]
    count: int
    of_features: bool
    pack: Callable[[range, Tensor], tuple[Tensor, ...]] = lambda _, made: (made,)
    given: Stored | None = None

    def _parts(self, view: int) -> tuple[Stored, ...]:
        return self.plain if view < 0 else self.viewed

    def _first(self, rows: range, view: int) -> int:
        return rows.start + max(view, 0) * self.count

    def kinds(self, view: int, features: Tensor, embeddings: Tensor) -> tuple[Tensor, ...]:
        """Those of the two that are kept of a view."""
        return (features, embeddings) if view < 0 else (features,) if self.of_features else (embeddings,)

    def as_given(self, rows: range, view: int) -> tuple[Tensor, ...]:
        """What `kinds` keeps of a shard that another pass has stored; nothing where none has."""
        first = self._first(rows, view)
        if self.given is None or not self.given.sound(first, len(rows)):
            return ()
        return (self.given.read(len(rows), self.given.width, first=first),)

    def sound(self, rows: range, view: int) -> bool:
        """Whether a shard is there as it was written."""
        return all(part.sound(self._first(rows, view), len(rows)) for part in self._parts(view))

    def there(self, rows: range, view: int) -> bool:
        """Whether a shard was written; its checksum is not looked at."""
        return all(part.there(self._first(rows, view)) for part in self._parts(view))

    def size(self, shards: Iterable[Shard]) -> int:
        """Bytes of the shards."""
        return sum(part.size(len(rows)) for rows, view in shards for part in self._parts(view))

    def reserve(self, views: int) -> None:
        """Make room for all images and so many views."""
        for parts, high in ((self.plain, 1), (self.viewed, views)):
            for part in parts if high else ():
                part.reserve(high * self.count)

    def write(self, rows: range, view: int, made: Sequence[Tensor]) -> None:
        """Put a shard, what `kinds` kept of it, in its place."""
        kept = made if view < 0 else self.pack(rows, *made)
        for part, kind in zip(self._parts(view), kept, strict=True):
            part.write(self._first(rows, view), kind)

    def views(self, views: int) -> list[Tensor]:
        """What is kept of so many views, each (N, V, width), read from disk as it is used."""
        return [part.read(views, self.count, part.width).transpose(0, 1) for part in self.viewed]


def _refuse_no_direction(made: Tensor, folder: ImageList, rows: range, teacher: Encoder) -> None:
    """Raise BingoError for a row of `made` (n, D), the images `rows`, that is not of length one: the teacher gave
    zeros, infinities or NaN.
    """
    # A NaN is no less than anything.
    bad = ((made.float().norm(dim=1) - 1).abs() < 0.05).logical_not().nonzero()[:, 0].tolist()
    if bad:
        raise BingoError(
            f"--teacher {teacher.name}: expected features with a direction, found zeros, infinities or NaN for"
            f" {len(bad):,} of {len(rows):,} images, the first {folder.place(rows[bad[0]])}; are the teacher's weights"
            f" whole, and does it take {teacher.preprocessing.size} px?"
        )


def _say_alike(embeddings: Tensor) -> None:
    """Warn where the embeddings (N, D) of all images are so alike that float16 rounds off what tells them apart."""
    sample = embeddings[:: -(-len(embeddings) // ROWS)].float()
    alike = float(normalize(sample, dim=1).double().mean(0).square().sum())  # the mean cosine of any two
    if len(sample) > 1 and alike > TOO_ALIKE:
        console.say(
            f"warning: the teacher tells these images hardly apart (mean cosine {alike:.6f}): float16 rounds off a good"
            " part of what differs. Random weights, or another normalisation than the teacher's own, look like this"
        )


def _plain_shard(teacher: Encoder, folder: ImageList, rows: range, device: torch.device) -> Iterator[Tensor]:
    """The plain view of the images `rows`, BATCH at a time: (B, 3, S, S)."""
    geometry = teacher.preprocessing.geometry()
    decoded = decode_all(folder, rows, lambda picture: preprocess(picture, **geometry))
    for start in range(rows.start, rows.stop, extract.BATCH):
        batch = []
        for index in range(start, min(start + extract.BATCH, rows.stop)):
            result = next(decoded)[1]
            if isinstance(result, ImageError):
                raise BingoError(
                    f"{folder.place(index)} changed while the run was reading it ({result}); start the command again"
                )
            batch.append(torch.from_numpy(result))
        yield extract.to_float(torch.stack(batch).to(device))


def _view_shard(teacher: Encoder, pixels: PixelStore, rows: range, view: int, scale_min: float) -> Iterator[Tensor]:
    """An augmented view of the images `rows`, BATCH at a time: (B, 3, S, S)."""
    for start in range(rows.start, rows.stop, extract.BATCH):
        indices = torch.arange(start, min(start + extract.BATCH, rows.stop))
        # One generator a batch and view: the views do not depend on where the pass was interrupted, nor on what the
        # teacher takes at once.
        generator = torch.Generator().manual_seed(hash_seed("view", view, start))
        drawn = augment.draw(pixels.aspect[indices], generator, scale_min)
        yield augment.apply(pixels.crops(indices, drawn.box, teacher.preprocessing.size), drawn)


@torch.inference_mode()
def _embedded(
    teacher: Encoder, batches: Iterator[Tensor], fit: "_Fit", advance: console.Advance
) -> tuple[Tensor, Tensor]:
    """(features (n, width), embeddings (n, D)) of all images in `batches`, float16 of length one, on the CPU."""
    found = []
    while group := list(islice(batches, max(fit.images // extract.BATCH, 1))):
        found.append(fit(teacher, torch.cat(group)))
        advance(len(found[-1][0]))
    return torch.cat([features for features, _ in found]), torch.cat([embeddings for _, embeddings in found])


@dataclass
class _Fit:
    """How many images the teacher takes at once; halved whenever a GPU's memory does not suffice for them."""

    images: int

    def __call__(self, teacher: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
        while True:
            try:
                found = [_both(teacher, part) for part in images.split(self.images)]
                return torch.cat([features for features, _ in found]), torch.cat(
                    [embeddings for _, embeddings in found]
                )
            except torch.cuda.OutOfMemoryError:
                if self.images == 1:
                    raise
                self.images //= 2
            torch.cuda.empty_cache()


def _both(teacher: Encoder, batch: Tensor) -> tuple[Tensor, Tensor]:
    """(features, embeddings), float16 of length one, on the CPU."""
    features, embeddings = teacher.embed(batch.contiguous(memory_format=torch.channels_last))
    return normalize(features.float(), dim=1).half().cpu(), normalize(embeddings.float(), dim=1).half().cpu()
