"""Rows of an Excel workbook: read as the values that were saved, written as texts and numbers; no formula is run."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from manyicl.errors import UserError, did_you_mean, located, pluralized
from manyicl.library_errors import reason
from manyicl.tasks.packed import most_unpacked_bytes, too_large
from manyicl.tasks.rows import LocatedRow, checked_header
from manyicl.tasks.values import as_text, as_written

if TYPE_CHECKING:
    from openpyxl import Workbook

# What Excel itself can hold; a damaged or hostile file may number a row in the billions.
MOST_ROWS = 2**20
MOST_COLUMNS = 2**14
MOST_CELL_CHARACTERS = 32_767
_LARGEST_WHOLE_NUMBER = 10**15  # Excel keeps 15 digits
# What XML cannot hold, and what a reader would take for the escape of such a character.
_ESCAPED = re.compile(r"[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")
_BROKEN_REMEDY = "Open it in Excel and save it again, without a password, or export the sheet as CSV."


def require_openpyxl(path: Path) -> None:
    """Refuse a workbook where the libraries that read and write it are not installed.

    Raises:
        UserError: If openpyxl is missing, or defusedxml, without which openpyxl does not bound what XML expands to.
    """
    try:
        import defusedxml  # noqa: F401
        import openpyxl  # noqa: F401
    except ImportError as error:
        what, remedy = "Excel workbooks need openpyxl and defusedxml", "pip install 'manyicl[excel]', or use CSV."
        raise UserError("missing_requirement", what, remedy=remedy, file=path) from error


def workbook_rows(path: Path, sheet: str | None = None) -> Iterator[LocatedRow]:
    """Yield the rows of one sheet; its first row with content is the header, and rows without content are skipped.

    Numbers become text as in every form of a table, dates are written as ``2026-11-27`` or ``2026-11-27 09:30:00``, and
    an error such as ``#N/A`` is null, like an empty cell. A formula counts as the value that was last saved with it.

    Args:
        path: The workbook.
        sheet: Name of the sheet; by default the only visible one with content.

    Raises:
        UserError: If the libraries are missing, the file is no workbook or unpacks to too much, the sheet is not there,
            or not named where several have content, a row does not fit the header, or a formula was saved without a
            value.
    """
    with _readable(path) as workbook:
        yield from _located(path, _values(path, _sheet_name(workbook, sheet, path), workbook))


def workbook_header(path: Path, sheet: str | None = None) -> list[str]:
    """Return the columns of a sheet, which may have no rows; none of an empty one. Errors: see `workbook_rows`."""
    with _readable(path) as workbook:
        number, texts = next(_values(path, _sheet_name(workbook, sheet, path), workbook), (1, []))
    return _header(path, number, texts) if texts else []


@contextmanager
def _readable(path: Path) -> Iterator[Workbook]:
    """Open a workbook with its formulas; whatever goes wrong while it is read is one error of the file."""
    require_openpyxl(path)
    try:
        _require_bounded(path)
        with _opened(path, with_formulas=True) as workbook:
            yield workbook
    except UserError:
        raise
    except Exception as error:  # openpyxl meets a damaged file with whatever its code stumbles over
        what = f"not a readable Excel workbook, {reason(error)}"
        raise UserError("broken_workbook", what, remedy=_BROKEN_REMEDY, file=path) from error


def _require_bounded(path: Path) -> None:
    """Refuse a workbook whose parts are far larger than the file; no part is read beyond the size that it states."""
    with zipfile.ZipFile(path) as archive:
        num_bytes = sum(part.file_size for part in archive.infolist())
    if num_bytes > (most := most_unpacked_bytes(path)):
        raise too_large(path, most)


@contextmanager
def _opened(path: Path, with_formulas: bool) -> Iterator[Workbook]:
    """Open a workbook to be read row by row: with its formulas, or with the values that were saved with them."""
    from openpyxl import load_workbook

    # openpyxl leaves a file open that it opened itself, where a sheet is not read to its end.
    with path.open("rb") as file:
        workbook = load_workbook(file, read_only=True, data_only=not with_formulas, keep_links=False)
        try:
            yield workbook
        finally:
            workbook.close()


def _sheet_name(workbook: Workbook, sheet: str | None, path: Path) -> str:
    """Return the name of the sheet to be read."""
    names: list[str] = [one.title for one in workbook.worksheets]
    if sheet is not None:
        if sheet not in names:
            what, remedy = f"the workbook has no sheet {sheet!r}", did_you_mean(sheet, names)
            raise UserError("missing_sheet", what, found=f"the sheets {names}", remedy=remedy, file=path, field="sheet")
        return sheet
    visible = [one for one in workbook.worksheets if one.sheet_state == "visible"]
    if not visible:
        what, found = "the workbook has no visible sheet", f"the sheets {names}"
        raise UserError("missing_sheet", what, found=found, remedy="Name one of them, or show it.", file=path)
    filled: list[str] = [one.title for one in visible if _has_content(one)]
    if len(filled) > 1:
        what, found = "several sheets have content", f"the sheets {filled}"
        remedy = f"Name one, as in `,sheet={filled[0]}` after the columns, or `sheet: {filled[0]}` under `data` in a "
        remedy += "task.yaml; keep one alone in a file of queries."
        raise UserError("several_sheets", what, expected="one", found=found, remedy=remedy, file=path)
    return filled[0] if filled else str(visible[0].title)


def _has_content(sheet: Any) -> bool:
    return any(cell.value is not None for _, cells in _rows(sheet) for cell in cells)


def _rows(sheet: Any) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield number and cells of each row, however many cells it has."""
    sheet.reset_dimensions()  # what a workbook says of its size may be wrong, and would cut rows
    for number, cells in enumerate(sheet.iter_rows(), start=1):
        if number > MOST_ROWS:
            raise ValueError(f"a row has a number above {MOST_ROWS:,}")
        yield number, cells


def _values(path: Path, sheet: str, workbook: Workbook) -> Iterator[tuple[int, list[Any]]]:
    """Yield number and values of each row with content; the values of formulas are those that were saved with them.

    openpyxl reads either formulas or values. Where there are none, one reading is enough; where there are, a value that
    is not there can be told from an empty cell only by both.
    """
    with ExitStack() as stack:
        saved: Iterator[tuple[int, Sequence[Any]]] | None = None
        for number, cells in _rows(workbook[sheet]):
            if any(cell.data_type == "f" for cell in cells):
                if saved is None:
                    saved = _rows(stack.enter_context(_opened(path, with_formulas=False))[sheet])
                values = next(values for other, values in saved if other == number)
                for formula, value in zip(cells, values, strict=True):
                    if formula.data_type == "f" and value.value is None:
                        _refuse_unsaved(formula.coordinate, path, number)
                cells = values
            with located(file=path, row=number):
                texts = [_text(cell) for cell in cells]
            while texts and texts[-1] is None:
                texts.pop()
            if texts:
                yield number, texts


def _refuse_unsaved(cell: str, path: Path, row: int) -> NoReturn:
    what = f"the formula in {cell} was saved without its value, and formulas are not evaluated"
    remedy = "Open the workbook in Excel and save it, or paste values in place of formulas."
    raise UserError("formula_without_value", what, remedy=remedy, file=path, row=row)


def _text(cell: Any) -> Any:
    """Return the value of a cell as rows hold it; an error such as ``#N/A`` as null."""
    from openpyxl.utils.escape import unescape

    value = cell.value
    if cell.data_type == "e":
        return None
    if isinstance(value, str):
        # Excel never writes more; undoing the escapes of a hostile one could take long.
        if len(value) > MOST_CELL_CHARACTERS:
            what, found = f"the text in {cell.coordinate} is longer than Excel allows", f"{len(value):,}"
            raise UserError("text_too_long", what, expected=f"at most {MOST_CELL_CHARACTERS:,} characters", found=found)
        return unescape(value).replace("\r\n", "\n").replace("\r", "\n") or None
    if isinstance(value, datetime):
        return str(value.date() if value.time() == time() else value)
    return as_text(value)


def _located(path: Path, rows: Iterator[tuple[int, list[Any]]]) -> Iterator[LocatedRow]:
    """Pair the values of each row with the names in the first."""
    header: list[str] = []
    for number, texts in rows:
        if not header:
            header = _header(path, number, texts)
        elif len(texts) > len(header):
            what, remedy = "the row does not fit the header", "Name the column in the header, or clear the cell."
            expected, found = pluralized(len(header), "column"), str(len(texts))
            code = "wrong_number_of_fields"
            raise UserError(code, what, expected=expected, found=found, remedy=remedy, file=path, row=number)
        else:
            texts += [None] * (len(header) - len(texts))
            yield LocatedRow(dict(zip(header, texts, strict=True)), str(path), number)


def _header(path: Path, number: int, texts: Sequence[Any]) -> list[str]:
    """Return the names in the first row with content."""
    with located(file=path, row=number):
        return checked_header(["" if text is None else str(as_written(text)) for text in texts])


def write_workbook(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a workbook of one sheet.

    A text that begins with ``=`` stays a text, in Excel too. A whole number of more digits than Excel keeps is written
    as text.

    Args:
        path: The workbook; replaced where it exists.
        columns: Names in the header.
        rows: Values in the order of the columns: texts as `require_fit` takes them, numbers, truth values or None.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    workbook = Workbook(write_only=True)
    sheet = workbook.create_sheet("answers")

    def cell(value: Any) -> Any:
        is_number = isinstance(value, int | float) and math.isfinite(value) and abs(value) < _LARGEST_WHOLE_NUMBER
        if value is None or is_number:
            return value
        text = WriteOnlyCell(sheet, value=_escaped(str(value)))
        text.data_type = "s"
        return text

    for values in chain([columns], rows):
        sheet.append(list(map(cell, values)))
    with path.open("wb") as file:
        workbook.save(file)


def require_sheet(num_rows: int, num_columns: int, row: int) -> None:
    """Refuse more rows, the header among them, or more columns than a sheet can have.

    Raises:
        UserError: If there are more; it names the row of the table that is one too many, or has such a column.
    """
    for number, most, code, name in (
        (num_rows, MOST_ROWS, "too_many_rows", "rows"),
        (num_columns, MOST_COLUMNS, "too_many_columns", "columns"),
    ):
        if number > most:
            what, expected = f"a sheet of Excel cannot have so many {name}", f"at most {most:,}"
            raise UserError(code, what, expected=expected, remedy="Write to .csv or .jsonl.", row=row)


def require_fit(text: str, row: int, column: str) -> None:
    """Refuse a text that no cell can hold.

    Raises:
        UserError: If it is longer than a cell may be.
    """
    if len(escaped := _escaped(text)) > MOST_CELL_CHARACTERS:
        what, found = f"the column {column!r} has a text that no cell of Excel can hold", f"{len(escaped):,}"
        expected, remedy = f"at most {MOST_CELL_CHARACTERS:,} characters", "Write to .csv or .jsonl."
        code = "text_too_long"
        raise UserError(code, what, expected=expected, found=found, remedy=remedy, row=row, field=column)


def _escaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: f"_x{ord(found[0]):04X}_", text)
