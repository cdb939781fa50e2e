"""Every kind of picture in an archive, as it is in a folder."""

import tarfile
import zipfile
from pathlib import Path

import corpus
import numpy as np
import pytest
from bingo_edge.image import ImageError

from bingo_compress.data.decode import decode_all
from bingo_compress.data.listing import list_images


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "zip", "list"])
def test_every_picture_is_what_it_is_in_a_folder(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    corpus.make(root)
    folder = list_images(root)
    # Names that are not UTF-8 have no place in a zip or a list.
    names = [name for name in folder.files if name.isascii() and "\n" not in name and name == name.strip()]
    assert len(names) > 60
    path = tmp_path / {"tar": "x.tar", "zip": "x.zip", "list": "x.txt"}[kind]
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name in names:
                archive.add(root / name, name)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", strict_timestamps=False) as packed:
            for name in names:
                packed.write(root / name, name)
    else:
        path.write_text("\n".join(f"photos/{name}" for name in names))
    found = list_images(path)
    within = {name.partition("!")[2].removeprefix("photos/") for name in found.files}
    assert within == set(names) and not found.bad
    as_folder = {folder.files[index]: seen for index, seen in decode_all(folder, range(len(folder.files)), _seen)}
    for index, seen in decode_all(found, range(len(found.files)), _seen):
        name = found.files[index].partition("!")[2].removeprefix("photos/")
        expected = as_folder[name]
        assert isinstance(seen, ImageError) == isinstance(expected, ImageError), (name, str(seen), str(expected))
        if not isinstance(expected, ImageError):
            assert seen == expected, name


def _seen(pixels: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return pixels.shape, pixels.tobytes()
