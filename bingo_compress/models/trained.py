"""The models of a run, written and read back: nothing is read for a run that was not made by it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bingo_compress import __version__
from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import Encoder, build, weights_digest
from bingo_compress.recipe import Recipe
from bingo_compress.runtime import checkpoint
from bingo_compress.runtime.made_of import FORMATS, MadeOf, hash_seed, made_of
from bingo_compress.runtime.run_dir import RunDir, made_by


@dataclass(frozen=True)
class Models:
    """The two encoders of a run, and the recipe with everything that was left open filled in."""

    recipe: Recipe
    teacher: Encoder
    student: Encoder


def build_teacher(recipe: Recipe) -> Encoder:
    """The recipe's teacher. Raises BingoError."""
    torch.manual_seed(hash_seed("teacher"))
    return build(recipe.teacher, recipe.teacher_size, recipe.teacher_weights, "--teacher-weights")


def build_student(recipe: Recipe, source: str, stream: str) -> Encoder:
    """A student of the recipe's kind and size; `stream` names the random numbers of its random weights."""
    torch.manual_seed(hash_seed(recipe.seed, stream))
    return build(recipe.student, recipe.image_size, source, "--student-weights")


def build_models(recipe: Recipe) -> Models:
    """Teacher and student with their weights; input sizes left at 0 are filled in. Raises BingoError."""
    teacher = build_teacher(recipe)
    student = build_student(recipe, recipe.student_weights, "student")
    sizes = {"teacher_size": teacher.preprocessing.size, "image_size": student.preprocessing.size}
    return Models(recipe.model_copy(update=sizes), teacher, student)


def save_student(student: Encoder, path: Path, recipe: Recipe, made: MadeOf) -> None:
    """The backbone under timm's own keys, no head, with the facts needed to build it in the file's metadata. made: what
    `distill.distill` gave.
    """
    _save(student, path, recipe, MadeOf("student", FORMATS["student"], made.inputs))


def save_start(student: Encoder, path: Path, recipe: Recipe) -> None:
    """The same of a student before training."""
    _save(student, path, recipe, made_of("start", start=weights_digest(student)))


def _save(student: Encoder, path: Path, recipe: Recipe, made: MadeOf) -> None:
    sees = {"image_size": recipe.image_size, "mean": student.preprocessing.mean, "std": student.preprocessing.std}
    checkpoint.save(path, student.backbone.state_dict(), made, student=recipe.student, version=__version__, **sees)


def load_student(recipe: Recipe, file: Path) -> Encoder:
    """The student with weights from a safetensors file of a run. Raises BingoError."""
    student = build_student(recipe, "random", "student")
    tensors, facts = checkpoint.load(file)
    try:
        student.backbone.load_state_dict(tensors)
    except RuntimeError as error:
        raise BingoError(f"{file} does not fit {recipe.student}: {error}") from None
    # A method's file as start brings its own; files of versions before 0.3 do not say it, and were taken for timm's.
    own = student.preprocessing
    mean, std = (tuple(map(float, facts.get(name, getattr(own, name)))) for name in ("mean", "std"))  # type: ignore[call-overload]
    return student.normalised_by(mean, std)


def load_start(recipe: Recipe, run: RunDir) -> Encoder:
    """A run's student as it was before training. Raises BingoError where work/ holds another run's."""
    start = load_student(recipe, run.start)
    _refuse_other(
        run,
        "start",
        start,
        f"{run.start} is not what this run began with; delete {run.work} (it is not needed) or bring its own back",
    )
    return start


def load_teacher(recipe: Recipe, run: RunDir) -> Encoder:
    """The teacher that a finished run was distilled from. Raises BingoError where another file has its name now."""
    teacher = build_teacher(recipe)
    source = recipe.teacher_weights
    _refuse_other(
        run,
        "teacher",
        teacher,
        f"--run: {recipe.teacher} ({source}) has other weights now than this run was distilled from; bring those back",
    )
    return teacher


def refuse_other_bags(run: RunDir) -> None:
    """Raise BingoError where work/ holds other bags than those that a run was distilled with."""
    made = checkpoint.made_of(run.student)
    with made_by("distill", run.bags):
        digest = checkpoint.tensor_digest(checkpoint.load(run.bags)[0]["bags"])
    if made and made.inputs.get("bags", digest) != digest:
        raise BingoError(
            f"{run.bags} is not what this run was distilled with; delete {run.work} (it is not needed) or bring its own"
            " back"
        )


def _refuse_other(run: RunDir, name: str, encoder: Encoder, message: str) -> None:
    """Raise BingoError with `message` unless the run's student was made with just this encoder; those of earlier
    versions do not say.
    """
    made = checkpoint.made_of(run.student)
    if made and made.inputs.get(name) != weights_digest(encoder):
        raise BingoError(message)


def refuse_other_inputs(run: RunDir, now: Mapping[str, Any]) -> None:
    """Raise BingoError if a run's state (without one: its student) was made from other inputs than `now`, by name.
    Nothing is written before this.
    """
    for file in filter(Path.is_file, (run.checkpoint, run.before, run.student)):
        try:
            made = checkpoint.made_of(file)
        except BingoError:
            continue  # damaged: whoever loads it will say so
        others = (
            MadeOf(made.role, FORMATS.get(made.role, 0), {**made.inputs, **now}).differences(made)
            if made
            else ["the version of this program"]
        )
        if others:
            raise checkpoint.of_another_run(file, others)
        return
