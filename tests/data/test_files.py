import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from sartor.data.files import Where, read_rows
from sartor.errors import UserError

ROWS = [{"prompt": "Who?", "completion": "I, said\nthe “fly”."}, {"prompt": "a, b", "completion": 'say "c"'}]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """Sources are named as a user would, in the current folder, so that messages can be compared whole."""
    monkeypatch.chdir(tmp_path)


def numbers(source):
    return [where.row for where, _ in read_rows(source)]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("a.jsonl", lambda path: jsonl(ROWS), [1, 2]),
        ("a.json", lambda path: json.dumps(ROWS, indent=1).encode(), [1, 2]),
        ("lines.json", lambda path: jsonl(ROWS), [1, 2]),
        ("list.jsonl", lambda path: b"\n" + json.dumps(ROWS).encode(), [1, 2]),
        ("blank.jsonl", lambda path: b"\xef\xbb\xbf\n" + jsonl(ROWS).replace(b"\n", b"\r\n\r\n"), [2, 4]),
        ("a.v2.CSV", lambda path: as_csv(path, ROWS), [2, 4]),
        ("excel.csv", lambda path: b"\xef\xbb\xbf" + as_csv(path, ROWS) + b"\n", [2, 4]),
    ],
)
def test_text_formats_give_the_same_rows_and_say_where_they_stand(name, write, places, zipped):
    content = write(Path(name))
    if zipped:
        name, content = name + ".gz", gzip.compress(content)
    Path(name).write_bytes(content)
    read = list(read_rows(name))
    assert [row for _, row in read] == ROWS
    assert [where for where, _ in read] == [Where(name, place) for place in places]


def test_parquet():
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "label": True}, {"prompt": None, "label": False}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    assert list(read_rows("a.parquet")) == [(Where("a.parquet", 1), rows[0]), (Where("a.parquet", 2), rows[1])]


def test_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows("org/name", split="test")) == [(Where("org/name", i), row) for i, row in enumerate(ROWS, 1)]
    assert asked == [("org/name", "test")]


def test_large_cells():
    Path("a.csv").write_text('text\n"' + "x" * 300_000 + '"\n')
    assert len(next(read_rows("a.csv"))[1]["text"]) == 300_000


def test_lines_are_streamed():
    Path("a.jsonl").write_text('{"a": 1}\n{')
    assert next(read_rows("a.jsonl")) == (Where("a.jsonl", 1), {"a": 1})


ENDINGS = ".jsonl, .jsonl.gz, .json, .json.gz, .csv, .csv.gz, .parquet"
NOT_JSON = "wanted one object per line, or one list of objects"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n\n{"a": oops}\n',
            f"a.jsonl, line 3: not JSON (Expecting value, column 7): {NOT_JSON}",
        ),
        (
            "a.json",
            b'\n[{"a": 1},\n{"a" 2}]',
            f"a.json, line 3: not JSON (Expecting ':' delimiter, column 6): {NOT_JSON}",
        ),
        (
            "pretty.json",
            b'{\n "a": 1\n}',
            f"pretty.json, line 1: not JSON (Expecting property name enclosed in double quotes, column 2): {NOT_JSON}",
        ),
        ("a.jsonl", b"", "a.jsonl: holds no rows: check that it was written to the end"),
        ("a.json", b"[]", "a.json: holds no rows: check that it was written to the end"),
        ("a.csv", b"prompt,completion\n", "a.csv: holds no rows: check that it was written to the end"),
        ("a.csv", b"\xef\xbb\xbf", "a.csv: holds no rows: check that it was written to the end"),
        ("a.jsonl", b"\n \n", "a.jsonl: holds no rows: check that it was written to the end"),
        (
            "a.jsonl",
            b'{"a": 1}\n"text"\n',
            'a.jsonl, row 2: wanted an object of columns, got "text": mend or remove it',
        ),
        ("a.json", b"[{}, [1, 2]]", "a.json, row 2: wanted an object of columns, got [1, 2]: mend or remove it"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "caf\xe9"}\n',
            "a.jsonl, line 2: not UTF-8 (byte 0xe9): save the file as UTF-8",
        ),
        ("a.csv", b"a\nb\n\xff\n", "a.csv, line 3: not UTF-8 (byte 0xff): save the file as UTF-8"),
        (
            "utf16.json",
            '[{"a": 1}]'.encode("utf-16"),
            "utf16.json, line 1: not UTF-8 (byte 0xff): save the file as UTF-8",
        ),
        (
            "a.jsonl.gz",
            b'{"a": 1}\n',
            "a.jsonl.gz: cannot be unpacked after line 0 (Not a gzipped file (b'{\"')): fetch it or gzip it again",
        ),
        (
            "cut.csv.gz",
            gzip.compress(b"a\n1\n", mtime=0)[:-9],
            "cut.csv.gz: cannot be unpacked after line 2 (Compressed file ended before the end-of-stream marker was "
            "reached): fetch it or gzip it again",
        ),
        (
            "a.csv",
            b"a,b\n1,2\n3,4,5\n",
            "a.csv, row 3: 3 cells, the header has 2: put quotes around cells that hold commas, quotes or line breaks",
        ),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv: two columns are named 'a': rename or remove one of them"),
        (
            "a.csv",
            b'a,b\n1,2\n"3,4\n5,6\n',
            "a.csv, row 3: not CSV (unexpected end of data): check the quotes from this line on",
        ),
        (
            "a.parquet",
            b"PAR1 and nothing more",
            "a.parquet: cannot be read as Parquet (Parquet magic bytes not found in footer. Either the file is "
            "corrupted or this is not a parquet file.): fetch or write it again",
        ),
        ("a.txt", b"hello", f"a.txt: the name does not tell the format: let it end in one of {ENDINGS}"),
        ("a.parquet.gz", b"", f"a.parquet.gz: the name does not tell the format: let it end in one of {ENDINGS}"),
    ],
)
def test_bad_files(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_rows(name))
    assert str(caught.value) == message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [("1" * 5000, "Exceeds the limit"), ('{"a":' * 100_000, "recursion"), ("[" * 100_000, "recursion")],
)
def test_json_that_python_itself_cannot_hold(text, problem):
    Path("a.jsonl").write_text(text)
    with pytest.raises(UserError, match=rf"^a\.jsonl, line 1: not JSON \([^\n]*{problem}[^\n]*\): [^\n]*$"):
        list(read_rows("a.jsonl"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("prefs.jsonl", "prefs.jsonl: no such file: check the path, or name a Hub dataset as org/name"),
        ("data/prefs.csv.gz", "data/prefs.csv.gz: no such file: check the path, or name a Hub dataset as org/name"),
        ("/no/where/prefs", "/no/where/prefs: no such file: check the path, or name a Hub dataset as org/name"),
        (".", f".: a folder, wanted one data file: name a file in it ({ENDINGS})"),
    ],
)
def test_no_file(source, message):
    with pytest.raises(UserError) as caught:
        read_rows(source)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach\n'org/name' on the Hub"),
            "org/name: no such file, and not reachable as a Hub dataset (Couldn't reach 'org/name' on the Hub): "
            "check the spelling, the network, and whether the dataset asks for a login",
        ),
        (
            ValueError('Unknown split "train".\nShould be one of ["test"].'),
            "org/name: the Hub dataset cannot be loaded with split 'train' (Unknown split \"train\". Should be one of "
            '["test"].): choose another split, or download one of its files and name that',
        ),
    ],
)
def test_hub_failures(monkeypatch, error, message):
    def load_dataset(name, split):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        list(read_rows("org/name"))
    assert str(caught.value) == message
