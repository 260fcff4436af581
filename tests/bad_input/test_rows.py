"""Mistakes in the files of rows, and rows that break a rule."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.case import Case, accepted, meet, table_of
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


FILES = [
    Case(
        "a missing file",
        CHECK,
        ("t/task.yaml: the data file t/test.jsonl does not exist.",),
        task(),
        prepare=remove("t/test.jsonl"),
    ),
    Case(
        "a misspelt file",
        CHECK,
        ("the data file t/trian.jsonl does not exist. Did you mean 'train.jsonl'?",),
        task(spoilt("train.jsonl", "trian.jsonl", KEYS + DATA)),
    ),
    Case(
        "a link to itself for rows",
        CHECK,
        ("does not exist", "t/train.jsonl is a link that leads nowhere"),
        task(),
        prepare=link("t/train.jsonl", "train.jsonl"),
    ),
    Case(
        "a link to a file that is gone",
        CHECK,
        ("does not exist", "t/train.jsonl is a link that leads nowhere"),
        task(),
        prepare=link("t/train.jsonl", "gone.jsonl"),
    ),
    Case(
        "a folder for rows",
        CHECK,
        ("t/rows is a folder; expected a file of rows (.jsonl",),
        {"t/task.yaml": KEYS + "data: {file: rows}\n", "t/rows/x": ""},
    ),
    Case(
        "a pipe for rows",
        CHECK,
        ("t/rows.csv is no plain file",),
        {"t/task.yaml": KEYS + "data: {file: rows.csv}\n"},
        prepare=fifo("t/rows.csv"),
    ),
    Case("a device for rows", CHECK, ("/dev/zero is no plain file",), table_task("", "file: /dev/zero")),
    Case(
        "a spreadsheet",
        CHECK,
        ("t/rows.xlsx: expected one of .jsonl", "found the suffix '.xlsx'. Export it as CSV."),
        table_task(b"PK", "file: rows.xlsx", "rows.xlsx"),
    ),
    Case(
        "a file without a suffix",
        CHECK,
        ("expected one of", "found the suffix ''"),
        table_task(CSV, "file: rows", "rows"),
    ),
    Case(
        "no Parquet in a Parquet file",
        CHECK,
        ("t/rows.parquet: not a readable Parquet file",),
        table_task("PAR1", "file: rows.parquet", "rows.parquet"),
    ),
    Case(
        "a Parquet file with a column twice",
        CHECK,
        ("t/rows.parquet: the column 'text' stands twice",),
        table_task("", "file: rows.parquet"),
        prepare=parquet("t/rows.parquet", text=["a"], text_=["b"], label=["c"]),
    ),
    Case(
        "a Parquet text that is not UTF-8",
        CHECK,
        ("t/rows.parquet:2: the column 'text' cannot be read as text, 'utf-8' codec can't decode byte 0xe9",),
        table_task("", "file: rows.parquet"),
        prepare=bytes_as_text(b"caf", b"caf\xe9"),
    ),
    Case(
        "Parquet bytes that are not UTF-8",
        CHECK,
        ("t/rows.parquet:2: the column 'text' cannot be read as text", "write it as text in UTF-8, or leave it out."),
        table_task("", "file: rows.parquet"),
        prepare=parquet_of(of_pyarrow("binary"), b"caf", b"caf\xe9"),
    ),
    Case(
        "a Parquet date that no calendar has",
        CHECK,
        ("t/rows.parquet:2: the column 'text' cannot be read as text",),
        table_task("", "file: rows.parquet"),
        prepare=parquet_of(of_pyarrow("date32"), 0, 2**31 - 1),
    ),
    Case(
        "a Parquet time that no calendar has",
        CHECK,
        ("t/rows.parquet:1: the column 'text' cannot be read as text",),
        table_task("", "file: rows.parquet"),
        prepare=parquet_of(of_pyarrow("timestamp", "ms"), 2**62),
    ),
    Case(
        "a Parquet time zone that there is not",
        CHECK,
        ("t/rows.parquet:1: the column 'text' cannot be read as text",),
        table_task("", "file: rows.parquet"),
        prepare=parquet_of(of_pyarrow("timestamp", "us", "Mars/Olympus"), 0),
    ),
    Case(
        "a label of Parquet that is no number",
        CHECK,
        ("t/rows.parquet:2: an answer or option is empty",),
        table_task("", "file: rows.parquet"),
        prepare=parquet("t/rows.parquet", text=["a", "b"], label=[1.0, float("nan")]),
    ),
    Case("an empty CSV file", CHECK, ("t/rows.csv", "no rows"), table_task("")),
    Case("a CSV file of a header alone", CHECK, ("t/rows.csv", "no rows"), table_task("text,label\n")),
    Case("an empty JSONL file", CHECK, ("t/train.jsonl", "no rows"), task(train=[])),
    Case("a JSONL file of blank lines", CHECK, ("t/train.jsonl", "no rows"), {**task(), "t/train.jsonl": "\n\n \n"}),
    accepted(
        "an empty test file", CHECK, "There are no test rows; the task can be used, not evaluated", files=task(test=[])
    ),
    Case(
        "an empty table named by its columns",
        "tasks check a.csv:text:label",
        ("a.csv holds no rows",),
        {"a.csv": "text,label\n"},
    ),
]

BROKEN = [
    Case(
        "a line of JSON that is cut",
        CHECK,
        ("t/train.jsonl:9: broken JSON at character",),
        {**task(), "t/train.jsonl": lines(*TRAIN) + '{"text": "x", "la'},
    ),
    Case(
        "JSON with single quotes",
        CHECK,
        ("t/train.jsonl:1: broken JSON at character 2",),
        {**task(), "t/train.jsonl": "{'text': 'x'}\n"},
    ),
    Case(
        "a JSON document over several lines",
        CHECK,
        ("t/train.jsonl:1: broken JSON", f"expected one object a line; {JSON_HINT}"),
        {**task(), "t/train.jsonl": json.dumps(list(TRAIN), indent=1)},
    ),
    Case(
        "a JSON list a line",
        CHECK,
        ("t/train.jsonl:1: expected one JSON object a line", "found a list"),
        {**task(), "t/train.jsonl": '["x", "good"]\n'},
    ),
    Case(
        "a whole list of rows on one line",
        CHECK,
        ("t/train.jsonl:1: expected one JSON object a line", f"found a list of them; {JSON_HINT}"),
        {**task(), "t/train.jsonl": json.dumps(list(TRAIN))},
    ),
    Case(
        "a number on a line",
        CHECK,
        ("t/train.jsonl:1: expected one JSON object a line", "found a text or number"),
        {**task(), "t/train.jsonl": "12\n"},
    ),
    Case(
        "null on a line",
        CHECK,
        ("t/train.jsonl:1: expected one JSON object a line", "found null"),
        {**task(), "t/train.jsonl": "null\n"},
    ),
    Case(
        "a key that stands twice in a row",
        CHECK,
        ("t/train.jsonl:2: the key 'label' stands twice", "keep one of them"),
        {**task(), "t/train.jsonl": lines(TRAIN[0]) + '{"text": "x", "label": "good", "label": "bad"}\n'},
    ),
    Case(
        "a key that stands twice within a column",
        CHECK,
        ("t/train.jsonl:1: the key 'a' stands twice",),
        {**task(), "t/train.jsonl": '{"text": {"a": 1, "a": 2}, "label": "good"}\n'},
    ),
    Case(
        "JSON a hundred thousand deep",
        CHECK,
        ("t/train.jsonl:1: ", "nested"),
        {**task(), "t/train.jsonl": f'{{"text": {"[" * 100_000}{"]" * 100_000}}}\n'},
    ),
    Case(
        "JSON two hundred deep",
        CHECK,
        ("t/train.jsonl:1: ", "nested more than 100 deep"),
        {**task(), "t/train.jsonl": f'{{"text": {"[" * 200}{"]" * 200}, "label": "good"}}\n'},
    ),
    Case(
        "JSON in Latin-1",
        CHECK,
        ("t/train.jsonl:2: not UTF-8, the byte 0xe9 cannot be read; save the file as UTF-8",),
        {**task(), "t/train.jsonl": lines(TRAIN[0]).encode() + '{"text": "caf\u00e9"}\n'.encode("latin-1")},
    ),
    Case("a CSV file in UTF-16", CHECK, ("t/rows.csv: the file is UTF-16",), table_task(CSV.encode("utf-16"))),
    Case("a CSV file of NUL bytes", CHECK, ("t/rows.csv:1: a NUL byte",), table_task(bytes(1000))),
    Case(
        "a NUL byte in the middle",
        CHECK,
        ("t/rows.csv:3: a NUL byte",),
        table_task(CSV.replace("film 1", "film\0")),
    ),
    Case(
        "a row with a field too many",
        CHECK,
        ("t/rows.csv:22: expected 2 fields as in the header, found 3", "double quotes"),
        table_task(CSV + "good, if long,good\n"),
    ),
    Case(
        "a row with a field too few",
        CHECK,
        ("t/rows.csv:22: expected 2 fields as in the header, found 1",),
        table_task(CSV + "good\n"),
    ),
    Case(
        "a quote that is not closed",
        CHECK,
        ("t/rows.csv:22: broken CSV", "quotes: none"),
        table_task(CSV + '"film,good\nplay,bad\n'),
    ),
    Case(
        "text behind a closing quote",
        CHECK,
        ("t/rows.csv:22: broken CSV", "quotes: none"),
        table_task(CSV + '"film" noir,good\n'),
    ),
    Case(
        "semicolons for commas",
        CHECK,
        ("t/rows.csv:1: expected fields between ','", "found the one column 'text;label'", 'delimiter: ";"'),
        table_task(CSV.replace(",", ";")),
    ),
    Case(
        "tabs for commas",
        CHECK,
        ("t/rows.csv:1: expected fields between ','", 'delimiter: "\\t"'),
        table_task(CSV.replace(",", "\t")),
    ),
    Case(
        "commas for tabs",
        CHECK,
        ("t/rows.tsv:1: expected fields between '\\t'", 'delimiter: ","'),
        table_task(CSV, "file: rows.tsv", "rows.tsv"),
    ),
    Case(
        "a delimiter of the task file that the table has not",
        CHECK,
        ("t/rows.csv:1: expected fields between ';'",),
        table_task(CSV, "file: rows.csv, delimiter: ';'"),
    ),
    Case("a table without a header", CHECK, ("t/rows.csv:2", "'text'", "lacks"), table_task(CSV.partition("\n")[2])),
    Case("a column without a name", CHECK, ("t/rows.csv:1: a column has no name",), table_task("text,\nx,good\n")),
    Case(
        "a table of pandas with its index",
        CHECK,
        ("t/rows.csv:1: a column has no name", "without its index (`index=False` in pandas)."),
        table_task(",text,label\n0,x,good\n"),
    ),
    Case(
        "empty columns of a spreadsheet",
        CHECK,
        ("t/rows.csv:1: a column has no name", "delete it if it is empty"),
        table_task("text,label,,\nx,good,,\n"),
    ),
    Case(
        "a line for Excel alone",
        CHECK,
        ("t/rows.csv:1: 'sep=;' tells Excel the delimiter and is no header; delete that line.",),
        table_task("sep=;\n" + CSV.replace(",", ";"), "file: rows.csv, delimiter: ';'"),
    ),
    Case("the same with commas", CHECK, ("t/rows.csv:1: 'sep=,' tells Excel",), table_task("sep=,\n" + CSV)),
    Case(
        "an empty field too many",
        CHECK,
        ("t/rows.csv:22: expected 2 fields as in the header, found 3; delete the empty field at its end.",),
        table_task(CSV + "film,good,\n"),
    ),
    Case(
        "two empty fields too many",
        CHECK,
        ("t/rows.csv:22: expected 2 fields", "found 4; delete the empty fields at its end."),
        table_task(CSV + "film,good,, \n"),
    ),
    Case(
        "semicolons for commas, some in quotes",
        CHECK,
        ("t/rows.csv:1: expected fields between ','", 'delimiter: ";"', "put its name in double quotes."),
        table_task('text;label\n"a; b";good\nc, d;bad\n'),
    ),
    *(
        Case(
            f"one column named {header} in {name}",
            CHECK,
            ("names the column 'text'", "the row lacks"),
            table_task(f"{header}\n{QUERIES}", f"file: {name}", name),
        )
        for header, name in (
            ('"Question, if any"', "rows.csv"),
            ('"Frage; deutsch"', "rows.csv"),
            ("Frage; deutsch", "rows.csv"),
            ('"a|b"', "rows.csv"),
            ("text, original", "rows.tsv"),
        )
    ),
    Case(
        "a column that stands twice",
        CHECK,
        ("t/rows.csv:1: the column 'text' stands twice",),
        table_task("text,text\n"),
    ),
    Case(
        "a group that there is not",
        CHECK,
        ("t/rows.csv:2: the column 'grup' is missing",),
        table_task(CSV, "file: rows.csv, group: grup"),
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
        files={**task(), "t/train.jsonl": lines(*TRAIN) + '{"text": NaN, "label": "good"}\n'},
    ),
]


def with_row(**row: object) -> dict[str, str]:
    return task_with("labels: [good, bad]\n", train=[*TRAIN, row])


BAD_ROWS = [
    Case(
        "an empty answer",
        CHECK,
        ("t/train.jsonl:9: an answer or option is empty", "bad_rows: drop"),
        with_row(text="x", label=""),
    ),
    Case(
        "an answer of spaces",
        CHECK,
        ("t/train.jsonl:9: an answer or option is empty",),
        with_row(text="x", label=" \n "),
    ),
    Case(
        "an answer that is null",
        CHECK,
        ("t/train.jsonl:9: an answer or option is empty",),
        with_row(text="x", label=None),
    ),
    Case(
        "a list of no answers",
        CHECK,
        ("t/train.jsonl:9: the answer column 'label' holds an empty list",),
        with_row(text="x", label=[]),
    ),
    Case(
        "an empty query",
        CHECK,
        ("t/train.jsonl:9: the query is empty", "Mend the row"),
        with_row(text=" ", label="good"),
    ),
    Case("a query that is null", CHECK, ("t/train.jsonl:9: the query is empty",), with_row(text=None, label="good")),
    Case(
        "a column that one row lacks",
        CHECK,
        ("t/train.jsonl:9: Template", "names the column 'text'", "['label', 'txt']"),
        with_row(txt="x", label="good"),
    ),
    Case(
        "a label outside the closed set",
        CHECK,
        ("t/train.jsonl:9: 'goood' is no label of task 't'", "'good', 'bad'", "Did you mean 'good'?"),
        with_row(text="x", label="goood"),
    ),
    Case(
        "a label in other letters",
        CHECK,
        ("t/train.jsonl:9: 'Good' is no label", "Did you mean 'good'?"),
        with_row(text="x", label="Good"),
    ),
    Case(
        "a label outside the set on the test side",
        CHECK,
        ("t/test.jsonl:5: 'mixed' is no label",),
        task_with("labels: [good, bad]\n", test=[*TEST, {"text": "x", "label": "mixed"}]),
    ),
    Case(
        "a test label that no training row has",
        CHECK,
        ("test.jsonl:5: no training row of task 't' has the label 'mixed', which stands in 1 test row.", "`labels:`"),
        task(test=[*TEST, {"text": "x", "label": "mixed"}]),
    ),
    Case(
        "one label in all training rows",
        CHECK,
        ("t/task.yaml: task 't' takes its labels from the training rows", "'good'", "two labels"),
        task(train=[TRAIN[0], TRAIN[2]], test=[TEST[0]]),
    ),
    Case(
        "several labels in a row",
        CHECK,
        ("t/train.jsonl:9: task 't' is multi-label: this row has ['bad', 'good']", "yes/no task"),
        with_row(text="x", label=["good", "bad"]),
    ),
    accepted(
        "an answer with a blank line, which a model may have",
        CHECK,
        "1 answer with a blank line",
        files=task(FREE, train=[{"text": "x", "label": "a\n\nb"}]),
    ),
    Case(
        "half a character",
        CHECK,
        ("t/train.jsonl:9: a text holds half a character, '\\ud83d'",),
        with_row(text="\ud83d", label="good"),
    ),
    Case(
        "a class number without a name",
        CHECK,
        ("t/train.jsonl:9: The column 'label' holds '7', which class_names does not name; it names ['bad', 'good']",),
        task_with("class_names: {label: {good: fine, bad: poor}}\n", train=[*TRAIN, {"text": "x", "label": 7}]),
    ),
    Case(
        "a row without a class",
        CHECK,
        ("t/train.jsonl:9: the column 'label' is -1: the row has no label",),
        task_with("class_names: {label: {good: fine, bad: poor}}\n", train=[*TRAIN, {"text": "x", "label": -1}]),
    ),
    Case(
        "an answer that is no option",
        CHECK,
        ("t/train.jsonl:1: the answer 'c' is none of the row's options ['a', 'b']",),
        task(CHOICES, train=[{"text": "x", "label": "c", "options": ["a", "b"]}]),
    ),
    Case(
        "choices that are no list",
        CHECK,
        ("t/train.jsonl:1: ", "expected a non-empty list, found 'a, b'"),
        task(CHOICES, train=[{"text": "x", "label": "a", "options": "a, b"}]),
    ),
    Case(
        "no choices",
        CHECK,
        ("t/train.jsonl:1: ", "expected a non-empty list, found []"),
        task(CHOICES, train=[{"text": "x", "label": "a", "options": []}]),
    ),
    Case(
        "choices that are missing",
        CHECK,
        ("t/train.jsonl:1: ", "'options'", "found nothing"),
        task(CHOICES, train=[{"text": "x", "label": "a"}]),
    ),
    Case(
        "a choice that is empty",
        CHECK,
        ("t/train.jsonl:1: An option in the column 'options' is empty",),
        task(CHOICES, train=[{"text": "x", "label": "a", "options": ["a", " "]}]),
    ),
    Case(
        "choices in a column that is missing",
        CHECK,
        ("t/train.jsonl:1: the column 'c' is missing",),
        task(spoilt("options", "b, c", CHOICES), train=[{"text": "x", "label": "a", "b": "a"}]),
    ),
    Case(
        "references that are no list",
        CHECK,
        ("t/train.jsonl:1: the column 'r' lists the accepted answers; expected a list, found 'a'",),
        task(FREE + "references: r\n", train=[{"text": "x", "label": "a", "r": "a"}]),
    ),
    Case(
        "an empty reference",
        CHECK,
        ("t/train.jsonl:1: an answer or option is empty",),
        task(FREE + "references: r\n", train=[{"text": "x", "label": "a", "r": [""]}]),
    ),
    Case(
        "all rows dropped",
        CHECK,
        ("t/task.yaml: task 't' has no test rows left; dropped: 12 (label outside the closed set)",),
        task_with("labels: [x, y]\nbad_rows: drop\n"),
    ),
    Case(
        "all test rows dropped",
        CHECK,
        ("t/task.yaml: task 't' has no test rows left; dropped: 1 (empty answer)",),
        task_with("bad_rows: drop\n", test=[{"text": "x", "label": ""}]),
    ),
    Case(
        "too few rows to split",
        CHECK,
        ("too few rows to leave any for testing", "test_fraction to 0"),
        table_task("text,label\nx,good\ny,bad\n"),
    ),
    Case(
        "all rows of one group",
        CHECK,
        ("all 20 rows have the same value of 'customer', the group, so none is left for training; set test_fraction",),
        table_task(CSV.replace("\n", ",x\n").replace("label,x", "label,customer"), "file: rows.csv, group: customer"),
    ),
    Case(
        "all rows with one query",
        CHECK,
        ("all 3 rows have the same query, so none is left for training; set test_fraction to 0, or add rows.",),
        {**table_task("text,label\nx,a\nX,b\nx ,c\n"), "t/task.yaml": spoilt(DATA, "data: {file: rows.csv}\n", FREE)},
    ),
    Case(
        "one row to split",
        CHECK,
        ("has no training rows: there is one row, so none is left",),
        {**table_task("text,label\nx,a\n"), "t/task.yaml": spoilt(DATA, "data: {file: rows.csv}\n", FREE)},
    ),
    Case(
        "a split that takes all rows",
        CHECK,
        ("test_fraction is 0.9 of 2 rows, so none is left",),
        {
            **table_task("text,label\nx,a\ny,b\n"),
            "t/task.yaml": spoilt(DATA, "data: {file: rows.csv, test_fraction: 0.9}\n", FREE),
        },
    ),
    accepted(
        "rows without an option that are to be dropped",
        CHECK,
        "Dropped: 2 (empty option).",
        files=task(
            f"{CHOICES.replace(', test: test.jsonl', '')}bad_rows: drop\n",
            train=[{"text": text, "label": "a", "options": options} for text, options in OPTIONS.items()],
            test=[],
        ),
    ),
    accepted(
        "bad rows that are to be dropped",
        CHECK,
        "Dropped: 1 (empty answer).",
        files=task_with("bad_rows: drop\n", train=[*TRAIN, {"text": "x", "label": ""}]),
    ),
]

LONG = "text too long"
LONG_AND_BOTH = [
    Case(
        "a query of a megabyte",
        CHECK,
        ("t/train.jsonl:9: the query has 1,000,001 characters; max_characters is 1,000,000.", "bad_rows: drop"),
        with_row(text=MEGABYTE, label="good"),
    ),
    Case(
        "an answer of a megabyte",
        CHECK,
        ("t/train.jsonl:1: the answer has 1,000,001 characters; max_characters is 1,000,000.",),
        task(FREE, train=[{"text": "x", "label": MEGABYTE}]),
    ),
    Case(
        "an option of a megabyte",
        CHECK,
        ("t/train.jsonl:1: the option has 1,000,001 characters",),
        task(CHOICES, train=[{"text": "x", "label": "a", "options": ["a", MEGABYTE]}]),
    ),
    Case(
        "a reference of a megabyte",
        CHECK,
        ("t/train.jsonl:1: the answer has 1,000,001 characters",),
        task(FREE + "references: r\n", train=[{"text": "x", "label": "a", "r": [MEGABYTE]}]),
    ),
    Case(
        "a field of ten megabytes",
        CHECK,
        ("t/rows.csv:22: the column 'text' has 10,000,010 characters; max_characters is 1,000,000.",),
        table_task(f"{CSV}{MEGABYTE * 10},good\n"),
    ),
    Case(
        "a query longer than the task allows",
        CHECK,
        ("t/train.jsonl:1: the query has 15 characters; max_characters is 14.",),
        task_with("max_characters: 14\n"),
    ),
    Case(
        "a text of one character too many",
        CHECK,
        ("the query has 2 characters; max_characters is 1.",),
        task_with("max_characters: 1\n", train=[{"text": "xy", "label": "a"}]),
    ),
    accepted(
        "a field of ten megabytes to be dropped",
        CHECK,
        f"Dropped: 1 ({LONG}).",
        files=table_task(f"{CSV}{MEGABYTE * 10},good\n", more="bad_rows: drop\n"),
    ),
    accepted(
        "a query of a megabyte to be dropped",
        CHECK,
        f"Dropped: 1 ({LONG}).",
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
    Case(
        "a template at fault where rows may be dropped",
        CHECK,
        ("t/train.jsonl:1: Template", "more than 4,000,000 characters"),
        task(spoilt("{{ text }}", "{{ text * 99999999 }}", KEYS) + DATA + "bad_rows: drop\n"),
    ),
    Case(
        "a training row that is a test row",
        CHECK,
        (
            "t/task.yaml: task 't' has 1 training row whose query stands in test too",
            "train.jsonl:9, like test.jsonl:2.",
            "on_both_sides: drop",
        ),
        task_with("on_both_sides: refuse\n", train=[*TRAIN, TEST[1]]),
    ),
    Case(
        "training rows that are test rows but for case and spaces",
        CHECK,
        ("has 2 training rows whose query stands in test too; the first is train.jsonl:9, like test.jsonl:4.",),
        task_with("on_both_sides: refuse\n", train=[*TRAIN, {"text": " PLAY 3\twas dull", "label": "good"}, TEST[0]]),
    ),
    Case(
        "only rows that stand in test",
        CHECK,
        ("t/task.yaml: task 't' has no training rows left; dropped: 4 (training row that stands in test too)",),
        task(train=TEST),
    ),
    accepted(
        "training rows that are test rows, by default",
        CHECK,
        "Dropped: 1 (training row that stands in test too).",
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
