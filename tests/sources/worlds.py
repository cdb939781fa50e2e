"""The same photos as each kind of source."""

import csv
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from helpers import photos

KINDS = ("folder", "list", "table", "tar", "shards", "braces", "zip", "parquet", "hub", "two folders")
CLASSES = ("kind0", "kind1", "kind2")


def made(root: Path, each: int) -> dict[str, Any]:
    """What to give as --data for each of KINDS; the photos lie in root/photos/{kind0,kind1,kind2}."""
    folder = photos(root / "photos", each)
    files = sorted(folder.rglob("*.png"))
    names = [str(file.relative_to(folder)) for file in files]
    (root / "list.txt").write_text("\n".join(f"photos/{name}" for name in names))
    with (root / "table.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([("id", "species", "path"), *((1, Path(name).parent, f"photos/{name}") for name in names)])
    with tarfile.open(root / "photos.tar", "w") as archive:
        archive.add(folder, "photos")  # in whatever order the disk has
    (root / "shards").mkdir()
    for number, start in enumerate(range(0, len(files), 7)):
        with tarfile.open(root / "shards" / f"{number:03d}.tar", "w") as archive:
            for place in range(start, min(start + 7, len(files))):
                add(archive, f"{place:06d}.png", files[place].read_bytes())
                add(archive, f"{place:06d}.cls", names[place].split("/")[0].encode())
                add(archive, f"{place:06d}.json", json.dumps({"caption": "a photo"}).encode())
    last = len(list((root / "shards").iterdir())) - 1
    with zipfile.ZipFile(root / "photos.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for file in reversed(files):
            packed.write(file, file.relative_to(root))
    table = pyarrow.table(
        {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "label": [CLASSES.index(name.split("/")[0]) for name in names],
        }
    )
    features = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, root / "photos.parquet", row_group_size=5)
    (root / "hub" / "data").mkdir(parents=True)
    for name in ("README.md", ".gitattributes", "dataset_infos.json"):
        (root / "hub" / name).write_text("{}")
    for number, (start, end) in enumerate(((0, each), (each, len(files)))):
        name = f"train-{number:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(table.slice(start, end - start), root / "hub" / "data" / name)
    for part in (0, 1):  # all of the first folder come before all of the second
        for name in names[part * each : each if part == 0 else None]:
            target = root / "parts" / str(part) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((folder / name).read_bytes())
    return {
        "folder": str(folder),
        "list": str(root / "list.txt"),
        "table": str(root / "table.csv"),
        "tar": str(root / "photos.tar"),
        "shards": str(root / "shards"),
        "braces": str(root / "shards" / f"{{000..{last:03d}}}.tar"),
        "zip": str(root / "photos.zip"),
        "parquet": str(root / "photos.parquet"),
        "hub": str(root / "hub"),
        "two folders": [str(root / "parts" / "0"), str(root / "parts" / "1")],
    }


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member of that name."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
