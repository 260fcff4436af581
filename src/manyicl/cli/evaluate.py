"""`manyicl evaluate`: model, tasks, shots -> one record per result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.activity import Activity
from manyicl.cli import options
from manyicl.errors import UserError, pluralized, shortened
from manyicl.outputs import require_output_folder
from manyicl.printing import new_console, say

if TYPE_CHECKING:
    from manyicl.engine.engine import Engine
    from manyicl.evaluation.result import Result
    from manyicl.evaluation.shot_curve import EvaluationSettings, ShotCurves
    from manyicl.tasks.task import Task


def evaluate_command(
    model: options.Model,
    tasks: Annotated[
        list[str], typer.Option("--tasks", "-t", help="Task folder, catalog:NAME, task.yaml or pattern; repeatable.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    shots: Annotated[str, typer.Option(help="Shot counts, separated by commas.")] = "0,1,4,16,64,256",
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Number of draws of demonstrations per task; of 5 or more, the worst is shown too."),
    ] = 3,
    orders: Annotated[
        int,
        typer.Option(min=1, help="Number of orders of each draw; with more than one, the worst is shown too."),
    ] = 1,
    queries: Annotated[int, typer.Option(min=1, help="Number of test queries per task.")] = 200,
    retrieve: Annotated[
        int,
        typer.Option(
            min=0,
            help="Measure every point once more, with so many training rows most like a query (BM25) before it.",
        ),
    ] = 0,
    data_root: options.DataRoot = None,
    activation_budget_mib: options.ActivationBudgetMib = None,
    seed: Annotated[int, typer.Option(help="Seed of the query order and of the first draw.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in reports. [default: MODEL, of a path its last part]")
    ] = None,
    max_context_tokens: options.MaxContextTokens = None,
    text_format: options.TextFormat = None,
    end_of_answer: options.EndOfAnswer = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure how a model's score grows with the number of examples in its context.

    Every task, shot count and seed becomes one record in the output folder; a second run skips existing ones.
    Every shot count, seed and model answers the same test queries, so that models can be compared query by query.

    `--orders N` measures the same demonstrations in N orders. A draw scores the mean over its orders, and another line
    of the table says the worst draw and order; so does one of the worst draw with `--seeds 5` or more.

    `--retrieve N` adds a second curve: the same queries after the same demonstrations, and before each query the N
    training rows most like it. Tables and report show both.

    Of tasks with labels it also says where the model is wrong with the most examples: precision, recall and F1 of each
    label, confusions, the errors it was surest of; up to 32 labels also how far its probabilities can be relied on.
    `manyicl report --errors` writes all errors as CSV.

    Examples:

        manyicl evaluate --model runs/one-model --tasks tasks/banking77 --output results

        manyicl evaluate --model hf:HuggingFaceTB/SmolLM2-135M --tasks 'tasks/*' --shots 0,4,16 --output results

        manyicl report results
    """
    shot_counts = parse_shots(shots)

    from manyicl.evaluation.shot_curve import EvaluationSettings
    from manyicl.tasks.files import load_tasks

    require_output_folder(output)
    if orders > 1 and retrieve:
        what, remedy = "--orders and --retrieve are not measured together", "Give one of them."
        raise UserError("conflicting_options", what, remedy=remedy, field="--orders")
    settings = EvaluationSettings(
        shots=shot_counts,
        num_seeds=seeds,
        num_queries=queries,
        seed=seed,
        num_retrieved=retrieve,
        num_orders=orders,
    )
    with Activity(new_console(stderr=True), quiet=quiet) as activity:
        activity.begin("reading tasks")
        loaded = load_tasks(tasks, data_root, on_progress=activity.show)
        engine = options.load_engine(
            model, dtype, device, text_format, end_of_answer, max_context_tokens, activation_budget_mib, activity
        )
        _warn_of_changed_data(engine, loaded)
        curves = measure_with_progress(engine, loaded, output, settings, name, activity)
    if as_json:
        _print_json(curves, output)
    elif not quiet:
        _print_results(curves, output)


def _print_json(curves: ShotCurves, output: Path) -> None:
    """Print the same as one JSON value."""
    from manyicl.evaluation.result import ResultStore
    from manyicl.evaluation.scores_json import scores_as_json
    from manyicl.evaluation.summary import summarise

    scores = scores_as_json(summarise(curves.results), ResultStore(output))
    typer.echo(json.dumps(scores, ensure_ascii=False, indent=2))


def _print_results(curves: ShotCurves, output: Path) -> None:
    """Print the scores, where the model is wrong, and what to do next."""
    from manyicl.cli.mistake_tables import print_task_mistakes
    from manyicl.evaluation.report import print_table
    from manyicl.evaluation.report.task_mistakes import mistakes_missing, tasks_with_mistakes
    from manyicl.evaluation.result import ResultStore

    console = new_console()
    summary, store = print_table(curves.results, console), ResultStore(output)
    print_task_mistakes(tasks_with_mistakes(summary, store), console)
    if missing := mistakes_missing(summary, store):
        say(new_console(stderr=True), missing)
    found = f", {curves.num_found} of them found from an earlier run" if curves.num_found else ""
    typer.echo(f"{pluralized(len(curves.results), 'result')} in {output}{found}. Next: manyicl report {output}")


def _warn_of_changed_data(engine: Engine, tasks: list[Task]) -> None:
    for then, now in engine.manifest.changed_tasks(tasks) if engine.manifest else ():
        hashes = f"hash {then.data_hash[:12]} then, {now.data_hash[:12]} now"
        what = f"The data of {now.name!r} changed since the model was trained on it: {hashes}."
        typer.secho(what, fg="yellow", err=True)


def measure_with_progress(
    engine: Engine, tasks: list[Task], output: Path, settings: EvaluationSettings, name: str | None, activity: Activity
) -> ShotCurves:
    """Measure shot curves and show the progress."""
    from manyicl.evaluation.shot_curve import measure_shot_curves

    activity.begin("evaluating", total=len(tasks) * len(settings.points()))

    def advance(result: Result, found: bool) -> None:
        activity.advance(found=found)

    return measure_shot_curves(engine, tasks, output, settings, model_name=name, on_result=advance, activity=activity)


def parse_shots(text: str) -> tuple[int, ...]:
    """Read ``0,1,4`` as ascending shot counts.

    Raises:
        UserError: If a part is not a whole number of at least 0.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = next((part for part in parts if not re.fullmatch(r"\d{1,9}", part)), None)
    if wrong is not None or not parts:
        expected, found = "whole numbers from 0, such as 0,1,4,16", shortened(repr(wrong or text))
        raise UserError("not_whole_numbers", "wrong --shots", expected=expected, found=found, field="--shots")
    return tuple(sorted(set(map(int, parts))))
