"""What the user reads while a command runs: plain lines, and a bar with the time left for anything slow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)  # results go to standard output, everything else here


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


@contextmanager
def progress(label: str, total: float) -> Iterator[Callable[..., None]]:
    """A progress bar; yields ``advance(amount, note)``. On a pipe it prints a line at the end only.

    Inside another bar it stays silent: one thing moves at a time.
    """
    if _active:
        yield lambda amount, note=None: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with _exclusive(), Progress(*columns, console=console) as bars:
        task = bars.add_task(f"{label:<22}", total=total, note="")

        def advance(amount: float, note: str | None = None) -> None:
            bars.advance(task, amount)
            if note is not None:
                bars.update(task, note=note)

        yield advance
