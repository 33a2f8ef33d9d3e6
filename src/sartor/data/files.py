"""Files and Hub datasets as rows: each row an object of columns, with the place where an editor shows it."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sartor.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# csv refuses cells over 128 KiB unless told otherwise; this is the largest limit that fits a C long everywhere.
CELL_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Where:
    """The place of a row, counted from 1: its first line in JSONL and CSV, its number in lists, Parquet and the Hub.

    >>> print(Where("prefs.jsonl", 17))
    prefs.jsonl, row 17
    """

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


def read_rows(source: str, split: str = "train") -> Iterator[tuple[Where, dict[str, Any]]]:
    """Every row of a data file (JSON list, JSONL, CSV, Parquet; the text ones also ``.gz``) or of a Hub dataset.

    The name's ending tells the format, except that ``.json`` and ``.jsonl`` may each hold either a list or one object
    per line. CSV cells stay strings; blank lines are passed over. ``split`` applies to Hub datasets alone. Rows are
    streamed, except those of a JSON list. There is at least one row.

    Raises UserError for a source that does not exist or cannot be read, and, once the iterator gets there, for a line
    that does not parse, a row that is not an object, and a source without rows.
    """
    path = Path(source)
    reader = next((READERS[ending] for ending in READERS if source.lower().endswith(ending)), None)
    if path.is_dir():
        raise UserError(f"{source}: a folder, wanted one data file: name a file in it ({', '.join(READERS)})")
    if path.exists():
        if reader is None:
            raise UserError(f"{source}: the name does not tell the format: let it end in one of {', '.join(READERS)}")
        return _checked(source, reader(source))
    if reader is None and HUB_ID.fullmatch(source):
        return _checked(source, _hub_rows(source, split))
    raise UserError(f"{source}: no such file: check the path, or name a Hub dataset as org/name")


def _checked(source: str, rows: Iterator[tuple[Where, Any]]) -> Iterator[tuple[Where, dict[str, Any]]]:
    empty = True
    for where, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise UserError(f"{where}: wanted an object of columns, got {json.dumps(row)[:60]}: mend or remove it")
        yield where, row
    if empty:
        raise UserError(f"{source}: holds no rows: check that it was written to the end")


def _lines(source: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file. Decoded one by one, so that a bad byte is reported on its own line."""
    number = 0
    try:
        with gzip.open(source) if source.lower().endswith(".gz") else open(source, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{source}, line {number}: not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{source}: cannot be unpacked after line {number} ({_one_line(error)}): fetch it or gzip it again"
        ) from error
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}): check its permissions") from error


def _json_rows(source: str) -> Iterator[tuple[Where, Any]]:
    lines = ((number, text) for number, text in _lines(source) if text.strip())
    first = next(lines, (0, ""))
    if first[1].lstrip().startswith("["):
        whole = "".join(text for _, text in _lines(source))  # from the start again: blank lines count in messages
        for row, value in enumerate(_parsed(whole, source, 1), 1):
            yield Where(source, row), value
    elif first[1]:
        for number, text in chain([first], lines):
            # Without its line break, so that what is missing at the end is missing on this line.
            yield Where(source, number), _parsed(text.rstrip(), source, number)


def _parsed(text: str, source: str, line: int) -> Any:
    """The JSON value in ``text``, which starts on line ``line`` of the source."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{source}, line {line + error.lineno - 1}"
        problem = f"{error.msg}, column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested too deep
        place = f"{source}, line {line}"
        problem = _one_line(error)
    raise UserError(f"{place}: not JSON ({problem}): wanted one object per line, or one list of objects")


def _csv_rows(source: str) -> Iterator[tuple[Where, Any]]:
    csv.field_size_limit(CELL_LIMIT)
    # Not strict, csv would read from a stray quote to the end of the file as one cell, in silence.
    reader = csv.reader((text for _, text in _lines(source)), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            where, line = Where(source, line), reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _header(source, cells)
            elif len(cells) != len(header):
                raise UserError(
                    f"{where}: {len(cells)} cells, the header has {len(header)}: "
                    "put quotes around cells that hold commas, quotes or line breaks"
                )
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{Where(source, line)}: not CSV ({error}): check the quotes from this line on") from error


def _header(source: str, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{source}: two columns are named {twice!r}: rename or remove one of them")
    return header


def _parquet_rows(source: str) -> Iterator[tuple[Where, Any]]:
    # pyarrow and datasets are slow to import, and most files need neither.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            rows = (row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield Where(source, number), row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{source}: cannot be read as Parquet ({_one_line(error)}): fetch or write it again") from error


def _hub_rows(source: str, split: str) -> Iterator[tuple[Where, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split=split)
    except OSError as error:  # no network, no such dataset, no access: all of them are OSErrors
        raise UserError(
            f"{source}: no such file, and not reachable as a Hub dataset ({_one_line(error)}): "
            "check the spelling, the network, and whether the dataset asks for a login"
        ) from error
    except Exception as error:  # dozens of kinds, all about the dataset; the cause stays attached for --debug
        raise UserError(
            f"{source}: the Hub dataset cannot be loaded with split {split!r} ({_one_line(error)}): "
            "choose another split, or download one of its files and name that"
        ) from error
    for number, row in enumerate(rows, 1):
        yield Where(source, number), row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


READERS: dict[str, Callable[[str], Iterator[tuple[Where, Any]]]] = {
    ".jsonl": _json_rows,
    ".jsonl.gz": _json_rows,
    ".json": _json_rows,
    ".json.gz": _json_rows,
    ".csv": _csv_rows,
    ".csv.gz": _csv_rows,
    ".parquet": _parquet_rows,
}
