"""`manyicl report`: records -> a table on the terminal and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
_TITLE = "Shot curves"


def report_command(
    results: Annotated[Path, typer.Argument(help="Folder of results, including its subfolders, or of a comparison.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML page to write. [default: RESULTS/report.html]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write the curves as .svg, .png or .pdf.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = _TITLE,
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

        manyicl report runs/comparison
    """
    if (results / "comparison.yaml").is_file():
        given = {
            "--output": output is not None,
            "--plot": plot is not None,
            "--title": title != _TITLE,
            "--no-examples": not examples,
            "--per-task": per_task,
            "--errors": errors is not None,
        }
        unused = [name for name, is_given in given.items() if is_given]
        _report_comparison(results, unused, quiet=quiet, as_json=as_json)
        return
    page = output or results / "report.html"
    with Activity(new_console(stderr=True), quiet=quiet) as activity:
        records, store, missing = _write_all(results, page, plot, errors, title, activity, examples=examples)
    if missing:
        say(new_console(stderr=True), missing)
    if as_json:
        _print_json(records, store)
    elif not quiet:
        _print(records, {"Curves": plot, "Report": page, "Wrong answers": errors}, per_task=per_task)


def _write_all(
    results: Path, page: Path, plot: Path | None, errors: Path | None, title: str, activity: Activity, *, examples: bool
) -> tuple[Sequence[Result], ResultStore, str | None]:
    """Write page, picture and wrong answers; return records, their folder, and which answers are not known."""
    from manyicl.evaluation.report import plot_shot_curves, write_report
    from manyicl.evaluation.report.drawing import is_picture
    from manyicl.evaluation.report.plots import PICTURE_ENDINGS
    from manyicl.evaluation.report.template import is_report
    from manyicl.evaluation.result import ResultStore

    activity.begin("reading results")
    store = ResultStore(results)
    records = store.load()
    require_output_file(page, endings=PAGE_ENDINGS, is_ours=is_report, with_parents=True)
    if plot is not None:
        require_output_file(plot, endings=PICTURE_ENDINGS, is_ours=is_picture, with_parents=True)
    if errors is not None:
        require_output_file(errors, endings=(".csv",), is_ours=_holds_errors, with_parents=True)
    activity.begin("drawing the report")
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_shot_curves(records, plot)
    write_report(results, page, title=title, examples=examples)
    if errors is None:
        return records, store, None
    activity.begin("writing wrong answers")
    return records, store, _write_errors(errors, records, store)


def _print_json(records: Sequence[Result], store: ResultStore) -> None:
    from manyicl.evaluation.scores_json import scores_as_json
    from manyicl.evaluation.summary import summarise

    typer.echo(json.dumps(scores_as_json(summarise(records), store), ensure_ascii=False, indent=2))


def _print(records: Sequence[Result], written: Mapping[str, Path | None], *, per_task: bool) -> None:
    """Print tables, and where everything is."""
    from manyicl.evaluation.report import print_table

    console = new_console()
    print_table(records, console, per_task=per_task)
    for what, path in written.items():
        if path is not None:
            console.print(f"{what}: {path}", markup=False, soft_wrap=True)


def _report_comparison(folder: Path, given: Sequence[str], *, quiet: bool, as_json: bool) -> None:
    """Write the report of a comparison into its folder, and say what it shows."""
    from manyicl.errors import UserError
    from manyicl.evaluation.comparison.records import ComparisonRecords
    from manyicl.evaluation.comparison.summary import as_json as summary
    from manyicl.evaluation.report.comparison_page import write_comparison

    if given:
        what = f"{given[0]} has no effect on the report of a comparison, which is written into its folder"
        raise UserError("unused_option", what, remedy=f"Leave out {' and '.join(given)}.", file=folder)
    with Activity(new_console(stderr=True), quiet=quiet) as activity:
        activity.begin("drawing the report")
        written = write_comparison(folder)
    if as_json:
        typer.echo(json.dumps(summary(ComparisonRecords.load(folder)), ensure_ascii=False, indent=2))
    elif not quiet:
        for path in written[:2]:
            say(new_console(), f"Report: {path}")
        say(new_console(), f"Plots: {folder / 'plots'}")


def _write_errors(path: Path, records: Sequence[Result], store: ResultStore) -> str | None:
    """Write every wrong answer to a label of the results that are shown, and say which are not known, if any."""
    from manyicl.atomic import write_atomically
    from manyicl.evaluation.mistakes import errors_as_csv, without_answers
    from manyicl.evaluation.summary import summarise

    summary = summarise(records)
    answered = [(record, store.predictions(record)) for record in summary.records if record.num_labels is not None]
    names = {(own[0].line, own[0].model_fingerprint): model for (model, *_), own in summary.by_point.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, errors_as_csv(answered, names))
    return without_answers(answered) if answered else f"No task has labels, so {path} has no rows."


def _holds_errors(path: Path) -> bool:
    from manyicl.evaluation.mistakes import ERROR_COLUMNS

    # Earlier versions wrote fewer columns after these.
    return path.is_file() and path.read_bytes().startswith(",".join(ERROR_COLUMNS[:4]).encode() + b",")
