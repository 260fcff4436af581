"""Rows of JSONL, CSV, TSV, Parquet and Excel files, with values as written and the location of each row."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack

from manyicl.checked import SAVE_AS_UTF8, decoded_lines, text_lines
from manyicl.errors import UserError, located, pluralized, shortened
from manyicl.library_errors import clause, reason
from manyicl.paths import exists, nearest_path
from manyicl.tasks.packed import unpacked_lines
from manyicl.tasks.values import NumberText, as_text, with_own_digits

ValueT = TypeVar("ValueT")
Quotes = Literal["csv", "none"]
_QUOTING: Mapping[Quotes, Literal[0, 3]] = {"csv": csv.QUOTE_MINIMAL, "none": csv.QUOTE_NONE}

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
EXCEL = (".xlsx",)
GZIP = ".gz"
# Arrow's name of a type of number -> numpy's.
NARROW_NUMBERS = {"halffloat": "float16", "float": "float32"}
TEXTS: tuple[str, ...] = (*JSON_LINES, *DELIMITERS)
SUFFIXES: tuple[str, ...] = (*TEXTS, *PARQUET, *EXCEL, *(f"{suffix}{GZIP}" for suffix in TEXTS))
_KINDS = f"{', '.join((*TEXTS, *PARQUET, *EXCEL))}, or a text packed as {GZIP}"
_PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar")
_USUAL_DELIMITERS = (";", "\t", "|", ",")
_NUM_RECORDS_COMPARED = 20
_NUM_LINES_COMPARED = 1_000
_EXCEL_NOTE = re.compile(r'"?sep=\W?"?', re.IGNORECASE)
_ENCODING_PLACES = (
    "`,encoding=NAME` after the columns of a table, `encoding: NAME` under `data` in a task.yaml, `--encoding NAME` "
    "for queries"
)
_DELIMITER_PLACES = (
    '`,delimiter=;` after the columns of a table, `delimiter: ";"` under `data` in a task.yaml, `--delimiter` for '
    "queries"
)
_JSON_LINES_REMEDY = "`jq -c '.[]'` or pandas `to_json(orient='records', lines=True)` writes that."
_QUOTES_REMEDY = "If double quotes are ordinary characters there, set `quotes: none` under `data` in a task.yaml."
# Far more than rows have, and far fewer than Python can write out again.
_MOST_LEVELS = 100


@dataclass(frozen=True, slots=True)
class LocatedRow:
    """One row with its place, so that an error can name it.

    Attributes:
        columns: Column -> value; numbers are the text that was in the file.
        file: File that the row came from, or ``hf:owner/name split``.
        line: First line of the row in the file, from 1; its number where the file has no lines.
    """

    columns: dict[str, Any]
    file: str
    line: int

    @property
    def origin(self) -> str:
        """Place without folders, as an example keeps it."""
        return f"{self.file.rpartition('/')[2]}:{self.line}"


class RowFormat(TypedDict, total=False):
    """How a file of rows is to be read, as far as its name does not say.

    Attributes:
        delimiter: Character between CSV fields. By default a comma, in ``.tsv`` a tab; where that leaves the header one
            field, the one other usual delimiter that cuts the first rows into as many fields each.
        quotes: ``csv`` for fields that may be in double quotes, ``none`` where a double quote is an ordinary character,
            as in many TSV files; by default ``csv``.
        encoding: Encoding of a text; by default UTF-8.
        sheet: Sheet of an Excel workbook; by default the only one with content.
    """

    delimiter: str | None
    quotes: Quotes
    encoding: str | None
    sheet: str | None


def suffix_of(path: Path) -> str:
    """Return the suffix that says what a file holds, in lower case.

    >>> suffix_of(Path("tickets.CSV.gz"))
    '.csv.gz'
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [GZIP] else "".join(suffixes[-1:])


def is_fielded(path: Path) -> bool:
    """Tell whether a file is CSV or TSV, packed or not: whether it has a delimiter."""
    return suffix_of(path).removesuffix(GZIP) in DELIMITERS


def is_text(path: Path) -> bool:
    """Tell whether a file of rows is a text, packed or not: whether it has an encoding."""
    return suffix_of(path).removesuffix(GZIP) in TEXTS


def read_rows(path: Path, **how: Unpack[RowFormat]) -> list[LocatedRow]:
    """Read all rows of a file by its suffix; arguments and errors are those of `iter_rows`."""
    return list(iter_rows(path, **how))


def iter_rows(path: Path, **how: Unpack[RowFormat]) -> Iterator[LocatedRow]:
    """Read the rows of a file by its suffix, one after another.

    ``007``, ``NA`` and ``1`` stay the text they are, which is why neither pandas nor `datasets` reads here.
    Numbers of JSON and Parquet become text too, so that the same table gives the same task in every form.

    Args:
        path: A ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet`` or ``.xlsx`` file; a text may be packed as ``.gz``, have a
            byte order mark, and lines ended by LF or CRLF.
        how: Delimiter, quotes, encoding and sheet, as far as its name does not say.

    Raises:
        UserError: If the file is missing, of another kind, in another encoding, or broken; it names the line.
    """
    require_file(path)
    suffix = suffix_of(path)
    if suffix in PARQUET:
        return _parquet_rows(path)
    if suffix in EXCEL:
        from manyicl.tasks.workbook import workbook_rows

        return workbook_rows(path, how.get("sheet"))
    if suffix not in SUFFIXES:
        raise unknown_suffix(path)
    lines = _lines(path, how.get("encoding"))
    if is_fielded(path):
        usual = DELIMITERS[suffix.removesuffix(GZIP)]
        return _refused(table_rows(lines, str(path), usual, how.get("delimiter"), how.get("quotes", "csv")))
    return json_rows(lines, str(path))


def _refused(rows: Iterable[LocatedRow | UserError]) -> Iterator[LocatedRow]:
    """Yield rows up to the first one that cannot be read, and raise its error."""
    for row in rows:
        if isinstance(row, UserError):
            raise row
        yield row


def _lines(path: Path, encoding: str | None) -> Iterator[str]:
    """Yield the lines of a text, unpacked; where it is in another encoding, say where that is named."""
    is_packed = path.suffix.lower() == GZIP
    lines = decoded_lines(unpacked_lines(path), path, encoding) if is_packed else text_lines(path, encoding)
    try:
        yield from lines
    except UserError as error:
        if error.remedy and error.remedy.endswith(SAVE_AS_UTF8):
            error.remedy = f"{error.remedy.removesuffix('.')}, or name its encoding: {_ENCODING_PLACES}."
        raise


def with_other_names(row: Mapping[str, ValueT], taken: Collection[str]) -> dict[str, ValueT]:
    """Return a row in which each column with a name that is taken is called ``input_...``.

    >>> with_other_names({"text": "hello", "answer": "good"}, ["answer"])
    {'text': 'hello', 'input_answer': 'good'}
    """
    renamed: dict[str, ValueT] = {}
    for column, value in row.items():
        name = column
        while name in taken or (name != column and name in row):
            name = f"input_{name}"
        renamed[name] = value
    return renamed


def has_header(path: Path) -> bool:
    """Tell whether a file of rows names its columns even where it has no rows, unlike JSON lines."""
    return suffix_of(path).removesuffix(GZIP) not in JSON_LINES


def column_names(path: Path, **how: Unpack[RowFormat]) -> list[str]:
    """Return the columns of a table that may have no rows; none of JSON lines, and of an empty file.

    Arguments and errors are those of `iter_rows`.
    """
    require_file(path)
    suffix = suffix_of(path)
    if suffix in PARQUET:
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(path).names)
    if suffix in EXCEL:
        from manyicl.tasks.workbook import workbook_header

        return workbook_header(path, how.get("sheet"))
    if not is_fielded(path):
        return []
    lines = list(islice(_lines(path, how.get("encoding")), _NUM_LINES_COMPARED))
    quotes, usual = how.get("quotes", "csv"), DELIMITERS[suffix.removesuffix(GZIP)]
    with located(file=path, row=1):
        delimiter = how.get("delimiter") or _delimiter_of(lines, usual, quotes)
        records = _records(str(path), lines, delimiter, quotes, usual)
        return next((checked_header(fields) for _, fields in records if fields), [])


def unknown_suffix(path: Path) -> UserError:
    """Make the error for a file that is no table."""
    expected, found = f"one of {_KINDS}", f"the suffix {path.suffix!r}"
    remedy = "Unpack it." if path.suffix.lower() in _PACKED else "Export it as CSV."
    return UserError("unknown_suffix", "not a table", expected=expected, found=found, remedy=remedy, file=path)


def require_file(path: Path) -> None:
    """Refuse a path that is no file, with the nearest name in its folder.

    Raises:
        UserError: If there is no such file.
    """
    if not exists(path):
        raise UserError("missing_file", "the file does not exist", remedy=nearest_path(path), file=path)
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "this is no plain file"
        raise UserError("not_a_file", what, expected=f"a file of rows ({_KINDS})", file=path)


def json_rows(lines: Iterable[str], file: str) -> Iterator[LocatedRow]:
    """Yield the rows of JSON lines, numbers as the text that is written there, NaN as null.

    Raises:
        UserError: If a line is no JSON object, or a key occurs twice in one; it names file and line.
    """
    for line, text in enumerate(lines, start=1):
        if text.strip():
            yield json_row(text, file, line)


def json_row(text: str, file: str, line: int) -> LocatedRow:
    """Parse one line of JSON lines; see `json_rows`."""
    with located(file=file, row=line):
        row = json_value(text.removesuffix("\n"), "one object a line")
        if not isinstance(row, dict):
            expected, remedy = 'one JSON object a line, such as {"text": …}', None
            if isinstance(row, list) and any(isinstance(part, dict) for part in row):
                remedy = _JSON_LINES_REMEDY
            found = shortened(text.removesuffix("\n"))
            raise UserError("not_an_object", "not a row", expected=expected, found=found, remedy=remedy)
    return LocatedRow(row, file, line)


def json_value(text: str, expected: str) -> Any:
    """Parse JSON, numbers as the text that is written there, NaN as null.

    Args:
        text: The JSON.
        expected: What an error says that it should be.

    Raises:
        UserError: If it is no JSON, a key occurs twice in one object, or it is nested too deeply.
    """
    try:
        value = json.loads(
            text,
            parse_int=NumberText,
            parse_float=NumberText,
            parse_constant=lambda name: as_text(float(name)),
            object_pairs_hook=_with_unique_keys,
        )
        is_deep = text.count("[") + text.count("{") > _MOST_LEVELS and _num_levels(value) > _MOST_LEVELS
    except json.JSONDecodeError as error:
        what = f"broken JSON at character {error.colno}, {clause(error.msg)}"
        remedy = _JSON_LINES_REMEDY if text.lstrip().startswith("[") else None
        raise UserError("broken_json", what, expected=expected, remedy=remedy) from error
    except RecursionError:
        is_deep = True
    if is_deep:
        raise UserError("nested_too_deep", f"the JSON is nested more than {_MOST_LEVELS} deep")
    return value


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values; Python would keep the last of equal keys and say nothing."""
    columns = dict(pairs)
    if len(columns) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        what = f"the key {name!r} occurs twice in one JSON object"
        raise UserError("repeated_key", what, remedy="Keep one of them.")
    return columns


def _num_levels(value: Any) -> int:
    """Count how deeply lists and objects are nested."""
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(_num_levels, value.values() if isinstance(value, dict) else value), default=0)


def table_rows(
    lines: Iterator[str], file: str, usual: str, given: str | None = None, quotes: Quotes = "csv"
) -> Iterator[LocatedRow | UserError]:
    """Yield the rows of CSV or TSV, and an error for each row that does not fit the header.

    Args:
        lines: Lines of the text.
        file: File that errors name.
        usual: Delimiter of this kind of table.
        given: Delimiter that the user named; None for the usual one, or the other that fits.
        quotes: As in `RowFormat`.

    Raises:
        UserError: If header, delimiter or quotes are broken, after which nothing can be read; it names file and line.
    """
    # The limit of 131,072 characters a field is the csv module's own, and process-wide.
    csv.field_size_limit(2**31 - 1)
    first_lines = list(islice(lines, _NUM_LINES_COMPARED))
    if note := _EXCEL_NOTE.fullmatch("".join(first_lines[:1]).strip(" \n")):
        what = f"{note[0]!r} tells Excel the delimiter and is no header"
        raise UserError("excel_note", what, remedy="Delete that line.", file=file, row=1)
    with located(file=file, row=1):
        delimiter = given or _delimiter_of(first_lines, usual, quotes)
    between = f" between {delimiter!r}" if delimiter not in (given, usual) else ""
    header: list[str] | None = None
    blank_lines: list[int] = []  # since the last row
    for line, fields in _records(file, chain(first_lines, lines), delimiter, quotes, usual):
        if not fields:
            blank_lines.append(line)
        elif header is None:
            blank_lines.clear()
            with located(file=file, row=line):
                header = checked_header(fields)
                if len(header) == 1 and given:
                    _require_one_column(first_lines, header[0], delimiter, quotes)
        else:
            # In a table of one column, a blank line between rows is a row whose field is empty.
            for blank in blank_lines if len(header) == 1 else ():
                yield LocatedRow({header[0]: ""}, file, blank)
            blank_lines.clear()
            if len(fields) == len(header):
                yield LocatedRow(dict(zip(header, fields, strict=True)), file, line)
            else:
                yield _misfit(fields, len(header), between).at(file=file, row=line)


def _misfit(fields: Sequence[str], num_columns: int, between: str) -> UserError:
    """Make the error for a row with more or fewer fields than the header."""
    surplus = fields[num_columns:]
    remedy = "Put a field that holds the delimiter in double quotes."
    if surplus and not any(map(str.strip, surplus)):
        remedy = f"Delete the empty {'field' if len(surplus) == 1 else 'fields'} at its end."
    what, found = "the row does not fit the header", str(len(fields))
    expected = f"{pluralized(num_columns, 'field')}{between}"
    return UserError("wrong_number_of_fields", what, expected=expected, found=found, remedy=remedy)


def _records(
    file: str, lines: Iterable[str], delimiter: str, quotes: Quotes, usual: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a CSV text, each with its first line; a blank line has no fields.

    In TSV, where a quote is often an ordinary character, one at the beginning of a field would join rows in silence.
    """
    of_record: list[str] = []

    def remembered() -> Iterator[str]:
        for text in lines:
            of_record.append(text)
            yield text

    reader = csv.reader(remembered(), delimiter=delimiter, quoting=_QUOTING[quotes], strict=True)
    line, num_columns = 1, 0
    try:
        for fields in reader:
            num_columns = num_columns or len(fields)
            is_joined = len(of_record) > 1 and delimiter == usual == DELIMITERS[".tsv"] and num_columns > 1
            if is_joined and all(text.count(delimiter) == num_columns - 1 for text in of_record):
                what = (
                    f"a double quote at the beginning of a field makes one row of {len(of_record)} lines that are rows"
                )
                raise UserError("broken_csv", what, remedy=_QUOTES_REMEDY, file=file, row=line)
            yield line, fields
            of_record.clear()
            line = reader.line_num + 1
    except csv.Error as error:
        kind = "TSV" if usual == DELIMITERS[".tsv"] else "CSV"
        what = f"broken {kind}, {reason(error)}"
        remedy = _QUOTES_REMEDY if quotes == "csv" else None
        raise UserError("broken_csv", what, remedy=remedy, file=file, row=line) from error


def checked_header(fields: list[str]) -> list[str]:
    """Return the names in the header of a table.

    Raises:
        UserError: If a name is empty or occurs twice.
    """
    names = [field.strip() for field in fields]
    counts = Counter(names)
    for name in names:
        if not name:
            remedy = "Name it, or leave it out, as `index=False` does in pandas."
            raise UserError("unnamed_column", "a column has no name in the header", remedy=remedy)
        if counts[name] > 1:
            raise UserError("repeated_column", f"the column {name!r} occurs twice in the header", field=name)
    return names


def _delimiter_of(lines: Sequence[str], usual: str, quotes: Quotes) -> str:
    """Return the usual delimiter, or where that leaves the header one field, the only other one that fits the table.

    Raises:
        UserError: If several fit.
    """
    header = next(filter(None, csv.reader(lines, delimiter=usual, quoting=_QUOTING[quotes])), [])
    fitting = [other for other in _USUAL_DELIMITERS if other != usual and _fits(lines, other, quotes)]
    if len(header) != 1 or not fitting:
        return usual
    if len(fitting) > 1:
        what, found = "the delimiter of the table is not clear", " and ".join(map(repr, fitting))
        remedy = f"Name it: {_DELIMITER_PLACES}."
        raise UserError("several_delimiters", what, expected="one that fits", found=found, remedy=remedy)
    return fitting[0]


def _fits(lines: Iterable[str], delimiter: str, quotes: Quotes) -> bool:
    """Tell whether a delimiter cuts each of the first records into as many fields, two or more.

    A name may hold such a character by itself, as ``"Question; if any"`` does, and queries are often in one column.
    """
    records = csv.reader(lines, delimiter=delimiter, quoting=_QUOTING[quotes])
    nums_fields = {len(fields) for fields in islice(filter(None, records), 1 + _NUM_RECORDS_COMPARED)}
    return len(nums_fields) == 1 and nums_fields != {1}


def _require_one_column(lines: Iterable[str], name: str, delimiter: str, quotes: Quotes) -> None:
    """Refuse a table of one column that another delimiter than the one the user named fits."""
    for other in filter(delimiter.__ne__, _USUAL_DELIMITERS):
        if _fits(lines, other, quotes):
            note = " If it is one column, put its name in double quotes." if quotes == "csv" else ""
            remedy = f"It is {other!r}, so it seems. Name that, or none: {_DELIMITER_PLACES}.{note}"
            what, expected = "the table has another delimiter", f"fields between {delimiter!r}"
            raise UserError("wrong_delimiter", what, expected=expected, found=f"the one column {name!r}", remedy=remedy)


def _parquet_rows(path: Path) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if repeated := next((name for name, count in Counter(names).items() if count > 1), None):
                what = f"the column {repeated!r} occurs twice"
                raise UserError("repeated_column", what, remedy="Keep one of them.", file=path, field=repeated)
            widths = [NARROW_NUMBERS.get(str(kind)) for kind in file.schema_arrow.types]
            batches = (zip(*batch.columns, strict=True) for batch in file.iter_batches())
            for number, values in enumerate(chain.from_iterable(batches), start=1):
                columns = {}
                for name, value, width in zip(names, values, widths, strict=True):
                    read = value.as_py if width is None else partial(with_own_digits, value.as_py(), width)
                    columns[name] = text_of(read, name, str(path), number)
                yield LocatedRow(columns, str(path), number)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError("broken_parquet", f"not a readable Parquet file, {reason(error)}", file=path) from error


def text_of(read: Callable[[], Any], column: str, file: str, line: int) -> Any:
    """Read one value as text.

    Raises:
        UserError: If it is none: bytes that are not UTF-8, or a time that no calendar or time zone here knows.
    """
    try:
        return as_text(read())
    except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
        what = f"the column {column!r} cannot be read as text, {reason(error)}"
        remedy = "Write it as text in UTF-8, or leave it out."
        raise UserError("unreadable_value", what, remedy=remedy, file=file, row=line, field=column) from error
