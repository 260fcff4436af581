"""Where `manyicl predict` writes its answers: next to their queries, in a file that is complete or absent."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from manyicl.errors import UserError
from manyicl.outputs import require_output_file
from manyicl.tasks.values import NumberText, as_written

if TYPE_CHECKING:
    from manyicl.tasks.task import Example

STANDARD_STREAM = Path("-")
ANSWER_COLUMNS = frozenset({"answer", "log_probability"})

Row = dict[str, Any]
Write = Callable[[Iterable[Row]], int]


@contextmanager
def answers_written(output: Path, inputs: Mapping[str, Path | None]) -> Iterator[Write]:
    """Check an output before anything is computed, and yield what writes rows to it and counts them.

    Rows go to ``OUTPUT.part``, which belongs to this run from the check on, and take their name once all are there. A
    mistake half-way leaves an earlier output as it was, and the answers so far in that file.

    Args:
        output: ``.jsonl`` or ``.csv`` file, or ``-`` for JSON lines on standard output.
        inputs: Files that are read, by the option that names them.

    Raises:
        UserError: If the output cannot be written, would replace another file, another run writes it or was
            interrupted, or rows differ in a CSV file.
    """
    if output == STANDARD_STREAM:
        if sys.stdout is None:
            raise UserError("closed_stream", "standard output is closed", remedy="Name a file with --output.")
        yield partial(_write_json, sys.stdout)
        return
    require_output_file(output, endings=(".jsonl", ".csv"), is_ours=_is_ours, inputs=inputs)
    part = output.with_name(f"{output.name}.part")
    write = _write_csv if output.suffix.lower() == ".csv" else _write_json
    try:
        # It must not exist, so that two runs never write the same file. CSV has no escape for half a character.
        stream = part.open("x", encoding="utf-8", errors="backslashreplace", newline="")
    except FileExistsError as error:
        what = "it holds the answers of a run that was interrupted, or of one that still writes them"
        remedy = "Give it another name, or remove it; then start again."
        raise UserError("output_in_progress", what, remedy=remedy, file=part) from error
    with stream:
        try:
            yield partial(write, stream)
        except BaseException as error:
            stream.close()
            _say_what_is_left(part, error)
            raise
    part.replace(output)


def _say_what_is_left(part: Path, error: BaseException) -> None:
    """Keep the answers so far and say where they are; remove a file without any."""
    has_answers = part.stat().st_size > 0
    if not has_answers:
        part.unlink()
    if isinstance(error, UserError) and has_answers:
        error.remedy = " ".join(filter(None, [error.remedy, f"The answers before it are in {part}."]))
    elif isinstance(error, KeyboardInterrupt):
        left = f"the answers so far are in {part}" if has_answers else "no answer yet"
        typer.echo(f"Stopped; {left}.", err=True)


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
    kept: Row = {}
    for column, value in row.items():
        name = column
        while name in answer or (name != column and name in row):
            name = f"input_{name}"
        kept[name] = value
    return {**kept, **answer}


def _is_ours(path: Path) -> bool:
    """Tell whether the first row of a file has the columns of an answer."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                return ANSWER_COLUMNS.issubset(next(csv.reader(file), ()))
            row = json.loads(file.readline())
    except (OSError, ValueError, RecursionError, csv.Error):
        return False
    return isinstance(row, dict) and ANSWER_COLUMNS.issubset(row)


def _write_json(stream: IO[str], rows: Iterable[Row]) -> int:
    """Write rows as JSON lines as they come, and count them."""
    num_rows = 0
    for row in rows:
        num_rows += 1
        line = json.dumps(_with_numbers(row), ensure_ascii=False)
        # Half a character, which UTF-8 cannot hold, is written as the escape that it came as.
        stream.write(line.encode("utf-8", "backslashreplace").decode() + "\n")
    return num_rows


def _write_csv(stream: IO[str], rows: Iterable[Row]) -> int:
    """Write rows as CSV as they come, and count them."""
    num_rows = 0
    table: csv.DictWriter[str] | None = None
    for num_rows, row in enumerate(rows, start=1):
        if table is None:
            table = csv.DictWriter(stream, fieldnames=list(row))
            table.writeheader()
        if set(row) != set(table.fieldnames):
            what, remedy = "it has other columns than the rows before it", "Write to .jsonl, where rows may differ."
            expected, found = str(sorted(table.fieldnames)), str(sorted(row))
            raise UserError("other_columns", what, expected=expected, found=found, remedy=remedy, row=num_rows)
        table.writerow({column: _as_field(value) for column, value in row.items()})
    return num_rows


def _as_field(value: object) -> object:
    if isinstance(value, list | dict):
        return json.dumps(_with_numbers(value), ensure_ascii=False)
    return as_written(value)


def _with_numbers(value: Any) -> Any:
    """Turn numbers that were read as text back into numbers, in lists and mappings too."""
    if isinstance(value, dict):
        return {name: _with_numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_numbers(part) for part in value]
    if not isinstance(value, NumberText):
        return value
    try:
        return int(value)
    except ValueError:
        number = float(value)
        return number if math.isfinite(number) else str(value)
