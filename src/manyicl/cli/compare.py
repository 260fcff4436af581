"""`manyicl compare`: one base, one set of tasks, several ways to adapt it -> models, results, report."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.activity import Activity
from manyicl.cli.options import AsJson, Overrides, Quiet
from manyicl.errors import INTERRUPTED_EXIT_CODE, MachineError, pluralized
from manyicl.printing import new_console
from manyicl.training.stopping import taking_signals

if TYPE_CHECKING:
    from manyicl.evaluation.comparison.records import ComparisonRecords
    from manyicl.evaluation.comparison.settings import Comparison


def compare_command(
    recipe: Annotated[Path, typer.Argument(help="A training recipe with a section `compare`.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan: trainings, tokens, hours, answers; train nothing.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try cells again that failed in an earlier run.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare ways to adapt one model: not at all, zero-shot, few-shot and many-shot fine-tuning, one model per task.

    All regimes have equal budgets and a learning rate of their own, chosen on validation tasks. All answer the same
    queries of tasks that were trained on and of tasks that were not. Ctrl-C finishes a step; the same command resumes,
    and may run in several processes at once. A cell that fails does not end the others.

    Examples:

        manyicl compare recipes/compare/nano.yaml --dry-run

        manyicl compare recipes/compare/nano.yaml

        manyicl compare recipes/compare/nano.yaml --set compare.num_training_seeds=1 --set output=runs/quick

        manyicl compare recipes/compare/nano.yaml --retry-failed --json
    """
    with taking_signals(signal.default_int_handler):
        try:
            if dry_run:
                _print_plan(recipe, overrides or [], quiet=quiet, as_json=as_json)
            else:
                _compare(recipe, overrides or [], retry_failed=retry_failed, quiet=quiet, as_json=as_json)
        except KeyboardInterrupt:
            left = "Nothing was written." if dry_run else "What is finished is kept; the same command resumes."
            typer.echo(f"Stopped. {left}", err=True)
            raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


def _read(recipe: Path, overrides: list[str]) -> Comparison:
    """Read the file, and load the libraries, which takes seconds."""
    from manyicl.evaluation.comparison.settings import Comparison

    settings = Comparison.read(recipe, overrides)
    from transformers.utils import logging

    from manyicl.cli.main import quiet_libraries

    quiet_libraries()
    logging.disable_progress_bar()
    return settings


def _print_plan(recipe: Path, overrides: list[str], *, quiet: bool, as_json: bool) -> None:
    with Activity(new_console(stderr=True), quiet=quiet) as activity:
        activity.begin("loading libraries")
        settings = _read(recipe, overrides)
        from manyicl.evaluation.comparison.plan import planned
        from manyicl.evaluation.comparison.run import prepare

        plan = planned(prepare(settings, activity), activity)
    if as_json:
        typer.echo(json.dumps(plan.as_json(), ensure_ascii=False, indent=2))
    elif not quiet:
        for line in plan.lines():
            typer.echo(line)


def _compare(recipe: Path, overrides: list[str], *, retry_failed: bool, quiet: bool, as_json: bool) -> None:
    console = new_console(stderr=True, quiet=quiet)
    with Activity(console, quiet=quiet) as activity:
        activity.begin("loading libraries")
        settings = _read(recipe, overrides)
        from manyicl.evaluation.comparison.run import run_comparison
        from manyicl.evaluation.comparison.summary import as_json as summary
        from manyicl.evaluation.report.comparison_page import require_report, write_comparison

    require_report(settings.output)
    records = run_comparison(settings, retry_failed=retry_failed, console=console)
    with Activity(console, quiet=quiet) as activity:
        activity.begin("drawing the report")
        write_comparison(settings.output)
    if as_json:
        typer.echo(json.dumps(summary(records), ensure_ascii=False, indent=2))
    elif not quiet:
        _print_records(records)
    if records.failed:
        raise MachineError(_failed(records))


def _failed(records: ComparisonRecords) -> str:
    """Say how much failed, why, and what can be tried again."""
    num_cells = len([report for report in records.failures if report.failure is not None])
    counts = [f"{num_cells} of {pluralized(len(records.cells) + len(records.failures), 'cell')}"] if num_cells else []
    num_trials = len(records.failed_trials)
    counts += [pluralized(num_trials, "trial") + " of learning rates"] if num_trials else []
    first = records.failed[0]
    reason = first.reason or ""
    again = "" if "--retry-failed" in reason else " Try again with --retry-failed."
    again += " A trial is tried again only as long as no rate was chosen without it." if num_trials else ""
    return f"{' and '.join(counts)} failed, such as {first.cell.name}: {reason.removesuffix('.')}.{again}"


def _print_records(records: ComparisonRecords) -> None:
    """Print mean scores of the models, and why any is missing."""
    from manyicl.cli.tables import plain_console, table_of
    from manyicl.evaluation.comparison.summary import score_rows

    console = plain_console()
    console.print(table_of(score_rows(records)))
    for report in (*records.failures, *records.failed_trials):
        console.print(report.sentence(), soft_wrap=True)
    console.print(f"Comparison: {records.settings.output}", soft_wrap=True)
    console.print(f"Report: {records.settings.output / 'report.html'}", soft_wrap=True)
