"""The archive of a search: every candidate, its parents, texts, rungs, seeds and costs, in one SQLite file.

Everything that the search decides follows from what stands here and from the seed, so a search that was killed goes on
from its last transaction as if nothing had happened. One process writes, any number may read beside it (write-ahead
log). A schema of an older version is refused, never guessed at.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.discover.language.expression import Expression
from sartor.discover.language.parse import parse
from sartor.discover.language.printing import to_python
from sartor.discover.rungs.outcome import Outcome, Setting
from sartor.errors import UserError

VERSION = 1
PATIENCE = 30.0  # seconds that a writer or reader waits for another
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE candidates (
    number INTEGER PRIMARY KEY, generation INTEGER NOT NULL, origin TEXT NOT NULL, name TEXT NOT NULL,
    parents TEXT NOT NULL, tree TEXT, text TEXT NOT NULL, thought TEXT NOT NULL, exchange INTEGER,
    refusal TEXT NOT NULL, twin INTEGER, likeness TEXT NOT NULL, cosine REAL, behaviour TEXT NOT NULL
);
CREATE TABLE results (
    candidate INTEGER NOT NULL REFERENCES candidates, rung TEXT NOT NULL, seed INTEGER NOT NULL,
    beta REAL NOT NULL, learning_rate REAL NOT NULL, vals TEXT NOT NULL, measures TEXT NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (candidate, rung, seed)
);
CREATE TABLE exchanges (number INTEGER PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE spent (number INTEGER PRIMARY KEY, what TEXT NOT NULL, seconds REAL NOT NULL);
"""


@dataclass(frozen=True)
class Candidate:
    """A proposal and what the screens made of it. ``refusal`` is empty where it may be trained.

    ``twin`` is an earlier candidate that trains alike; then this one is not trained either.
    """

    number: int
    generation: int
    origin: str
    name: str = ""
    parents: tuple[int, ...] = ()
    tree: Expression | None = None
    text: str = ""
    thought: str = ""
    exchange: int | None = None
    refusal: str = ""
    twin: int | None = None
    likeness: str = ""
    cosine: float | None = None
    behaviour: str = ""

    @property
    def trains(self) -> bool:
        """Whether it goes to the first rung."""
        return self.tree is not None and not self.refusal and self.twin is None

    @property
    def title(self) -> str:
        """What people call it."""
        return self.name or f"#{self.number}"


@dataclass(frozen=True)
class Result:
    """One candidate on one rung with one seed."""

    candidate: int
    rung: str
    seed: int
    outcome: Outcome = field(compare=False)


class Archive:
    """The file ``archive.sqlite`` of a run folder.

    Args:
        path: of the file.
        reads_only: leave it as it is.
        shared: it may be on a file system that several machines share, where a write-ahead log is not safe: readers
            and the writer then wait for each other.

    Raises:
        UserError: no file to read, or one that is no archive of this version.
    """

    def __init__(self, path: Path, reads_only: bool = False, shared: bool = False) -> None:
        if reads_only and not path.is_file():
            raise UserError(f"{path.parent} holds no search (no {path.name})")
        try:
            # Transactions are begun and ended by ``writing`` alone.
            where = f"{path.absolute().as_uri()}?mode={'ro' if reads_only else 'rwc'}"
            self._db = sqlite3.connect(where, timeout=PATIENCE, isolation_level=None, check_same_thread=False, uri=True)
            if not reads_only:
                self._db.execute(f"PRAGMA journal_mode={'DELETE' if shared else 'WAL'}")
            self._check_version(path, reads_only)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} is no archive of a search: {error}") from error

    def _check_version(self, path: Path, reads_only: bool) -> None:
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found == 0 and not reads_only:
            with self.writing():
                for statement in SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={VERSION}")
        elif found != VERSION:
            raise UserError(f"{path}: an archive of version {found}; this Sartor reads version {VERSION}")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written within stands in the file whole, or not at all."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def read_meta(self, name: str) -> Any:
        """A value of the search as a whole, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def write_meta(self, name: str, value: Any) -> None:
        """Set a value of the search as a whole."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value, ensure_ascii=False)))

    def forget_meta(self, name: str) -> None:
        """Drop a value of the search as a whole."""
        self._db.execute("DELETE FROM meta WHERE name = ?", (name,))

    def add(self, candidate: Candidate) -> None:
        """A new candidate."""
        tree = None if candidate.tree is None else to_python(candidate.tree)
        row = (
            *(candidate.number, candidate.generation, candidate.origin, candidate.name),
            *(json.dumps(candidate.parents), tree, candidate.text, candidate.thought, candidate.exchange),
            *(candidate.refusal, candidate.twin, candidate.likeness, candidate.cosine, candidate.behaviour),
        )
        self._db.execute(f"INSERT INTO candidates VALUES ({', '.join('?' * len(row))})", row)

    def candidates(self, after: int = 0) -> list[Candidate]:
        """All candidates with a higher number, in their order."""
        rows = self._db.execute("SELECT * FROM candidates WHERE number > ? ORDER BY number", (after,))
        return [_candidate(row) for row in rows]

    def record(self, result: Result) -> None:
        """What one candidate got."""
        outcome, setting = result.outcome, result.outcome.setting
        row = (
            *(result.candidate, result.rung, result.seed, setting.beta, setting.learning_rate),
            *(json.dumps(outcome.values), json.dumps(outcome.measures), outcome.seconds),
        )
        self._db.execute(f"INSERT OR REPLACE INTO results VALUES ({', '.join('?' * len(row))})", row)

    def results(self) -> list[Result]:
        """All results, by rung, candidate and seed."""
        rows = self._db.execute("SELECT * FROM results ORDER BY rung, candidate, seed")
        return [
            Result(
                number,
                rung,
                seed,
                Outcome(Setting(beta, rate), tuple(json.loads(values)), json.loads(measures), seconds),
            )
            for number, rung, seed, beta, rate, values, measures, seconds in rows
        ]

    def count(self, rung: str) -> int:
        """How many results a rung has, over candidates and seeds."""
        return self._db.execute("SELECT COUNT(*) FROM results WHERE rung = ?", (rung,)).fetchone()[0]

    def keep_exchange(self, record: Mapping[str, Any]) -> int:
        """Keep what was said to a language model and what it said; returns its number."""
        text = json.dumps(record, ensure_ascii=False)
        number = self._db.execute("INSERT INTO exchanges (record) VALUES (?)", (text,)).lastrowid
        assert number is not None
        return number

    def exchanges(self) -> list[dict[str, Any]]:
        """All exchanges in their order, each with its number."""
        rows = self._db.execute("SELECT number, record FROM exchanges ORDER BY number")
        return [{"number": number, **json.loads(text)} for number, text in rows]

    def seconds_of_exchanges(self) -> float:
        """What all questions to a language model took."""
        return self._db.execute("SELECT TOTAL(json_extract(record, '$.seconds')) FROM exchanges").fetchone()[0]

    def spend(self, what: str, seconds: float) -> None:
        """Count device-seconds."""
        self._db.execute("INSERT INTO spent (what, seconds) VALUES (?, ?)", (what, seconds))

    def spent(self) -> dict[str, float]:
        """Device-seconds so far, by what they went to."""
        return dict(self._db.execute("SELECT what, SUM(seconds) FROM spent GROUP BY what ORDER BY MIN(number)"))


def _candidate(row: Sequence[Any]) -> Candidate:
    number, generation, origin, name, parents, tree, *rest = row
    return Candidate(number, generation, origin, name, tuple(json.loads(parents)), tree and parse(tree), *rest)
