"""Rows stay what the person wrote, and a broken file is named with its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manyicl.errors import MachineError, UserError
from manyicl.tasks.hub import read_hub_rows
from manyicl.tasks.rows import read_rows

AWKWARD = ["007", "NA", "1", "null", "1.50", "", "true"]


def columns(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [row.columns for row in read_rows(path, **options)]


def test_csv_values_stay_text_as_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"t,{value}\n" for value in AWKWARD))
    assert [row["label"] for row in columns(path)] == AWKWARD


def test_json_numbers_stay_as_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1.50, "b": 10000000000000000000000, "c": "007", "d": [1, 2.0], "e": null, "f": true}\n')
    assert columns(path) == [
        {"a": "1.50", "b": "10000000000000000000000", "c": "007", "d": ["1", "2.0"], "e": None, "f": True}
    ]


def test_parquet_gives_the_rows_of_the_json(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "a", "n": 7, "choices": ["x", "y"]}, {"text": "007", "n": 8, "choices": ["z"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert columns(tmp_path / "rows.parquet") == columns(tmp_path / "rows.jsonl")


def test_a_number_of_parquet_that_is_none_is_null_and_bytes_are_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"n": [1.5, float("nan"), None], "list": [[float("nan")], [], None], "b": [b"x", b"", None]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert columns(tmp_path / "rows.parquet") == [
        {"n": "1.5", "list": [None], "b": "x"},
        {"n": None, "list": [], "b": ""},
        {"n": None, "list": None, "b": None},
    ]


def test_pictures_beside_the_texts_of_a_parquet_table_are_null(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    picture = pyarrow.array([{"bytes": b"\x89PNG\xff", "path": "a.png"}])
    table = pyarrow.table({"text": ["a cat"], "image": picture})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert columns(tmp_path / "rows.parquet") == [{"text": "a cat", "image": {"bytes": None, "path": "a.png"}}]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('"Question, if any"\nWhy?\nWho, me?\n', "Question, if any"),
        ('"Frage; deutsch"\nWarum; ja\nWer; ich\n', "Frage; deutsch"),
        ("Frage; deutsch\nWarum?\nWer; ich?\n", "Frage; deutsch"),
        ('"a|b"\nc\n', "a|b"),
    ],
)
def test_the_name_of_the_one_column_may_hold_a_mark(tmp_path: Path, content: str, name: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content.replace("Who, me?", '"Who, me?"'))
    assert [list(row) for row in columns(path)] == [[name]] * (content.count("\n") - 1)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_byte_order_mark_and_crlf_are_accepted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    between = "," if suffix == "csv" else "\t"
    path.write_bytes(f'\ufefftext{between}label\r\n"two\r\nlines"{between}ä\r\nb{between}c\r\n'.encode())
    rows = read_rows(path)
    assert [row.columns for row in rows] == [{"text": "two\nlines", "label": "ä"}, {"text": "b", "label": "c"}]
    assert [row.line for row in rows] == [2, 4]


def test_jsonl_lines_end_at_line_feeds_only_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"t": "a\u2028b\u0085c"}\r\n\r\n{"t": "d"}'.encode())
    rows = read_rows(path)
    assert [(row.columns["t"], row.line, row.origin) for row in rows] == [
        ("a\u2028b\u0085c", 1, "rows.jsonl:1"),
        ("d", 3, "rows.jsonl:3"),
    ]


def test_quotes_are_ordinary_where_the_task_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n"Yes" he said\ta\n')
    with pytest.raises(UserError, match=r"rows\.tsv:2: broken TSV.*quotes: none"):
        read_rows(path)
    assert columns(path, quotes="none") == [{"text": '"Yes" he said', "label": "a"}]


def test_a_field_may_be_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text,label\n{'x' * 200_000},a\n")
    assert len(columns(path)[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', r"rows\.jsonl:2: broken JSON at character"),
        ("rows.jsonl", b"[1, 2]\n", r"rows\.jsonl:1: not a row; expected one JSON object a line.*found \[1, 2\]"),
        ("rows.csv", b'text,label\na,b\n"c,d\n', r"rows\.csv:3: broken CSV"),
        (
            "rows.csv",
            b"text,label\na,b\na,b,c\n",
            r"rows\.csv:3: the row does not fit the header; expected 2 fields, found 3",
        ),
        ("rows.csv", b"text,text\na,b\n", r"rows\.csv:1: the column 'text' occurs twice"),
        ("rows.csv", b"text,\na,b\n", r"rows\.csv:1: a column has no name"),
        ("rows.csv", b"text,label\na,\xe4\n", r"rows\.csv:2: not text in UTF-8; found the byte 0xe4"),
        ("rows.csv", "text,label\n".encode("utf-16"), r"rows\.csv: the file is UTF-16"),
        ("rows.parquet", b"no parquet", r"rows\.parquet: not a readable Parquet file"),
        ("rows.xlsx", b"", r"expected one of .*\.csv.* found the suffix '\.xlsx'"),
    ],
)
def test_a_broken_file_is_refused_by_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(path)


def test_a_mistyped_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "tickets.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"tickts\.csv: the file does not exist\. Did you mean 'tickets\.csv'\?"):
        read_rows(tmp_path / "tickts.csv")


class FakeClasses:
    names = ("World", "Sports")


class FakeDataset:
    features: dict[str, object] = {"text": object(), "label": FakeClasses()}  # noqa: RUF012

    def __iter__(self) -> Iterator[dict[str, object]]:
        return iter([{"text": "a", "label": 1, "n": 3}, {"text": "b", "label": -1, "n": 4}])


def test_hub_rows_have_class_names_instead_of_numbers() -> None:
    asked: list[object] = []

    def load_dataset(*args: object, **kwargs: object) -> FakeDataset:
        asked.append((args, kwargs))
        return FakeDataset()

    rows = read_hub_rows("owner/name", "train", config="big", load_dataset=load_dataset)
    assert [row.columns for row in rows] == [
        {"text": "a", "label": "Sports", "n": "3"},
        {"text": "b", "label": None, "n": "4"},
    ]
    assert asked == [(("owner/name", "big"), {"split": "train", "revision": None})]


def test_bytes_of_the_hub_that_are_no_text_are_refused_by_column_and_row() -> None:
    rows = [{"text": b"a"}, {"text": "caf\u00e9".encode("latin-1")}]
    with pytest.raises(UserError, match=r"hf:owner/name train:2: the column 'text' cannot be read as text"):
        read_hub_rows("owner/name", "train", load_dataset=lambda *_, **__: rows)


@pytest.mark.parametrize(
    ("raised", "expected"), [(ValueError("no split"), UserError), (ConnectionError("down"), MachineError)]
)
def test_a_dataset_that_cannot_be_had_is_told_from_a_hub_that_cannot_be_reached(
    raised: Exception, expected: type[Exception]
) -> None:
    def load_dataset(*args: object, **kwargs: object) -> FakeDataset:
        raise raised

    with pytest.raises(expected, match="hf:owner/name train"):
        read_hub_rows("owner/name", "train", load_dataset=load_dataset)
