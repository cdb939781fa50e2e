"""How many images of a class that the head never saw are told to be none of its classes, beside the false alarms.

Each class in turn is left out of the labelled images: class means and threshold come of the others alone. Its images,
of both folders, are the unknown ones; the other classes' test images the known ones.
"""

import argparse
import json
from pathlib import Path

import torch
from bingo_edge import Embedder
from torch import Tensor

from bingo_compress.evaluation import intervals, probes
from bingo_compress.heads import calibration


def embedded(model: Embedder, folder: Path) -> tuple[Tensor, list[str]]:
    """(embeddings (n, D), classes) of a folder with one folder a class."""
    found = model.embed(str(folder))
    return torch.from_numpy(found.embeddings), [Path(name).relative_to(folder).parts[0] for name in found.names]


def left_out(bank: tuple[Tensor, list[str]], test: tuple[Tensor, list[str]], unknown: set[str]) -> dict[str, object]:
    """Shares refused, each with its interval, where the classes `unknown` are left out."""
    rows, names = bank
    known = torch.tensor([name not in unknown for name in names])
    classes = sorted(set(names) - unknown)
    labels = torch.tensor([classes.index(name) for name in names if name not in unknown])
    fold = probes.folds(labels, probes.FOLDS)
    limit = calibration.threshold(rows[known], labels, len(classes), fold)
    means = calibration.class_means(rows[known], labels, len(classes))
    asked = torch.tensor([name not in unknown for name in test[1]])
    alarms = calibration.distances(test[0][asked], means) > limit
    strange = torch.cat([rows[~known], test[0][~asked]])
    refused = calibration.distances(strange, means) > limit
    said: dict[str, object] = {"left_out": sorted(unknown), "threshold": limit}
    for key, votes in (("false_alarms", alarms), ("refused", refused)):
        said |= {key: float(votes.double().mean()), f"{key}_interval": intervals.share_interval(votes)}
        said[f"{key}_images"] = len(votes)
    return said


def main() -> None:
    """Print a line of JSON for each class left out, then for the pairs that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="an exported file")
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--together", action="append", default=[], metavar="CLASS,CLASS")
    args = parser.parse_args()
    model = Embedder(args.model)
    bank, test = embedded(model, args.labels), embedded(model, args.test)
    alone = [{name} for name in sorted(set(bank[1]))]
    for unknown in (*alone, *(set(words.split(",")) for words in args.together)):
        print(json.dumps(left_out(bank, test, unknown)), flush=True)


if __name__ == "__main__":
    main()
