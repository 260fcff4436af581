"""`manyicl predict`: a file or stream of queries in, answers out, in order."""

from __future__ import annotations

import csv
import json
import sys
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from manyicl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from manyicl.engine.engine import Engine
    from manyicl.engine.prefix_cache import PrefixCache

STANDARD_STREAM = Path("-")


def predict_command(
    model: Annotated[str, typer.Option(help="Model folder, `hf:owner/name`, or `builtin:nano`.")],
    task: Annotated[str, typer.Option(help="Task folder, or a file with two columns: `tickets.csv:text:label`.")],
    input_path: Annotated[
        Path,
        typer.Option(
            "--input", help="Queries, one row each: .jsonl, .csv, .tsv, .parquet; - for JSON lines on standard input."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Where answers go: .jsonl or .csv; - for JSON lines.")] = STANDARD_STREAM,
    shots: Annotated[int | None, typer.Option(help="Demonstrations; all training rows that fit if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the demonstrations.")] = 0,
    scores: Annotated[bool, typer.Option(help="Write the log-probability of every label too.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one pass; changes speed and memory only.")] = 16,
    data_root: Annotated[Path | None, typer.Option(help="Folder that data paths in the task start from.")] = None,
    max_context_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prefix and query together.")] = None,
) -> None:
    """Answer the queries of a file after demonstrations of a task.

    Every output row holds the input row with `answer`, `log_probability` and `stopped` added. A free answer that
    reached the length limit before it ended has `stopped: false`.

    Examples:

        manyicl predict --model runs/one-model --task tasks/tickets --input new.csv --output answers.csv

        cat new.jsonl | manyicl predict --model runs/one-model --task tickets.csv:text:label --shots 64 --input -
    """
    from rich.console import Console
    from rich.progress import track

    from manyicl.engine.engine import Engine
    from manyicl.tasks.files import load_task

    console = Console(stderr=True)
    _require_writable(output)
    if input_path != STANDARD_STREAM and not input_path.is_file():
        raise UserError(f"The input file {str(input_path)!r} does not exist.")
    loaded_task = load_task(task, data_root)
    engine = Engine.from_pretrained(model, max_context_tokens=max_context_tokens)
    num_shots = len(loaded_task.train) if shots is None else shots
    prefix = engine.prefill(loaded_task, loaded_task.demonstrations(num_shots, seed))
    note = f"{prefix.num_shots} demonstrations of {loaded_task.name!r}, {prefix.num_tokens:,} tokens"
    if prefix.num_left_out:
        note += f"; {prefix.num_left_out} more did not fit the context of {engine.max_context_tokens:,}"
    console.print(note, highlight=False)
    answered = _answered(engine, prefix, _read(input_path), batch_size, scores)
    num_answers = _write(output, track(answered, description="Answering", console=console))
    if output != STANDARD_STREAM:
        console.print(f"{num_answers:,} answers written to {output}", highlight=False)


def _require_writable(output: Path) -> None:
    """Refuse an output before anything is computed."""
    if output == STANDARD_STREAM:
        return
    if output.suffix not in (".jsonl", ".csv"):
        raise UserError(f"Answers are written as .jsonl or .csv; found {str(output)!r}.")
    if not output.parent.is_dir():
        raise UserError(f"The folder {str(output.parent)!r} of the output does not exist; make it first.")


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the queries of a file, or of standard input as they come."""
    from manyicl.tasks.rows import parse_json_row, read_rows

    if path != STANDARD_STREAM:
        yield from (row.columns for row in read_rows(path))
        return
    for number, line in enumerate(sys.stdin, start=1):
        if line.strip():
            yield parse_json_row(line, f"standard input:{number}")


def _answered(
    engine: Engine, prefix: PrefixCache, rows: Iterable[dict[str, Any]], batch_size: int, with_scores: bool
) -> Iterator[dict[str, Any]]:
    """Put each answer beside the row that asked for it."""
    asked: deque[dict[str, Any]] = deque()

    def remembered() -> Iterator[dict[str, Any]]:
        for row in rows:
            asked.append(row)
            yield row

    for prediction in engine.predict(prefix, remembered(), batch_size=batch_size):
        answer = {
            "answer": prediction.answer,
            "log_probability": round(prediction.log_probability, 6),
            "stopped": prediction.stopped,
        }
        scores = {"scores": prediction.scores} if with_scores else {}
        yield {**_without_clashes(asked.popleft(), {*answer, *scores}), **answer, **scores}


def _without_clashes(row: dict[str, Any], taken: set[str]) -> dict[str, Any]:
    """Keep an input column that has the name of an output column under `input_...`."""
    return {f"input_{column}" if column in taken else column: value for column, value in row.items()}


@contextmanager
def _opened(output: Path) -> Iterator[IO[str]]:
    if output == STANDARD_STREAM:
        yield sys.stdout
    else:
        with output.open("w", encoding="utf-8", newline="") as stream:
            yield stream


def _write(output: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as they come, and return how many there were."""
    num_rows = 0
    table: csv.DictWriter[str] | None = None
    with _opened(output) as stream:
        for row in rows:
            num_rows += 1
            if output.suffix != ".csv":
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
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
