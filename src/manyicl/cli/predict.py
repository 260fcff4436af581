"""`manyicl predict`: a file or stream of queries in, answers out, in order."""

from __future__ import annotations

import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.activity import Activity
from manyicl.cli import options
from manyicl.cli.answer_columns import AnswerColumns
from manyicl.cli.answers import STANDARD_STREAM, Row, with_answer
from manyicl.cli.tally import Tally, require_summary_apart
from manyicl.cli.unfinished import MadeOf, answers_written
from manyicl.engine.queries import BadRows, can_blend, require_blendable
from manyicl.errors import UserError, pluralized
from manyicl.paths import sha256_of_file
from manyicl.printing import new_console
from manyicl.tasks.rows import GZIP, suffix_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

    from manyicl.cli.demonstrations import Demonstrations
    from manyicl.cli.queries import Queries
    from manyicl.engine.engine import Engine
    from manyicl.engine.prediction import Prediction
    from manyicl.engine.queries import AnswerOptions
    from manyicl.engine.task_prefix import TaskPrefix
    from manyicl.tasks.task import Task

BAD_ROWS_EXIT_CODE = 3
# Whether answers are blended where neither --blend nor --no-blend says so and they can be.
BLENDS_BY_DEFAULT = False
# Parameters of the command that say where things are, or how queries are read: what comes of them is compared.
_COMPARED_BY_EFFECT = ("model", "task", "prefix", "data_root", "input_path", "output", "delimiter", "encoding")
# These, and parameters that change no answer.
_NOT_COMPARED = frozenset({*_COMPARED_BY_EFFECT, "quiet", "as_json"})
BadRowsOption = Annotated[
    BadRows,
    typer.Option(
        help="What to do with a row that cannot be answered: report it in the column `problem` and go on, ending with "
        "exit code 3, or refuse it with exit code 2. A row that cannot be read (broken CSV or JSON) is always refused."
    ),
]


def predict_command(
    context: typer.Context,
    model: options.Model,
    input_path: Annotated[
        Path,
        typer.Option(
            "--input",
            help="Queries, one row each: .jsonl, .csv, .tsv, these packed as .gz, .parquet, .xlsx; - for JSON lines on "
            "standard input.",
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
    encoding: Annotated[
        str | None,
        typer.Option(
            help="Encoding of a text file of queries, such as cp1252. [default: that of the task's own rows in such a "
            "file, or UTF-8]"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="File of answers: .jsonl, .csv, these packed as .gz, .xlsx; - for JSON lines.")
    ] = STANDARD_STREAM,
    shots: options.Shots = None,
    retrieve: Annotated[
        int,
        typer.Option(min=0, help="Number of other training rows, those most like a query (BM25), to put before it."),
    ] = 0,
    similar: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of demonstrations most like a query (BM25) to write in the column `similar`, to explain.",
        ),
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of demonstrations and of sampling. [default: 0]")] = None,
    scores: Annotated[
        bool,
        typer.Option(
            help="Also write the score and probability of every label. The tokens of every label then go through the "
            "model for every query, which takes longer where there are many labels."
        ),
    ] = False,
    blend: Annotated[
        bool | None,
        typer.Option(
            "--blend/--no-blend",
            help="Combine the model's label scores with those of a linear classifier on the words of the same "
            "demonstrations. For up to 32 labels, without --retrieve. [default: --no-blend]",
        ),
    ] = None,
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
    bad_rows: BadRowsOption = "report",
    data_root: options.DataRoot = None,
    max_context_tokens: options.MaxContextTokens = None,
    activation_budget_mib: options.ActivationBudgetMib = None,
    text_format: options.TextFormat = None,
    end_of_answer: options.EndOfAnswer = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Answer the queries in a file, given demonstrations of a task.

    Answers among labels, up to 32 of them, come with their probability, the second best and its probability. With more
    labels they come with the second best and `margin`, the difference of the two log-probabilities in nats; for
    probabilities every label has to be scored, which `--scores` and `--abstain-below` do.

    Every output row is the input row with `answer`, `log_probability`, `stopped` and `problem` added. A free answer
    that reached the length limit before it ended has `stopped: false`. A row that cannot be answered, because it is
    empty, too long or lacks a value, has no answer, and `problem` says why; the command then ends with exit code 3.

    If the input has the column with the task's answers, they are compared: accuracy, precision, recall and F1 of each
    label and the most confused pairs, on standard error. Rows without one, those that could not be answered and those
    for which the model abstained are in no score and counted.

    Until all answers are complete they are in `OUTPUT.part`. A run that was interrupted is continued by the same
    command, to the same answers; if input, model, task or options changed, it starts anew, says so, and keeps the
    answers so far in `OUTPUT.part.old`.

    As many demonstrations are used as fit with the longest of the first 1,024 queries. If a later query needs more
    tokens, fewer demonstrations are used from there on, and a message says so.

    `--retrieve N` puts the N training rows most like a query before it, after the shared demonstrations. `--similar N`
    changes no answer: it writes which N demonstrations in the query's context are most like it, most similar first.
    With `--prefix`, rows are retrieved from it if it was compiled with `--retrieve`, else from `--task`.

    With `--prefix`, `--task` may name the task that was compiled: if it changed since then, the command says so and
    answers nothing.

    Examples:

        manyicl predict --model runs/one-model --task tasks/tickets --input new.csv --output answers.csv

        manyicl predict --model runs/one-model --prefix tickets.prefix --input new.csv --abstain-below 0.8

        cat new.jsonl | manyicl predict --model runs/one-model --task tickets.csv:text:label --shots 64 --input -
    """
    from manyicl.cli.demonstrations import Demonstrations
    from manyicl.cli.queries import open_queries

    require_summary_apart(output, as_json)
    console = _console(output, quiet=quiet)
    how = _answer_options(temperature, top_p, seed or 0, abstain_below, bad_rows, similar)
    with_task = {"--shots": shots, "--data-root": None if task else data_root}
    _require_one_source(task, prefix, with_task if how["sampling"] else {**with_task, "--seed": seed})
    inputs = {"--input": input_path, "--prefix": prefix}
    with Activity(console, quiet=quiet) as activity, answers_written(output, inputs) as answers:
        queries = open_queries(input_path, task, delimiter, encoding, bad_rows)
        # Mistakes in the task, the shots and the first queries of a file are found before a model is loaded.
        examples = Demonstrations.of(task, data_root, shots, seed or 0, prefix)
        examples.require_no_rows_of(output)
        _is_blended(blend, examples.task, retrieve)
        first = [] if examples.task is None or input_path == STANDARD_STREAM else queries.read_ahead(examples.task)
        engine = options.load_engine(
            model, dtype, device, text_format, end_of_answer, max_context_tokens, activation_budget_mib, activity
        )
        examples.load_compiled(engine)
        examples.require_no_rows_of(output)
        task_of_queries, is_csv = examples.queried_task, suffix_of(output).removesuffix(GZIP) == ".csv"
        how["blend"] = _is_blended(blend, task_of_queries, retrieve)
        layout = AnswerColumns.of(task_of_queries, scores, how, is_csv)
        tally = Tally(layout, examples, retrieve)
        made_of = None if input_path == STANDARD_STREAM else _made_of(engine, examples, queries, context.params)
        tally.take(answers.begin(made_of, activity.say), queries.again())
        how["num_answered"] = tally.num_rows
        queries.skip(tally.num_rows)
        how["scores"] = layout.scope
        stream = chain(first, queries.rendered(task_of_queries))
        on_prefix = tally.noting(partial(describe, console, engine), activity)
        predictions = examples.answer(engine, stream, retrieve, on_prefix, how)
        activity.begin("answering", queries.count(), found=tally.num_rows)
        rows = activity.counting(queries.answered(predictions, layout.columns, tally.count))
        answers.write(rows, partial(_columns_without_rows, queries, task_of_queries, layout.columns))
        activity.begin(f"writing {output}")
    tally.print_summary(console, output, model, activity.seconds, as_json=as_json)
    if bad_rows == "report" and tally.num_problems:
        raise typer.Exit(BAD_ROWS_EXIT_CODE)


def _console(output: Path, *, quiet: bool) -> Console:
    """Return standard error, without a bar where answers come to the same terminal."""
    are_shown = output == STANDARD_STREAM and sys.stdout is not None and sys.stdout.isatty()
    return new_console(stderr=True, quiet=quiet, force_terminal=False if are_shown else None)


def _answer_options(
    temperature: float | None,
    top_p: float | None,
    seed: int,
    abstain_below: float | None,
    bad_rows: BadRows,
    num_similar: int,
) -> AnswerOptions:
    """Turn options of the command into those of the engine."""
    from manyicl.engine.backend import Sampling

    values = {"temperature": temperature, "top_p": top_p}
    given = {name: value for name, value in values.items() if value is not None}
    return {
        "abstain_below": abstain_below,
        "sampling": Sampling(**given, seed=seed) if given else None,
        "bad_rows": bad_rows,
        "num_similar": num_similar,
    }


def _is_blended(choice: bool | None, task: Task | None, num_retrieved: int) -> bool:
    """Tell whether answers are blended; refuse a wish that cannot be met.

    Args:
        choice: What --blend or --no-blend says; None without either.
        task: Task of the queries; None before a compiled one is loaded.
        num_retrieved: Number of examples for each query.

    Raises:
        UserError: If the task has no closed label set or too many labels, or each query gets examples of its own.
    """
    if choice and num_retrieved:
        what = "--blend does not go with --retrieve: its weights are fitted without examples for each query"
        raise UserError("conflicting_options", what, field="--blend")
    if choice and task is not None:
        require_blendable(task)
    if choice is None:
        choice = BLENDS_BY_DEFAULT and not num_retrieved and (task is None or can_blend(task))
    return choice


def _made_of(engine: Engine, examples: Demonstrations, queries: Queries, options: Mapping[str, object]) -> MadeOf:
    """Put down what answers depend on."""
    from manyicl.engine.local import computed_on
    from manyicl.model.manifest import library_versions

    identity = engine.identity
    model = (identity.fingerprint, identity.config_hash, identity.dtype, engine.encoder.text_hash)
    return MadeOf(
        input=sha256_of_file(queries.source),
        read_as=dict(queries.read_as),
        model=" ".join(map(str, (*model, *sorted(identity.end_token_ids)))),
        task=examples.content_hash(),
        options={name: str(value) for name, value in options.items() if name not in _NOT_COMPARED},
        device=computed_on(engine.backend),
        max_context_tokens=engine.max_context_tokens,
        versions=library_versions(),
    )


def _columns_without_rows(queries: Queries, task: Task, columns: Callable[[Prediction], Row]) -> list[str]:
    """List the columns of an output without rows; refuse that where the queries have not even a header."""
    from manyicl.engine.prediction import Prediction

    return list(with_answer(dict.fromkeys(queries.columns_without_rows(task)), columns(Prediction("", 0.0))))


def _require_one_source(task: str | None, prefix: Path | None, only_with_task: Mapping[str, object]) -> None:
    """Refuse a call that names no source of demonstrations, or options that a compiled task has settled."""
    if task is None and prefix is None:
        what = "nothing says where demonstrations come from"
        raise UserError("no_task_named", what, expected="--task, --prefix or both")
    given = [name for name, value in only_with_task.items() if value is not None]
    if prefix is not None and given:
        what = f"{given[0]} goes with --task; a compiled task holds its demonstrations already"
        raise UserError("conflicting_options", what, field=given[0])


def describe(console: Console, engine: Engine, prefix: TaskPrefix) -> None:
    """Print what comes before every query, and what a reader should know of it."""
    text = f"{pluralized(prefix.num_shots, 'demonstration')} of {prefix.task.name!r}, {prefix.num_tokens:,} tokens"
    if prefix.num_dropped:
        text += f"; {prefix.num_dropped} more did not fit the context of {engine.max_context_tokens:,}"
    if engine.trained_context_tokens and prefix.num_tokens > engine.trained_context_tokens:
        text += f"; beyond the {engine.trained_context_tokens:,} tokens that the model was trained on"
    console.print(text, markup=False, highlight=False)
