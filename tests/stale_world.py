"""What tests/stale_state.py works on: a small world of pictures and weights that is a value."""

import hashlib
import io
import os
import shutil
import tarfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from helpers import encoder, photo
from PIL import Image
from safetensors.torch import save

ENDINGS = {"folder": "", "list": ".txt", "tar": ".tar"}
WRITTEN = 1_700_000_000
CLASSES = 3


class Pictures(NamedTuple):
    """A folder: its name, the seed of each file's contents by relative name, and when all were last written
    (seconds).
    """

    name: str
    files: tuple[tuple[str, int], ...]
    written: int = WRITTEN


class World(NamedTuple):
    """All that commands are given: pictures to train on, labelled ones, and the seeds of what is in teacher.safetensors
    and start.safetensors.
    """

    photos: Pictures
    bank: Pictures
    test: Pictures
    teacher: int = 0
    start: int = 0
    source: str = "folder"  # what bingo-compress is given: the folders, or a list or a tar file of each

    def given(self, folder: Pictures) -> str:
        """The name of what stands for a folder."""
        return folder.name + ENDINGS[self.source]


def first_world(source: str = "folder") -> World:
    """Bank and test have the same names, sizes and times, and nothing else in common."""

    def folder(name: str, each: int, start: int) -> Pictures:
        return Pictures(
            name,
            tuple(
                (f"kind{kind}/{number:02d}.bmp", start + number) for kind in range(CLASSES) for number in range(each)
            ),
        )

    return World(folder("photos", 8, 0), folder("bank", 6, 100), folder("test", 6, 200), source=source)


@cache
def _contents(name: str, seed: int) -> bytes:
    """A BMP file: all have the same size. One in three is of another kind than its folder says, so that no figure is
    perfect.
    """
    kind, file = int(name[4]), io.BytesIO()
    Image.fromarray(photo(kind if seed % 3 else (kind + 1) % CLASSES, 10 * seed + kind, 32, 40)).save(file, "BMP")
    return file.getvalue()


@cache
def _packed(folder: Pictures, source: str) -> bytes:
    """A list, or a tar file, of a folder."""
    if source == "list":
        return "\n".join(f"{folder.name}/{name}" for name, _ in folder.files).encode()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, seed in folder.files:
            member = tarfile.TarInfo(name)
            member.size = len(_contents(name, seed))
            archive.addfile(member, io.BytesIO(_contents(name, seed)))
    return file.getvalue()


@cache
def _weights(model: str, seed: int) -> bytes:
    return save({name: value.contiguous() for name, value in encoder(model, seed=seed).backbone.state_dict().items()})


def put(world: World, root: Path, *, told_apart: bool = False) -> None:
    """Make `root` hold the world and nothing else; files that are the same are left as they are. told_apart: no two
    contents have the same time of change.
    """
    root.mkdir(parents=True, exist_ok=True)
    wanted = {
        f"{folder.name}/{name}": (_contents(name, seed), folder.written)
        for folder in world[:3]
        for name, seed in folder.files
    }
    if world.source != "folder":
        wanted |= {world.given(folder): (_packed(folder, world.source), folder.written) for folder in world[:3]}
    wanted["teacher.safetensors"] = _weights("test_resnet", world.teacher), WRITTEN
    wanted["start.safetensors"] = _weights("test_efficientnet", world.start + 10), WRITTEN
    for path in root.rglob("*"):
        if path.is_file() and str(path.relative_to(root)) not in wanted:
            path.unlink()
    for name, (contents, written) in wanted.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != contents:
            path.write_bytes(contents)
        if told_apart:
            written = int.from_bytes(hashlib.sha256(contents).digest()[:3], "little") + WRITTEN
        os.utime(path, (written, written))
    for path in root.iterdir():
        if path.is_dir() and not any(entry.is_file() for entry in path.rglob("*")):
            shutil.rmtree(path)


def changed(random: np.random.Generator, world: World) -> tuple[str, World]:
    """Another world, and in words what is different."""
    if random.random() < 0.25:
        role = str(random.choice(["teacher", "start"], p=[0.7, 0.3]))
        return f"{role} weights replaced under their name", world._replace(**{role: 1 - getattr(world, role)})
    role = str(random.choice(["photos", "bank", "test"], p=[0.6, 0.2, 0.2]))
    folder: Pictures = getattr(world, role)
    files = dict(folder.files)
    extra = f"kind{CLASSES - 1}/extra.bmp"
    picture = str(random.choice([name for name in files if name != extra][:4]))
    kinds: dict[str, Pictures] = {
        f"{role}: {picture} replaced by another of the same size and time": _with(
            folder, files | {picture: files[picture] ^ 512}
        ),
        f"{role}: another folder of as many pictures with equal names, sizes and times": _with(
            folder, {name: seed ^ 1024 for name, seed in files.items()}
        ),
        f"{role}: a picture added or taken away": _with(
            folder,
            {name: seed for name, seed in files.items() if name != extra} | ({} if extra in files else {extra: 7}),
        ),
        f"{role}: one removed or put back": _with(folder, _but_last(files)),
        f"{role}: moved to another name": folder._replace(name=role if folder.name != role else f"moved-{role}"),
        f"{role}: times set back by a day": folder._replace(written=folder.written - 86_400),
    }
    what = str(random.choice(list(kinds), p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.1]))
    return what, world._replace(**{role: kinds[what]})


def _with(folder: Pictures, files: dict[str, int]) -> Pictures:
    return folder._replace(files=tuple(sorted(files.items())))


def _but_last(files: dict[str, int]) -> dict[str, int]:
    """Without kind0/05.bmp, or with it again."""
    name = "kind0/05.bmp"
    return {key: seed for key, seed in files.items() if key != name} | ({} if name in files else {name: 5})
