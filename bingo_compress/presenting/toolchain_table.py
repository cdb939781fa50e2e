"""The table of `verify`: which toolchains an exported file was run in, and how near their answers are."""

from collections.abc import Mapping, Sequence
from typing import Any

from bingo_compress.presenting.markdown import plain, table
from bingo_compress.runtime.console import size

HEADER = ("toolchain", "version", "smallest cosine", "largest difference", "error of spread", "verdict")


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of `verify` as a table's, under HEADER."""
    return [
        [
            row["toolchain"],
            row["version"] or "-",
            f"{row['min_cosine']:.7f}" if "min_cosine" in row else "-",
            f"{row['max_difference']:.1e}" if "max_difference" in row else "-",
            f"{row['max_of_spread']:.1e}" if "max_of_spread" in row else "-",
            f"{row['verdict']}: {row['cause']}" if row.get("cause") else row["verdict"],
        ]
        for row in rows
    ]


def section(
    names: Mapping[str, str], told: Sequence[Mapping[str, Any]], converted: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """The model card's section: where the exported files were run. names: of the files by their sha256; told: what
    `verify` wrote beside each, empty where nobody has verified it; converted: contracts of what was made of them.
    """
    blocks, waiting = ["## Toolchains", *_made_of(names, converted)], dict(names)
    for each in told:
        if each.get("sha256") in waiting and each["rows"]:
            not_run = f" Not run: {plain(', '.join(each['not_run']))}." if each["not_run"] else ""
            blocks += [
                f"{waiting.pop(each['sha256'])}: what it answers to its golden pictures elsewhere.{not_run}",
                table(HEADER, [list(map(plain, line)) for line in cells(each["rows"])]),
            ]
    if waiting or not names:
        commands = [f"    bingo-compress verify {name}" for name in waiting.values() or ["student.onnx"]]
        blocks += ["Not run in any but onnxruntime yet:", "\n".join(commands)]
    return blocks


def _made_of(names: Mapping[str, str], converted: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            plain(f"{each['converted']['by'].split()[0]}/{each['file']}"),
            size(sum(file["bytes"] for file in each["files"].values())),
            plain(each["converted"]["by"]),
            names[each["converted"]["float_sha256"]],
            f"{each['parity']['images']:,} images: smallest cosine {each['parity']['min_cosine']:.6f}",
        ]
        for each in converted
        if each["converted"]["float_sha256"] in names
    ]
    return [table(("", "size", "made by", "of", "against it"), rows)] if rows else []
