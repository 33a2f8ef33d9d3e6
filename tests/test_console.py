"""What a command says of its progress where no terminal shows a bar."""

import pytest

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
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if " of " in line] == [
        "search                 3 of 2,000 after 0.0 s, best #7 0.2",
        "search                 1,000 of 2,000 after 0.0 s, best #7 0.2",
    ]
    assert "1000/2000" in lines[-1]


def test_within_a_minute_nothing_but_the_end_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with console.progress("search", 2) as advance:
        advance(2)
    (line,) = capfd.readouterr().err.splitlines()
    assert "2/2" in line
