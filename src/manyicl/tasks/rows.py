"""Rows of JSONL, CSV, TSV and Parquet files, as they were written, each with the place where it stands."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from manyicl.checked import read_text
from manyicl.errors import MachineError, UserError, counted, did_you_mean
from manyicl.tasks.values import as_text

Quotes = Literal["csv", "none"]
_QUOTING: Mapping[Quotes, Literal[0, 3]] = {"csv": csv.QUOTE_MINIMAL, "none": csv.QUOTE_NONE}

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
SUFFIXES: tuple[str, ...] = (*JSON_LINES, *DELIMITERS, *PARQUET)
_PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar")
_DELIMITERS_SEEN = (";", "\t", "|", ",")
_NUM_RECORDS_SEEN = 20
_EXCEL_NOTE = re.compile(r'"?sep=\W?"?', re.IGNORECASE)
_WRITES_JSON_LINES = "`jq -c '.[]'` or pandas `to_json(orient='records', lines=True)` writes that"
# Far more than rows have, and far fewer than Python can write out again.
_MOST_LEVELS = 100


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
    raise unknown_suffix(path)


def unknown_suffix(path: Path) -> UserError:
    """Make the error for a file that is no table."""
    what_to_do = "Unpack it." if path.suffix.lower() in _PACKED else "Export it as CSV."
    return UserError(f"{path}: expected one of {', '.join(SUFFIXES)}; found the suffix {path.suffix!r}. {what_to_do}")


def require_file(path: Path) -> None:
    """Refuse a path that is no file, with the nearest name in its folder.

    Raises:
        UserError: If there is no such file.
    """
    if not exists(path):
        raise UserError(f"The file {path} does not exist.{nearest_path(path)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file of rows ({', '.join(SUFFIXES)}).")
    if not path.is_file():
        raise UserError(f"{path} is no plain file; save its rows as one ({', '.join(SUFFIXES)}).")


def exists(path: Path) -> bool:
    """Tell whether there is something at a path that a person wrote.

    Raises:
        UserError: If it cannot be looked for: its name is too long, or a folder above it may not be entered.
    """
    try:
        return path.exists()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{str(path)[:200]}: cannot be looked for, {reason}; expected the path of a file.") from error


def nearest_path(path: Path) -> str:
    """Return ``" Did you mean '…'?"`` for the first part of a path that does not exist, or an empty string.

    Of a link that leads nowhere, or round in a circle, it returns that.
    """
    existing = path
    missing = path.name
    while not existing.is_dir() and existing != existing.parent:
        missing = existing.name
        existing = existing.parent
    if (existing / missing).is_symlink():
        return f" {existing / missing} is a link that leads nowhere."
    if (existing / missing).exists():
        return ""
    return did_you_mean(missing, sorted(entry.name for entry in existing.iterdir()))


def _json_rows(path: Path) -> Iterator[LocatedRow]:
    # str.splitlines would also cut at U+2028 and others, which JSON strings may hold.
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            yield LocatedRow(parse_json_row(text, f"{path}:{line}"), str(path), line)


def parse_json_row(text: str, place: str) -> dict[str, Any]:
    """Read one JSON object, its numbers as the text that stands there.

    Raises:
        UserError: If the text is no JSON object, or a key stands twice in one; it begins with ``place``.
    """
    try:
        row = json.loads(text, parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        hint = f"; {_WRITES_JSON_LINES}" if text.lstrip().startswith("[") else ""
        raise UserError(
            f"{place}: broken JSON at character {error.colno}, {error.msg}; expected one object a line{hint}."
        ) from error
    except _RepeatedKeyError as error:
        raise UserError(
            f"{place}: the key {str(error)!r} stands twice in one JSON object; keep one of them."
        ) from error
    except RecursionError as error:
        raise UserError(f"{place}: the JSON is nested too deeply.") from error
    if text.count("[") + text.count("{") > _MOST_LEVELS and _num_levels(row) > _MOST_LEVELS:
        raise UserError(f"{place}: the JSON is nested more than {_MOST_LEVELS} deep; expected a row of columns.")
    if not isinstance(row, dict):
        found = {list: "a list", str: "a text or number", bool: "true or false"}.get(type(row), "null")
        is_table = isinstance(row, list) and any(isinstance(part, dict) for part in row)
        hint = f" of them; {_WRITES_JSON_LINES}" if is_table else ""
        raise UserError(f'{place}: expected one JSON object a line, such as {{"text": …}}; found {found}{hint}.')
    return row


class _RepeatedKeyError(Exception):
    """A key that stands twice in one JSON object."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values; Python would keep the last of equal keys and say nothing."""
    columns = dict(pairs)
    if len(columns) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return columns


def _num_levels(value: Any) -> int:
    """Count how deeply lists and objects are nested."""
    level, num_levels = [value], 0
    while level:
        nested = [part for part in level if isinstance(part, list | dict)]
        level = [inner for part in nested for inner in (part.values() if isinstance(part, dict) else part)]
        num_levels += bool(nested)
    return num_levels


def _csv_rows(path: Path, delimiter: str, quotes: Quotes) -> Iterator[LocatedRow]:
    _allow_long_fields()
    text = read_text(path)
    if note := _EXCEL_NOTE.fullmatch(text.partition("\n")[0].strip(" ")):
        raise UserError(f"{path}:1: {note[0]!r} tells Excel the delimiter and is no header; delete that line.")
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=_QUOTING[quotes],
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
            if len(header) == 1:
                _require_one_column(text, header[0], delimiter, quotes, f"{path}:{line}")
        elif len(fields) != len(header):
            surplus = fields[len(header) :]
            what_to_do = (
                f"delete the empty {'field' if len(surplus) == 1 else 'fields'} at its end"
                if surplus and not any(field.strip() for field in surplus)
                else "put a field that holds the delimiter in double quotes"
            )
            raise UserError(
                f"{path}:{line}: expected {counted(len(header), 'field')} as in the header, found {len(fields)}; "
                f"{what_to_do}."
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
            raise UserError(
                f"{place}: a column has no name; the first line must name every column. Name it, delete it if it is "
                "empty, or write the table without its index (`index=False` in pandas)."
            )
        if names.count(name) > 1:
            raise UserError(f"{place}: the column {name!r} stands twice in the header.")
    return names


def _require_one_column(text: str, name: str, delimiter: str, quotes: Quotes, place: str) -> None:
    """Refuse a table of one column that another delimiter cuts into as many fields in each of its first records.

    A name may hold such a mark by itself, as ``"Question; if any"`` does, and queries often stand in one column.
    """
    for mark in _DELIMITERS_SEEN:
        if mark == delimiter:
            continue
        records = csv.reader(io.StringIO(text, newline=""), delimiter=mark, quoting=_QUOTING[quotes])
        nums_fields = {len(fields) for fields in islice(filter(None, records), 1 + _NUM_RECORDS_SEEN)}
        if len(nums_fields) == 1 and nums_fields != {1}:
            quoted = " If it is one column, put its name in double quotes." if quotes == "csv" else ""
            raise UserError(
                f"{place}: expected fields between {delimiter!r}, found the one column {name!r}; set `delimiter: "
                f"{json.dumps(mark)}` under `data` in the task file (for queries: `--delimiter`), or save the file "
                f"with {delimiter!r}.{quoted}"
            )


def _allow_long_fields() -> None:
    """Lift the limit of 131,072 characters a field, which is the csv module's own and process-wide."""
    csv.field_size_limit(2**31 - 1)


def _parquet_rows(path: Path) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{path}: the column {repeated!r} stands twice; keep one of them.")
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file, {_first_line(error)}.") from error
    for number, values in enumerate(zip(*table.columns, strict=True), start=1):
        place = f"{path}:{number}"
        columns = {
            name: _text_of(value.as_py, name, place) for name, value in zip(table.column_names, values, strict=True)
        }
        yield LocatedRow(columns, str(path), number)


def _text_of(read: Callable[[], Any], column: str, place: str) -> Any:
    """Read one value as text.

    Raises:
        UserError: If it is none: bytes that are not UTF-8, or a time that no calendar or time zone here knows.
    """
    try:
        return as_text(read())
    except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
        raise UserError(
            f"{place}: the column {column!r} cannot be read as text, {_first_line(error)}; write it as text in UTF-8, "
            "or leave it out."
        ) from error


LoadDataset = Callable[..., Any]
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def read_hub_rows(
    name: str,
    split: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    class_names: Mapping[str, Mapping[str, str]] | None = None,
    load_dataset: LoadDataset | None = None,
) -> list[LocatedRow]:
    """Read one split of a Hub dataset through `datasets`; numbered classes become their names.

    A private or gated dataset needs a token. The Hub's own library takes it from the environment (``HF_TOKEN``);
    it is neither read nor passed on here, and cut out of what that library says.

    Args:
        name: ``owner/name`` on the Hub.
        split: A split of it, such as ``train`` or ``validation[:500]``.
        config: Its configuration, where it has several.
        revision: A branch, tag or commit, to fix what is read.
        class_names: Columns that a task file names the classes of. Their numbers stay, so that its names are given,
            and are compared with the Hub's: a wrong order would turn every label into another.
        load_dataset: Stands in for ``datasets.load_dataset``.

    Raises:
        UserError: If the dataset, configuration or split does not exist, or its classes are others.
        MachineError: If the Hub cannot be reached.
    """
    if load_dataset is None:
        from datasets import load_dataset as datasets_load_dataset

        load_dataset = datasets_load_dataset
    place = f"hf:{name} {split}"
    try:
        dataset = load_dataset(name, config, split=split, revision=revision)
    except Exception as error:
        if _is_unreachable(error):
            offline = ", and HF_HUB_OFFLINE keeps this machine offline" if os.environ.get("HF_HUB_OFFLINE") else ""
            raise MachineError(f"{place}: the Hub cannot be reached{offline} ({_first_line(error)}).") from error
        if not isinstance(error, ValueError | OSError | RuntimeError):
            raise
        hint = " Set HF_TOKEN in the environment if it is private or gated." if _wants_token(error) else ""
        raise UserError(f"{place}: cannot be loaded, {_first_line(error)}.{hint}") from error
    hub_names = {
        column: list(feature.names)
        for column, feature in (getattr(dataset, "features", None) or {}).items()
        if getattr(feature, "names", None)
    }
    for column, names in (class_names or {}).items():
        if column in hub_names:
            _require_same_classes(names, hub_names.pop(column), column, place)
    return [
        LocatedRow(
            {
                column: _text_of(partial(_named, value, hub_names.get(column)), column, f"{place}:{number}")
                for column, value in row.items()
            },
            place,
            number,
        )
        for number, row in enumerate(dataset, start=1)
    ]


def _is_unreachable(error: BaseException) -> bool:
    """Tell a Hub that does not answer from one that says no; `datasets` wraps the one in the other at times."""
    seen: BaseException | None = error
    while seen is not None:
        # httpx, which the Hub's library asks with, derives its errors from none of Python's own.
        if isinstance(seen, ConnectionError | TimeoutError) or type(seen).__module__.startswith("httpx"):
            return True
        seen = seen.__cause__
    return False


def _wants_token(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("gated", "private", "authenticat", "401", "403"))


def _first_line(error: Exception) -> str:
    """Return the first line of what a library said, without its full stop and without any token."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
    for variable in _TOKENS:
        if token := os.environ.get(variable):
            line = line.replace(token, f"${variable}")
    return line


def _require_same_classes(names: Mapping[str, str], hub_names: list[str], column: str, place: str) -> None:
    """Refuse class names of a task file that cannot be the Hub's: other numbers, or the same words in another order."""
    numbers = {str(number) for number in range(len(hub_names))}
    if set(names) != numbers:
        raise UserError(
            f"{place}: class_names of {column!r} names {len(names)} classes; the Hub has {len(hub_names)}: {hub_names}."
        )
    ours = [_letters(names[str(number)]) for number in range(len(hub_names))]
    theirs = [_letters(name) for name in hub_names]
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise UserError(f"{place}: class_names of {column!r} stand in another order than on the Hub: {hub_names}.")


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _named(value: Any, names: list[str] | None) -> Any:
    """Turn a class number into its name; the Hub marks an unlabelled row with -1, which is no class."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def find_split(folder: Path, split: str) -> list[Path]:
    """Find the files of one split in a folder: ``test.jsonl`` and the like, or the Hub's numbered Parquet files.

    Raises:
        UserError: If there is none, or several of different kinds.
    """
    whole = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    found = whole or sorted(folder.glob(f"{glob.escape(split)}-*-of-*.parquet"))
    if len(whole) > 1:
        raise UserError(f"{folder} holds {' and '.join(path.name for path in whole)}; keep one file of the split.")
    if not found:
        hint = did_you_mean(f"{split}.jsonl", sorted(entry.name for entry in folder.iterdir()))
        others = ", ".join(suffix for suffix in SUFFIXES if suffix != ".jsonl")
        raise UserError(
            f"The split {split!r} is missing in {folder}; expected {folder / split}.jsonl, or {others}.{hint}"
        )
    return found
