"""Forms of answers that cannot be continued byte by byte: made of a plain one once all rows are there."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from manyicl.atomic import write_atomically
from manyicl.cli.answers import Columns, CsvForm, Earlier, JsonLinesForm, Row, as_json
from manyicl.tasks.values import NumberText
from manyicl.tasks.workbook import require_fit, require_openpyxl, require_sheet, write_workbook

# openpyxl writes so many digits.
_DIGITS_OF_A_CELL = 16
# Longer ones have more digits than that.
_MOST_CHARACTERS_OF_A_NUMBER = 24


class GzipJsonLinesForm(JsonLinesForm):
    """JSON lines, packed with gzip at the end."""

    def finish(self, part: Path, output: Path) -> None:
        """Pack the rows."""
        _pack(part, output)


class GzipCsvForm(CsvForm):
    """CSV, packed with gzip at the end."""

    def finish(self, part: Path, output: Path) -> None:
        """Pack the rows."""
        _pack(part, output)


def _pack(part: Path, output: Path) -> None:
    def pack(aside: Path) -> None:
        with (
            part.open("rb") as plain,
            aside.open("wb") as file,
            gzip.GzipFile(output.name, "wb", fileobj=file, mtime=0) as packed,
        ):
            shutil.copyfileobj(plain, packed)

    # The rows are removed only once what was made of them is on the disk.
    write_atomically(output, pack)
    part.unlink()


class WorkbookForm(JsonLinesForm):
    """An Excel workbook, made at the end of JSON lines; a row that lacks a column of others has an empty cell there."""

    def __init__(self, output: Path) -> None:
        """Refuse the form where the libraries that write it are missing."""
        require_openpyxl(output)
        self._columns_without_rows: Sequence[str] = ()

    def columns(self, path: Path) -> Sequence[str]:
        """Return the columns of the sheet: those that any row has."""
        return list(dict.fromkeys(name for row in self.rows(path) for name in row))

    def write(self, stream: IO[str], rows: Iterable[Row], earlier: Earlier, columns_without_rows: Columns) -> int:
        """Write rows as they come, and count them; refuse what no cell or sheet can hold."""

        def kept_columns() -> Sequence[str]:
            self._columns_without_rows = columns_without_rows()
            return self._columns_without_rows

        return super().write(stream, _fitting(rows, earlier), earlier, kept_columns)

    def finish(self, part: Path, output: Path) -> None:
        """Write the workbook."""
        names = self.columns(part) or self._columns_without_rows
        rows = ([_as_cell(row.get(name)) for name in names] for row in self.rows(part))
        write_atomically(output, lambda aside: write_workbook(aside, names, rows))
        part.unlink()


def _fitting(rows: Iterable[Row], earlier: Earlier) -> Iterator[Row]:
    columns = dict.fromkeys(earlier.columns)
    for number, row in enumerate(rows, start=earlier.num_rows + 1):
        columns |= dict.fromkeys(row)
        require_sheet(1 + number, len(columns), number)
        for column, value in row.items():
            require_fit(str(_as_cell(value)), number, column)
        yield row


def _as_cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        return as_json(value)
    return _number_or_text(value) if isinstance(value, NumberText) else value


def _number_or_text(written: NumberText) -> int | float | str:
    """Return a number where a cell keeps it as it was written; otherwise, as of ``1.10`` or ``1e400``, its text.

    >>> [_number_or_text(NumberText(written)) for written in ("-7", "0.25", "1.0", "1.10", "1e400")]
    [-7, 0.25, 1.0, '1.10', '1e400']
    """
    if len(written) <= _MOST_CHARACTERS_OF_A_NUMBER:
        number = int(written) if written.lstrip("-").isdecimal() else float(written)
        if str(number) == written and float(f"{number:.{_DIGITS_OF_A_CELL}g}") == number:
            return number
    return str(written)
