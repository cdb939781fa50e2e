"""Text from elsewhere, and tables, as Markdown."""

import re
from collections.abc import Sequence

# All that can begin or end something inside a line, of CommonMark and of GitHub's tables, formulas and links that need
# no brackets.
MARKUP = re.compile(r"[!#$&*+:<=>@\[\\\]^_`{|}~]|(?<=www)\.", re.IGNORECASE)
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def plain(value: object) -> str:
    """Text from elsewhere as Markdown that shows just that text on one line: no markup, HTML, link or table cell can
    come of it.
    """
    line = " ".join(str(value).split())
    shown = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line)
    return re.sub(MARKUP, lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), shown)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
