"""Where `manyicl predict` reads its queries: row by row, each with its location, so that an error can name it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from manyicl.checked import decoded_lines, require_encoding
from manyicl.cli.answers import STANDARD_STREAM, Row, with_answer
from manyicl.errors import UserError, located, shortened
from manyicl.tasks.files import table_of_short_form, task_places
from manyicl.tasks.rows import (
    GZIP,
    LocatedRow,
    RowFormat,
    column_names,
    has_header,
    is_fielded,
    is_text,
    iter_rows,
    json_rows,
    suffix_of,
)
from manyicl.tasks.schema import OneFile, TwoFiles, read_task_file, row_format

if TYPE_CHECKING:
    from manyicl.engine.prediction import Prediction
    from manyicl.engine.queries import BadRows
    from manyicl.tasks.task import Query, Task

STANDARD_INPUT = "standard input"


def open_queries(
    path: Path, task: str | None, delimiter: str | None, encoding: str | None, bad_rows: BadRows
) -> Queries:
    """Read queries one after another, from a file of the kind of the task's own rows as these are read, or a stream.

    Args:
        path: File of queries; ``-`` for JSON lines on standard input.
        task: Reference of the task, which may name delimiter, quotes and encoding.
        delimiter: Character between fields; None for that of the task.
        encoding: Encoding of the text; None for that of the task.
        bad_rows: Whether a row that cannot be rendered is refused, or passed on with the reason.

    Raises:
        UserError: If delimiter or encoding cannot be used, or standard input is closed.
    """
    if path == STANDARD_STREAM and sys.stdin is None:
        remedy = "Send JSON lines to it, or name a file."
        raise UserError("closed_stream", "standard input is closed", remedy=remedy, field="--input")
    _require_usable(path, delimiter, encoding)
    if path == STANDARD_STREAM:
        return Queries(path, _standard_input(), bad_rows)
    how = _format_of_task(task, path) if task is not None else RowFormat()
    how["delimiter"] = delimiter or how.get("delimiter")
    how["encoding"] = encoding or how.get("encoding")
    read_as = {
        "suffix": suffix_of(path),
        "delimiter": str(how["delimiter"]),
        "quotes": how.get("quotes", "csv"),
        "encoding": str(how["encoding"]),
    }
    again, header = partial(iter_rows, path, **how), partial(column_names, path, **how)
    return Queries(path, again(), bad_rows, again, header, read_as)


def _require_usable(path: Path, delimiter: str | None, encoding: str | None) -> None:
    """Refuse options that say nothing of a file of this kind, or that no file can have."""
    if delimiter is not None and not is_fielded(path):
        what = "--delimiter goes with queries in a .csv or .tsv file"
        raise UserError("useless_option", what, found=repr(str(path)), field="--delimiter")
    if encoding is not None and not is_text(path):
        what = "--encoding goes with queries in a text file"
        raise UserError("useless_option", what, found=repr(str(path)), field="--encoding")
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        what, found = "--delimiter is not one character, or is a double quote or line break", shortened(repr(delimiter))
        raise UserError("bad_delimiter", what, found=found, field="--delimiter")
    try:
        require_encoding(encoding or "utf-8")
    except ValueError as error:
        raise UserError("bad_encoding", f"--encoding: {error}", field="--encoding") from error


def _format_of_task(task: str, path: Path) -> RowFormat:
    """Return how a task says that local rows are read, in files of the kind of this one."""
    place = task_places(task)[0]
    data = read_task_file(place).data if isinstance(place, Path) else table_of_short_form(place)[0]
    if not isinstance(data, OneFile | TwoFiles):
        return {}
    files = (data.file,) if isinstance(data, OneFile) else data.train + data.test
    if not any(suffix_of(Path(file)).removesuffix(GZIP) == suffix_of(path).removesuffix(GZIP) for file in files):
        return {}
    # A sheet has the name that its file gives it, and a file of queries is another one.
    return {**row_format(data), "sheet": None}


def _standard_input() -> Iterator[LocatedRow]:
    """Yield the queries of standard input as they come, UTF-8 whatever the locale says."""
    # Lines of bytes: text would be decoded many lines at a time, and which of them is not UTF-8 be lost.
    lines = sys.stdin.buffer if hasattr(sys.stdin, "buffer") else map(str.encode, sys.stdin)
    return json_rows(decoded_lines(lines, STANDARD_INPUT), STANDARD_INPUT)


@dataclass
class Queries:
    """Rows on their way to their answers.

    Attributes:
        source: File they come from.
        rows: Rows that are still to be read.
        bad_rows: Whether a row that cannot be rendered is refused, or passed on with the reason.
        again: Reads the rows of a file anew, from the first.
        header: Reads the columns that the file has even without rows; none of JSON lines.
        read_as: What the rows of a file depend on besides its content: suffix, delimiter, quotes and encoding.
        waiting: Rows that were read and not answered yet.
        num_answered: Rows that have their answers.
    """

    source: Path
    rows: Iterator[LocatedRow]
    bad_rows: BadRows = "refuse"
    again: Callable[[], Iterable[LocatedRow]] = tuple
    header: Callable[[], Sequence[str]] = tuple
    read_as: Mapping[str, str] = field(default_factory=dict)
    waiting: deque[LocatedRow] = field(default_factory=deque)
    num_answered: int = 0
    _num_read: int = 0

    def rendered(self, task: Task) -> Iterator[Query | UserError]:
        """Render the rows as they are needed; a mistake in one names its place, and one in the header is refused."""
        from manyicl.engine.queries import checked_query

        for row in self.rows:
            if not self._num_read and self.source != STANDARD_STREAM and has_header(self.source):
                require_columns(task, tuple(row.columns), self.source)
            query: Query | UserError
            try:
                with located(file=row.file, row=row.line):
                    query = checked_query(row.columns, task)
            except UserError as error:
                if self.bad_rows == "refuse":
                    raise
                query = error
            self._num_read += 1
            if self._num_read > self.num_answered:
                self.waiting.append(row)
            yield query

    def read_ahead(self, task: Task) -> list[Query | UserError]:
        """Render the rows that demonstrations are fitted to, so that mistakes are found before a model is loaded."""
        from manyicl.engine.engine import FITTED_QUERIES

        queries = list(islice(self.rendered(task), FITTED_QUERIES))
        if not queries:
            self.columns_without_rows(task)
        return queries

    def columns_without_rows(self, task: Task) -> Sequence[str]:
        """Return the columns of a table without rows.

        Raises:
            UserError: If the file has not even a header, or one without a column of the task.
        """
        columns = self.header()
        if not columns:
            expected = "at least one query"
            file = None if self.source == STANDARD_STREAM else self.source
            raise UserError("no_rows", "there is no row to answer", expected=expected, field="--input", file=file)
        require_columns(task, columns, self.source)
        return columns

    def count(self) -> int | None:
        """Count all rows, those with answers among them; None of standard input, or where one cannot be read."""
        if self.source == STANDARD_STREAM:
            return None
        try:
            return sum(1 for _ in self.again())
        except UserError:
            return None

    def skip(self, num_answered: int) -> None:
        """Leave out first rows that have their answers, so that the next answer belongs to the row after them."""
        self.num_answered = num_answered
        for _ in range(min(num_answered, len(self.waiting))):
            self.waiting.popleft()

    def answered(
        self,
        predictions: Iterator[Prediction],
        columns: Callable[[Prediction], Row],
        on_answer: Callable[[Row, Row], object] = lambda row, answer: None,
    ) -> Iterator[Row]:
        """Combine each prediction with the row that it answers; name the location of a query that does not fit.

        Args:
            predictions: One for each row that is still to be answered.
            columns: Makes the columns of an answer.
            on_answer: Called with the columns of each row and those of its answer.
        """
        while True:
            try:
                prediction = next(predictions, None)
            except UserError as error:
                if error.file is None and error.row is not None:
                    row = self.waiting[error.row - 1 - self.num_answered]
                    error.file, error.row = row.file, row.line
                raise
            if prediction is None:
                break
            self.num_answered += 1
            answered, answer = self.waiting.popleft().columns, columns(prediction)
            on_answer(answered, answer)
            yield with_answer(answered, answer)


def require_columns(task: Task, columns: Sequence[str], file: Path) -> None:
    """Refuse a table whose header lacks a column of the task, which no row can have then.

    Raises:
        UserError: If one is missing.
    """
    if not set(task.columns) <= set(columns):
        with located(file=file, row=1):
            task.query(dict.fromkeys(columns, ""))
