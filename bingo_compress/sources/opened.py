"""What was given as --data to one listing of images: one source or several, whatever each is."""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import TypeVar

from bingo_compress.errors import BingoError
from bingo_compress.recipe import FILES, WORDS, Recipe
from bingo_compress.sources import folder, lists, parquet, tar, zipped
from bingo_compress.sources.folder import walked
from bingo_compress.sources.listed import NO_COLUMNS, SPLITS, Columns, Listed, Opened

SOURCES = (tar, zipped, parquet, lists, folder)  # the first that matches
ARCHIVES = (tar, zipped, parquet)
# What may lie beside shards: words and tables about them, the hubs' loading scripts.
BESIDE = (".txt", ".json", ".jsonl", ".md", ".csv", ".tsv", ".yaml", ".yml", ".html", ".py", ".idx", ".index")
Result = TypeVar("Result")
BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Asked:
    """Images as they were asked for: folders, lists, archives, patterns of archives; columns of their tables; `bands`
    of `load_image`, as text.
    """

    places: tuple[str, ...]
    columns: Columns = NO_COLUMNS
    bands: str = ""


Data = str | Path | Sequence[str | Path] | Asked


def asked(data: Data) -> Asked:
    """Whatever a caller gives, as one kind of thing."""
    if isinstance(data, Asked):
        return data
    return Asked((str(data),) if isinstance(data, str | Path) else tuple(map(str, data)))


def of_recipe(recipe: Recipe) -> Asked:
    """What a recipe is to be distilled on."""
    places = recipe.data if isinstance(recipe.data, tuple) else (recipe.data,)
    return Asked(places, Columns(recipe.image_column, recipe.label_column), recipe.bands)


def numbers(bands: str) -> tuple[int, ...]:
    """`Asked.bands` as `load_image` takes them."""
    return tuple(map(int, bands.split(","))) if bands else ()


def absolute(place: str) -> str:
    """The whole path of a place that was given: the run can then go on from any folder."""
    return place if "://" in place else str(Path(place).resolve())


def absolute_recipe(recipe: Recipe) -> Recipe:
    """The recipe with whole paths of its images and weights: the run can then go on from any folder."""
    files = {key: file for key in FILES if (file := getattr(recipe, key)) not in WORDS}
    data = recipe.data if isinstance(recipe.data, tuple) else (recipe.data,)
    places = tuple(map(absolute, data))
    return recipe.model_copy(
        update={key: str(Path(file).resolve()) for key, file in files.items()}
        | {"data": places if isinstance(recipe.data, tuple) else places[0]}
    )


def open_sources(data: Data, option: str, work: Path | None = None) -> Opened:
    """List every image of what `option` gave. work: of a run, where `Listed.keep` may have kept something. Raises
    BingoError for a place that holds none, or is none.
    """
    given = asked(data)
    expanded = [_expanded(place, option) for place in given.places]
    paths = list(chain.from_iterable(expanded))
    _refuse_twice(paths, option)
    if work:
        for path in filter(tar.matches, paths):
            tar.recall(path, work)
    plain = len(paths) == 1 and paths[0].is_dir()
    parts = [_listed(path, given.columns, option) for path in paths]
    if not any(part.names or part.bad for part in parts):
        what = "folder" if plain else "list or archive"
        raise BingoError(
            f"{option}: expected images, found an empty {what}: {_named(given.places)}; put photos in it or name"
            " another folder"
        )
    prefixes = ("",) if plain else tuple(f"{tail}!" for tail in _tails(paths))
    told = (_splits(Path(place), found, option) for place, found in zip(given.places, expanded, strict=True))
    places = tuple((Path(place), len(found)) for place, found in zip(given.places, expanded, strict=True))
    return Opened(_named(given.places), tuple(parts), prefixes, places, tuple(filter(None, told)))


def _named(places: Sequence[str]) -> str:
    return places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"


def _expanded(place: str, option: str) -> list[Path]:
    """The paths that a place stands for: itself, a pattern's shards, the archives of a folder or of a list."""
    if "://" in place:
        raise BingoError(
            f"{option}: expected files of this machine, found {place}; copy or mount it first (aws s3 sync, gcloud"
            " storage cp, rclone mount), then give its folder"
        )
    path = Path(place)
    if BRACES.search(place) and not path.exists():
        found = [Path(each) for each in _braces(place)]
        if missing := [each for each in found if not each.exists()]:
            raise BingoError(
                f"{option}: expected {len(found):,} files of {place}, found {len(found) - len(missing):,}; the first"
                f" that is missing is {missing[0]}"
            )
        return found
    if not path.exists():
        if any(letter in place for letter in "*?["):
            raise BingoError(
                f"{option}: expected a folder or a file, found a pattern that stands for no file: {place}; name the"
                " folder, write shards as 'name-{000..011}.tar', or put the paths into a list.txt, one a line"
            )
        raise BingoError(f"{option}: expected a folder of images, found nothing at {place}; check the path")
    if path.is_dir():
        return _shards(path) or [path]
    if path.suffix.lower() == ".txt":
        lines = _said(option, lambda: lists.lines_of(path))
        inside = [path.parent / os.path.expanduser(line) for line in lines]
        if lines and all(_is_archive(each) for each in inside):
            return inside
    return [path]


def _is_archive(path: Path) -> bool:
    return any(source.matches(path) for source in ARCHIVES)


def _shards(root: Path) -> list[Path]:
    """The archives at any depth of a folder that holds nothing else but words about them, as the hubs lay out theirs,
    each real one once; else nothing.
    """
    archives: dict[Path, Path] = {}
    for where, names, _ in walked(root, lambda error: None):
        for path in (Path(where, name) for name in names):
            if _is_archive(path):
                archives.setdefault(path.resolve(), path)
            elif path.suffix.lower() not in BESIDE:
                return []
    return list(archives.values())


def _splits(root: Path, archives: Sequence[Path], option: str) -> str:
    """In words, the splits that the names of a folder's archives, or of folders about them, tell apart; "" where they
    do not.
    """
    if not root.is_dir() or root in archives:
        return ""
    found: dict[str, list[Path]] = {}
    for path in archives:
        *folders, name = path.relative_to(root).parts
        words = [*folders, re.split("[-_.]", name)[0]]
        found.setdefault(next((word for word in words if word.lower() in SPLITS), ""), []).append(path)
    named = sorted(found.keys() - {""}, key=lambda split: (not split.lower().startswith("train"), split))
    if len(named) < 2:
        return ""
    counted = [*(f"{split} ({len(found[split]):,})" for split in named), *(["others"] if "" in found else [])]
    one, other = (shlex.quote(_together(root, found[split], split)) for split in named[:2])
    return (
        f"{' and '.join(counted)} are splits, by the names of the archives in {root}; all are taken. To take one alone:"
        f" {option} {one}, and {other} as --test"
    )


def _together(root: Path, archives: Sequence[Path], split: str) -> str:
    """What to give for these archives of one split: the folder of that name, the archive, or one pattern."""
    folders = {next((above for above in path.parents if above.name == split), root) for path in archives}
    if len(folders) == 1 and root not in folders:
        return str(folders.pop())
    names = sorted(map(str, archives))
    if len(names) == 1:
        return names[0]
    start = _shared(names)
    end = _shared([name[start:][::-1] for name in names])
    middles = [name[start : len(name) - end] for name in names]
    counted = f"{middles[0]}..{middles[-1]}"
    inside = counted if _braces(f"{{{counted}}}") == middles else ",".join(middles)
    return f"{names[0][:start]}{{{inside}}}{names[0][len(names[0]) - end :]}"


def _shared(names: Sequence[str]) -> int:
    """How many letters all names begin with."""
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)))


def _braces(place: str) -> list[str]:
    """shards/{00..11}.tar and {a,b}.tar as a shell expands them."""
    found = BRACES.search(place)
    if not found:
        return [place]
    inside = found[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = map(int, numbers.groups())
        width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
        step = 1 if last >= first else -1
        words = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        words = inside.split(",")
    return list(chain.from_iterable(_braces(f"{place[: found.start()]}{word}{place[found.end() :]}") for word in words))


def _refuse_twice(paths: Sequence[Path], option: str) -> None:
    """Raise BingoError where images would be there twice under two names."""
    whole = [path.resolve() for path in paths]
    for number, path in enumerate(whole):
        if path in whole[:number]:
            raise BingoError(f"{option}: expected each place once, found {paths[number]} twice; leave one out")
        above = next((other for other in whole if other in path.parents and other.is_dir()), None)
        if above:
            raise BingoError(
                f"{option}: expected places apart from each other, found {paths[number]} inside {above}; leave one out"
            )


def _said(option: str, work: Callable[[], Result]) -> Result:
    """What `work` gives; its BingoError names the option."""
    try:
        return work()
    except BingoError as error:
        raise BingoError(f"{option}: {error}", error.exit_status) from None


def _listed(path: Path, columns: Columns, option: str) -> Listed:
    source = next((each for each in SOURCES if each.matches(path)), None)
    if source is None:
        raise BingoError(
            f"{option}: expected a folder of images, found a file: {path}; name its folder (or give a list .txt or"
            " .csv, a .tar, .zip or .parquet)"
        )
    found: Listed = _said(option, lambda: source.listed(path, columns))
    return found


def _tails(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: names stay when all of them are moved together."""
    whole = [path.resolve().parts for path in paths]
    length = 1
    while len({parts[-length:] for parts in whole}) < len(whole):
        length += 1
    return ["/".join(parts[-length:]) for parts in whole]
