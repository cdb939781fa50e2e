"""What the model card says of the classes in exported files."""

from collections.abc import Mapping, Sequence
from typing import Any

from bingo_compress.presenting import caveats
from bingo_compress.presenting.markdown import CLASSES_SHOWN, name_of, plain, shown, table

Files = Sequence[Mapping[str, Any]]  # contracts


def knows(files: Files) -> str:
    """One sentence: whether there are classes."""
    classes = max((len(contract.get("classes", ())) for contract in files), default=0)
    if classes:
        return f"It knows {classes:,} classes, by a head in the file."
    return "It knows no classes; a linear head or a bank of labelled images adds them."


def section(files: Files) -> list[str]:
    """The class heads in the files."""
    headed = [contract for contract in files if "head" in contract]
    if not headed:
        return []
    header = (
        "",
        "head",
        "temperature",
        "accuracy",
        "calibration error",
        "before",
        "none of these from",
        "false alarms",
    )
    rows = []
    for contract in headed:
        head = contract["head"]
        numbers = [f"{head[key]:.3f}" if key in head else "-" for key in ("ece", "ece_uncalibrated", "threshold")]
        rows.append(
            [
                name_of(contract),
                plain(head["kind"]),
                f"{head['temperature']:.3g}" if "temperature" in head else "-",
                shown(head, "accuracy"),
                *numbers,
                shown(head, "false_alarms"),
            ]
        )
    head, names = headed[0]["head"], headed[0]["classes"]
    more = f" and {len(names) - CLASSES_SHOWN:,} more" if len(names) > CLASSES_SHOWN else ""
    tested = "per_class" in head
    blocks = [
        "## Classes",
        f"In the file, output scores, in this order: {', '.join(map(plain, names[:CLASSES_SHOWN]))}{more}.",
        table(header, rows),
        *_doubts(headed),
        (
            "Scores are probabilities. Calibration error: expected, of 15 equal bins (Guo et al. 2017), with the"
            " temperature and before it. None of these: an image whose distance, 1 - the largest cosine of its"
            " embedding to the mean of a class, is larger; chosen so that 5% of held-out labelled images of the known"
            " classes exceed it. False alarms: the share of test images, all of known classes, that do. How many images"
            " of unknown classes are found so depends on how unlike they are: try it on some."
        ),
    ]
    if not tested:
        return [*blocks, "Not tested on labelled images."]
    known = sorted(
        (entry for entry in head["per_class"] if entry["images"]), key=lambda entry: float(entry["accuracy"])
    )
    cells = [[plain(entry["class"]), f"{entry['images']:,}", shown(entry, "accuracy")] for entry in known]
    return [
        *blocks,
        f"{name_of(headed[0])} on {head['test_images']:,} test images, weakest class first:",
        table(("class", "test images", "found"), cells[:CLASSES_SHOWN]),
        *caveats.without_images(head, len(names)),
    ]


def _doubts(files: Files) -> list[str]:
    """Whose scores are not known to be calibrated, and whose figures are too good."""
    uncalibrated = [name_of(one) for one in files if one["head"].get("calibrated") is False]
    unknown = [name_of(one) for one in files if "head_sha256" in one["head"] and "calibrated" not in one["head"]]
    shares = {name_of(one): float(one["head"].get("test_share_near_bank", 0)) for one in files}
    return [
        *([f"Not calibrated: {', '.join(uncalibrated)}."] if uncalibrated else []),
        *([f"Whether the scores are calibrated is not known: {', '.join(unknown)}."] if unknown else []),
        *(
            f"{share:.0%} of the test images have a near-copy among the labelled images, which is found, not"
            f" recognised: {name} looks better than it is."
            for name, share in shares.items()
            if share
        ),
    ]
