"""Members of an archive to images and labels, whatever the archive: those of one key belong together, as WebDataset
lays them out.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bingo_compress.errors import BingoError
from bingo_compress.sources.listed import (
    LARGEST,
    NOT_IMAGES,
    Columns,
    Listed,
    Names,
    in_order,
    is_system_file,
    is_system_folder,
    refusal,
    stamp_of,
)

LABELS = (".cls", ".cls.txt", ".label", ".label.txt")
JSON_KEYS = ("label", "class", "class_name", "cls", "category", "target")
ABOUT = frozenset([".cls", ".label", ".id", ".index", ".caption", ".cap", ".text", ".url", ".uid", *NOT_IMAGES])


def listed(
    sizes_of: Callable[[], Mapping[str, int]],
    read: Callable[[str], bytes],
    path: Path,
    columns: Columns,
) -> Listed:
    """Images of the archive `path`. sizes_of: bytes of each member that is a file, asked for again where labels are;
    read: its contents, raises OSError.

    A member that is not an image but has the key of one tells of it: its label where it is NAME.cls or NAME.json.
    """
    sizes = sizes_of()
    kept = [name for name in sizes if not _is_system(name)]
    images = {_key(name) for name in kept if not _tells(name)}
    files = Names()
    bad: list[tuple[str, str]] = []
    for name in sorted(kept, key=in_order):
        if _tells(name) and _key(name) in images:
            continue
        reason = refusal(name) or _unusable(sizes[name])
        if reason:
            bad.append((name, reason))
        else:
            files.append(name)

    def labels() -> Sequence[str] | None:
        known = sizes_of()
        told = [_label(name, known, read, columns) for name in files]
        if columns.label and len(files) and not any(told):
            keys = {key for name in files[:100] for key in _json(name, known, read)}
            raise BingoError(
                f"--label-column {columns.label}: expected a key of NAME.json beside NAME.jpg in {path}, which have"
                f" {', '.join(sorted(keys)) or 'none'}; name one whose value is a word or a whole number, or leave"
                " --label-column out"
            )
        return told if any(told) else None

    return Listed(
        files,
        tuple(bad),
        lambda index: read(files[index]),
        lambda index: stamp_of(path),
        labels,
        len(sizes) - len(kept),
        wrapped=True,
    )


def _is_system(name: str) -> bool:
    *folders, file = name.split("/")
    return is_system_file(file) or any(map(is_system_folder, folders))


def _unusable(size: int) -> str:
    return "empty file" if size == 0 else f"larger than {LARGEST:,} bytes" if size > LARGEST else ""


def _key(name: str) -> str:
    """WebDataset's: the folder, and the file's name up to its first dot."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _tells(name: str) -> bool:
    return f".{name.rpartition('/')[2].rpartition('.')[2].lower()}" in ABOUT


def _label(name: str, sizes: Mapping[str, int], read: Callable[[str], bytes], columns: Columns) -> str:
    """What a member of the image's key says its class is; "" where none does. An OSError of it is the reader's."""
    if not columns.label:
        for end in LABELS:
            if (beside := f"{_stem(name)}{end}") in sizes:
                return read(beside).decode("utf-8", "replace").strip()
    said = _json(name, sizes, read)
    value = next((said[key] for key in ([columns.label] if columns.label else JSON_KEYS) if key in said), "")
    return str(value) if isinstance(value, str | int) else ""


def _json(name: str, sizes: Mapping[str, int], read: Callable[[str], bytes]) -> dict[str, Any]:
    """What NAME.json of the image's key holds; nothing where there is none."""
    if (beside := f"{_stem(name)}.json") not in sizes:
        return {}
    try:
        said: Any = json.loads(read(beside))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"
