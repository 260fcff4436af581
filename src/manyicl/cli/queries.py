"""Where `manyicl predict` reads its queries: row by row, each with its location, so that an error can name it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyicl.checked import decoded_lines
from manyicl.cli.answers import STANDARD_STREAM, with_answer
from manyicl.errors import UserError, located, shortened
from manyicl.tasks.files import task_places
from manyicl.tasks.rows import DELIMITERS, LocatedRow, Quotes, iter_rows, json_rows
from manyicl.tasks.schema import OneFile, TwoFiles, read_task_file

if TYPE_CHECKING:
    from manyicl.engine.engine import Prediction
    from manyicl.tasks.task import Query, Task

STANDARD_INPUT = "standard input"


def rows_of(path: Path, task: str | None, delimiter: str | None) -> Iterator[LocatedRow]:
    """Read queries one after another, from a file of the kind of the task's own rows as these are read, or a stream.

    Args:
        path: File of queries; ``-`` for JSON lines on standard input.
        task: Reference of the task, whose file may name delimiter and quotes.
        delimiter: Character between fields; None for that of the task.

    Raises:
        UserError: If the delimiter cannot be used, or standard input is closed.
    """
    if path == STANDARD_STREAM and sys.stdin is None:
        remedy = "Send JSON lines to it, or name a file."
        raise UserError("closed_stream", "standard input is closed", remedy=remedy, field="--input")
    if path.suffix.lower() not in DELIMITERS:
        if delimiter is not None:
            what = "--delimiter goes with queries in a .csv or .tsv file"
            raise UserError("useless_option", what, found=repr(str(path)), field="--delimiter")
        return _standard_input() if path == STANDARD_STREAM else iter_rows(path)
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        what, found = "--delimiter is not one character, or is a double quote or line break", shortened(repr(delimiter))
        raise UserError("bad_delimiter", what, found=found, field="--delimiter")
    of_task, quotes = _fields_of_task(task, path.suffix) if task is not None else (None, "csv")
    return iter_rows(path, delimiter=delimiter or of_task, quotes=quotes)


def _fields_of_task(task: str, suffix: str) -> tuple[str | None, Quotes]:
    """Return delimiter and quotes that a task file names for local rows in files of this suffix."""
    place = task_places(task)[0]
    data = read_task_file(place).data if isinstance(place, Path) else None
    if not isinstance(data, OneFile | TwoFiles):
        return None, "csv"
    files = (data.file,) if isinstance(data, OneFile) else data.train + data.test
    if not any(Path(file).suffix.lower() == suffix.lower() for file in files):
        return None, "csv"
    return data.delimiter, data.quotes


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
        waiting: Rows that were read and not answered yet.
        num_answered: Rows that have their answers.
    """

    source: Path
    rows: Iterator[LocatedRow]
    waiting: deque[LocatedRow] = field(default_factory=deque)
    num_answered: int = 0

    def rendered(self, task: Task) -> Iterator[Query]:
        """Render the rows as they are needed; a mistake in one names its place."""
        from manyicl.engine.queries import checked_query

        for row in self.rows:
            with located(file=row.file, row=row.line):
                query = checked_query(row.columns, task)
            self.waiting.append(row)
            yield query

    def read_ahead(self, task: Task) -> list[Query]:
        """Render the rows that demonstrations are fitted to, so that mistakes are found before a model is loaded."""
        from manyicl.engine.engine import FITTED_QUERIES

        queries = list(islice(self.rendered(task), FITTED_QUERIES))
        if not queries:
            raise _no_rows(self.source)
        return queries

    def answered(self, predictions: Iterator[Prediction], columns: Callable[[Prediction], Any]) -> Iterator[Any]:
        """Combine each prediction with the row that it answers; name the location of a query that does not fit."""
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
            yield with_answer(self.waiting.popleft().columns, columns(prediction))
        # Nothing may take the place of earlier answers.
        if not self.num_answered:
            raise _no_rows()


def _no_rows(file: Path | None = None) -> UserError:
    return UserError("no_rows", "there is no row to answer", expected="at least one query", field="--input", file=file)
