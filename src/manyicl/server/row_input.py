"""Body of a request -> rows: a list in JSON, JSON lines, or a CSV or TSV upload; each row, or why it cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from manyicl.checked import decoded_lines
from manyicl.errors import UserError, did_you_mean, located, quoted
from manyicl.tasks.rows import DELIMITERS, LocatedRow, json_row, json_value, table_rows
from manyicl.tasks.values import NumberText, as_text

RowKind = Literal["json_lines", "csv", "tsv"]
# A row, or why it cannot be used, in its place.
InputRow = LocatedRow | UserError

JSON_LINES = "application/x-ndjson"
ROW_CONTENT_TYPES: Mapping[str, RowKind] = {
    JSON_LINES: "json_lines",
    "application/ndjson": "json_lines",
    "application/jsonl": "json_lines",
    "application/jsonlines": "json_lines",
    "text/csv": "csv",
    "text/tab-separated-values": "tsv",
}
_SUFFIXES: Mapping[str, RowKind] = {
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".csv": "csv",
    ".tsv": "tsv",
}
# What rows of a request are called, in JSON and in place of the file of an error.
ROWS, DEMONSTRATIONS = "rows", "demonstrations"
# Codes of errors whose usual remedy names options of the command line.
_DELIMITER_CODES = ("several_delimiters", "wrong_delimiter")
_NUL = "\0"


def kind_of_upload(content_type: str | None, file_name: str | None) -> RowKind:
    """Tell of which kind an uploaded file is, by its content type or else by the ending of its name.

    Raises:
        UserError: If neither says.
    """
    if (kind := ROW_CONTENT_TYPES.get(media_type(content_type))) is not None:
        return kind
    suffix = f".{(file_name or '').rpartition('.')[2].lower()}"
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    what, expected = "a file of another kind was sent", f"one of {', '.join(_SUFFIXES)}"
    remedy = did_you_mean(suffix, _SUFFIXES) or "Export it as CSV."
    raise UserError("wrong_content_type", what, expected=expected, found=quoted(file_name), remedy=remedy)


def media_type(content_type: str | None) -> str:
    """Return the type without its parameters, in lower case.

    >>> media_type("Text/CSV; charset=utf-8")
    'text/csv'
    """
    return (content_type or "").partition(";")[0].strip().lower()


def rows_in(pieces: Iterable[bytes], kind: RowKind, place: str) -> Iterator[InputRow]:
    """Yield the rows of a text as its pieces come, with the line of each; empty lines of JSON lines have none.

    Args:
        pieces: The text in UTF-8, cut anywhere.
        kind: What it is.
        place: What errors name in place of a file.

    Raises:
        UserError: If nothing after a place in it can be read, as with a broken header or an open quote.
    """
    if kind == "json_lines":
        return map(_checked, _json_lines(_lines(pieces), place))
    return map(_checked, _table_rows(pieces, kind, place))


def rows_in_list(values: Iterable[object], place: str) -> Iterator[InputRow]:
    """Yield the rows of a list in a JSON body, with the number of each.

    Args:
        values: The parsed list; numbers become the text that JSON has for them.
        place: What errors name in place of a file.
    """
    for number, value in enumerate(values, start=1):
        if isinstance(value, Mapping):
            yield _checked(LocatedRow({name: as_text(part) for name, part in value.items()}, place, number))
        else:
            expected, found = 'an object, such as {"text": …}', quoted(value)
            yield UserError("not_an_object", "not a row", expected=expected, found=found, file=place, row=number)


def body_and_rows(body: bytes, rows_key: str, place: str) -> tuple[dict[str, Any], list[InputRow]]:
    """Parse a JSON body, in which the rows keep their numbers as they are written there.

    Args:
        body: The body, in UTF-8.
        rows_key: Key of its list of rows; no row where it is missing.
        place: What errors name in place of a file.

    Returns:
        The body without its rows, and the rows.

    Raises:
        UserError: If it is no JSON object, or the rows are no list.
    """
    content = _parsed(body)
    rows = content.pop(rows_key, [])
    with located(file="body"):
        _require_text(content)
    if not isinstance(rows, list):
        what, expected = f"{rows_key} is no list", "a list of objects"
        raise UserError("not_a_list", what, expected=expected, found=quoted(rows), field=rows_key)
    return {key: with_numbers(value) for key, value in content.items()}, list(rows_in_list(rows, place))


def json_body(body: bytes) -> dict[str, Any]:
    """Parse a JSON body, numbers as the text that is written there.

    Raises:
        UserError: If it is not UTF-8, no JSON, or no object.
    """
    content = _parsed(body)
    with located(file="body"):
        _require_text(content)
    return content


def _parsed(body: bytes) -> dict[str, Any]:
    expected = "one JSON object"
    with located(file="body"):
        content = json_value("".join(decoded_lines([body], "body")), expected)
        if isinstance(content, dict):
            return content
        raise UserError("not_an_object", "the body is no object", expected=expected, found=quoted(content))


def with_numbers(value: Any) -> Any:
    """Turn numbers that were read as text into numbers again; one that is too large is infinite.

    >>> with_numbers({"retrieve": NumberText("4"), "abstain_below": NumberText("0.80"), "name": "4"})
    {'retrieve': 4, 'abstain_below': 0.8, 'name': '4'}
    """
    if isinstance(value, dict):
        return {key: with_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [with_numbers(part) for part in value]
    if not isinstance(value, NumberText):
        return value
    is_whole = value.lstrip("-").isdecimal()
    # Python refuses to read integers of thousands of digits.
    return int(value) if is_whole and len(value) < 20 else float(value)


def at_most(rows: Iterable[InputRow], most: int) -> Iterator[InputRow]:
    """Yield up to ``most`` rows.

    Raises:
        UserError: If there are more, before they are read.
    """
    for number, row in enumerate(rows, start=1):
        if number > most:
            what, remedy = "there are too many rows in one request", "Send them in several requests, or as a job."
            raise UserError("too_many_rows", what, expected=f"at most {most:,}", remedy=remedy)
        yield row


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Cut pieces at line feeds; in UTF-8 no other character holds that byte."""
    started: list[bytes] = []
    for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for line in ended:
            yield b"".join([*started, line])
            started.clear()
        if rest:
            started.append(rest)
    if started:
        yield b"".join(started)


def _json_lines(lines: Iterable[bytes], place: str) -> Iterator[InputRow]:
    """Parse each line by itself, so that one that is no UTF-8, or no JSON, takes no other with it."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json_row("".join(decoded_lines([line], place)), place, number)
        except UserError as error:
            if error.row is None and number == 1:
                raise  # it begins like a file of another kind, such as a packed one
            error.row = number
            yield error


def _table_rows(pieces: Iterable[bytes], kind: RowKind, place: str) -> Iterator[InputRow]:
    usual = DELIMITERS[f".{kind}"]
    try:
        yield from table_rows(decoded_lines(pieces, place), place, usual)
    except UserError as error:
        if error.code in _DELIMITER_CODES:
            error.remedy = f"Write {usual!r} between fields."
        raise


def _checked(row: InputRow) -> InputRow:
    """Return a row whose texts a database and a tokenizer can hold, or why it is none."""
    if isinstance(row, UserError):
        return row
    try:
        with located(file=row.file, row=row.line):
            _require_text(row.columns)
    except UserError as error:
        return error
    return row


def _require_text(columns: Mapping[str, Any]) -> None:
    """Refuse half characters and NUL, which JSON may hold as escapes, in names and values of columns.

    Raises:
        UserError: With the column.
    """
    for name, value in columns.items():
        text = json.dumps([name, value], ensure_ascii=False)
        column = name.encode("utf-8", "backslashreplace").decode()
        if "\\u0000" in text and _holds_nul([name, value]):
            what = f"the column {quoted(name)} holds NUL, which no text does"
            raise UserError("nul_character", what, remedy="Leave it out.", field=column)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start : error.end]
            what = f"the column {quoted(name)} holds half a character, {half!r}"
            raise UserError("half_a_character", what, remedy="Save the text as UTF-8.", field=column) from error


def _holds_nul(value: Any) -> bool:
    """Tell whether a text in a value holds NUL, and not a backslash before ``u0000``."""
    if isinstance(value, str):
        return _NUL in value
    if isinstance(value, Mapping):
        return any(map(_holds_nul, (*value.keys(), *value.values())))
    return isinstance(value, list) and any(map(_holds_nul, value))
