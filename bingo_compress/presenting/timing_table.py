"""The table of `timing`: what an exported file takes on this machine."""

from collections.abc import Mapping, Sequence
from typing import Any

from bingo_compress.runtime import console

PARTS = 10
HEADER = ("", "size", "threads", "p50 ms", "p90 ms", "p99 ms", "load ms", "peak memory")


def picture_ms(row: Mapping[str, Any]) -> float:
    """Median milliseconds a picture: of a batch that is fixed in the file, its share."""
    return float(row["p50_ms"]) / int(row["batch"])


def a_picture(row: Mapping[str, Any]) -> str:
    """`picture_ms` in words: 1.5 ms a picture in batches of 32."""
    return f"{milliseconds(picture_ms(row))} ms a picture{batches(row)}"


def milliseconds(value: float) -> str:
    """Two digits at least: a picture of a batch may take little."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def batches(row: Mapping[str, Any]) -> str:
    """What goes after a time that is a batch's share."""
    return f" in batches of {row['batch']:,}" if row["batch"] > 1 else ""


def where(row: Mapping[str, Any]) -> str:
    """What times must share to be compared: the machine and the batch."""
    by = batches(row)
    return f"{describe(row['machine'])}{',' if by else ''}{by}"


def caption(rows: Sequence[dict[str, Any]]) -> str:
    """What the columns of `cells` are of."""
    before = console.size(rows[0]["baseline_bytes"])
    pictures = "one picture" if rows[0]["batch"] == 1 else f"{rows[0]['batch']} pictures"
    return (
        f"{pictures} a run, {rows[0]['runs']:,} runs, decoding not included; of the peak memory {before} before the"
        " file is loaded"
    )


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows of `latency` as a table's, under HEADER."""
    return [
        [
            row["file"],
            console.size(row["bytes"]),
            str(row["threads"]),
            *(f"{row[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
            f"{row['load_ms']:.0f}",
            console.size(row["peak_bytes"]),
        ]
        for row in rows
    ]


def said(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each file but the first, with what it is of the first; no word that says more than the figure."""
    count = sum(row["threads"] == rows[0]["threads"] for row in rows)
    lines = []
    for place in range(1, count):
        parts = []
        for row in rows[place::count]:
            low, high = row["p50_ratio_range"]
            parts.append(
                f"{row['p50_ratio']:.2f} [{low:.2f}, {high:.2f}] times its p50 with {_threads(row['threads'])}"
            )
        lines.append(
            f"{rows[place]['file']} against {rows[0]['file']}: {', '.join(parts)}; {rows[place]['bytes_ratio']:.2f}"
            " times its bytes"
        )
    if lines:
        lines.append(
            f"in brackets: least and most over {min(PARTS, rows[0]['runs'])} parts of the runs, one after the other"
        )
    return lines


def describe(machine: Mapping[str, Any]) -> str:
    """One line on where it was timed."""
    cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''}"
    return (
        f"{machine['processor']}, {cores}, {machine['system']}; onnxruntime {machine['onnxruntime']}; {machine['int8']}"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
