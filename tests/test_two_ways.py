"""Two ways to one result, where no other file has the pair already: the table of all is in docs/reliability.md."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bingo_edge.cli import main as edge
from helpers import Ran, flags, photos

from bingo_compress.cli import main
from bingo_compress.runtime import checkpoint

pytestmark = pytest.mark.slow
Bingo = Callable[..., Ran]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """data: photos of three kinds; bank and test: others, of which some are in another kind's folder, so that nobody is
    always right.
    """
    root = tmp_path_factory.mktemp("ways")
    made = {
        "data": photos(root / "data", 8),
        "bank": photos(root / "bank", 9, start=100),
        "test": photos(root / "test", 9, start=200),
    }
    for folder in (made["bank"], made["test"]):
        for file in sorted(folder.glob("kind0/*"))[:3]:
            file.rename(folder / "kind1" / f"of-kind0-{file.name}")
    return made


def distilled(bingo: Bingo, out: Path, *more: str, **settings: Any) -> Ran:
    ran = bingo("distill", *flags(**settings), "--out", out, *more)
    assert ran.status in (0, 2), ran.err
    return ran


def weights(file: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(file)[0]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def same(one: Path, other: Path) -> bool:
    return equal(weights(one), weights(other))


def test_an_arm_is_the_same_whatever_stands_before_it(bingo: Bingo, world: dict[str, Path], tmp_path: Path) -> None:
    """Weights and figures, with a save after every step, so that saves of the arm before could be taken up; one arm
    stands there twice, under two names.
    """
    students, figures = [], []
    for number, methods in enumerate(("bingo,seed,bingo:temperature=0.2", "seed,bingo:temperature=0.2,bingo")):
        out = tmp_path / str(number)
        words = (
            "--labels",
            world["bank"],
            "--test",
            world["test"],
            "--methods",
            methods,
            "--seeds",
            "1,0",
            "--out",
            out,
        )
        ran = bingo("compare", *flags(data=world["data"], save_every_steps=1), *words)
        assert ran.status == 0, ran.err
        students.append({file.name: weights(file) for file in (out / "runs").glob("*.student.safetensors")})
        table = json.loads((out / "table.json").read_text())
        figures.append(
            {
                (run["arm"], run["seed"]): [run.get(figure) for figure in ("knn", "linear", "neighbour_recall")]
                for run in table["runs"]
            }
        )
    assert figures[0] == figures[1]
    assert students[0].keys() == students[1].keys()
    assert not [name for name, tensors in students[0].items() if not equal(tensors, students[1][name])]
    for seed in (0, 1):
        assert equal(
            *(students[0][f"{name}-seed{seed}.student.safetensors"] for name in ("bingo", "bingo+temperature=0.2"))
        )
    assert not equal(*(students[0][f"bingo-seed{seed}.student.safetensors"] for seed in (0, 1)))


def test_the_student_is_the_same_wherever_pixels_are_kept(bingo: Bingo, world: dict[str, Path], tmp_path: Path) -> None:
    for where in ("memory", "disk", "stream"):
        assert distilled(bingo, tmp_path / where, data=world["data"], pixels=where).status == 0
    assert same(tmp_path / "disk" / "student.safetensors", tmp_path / "memory" / "student.safetensors")
    assert same(tmp_path / "stream" / "student.safetensors", tmp_path / "memory" / "student.safetensors")


SETTINGS = {"save_every_steps": 1, "seed": 1}
LEFTOVERS: dict[str, dict[str, Any]] = {
    "another seed": {"seed": 5},
    "another method": {"method": "seed"},
    "another start": {"student_weights": "START"},
    "another teacher": {"teacher_size": 48},
}


@pytest.fixture(scope="module")
def made(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run (clean), and one for each of LEFTOVERS that differs from it."""
    root = tmp_path_factory.mktemp("made")
    found = {name: root / name.replace(" ", "-") for name in ("clean", *LEFTOVERS)}
    with pytest.MonkeyPatch.context() as patch:
        for name, out in found.items():
            settings = {"data": world["data"], **SETTINGS, **LEFTOVERS.get(name, {})}
            if "student_weights" in settings:
                settings["student_weights"] = found["clean"] / "student.safetensors"
            patch.setattr("sys.argv", ["bingo-compress", "distill", *flags(**settings), "--out", str(out)])
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code
    return found


@pytest.mark.parametrize("left", LEFTOVERS)
@pytest.mark.parametrize("way", ["--overwrite", "--resume"])
def test_a_run_among_leftovers_is_the_run_in_a_clean_folder_or_is_refused(
    way: str, left: str, bingo: Bingo, world: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    """--overwrite over another run; --resume of a run whose work folder is another run's."""
    clean, used, settings = made["clean"], tmp_path / "used", {"data": world["data"], **SETTINGS}
    other = Path(shutil.copytree(made[left], tmp_path / "other"))
    if way == "--overwrite":
        ran = distilled(bingo, other, way, **settings)
        assert ran.status == 0
        assert same(other / "student.safetensors", clean / "student.safetensors")
        assert same(other / "work" / "start.safetensors", clean / "work" / "start.safetensors")
        return
    shutil.copytree(clean, used)
    shutil.rmtree(used / "work")
    shutil.copytree(other / "work", used / "work")
    ran = distilled(bingo, used, way, **settings)
    if ran.status == 0:
        assert same(used / "student.safetensors", clean / "student.safetensors")
        assert same(used / "work" / "start.safetensors", clean / "work" / "start.safetensors")
    else:
        assert "error:" in ran.err
        assert len(ran.err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def proven(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("proven") / "run"
        patch.setattr("sys.argv", ["bingo-compress", "distill", *flags(data=world["data"]), "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    return out


def test_the_kit_is_right_as_often_as_the_proof_says(
    bingo: Bingo, world: dict[str, Path], proven: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of a file of another input size than the student's; of its own: test_end_to_end.py."""
    run = Path(shutil.copytree(proven, tmp_path / "run"))
    assert bingo("export", "--run", run, "--image-size", 48).status == 0
    assert json.loads((run / "export" / "student.json").read_text())["input"]["size"] == 48
    assert bingo("validate", "--run", run, "--data", world["bank"], "--test", world["test"]).status == 0
    row = next(row for row in json.loads((run / "validation.json").read_text())["rows"] if row["name"] == "onnx")
    for head, figure in {"linear": "linear", "bank": "knn"}.items():
        capsys.readouterr()
        (file,) = (run / "export").glob(f"*{head}.npz")
        words = ["classify", run / "export" / "student.onnx", world["test"], "--head", file, "--json"]
        assert edge([str(word) for word in words]) == 0
        found = json.loads(capsys.readouterr().out)
        answers = (
            found
            if isinstance(found, list)
            else next(value for value in found.values() if isinstance(value, list) and value)
        )
        right = [answer["class"] == Path(answer["path"]).parent.name for answer in answers]
        assert len(right) == 27
        assert np.mean(right) == pytest.approx(row[figure], abs=1e-12)
    assert 0 < row["linear"] < 1


def test_a_second_proof_is_the_first(bingo: Bingo, world: dict[str, Path], proven: Path, tmp_path: Path) -> None:
    """Also after a proof on another folder with the same names, sizes and times."""
    run = Path(shutil.copytree(proven, tmp_path / "run"))
    words = ("validate", "--run", run, "--data", world["bank"])

    def left() -> list[Any]:
        heads = [np.load(file) for file in sorted((run / "export").glob("*.npz"))]
        return [
            (run / "validation.json").read_text(),
            *({key: head[key].tolist() for key in head.files} for head in heads),
        ]

    assert bingo(*words, "--test", world["test"]).status == 0
    first = left()
    assert bingo(*words, "--test", world["test"]).status == 0
    assert left() == first
    assert bingo(*words, "--test", world["data"]).status == 0
    assert left() != first
    assert bingo(*words, "--test", world["test"]).status == 0
    assert left() == first
