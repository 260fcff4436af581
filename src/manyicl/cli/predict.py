"""`manyicl predict`: a file or stream of queries in, answers out, in order."""

from __future__ import annotations

import csv
import json
import sys
from collections import deque
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from manyicl.cli.options import Device, Dtype, EndOfAnswer, TextFormat
from manyicl.cli.outputs import part_of, require_earlier_answers, require_writable
from manyicl.errors import QueryError, UserError, counted, shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from manyicl.engine.engine import Engine, Prediction
    from manyicl.engine.task_prefix import TaskPrefix
    from manyicl.tasks.rows import LocatedRow, Quotes
    from manyicl.tasks.task import Example, Query, Task

STANDARD_STREAM = Path("-")


def predict_command(
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder, `hf:owner/name`, or `builtin:nano`.")],
    input_path: Annotated[
        Path,
        typer.Option(
            "--input", help="Queries, one row each: .jsonl, .csv, .tsv, .parquet; - for JSON lines on standard input."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            "--task", "-t", help="Task folder, catalog:NAME, or a file with two columns: `tickets.csv:text:label`."
        ),
    ] = None,
    prefix: Annotated[
        Path | None, typer.Option(help="What `manyicl compile` wrote, in place of --task, --shots and --seed.")
    ] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(
            help="Between the fields of a .csv or .tsv of queries. [default: that of the task's own rows in such a "
            "file, or a comma, in .tsv a tab]"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where answers go: .jsonl or .csv; - for JSON lines.")] = STANDARD_STREAM,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Demonstrations; all training rows that fit if not given.")
    ] = None,
    nearest: Annotated[
        int, typer.Option(min=0, help="So many training rows more for each query, those most like it (BM25).")
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="Chooses demonstrations and draws. [default: 0]")] = None,
    scores: Annotated[bool, typer.Option(help="Write score and probability of every label too.")] = False,
    abstain_below: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Leave the answer empty where its probability among the labels is below this."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Draw free answers at this temperature. [default: the likeliest tokens]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw free answers among tokens that together reach this probability.")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Where data paths begin that are not found beside their task.yaml.")
    ] = None,
    max_context_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prefix and query together.")] = None,
    working_memory_mib: Annotated[
        int | None, typer.Option(min=1, help="Bound on queries in flight; changes speed and memory, not results.")
    ] = None,
    text_format: TextFormat = None,
    end_of_answer: EndOfAnswer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Answer the queries of a file after demonstrations of a task.

    Every output row holds the input row with `answer`, `log_probability` and `stopped` added. A free answer that
    reached the length limit before it ended has `stopped: false`. Until all are there they stand in `OUTPUT.part`;
    where a run was interrupted, the next one leaves that file alone and says so.

    Examples:

        manyicl predict --model runs/one-model --task tasks/tickets --input new.csv --output answers.csv

        manyicl predict --model runs/one-model --prefix tickets.prefix --input new.csv --abstain-below 0.8

        cat new.jsonl | manyicl predict --model runs/one-model --task tickets.csv:text:label --shots 64 --input -
    """
    from rich.console import Console
    from rich.progress import Progress

    from manyicl.engine.backend import Sampling
    from manyicl.engine.engine import Engine
    from manyicl.tasks.files import load_task

    console = Console(stderr=True)
    only_with_task = {"--shots": shots, "--nearest": nearest or None, "--data-root": data_root}
    if temperature is None and top_p is None:
        only_with_task["--seed"] = seed
    _require_one_source(task, prefix, only_with_task)
    _require_output(output, {"--input": input_path, "--prefix": prefix})
    if input_path == STANDARD_STREAM and sys.stdin is None:
        raise UserError("--input -: standard input is closed; send JSON lines to it, or name a file.")
    sampling = None
    if temperature is not None or top_p is not None:
        sampling = Sampling(1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, seed or 0)
    loaded_task = load_task(task, data_root) if task is not None else None
    rows = _rows_of_file(input_path, task, delimiter)
    demonstrations: Sequence[Example] = ()
    if loaded_task is not None:
        _require_no_rows_of(loaded_task.name, (*loaded_task.train, *loaded_task.test), output)
        demonstrations = loaded_task.demonstrations(len(loaded_task.train) if shots is None else shots, seed or 0)
    if output != STANDARD_STREAM:
        require_earlier_answers(output)
    queries = None if rows is None or loaded_task is None else _queries(loaded_task, rows)
    if rows == []:
        raise UserError(f"{input_path}: there is no row to answer.")
    engine = Engine.from_pretrained(
        model,
        dtype=dtype,
        device=device,
        text_format=text_format,
        end_of_answer=end_of_answer,
        max_context_tokens=max_context_tokens,
        working_memory_mib=working_memory_mib,
    )
    near = None
    if loaded_task is None:
        assert prefix is not None, "one of both is given"
        cache = engine.load(prefix).prefix
        _require_no_rows_of(cache.task.name, cache.demonstrations, output)
    else:
        cache, near = engine.prepare(loaded_task, demonstrations, queries, num_nearest=nearest)
    console.print(_described(engine, cache), markup=False, highlight=False)
    predictions = partial(
        engine.predict,
        cache,
        scores="all" if scores or abstain_below is not None else "best",
        abstain_below=abstain_below,
        sampling=sampling,
        nearest=near,
    )
    predictions([])  # options that contradict each other are refused before anything is written
    asked = _standard_input() if rows is None else rows
    answered = _answered(predictions, asked, scores, abstain_below is not None)
    total = None if rows is None else len(rows)
    with Progress(console=console) as progress:
        num_answers = _write(output, progress.track(answered, total=total, description="Answering"))
    if output != STANDARD_STREAM:
        console.print(f"{counted(num_answers, 'answer')} written to {output}", markup=False, highlight=False)


def _require_one_source(task: str | None, prefix: Path | None, only_with_task: Mapping[str, object]) -> None:
    """Refuse a call that says twice, or not at all, where demonstrations come from."""
    if (task is None) == (prefix is None):
        raise UserError("Give either --task, or --prefix with a file that `manyicl compile` wrote.")
    given = [name for name, value in only_with_task.items() if value is not None]
    if prefix is not None and given:
        raise UserError(f"{given[0]} goes with --task; a compiled task holds its demonstrations already.")


def _rows_of_file(path: Path, task: str | None, delimiter: str | None) -> list[LocatedRow] | None:
    """Read a file of queries, one of the same kind as the task's own rows as these are read; None for a stream."""
    from manyicl.tasks.rows import DELIMITERS, read_rows

    if path.suffix.lower() not in DELIMITERS:
        if delimiter is not None:
            raise UserError(f"--delimiter goes with queries in a .csv or .tsv file; found {str(path)!r}.")
        return None if path == STANDARD_STREAM else read_rows(path)
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise UserError(
            f"--delimiter expects one character, no double quote or line break; found {shortened(repr(delimiter))}."
        )
    of_task, quotes = _fields_of_task(task, path.suffix) if task is not None else (None, "csv")
    return read_rows(path, delimiter=delimiter or of_task, quotes=quotes)


def _fields_of_task(task: str, suffix: str) -> tuple[str | None, Quotes]:
    """Return delimiter and quotes that a task file names for local rows in files of this suffix."""
    from manyicl.tasks.files import task_places
    from manyicl.tasks.schema import OneFile, TwoFiles, read_task_file

    place = task_places(task)[0]
    data = read_task_file(place).data if isinstance(place, Path) else None
    if isinstance(data, OneFile):
        files: tuple[str, ...] = (data.file,)
    elif isinstance(data, TwoFiles):
        files = data.train + data.test
    else:
        return None, "csv"
    if not any(Path(file).suffix.lower() == suffix.lower() for file in files):
        return None, "csv"
    return data.delimiter, data.quotes


def _queries(task: Task, rows: Iterable[LocatedRow]) -> list[Query]:
    """Render the rows of a file, or say which of them cannot be asked, before a model is loaded."""
    from manyicl.engine.engine import checked_query

    queries = []
    for number, row in enumerate(rows, start=1):
        try:
            query = checked_query(row.columns, task)
        except UserError as error:
            raise UserError(f"{row.place}: Query {number}: {error}") from error
        queries.append(query)
    return queries


def _described(engine: Engine, prefix: TaskPrefix) -> str:
    """Say what stands before every query, and what a reader should know of it."""
    text = f"{counted(prefix.num_shots, 'demonstration')} of {prefix.task.name!r}, {prefix.num_tokens:,} tokens"
    if prefix.num_dropped:
        text += f"; {prefix.num_dropped} more did not fit the context of {engine.max_context_tokens:,}"
    if engine.trained_context_tokens and prefix.num_tokens > engine.trained_context_tokens:
        text += f"; beyond the {engine.trained_context_tokens:,} tokens that the model was trained on"
    return text


def _require_no_rows_of(name: str, examples: Iterable[Example], output: Path) -> None:
    """Refuse to write over a file that has the name of one the task's rows came from."""
    sources = {example.origin.rpartition(":")[0] for example in examples}
    if output.exists() and output.name in sources:
        raise UserError(
            f"The output {str(output)!r} has the name of a file that holds rows of task {name!r}; write the "
            "answers to another one."
        )


def _require_output(output: Path, read: Mapping[str, Path | None]) -> None:
    """Refuse an output before anything is computed."""
    if output == STANDARD_STREAM:
        if sys.stdout is None:
            raise UserError("Standard output is closed; name a file with --output.")
        return
    if output.suffix not in (".jsonl", ".csv"):
        raise UserError(f"Answers are written as .jsonl or .csv; found {str(output)!r}.")
    require_writable(output)
    if output.is_dir():
        raise UserError(f"The output {str(output)!r} is a folder; expected a file.")
    if not output.parent.is_dir():
        raise UserError(f"The folder {str(output.parent)!r} of the output does not exist; make it first.")
    for name, path in read.items():
        if path is not None and output.resolve() == path.resolve():
            raise UserError(f"{name} and --output are the same file {str(output)!r}; write the answers to another one.")


def _standard_input() -> Iterator[LocatedRow]:
    """Yield the queries of standard input as they come, UTF-8 whatever the locale says."""
    from manyicl.tasks.rows import LocatedRow, parse_json_row

    # Lines of bytes: text would be decoded many lines at a time, and which of them is not UTF-8 be lost.
    for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(line, bytes) else line
        except UnicodeDecodeError as error:
            raise UserError(f"standard input:{number}: not UTF-8, {error.reason}; send UTF-8.") from error
        if text.strip():
            yield LocatedRow(parse_json_row(text, f"standard input:{number}"), "standard input", number)


def _answered(
    predict: Callable[[Iterable[dict[str, Any]]], Iterator[Prediction]],
    rows: Iterable[LocatedRow],
    with_scores: bool,
    may_abstain: bool,
) -> Iterator[dict[str, Any]]:
    """Put each answer beside the row that asked for it; name the place of a query that cannot be asked."""
    asked: deque[LocatedRow] = deque()
    num_answered = 0

    def remembered() -> Iterator[dict[str, Any]]:
        for row in rows:
            asked.append(row)
            yield row.columns

    predictions = predict(remembered())
    while True:
        try:
            prediction = next(predictions, None)
        except QueryError as error:
            raise UserError(f"{asked[(error.row or 1) - 1 - num_answered].place}: {error}") from error
        if prediction is None:
            return
        answer: dict[str, Any] = {
            "answer": None if prediction.abstained else prediction.answer,
            "log_probability": round(prediction.log_probability, 6),
            "stopped": prediction.stopped,
        }
        if may_abstain:
            answer["abstained"] = prediction.abstained
        if with_scores and prediction.scores is not None:
            answer["scores"] = dict(prediction.scores.log_probabilities)
            answer["probabilities"] = prediction.scores.probabilities
        num_answered += 1
        yield {**_without_clashes(asked.popleft().columns, set(answer)), **answer}


def _without_clashes(row: dict[str, Any], taken: set[str]) -> dict[str, Any]:
    """Keep an input column that has the name of an output column under `input_...`."""
    kept: dict[str, Any] = {}
    for column, value in row.items():
        name = column
        while name in taken or (name != column and name in row):
            name = f"input_{name}"
        kept[name] = value
    return kept


@contextmanager
def _opened(output: Path) -> Iterator[IO[str]]:
    if output == STANDARD_STREAM:
        yield sys.stdout
        return
    # An error half-way leaves an earlier output as it was, and the answers so far in the `.part` file.
    part = part_of(output)
    try:
        with part.open("w", encoding="utf-8", newline="") as stream:
            yield stream
    except (UserError, KeyboardInterrupt) as error:
        has_answers = part.stat().st_size > 0
        if not has_answers:
            part.unlink()
        if isinstance(error, UserError):
            raise UserError(f"{error} The answers before it are in {part}." if has_answers else str(error)) from error
        typer.echo(f"Stopped; {f'the answers so far are in {part}' if has_answers else 'no answer yet'}.", err=True)
        raise
    part.replace(output)


def _json_line(row: dict[str, Any]) -> str:
    """Write a row as JSON; half a character, which UTF-8 cannot hold, as the escape that it came as."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line + "\n"


def _write(output: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as they come, and return how many there were."""
    num_rows = 0
    table: csv.DictWriter[str] | None = None
    with _opened(output) as stream:
        for row in rows:
            num_rows += 1
            if output.suffix != ".csv":
                stream.write(_json_line(row))
                continue
            flat = {
                column: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
                for column, value in row.items()
            }
            if table is None:
                table = csv.DictWriter(stream, fieldnames=list(flat))
                table.writeheader()
            if set(flat) != set(table.fieldnames):
                raise UserError(
                    f"Query {num_rows} has the columns {sorted(flat)}; the rows before it had "
                    f"{sorted(table.fieldnames)}. Write to .jsonl, where rows may differ."
                )
            table.writerow(flat)
    return num_rows
