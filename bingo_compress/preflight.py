"""What can be refused before torch and timm are imported, which takes seconds."""

import importlib.util
import re
from collections.abc import Collection
from pathlib import Path

from bingo_compress.data.listing import list_images
from bingo_compress.errors import BingoError
from bingo_compress.models.names import FAMILIES, on_hub, unknown
from bingo_compress.recipe import GIVEN, WORDS, Recipe, load_recipe
from bingo_compress.runtime.machine import processes
from bingo_compress.runtime.run_dir import RunDir, open_finished, refuse_no_file, refuse_taken
from bingo_compress.sources.opened import of_recipe

ROLES = ("teacher", "student")
OWN = ("resnet50x2", "vit_small_moco_v3")  # models that weights.py adds to timm's


def refuse_early(recipe: Recipe, out: Path, own: Collection[str], *, resume: bool, overwrite: bool) -> None:
    """Raise BingoError for everything that can be known to be wrong in a second. The pipeline checks all of it again,
    thoroughly. own: the roles, teacher or student, that a module of the user's own was given for.
    """
    if not recipe.data:
        raise BingoError("--data: expected a folder of images, found none given; for example --data photos/")
    for role in ROLES:
        if not getattr(recipe, role):
            raise BingoError(
                f"--{role}: expected a model name, found none given; for example --{role}"
                f" {'resnet152' if role == 'teacher' else 'mobilenetv3'}"
            )
        source = getattr(recipe, f"{role}_weights")
        if source not in WORDS and not Path(source).is_file():
            raise BingoError(
                f"--{role.replace('_', '-')}-weights: expected pretrained, random or a weights file; found no file"
                f" {source}"
            )
    _refuse_absent(recipe, own, ROLES)
    if recipe.keep_best and not recipe.hold_out:
        raise BingoError("--keep-best: expected images held out, found none; raise --set hold_out=0.05")
    refuse_taken(out, may_hold_files=resume or overwrite)
    folder = list_images(of_recipe(recipe), work=RunDir(out).work)
    if len(folder.files) < 2:  # how many more it takes is the method's to say
        raise BingoError(
            f"--data: expected images, found {len(folder.files)} that may be one among"
            f" {len(folder.files) + len(folder.bad)} files in {folder.where}"
        )
    for role in ROLES:
        source = getattr(recipe, f"{role}_weights")
        if source != GIVEN:
            _refuse_unknown(getattr(recipe, role), f"--{role}")
        if source not in WORDS:
            _refuse_foreign(Path(source), f"--{role}-weights")


def refuse_alone(recipe: Recipe, share: str) -> tuple[int, int]:
    """(number, jobs) of an array job. Raises BingoError for a share that is none, and for a run that jobs cannot
    begin.
    """
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", share)
    number, jobs = map(int, found.groups()) if found else (0, 0)
    if number >= jobs:
        raise BingoError(f"--shard: expected I/N, job I of N counted from 0, for example 0/4 to 3/4; found {share!r}")
    if recipe.views == "online":
        raise BingoError(
            "--views online: expected stored views, found a teacher that runs in every step: there is nothing to embed"
            " before; give --views 4, or start distill"
        )
    if recipe.time:
        raise BingoError(
            f"--set time={recipe.time}: expected epochs, found a time, which no job can know of the others; give"
            " --epochs"
        )
    if processes() > 1:
        raise BingoError(
            f"--shard: expected a process by itself, found {processes()} of torchrun's; start one job a GPU, each with"
            " its own --shard"
        )
    return number, jobs


def refuse_run(run: Path, own: Collection[str], roles: Collection[str], json_file: Path | None = None) -> Recipe:
    """The same for a finished run, of which the models of these roles are needed. Returns its recipe."""
    refuse_no_file(json_file, "--json")
    recipe = load_recipe(open_finished(run).as_run)
    _refuse_absent(recipe, own, roles)
    return recipe


def _refuse_absent(recipe: Recipe, own: Collection[str], roles: Collection[str]) -> None:
    """A module of the user's own is in no file: it must be given, and only where the recipe has one."""
    for role in roles:
        name, needed = getattr(recipe, role), getattr(recipe, f"{role}_weights") == GIVEN
        if needed and role not in own:
            raise BingoError(
                f"--{role}: {name} is a module of your own, which no name and no file can build; give it in Python:"
                f" {role}=Encoder({name!r}, module, Preprocessing(...))"
            )
        if role in own and not needed:
            raise BingoError(f"{role}: expected no module, since the run's {role} is {name}; leave it out")


def _refuse_unknown(word: str, option: str) -> None:
    """timm's list of models costs seconds to import; a name that stands nowhere in its source is certainly none of
    them.
    """
    spec = importlib.util.find_spec("timm")
    if on_hub(word) or spec is None or not spec.submodule_search_locations:
        return
    name = word.removeprefix("timm/").partition(".")[0]
    if name in FAMILIES or name in OWN:
        return
    files = Path(spec.submodule_search_locations[0], "models").glob("*.py")
    sources = [file.read_text(encoding="utf-8") for file in files]
    # A plain search takes a hundredth of the time of one for a whole word.
    if any(name in source and re.search(rf"\b{re.escape(name)}\b", source) for source in sources):
        return
    named = [name for source in sources for name in re.findall(r"^@register_model\s+def (\w+)", source, re.MULTILINE)]
    known = [*named, *OWN, *FAMILIES]
    raise unknown(word, option, known)


def _refuse_foreign(file: Path, option: str) -> None:
    """A weights file is a zip or a pickle (torch) or a length and a JSON header (safetensors)."""
    with file.open("rb") as handle:
        start = handle.read(9)
    if not (start.startswith((b"PK", b"\x80")) or start[8:] == b"{"):
        raise BingoError(f"{option}: {file} is not a readable weights file (damaged, or not a checkpoint)")
