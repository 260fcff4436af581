"""Rows stay what the person wrote, and a broken file is named with its line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manyicl.errors import MachineError, UserError
from manyicl.tasks.hub import read_hub_rows
from manyicl.tasks.rows import checked_header, column_names, iter_rows, read_rows

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


def test_numbers_of_parquet_have_the_digits_of_their_own_precision(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = {"half": pyarrow.float16(), "single": pyarrow.float32(), "double": pyarrow.float64()}
    # 1e10 is beyond a number of 16 bits.
    rows = {
        name: pyarrow.array([0.1, 3.0, None if name == "half" else 1e10, None], kind) for name, kind in kinds.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    read = columns(tmp_path / "rows.parquet")
    assert [row["single"] for row in read] == [row["double"] for row in read] == ["0.1", "3.0", "10000000000.0", None]
    assert [row["half"] for row in read] == ["0.1", "3.0", None, None]
    # From the Hub they are the same texts; `datasets` reads the file here, without the network.
    assert [row.columns for row in read_hub_rows(str(tmp_path), "train")] == read


def test_a_column_of_vectors_from_the_hub_stays_a_list(tmp_path: Path) -> None:
    from datasets import Array2D, Dataset, Features, Value

    features = Features({"text": Value("string"), "vectors": Array2D((1, 2), "float32")})
    Dataset.from_dict({"text": ["a"], "vectors": [[[0.5, 1.0]]]}, features=features).to_parquet(
        tmp_path / "train.parquet"
    )
    assert [row.columns for row in read_hub_rows(str(tmp_path), "train")] == [
        {"text": "a", "vectors": [["0.5", "1.0"]]}
    ]


def test_whole_numbers_of_parquet_are_exact(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = {
        "half": pyarrow.array([65504.0, 2049.0, float("inf")], pyarrow.float16()),
        "single": pyarrow.array([123456792.0, -16777216.0, float("nan")], pyarrow.float32()),
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    assert columns(tmp_path / "rows.parquet") == [
        {"half": "65504.0", "single": "123456792.0"},
        {"half": "2048.0", "single": "-16777216.0"},
        {"half": "inf", "single": None},
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


def test_names_in_a_header_are_compared_in_linear_time() -> None:
    names = [f"column {i}" for i in range(200_000)]
    assert checked_header(names) == names  # in quadratic time, this would take minutes
    with pytest.raises(UserError, match="the column 'column 7' occurs twice"):
        checked_header([*names, "column 7"])


def test_a_packed_file_that_is_broken_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tickets.csv.gz"
    path.write_bytes(gzip.compress(b'text,label\n"a,b\n'))
    with pytest.raises(UserError, match="broken CSV"):
        read_rows(path)


def test_a_blank_line_between_rows_of_one_column_is_an_empty_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('\ntext\n\na\n\n\n"b\nc"\nd\n\n\n')
    rows = [(row.columns["text"], row.line) for row in read_rows(path)]
    assert rows == [("", 3), ("a", 4), ("", 5), ("", 6), ("b\nc", 7), ("d", 9)]
    assert column_names(path) == ["text"]
    path.write_text("text,label\n\na,b\n\nc,d\n\n")
    assert [(row.columns["text"], row.line) for row in read_rows(path)] == [("a", 3), ("c", 5)]


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
        ("rows.xls", b"", r"expected one of .*\.csv.* found the suffix '\.xls'"),
    ],
)
def test_a_broken_file_is_refused_by_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(path)


TICKETS = (
    "number;body;team\n"
    '1;"Rechnung für März, bitte prüfen";billing\n'
    '2;"The app says ""error; 504""\nand closes";technical\n'
    "3;;accounts\n"
    "4;Lösch mein Konto;accounts\n"
)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_delimiter_is_found_where_the_usual_one_leaves_the_header_whole(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "tickets.csv"
    rows = [["number", "body"], ["1", "März, bitte"], ["2", f"error{delimiter} 504\nand"], ["3", ""]]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert [list(row.values()) for row in columns(path)] == rows[1:]
    assert columns(path, delimiter=delimiter) == columns(path)


def test_a_delimiter_is_never_guessed_where_the_header_has_two_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a;b,c;d\n1;2,3;4\n5;6,7;8\n")
    assert columns(path) == [{"a;b": "1;2", "c;d": "3;4"}, {"a;b": "5;6", "c;d": "7;8"}]


def test_commas_are_found_in_a_file_that_is_named_for_tabs(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("text,label\na,b\n")
    assert columns(path) == [{"text": "a", "label": "b"}]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_table_is_read_in_the_encoding_that_is_named(tmp_path: Path, encoding: str, ends: str, suffix: str) -> None:
    path, plain = tmp_path / f"tickets{suffix}", tmp_path / "plain.csv"
    plain.write_text(TICKETS, encoding="utf-8")
    content = TICKETS.replace("\n", ends).encode(encoding)
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    read = read_rows(path, encoding=encoding)
    assert [row.columns for row in read] == columns(plain)
    assert [row.line for row in read] == [2, 3, 5, 6]


def test_an_accent_at_the_end_of_a_piece_is_whole(tmp_path: Path) -> None:
    # U+0A0A is two line feeds to a reader of bytes, and 0D 0A a line end in no encoding of two bytes.
    text = "text,label\n\u0a0a\u0d0a\u0a0d,x\n"
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode("utf-16"))
    assert columns(path, encoding="utf-16") == [{"text": "\u0a0a\u0d0a\u0a0d", "label": "x"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            TICKETS.encode("cp1252"),
            r"looks like cp1252, in which a word there is 'für'\. Save it as UTF-8, or name its",
        ),
        (TICKETS.encode("utf-16"), r"the file is UTF-16; .* or name its encoding: `,encoding=NAME`"),
        (TICKETS.encode("utf-16-le"), r"It looks like UTF-16 \(utf-16-le\)\. Save it as UTF-8, or name its encoding"),
        (gzip.compress(TICKETS.encode()), r"packed with gzip; .* let the name of a packed table end in \.gz"),
        (b"PK\x03\x04", r"a ZIP archive or a spreadsheet; .* let the name of an Excel workbook end in \.xlsx"),
        (b"\xd0\xcf\x11\xe0", r"an old or a protected Office file; .* Save it as \.xlsx without a password, or as CSV"),
    ],
)
def test_what_a_table_looks_like_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tickets.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(path)


def test_other_alphabets_are_not_called_western(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nпривет мир,x\n".encode("cp1251"))
    with pytest.raises(UserError, match=r"rows\.csv:2: not text in UTF-8; found the byte 0xef\. Save it as"):
        read_rows(path)
    assert columns(path, encoding="cp1251") == [{"text": "привет мир", "label": "x"}]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_packed_text_gives_the_rows_of_the_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text('text,label\n"two\nlines",b\n' if suffix == "csv" else '{"text": "two\\nlines", "label": "b"}\n')
    packed = tmp_path / f"ROWS.{suffix.upper()}.GZ"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert columns(packed) == columns(path) == [{"text": "two\nlines", "label": "b"}]


def test_a_packed_file_that_explodes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(gzip.compress(b"text\n" + b"a" * 100_000_000, compresslevel=1))
    with pytest.raises(UserError, match="it unpacks to more than 67,108,864 bytes, over 100 times its size") as caught:
        for _ in iter_rows(path):
            pass
    assert caught.value.code == "unpacks_too_large"


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


def test_a_csv_file_of_the_hub_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\none,001\ntwo,NA\nthree,1.10\nfour,\n", encoding="utf-8")
    rows = read_hub_rows(str(tmp_path), "train")
    assert [row.columns["label"] for row in rows] == ["001", "NA", "1.10", ""]


def test_classes_that_a_csv_dataset_names_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n001,0\ntwo,1\n", encoding="utf-8")
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': negative\n          '1': positive\n---\n",
        encoding="utf-8",
    )
    rows = read_hub_rows(str(tmp_path), "train")
    assert [row.columns for row in rows] == [
        {"text": "001", "label": "negative"},
        {"text": "two", "label": "positive"},
    ]
    with pytest.raises(UserError) as error:
        read_hub_rows(str(tmp_path), "train", class_names={"label": {"0": "positive", "1": "negative"}})
    assert error.value.code == "other_classes"


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


def test_a_lone_quote_joins_no_rows_of_a_tsv(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n"I loved it\tpos\nit was dull\tneg\nhe said bye"\tneg\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.tsv:2: a double quote .* makes one row of 3 lines.*quotes: none"):
        columns(path)
    assert [row["label"] for row in columns(path, quotes="none")] == ["pos", "neg", "neg"]
    path.write_text('text\tlabel\n"two\nlines"\tpos\n', encoding="utf-8")
    assert columns(path) == [{"text": "two\nlines", "label": "pos"}]
