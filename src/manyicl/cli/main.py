"""The command line: arguments, then one call. Every mistake ends with one sentence and its exit code."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

import manyicl
from manyicl.cli import tasks
from manyicl.cli.evaluate import evaluate_command
from manyicl.cli.predict import predict_command
from manyicl.cli.quickstart import quickstart_command
from manyicl.cli.report import report_command
from manyicl.cli.train import train_command
from manyicl.errors import MachineError, UserError

USER_ERROR, MACHINE_ERROR, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="manyicl",
    help="Fine-tune one language model once, on many tasks; from then on add a task by giving examples.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("quickstart")(quickstart_command)
app.add_typer(tasks.app, name="tasks")
app.command("train")(train_command)
app.command("evaluate")(evaluate_command)
app.command("predict")(predict_command)
app.command("report")(report_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"manyicl {manyicl.__version__}")
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune one language model once, on many tasks; from then on add a task by giving examples."""


def main() -> None:
    """Run a command; a person's mistake ends with 2, a machine's failure with 1, never with a traceback."""
    _quiet_libraries()
    console = Console(stderr=True, soft_wrap=True)
    try:
        app()
    except UserError as error:
        console.print(f"[bold red]error[/] {_escaped(str(error))}")
        sys.exit(USER_ERROR)
    except MachineError as error:
        console.print(f"[bold red]failed[/] {_escaped(str(error))}")
        sys.exit(MACHINE_ERROR)
    except BrokenPipeError:
        # The reader of our output has left, as `| head` does; that is no failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, MemoryError) as error:
        console.print(f"[bold red]failed[/] {_escaped(f'{type(error).__name__}: {error}')}")
        sys.exit(MACHINE_ERROR)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        sys.exit(INTERRUPTED)


def _quiet_libraries() -> None:
    """Keep what other libraries tell their own developers off the screen; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
