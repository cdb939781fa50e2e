"""What was given as --data to one listing of images: one source or several, whatever each is."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

from bingo_compress.errors import BingoError
from bingo_compress.recipe import Recipe
from bingo_compress.sources import folder, lists, parquet, tar, zipped
from bingo_compress.sources.listed import NO_COLUMNS, Columns, Listed, Opened, is_system_file

SOURCES = (tar, zipped, parquet, lists, folder)  # the first that matches
ARCHIVES = (tar, zipped, parquet)
BESIDE = (".txt", ".json", ".md", ".csv", ".idx", ".index")  # what may lie beside shards
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


def open_sources(data: Data, option: str) -> Opened:
    """List every image of what `option` gave. Raises BingoError for a place that holds none, or is none."""
    given = asked(data)
    paths = list(chain.from_iterable(_expanded(place, option) for place in given.places))
    _refuse_twice(paths, option)
    plain = len(paths) == 1 and paths[0].is_dir()
    parts = [_listed(path, given.columns, option) for path in paths]
    if not any(part.names or part.bad for part in parts):
        what = "folder" if plain else "list or archive"
        raise BingoError(
            f"{option}: expected images, found an empty {what}: {_named(given.places)}; put photos in it or name"
            " another folder"
        )
    prefixes = ("",) if plain else tuple(f"{tail}!" for tail in _tails(paths))
    return Opened(_named(given.places), Path(given.places[0]), tuple(parts), prefixes)


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
                " folder, or put the paths into a list.txt, one a line"
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


def _shards(path: Path) -> list[Path]:
    """The archives of a folder that holds nothing else but words about them; else nothing."""
    held = [each for each in sorted(path.iterdir()) if not is_system_file(each.name)]
    archives = [each for each in held if _is_archive(each)]
    others = [each for each in held if each not in archives and each.suffix.lower() not in BESIDE]
    return archives if archives and not others else []


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
