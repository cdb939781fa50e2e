"""What the user sees: a live bar a stage on a terminal, one plain line every ten seconds elsewhere."""

import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# A pipe or a log has no width of its own; 140 keeps a table's names whole.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
PLAIN_SECONDS = 10.0
BARS = "▁▂▃▄▅▆▇█"
NARROW = 90  # signs a line, below which a bar leaves its picture out

Advance = Callable[..., None]


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")


class _Noted(Progress):
    """The note of a stage stands below its bar, cut to the width: no line wraps."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(task.fields["note"], no_wrap=True, overflow="ellipsis", style="dim")


@contextmanager
def bar(what: str, total: int, before: int = 0) -> Iterator[Advance]:
    """Show the progress of one stage; call the yielded function as `advance(images, note="")`.

    total: images; before: those of them that an earlier run has done, which tell nothing of this one's rate. On a
    terminal: bar, images/s, time left, and the note below. Otherwise a line every PLAIN_SECONDS and one at the end.
    """
    if not console.is_terminal:
        with _plain_bar(what, total, before) as advance:
            yield advance
        return
    columns = [TextColumn("{task.description}"), TaskProgressColumn(), _Rate(), TimeRemainingColumn(compact=True)]
    if console.width >= NARROW:
        columns.insert(1, BarColumn(bar_width=30))
    with _Noted(*columns, console=console, speed_estimate_period=20) as progress:
        task = progress.add_task(escape(what), total=total, completed=before, note="")

        def advance(images: int, note: str | None = None) -> None:
            progress.update(task, advance=images)
            if note is not None:
                progress.update(task, note=visible(note))

        yield advance


@contextmanager
def _plain_bar(what: str, total: int, before: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = before
    latest = ""

    def line(now: float) -> str:
        rate = (done - before) / max(now - start, 1e-9)
        left = duration((total - done) / rate) if rate else "?"
        return f"{what}: {done:,}/{total:,} images, {rate:,.0f} images/s, {left} left{', ' + latest if latest else ''}"

    def advance(images: int, note: str | None = None) -> None:
        nonlocal done, last, latest
        done += images
        latest = latest if note is None else note
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS:
            last = now
            say(line(now))

    yield advance
    seconds = time.monotonic() - start
    say(
        f"{what}: {done - before:,} images in {duration(seconds)}, {(done - before) / max(seconds, 1e-9):,.0f}"
        f" images/s{', ' + latest if latest else ''}{f' ({before:,} were done before)' if before else ''}"
    )


def visible(text: str) -> str:
    """`text` with control characters other than line breaks as \\x1b and so on: a file's name must not steer the
    terminal.
    """
    return "".join(
        f"\\x{ord(sign):02x}" if unicodedata.category(sign) == "Cc" and sign != "\n" else sign for sign in text
    )


def be_quiet() -> None:
    """Of several processes only the first speaks; what goes wrong is said by all."""
    console.quiet = True


def say(text: str) -> None:
    """One plain line; brackets in it are text, not markup."""
    console.print(visible(text), markup=False)
    sys.stdout.flush()


def complain(text: str) -> None:
    """One line on standard error."""
    errors.print(visible(text), markup=False)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: the first column left-aligned, the others right-aligned."""
    grid = Table(title=title or None, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        grid.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(visible(cell)) for cell in row))
    console.print(grid)


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as plain text for a file: columns of equal width, two spaces apart."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def sparkline(values: Sequence[float], width: int = 8) -> str:
    """A curve of at most `width` signs, each the mean of its share of the values, the lowest as low as can be; "" where
    the output has no such signs, or where there is no curve yet.
    """
    try:
        BARS.encode(console.encoding)  # of what it writes to: under a bar sys.stdout is another, which tells none
    except UnicodeEncodeError:
        return ""
    count = min(width, len(values))
    if count < 2:
        return ""
    parts = [values[len(values) * place // count : len(values) * (place + 1) // count] for place in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(BARS[round((mean - low) / max(high - low, 1e-12) * (len(BARS) - 1))] for mean in means)


def duration(seconds: float) -> str:
    """Seconds as 8s, 3m05s or 2h03m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: float) -> str:
    """Bytes as 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
