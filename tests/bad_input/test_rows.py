"""Mistakes in the files of rows, and rows that break a rule."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.case import Case, accepted, meet, refused, table_of
from tests.bad_input.files import DATA, KEYS, TEST, TRAIN, lines, spoilt, table_task, task, task_with

CHECK = "tasks check t"
CSV = "text,label\n" + "".join(f"film {i},{'good' if i % 2 else 'bad'}\n" for i in range(20))
FREE = spoilt("classification", "generation", KEYS) + DATA
CHOICES = spoilt("classification", "qa", KEYS) + DATA + "choices: options\n"
QUERIES = "".join(f"film {i}\n" for i in range(8))
JSON_HINT = "`jq -c '.[]'` or pandas `to_json(orient='records', lines=True)` writes that."
OPTIONS = {"x": ["a", "b"], "y": [], "z": ["a", ""]}
MEGABYTE = "x" * 1_000_001


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def link(name: str, to: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return replace


def fifo(name: str) -> Callable[[Path], None]:
    return lambda folder: os.mkfifo(folder / name)


def parquet(name: str, **columns: list[Any]) -> Callable[[Path], None]:
    import pyarrow
    import pyarrow.parquet

    def write(folder: Path) -> None:
        table = pyarrow.table(list(columns.values()), names=[column.rstrip("_") for column in columns])
        pyarrow.parquet.write_table(table, folder / name)

    return write


def parquet_of(kind: Callable[[], Any], *values: Any) -> Callable[[Path], None]:
    """Write a Parquet file whose column `text` is of a type that no list of Python tells."""

    def write(folder: Path) -> None:
        import pyarrow

        parquet("t/rows.parquet", text=pyarrow.array(values, kind()), label=["good"] * len(values))(folder)

    return write


def bytes_as_text(*values: bytes) -> Callable[[Path], None]:
    """Write a Parquet file that says that bytes are UTF-8."""

    def write(folder: Path) -> None:
        import pyarrow

        binary = pyarrow.array(values, pyarrow.binary())
        text = pyarrow.Array.from_buffers(pyarrow.string(), len(values), binary.buffers())
        parquet("t/rows.parquet", text=text, label=["good"] * len(values))(folder)

    return write


def of_pyarrow(name: str, *arguments: Any) -> Callable[[], Any]:
    import pyarrow

    return lambda: getattr(pyarrow, name)(*arguments)


def with_row(**row: object) -> dict[str, str]:
    return task_with("labels: [good, bad]\n", train=[*TRAIN, row])


FILES = [
    refused(
        "a missing file",
        CHECK,
        "missing_file",
        file="t/task.yaml",
        field="data",
        remedy="Did you mean 'train.jsonl'?",
        files=task(),
        prepare=remove("t/test.jsonl"),
    ),
    refused(
        "a misspelt file",
        CHECK,
        "missing_file",
        file="t/task.yaml",
        field="data",
        remedy="Did you mean 'train.jsonl'?",
        says=("t/task.yaml: the data file t/trian.jsonl does not exist. Did you mean 'train.jsonl'?",),
        files=task(spoilt("train.jsonl", "trian.jsonl", KEYS + DATA)),
    ),
    refused(
        "a link to itself for rows",
        CHECK,
        "missing_file",
        file="t/task.yaml",
        field="data",
        files=task(),
        prepare=link("t/train.jsonl", "train.jsonl"),
    ),
    refused(
        "a link to a file that is gone",
        CHECK,
        "missing_file",
        file="t/task.yaml",
        field="data",
        files=task(),
        prepare=link("t/train.jsonl", "gone.jsonl"),
    ),
    refused(
        "a folder for rows",
        CHECK,
        "not_a_file",
        file="t/rows",
        files={"t/task.yaml": KEYS + "data: {file: rows}\n", "t/rows/x": ""},
    ),
    refused(
        "a pipe for rows",
        CHECK,
        "not_a_file",
        file="t/rows.csv",
        files={"t/task.yaml": KEYS + "data: {file: rows.csv}\n"},
        prepare=fifo("t/rows.csv"),
    ),
    refused("a device for rows", CHECK, "not_a_file", file="/dev/zero", files=table_task("", "file: /dev/zero")),
    refused(
        "an old spreadsheet",
        CHECK,
        "unknown_suffix",
        file="t/rows.xls",
        found="the suffix '.xls'",
        says=(
            "t/rows.xls: not a table; expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .xlsx, or a text "
            "packed as .gz, found the suffix '.xls'. Export it as CSV.",
        ),
        files=table_task(b"PK", "file: rows.xls", "rows.xls"),
    ),
    refused(
        "a file without a suffix",
        CHECK,
        "unknown_suffix",
        file="t/rows",
        found="the suffix ''",
        files=table_task(CSV, "file: rows", "rows"),
    ),
    refused(
        "no Parquet in a Parquet file",
        CHECK,
        "broken_parquet",
        file="t/rows.parquet",
        files=table_task("PAR1", "file: rows.parquet", "rows.parquet"),
    ),
    refused(
        "a Parquet file with a column twice",
        CHECK,
        "repeated_column",
        file="t/rows.parquet",
        field="text",
        files=table_task("", "file: rows.parquet"),
        prepare=parquet("t/rows.parquet", text=["a"], text_=["b"], label=["c"]),
    ),
    refused(
        "a Parquet text that is not UTF-8",
        CHECK,
        "unreadable_value",
        file="t/rows.parquet",
        row=2,
        field="text",
        files=table_task("", "file: rows.parquet"),
        prepare=bytes_as_text(b"caf", b"caf\xe9"),
    ),
    refused(
        "Parquet bytes that are not UTF-8",
        CHECK,
        "unreadable_value",
        file="t/rows.parquet",
        row=2,
        field="text",
        files=table_task("", "file: rows.parquet"),
        prepare=parquet_of(of_pyarrow("binary"), b"caf", b"caf\xe9"),
    ),
    refused(
        "a Parquet date that no calendar has",
        CHECK,
        "unreadable_value",
        file="t/rows.parquet",
        row=2,
        field="text",
        files=table_task("", "file: rows.parquet"),
        prepare=parquet_of(of_pyarrow("date32"), 0, 2**31 - 1),
    ),
    refused(
        "a Parquet time that no calendar has",
        CHECK,
        "unreadable_value",
        file="t/rows.parquet",
        row=1,
        field="text",
        files=table_task("", "file: rows.parquet"),
        prepare=parquet_of(of_pyarrow("timestamp", "ms"), 2**62),
    ),
    refused(
        "a Parquet time zone that there is not",
        CHECK,
        "unreadable_value",
        file="t/rows.parquet",
        row=1,
        field="text",
        files=table_task("", "file: rows.parquet"),
        prepare=parquet_of(of_pyarrow("timestamp", "us", "Mars/Olympus"), 0),
    ),
    refused(
        "a label of Parquet that is no number",
        CHECK,
        "empty_answer",
        file="t/rows.parquet",
        row=2,
        files=table_task("", "file: rows.parquet"),
        prepare=parquet("t/rows.parquet", text=["a", "b"], label=[1.0, float("nan")]),
    ),
    refused("an empty CSV file", CHECK, "no_rows", file="t/rows.csv", files=table_task("")),
    refused("a CSV file of a header alone", CHECK, "no_rows", file="t/rows.csv", files=table_task("text,label\n")),
    refused("an empty JSONL file", CHECK, "no_rows", file="t/train.jsonl", files=task(train=[])),
    refused(
        "a JSONL file of blank lines",
        CHECK,
        "no_rows",
        file="t/train.jsonl",
        files={**task(), "t/train.jsonl": "\n\n \n"},
    ),
    accepted(
        "an empty test file", CHECK, "There are no test rows; the task can be used, not evaluated", files=task(test=[])
    ),
    refused(
        "an empty table named by its columns",
        "tasks check a.csv:text:label",
        "no_rows",
        file="a.csv",
        files={"a.csv": "text,label\n"},
    ),
]

BROKEN = [
    refused(
        "a line of JSON that is cut",
        CHECK,
        "broken_json",
        file="t/train.jsonl",
        row=9,
        files={**task(), "t/train.jsonl": lines(*TRAIN) + '{"text": "x", "la'},
    ),
    refused(
        "JSON with single quotes",
        CHECK,
        "broken_json",
        file="t/train.jsonl",
        row=1,
        files={**task(), "t/train.jsonl": "{'text': 'x'}\n"},
    ),
    refused(
        "a JSON document over several lines",
        CHECK,
        "broken_json",
        file="t/train.jsonl",
        row=1,
        files={**task(), "t/train.jsonl": json.dumps(list(TRAIN), indent=1)},
    ),
    refused(
        "a JSON list a line",
        CHECK,
        "not_an_object",
        file="t/train.jsonl",
        row=1,
        found='["x", "good"]',
        files={**task(), "t/train.jsonl": '["x", "good"]\n'},
    ),
    refused(
        "a whole list of rows on one line",
        CHECK,
        "not_an_object",
        file="t/train.jsonl",
        row=1,
        found='[{"text": ',
        says=(
            't/train.jsonl:1: not a row; expected one JSON object a line, such as {"text": …}, found [{"text": ',
            "`jq -c '.[]'` or pandas `to_json(orient='records', lines=True)` writes that.",
        ),
        files={**task(), "t/train.jsonl": json.dumps(list(TRAIN))},
    ),
    refused(
        "a number on a line",
        CHECK,
        "not_an_object",
        file="t/train.jsonl",
        row=1,
        found="12",
        files={**task(), "t/train.jsonl": "12\n"},
    ),
    refused(
        "null on a line",
        CHECK,
        "not_an_object",
        file="t/train.jsonl",
        row=1,
        found="null",
        files={**task(), "t/train.jsonl": "null\n"},
    ),
    refused(
        "a key that stands twice in a row",
        CHECK,
        "repeated_key",
        file="t/train.jsonl",
        row=2,
        files={**task(), "t/train.jsonl": lines(TRAIN[0]) + '{"text": "x", "label": "good", "label": "bad"}\n'},
    ),
    refused(
        "a key that stands twice within a column",
        CHECK,
        "repeated_key",
        file="t/train.jsonl",
        row=1,
        files={**task(), "t/train.jsonl": '{"text": {"a": 1, "a": 2}, "label": "good"}\n'},
    ),
    refused(
        "JSON a hundred thousand deep",
        CHECK,
        "nested_too_deep",
        file="t/train.jsonl",
        row=1,
        files={**task(), "t/train.jsonl": f'{{"text": {"[" * 100_000}{"]" * 100_000}}}\n'},
    ),
    refused(
        "JSON two hundred deep",
        CHECK,
        "nested_too_deep",
        file="t/train.jsonl",
        row=1,
        files={**task(), "t/train.jsonl": f'{{"text": {"[" * 200}{"]" * 200}, "label": "good"}}\n'},
    ),
    refused(
        "JSON in Latin-1",
        CHECK,
        "not_utf8",
        file="t/train.jsonl",
        row=2,
        found="the byte 0xe9",
        says=(
            "t/train.jsonl:2: not text in UTF-8; found the byte 0xe9. It looks like cp1252, in which a word there is",
            "'caf\u00e9'. Save it as UTF-8, or name its encoding: `,encoding=NAME` after the columns of a table,",
        ),
        files={**task(), "t/train.jsonl": lines(TRAIN[0]).encode() + '{"text": "caf\u00e9"}\n'.encode("latin-1")},
    ),
    refused("a CSV file in UTF-16", CHECK, "not_utf8", file="t/rows.csv", files=table_task(CSV.encode("utf-16"))),
    refused(
        "a CSV file of NUL bytes",
        CHECK,
        "not_utf8",
        file="t/rows.csv",
        row=1,
        found="a NUL byte",
        files=table_task(bytes(1000)),
    ),
    refused(
        "a NUL byte in the middle",
        CHECK,
        "not_utf8",
        file="t/rows.csv",
        row=3,
        found="a NUL byte",
        files=table_task(CSV.replace("film 1", "film\0")),
    ),
    refused(
        "a row with a field too many",
        CHECK,
        "wrong_number_of_fields",
        file="t/rows.csv",
        row=22,
        found="3",
        says=(
            "t/rows.csv:22: the row does not fit the header; expected 2 fields, found 3. Put a field that",
            "holds the delimiter in double quotes.",
        ),
        files=table_task(CSV + "good, if long,good\n"),
    ),
    refused(
        "a row with a field too few",
        CHECK,
        "wrong_number_of_fields",
        file="t/rows.csv",
        row=22,
        found="1",
        files=table_task(CSV + "good\n"),
    ),
    refused(
        "a quote that is not closed",
        CHECK,
        "broken_csv",
        file="t/rows.csv",
        row=22,
        files=table_task(CSV + '"film,good\nplay,bad\n'),
    ),
    refused(
        "text behind a closing quote",
        CHECK,
        "broken_csv",
        file="t/rows.csv",
        row=22,
        files=table_task(CSV + '"film" noir,good\n'),
    ),
    refused(
        "two delimiters that fit",
        CHECK,
        "several_delimiters",
        file="t/rows.csv",
        row=1,
        found="';' and '|'",
        says=(
            "t/rows.csv:1: the delimiter of the table is not clear; expected one that fits, found ';' and '|'. Name",
            "it: `,delimiter=;` after the columns of a table",
        ),
        files=table_task(CSV.replace(",", ";").replace("\n", "|\n")),
    ),
    refused(
        "a row that does not fit the delimiter that was found",
        CHECK,
        "wrong_number_of_fields",
        file="t/rows.csv",
        row=42,
        found="3",
        says=("expected 2 fields between ';', found 3.",),
        files=table_task((CSV + CSV.partition("\n")[2]).replace(",", ";") + "good; if long;good\n"),
    ),
    refused(
        "UTF-8 that is named cp1252",
        CHECK,
        "not_in_encoding",
        file="t/rows.csv",
        says=("t/rows.csv: the file is UTF-8, not cp1252. Name the encoding utf-8, or none.",),
        files=table_task(CSV.replace("film 1", "caf\u00e9"), "file: rows.csv, encoding: cp1252"),
    ),
    refused(
        "bytes that the named encoding has not",
        CHECK,
        "not_in_encoding",
        file="t/rows.csv",
        row=3,
        files=table_task(CSV.encode().replace(b"film 1", b"\x81"), "file: rows.csv, encoding: cp1252"),
    ),
    refused(
        "an encoding that nobody knows",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data.encoding",
        files=table_task(CSV, "file: rows.csv, encoding: cp1225"),
    ),
    refused(
        "an encoding for Parquet",
        CHECK,
        "no_effect",
        file="t/task.yaml",
        field="data.encoding",
        files=table_task(b"", "file: rows.parquet, encoding: cp1252", "rows.parquet"),
    ),
    refused(
        "a sheet of a CSV file",
        CHECK,
        "no_effect",
        file="t/task.yaml",
        field="data.sheet",
        files=table_task(CSV, "file: rows.csv, sheet: Tickets"),
    ),
    refused(
        "a packed table that is not named so",
        CHECK,
        "not_utf8",
        file="t/rows.csv",
        says=("the file is packed with gzip; expected text in UTF-8. Unpack it, or let the name of a packed table",),
        files=table_task(gzip.compress(CSV.encode())),
    ),
    refused(
        "a packed table that is cut",
        CHECK,
        "broken_gzip",
        file="t/rows.csv.gz",
        files=table_task(gzip.compress(CSV.encode())[:-9], "file: rows.csv.gz", "rows.csv.gz"),
    ),
    refused(
        "a packed table that is damaged",
        CHECK,
        "broken_gzip",
        file="t/rows.csv.gz",
        says=("the packed file is damaged, CRC check failed",),
        files=table_task(gzip.compress(CSV.encode())[:-8] + bytes(8), "file: rows.csv.gz", "rows.csv.gz"),
    ),
    refused(
        "a table that is named packed",
        CHECK,
        "broken_gzip",
        file="t/rows.csv.gz",
        says=("Take .gz off its name, if it is not packed.",),
        files=table_task(CSV, "file: rows.csv.gz", "rows.csv.gz"),
    ),
    refused(
        "a delimiter of the task file that the table has not",
        CHECK,
        "wrong_delimiter",
        file="t/rows.csv",
        row=1,
        found="the one column 'text,label'",
        files=table_task(CSV, "file: rows.csv, delimiter: ';'"),
    ),
    refused(
        "a table without a header",
        CHECK,
        "missing_column",
        file="t/rows.csv",
        row=2,
        field="text",
        found="the columns ['bad', 'film 0']",
        files=table_task(CSV.partition("\n")[2]),
    ),
    refused(
        "a column without a name",
        CHECK,
        "unnamed_column",
        file="t/rows.csv",
        row=1,
        files=table_task("text,\nx,good\n"),
    ),
    refused(
        "a table of pandas with its index",
        CHECK,
        "unnamed_column",
        file="t/rows.csv",
        row=1,
        files=table_task(",text,label\n0,x,good\n"),
    ),
    refused(
        "empty columns of a spreadsheet",
        CHECK,
        "unnamed_column",
        file="t/rows.csv",
        row=1,
        files=table_task("text,label,,\nx,good,,\n"),
    ),
    refused(
        "a line for Excel alone",
        CHECK,
        "excel_note",
        file="t/rows.csv",
        row=1,
        files=table_task("sep=;\n" + CSV.replace(",", ";"), "file: rows.csv, delimiter: ';'"),
    ),
    refused("the same with commas", CHECK, "excel_note", file="t/rows.csv", row=1, files=table_task("sep=,\n" + CSV)),
    refused(
        "an empty field too many",
        CHECK,
        "wrong_number_of_fields",
        file="t/rows.csv",
        row=22,
        found="3",
        says=(
            "t/rows.csv:22: the row does not fit the header; expected 2 fields, found 3. Delete the empty",
            "field at its end.",
        ),
        files=table_task(CSV + "film,good,\n"),
    ),
    refused(
        "two empty fields too many",
        CHECK,
        "wrong_number_of_fields",
        file="t/rows.csv",
        row=22,
        found="4",
        files=table_task(CSV + "film,good,, \n"),
    ),
    *(
        refused(
            f"one column named {header} in {name}",
            CHECK,
            "missing_column",
            row=2,
            field="text",
            files=table_task(f"{header}\n{QUERIES}", f"file: {name}", name),
        )
        for header, name in (
            ('"Question, if any"', "rows.csv"),
            ('"Frage; deutsch"', "rows.csv"),
            ("Frage; deutsch", "rows.csv"),
            ('"a|b"', "rows.csv"),
            ("text, original", "rows.tsv"),
        )
    ),
    refused(
        "a column that stands twice",
        CHECK,
        "repeated_column",
        file="t/rows.csv",
        row=1,
        field="text",
        files=table_task("text,text\n"),
    ),
    refused(
        "a group that there is not",
        CHECK,
        "missing_column",
        file="t/rows.csv",
        row=2,
        field="grup",
        found="the columns ['label', 'text']",
        files=table_task(CSV, "file: rows.csv, group: grup"),
    ),
    accepted(
        "a byte order mark and CRLF in a table",
        CHECK,
        "1 checked",
        files=table_task(("\ufeff" + CSV).replace("\n", "\r\n")),
    ),
    accepted(
        "a byte order mark and CRLF in JSON lines",
        CHECK,
        "1 checked",
        files={**task(), "t/train.jsonl": ("\ufeff" + lines(*TRAIN)).replace("\n", "\r\n")},
    ),
    accepted("line ends of old Macs", CHECK, "1 checked", files=table_task(CSV.replace("\n", "\r"))),
    accepted(
        "numbers that are none in JSON",
        CHECK,
        "1 checked",
        files={**task(), "t/train.jsonl": lines(*TRAIN) + '{"text": "x", "label": "good", "score": NaN}\n'},
    ),
    refused(
        "no number for a query, as in Parquet",
        CHECK,
        "empty_query",
        file="t/train.jsonl",
        row=9,
        field="query",
        files={**task(), "t/train.jsonl": lines(*TRAIN) + '{"text": NaN, "label": "good"}\n'},
    ),
    refused("a CSV file in UTF-32", CHECK, "not_utf8", file="t/rows.csv", files=table_task(CSV.encode("utf-32"))),
    refused(
        "a CSV file packed with gzip",
        CHECK,
        "not_utf8",
        file="t/rows.csv",
        files=table_task(gzip.compress(CSV.encode())),
    ),
    refused("a spreadsheet named a table", CHECK, "not_utf8", file="t/rows.csv", files=table_task(b"PK\x03\x04...")),
    refused(
        "a delimiter for JSON lines",
        CHECK,
        "no_effect",
        file="t/task.yaml",
        field="data.delimiter",
        files=task(KEYS + DATA.replace("{train", "{delimiter: ';', train")),
    ),
    refused(
        "a list in a query",
        CHECK,
        "template_fails",
        file="t/train.jsonl",
        row=9,
        files=with_row(text=["x", "y"], label="good"),
    ),
    refused(
        "a mapping in a query",
        CHECK,
        "template_fails",
        file="t/train.jsonl",
        row=9,
        files=with_row(text={"x": "y"}, label="good"),
    ),
    refused(
        "all rows with one query and labels",
        CHECK,
        "no_test_rows",
        file="t/task.yaml",
        files=table_task("text,label\n" + "x,good\nX,bad\n" * 10),
    ),
    refused(
        "all rows of one file dropped",
        CHECK,
        "no_training_rows",
        file="t/task.yaml",
        files=table_task("text,label\nx,\ny,\n", more="bad_rows: drop\n"),
    ),
    refused(
        "a bad row without a task file",
        "tasks check a.csv:text:label,family=classification",
        "empty_query",
        file="a.csv",
        row=22,
        field="query",
        files={"a.csv": CSV + ",good\n"},
    ),
    accepted("two byte order marks", CHECK, "1 checked", files=table_task("\ufeff\ufeff" + CSV)),
]


BAD_ROWS = [
    refused("an empty answer", CHECK, "empty_answer", file="t/train.jsonl", row=9, files=with_row(text="x", label="")),
    refused(
        "an answer of spaces",
        CHECK,
        "empty_answer",
        file="t/train.jsonl",
        row=9,
        files=with_row(text="x", label=" \n "),
    ),
    refused(
        "an answer that is null",
        CHECK,
        "empty_answer",
        file="t/train.jsonl",
        row=9,
        files=with_row(text="x", label=None),
    ),
    refused(
        "a list of no answers",
        CHECK,
        "empty_answer",
        file="t/train.jsonl",
        row=9,
        field="label",
        files=with_row(text="x", label=[]),
    ),
    refused(
        "an empty query",
        CHECK,
        "empty_query",
        file="t/train.jsonl",
        row=9,
        field="query",
        files=with_row(text=" ", label="good"),
    ),
    refused(
        "a query that is null",
        CHECK,
        "empty_query",
        file="t/train.jsonl",
        row=9,
        field="query",
        files=with_row(text=None, label="good"),
    ),
    refused(
        "a column that one row lacks",
        CHECK,
        "missing_column",
        file="t/train.jsonl",
        row=9,
        field="text",
        found="the columns ['label', 'txt']",
        remedy="Did you mean 'txt'?",
        files=with_row(txt="x", label="good"),
    ),
    refused(
        "a label outside the closed set",
        CHECK,
        "unknown_label",
        file="t/train.jsonl",
        row=9,
        remedy="Did you mean 'good'?",
        says=(
            "t/train.jsonl:9: 'goood' is no label of task 't'; expected one of 'good', 'bad'. Did you mean",
            "'good'? Fix the row, or set `bad_rows: drop` in a task.yaml for 't'.",
        ),
        files=with_row(text="x", label="goood"),
    ),
    refused(
        "a label in other letters",
        CHECK,
        "unknown_label",
        file="t/train.jsonl",
        row=9,
        remedy="Did you mean 'good'?",
        files=with_row(text="x", label="Good"),
    ),
    refused(
        "a label outside the set on the test side",
        CHECK,
        "unknown_label",
        file="t/test.jsonl",
        row=5,
        files=task_with("labels: [good, bad]\n", test=[*TEST, {"text": "x", "label": "mixed"}]),
    ),
    refused(
        "a test label that no training row has",
        CHECK,
        "label_only_in_test",
        file="t/task.yaml",
        files=task(test=[*TEST, {"text": "x", "label": "mixed"}]),
    ),
    refused(
        "one label in all training rows",
        CHECK,
        "one_label",
        file="t/task.yaml",
        files=task(train=[TRAIN[0], TRAIN[2]], test=[TEST[0]]),
    ),
    refused(
        "several labels in a row",
        CHECK,
        "several_labels",
        file="t/train.jsonl",
        row=9,
        says=(
            "t/train.jsonl:9: task 't' is multi-label: this row has ['bad', 'good']; expected one label in",
            "each row. Keep the rows with one label, or make a yes/no task of each label.",
        ),
        files=with_row(text="x", label=["good", "bad"]),
    ),
    accepted(
        "an answer with a blank line, which a model may have",
        CHECK,
        "1 answer with a blank line",
        files=task(FREE, train=[{"text": "x", "label": "a\n\nb"}]),
    ),
    refused(
        "half a character",
        CHECK,
        "half_a_character",
        file="t/train.jsonl",
        row=9,
        files=with_row(text="\ud83d", label="good"),
    ),
    refused(
        "a class number without a name",
        CHECK,
        "unknown_class",
        file="t/train.jsonl",
        row=9,
        field="label",
        files=task_with("class_names: {label: {good: fine, bad: poor}}\n", train=[*TRAIN, {"text": "x", "label": 7}]),
    ),
    refused(
        "a row without a class",
        CHECK,
        "row_without_label",
        file="t/train.jsonl",
        row=9,
        field="label",
        files=task_with("class_names: {label: {good: fine, bad: poor}}\n", train=[*TRAIN, {"text": "x", "label": -1}]),
    ),
    refused(
        "an answer that is no option",
        CHECK,
        "not_an_option",
        file="t/train.jsonl",
        row=1,
        files=task(CHOICES, train=[{"text": "x", "label": "c", "options": ["a", "b"]}]),
    ),
    refused(
        "choices that are no list",
        CHECK,
        "not_a_list",
        file="t/train.jsonl",
        row=1,
        field="options",
        found="'a, b'",
        files=task(CHOICES, train=[{"text": "x", "label": "a", "options": "a, b"}]),
    ),
    refused(
        "no choices",
        CHECK,
        "empty_option",
        file="t/train.jsonl",
        row=1,
        field="options",
        found="[]",
        files=task(CHOICES, train=[{"text": "x", "label": "a", "options": []}]),
    ),
    refused(
        "choices that are missing",
        CHECK,
        "not_a_list",
        file="t/train.jsonl",
        row=1,
        field="options",
        found="nothing",
        files=task(CHOICES, train=[{"text": "x", "label": "a"}]),
    ),
    refused(
        "a choice that is empty",
        CHECK,
        "empty_option",
        file="t/train.jsonl",
        row=1,
        field="options",
        found="['a', ' ']",
        files=task(CHOICES, train=[{"text": "x", "label": "a", "options": ["a", " "]}]),
    ),
    refused(
        "choices in a column that is missing",
        CHECK,
        "missing_column",
        file="t/train.jsonl",
        row=1,
        field="c",
        found="the columns ['b', 'label', 'text']",
        files=task(spoilt("options", "b, c", CHOICES), train=[{"text": "x", "label": "a", "b": "a"}]),
    ),
    refused(
        "references that are no list",
        CHECK,
        "not_a_list",
        file="t/train.jsonl",
        row=1,
        field="r",
        found="'a'",
        files=task(FREE + "references: r\n", train=[{"text": "x", "label": "a", "r": "a"}]),
    ),
    refused(
        "an empty reference",
        CHECK,
        "empty_answer",
        file="t/train.jsonl",
        row=1,
        files=task(FREE + "references: r\n", train=[{"text": "x", "label": "a", "r": [""]}]),
    ),
    refused(
        "all rows dropped",
        CHECK,
        "no_test_rows",
        file="t/task.yaml",
        files=task_with("labels: [x, y]\nbad_rows: drop\n"),
    ),
    refused(
        "all test rows dropped",
        CHECK,
        "no_test_rows",
        file="t/task.yaml",
        files=task_with("bad_rows: drop\n", test=[{"text": "x", "label": ""}]),
    ),
    refused(
        "too few rows to split",
        CHECK,
        "no_test_rows",
        file="t/task.yaml",
        files=table_task("text,label\nx,good\ny,bad\n"),
    ),
    refused(
        "all rows of one group",
        CHECK,
        "no_training_rows",
        file="t/task.yaml",
        files=table_task(
            CSV.replace("\n", ",x\n").replace("label,x", "label,customer"), "file: rows.csv, group: customer"
        ),
    ),
    refused(
        "all rows with one query",
        CHECK,
        "no_training_rows",
        file="t/task.yaml",
        says=(
            "t/task.yaml: the split leaves no training rows: test_fraction is 0.2 of 3 rows in 1 group.",
            "Set test_fraction to 0, or add rows: those with equal queries are a group",
        ),
        files={
            **table_task("text,label\nx,a\nX,b\nx ,c\n"),
            "t/task.yaml": spoilt(DATA, "data: {file: rows.csv}\n", FREE),
        },
    ),
    refused(
        "one row to split",
        CHECK,
        "no_training_rows",
        file="t/task.yaml",
        files={**table_task("text,label\nx,a\n"), "t/task.yaml": spoilt(DATA, "data: {file: rows.csv}\n", FREE)},
    ),
    refused(
        "a split that takes all rows",
        CHECK,
        "no_training_rows",
        file="t/task.yaml",
        files={
            **table_task("text,label\nx,a\ny,b\n"),
            "t/task.yaml": spoilt(DATA, "data: {file: rows.csv, test_fraction: 0.9}\n", FREE),
        },
    ),
    accepted(
        "rows without an option that are to be dropped",
        CHECK,
        "Dropped: 2 (empty option): train.jsonl:2, train.jsonl:3.",
        files=task(
            f"{CHOICES.replace(', test: test.jsonl', '')}bad_rows: drop\n",
            train=[{"text": text, "label": "a", "options": options} for text, options in OPTIONS.items()],
            test=[],
        ),
    ),
    accepted(
        "bad rows that are to be dropped",
        CHECK,
        "Dropped: 1 (empty answer): train.jsonl:9.",
        files=task_with("bad_rows: drop\n", train=[*TRAIN, {"text": "x", "label": ""}]),
    ),
]

LONG = "text too long"
LONG_AND_BOTH = [
    refused(
        "a query of a megabyte",
        CHECK,
        "text_too_long",
        file="t/train.jsonl",
        row=9,
        found="1,000,001 characters",
        says=(
            "t/train.jsonl:9: the query is too long; expected at most 1,000,000 (max_characters), found",
            "1,000,001 characters. Fix the row, or set `bad_rows: drop` in a task.yaml for 't'.",
        ),
        files=with_row(text=MEGABYTE, label="good"),
    ),
    refused(
        "an answer of a megabyte",
        CHECK,
        "text_too_long",
        file="t/train.jsonl",
        row=1,
        found="1,000,001 characters",
        files=task(FREE, train=[{"text": "x", "label": MEGABYTE}]),
    ),
    refused(
        "an option of a megabyte",
        CHECK,
        "text_too_long",
        file="t/train.jsonl",
        row=1,
        found="1,000,001 characters",
        files=task(CHOICES, train=[{"text": "x", "label": "a", "options": ["a", MEGABYTE]}]),
    ),
    refused(
        "a reference of a megabyte",
        CHECK,
        "text_too_long",
        file="t/train.jsonl",
        row=1,
        found="1,000,001 characters",
        files=task(FREE + "references: r\n", train=[{"text": "x", "label": "a", "r": [MEGABYTE]}]),
    ),
    refused(
        "a field of ten megabytes",
        CHECK,
        "text_too_long",
        file="t/rows.csv",
        row=22,
        found="10,000,010 characters",
        files=table_task(f"{CSV}{MEGABYTE * 10},good\n"),
    ),
    refused(
        "a query longer than the task allows",
        CHECK,
        "text_too_long",
        file="t/train.jsonl",
        row=1,
        found="15 characters",
        files=task_with("max_characters: 14\n"),
    ),
    refused(
        "a text of one character too many",
        CHECK,
        "text_too_long",
        file="t/train.jsonl",
        row=1,
        found="2 characters",
        files=task_with("max_characters: 1\n", train=[{"text": "xy", "label": "a"}]),
    ),
    accepted(
        "a field of ten megabytes to be dropped",
        CHECK,
        f"Dropped: 1 ({LONG}): rows.csv:22.",
        files=table_task(f"{CSV}{MEGABYTE * 10},good\n", more="bad_rows: drop\n"),
    ),
    accepted(
        "a query of a megabyte to be dropped",
        CHECK,
        f"Dropped: 1 ({LONG}): train.jsonl:9.",
        files=task_with("bad_rows: drop\n", train=[*TRAIN, {"text": MEGABYTE, "label": "good"}]),
    ),
    accepted(
        "a field of ten megabytes of which little is asked",
        CHECK,
        "1 checked",
        files={
            **table_task(f"{CSV}{MEGABYTE * 10},good\n"),
            "t/task.yaml": f"{spoilt('{{ text }}', '{{ text[:50] }}', KEYS)}data: {{file: rows.csv}}\n",
        },
    ),
    refused(
        "a template at fault where rows may be dropped",
        CHECK,
        "template_fails",
        file="t/train.jsonl",
        row=1,
        files=task(spoilt("{{ text }}", "{{ text * 99999999 }}", KEYS) + DATA + "bad_rows: drop\n"),
    ),
    refused(
        "a training row that is a test row",
        CHECK,
        "on_both_sides",
        file="t/task.yaml",
        says=(
            "t/task.yaml: task 't' has 1 training row whose query is in test too; the first is",
            "train.jsonl:9, like test.jsonl:2. Take such rows off one side, or set `on_both_sides: drop`,",
            "which takes them off the training side.",
        ),
        files=task_with("on_both_sides: refuse\n", train=[*TRAIN, TEST[1]]),
    ),
    refused(
        "training rows that are test rows but for case and spaces",
        CHECK,
        "on_both_sides",
        file="t/task.yaml",
        files=task_with(
            "on_both_sides: refuse\n", train=[*TRAIN, {"text": " PLAY 3\twas dull", "label": "good"}, TEST[0]]
        ),
    ),
    refused(
        "only rows that stand in test",
        CHECK,
        "no_training_rows",
        file="t/task.yaml",
        says=(
            "t/task.yaml: task 't' has no training rows left; dropped: 4 (training row whose query is in",
            "test too).",
        ),
        files=task(train=TEST),
    ),
    accepted(
        "training rows that are test rows, by default",
        CHECK,
        "Dropped: 1 (training row whose query is in test too): train.jsonl:9.",
        files=task(train=[*TRAIN, TEST[1]]),
    ),
    accepted(
        "no row on both sides where that is refused", CHECK, "1 checked", files=task_with("on_both_sides: refuse\n")
    ),
]


@table_of([*FILES, *BROKEN, *BAD_ROWS, *LONG_AND_BOTH])
def test_a_mistake_in_rows_is_one_sentence(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meet(case, tmp_path, monkeypatch, capsys)
