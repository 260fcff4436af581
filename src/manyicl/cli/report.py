"""`manyicl report`: records -> a table on the terminal and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyicl.outputs import require_output_file

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
    from manyicl.evaluation.report.page import is_report
    from manyicl.evaluation.report.plots import PICTURE_ENDINGS, is_picture
    from manyicl.evaluation.result import ResultStore

    console = Console()
    records = ResultStore(results).load()
    page = output or results / "report.html"
    require_output_file(page, endings=PAGE_ENDINGS, is_ours=is_report, with_parents=True)
    if plot is not None:
        require_output_file(plot, endings=PICTURE_ENDINGS, is_ours=is_picture, with_parents=True)
    print_table(records, console, per_task=per_task)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_shot_curves(records, plot)
        console.print(f"Curves: {plot}", markup=False, soft_wrap=True)
    write_report(results, page, title=title, examples=examples)
    console.print(f"Report: {page}", markup=False, soft_wrap=True)
