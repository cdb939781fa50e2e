"""Students of several versions of the program under one probe: this version's.

python benchmarks/judge.py --bank FOLDER --test FOLDER --student mobilenetv3_small_050 --image-size 64 [--json FILE]
RUN/student.safetensors ...

Figures that two versions' own `validate` give are not to be compared where the probe has changed. One row a file, and
mean and spread of all files whose path has the same second part from the end without its digits (before-0, before-1;
after-0, ...).
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

from bingo_compress.data import image_list, listing
from bingo_compress.evaluation import probes, scores
from bingo_compress.features import extract
from bingo_compress.models.encoder import Encoder, build
from bingo_compress.runtime.devices import choose_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--student", default="mobilenetv3_small_050")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    chosen = parser.parse_args()
    students = {str(file): build(chosen.student, chosen.image_size, str(file), "FILE") for file in chosen.files}
    found, groups = judged(students, chosen.bank, chosen.test), defaultdict(list)
    for name, row in found.items():
        groups[re.sub(r"[\d-]+$", "", Path(name).parent.name)].append(row)
    for group, rows in groups.items():
        told = [
            f"{key} {statistics.mean(row[key] for row in rows):.4f} ±"
            f" {statistics.stdev(row[key] for row in rows) if len(rows) > 1 else 0:.4f}"
            for key in ("knn", "linear")
        ]
        print(f"{group}, {len(rows)} runs: {', '.join(told)}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


def judged(encoders: dict[str, Encoder], bank: Path, test: Path) -> dict[str, dict[str, float]]:
    """kNN and linear accuracy and the probe's strength, of each encoder's plain features; one line each on screen."""
    labelled, asked, where = listing.list_images(bank), listing.list_images(test), choose_device("auto")
    classes, _ = image_list.labels_of(labelled)
    sides = scores.sides(
        {name: extract.as_embed(encoder, where) for name, encoder in encoders.items()}, labelled, asked, classes
    )
    print(f"{len(sides.labels):,} bank and {len(sides.query_labels):,} test images")
    found = {}
    for name in encoders:
        head = probes.fit_linear(sides.bank[name], sides.labels, len(classes), groups=sides.groups)
        right = (
            probes.knn_predict(sides.bank[name], sides.labels, sides.queries[name], len(classes)) == sides.query_labels
        )
        linear = head.predict(sides.queries[name]) == sides.query_labels
        found[name] = {
            "knn": float(right.double().mean()),
            "linear": float(linear.double().mean()),
            "strength": head.strength,
        }
        print(f"{name}: kNN {found[name]['knn']:.4f}, linear {found[name]['linear']:.4f}", flush=True)
    return found


if __name__ == "__main__":
    main()
