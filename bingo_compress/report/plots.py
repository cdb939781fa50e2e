"""One picture of a comparison: a dot a line, a bar for the spread, as SVG that any browser shows."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

LINE, LEFT, WIDTH, GAP, TOP = 26, 250, 220, 40, 50


def dots(rows: Sequence[Mapping[str, Any]], figures: Sequence[str], titles: Mapping[str, str]) -> str:
    """SVG text. rows: each with "name", and for every figure its mean and FIGURE_spread (None: one seed); one panel a
    figure, each with a scale of its own.
    """
    height = TOP + LINE * len(rows) + 30
    whole = LEFT + (WIDTH + GAP) * len(figures)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{height}" font-family="sans-serif"'
            ' font-size="13">'
        ),
        f'<rect width="{whole}" height="{height}" fill="white"/>',
    ]
    for index, row in enumerate(rows):
        parts.append(
            f'<text x="{LEFT - 20}" y="{TOP + LINE * index + 17}" text-anchor="end">{escape(str(row["name"]))}</text>'
        )
    for panel, figure in enumerate(figures):
        origin = LEFT + panel * (WIDTH + GAP)
        low = min(row[figure] - (row[f"{figure}_spread"] or 0) for row in rows)
        high = max(row[figure] + (row[f"{figure}_spread"] or 0) for row in rows)
        margin = 0.05 * (high - low) or 0.01
        low, high = low - margin, high + margin
        parts.append(
            f'<text x="{origin + WIDTH / 2}" y="20" text-anchor="middle"'
            f' font-weight="bold">{escape(titles[figure])}</text>'
        )
        parts.append(f'<text x="{origin}" y="38" fill="#666">{low:.3f}</text>')
        parts.append(f'<text x="{origin + WIDTH}" y="38" text-anchor="end" fill="#666">{high:.3f}</text>')
        for index, row in enumerate(rows):
            y = TOP + LINE * index + 13
            ends = [
                origin + WIDTH * (row[figure] + sign * (row[f"{figure}_spread"] or 0) - low) / (high - low)
                for sign in (-1, 0, 1)
            ]
            colour = "#c0392b" if index == 0 else "#2c5f8a"
            parts.append(f'<line x1="{origin}" x2="{origin + WIDTH}" y1="{y}" y2="{y}" stroke="#eee"/>')
            parts.append(
                f'<line x1="{ends[0]:.1f}" x2="{ends[2]:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>'
            )
            parts.append(
                f'<circle cx="{ends[1]:.1f}" cy="{y}" r="5" fill="{colour}"><title>{row[figure]:.4f}</title></circle>'
            )
    return (
        "\n".join(
            [
                *parts,
                f'<text x="{LEFT}" y="{height - 8}" fill="#666">dot: mean over seeds; bar: standard deviation</text>',
                "</svg>",
            ]
        )
        + "\n"
    )
