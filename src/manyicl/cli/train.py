"""`manyicl train`: recipe -> model."""

from __future__ import annotations

import json
import shlex
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.activity import Activity
from manyicl.cli.options import AsJson, Overrides, Quiet
from manyicl.errors import INTERRUPTED_EXIT_CODE, UserError
from manyicl.printing import new_console
from manyicl.training.processes import (
    end_processes,
    is_launched,
    is_main_process,
    is_sharded,
    processes_per_machine,
)
from manyicl.training.stopping import taking_signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from manyicl.training.job import Existing, TrainedRun
    from manyicl.training.recipe import Recipe


def train_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe: one YAML file that describes the run.")],
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Replace training.seed.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint in the output folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing run in the output folder.")
    ] = False,
    rehash: Annotated[
        bool,
        typer.Option("--rehash", help="Read all rows again, even of files with the sizes and times of the last run."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what the run will do and cost, without training.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune one model on many tasks, or train one from scratch, as a recipe describes.

    Ctrl-C finishes the step, saves a checkpoint and prints the command that resumes.

    Examples:

        manyicl train recipes/nano.yaml --dry-run

        manyicl train recipes/nano.yaml --dry-run --json

        manyicl train recipes/nano.yaml --set training.learning_rate=1e-4 --set output=runs/slower

        manyicl train recipes/nano.yaml --resume

        torchrun --nproc-per-node 2 -m manyicl train recipes/mistral_7b_v0.3.yaml
    """
    if resume and overwrite:
        what = "--resume continues a run and --overwrite replaces it"
        raise UserError("conflicting_options", what, remedy="Give one of them.")
    if as_json and not dry_run:
        what, remedy = "--json goes with --dry-run", "Add --dry-run; a finished run is described by its manyicl.json."
        raise UserError("conflicting_options", what, remedy=remedy, field="--json")
    changes = [*(overrides or ()), *([f"training.seed={seed}"] if seed is not None else ())]
    with taking_signals(signal.default_int_handler):
        try:
            if dry_run:
                _describe(recipe, changes, overwrite=overwrite, rehash=rehash, quiet=quiet, as_json=as_json)
            else:
                existing: Existing = "resume" if resume else "replace" if overwrite else "refuse"
                _train(recipe, changes, existing, rehash=rehash, quiet=quiet)
        except KeyboardInterrupt as interruption:
            _tell(_after_interruption(interruption, recipe, changes, resume=resume, dry_run=dry_run))
            raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


def _describe(recipe: Path, changes: list[str], *, overwrite: bool, rehash: bool, quiet: bool, as_json: bool) -> None:
    """Print what is known of a run, line by line or as one JSON object."""
    with _loading(quiet=quiet) as activity:
        found = _read(recipe, changes)
        from manyicl.training import dry_run

        findings = dry_run.findings(found, overwrite=overwrite, rehash=rehash, activity=activity)
        if as_json:
            facts = dry_run.as_json(findings)
        else:
            for finding in findings:
                if not quiet:
                    typer.echo(finding.sentence)
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=2))


def _train(recipe: Path, changes: list[str], existing: Existing, *, rehash: bool, quiet: bool) -> None:
    with _loading(quiet=quiet):
        read = _read(recipe, changes)
        from manyicl.training.checkpoint import Checkpoints, SavingFailedError
        from manyicl.training.launch import ProcessLostError
        from manyicl.training.run_folder import RunFolder

    folder = RunFolder(read.output)
    began_before = folder.began_at()

    def has_started() -> bool:
        """Tell whether the run in the folder is this one: the one that is there may be one that was to be replaced."""
        return existing == "resume" or folder.began_at() != began_before

    resume = f"Resume with\n\n  {resume_command(recipe, changes)}"
    try:
        run = _train_in_processes(read, existing, has_started, rehash=rehash, quiet=quiet)
    except SavingFailedError as error:
        raise SavingFailedError(f"{error} {resume}") from error
    except ProcessLostError as error:
        if not has_started():
            raise ProcessLostError(f"{error} No run has started; the same command starts it again.") from error
        left = Checkpoints(folder.checkpoints).last_good()
        raise ProcessLostError(f"{error} {left} {resume}") from error
    if not run.finished:
        stopped = f"Stopped after step {run.num_steps:,}; a checkpoint is saved."
        _tell(f"{stopped} {resume}")
        raise typer.Exit(INTERRUPTED_EXIT_CODE)
    if quiet:
        return
    _tell(f"The model is in {run.folder} after {run.num_steps:,} steps.")
    if run.best_step is not None:
        score = f"the best on held-out tasks with a score of {run.best_score:.3f}"
        _tell(f"It is the model after step {run.best_step:,}, {score}.")


def _train_in_processes(
    recipe: Recipe, existing: Existing, has_started: Callable[[], bool], *, rehash: bool, quiet: bool
) -> TrainedRun:
    """Train in this process, or in as many new ones as `choose_processes` says."""
    from manyicl.training.launch import in_processes
    from manyicl.training.process_choice import choose_processes
    from manyicl.training.run_folder import RunFolder

    choice = choose_processes(recipe, resumes=existing == "resume")
    if choice.is_news and not quiet:
        typer.echo(choice.sentence(), err=True)
    job = partial(_train_here, recipe, existing, rehash=rehash, quiet=quiet)
    if choice.num_processes == 1 or is_launched():
        try:
            return job()
        finally:
            end_processes()
    assert choice.num_threads is not None
    try:
        return in_processes(job, choice.num_processes, choice.num_threads)
    except KeyboardInterrupt:
        if not has_started():
            raise
        raise RunFolder(recipe.output).interruption() from None


def _train_here(recipe: Recipe, existing: Existing, *, rehash: bool, quiet: bool) -> TrainedRun:
    """Train in this process: the only one, or one of several."""
    from manyicl.cli.main import quiet_libraries

    with _loading(quiet=quiet or not is_main_process()):
        from manyicl.evaluation.held_out import held_out_measure
        from manyicl.training.job import ensure_trained

    quiet_libraries()
    _hide_progress_of_libraries()
    console = new_console(stderr=True, quiet=True) if quiet else None
    return ensure_trained(recipe, measure=held_out_measure, existing=existing, rehash=rehash, console=console)


def _loading(*, quiet: bool) -> Activity:
    """Show that libraries are loaded."""
    activity = Activity(new_console(stderr=True), quiet=quiet)
    activity.begin("loading libraries")
    return activity


def _read(recipe: Path, changes: list[str]) -> Recipe:
    from manyicl.training.recipe import Recipe

    found = Recipe.read(recipe, changes)
    _hide_progress_of_libraries()
    return found


def _hide_progress_of_libraries() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _tell(text: str) -> None:
    """Print from one process of a run."""
    if is_main_process():
        typer.echo(text)


def _after_interruption(
    interruption: KeyboardInterrupt, recipe: Path, changes: list[str], *, resume: bool, dry_run: bool
) -> str:
    """Say what remains of a run that was stopped at once, and how to continue."""
    if dry_run:
        return "Stopped; nothing was written."
    from manyicl.training.checkpoint import RunInterrupted

    if not isinstance(interruption, RunInterrupted):
        left = "nothing has changed" if resume else "no run has started"
        return f"Stopped before training; {left}. The same command starts it again."
    checkpoint = interruption.checkpoint
    left = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
    return f"Stopped at once. {left}. Resume with\n\n  {resume_command(recipe, changes)}"


def resume_command(recipe: Path, overrides: list[str]) -> str:
    """Return the command that resumes where a run was stopped, with as many processes."""
    num_processes = processes_per_machine()
    if is_sharded():
        config = ["--config_file", "CONFIG", "--num_processes", str(num_processes)]
        launcher = ["accelerate", "launch", *config, "-m"]
    else:
        launcher = ["torchrun", "--nproc-per-node", str(num_processes), "-m"] if num_processes > 1 else []
    changes = [part for override in overrides for part in ("--set", override)]
    return shlex.join([*launcher, "manyicl", "train", str(recipe), *changes, "--resume"])
