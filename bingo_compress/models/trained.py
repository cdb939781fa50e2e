"""The models of a run, written and read back: nothing is read for a run that was not made by it."""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bingo_compress import __version__
from bingo_compress.errors import BingoError
from bingo_compress.models.encoder import Encoder, build, weights_digest
from bingo_compress.recipe import GIVEN, Recipe, may_change
from bingo_compress.runtime import checkpoint
from bingo_compress.runtime.made_of import FORMATS, MadeOf, hash_seed, made_of
from bingo_compress.runtime.run_dir import RunDir, made_by


@dataclass(frozen=True)
class Given:
    """Models of the user's own, which no name builds: a run of theirs is made, gone on with, proven and exported with
    copies of them.
    """

    teacher: Encoder | None = None
    student: Encoder | None = None


NOTHING_GIVEN = Given()


@dataclass(frozen=True)
class Models:
    """The two encoders of a run, and the recipe with everything that was left open filled in."""

    recipe: Recipe
    teacher: Encoder
    student: Encoder


def build_teacher(recipe: Recipe, given: Encoder | None = None) -> Encoder:
    """The recipe's teacher. Raises BingoError."""
    if recipe.teacher_weights == GIVEN:
        return _copy(given, recipe.teacher, recipe.teacher_size, "--teacher")
    torch.manual_seed(hash_seed("teacher"))
    return build(recipe.teacher, recipe.teacher_size, recipe.teacher_weights, "--teacher-weights", recipe.ema)


def build_student(recipe: Recipe, source: str, stream: str, given: Encoder | None = None) -> Encoder:
    """A student of the recipe's kind and size; `stream` names the random numbers of its random weights."""
    torch.manual_seed(hash_seed(recipe.seed, stream))
    if recipe.student_weights == GIVEN:
        student = _copy(given, recipe.student, recipe.image_size, "--student")
        if source == "random":
            redraw(student.backbone)
        return student
    return build(recipe.student, recipe.image_size, source, "--student-weights", recipe.ema)


def _copy(given: Encoder | None, name: str, size: int, option: str) -> Encoder:
    """A copy of a user's own model, at another input size where the recipe has one. Raises BingoError."""
    if given is None:
        raise BingoError(
            f"{option}: {name} is a module of your own, which no name and no file can build; give it in Python:"
            f" {option[2:]}=Encoder({name!r}, module, Preprocessing(...))"
        )
    places: dict[int, str] = {}
    for key, tensor in given.backbone.state_dict().items():
        if tensor.numel() and (first := places.setdefault(tensor.data_ptr(), key)) != key:
            raise BingoError(
                f"{option}: expected tensors of their own, found that {key} of {name} is {first}; untie them"
            )
    copied = copy.deepcopy(given).eval()
    if size in (0, copied.preprocessing.size):
        return copied
    other = Encoder(name, copied.backbone, replace(copied.preprocessing, size=size)).eval()
    other.projection = copied.projection
    return other


def redraw(module: nn.Module) -> None:
    """Random weights in place: as each layer draws its own when it is made; what belongs to no such layer, a class
    token for one, has its values shuffled.
    """
    drawn: set[nn.Parameter] = set()
    for layer in module.modules():
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
            drawn.update(layer.parameters(recurse=False))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter not in drawn:
                flat = parameter.flatten()
                parameter.copy_(flat[torch.randperm(len(flat))].view_as(parameter))


def build_models(recipe: Recipe, given: Given = NOTHING_GIVEN) -> Models:
    """Teacher and student with their weights; input sizes left at 0 are filled in. Raises BingoError."""
    teacher = build_teacher(recipe, given.teacher)
    student = build_student(recipe, recipe.student_weights, "student", given.student)
    sizes = {"teacher_size": teacher.preprocessing.size, "image_size": student.preprocessing.size}
    return Models(recipe.model_copy(update=sizes), teacher, student)


def save_student(student: Encoder, run: RunDir, recipe: Recipe, made: MadeOf) -> None:
    """The backbone under timm's own keys, no head, with the facts needed to build it in the file's metadata; and once
    more as a folder for timm, if it is a model of timm's. made: what `distill.distill` gave.

    The folder goes before the file that it is made of: there is never one of another student.
    """
    shutil.rmtree(run.timm, ignore_errors=True)
    _save(student, run.student, recipe, MadeOf("student", FORMATS["student"], made.inputs))
    if student.is_timms():
        student.save_timm(run.timm)


def save_start(student: Encoder, path: Path, recipe: Recipe) -> None:
    """The same of a student before training."""
    _save(student, path, recipe, made_of("start", start=weights_digest(student)))


def _save(student: Encoder, path: Path, recipe: Recipe, made: MadeOf) -> None:
    sees = {"image_size": recipe.image_size, "mean": student.preprocessing.mean, "std": student.preprocessing.std}
    checkpoint.save(path, student.backbone.state_dict(), made, student=recipe.student, version=__version__, **sees)


def load_student(recipe: Recipe, file: Path, given: Encoder | None = None) -> Encoder:
    """The student with weights from a safetensors file of a run. Raises BingoError."""
    student = build_student(recipe, "random", "student", given)
    tensors, facts = checkpoint.load(file)
    try:
        student.backbone.load_state_dict(tensors)
    except RuntimeError as error:
        raise BingoError(f"{file} does not fit {recipe.student}: {error}") from None
    # A method's file as start brings its own; files of versions before 0.3 do not say it, and were taken for timm's.
    own = student.preprocessing
    mean, std = (tuple(map(float, facts.get(name, getattr(own, name)))) for name in ("mean", "std"))  # type: ignore[call-overload]
    return student.normalised_by(mean, std)


def load_start(recipe: Recipe, run: RunDir, given: Encoder | None = None) -> Encoder:
    """A run's student as it was before training. Raises BingoError where work/ holds another run's."""
    start = load_student(recipe, run.start, given)
    _refuse_other(
        run,
        "start",
        start,
        f"{run.start} is not what this run began with; delete {run.work} (it is not needed) or bring its own back",
    )
    return start


def load_teacher(recipe: Recipe, run: RunDir, given: Encoder | None = None) -> Encoder:
    """The teacher that a finished run was distilled from. Raises BingoError where another file has its name now."""
    teacher = build_teacher(recipe, given)
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


def as_begun(asked: Recipe, before: Recipe | None) -> Recipe:
    """What was asked for, with what pixels=auto has become in the run `before` that goes on."""
    if before and asked.pixels == "auto" and before.pixels == "encoded":
        return asked.model_copy(update={"pixels": "encoded"})
    return asked


def changed(before: Recipe, now: Recipe) -> str:
    """The settings that make `now` another run than `before`, with both values; "" where none does."""
    free = may_change(before, now)
    return ", ".join(
        f"{key}: {getattr(before, key)} -> {value}"
        for key, value in now.model_dump().items()
        if getattr(before, key) != value and key not in free
    )


def refuse_other_inputs(run: RunDir, now: Mapping[str, Any]) -> None:
    """Raise BingoError if a run's state (without one: its student, or what array jobs began) was made from other inputs
    than `now`, by name. Nothing is written before this.
    """
    for file in filter(Path.is_file, (run.checkpoint, run.before, run.student, run.begun)):
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
