"""`manyicl tasks`: list tasks, check them with or without a tokenizer, and show an episode as a model sees it.

What exchanges tasks with a server is in `served_tasks.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from manyicl.activity import Activity
from manyicl.cli.options import DataRoot, EndOfAnswer, TaskPatterns, TextFormat
from manyicl.cli.served_tasks import pull_task, push_tasks
from manyicl.cli.tables import plain_console, table_of
from manyicl.errors import UserError
from manyicl.printing import new_console

if TYPE_CHECKING:
    from manyicl.tasks.task import Task

DEFAULT_CONTEXT_TOKENS = 2048

app = typer.Typer(name="tasks", help="List, check and show tasks.", no_args_is_help=True)

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--tokenizer",
        help="Model whose tokenizer and format are used: folder, or hf:owner/name. Without it, nothing is counted in "
        "tokens.",
        show_default=False,
    ),
]


@app.command("list")
def list_tasks(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK...]",
            help="A family, name or pattern of the catalogue, such as nli or tweet_*; or task folders, task.yaml "
            "files, folders of task folders, globs and tables, which are loaded. [default: the whole catalogue]",
            show_default=False,
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(help="Only catalogue entries whose name, family, description or Hub id contains this word."),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """List the catalogue or one of its families, without downloading; or load tasks and list labels, rows, source.

    Examples:

        manyicl tasks list

        manyicl tasks list nli

        manyicl tasks list --search sentiment

        manyicl tasks list tasks/

        manyicl tasks list recipes/real/train --data-root ~/data
    """
    from manyicl.tasks.files import load_tasks

    if not tasks or all(map(_is_of_catalog, tasks)):
        _list_catalog(tasks or ["catalog:"], search, data_root)
        return
    if search is not None:
        what, remedy = "--search looks through the catalogue", f"Leave out {tasks[0]!r}, or --search."
        raise UserError("conflicting_options", what, remedy=remedy, field="--search")
    with _reading() as activity:
        loaded = load_tasks(tasks, data_root, on_progress=activity.show)
    plain_console().print(table_of(map(_row_of_task, loaded)))


def _reading() -> Activity:
    """Show on standard error that tasks are read."""
    activity = Activity(new_console(stderr=True))
    activity.begin("reading tasks")
    return activity


def _row_of_task(task: Task) -> dict[str, str]:
    return {
        "task": task.name,
        "family": task.family,
        "metric": task.metric,
        "labels": str(len(task.labels)) if task.labels else "per row" if task.choices_column else "free",
        "train": f"{len(task.train):,}",
        "test": f"{len(task.test):,}",
        "dropped": f"{sum(task.dropped.values()):,}",
        "source": task.source,
    }


def _is_of_catalog(pattern: str) -> bool:
    """Tell a name, a family or a pattern of the catalogue from what is on disk, which comes first."""
    if pattern.startswith("catalog:"):
        return True
    return re.fullmatch(r"[\w*?\[\]-]+", pattern) is not None and not glob(pattern)  # noqa: PTH207


def _list_catalog(patterns: Sequence[str], search: str | None, data_root: Path | None) -> None:
    """Print entries of the catalogue, as their task files describe them."""
    from manyicl.tasks.catalog import catalog_entries, search_catalog

    entries = list({entry.name: entry for pattern in patterns for entry in catalog_entries(pattern)}.values())
    if search is not None:
        entries = list(search_catalog(entries, search))
    rows = [
        {
            "task": entry.name,
            "family": entry.spec.family,
            "Hub": entry.hub,
            "train": f"{entry.data.num_train:,}",
            "test": f"{entry.data.num_test:,}",
            "description": entry.spec.description or "",
        }
        for entry in entries
    ]
    if data_root is not None:
        rows = [row | {f"in {data_root}": "yes" if (data_root / row["task"]).is_dir() else ""} for row in rows]
    console = plain_console()
    console.print(table_of(rows))
    note = f"{len(entries)} tasks of the catalogue. Name one as catalog:{entries[0].name} wherever a task is named."
    console.print(note)


@app.command("check")
def check_tasks(
    tasks: TaskPatterns,
    data_root: DataRoot = None,
    model: Model = None,
    text_format: TextFormat = None,
    end_of_answer: EndOfAnswer = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Context in tokens into which shots must fit; by default all that the model takes, as in predict.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check tasks: balance, lengths, repeats; with --model, labels that begin other labels, and shots that fit.

    Examples:

        manyicl tasks check tasks/banking77

        manyicl tasks check tickets.csv:text:label --context 8192 --model hf:HuggingFaceTB/SmolLM2-135M
    """
    from manyicl.cli.task_checks import checks_as_json, print_checks, without_model
    from manyicl.cli.task_encoder import encoder_of
    from manyicl.episodes.checks import check_task
    from manyicl.tasks.files import load_tasks

    if model is None and context is not None:
        remedy = "Name the model that counts them with --model."
        raise UserError("no_effect", "--context is in tokens", remedy=remedy, field="--context")
    with _reading() as activity:
        loaded = load_tasks(tasks, data_root, on_progress=activity.show)
        if model is not None:
            activity.begin(f"loading the tokenizer of {model}")
        encoder, context_of_model, trained = encoder_of(model, text_format, end_of_answer, loaded)
        max_context_tokens = None if model is None else context or context_of_model or DEFAULT_CONTEXT_TOKENS
        activity.begin("checking tasks", total=len(loaded))
        checks = []
        for task in loaded:
            activity.now(task.name)
            checks.append(check_task(task, encoder, max_context_tokens or sys.maxsize))
            activity.advance()
    if model is None:
        checks = list(map(without_model, checks, loaded))
    if as_json:
        typer.echo(checks_as_json(checks, in_characters=model is None))
    else:
        print_checks(checks, max_context_tokens, plain_console(), trained)


@app.command("nano")
def write_nano_tasks(
    folder: Annotated[Path, typer.Argument(help="Folder for the task folders.", show_default=False)],
    split: Annotated[
        Literal["base", "train", "unseen", "text"],
        typer.Option(help="Which tasks; text: plain text to replay, and to measure with."),
    ] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Seed of all rules and rows.")] = 0,
) -> None:
    """Write tasks of the nano world, whose hidden rules can be learned only from demonstrations.

    Examples:

        manyicl tasks nano runs/nano/tasks --split base

        manyicl tasks nano my-world --split unseen --seed 7

        manyicl tasks nano runs/nano/text --split text
    """
    from manyicl.tasks.nanoworld.text import write_nano_text
    from manyicl.tasks.nanoworld.world import write_nano_world

    if split == "text":
        for file in write_nano_text(folder, seed=seed):
            typer.echo(str(file))
        return
    places = write_nano_world(folder, seed=seed, split=split)
    typer.echo(f"{len(places):,} tasks written to {folder}")


@app.command("starter")
def copy_starter_tables(
    folder: Annotated[Path, typer.Argument(help="Where the task folders go.", show_default=False)],
) -> None:
    """Copy three small tables to try things on: tickets and their team, messages and their urgency, product titles.

    Examples:

        manyicl tasks starter tables
    """
    from manyicl.tasks.starter_tables import write_starter_tables

    for place in write_starter_tables(folder):
        typer.echo(str(place))


@app.command("show")
def show_task(
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="A task folder, catalog:NAME, or a table as in tickets.csv:text:label."),
    ],
    data_root: DataRoot = None,
    shots: Annotated[int, typer.Option(min=1, help="Examples in the episode.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice and order of examples.")] = 0,
    model: Model = None,
    text_format: TextFormat = None,
    end_of_answer: EndOfAnswer = None,
) -> None:
    """Show an episode as the model sees it; supervised text is coloured, or in «» without colour.

    With --model it is shown token by token.

    Examples:

        manyicl tasks show tasks/banking77

        manyicl tasks show tickets.csv:text:label --shots 8 --seed 1
    """
    from manyicl.cli.episode_view import draw, spans_of
    from manyicl.cli.task_encoder import encoder_of
    from manyicl.episodes.episode import Episode
    from manyicl.tasks.files import load_task

    with _reading():
        loaded = load_task(task, data_root)
        encoder, _, _ = encoder_of(model, text_format, end_of_answer, [loaded])
    episode = Episode(loaded.name, loaded.instruction(), loaded.demonstrations(shots, seed, "random"))
    encoded = encoder.encode_episode(episode)
    console = plain_console()
    drawn = draw(spans_of(encoded, encoder, by_token=model is not None), console.color_system is None)
    console.print(drawn, soft_wrap=True)
    supervised = "supervised with the blank line that ends each; name a --model to see its tokens"
    if model is not None:
        num_supervised = sum(end - start for start, end in encoded.answer_spans)
        supervised = f"{num_supervised:,} of {len(encoded.token_ids):,} tokens supervised"
    note = f"{loaded.name}, seed {seed}: {shots} answers, {supervised}; ⏎ is a line break."
    console.print(note, style="dim")


app.command("push")(push_tasks)
app.command("pull")(pull_task)
