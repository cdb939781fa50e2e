"""Pictures as SVG that any browser shows: of a comparison a dot a line, with a bar for the spread; of students a dot
each, latency against accuracy.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

LINE, LEFT, WIDTH, GAP, TOP = 26, 250, 220, 40, 50
ACROSS, DOWN, EDGE = 760, 560, 60  # of a scatter: its field, and the room around it
BESIDE, APART = 180, 15  # for the names of marked dots, which stand one under the other
NAMED, OTHER = "#c0392b", "#2c5f8a"


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


def scatter(dots: Sequence[Mapping[str, Any]], titles: tuple[str, str], note: str) -> str:
    """SVG text. dots: each with "name", "x" (above 0, on a logarithmic scale), "y", "size" (the area) and "marked": its
    name stands at the right; titles: of the two axes.
    """
    xs, ys = [math.log10(dot["x"]) for dot in dots], [dot["y"] for dot in dots]
    margin = 0.05 * (max(xs) - min(xs)) or 0.1
    left, right = min(xs) - margin, max(xs) + margin
    low, high = math.floor(min(ys)) - 1, math.ceil(max(ys)) + 1
    largest = max(dot["size"] for dot in dots)

    def across(x: float) -> float:
        return EDGE + ACROSS * (math.log10(x) - left) / (right - left)

    def down(y: float) -> float:
        return EDGE + DOWN * float((high - y) / (high - low))

    width, height = ACROSS + 2 * EDGE + BESIDE, DOWN + 2 * EDGE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{EDGE}" y="{EDGE - 30}" fill="#666">{escape(note)}</text>',
        f'<text x="{EDGE + ACROSS / 2}" y="{height - 15}" text-anchor="middle">{escape(titles[0])}</text>',
        f'<text x="{EDGE}" y="{EDGE - 12}">{escape(titles[1])}</text>',
    ]
    ticks = [digit * 10.0**power for power in range(math.floor(left), math.ceil(right)) for digit in (1, 2, 5)]
    for x in (tick for tick in ticks if left <= math.log10(tick) <= right):
        at = f"{across(x):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{EDGE}" y2="{EDGE + DOWN}" stroke="#eee"/>')
        parts.append(f'<text x="{at}" y="{EDGE + DOWN + 18}" text-anchor="middle">{x:g}</text>')
    for level in range(low, high + 1, max(1, (high - low) // 10)):
        at = f"{down(level):.1f}"
        parts.append(f'<line x1="{EDGE}" x2="{EDGE + ACROSS}" y1="{at}" y2="{at}" stroke="#eee"/>')
        parts.append(f'<text x="{EDGE - 8}" y="{at}" text-anchor="end" dominant-baseline="middle">{level}</text>')
    for dot in sorted(dots, key=lambda dot: dot["marked"]):
        x, y, radius = across(dot["x"]), down(dot["y"]), 3 + 12 * math.sqrt(dot["size"] / largest)
        told = escape(f"{dot['name']}: {dot['x']:.3g}, {dot['y']:.1f}, {dot['size']:.1f}")
        colour, solid = (NAMED, 0.7) if dot["marked"] else (OTHER, 0.25)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}" fill-opacity="{solid}">'
            f"<title>{told}</title></circle>"
        )
    beside = float(EDGE)
    for dot in sorted((dot for dot in dots if dot["marked"]), key=lambda dot: -dot["y"]):
        x, y = across(dot["x"]), down(dot["y"])
        beside = max(beside + APART, y)
        line = f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{EDGE + ACROSS + 5}" y2="{beside:.1f}" stroke="{NAMED}"'
        parts.append(f'{line} stroke-opacity="0.3"/>')
        parts.append(f'<text x="{EDGE + ACROSS + 8}" y="{beside + 4:.1f}">{escape(dot["name"])}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
