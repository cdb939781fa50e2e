"""Small things that several test files make: photos on disk, pixel stores, tiny models, and the command line in this
process.
"""

import hashlib
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bingo_compress.cli import main
from bingo_compress.data.image_list import Contents, ImageList
from bingo_compress.data.pixel_store import PixelStore, store_of
from bingo_compress.features.targets import TargetSpace
from bingo_compress.models import trained
from bingo_compress.models.encoder import Encoder, build, weights_digest
from bingo_compress.recipe import Recipe, make_recipe, recipe_text
from bingo_compress.runtime import run_dir
from bingo_compress.runtime.made_of import hash_seed, made_of
from bingo_compress.runtime.run_dir import RunDir
from bingo_compress.sources.listed import Names
from bingo_compress.training.plan import Plan, TeacherShape, make_plan
from bingo_compress.unread import unread

CPU = torch.device("cpu")
REPORTED = ("distill", "validate", "export")  # commands that write a page on the run
TINY = {
    "teacher": "test_resnet",
    "student": "test_efficientnet",
    "teacher_weights": "random",
    "student_weights": "random",
    "teacher_size": 32,
    "image_size": 32,
    "head_hidden": 32,
    "target_dim": 16,
    "batch_size": 8,
    "bag_size": 3,
    "views": "2",
    "epochs": 2,
    "hold_out": 0.1,
    "device": "cpu",
    "threads": 1,
}

# What every port of the preprocessing is tried on: (width, height), square, landscape, portrait, tiny (so enlarged),
# one pixel thin, the network's own size, and far from it.
SHAPES = (
    (64, 64),
    (200, 31),
    (31, 200),
    (1, 1),
    (9, 7),
    (1, 90),
    (90, 1),
    (96, 96),
    (640, 427),
    (427, 640),
    (1201, 97),
)
RULES: tuple[dict[str, Any], ...] = (
    {"crop_pct": 1.0, "interpolation": "bicubic"},
    {"crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center"},
    {"crop_pct": 0.95, "interpolation": "bilinear"},
    {"crop_pct": 0.9, "interpolation": "lanczos"},
    {"crop_pct": 0.875, "interpolation": "nearest"},
    {"crop_pct": 1.0, "interpolation": "nearest"},
    {"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
)


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def recipe(**changes: Any) -> Recipe:
    """A recipe of the smallest models and sizes, with `changes`."""
    return make_recipe({**TINY, **changes}, "tests")


def planned(chosen: Recipe, images: int, dim: int = 16, device: torch.device = CPU) -> Plan:
    """The plan of a recipe whose targets come from elsewhere than a teacher: as they are, `dim` wide."""
    return make_plan(chosen, images, device, TeacherShape(dim, dim, projected=True))


def encoder(name: str = "test_resnet", size: int = 32, seed: int = 0) -> Encoder:
    """A model with the random weights of `seed`, in eval mode, its BatchNorm statistics away from the trivial (0,
    1).
    """
    torch.manual_seed(seed)
    made = build(name, size, "random", "--test")
    generator = torch.Generator().manual_seed(seed)
    for module in made.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.7, 1.3, generator=generator)
    return made


def shallow(student: Encoder) -> Encoder:
    """A MobileNet without the blocks that a skip could stand in for, a RepViT of one block a stage: it begins and ends
    as the whole one does, and is traced in half of the time.
    """
    for stage in getattr(student.backbone, "stages", ()):
        del stage.blocks[1:]
    for stage in getattr(student.backbone, "blocks", ()):
        for place in reversed([place for place, block in enumerate(stage) if block.has_skip]):
            del stage[place]
    return student


def dropping(student: Encoder, share: float = 0.3) -> Encoder:
    """The student with a dropout after each layer of its trunk, so that every block draws masks."""
    for name, module in list(student.named_modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and name:
                setattr(module, child, torch.nn.Sequential(layer, torch.nn.Dropout(share)))
    return student


def picture(number: int, width: int, height: int) -> Image.Image:
    """A smooth picture by formula, another one for each number."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    wave = np.sin((3 + number % 5) * x) + np.cos((2 + number % 3) * y - 1) * np.sin(4 * x * y + number)
    return Image.fromarray(np.rint(127 + 60 * wave[..., None] * [1, 0.8, -0.7]).clip(0, 255).astype(np.uint8))


def photo(kind: int, seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """uint8 (height, width, 3): stripes, dots or blobs by `kind`, each in its own colour, with noise of `seed`."""
    random = np.random.default_rng([kind, seed])
    rows, columns = np.mgrid[:height, :width]
    phase = random.uniform(0, 6)
    pattern = (
        np.sin(rows / 2 + phase),
        np.sin(columns / 2 + phase),
        np.sin(rows / 6 + phase) * np.sin(columns / 6 + phase),
    )[kind % 3]
    colour = np.array([(200, 60, 60), (60, 190, 70), (70, 70, 210)], float)[kind % 3] * random.uniform(0.8, 1.1)
    noisy = colour * (1 + 0.35 * pattern[:, :, None]) + random.normal(0, 8, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def photos(folder: Path, each: int, kinds: int = 3, start: int = 0) -> Path:
    """`each` photos of every kind as PNG in folder/kind0, folder/kind1, ... of differing shapes. Returns the folder."""
    for kind in range(kinds):
        (folder / f"kind{kind}").mkdir(parents=True, exist_ok=True)
        for number in range(start, start + each):
            shape = (40 + 3 * (number % 4), 56 - 5 * (number % 5))
            Image.fromarray(photo(kind, number, *shape)).save(folder / f"kind{kind}" / f"{number:03d}.png")
    return folder


def clips(root: Path) -> Path:
    """../shared/cases/video_frames_on_both_sides: 12 clips of 8 all but equal frames, labels by clip, in all/; nine of
    the clips in bank/, three in test/.
    """
    for clip in range(12):
        base = np.kron(np.random.default_rng(clip).integers(0, 255, (8, 8, 3)), np.ones((8, 8, 1)))
        for frame in range(8):
            noisy = base + np.random.default_rng(frame).normal(0, 2, base.shape)
            for part in ("all", "bank" if clip < 9 else "test"):
                folder = root / part / ("ok" if clip % 2 else "defect")
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"clip{clip:02d}_{frame:03d}.png")
    return root


def bad_files(folder: Path) -> set[str]:
    """Put five files that are no images into `folder`. Returns their names."""
    good = next(folder.rglob("*.png"))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder / "words.jpg").write_text("these are words")
    (folder / "notes.txt").write_text("no image by name")
    (folder / "nowhere.jpg").symlink_to(folder / "gone.jpg")
    return {"empty.jpg", "cut.png", "words.jpg", "notes.txt", "nowhere.jpg"}


def filled_store(count: int, side: int = 40) -> PixelStore:
    """`count` pictures of three kinds in turn, in memory."""
    pictures = np.stack([photo(number % 3, number, side, side) for number in range(count)])
    return store_of(list(pictures), torch.ones(count), CPU)


def whole_images(store: PixelStore, indices: Tensor, size: int) -> Tensor:
    """Whole images (B,) of a store, resized without crop: uint8 (B, 3, size, size)."""
    return store.crops(indices, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(indices), 4), size)


def crop(pixels: Tensor, box: Tensor, size: int) -> Tensor:
    """A store's crops of its pictures, one each. pixels: uint8 (B, H, W, 3); box: (B, 4); uint8 (B, 3, size, size)."""
    store = store_of(list(pixels.numpy()), torch.ones(len(pixels)), CPU)
    return store.crops(torch.arange(len(pixels)), box, size)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows of length one, the last dimension being the vectors'."""
    generator = torch.Generator().manual_seed(hash_seed("unit", seed, shape))
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


def digests_of(names: Iterable[str | None]) -> np.ndarray:
    """(N, 32) uint8, as `Contents` has them: the same for the same name, zeros for None."""
    told = [bytes(32) if name is None else hashlib.sha256(os.fsencode(name)).digest() for name in names]
    return np.frombuffer(b"".join(told), np.uint8).reshape(-1, 32)


def listed(names: Sequence[str], digests: np.ndarray | None = None) -> ImageList:
    """Images of these names that lie nowhere; digests (N, 32): of their contents, None for `digests_of` the names."""
    found = digests_of(names) if digests is None else digests
    return ImageList(Path("nowhere"), Names(names), (), read=Contents(found.copy(), np.zeros(len(names), np.int64)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kind_targets(count: int, views: int, dim: int) -> Tensor:
    """(count, views, dim): targets that `filled_store` pictures tell: a direction for each of the three kinds, and a
    little of each image's own.
    """
    kinds, own, noise = unit(3, dim, seed=1), unit(count, dim, seed=2), unit(count, views, dim, seed=3)
    return torch.nn.functional.normalize(
        kinds[torch.arange(count) % 3][:, None] + 0.4 * own[:, None] + 0.2 * noise, dim=-1
    )


@dataclass
class Trained:
    """What a call of distill.distill left."""

    student: Encoder
    metrics: Path
    saved: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.student.backbone.state_dict()


def turned(real: Callable[..., TargetSpace]) -> Callable[..., TargetSpace]:
    """`real`, which fits a target space, as another processor may fit it: an axis points the other way."""

    def fitted(*given: Any) -> TargetSpace:
        space = real(*given)
        assert space.basis is not None
        return TargetSpace(space.mean, space.basis * torch.tensor([-1.0] + [1.0] * (space.basis.shape[1] - 1)))

    return fitted


@contextmanager
def interrupted_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, at: int) -> Iterator[None]:
    """owner.name raises KeyboardInterrupt in its call number `at`, counted from 1."""
    real, calls = getattr(owner, name), itertools.count(1)

    def stopping(*arguments: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        yield


@dataclass(frozen=True)
class Ran:
    """What a command left: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Ran:
    """bingo-compress with `words`, in this process; without a page on the run unless they ask for one."""
    plain = bool(words) and words[0] in REPORTED and "--report" not in words and "--help" not in words
    monkeypatch.setattr(sys, "argv", ["bingo-compress", *map(str, words), *(["--no-report"] if plain else [])])
    capsys.readouterr()
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    out, err = capsys.readouterr()
    return Ran(status, out, err)


def flags(**changes: Any) -> list[str]:
    """TINY as the words of the command line, with `changes` and without what their method does not read; settings
    without a flag of their own go through --set.
    """
    own = (
        "teacher",
        "student",
        "teacher_weights",
        "student_weights",
        "teacher_size",
        "image_size",
        "batch_size",
        "bag_size",
        "views",
    )
    own += ("epochs", "device", "seed", "data", "queue_size", "temperature")
    words: list[str] = []
    idle = unread(recipe(method=changes.get("method", "bingo")))
    for key, value in {**{key: value for key, value in TINY.items() if key not in idle}, **changes}.items():
        words += [f"--{key.replace('_', '-')}", str(value)] if key in own else ["--set", f"{key}={value}"]
    return words


def untrained_run(folder: Path, each: int) -> RunDir:
    """folder/run: a finished run of an untrained student on folder/photos, `each` photos of every kind."""
    settings = recipe(data=str(photos(folder / "photos", each)))
    run = run_dir.open_new(folder / "run", resume=False, overwrite=False)
    run_dir.write_text(run.recipe, recipe_text(settings))
    made = made_of("training", teacher=weights_digest(trained.build_teacher(settings)))
    trained.save_student(trained.build_student(settings, "random", "student"), run, settings, made)
    return run


def clustered(count: int, dim: int = 16, centres: int = 60, spread: float = 0.5) -> torch.Tensor:
    """Rows around `centres` directions, as features of images are."""
    where = torch.randint(centres, (count,), generator=torch.Generator().manual_seed(5))
    return unit(centres, dim, seed=1)[where] + spread * unit(count, dim, seed=2)
