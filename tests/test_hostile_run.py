"""A run folder from elsewhere: whatever is in it, every command ends with a result or one error, and nothing outside of
it is written, run or waited for.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import Ran, flags, photos

pytestmark = pytest.mark.slow
Bingo = Callable[..., Ran]
SCRIPT = "<script>alert(1)</script>"
CONTENTS = ("", "[]", '{"a":' * 5000, json.dumps({"run_id": SCRIPT, "rows": SCRIPT, "images": {"training": SCRIPT}}))
READ_BY = {
    "summary.json": ("validate",),
    "validation.json": ("export",),
    "metrics.jsonl": ("resume",),
    "export/student.json": ("validate",),
    "export/latency.json": ("validate",),
    "export/student.onnx": ("validate",),
    "student.safetensors": ("validate", "export"),
    "recipe.yaml": ("resume",),
    "resolved.yaml": ("validate", "resume"),
    "work/start.safetensors": ("validate", "resume"),
    "work/bags.safetensors": ("validate",),
    "work/checkpoint.safetensors": ("resume",),
    "work/pixels-*/000000000.json": ("resume",),
    "work/pixels-*/000000000.u8": ("resume",),
    "work/*/*-000000000000.json": ("resume",),
}
LINKS = (
    "export",
    "work",
    "metrics.jsonl",
    "validation.json",
    "export/student.onnx",
    "export/.student.onnx.1.tmp",
    "work/writer.json",
    "work/checkpoint.safetensors",
)


class World(NamedTuple):
    """A finished run with its proof and its export, the photos that it is of, and what must not change."""

    run: Path
    photos: Path
    outside: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("whole")
    return World(root / "run", photos(root / "photos", 6), root / "outside")


@pytest.fixture
def world(whole: World, tmp_path: Path, bingo: Bingo) -> World:
    """A copy that a test may spoil, without its student where `resume` is to have something to do."""
    if not whole.run.exists():
        for words in (
            ("distill", *flags(data=whole.photos, save_every_steps=2), "--out", whole.run),
            ("export", "--run", whole.run),
            ("validate", "--run", whole.run, "--data", whole.photos),
        ):
            assert bingo(*words).status == 0
    shutil.copytree(whole.run, tmp_path / "run")
    (tmp_path / "outside").mkdir()
    for name in ("student.onnx", "metrics.jsonl", "writer.json"):
        (tmp_path / "outside" / name).write_text("somebody's")
    return World(tmp_path / "run", whole.photos, tmp_path / "outside")


def command(world: World, name: str, bingo: Bingo) -> Ran:
    if name == "resume":
        (world.run / "student.safetensors").unlink(missing_ok=True)
        return bingo("distill", "--resume", "--out", world.run)
    return bingo(name, "--run", world.run, *(["--data", world.photos] if name == "validate" else []))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*"))
    return hashlib.sha256(
        b"".join(os.fsencode(path) + (path.read_bytes() if path.is_file() else b"") for path in files)
    ).hexdigest()


@pytest.mark.parametrize("name", READ_BY)
def test_a_file_that_holds_something_else_is_one_error_or_made_again(world: World, name: str, bingo: Bingo) -> None:
    places = list(world.run.glob(name))
    assert places
    before = digest(world.outside)
    for content in CONTENTS if places[0].suffix != ".safetensors" else CONTENTS[:2]:
        for word in READ_BY[name]:
            if word == "export" and name == "validation.json" and content != CONTENTS[-1]:
                continue  # it takes ten seconds
            kept = [place.read_bytes() for place in places]
            for place in places:
                place.write_text(content)
            ran = command(world, word, bingo)
            assert ran.status in (0, 2), (word, content[:20], ran.err)
            assert (ran.status == 0) == (ran.err == "") and len(ran.err.splitlines()) <= 1
            card = world.run / "export" / "MODEL_CARD.md"
            assert SCRIPT not in card.read_text()
            for place, content_before in zip(places, kept, strict=True):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content_before)
            if not (world.run / "student.safetensors").exists():
                shutil.copy(world.run / "work" / "start.safetensors", world.run / "student.safetensors")
    assert digest(world.outside) == before


@pytest.mark.parametrize(
    ("name", "word"), [*((name, "validate") for name in LINKS), *((LINKS[1], word) for word in ("export", "resume"))]
)
def test_a_link_out_of_the_run_is_refused_by_name(world: World, name: str, word: str, bingo: Bingo) -> None:
    place = world.run / name
    target = world.outside / place.name if place.suffix and not place.name.startswith(".") else world.outside
    if place.is_dir():
        shutil.copytree(place, world.outside, dirs_exist_ok=True)
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    place.symlink_to(target)
    before = digest(world.outside)
    ran = command(world, word, bingo)
    assert ran.status == 2 and len(ran.err.splitlines()) == 1
    assert f"found {name}, a link to {target}" in " ".join(ran.err.split())
    assert digest(world.outside) == before


@pytest.mark.parametrize("name", ["summary.json", "export/latency.json", "work/checkpoint.safetensors"])
def test_a_pipe_is_not_waited_for(world: World, name: str, bingo: Bingo) -> None:
    (world.run / name).unlink()
    os.mkfifo(world.run / name)
    for word in ("validate", "export", "resume"):
        ran = command(world, word, bingo)
        assert ran.status == 2 and "neither a file nor a folder" in ran.err
        shutil.copy(world.run / "work" / "start.safetensors", world.run / "student.safetensors")


class Payload:
    """What makes a file as soon as it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("word", ["validate", "resume"])
def test_code_in_weights_or_recipe_is_not_run(world: World, word: str, bingo: Bingo) -> None:
    ran_to = world.outside / "was run"
    weights = world.run / "weights.pth"
    weights.write_bytes(pickle.dumps({"state_dict": Payload(ran_to)}))
    recipe = (world.run / "recipe.yaml").read_text()
    for spoilt in (
        recipe.replace("teacher_weights: random", f"teacher_weights: {weights}"),
        recipe + f"seed: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{ran_to}']]\n",
    ):
        assert spoilt != recipe
        for name in ("recipe.yaml", "resolved.yaml"):
            (world.run / name).write_text(spoilt)
        ran = command(world, word, bingo)
        assert ran.status == 2 and len(ran.err.splitlines()) == 1, ran.err
        assert not ran_to.exists()
        shutil.copy(world.run / "work" / "start.safetensors", world.run / "student.safetensors")
    with weights.open("rb") as file:  # it does run where it is let
        pickle.load(file)
    assert ran_to.exists()
