"""The command line: parse arguments, then make one call. Every mistake ends with one sentence and an exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import manyicl
from manyicl import library_errors
from manyicl.cli import keys, models, tasks
from manyicl.cli.backup import backup_command, restore_command
from manyicl.cli.compare import compare_command
from manyicl.cli.compile import compile_command
from manyicl.cli.doctor import doctor_command
from manyicl.cli.evaluate import evaluate_command
from manyicl.cli.export import export_command
from manyicl.cli.predict import predict_command
from manyicl.cli.quickstart import quickstart_command
from manyicl.cli.report import report_command
from manyicl.cli.serve import serve_command
from manyicl.cli.train import train_command
from manyicl.errors import MachineError, UserError
from manyicl.printing import new_console

USER_ERROR, MACHINE_ERROR = 2, 1
# How torch says it, on a GPU and on a CPU.
OUT_OF_MEMORY = ("out of memory", "allocate memory")

app = typer.Typer(
    name="manyicl",
    help="Fine-tune one language model once, on many tasks; from then on add a task by giving examples.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("quickstart")(quickstart_command)
app.add_typer(models.app, name="models")
app.add_typer(tasks.app, name="tasks")
app.command("train")(train_command)
app.command("compare")(compare_command)
app.command("evaluate")(evaluate_command)
app.command("predict")(predict_command)
app.command("compile")(compile_command)
app.command("report")(report_command)
app.command("export")(export_command)
app.add_typer(keys.app, name="keys")
app.command("backup")(backup_command)
app.command("restore")(restore_command)
app.command("serve")(serve_command)
app.command("doctor")(doctor_command)


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"manyicl {manyicl.__version__}")
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune one language model once, on many tasks; from then on add a task by giving examples."""


def main() -> None:
    """Run a command; a mistake of the user ends with 2, a failure of the machine with 1, never with a traceback."""
    quiet_libraries()
    _write_utf8()
    console = new_console(stderr=True, soft_wrap=True, highlight=False)
    try:
        # Typer itself ends with 2 after a wrong option, with 130 after Ctrl-C, with 1 where a reader has left.
        app()
    except UserError as error:
        # All processes that torchrun starts meet the same mistake; the main one says it.
        rank = os.environ.get("RANK", "0")
        if not (rank.isdecimal() and int(rank) > 0):
            print_error(error, console)
        sys.exit(USER_ERROR)
    except MachineError as error:
        reason = str(error)
    except OSError as error:
        reason = _sentence_of(error)
    except MemoryError as error:
        reason = f"Out of memory: {library_errors.reason(error)}"
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise
        reason = f"Out of memory: {library_errors.reason(error)}"
    else:
        return
    console.print(f"[bold red]failed[/] {escape(reason)}")
    sys.exit(MACHINE_ERROR)


def _sentence_of(error: OSError) -> str:
    """Say what failed, and of which file where that is known."""
    reason = library_errors.reason(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}."
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return f"A file could not be written: {reason}. Make room, and run the same command again."
    return f"{reason[0].upper()}{reason[1:]}."


def print_error(error: UserError, console: Console) -> None:
    """Print the sentence of a mistake."""
    console.print(f"[bold red]error[/] {escape(str(error))}")


def _write_utf8() -> None:
    """Write UTF-8 to standard output in every locale; half a character, which UTF-8 cannot hold, as an escape."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def quiet_libraries() -> None:
    """Silence messages of libraries that are meant for developers; errors still appear."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # five retries without a network are ten lines
    warnings.filterwarnings("ignore", category=FutureWarning)
