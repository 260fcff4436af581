"""`manyicl report`: records -> table on the terminal and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyicl.cli.outputs import require_writable
from manyicl.errors import UserError

PAGE_ENDINGS = (".html", ".htm")


def report_command(
    results: Annotated[Path, typer.Argument(help="Folder of results; folders inside it are read too.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page to write, .html. [default: RESULTS/report.html]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write the curves as .svg, .png or .pdf.")] = None,
    title: Annotated[str, typer.Option(help="Head of the page.")] = "Shot curves",
    examples: Annotated[
        bool, typer.Option(help="Show worked predictions; without, no text of a query, answer or demonstration.")
    ] = True,
    per_task: Annotated[bool, typer.Option("--per-task", help="Print a table for every task too.")] = False,
) -> None:
    """Draw tables and shot curves from the records that `manyicl evaluate` wrote.

    No model is loaded. The page is one file that opens without a network.

    Examples:

        manyicl report results

        manyicl report results --output shot-curves.html --plot shot-curves.png

        manyicl report results --per-task

        manyicl report results --no-examples --output to-share.html
    """
    from rich.console import Console

    from manyicl.evaluation.report import plot_shot_curves, print_table, write_report
    from manyicl.evaluation.report.plots import require_picture
    from manyicl.evaluation.result import ResultStore

    console = Console()
    records = ResultStore(results).load()
    page = output or results / "report.html"
    for path in filter(None, (page, plot)):
        require_writable(path)
        if path.is_dir():
            raise UserError(f"{str(path)!r} is a folder; expected the name of a file to write.")
    _require_page(page)
    if plot is not None:
        require_picture(plot)
    print_table(records, console, per_task=per_task)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_shot_curves(records, plot)
        console.print(f"Curves: {plot}", markup=False, soft_wrap=True)
    write_report(results, page, title=title, examples=examples)
    console.print(f"Report: {page}", markup=False, soft_wrap=True)


def _require_page(path: Path) -> None:
    """Refuse to write a page under another ending, or over a file that is none of ours."""
    from manyicl.evaluation.report.page import is_report

    if path.suffix.lower() not in PAGE_ENDINGS:
        raise UserError(f"The report is a page, {' or '.join(PAGE_ENDINGS)}; found {str(path)!r}.")
    if path.exists() and path.stat().st_size and not is_report(path):
        raise UserError(f"{str(path)!r} is there and no page of `manyicl report`; give another name, or remove it.")
