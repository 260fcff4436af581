"""Bodies of requests become rows, or say for each row why it is none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyicl.errors import UserError
from manyicl.server.prediction_json import error_json
from manyicl.server.row_input import (
    InputRow,
    RowKind,
    at_most,
    body_and_rows,
    json_body,
    kind_of_upload,
    rows_in,
    rows_in_list,
    with_numbers,
)
from manyicl.tasks.rows import LocatedRow
from manyicl.tasks.values import NumberText


def columns_or_code(rows: Iterable[InputRow]) -> list[object]:
    return [row.columns if isinstance(row, LocatedRow) else (row.code, row.row) for row in rows]


def read(text: str | bytes, kind: RowKind = "json_lines") -> list[object]:
    content = text.encode() if isinstance(text, str) else text
    return columns_or_code(rows_in([content], kind, "rows"))


def test_a_bad_line_of_json_lines_has_its_error_in_its_place_and_takes_no_other_with_it() -> None:
    lines = b'{"text": "a"}\r\n\n{"text": \n"text"\n\xff\xfe{"text": "b"}\n{"text": 1.50}'
    found = [{"text": "a"}, ("broken_json", 3), ("not_an_object", 4), ("not_utf8", 5), {"text": "1.50"}]
    assert read(lines) == found


def test_numbers_stay_as_they_are_written() -> None:
    (row,) = rows_in([b'{"price": 1.50, "ids": [1e400, 7], "gone": NaN}'], "json_lines", "rows")
    assert isinstance(row, LocatedRow)
    assert row.columns == {"price": "1.50", "ids": ["1e400", "7"], "gone": None}
    assert isinstance(row.columns["price"], NumberText)


@given(
    st.lists(st.sampled_from(["é", "日本", "\n", "\r\n", '"', "{}", "\\u2028", ":", "\x0b"]), max_size=30), st.data()
)
def test_where_a_body_is_cut_into_pieces_makes_no_difference(parts: list[str], data: st.DataObject) -> None:
    content = "".join(parts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=5)))
    pieces = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    assert columns_or_code(rows_in(pieces, "json_lines", "rows")) == read(content)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm() -> None:
    assert read(b'\xef\xbb\xbf{"text": "a"}\r\n') == [{"text": "a"}]
    assert read(b"\xef\xbb\xbftext,label\r\na,b\r\n", "csv") == [{"text": "a", "label": "b"}]


def test_rows_of_a_table_that_do_not_fit_its_header_are_errors_in_their_place() -> None:
    text = 'text,label\n"two\nlines",a\nonly one\nx,y,z\nlast,b\n'
    found = [{"text": "two\nlines", "label": "a"}, *[("wrong_number_of_fields", line) for line in (4, 5)]]
    assert read(text, "csv") == [*found, {"text": "last", "label": "b"}]


def test_tables_of_tabs_and_semicolons_are_read() -> None:
    assert read("text\tlabel\na, b\tc\n", "tsv") == [{"text": "a, b", "label": "c"}]
    assert read("text;label\na;b\nc;d\n", "csv")[0] == {"text": "a", "label": "b"}


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"text,label\na,b\n" + b'"open,c\n' * 3, "csv", "broken_csv"),
        (b"text,text\na,b\n", "csv", "repeated_column"),
        (b"\xff\xfea\0", "json_lines", "not_utf8"),
        (b"\x1f\x8bpacked", "json_lines", "not_utf8"),
        (b"PK\x03\x04", "csv", "not_utf8"),
    ],
)
def test_a_body_after_whose_mistake_nothing_can_be_read_is_refused_whole(
    content: bytes, kind: RowKind, code: str
) -> None:
    with pytest.raises(UserError) as refused:
        list(rows_in([content], kind, "rows"))
    assert refused.value.code == code


def test_remedies_name_no_option_of_the_command_line() -> None:
    with pytest.raises(UserError) as refused:
        list(rows_in([b"a;b|c\nd;e|f\ng;h|i\n"], "csv", "rows"))
    assert refused.value.code == "several_delimiters"
    assert "--delimiter" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "code"), [("\\ud83d", "half_a_character"), ("\\u0000", "nul_character"), ("\\\\u0000", None)]
)
@pytest.mark.parametrize("pattern", ['{"text": "a%s"}', '{"a%s": "b"}', '{"a": {"b": ["%s"]}}'])
def test_texts_that_no_database_can_hold_are_errors_of_their_row(value: str, code: str | None, pattern: str) -> None:
    line = (pattern % value).encode()
    expected = json.loads(line) if code is None else (code, 1)
    assert read(line) == [expected]
    assert columns_or_code(rows_in_list([json.loads(line)], "rows")) == [expected]


def test_the_rows_of_a_json_body_keep_their_numbers_and_its_other_keys_become_numbers() -> None:
    body = b'{"rows": [{"text": 1.0}, "text", {"text": "\\ud800"}], "retrieve": 4, "abstain_below": 0.80, "name": "4"}'
    rest, rows = body_and_rows(body, "rows", "rows")
    assert rest == {"retrieve": 4, "abstain_below": 0.8, "name": "4"}
    assert columns_or_code(rows) == [{"text": "1.0"}, ("not_an_object", 2), ("half_a_character", 3)]


def test_numbers_of_a_list_that_was_parsed_elsewhere_become_text() -> None:
    assert columns_or_code(rows_in_list([{"a": 1, "b": [2.5, True], "c": None}], "rows")) == [
        {"a": "1", "b": ["2.5", True], "c": None}
    ]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "broken_json"),
        (b"[]", "not_an_object"),
        (b"\xff", "not_utf8"),
        (b'{"a": 1, "a": 2}', "repeated_key"),
        (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "nested_too_deep"),
        (b'{"a": ' + b"[" * 100_000, "nested_too_deep"),
        (b'{"a": "\\ud800"}', "half_a_character"),
        (b'{"rows": {"text": "a"}}', "not_a_list"),
    ],
)
def test_a_json_body_that_is_none_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(UserError) as refused:
        body_and_rows(body, "rows", "rows")
    assert refused.value.code == code


def test_numbers_of_any_size_become_numbers_without_an_error() -> None:
    body = b'{"big": %s, "small": -3, "huge": 1e999, "nan": NaN}' % (b"9" * 6000)
    assert with_numbers(json_body(body)) == {"big": float("inf"), "small": -3, "huge": float("inf"), "nan": None}


def test_more_rows_than_a_request_may_have_are_refused_before_they_are_read() -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"text": "a"}\n' * 10
        raise AssertionError("read on")

    with pytest.raises(UserError) as refused:
        list(at_most(rows_in(pieces(), "json_lines", "rows"), 9))
    assert refused.value.code == "too_many_rows"


def test_the_kind_of_an_upload_is_its_content_type_or_the_ending_of_its_name() -> None:
    assert kind_of_upload("text/csv; charset=utf-8", "rows.jsonl") == "csv"
    assert kind_of_upload("application/octet-stream", "rows.TSV") == "tsv"
    assert kind_of_upload(None, "rows.jsonl") == "json_lines"
    with pytest.raises(UserError) as refused:
        kind_of_upload(None, "rows.xlsx")
    assert refused.value.code == "wrong_content_type"


WORDS = rb"""{ } [ ] " : , ; \ \u0000 \ud800 1e999 NaN - text "text" sep=; null""".split()
CONTENTS = st.lists(
    st.sampled_from([*WORDS, b"\t", b"\n", b"\r", b"\0", b" ", b"\xff", b"\xef\xbb\xbf", "é".encode(), b"\x1f\x8b"]),
    max_size=40,
).map(b"".join) | st.binary(max_size=60)


@given(CONTENTS, st.sampled_from(["json_lines", "csv", "tsv"]))
def test_whatever_a_body_holds_it_is_rows_or_errors_that_can_be_written(content: bytes, kind: RowKind) -> None:
    try:
        rows = list(rows_in([content], kind, "rows"))
    except UserError as error:
        rows = [error]
    for row in rows:
        written = row.columns if isinstance(row, LocatedRow) else error_json(row)
        json.dumps(written, ensure_ascii=False).encode()


@given(CONTENTS)
def test_whatever_a_json_body_holds_it_is_an_object_or_an_error_that_can_be_written(content: bytes) -> None:
    for body in (content, b'{"rows": ' + content + b"}", b'{"rows": [' + content + b"]}", b'{"key": ' + content + b"}"):
        try:
            rest, rows = body_and_rows(body, "rows", "rows")
        except UserError as error:
            rest, rows = {}, [error]
        json.dumps(rest).encode()
        for row in rows:
            written = row.columns if isinstance(row, LocatedRow) else error_json(row)
            json.dumps(written, ensure_ascii=False).encode()
