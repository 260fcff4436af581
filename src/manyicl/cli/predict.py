"""`manyicl predict`: a file or stream of queries in, answers out, in order."""

from __future__ import annotations

from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyicl.cli import options
from manyicl.cli.answers import STANDARD_STREAM, answers_written, require_no_rows_of
from manyicl.errors import UserError, pluralized

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

    from manyicl.engine.engine import Engine, Prediction
    from manyicl.engine.queries import AnswerOptions
    from manyicl.engine.task_prefix import TaskPrefix


def predict_command(
    model: options.Model,
    input_path: Annotated[
        Path,
        typer.Option(
            "--input", help="Queries, one row each: .jsonl, .csv, .tsv, .parquet; - for JSON lines on standard input."
        ),
    ],
    task: Annotated[str | None, options.TASK_OPTION] = None,
    prefix: Annotated[
        Path | None, typer.Option(help="File from `manyicl compile`, instead of --task, --shots and --seed.")
    ] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(
            help="Field separator of a .csv or .tsv file of queries. [default: that of the task's own rows in such a "
            "file, or a comma, in .tsv a tab]"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="File of answers: .jsonl or .csv; - for JSON lines.")] = STANDARD_STREAM,
    shots: options.Shots = None,
    nearest: Annotated[
        int, typer.Option(min=0, help="Number of training rows most similar to a query (BM25) to add for it.")
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of demonstrations and of sampling. [default: 0]")] = None,
    scores: Annotated[bool, typer.Option(help="Also write the score and probability of every label.")] = False,
    abstain_below: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Leave the answer empty if its probability among the labels is lower."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sample free answers at this temperature. [default: greedy decoding]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the most probable tokens that together reach this probability.")
    ] = None,
    data_root: options.DataRoot = None,
    max_context_tokens: options.MaxContextTokens = None,
    activation_budget_mib: options.ActivationBudgetMib = None,
    text_format: options.TextFormat = None,
    end_of_answer: options.EndOfAnswer = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Answer the queries in a file, given demonstrations of a task.

    Every output row is the input row with `answer`, `log_probability` and `stopped` added. A free answer that
    reached the length limit before it ended has `stopped: false`. Until all answers are complete they are in
    `OUTPUT.part`; after an interrupted run, the next one does not overwrite that file, and says so.

    As many demonstrations are used as fit with the longest of the first 1,024 queries. If a later query needs more
    tokens, fewer demonstrations are used from there on, and a message says so.

    Examples:

        manyicl predict --model runs/one-model --task tasks/tickets --input new.csv --output answers.csv

        manyicl predict --model runs/one-model --prefix tickets.prefix --input new.csv --abstain-below 0.8

        cat new.jsonl | manyicl predict --model runs/one-model --task tickets.csv:text:label --shots 64 --input -
    """
    from rich.console import Console
    from rich.progress import Progress

    from manyicl.cli.queries import Queries, rows_of
    from manyicl.engine.backend import Sampling
    from manyicl.tasks.files import load_task

    console = Console(stderr=True)
    values = {"temperature": temperature, "top_p": top_p}
    given = {name: value for name, value in values.items() if value is not None}
    sampling = Sampling(**given, seed=seed or 0) if given else None
    only_with_task = {"--shots": shots, "--nearest": nearest or None, "--data-root": data_root}
    _require_one_source(task, prefix, only_with_task if sampling else {**only_with_task, "--seed": seed})
    how: AnswerOptions = {"abstain_below": abstain_below, "sampling": sampling}
    how["scores"] = "all" if scores or abstain_below is not None else "best"
    with answers_written(output, {"--input": input_path, "--prefix": prefix}) as write:
        loaded = None if task is None else load_task(task, data_root)
        queries = Queries(input_path, rows_of(input_path, task, delimiter))
        # Mistakes in the task, the shots and the first queries of a file are found before a model is loaded.
        if loaded is not None:
            require_no_rows_of(loaded.name, chain(loaded.train, loaded.test), output)
            demonstrations = loaded.demonstrations(len(loaded.train) if shots is None else shots, seed or 0)
            first = [] if input_path == STANDARD_STREAM else queries.read_ahead(loaded)
        engine = options.load_engine(
            model, dtype, device, text_format, end_of_answer, max_context_tokens, activation_budget_mib
        )
        tell = partial(describe, console, engine)
        if loaded is None:
            compiled = engine.load(prefix or "")
            require_no_rows_of(compiled.task.name, compiled.demonstrations, output)
            tell(compiled)
            predictions = engine.predict(compiled, queries.rendered(compiled.task), **how)
        else:
            rows = chain(first, queries.rendered(loaded))
            predictions = engine.answer(loaded, demonstrations, rows, num_nearest=nearest, on_prefix=tell, **how)
        answered = queries.answered(predictions, _columns(scores, abstain_below is not None))
        with Progress(console=console) as progress:
            num_answers = write(progress.track(answered, description="Answering"))
    if output != STANDARD_STREAM:
        console.print(f"{pluralized(num_answers, 'answer')} written to {output}", markup=False, highlight=False)


def _require_one_source(task: str | None, prefix: Path | None, only_with_task: Mapping[str, object]) -> None:
    """Refuse a call that names the source of demonstrations twice, or not at all."""
    if (task is None) == (prefix is None):
        what = "demonstrations come from one place"
        raise UserError("conflicting_options", what, expected="either --task or --prefix")
    given = [name for name, value in only_with_task.items() if value is not None]
    if prefix is not None and given:
        what = f"{given[0]} goes with --task; a compiled task holds its demonstrations already"
        raise UserError("conflicting_options", what, field=given[0])


def _columns(with_scores: bool, may_abstain: bool) -> Callable[[Prediction], dict[str, Any]]:
    """Return a function that turns a prediction into the columns of an output row."""
    kept = {"answer", "log_probability", "stopped"}
    kept |= {"abstained"} if may_abstain else set()
    kept |= {"scores", "probabilities"} if with_scores else set()

    def columns(prediction: Prediction) -> dict[str, Any]:
        known = {name: value for name, value in prediction.as_json().items() if name in kept}
        return {**known, "log_probability": round(prediction.log_probability, 6)}

    return columns


def describe(console: Console, engine: Engine, prefix: TaskPrefix) -> None:
    """Print what comes before every query, and what a reader should know of it."""
    text = f"{pluralized(prefix.num_shots, 'demonstration')} of {prefix.task.name!r}, {prefix.num_tokens:,} tokens"
    if prefix.num_dropped:
        text += f"; {prefix.num_dropped} more did not fit the context of {engine.max_context_tokens:,}"
    if engine.trained_context_tokens and prefix.num_tokens > engine.trained_context_tokens:
        text += f"; beyond the {engine.trained_context_tokens:,} tokens that the model was trained on"
    console.print(text, markup=False, highlight=False)
