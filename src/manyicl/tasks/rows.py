"""Rows of JSONL, CSV, TSV and Parquet files, as they were written, each with the place where it stands."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manyicl.checked import read_text
from manyicl.errors import MachineError, UserError, did_you_mean

Quotes = Literal["csv", "none"]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
SUFFIXES: tuple[str, ...] = (*JSON_LINES, *DELIMITERS, *PARQUET)


@dataclass(frozen=True, slots=True)
class LocatedRow:
    """One row with the place where it stands, so that an error can name it.

    Attributes:
        columns: Column -> value; numbers are the text that stood in the file.
        file: The file it came from, or ``hf:owner/name split``.
        line: First line of the row in the file, from 1; its number where the file has no lines.
    """

    columns: dict[str, Any]
    file: str
    line: int

    @property
    def place(self) -> str:
        """The full place, as an error names it."""
        return f"{self.file}:{self.line}"

    @property
    def origin(self) -> str:
        """The place without folders, as an example keeps it."""
        return f"{self.file.rpartition('/')[2]}:{self.line}"


def read_rows(path: Path, *, delimiter: str | None = None, quotes: Quotes = "csv") -> list[LocatedRow]:
    """Read all rows of a file by its suffix.

    ``007``, ``NA`` and ``1`` stay the text they are, which is why neither pandas nor `datasets` reads here.
    Numbers of JSON and Parquet become text too, so that the same table gives the same task in every form.

    Args:
        path: A ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file; text in UTF-8, with or without a byte
            order mark, lines ended by LF or CRLF.
        delimiter: Between CSV fields; by default a comma, or a tab in ``.tsv``.
        quotes: ``csv`` for fields that may stand in double quotes, ``none`` where a double quote is an
            ordinary character, as in many TSV files.

    Raises:
        UserError: If the file is missing, of another kind, not UTF-8, or broken; it names the line.
    """
    require_file(path)
    suffix = path.suffix.lower()
    if suffix in PARQUET:
        return list(_parquet_rows(path))
    if suffix in JSON_LINES:
        return list(_json_rows(path))
    if suffix in DELIMITERS:
        return list(_csv_rows(path, delimiter or DELIMITERS[suffix], quotes))
    raise UserError(f"{path}: expected one of {', '.join(SUFFIXES)}; found the suffix {path.suffix!r}.")


def require_file(path: Path) -> None:
    """Refuse a path that is no file, with the nearest name in its folder.

    Raises:
        UserError: If there is no such file.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file of rows ({', '.join(SUFFIXES)}).")
    if not path.is_file():
        raise UserError(f"The file {path} does not exist.{nearest_path(path)}")


def nearest_path(path: Path) -> str:
    """Return ``" Did you mean '…'?"`` for the first part of a path that does not exist, or an empty string."""
    existing = path
    missing = path.name
    while not existing.is_dir() and existing != existing.parent:
        missing = existing.name
        existing = existing.parent
    return did_you_mean(missing, sorted(entry.name for entry in existing.iterdir()))


def _json_rows(path: Path) -> Iterator[LocatedRow]:
    # str.splitlines would also cut at U+2028 and others, which JSON strings may hold.
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            yield LocatedRow(parse_json_row(text, f"{path}:{line}"), str(path), line)


def parse_json_row(text: str, place: str) -> dict[str, Any]:
    """Read one JSON object, its numbers as the text that stands there.

    Raises:
        UserError: If the text is no JSON object; it begins with ``place``.
    """
    try:
        row = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: broken JSON at character {error.colno}, {error.msg}.") from error
    except RecursionError as error:
        raise UserError(f"{place}: the JSON is nested too deeply.") from error
    if not isinstance(row, dict):
        found = type(row).__name__
        raise UserError(f'{place}: expected one JSON object a line, such as {{"text": …}}; found a {found}.')
    return row


def _csv_rows(path: Path, delimiter: str, quotes: Quotes) -> Iterator[LocatedRow]:
    _allow_long_fields()
    reader = csv.reader(
        io.StringIO(read_text(path), newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quotes == "csv" else csv.QUOTE_NONE,
        strict=True,
    )
    header: list[str] | None = None
    line = 1
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            hint = " If double quotes are ordinary characters there, set `quotes: none`." if quotes == "csv" else ""
            raise UserError(f"{path}:{line}: broken {path.suffix[1:].upper()}, {error}.{hint}") from error
        if not fields:
            continue
        if header is None:
            header = _checked_header(fields, f"{path}:{line}")
        elif len(fields) != len(header):
            raise UserError(
                f"{path}:{line}: expected {len(header)} fields as in the header, found {len(fields)}; "
                "put a field that holds the delimiter in double quotes."
            )
        else:
            yield LocatedRow(dict(zip(header, fields, strict=True)), str(path), line)


def _checked_header(fields: list[str], place: str) -> list[str]:
    """Return the column names of a first line.

    Raises:
        UserError: If a name is empty or stands twice.
    """
    names = [field.strip() for field in fields]
    for name in names:
        if not name:
            raise UserError(f"{place}: a column has no name; the first line must name every column.")
        if names.count(name) > 1:
            raise UserError(f"{place}: the column {name!r} stands twice in the header.")
    return names


def _allow_long_fields() -> None:
    """Lift the limit of 131,072 characters a field, which is the csv module's own and process-wide."""
    csv.field_size_limit(2**31 - 1)


def _parquet_rows(path: Path) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file, {str(error).splitlines()[0]}.") from error
    for number, columns in enumerate(table.to_pylist(), start=1):
        yield LocatedRow({name: as_text(value) for name, value in columns.items()}, str(path), number)


def as_text(value: Any) -> Any:
    """Turn a typed value into what JSON would show: numbers become text; lists, mappings, booleans and null stay."""
    if isinstance(value, list | tuple):
        return [as_text(part) for part in value]
    if isinstance(value, dict):
        return {name: as_text(part) for name, part in value.items()}
    if value is None or isinstance(value, bool | str):
        return value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


LoadDataset = Callable[..., Any]


def read_hub_rows(
    name: str,
    split: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    load_dataset: LoadDataset | None = None,
) -> list[LocatedRow]:
    """Read one split of a Hub dataset through `datasets`; numbered classes become their names.

    Args:
        name: ``owner/name`` on the Hub.
        split: A split of it, such as ``train`` or ``validation[:500]``.
        config: Its configuration, where it has several.
        revision: A branch, tag or commit, to fix what is read.
        load_dataset: Stands in for ``datasets.load_dataset``.

    Raises:
        UserError: If the dataset, configuration or split does not exist.
        MachineError: If the Hub cannot be reached.
    """
    if load_dataset is None:
        from datasets import load_dataset as datasets_load_dataset

        load_dataset = datasets_load_dataset
    place = f"hf:{name} {split}"
    try:
        dataset = load_dataset(name, config, split=split, revision=revision)
    except (ValueError, OSError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, ConnectionError):
            raise MachineError(f"{place}: the Hub cannot be reached, {first_line}") from error
        raise UserError(f"{place}: cannot be loaded, {first_line}") from error
    class_names = {
        column: feature.names
        for column, feature in (getattr(dataset, "features", None) or {}).items()
        if getattr(feature, "names", None)
    }
    return [
        LocatedRow(
            {column: as_text(_named(value, class_names.get(column))) for column, value in row.items()}, place, number
        )
        for number, row in enumerate(dataset, start=1)
    ]


def _named(value: Any, names: list[str] | None) -> Any:
    """Turn a class number into its name; the Hub marks an unlabelled row with -1, which is no class."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
