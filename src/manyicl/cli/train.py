"""`manyicl train`: recipe -> model."""

from __future__ import annotations

import os
import random
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.cli.outputs import require_writable
from manyicl.errors import INTERRUPTED_EXIT_CODE, UserError, counted
from manyicl.training.stopping import stopping_signals

if TYPE_CHECKING:
    from manyicl.tasks.task import Task
    from manyicl.training.recipe import Recipe
    from manyicl.training.train import Evaluation

EXAMPLES = """
Examples:

  manyicl train recipes/nano.yaml --dry-run

    Run: 150 steps of 8 sequences of at most 1,024 tokens.
    A packed sequence holds 1,003 tokens in 2.1 episodes with 62.0 supervised answers (124 tokens); 2.1% of it stays …
    About 4 minutes on this machine, evaluation aside, and 0.6 GiB of memory (measured: 2 sequences …).

  manyicl train recipes/nano.yaml --set training.learning_rate=1e-4 --set output=runs/slower

  manyicl train recipes/nano.yaml --resume

  torchrun --nproc-per-node 2 --no-python manyicl train recipes/mistral_7b_v0.3.yaml
"""


def train_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe: one YAML file that describes the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe; may stand several times."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Replace training.seed.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the output folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run holds and will cost, and train nothing.")
    ] = False,
) -> None:
    """Fine-tune one model on many tasks, or make one from scratch, as a recipe describes.

    Ctrl-C finishes the step, saves a checkpoint and prints the command that resumes.
    """
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it; give one of them.")
    changes = [*(overrides or ()), *([f"training.seed={seed}"] if seed is not None else ())]
    with _terminated_as_by_ctrl_c():
        try:
            _train(recipe, changes, resume=resume, overwrite=overwrite, dry_run=dry_run)
        except KeyboardInterrupt as interruption:
            _tell(_after_interruption(interruption, recipe, changes, resume=resume, dry_run=dry_run))
            raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


def _train(recipe: Path, changes: list[str], *, resume: bool, overwrite: bool, dry_run: bool) -> None:
    from rich.console import Console
    from transformers.utils import logging

    from manyicl.training.checkpoint import SavingFailedError
    from manyicl.training.recipe import Recipe
    from manyicl.training.requirements import require_machine
    from manyicl.training.train import end_processes, is_main_process, load_recipe_tasks, train

    read = Recipe.read(recipe, changes)
    logging.disable_progress_bar()
    if not dry_run:
        require_machine(read)
    if is_main_process():
        _require_output(read, resume=resume, overwrite=overwrite, dry_run=dry_run)
    tasks = load_recipe_tasks(read)
    if dry_run:
        from manyicl.training.dry_run import dry_run as describe

        for line in describe(read, tasks):
            typer.echo(line)
        return
    evaluation = held_out_evaluation(read, tasks.held_out) if tasks.held_out else None
    console = Console(stderr=True, quiet=not is_main_process())
    try:
        run = train(read, tasks, evaluation=evaluation, resume=resume, overwrite=overwrite, console=console)
    except SavingFailedError as error:
        raise SavingFailedError(f"{error} Resume with\n\n  {resume_command(recipe, changes)}") from error
    finally:
        end_processes()
    if not run.finished:
        stopped = f"Stopped after step {run.num_steps:,}; a checkpoint is saved."
        _tell(f"{stopped} Resume with\n\n  {resume_command(recipe, changes)}")
        raise typer.Exit(INTERRUPTED_EXIT_CODE)
    best = f" It is the model after step {run.best_step:,}, the best on held-out tasks" if run.best_step else ""
    score = f" with a score of {run.best_score:.3f}." if best and run.best_score is not None else ""
    _tell(f"The model is in {run.folder} after {run.num_steps:,} steps.{best}{score}")


def _require_output(recipe: Recipe, *, resume: bool, overwrite: bool, dry_run: bool) -> None:
    """Refuse an output before its tasks are loaded; a run that has begun there may still be described."""
    from manyicl.training.run_folder import RunFolder

    folder = RunFolder(recipe.output)
    is_described = dry_run and not overwrite and folder.is_run
    if not (resume or is_described):
        folder.require_free(recipe, overwrite=overwrite)
    if not dry_run:
        require_writable(recipe.output)


def _tell(text: str) -> None:
    """Print from one process of a run; an interruption may come before torch is there to be asked."""
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(text)


def _after_interruption(
    interruption: KeyboardInterrupt, recipe: Path, changes: list[str], *, resume: bool, dry_run: bool
) -> str:
    """Say what a command that was ended at once leaves behind, and how to go on."""
    from manyicl.training.checkpoint import RunInterrupted

    if dry_run:
        return "Stopped; nothing was written."
    if not isinstance(interruption, RunInterrupted):
        left = "nothing has changed" if resume else "no run has begun"
        return f"Stopped before training; {left}. The same command starts it again."
    checkpoint = interruption.checkpoint
    left = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
    return f"Stopped at once. {left}. Resume with\n\n  {resume_command(recipe, changes)}"


@contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """Let other signals that stop a run do what Ctrl-C does from the first moment on; outside the main thread, none."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = {
            number: signal.signal(number, interrupt) for number in stopping_signals() if number != signal.SIGINT
        }
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def resume_command(recipe: Path, overrides: list[str]) -> str:
    """Return the command that goes on where a run was stopped, with as many processes."""
    num_processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["torchrun", "--nproc-per-node", num_processes, "--no-python"] if num_processes != "1" else []
    parts = [*launcher, "manyicl", "train", str(recipe)]
    for override in overrides:
        parts += ["--set", override]
    return shlex.join([*parts, "--resume"])


def held_out_evaluation(recipe: Recipe, tasks: tuple[Task, ...]) -> Evaluation:
    """Build the evaluation that training calls: the score of held-out tasks at each shot count, and their mean.

    The best model is chosen by it, so only training rows of these tasks are asked; their test rows stay untouched
    for `manyicl evaluate`.

    Raises:
        UserError: If a task has too few training rows.
    """
    from tempfile import TemporaryDirectory

    from manyicl.engine.engine import Engine
    from manyicl.evaluation.shot_curve import EvaluationSettings, measure_shot_curves
    from manyicl.model.load import LoadedModel

    asked = [watched(task, recipe.training.evaluate_queries, recipe.training.seed) for task in tasks]
    settings = EvaluationSettings(
        shots=recipe.training.evaluate_shots,
        num_seeds=1,
        num_queries=recipe.training.evaluate_queries,
        seed=recipe.training.seed,
    )

    def evaluation(loaded: LoadedModel) -> dict[str, float]:
        # The figures go to the log; the records of a model that changes with every step are not kept.
        with TemporaryDirectory() as folder:
            results = measure_shot_curves(Engine.local(loaded), asked, folder, settings).results
        figures = {"score": sum(result.score for result in results) / len(results)}
        for num_shots in settings.shots:
            scores = [result.score for result in results if result.num_shots == num_shots]
            figures[f"score_at_{num_shots}_shots"] = sum(scores) / len(scores)
        return figures

    return evaluation


def watched(task: Task, num_queries: int, seed: int) -> Task:
    """Turn training rows of a held-out task into the queries that watch it, so that its test rows are never asked.

    Args:
        task: Held out.
        num_queries: At most; and at most half of the training rows.
        seed: Of the choice.

    Returns:
        The task with the chosen rows as its test side. The others are its training side, without those that
        repeat a chosen query.

    Raises:
        UserError: If it has fewer than two training rows.
    """
    from manyicl.tasks.building import normalised

    if len(task.train) < 2:
        raise UserError(
            f"tasks.evaluate: {task.name!r} has {counted(len(task.train), 'training row')}; at least 2 are needed, "
            "because training watches a task by rows of its training side. Add rows, or leave it out."
        )
    order = list(task.train)
    random.Random(f"watched {seed}").shuffle(order)
    num_asked = min(num_queries, len(order) // 2)
    asked, others = order[:num_asked], order[num_asked:]
    texts = {normalised(example.query.text) for example in asked}
    shown = tuple(example for example in others if normalised(example.query.text) not in texts)
    return replace(task, train=shown, test=tuple(asked))
