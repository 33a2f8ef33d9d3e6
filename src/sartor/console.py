"""What the user reads while a command runs: plain lines, and a bar with the time left for anything slow."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, highlight=False)  # results go to standard output, everything else here

BETWEEN_LINES = 60.0  # seconds, where no terminal shows a bar that moves
LABEL = 22  # characters, so that bars and lines stand below each other

_active: list[bool] = []


@contextmanager
def _exclusive() -> Iterator[None]:
    _active.append(True)
    try:
        yield
    finally:
        _active.pop()


def say(line: str) -> None:
    """One line for the user."""
    console.print(line, markup=False, soft_wrap=True)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A small table for the user; long texts are cut to one line."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True, overflow="ellipsis", style="dim" if name == "prompt" else None)
    for row in rows:
        table.add_row(*(Text(" ".join(str(value).split())) for value in row))
    console.print(table)


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(8.25), duration(372), duration(3599.7), duration(9000), duration(200_000)
    ('8.2 s', '6 min 12 s', '1 h 0 min', '2 h 30 min', '2 d 8 h')
    """
    if not math.isfinite(seconds):
        return "n/a"
    for unit, size, part, below in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds / below >= size // below - 0.5:  # what rounds up to a whole one is one
            whole, rest = divmod(round(seconds / below), size // below)
            return f"{whole} {unit} {rest} {part}"
    return f"{seconds:.1f} s"


@contextmanager
def progress(label: str, total: float) -> Iterator[Callable[..., None]]:
    """A progress bar; yields ``advance(amount, note)``. On a pipe it is a line a minute, and one at the end.

    Inside another bar it stays silent: one thing moves at a time.
    """
    if _active:
        yield lambda amount, note=None: None
        return
    with _exclusive(), (_bar if console.is_terminal else _lines)(label, total) as advance:
        yield advance


class _Bars(Progress):
    """With the note on a line of its own: beside the bar it would leave no room for the counts."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"{'':<{LABEL}} {task.fields['note']}")


@contextmanager
def _bar(label: str, total: float) -> Iterator[Callable[..., None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with _Bars(*columns, console=console) as bars:
        task = bars.add_task(f"{label:<{LABEL}}", total=total, note="")

        def advance(amount: float, note: str | None = None) -> None:
            bars.advance(task, amount)
            if note is not None:
                bars.update(task, note=note)

        yield advance


@contextmanager
def _lines(label: str, total: float) -> Iterator[Callable[..., None]]:
    done, noted, told, news = 0.0, "", 0.0, True
    began = time.monotonic()

    def tell() -> None:
        nonlocal news
        news = False
        say(f"{label:<{LABEL}} {done:,.0f} of {total:,.0f} after {duration(time.monotonic() - began)}{noted}")

    def advance(amount: float, note: str | None = None) -> None:
        nonlocal done, noted, told, news
        done, news = done + amount, True
        if note is not None:
            noted = f", {note}" if note else ""
        now = time.monotonic() - began
        if now - told >= BETWEEN_LINES:
            told = now
            tell()

    try:
        yield advance
    finally:
        if news:
            tell()
