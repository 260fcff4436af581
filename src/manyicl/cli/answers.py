"""How `manyicl predict` writes answers next to their queries: JSON lines or CSV, rows as they come."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from manyicl.atomic import replace_file
from manyicl.errors import UserError, quoted
from manyicl.outputs import require_ending
from manyicl.tasks.rows import suffix_of, with_other_names
from manyicl.tasks.values import NumberText, as_written

if TYPE_CHECKING:
    from manyicl.tasks.task import Example

STANDARD_STREAM = Path("-")
ANSWER_COLUMNS = frozenset({"answer", "log_probability"})
_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", re.ASCII)

Row = dict[str, Any]
Columns = Callable[[], Sequence[str]]


class Earlier(NamedTuple):
    """Rows that are in a file before others are added.

    Attributes:
        num_rows: Number of them.
        columns: Columns that all of them have; none where rows may differ; in a workbook, those that any of them has.
    """

    num_rows: int = 0
    columns: Sequence[str] = ()


class Form(Protocol):
    """A form of files with answers, which may be cut after any byte until they are complete."""

    def write(self, stream: IO[str], rows: Iterable[Row], earlier: Earlier, columns_without_rows: Columns) -> int:
        """Write rows as they come.

        Args:
            stream: Opened without translation of line ends.
            rows: Rows.
            earlier: Rows that are there already.
            columns_without_rows: Called for the columns of a table where no row comes, or to refuse that.

        Returns:
            Number of rows, the earlier ones among them.

        Raises:
            UserError: If rows differ in a form that does not allow it.
        """

    def complete_rows(self, path: Path) -> tuple[int, int]:
        """Count the rows that are complete, and the bytes up to their end."""

    def columns(self, path: Path) -> Sequence[str]:
        """Return the columns that all rows have; none where rows may differ; in a workbook, those that any has."""

    def rows(self, path: Path) -> Iterator[Row]:
        """Read complete rows again; in CSV every value is text, in JSON lines every number `NumberText`."""

    def finish(self, part: Path, output: Path) -> None:
        """Make the output of all rows, which are on the disk."""


ENDINGS = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz", ".xlsx")


def form_of(output: Path) -> Form:
    """Choose the form of a file by its ending.

    Raises:
        UserError: If it has another ending, or the libraries for it are missing.
    """
    from manyicl.cli.answer_files import GzipCsvForm, GzipJsonLinesForm, WorkbookForm

    ending = suffix_of(output)
    if ending not in ENDINGS:
        require_ending(output, ENDINGS)
    if ending == ".xlsx":
        return WorkbookForm(output)
    forms: dict[str, type[CsvForm | JsonLinesForm]] = {
        ".csv": CsvForm,
        ".csv.gz": GzipCsvForm,
        ".jsonl.gz": GzipJsonLinesForm,
    }
    return forms.get(ending, JsonLinesForm)()


class _PlainForm:
    """A form that is complete as it was written."""

    def finish(self, part: Path, output: Path) -> None:
        """Give the rows their name."""
        replace_file(part, output)


class JsonLinesForm(_PlainForm):
    """One JSON object a line; columns may differ."""

    def write(self, stream: IO[str], rows: Iterable[Row], earlier: Earlier, columns_without_rows: Columns) -> int:
        """Write rows as they come, and count them; see `Form`."""
        num_rows = earlier.num_rows
        for row in rows:
            num_rows += 1
            # Half a character, which UTF-8 cannot hold, is written as the escape that it came as.
            stream.write(as_json(row).encode("utf-8", "backslashreplace").decode() + "\n")
            stream.flush()
        if not num_rows:
            columns_without_rows()
        return num_rows

    def complete_rows(self, path: Path) -> tuple[int, int]:
        """Count the lines that end."""
        with path.open("rb") as file:
            lengths = [len(line) for line in file if line.endswith(b"\n")]
        return len(lengths), sum(lengths)

    def columns(self, path: Path) -> Sequence[str]:
        """Rows may differ."""
        return ()

    def rows(self, path: Path) -> Iterator[Row]:
        """Read the rows again, numbers as the text that they were written as."""
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line, parse_int=NumberText, parse_float=NumberText)


class CsvForm(_PlainForm):
    """Comma-separated values with a header, as Python's csv module writes them; all rows have the same columns."""

    def write(self, stream: IO[str], rows: Iterable[Row], earlier: Earlier, columns_without_rows: Columns) -> int:
        """Write rows as they come, and count them; see `Form`."""
        num_rows = earlier.num_rows
        table = csv.DictWriter(stream, earlier.columns) if num_rows else None
        for row in rows:
            num_rows += 1
            table = table or _with_header(stream, list(row))
            if set(row) != set(table.fieldnames):
                what, remedy = "it has other columns than the rows before it", "Write to .jsonl, where rows may differ."
                missing = [f"no {quoted(column)}" for column in table.fieldnames if column not in row]
                found = ", ".join([*missing, *(quoted(column) for column in row if column not in table.fieldnames)])
                raise UserError("other_columns", what, found=found, remedy=remedy, row=num_rows)
            table.writerow({column: _as_field(value) for column, value in row.items()})
            stream.flush()
        if table is None:
            _with_header(stream, columns_without_rows())
        return num_rows

    def complete_rows(self, path: Path) -> tuple[int, int]:
        """Count the lines at which no quote is open; the first is the header."""
        num_records = num_bytes = position = num_quotes = 0
        with path.open("rb") as file:
            for line in file:
                position += len(line)
                num_quotes += line.count(b'"')
                # A quote within a field is doubled, so a complete record has an even number of them.
                if line.endswith(b"\n") and num_quotes % 2 == 0:
                    num_records += 1
                    num_bytes = position
        return (num_records - 1, num_bytes) if num_records > 1 else (0, 0)

    def columns(self, path: Path) -> Sequence[str]:
        """Read the header."""
        with path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), ())

    def rows(self, path: Path) -> Iterator[Row]:
        """Read the rows again, every value as text."""
        # The limit of 131,072 characters a field is the csv module's own, and process-wide.
        csv.field_size_limit(2**31 - 1)
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)


def _with_header(stream: IO[str], columns: Sequence[str]) -> csv.DictWriter[str]:
    table = csv.DictWriter(stream, columns)
    table.writeheader()
    return table


def has_answers(path: Path) -> bool:
    """Tell whether the first row of a file has the columns of an answer."""
    ending = suffix_of(path)
    # What becomes a workbook is JSON lines until then, and what becomes a packed file is not packed.
    name = path.name.lower().removesuffix(".old").removesuffix(".part").removesuffix(".gz")
    try:
        if ending == ".xlsx":
            from manyicl.tasks.workbook import workbook_header

            return ANSWER_COLUMNS.issubset(workbook_header(path))
        with (gzip.open if ending.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            if name.endswith(".csv"):
                return ANSWER_COLUMNS.issubset(next(csv.reader(file), ()))
            row = json.loads(file.readline(), parse_int=NumberText)
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, UserError):
        return False
    return isinstance(row, dict) and ANSWER_COLUMNS.issubset(row)


def require_no_rows_of(task_name: str, examples: Iterable[Example], output: Path) -> None:
    """Refuse an output with the name of a file that some of the task's rows came from.

    Raises:
        UserError: If it has.
    """
    if output.exists() and output.name in {example.origin.rpartition(":")[0] for example in examples}:
        what = f"the output has the name of a file with rows of task {task_name!r}"
        raise UserError("output_is_input", what, remedy="Write to another file.", file=output)


def with_answer(row: Row, answer: Row) -> Row:
    """Add an answer to its query; an input column with the name of an output column becomes ``input_...``."""
    return {**with_other_names(row, answer), **answer}


def _as_field(value: object) -> object:
    return as_json(value) if isinstance(value, list | dict) else as_written(value)


def as_json(value: object) -> str:
    r"""Write a value as JSON; a number that was read as text is written as it was.

    >>> as_json({"share": NumberText("1.50"), "ids": [NumberText("1e400"), "7"]})
    '{"share": 1.50, "ids": [1e400, "7"]}'
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_json(str(name))}: {as_json(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_json, value)) + "]"
    if isinstance(value, NumberText) and _JSON_NUMBER.fullmatch(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
