"""`manyicl report`: records -> a table on the terminal and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.activity import Activity
from manyicl.cli import options
from manyicl.outputs import require_output_file
from manyicl.printing import new_console, say

if TYPE_CHECKING:
    from manyicl.evaluation.result import Result, ResultStore

PAGE_ENDINGS = (".html", ".htm")


def report_command(
    results: Annotated[Path, typer.Argument(help="Folder of results, including its subfolders.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML page to write. [default: RESULTS/report.html]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write the curves as .svg, .png or .pdf.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Shot curves",
    examples: Annotated[
        bool, typer.Option(help="Include worked predictions; without them, the page has no text of any row.")
    ] = True,
    per_task: Annotated[bool, typer.Option("--per-task", help="Also print a table for every task.")] = False,
    errors: Annotated[
        Path | None, typer.Option(help="Also write every wrong answer to a label as a row of this .csv file.")
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Draw tables and shot curves from the records that `manyicl evaluate` wrote.

    No model is loaded. The page is one file that opens without a network.

    Examples:

        manyicl report results

        manyicl report results --output shot-curves.html --plot shot-curves.png

        manyicl report results --per-task

        manyicl report results --errors wrong.csv

        manyicl report results --no-examples --output to-share.html
    """
    from manyicl.evaluation.report import plot_shot_curves, print_table, write_report
    from manyicl.evaluation.report.drawing import is_picture
    from manyicl.evaluation.report.plots import PICTURE_ENDINGS
    from manyicl.evaluation.report.template import is_report
    from manyicl.evaluation.result import ResultStore
    from manyicl.evaluation.scores_json import scores_as_json
    from manyicl.evaluation.summary import summarise

    page = output or results / "report.html"
    with Activity(new_console(stderr=True), quiet=quiet) as activity:
        activity.begin("reading results")
        store = ResultStore(results)
        records = store.load()
        require_output_file(page, endings=PAGE_ENDINGS, is_ours=is_report, with_parents=True)
        if plot is not None:
            require_output_file(plot, endings=PICTURE_ENDINGS, is_ours=is_picture, with_parents=True)
        if errors is not None:
            require_output_file(errors, endings=(".csv",), is_ours=_holds_errors, with_parents=True)
        activity.begin("drawing the report")
        summary = summarise(records)
        if plot is not None:
            plot.parent.mkdir(parents=True, exist_ok=True)
            plot_shot_curves(records, plot)
        write_report(results, page, title=title, examples=examples)
        missing = None
        if errors is not None:
            activity.begin("writing wrong answers")
            missing = _write_errors(errors, records, store)
    if missing:
        say(new_console(stderr=True), missing)
    if as_json:
        typer.echo(json.dumps(scores_as_json(summary, store), ensure_ascii=False, indent=2))
    elif not quiet:
        console = new_console()
        print_table(records, console, per_task=per_task)
        for what, path in (("Curves", plot), ("Report", page), ("Wrong answers", errors)):
            if path is not None:
                console.print(f"{what}: {path}", markup=False, soft_wrap=True)


def _write_errors(path: Path, records: Sequence[Result], store: ResultStore) -> str | None:
    """Write every wrong answer to a label, and say in one sentence which are not known, if any."""
    from manyicl.atomic import write_atomically
    from manyicl.evaluation.mistakes import errors_as_csv, without_answers

    answered = [(record, store.predictions(record)) for record in records if record.num_labels is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, errors_as_csv(answered))
    return without_answers(answered) if answered else f"No task has labels, so {path} has no rows."


def _holds_errors(path: Path) -> bool:
    from manyicl.evaluation.mistakes import ERROR_COLUMNS

    return path.is_file() and path.read_bytes().startswith(",".join(ERROR_COLUMNS).encode() + b"\n")
