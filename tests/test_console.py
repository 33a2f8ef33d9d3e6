"""What a command says of its progress, with and without a terminal."""

import io

import pytest
from rich.console import Console

from sartor import console


def test_on_a_pipe_progress_is_told_in_lines(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "BETWEEN_LINES", 0.0)
    with console.progress("search", 2000) as advance:
        advance(3, "best #7 0.2")
        with console.progress("within", 5) as inner:
            inner(1)
        advance(997)
    assert capfd.readouterr().err.splitlines() == [
        "search                 3 of 2,000 after 0.0 s, best #7 0.2",
        "search                 1,000 of 2,000 after 0.0 s, best #7 0.2",  # at the end not once more
    ]


def test_within_a_minute_nothing_but_the_end_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with console.progress("search", 2) as advance:
        advance(2)
    assert capfd.readouterr().err == "search                 2 of 2 after 0.0 s\n"


def test_a_terminal_of_80_columns_shows_the_counts_beside_a_long_note(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=screen, force_terminal=True, width=80))
    note = "best simpo 0.363 [0.265, 0.46], 18 min 12 s left"
    with console.progress("search", 1700) as advance:
        advance(1604, note)
    assert "1604/1700" in screen.getvalue()
    assert note in screen.getvalue()
