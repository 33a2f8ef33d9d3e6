"""The archive: whole transactions, readers beside a writer, and no guessing at files that are none."""

import sqlite3
from pathlib import Path

import pytest

from sartor.discover.archive import Archive, Candidate, Result
from sartor.discover.language.known import known
from sartor.discover.rungs.outcome import Outcome, Setting
from sartor.errors import UserError

OUTCOME = Outcome(Setting(0.1, 2e-4), (0.25, -0.5), {"accuracy": 0.75}, 3.5)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive.sqlite")
    written = Candidate(
        3, 2, "mutate", "a name", (1, 2), known("lrml"), "text", "thought", 7, "", None, "dpo", 0.9, "x"
    )
    refused = Candidate(4, 2, "model", text="import os", refusal="line 1: no")
    with archive.writing():
        archive.add(written)
        archive.add(refused)
        archive.record(Result(3, "adapter", 0, OUTCOME))
        archive.spend("adapter", 3.5)
        archive.spend("adapter", 1.5)
        archive.write_meta("budget", {"linear": 10})
    other = Archive(tmp_path / "archive.sqlite", reads_only=True)
    assert other.candidates() == [written, refused]
    assert [one.trains for one in other.candidates()] == [True, False]
    (result,) = other.results()
    assert (result.candidate, result.rung, result.outcome) == (3, "adapter", OUTCOME)
    assert other.spent() == {"adapter": 5.0}
    assert other.read_meta("budget") == {"linear": 10}


def test_a_transaction_is_whole_or_not_there(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive.sqlite")

    def cut_short() -> None:
        with archive.writing():
            archive.add(Candidate(1, 0, "random"))
            archive.spend("adapter", 3.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_short()
    assert (archive.candidates(), archive.spent()) == ([], {})


def test_two_read_while_one_writes(tmp_path: Path) -> None:
    path = tmp_path / "archive.sqlite"
    archive = Archive(path)
    readers = Archive(path, reads_only=True), Archive(path, reads_only=True)
    with archive.writing():
        archive.add(Candidate(1, 0, "random"))
        assert [len(reader.candidates()) for reader in readers] == [0, 0]
    assert [len(reader.candidates()) for reader in readers] == [1, 1]


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no search"):
        Archive(tmp_path / "archive.sqlite", reads_only=True)
    (tmp_path / "text.sqlite").write_text("this is no database, however long it is " * 40)
    with pytest.raises(UserError, match="is no archive of a search"):
        Archive(tmp_path / "text.sqlite")
    db = sqlite3.connect(tmp_path / "newer.sqlite")
    db.execute("PRAGMA user_version=99")
    db.commit()
    with pytest.raises(UserError, match="of version 99; this Sartor reads version 1"):
        Archive(tmp_path / "newer.sqlite")
