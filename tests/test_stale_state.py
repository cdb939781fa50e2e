"""The short part of tests/stale_state.py, and that it finds what it looks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stale_commands import Command, Held, chain, draw, remember
from stale_run import Ended
from stale_world import first_world, put

WITHIN = 900


PLANTED = '''
import sys
from pathlib import Path
import torch
import stale_commands, stale_state, stale_world
from bingo_compress.runtime import checkpoint
torch.set_num_threads(1)
real = stale_state.put

def without_replacing(world, root, **told):
    """As if what lies in the world's first picture were never read again."""
    real(world._replace(photos=FIRST.photos) if root.parent.name == "live" else world, root, **told)

FIRST = stale_world.first_world()
stale_state.put = without_replacing
fuzzer = stale_state.Fuzzer(Path(sys.argv[1]))
settings = {"method": "bingo", "epochs": 1, "seed": 0, "image_size": 32, "bags": "knn"}
command = stale_commands.Command("distill", "a", ()).but(**settings)
files = tuple((name, seed + 1000) for name, seed in FIRST.photos.files)
for world in (FIRST, FIRST._replace(photos=FIRST.photos._replace(files=files))):
    stale_state.put(world, fuzzer.live / "world")
    ended = fuzzer.fork(stale_commands.words(command, fuzzer.live, world, fuzzer.live / "world"))
    print(fuzzer.judge(command, world, ended, {}).kind)
    command = command.but(how="overwrite")

stale_state.put = real
sys.argv[1:] = sys.argv[2:]
stale_state.main()
'''


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_stale_result_is_found_and_none_is_there_without_a_word(tmp_path: Path) -> None:
    """Found: the pictures that are read stay as they were while the world says that they changed, which is what every
    cache that is too old amounts to. Then 24 commands and what they are compared with, a second each, by the same
    process, as its imports take seven.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    words = [tmp_path / "home", "--sequences", "4", "--seed", "7", "--json", tmp_path / "found.json"]
    command = [sys.executable, "-c", PLANTED, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=WITHIN, check=False)
    assert ended.stdout.split("\n")[:2] == ["same", "not said"], ended.stdout + ended.stderr
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads((tmp_path / "found.json").read_text())
    assert (told["sequences"], told["not_said"], told["broken"]) == (4, 0, 0)


def test_a_world_is_put_as_it_is_and_nothing_else(tmp_path: Path) -> None:
    world = first_world()
    put(world, tmp_path)
    names = {f"{folder.name}/{name}" for folder in world[:3] for name, _ in folder.files} | {
        "teacher.safetensors",
        "start.safetensors",
    }
    found = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    assert found.keys() == names
    pictures = [path for name, path in found.items() if name.endswith(".bmp")]
    assert len({(path.stat().st_size, path.stat().st_mtime) for path in pictures}) == 1
    assert len({path.read_bytes() for path in pictures}) == len(pictures)
    before = found["photos/kind0/00.bmp"].read_bytes()
    files = dict(world.photos.files) | {"kind0/00.bmp": 512}
    put(world._replace(photos=world.photos._replace(name="moved", files=tuple(files.items())), teacher=1), tmp_path)
    assert not (tmp_path / "photos").exists()
    after = tmp_path / "moved" / "kind0" / "00.bmp"
    assert len(before) == after.stat().st_size
    assert before != after.read_bytes()


def test_a_command_depends_on_the_last_of_each_kind_and_reads_the_teacher_as_it_is() -> None:
    world, held = first_world(), {"a": Held(), "b": Held()}
    done, refused = Ended(0, ""), Ended(2, "")
    first = Command("distill", "b", ()).but(method="seed", epochs=1)
    remember(first, world, done, held)
    remember(Command("export", "b", ()).but(format="onnx"), world, done, held)
    remember(Command("export", "b", ()).but(format="all"), world, refused, held)
    later = world._replace(teacher=1, photos=world.photos._replace(name="moved"))
    proof = Command("validate", "b", ())
    steps = chain(proof, later, held["b"])
    assert [step.kind for step, _ in steps] == ["distill", "export", "validate"]
    assert [step.place for step, _ in steps] == ["a", "a", "a"]
    assert steps[1][0].get("format") == "onnx"
    assert [given.teacher for _, given in steps] == [1, 0, 1]
    assert {given.photos.name for _, given in steps} == {"photos"}
    remember(proof, later, done, held)
    remember(first.but(how="overwrite"), later, done, held)
    assert set(held["b"].steps) == {"distill", "begun"}
    remember(first.but(how="overwrite"), later, Ended(-9, ""), held)
    assert set(held["b"].steps) == {"begun"}


def test_a_sequence_is_drawn_alike_again() -> None:
    import numpy as np

    drawn = [
        [draw(np.random.default_rng([3, number]), {"a": Held(), "b": Held()}, last=False) for number in range(20)]
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert {command.kind for command, _ in drawn[0]} == {"distill", "compare"}
