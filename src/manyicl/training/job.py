"""A run in one call: return it if finished, resume it if interrupted, otherwise start it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import TrainerState

from manyicl.activity import Activity
from manyicl.errors import UserError
from manyicl.model.load import load_model, read_manifest
from manyicl.model.manifest import Manifest, TrainedTask
from manyicl.model.reference import resolve_reference
from manyicl.outputs import require_output_folder
from manyicl.paths import expanded, sha256_of_file
from manyicl.printing import new_console
from manyicl.tasks.files import OnProgress
from manyicl.training.checkpoint import Checkpoints, ResumePoint
from manyicl.training.processes import (
    is_main_process,
    is_sharded,
    local_rank,
    raise_in_all,
    shared_out,
    world_size,
)
from manyicl.training.progress import TrainingProgress
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import RecipeTasks, load_recipe_tasks
from manyicl.training.requirements import base_files, check_recipe, remark_on_precision
from manyicl.training.run_folder import RunFolder, RunState
from manyicl.training.train import (
    Measure,
    PreparedRun,
    explained_ends,
    prepare_run,
    train_prepared,
    trained_tasks,
    training_arguments,
)

Existing = Literal["use", "refuse", "resume", "replace"]
_Plan = Literal["found", "start", "replace", "resume"]
Decision = TypeVar("Decision")
# Makes, from held-out tasks and settings, what measures a model on them: see `evaluation.held_out.held_out_measure`.
MakeMeasure = Callable[..., Measure]


@dataclass(frozen=True)
class TrainedRun:
    """What a run gives back.

    Attributes:
        folder: Folder of the model, or of the checkpoints if the run was stopped.
        finished: False if a signal ended the run early.
        num_steps: Steps taken, those before a resume included.
        best_score: Score of the saved model on held-out tasks; None if nothing was measured.
        best_step: Step after which it was reached; None if nothing was measured.
        was_found: True if the run was finished before.
        was_signalled: True if a signal to stop came, also in the last step, after which the run is finished all the
            same.
    """

    folder: Path
    finished: bool
    num_steps: int
    best_score: float | None
    best_step: int | None
    was_found: bool = False
    was_signalled: bool = False


def ensure_trained(
    recipe: Recipe,
    tasks: RecipeTasks | None = None,
    measure: MakeMeasure | None = None,
    *,
    existing: Existing = "use",
    rehash: bool = False,
    console: Console | None = None,
) -> TrainedRun:
    """Return the finished run of a recipe: the one that is there, the rest of an interrupted one, or a new one.

    Args:
        recipe: The run.
        tasks: Its tasks, if they are loaded already.
        measure: Makes, from the held-out tasks, what is measured every ``evaluate_every`` steps and after the last,
            unless that is None; it returns figures, ``score`` among them, by which the best model is kept.
        existing: What to do with a run in the output folder. ``use`` returns or resumes it if it is this run,
            ``refuse`` takes only an empty folder, ``resume`` only an interrupted run, ``replace`` starts anew.
        rehash: Read all rows of the tasks, even of files whose sizes and times are as before.
        console: Where progress is shown; None for standard error.

    Raises:
        UserError: If recipe, tasks, model and machine do not go together, or the output folder holds something else;
            with the code ``another_run`` if it holds a run of another recipe, other tasks or another base.
        MachineError: If loss or gradient is not a finite number, or the disk is full.
        RunInterrupted: If a second signal, or one while the finished model is saved, ends a run that has started.
    """
    console = console or new_console(stderr=True, quiet=not is_main_process())
    with Activity(console, quiet=console.quiet) as activity:
        return _found_or_trained(recipe, tasks, measure, existing, activity, rehash=rehash)


def _found_or_trained(
    recipe: Recipe,
    tasks: RecipeTasks | None,
    measure: MakeMeasure | None,
    existing: Existing,
    activity: Activity,
    *,
    rehash: bool,
) -> TrainedRun:
    """Do what `ensure_trained` says, and show it."""
    check_recipe(recipe, with_tasks=tasks is None)
    if recipe.training.num_threads is not None:
        torch.set_num_threads(recipe.training.num_threads)
    folder = RunFolder(recipe.output)
    if recipe.training.evaluate_every is None or not (tasks.held_out if tasks else recipe.tasks.evaluate):
        measure = None
    arguments = training_arguments(recipe, folder, evaluates=measure is not None)
    plan = _decided_together(lambda: _plan(folder, recipe, existing))
    if tasks is None:
        activity.begin("reading tasks")
        tasks = _load_tasks(recipe, activity.show, rehash=rehash)
    if plan == "found":
        activity.begin("comparing the finished run with its recipe")
        return _found_run(recipe, tasks, folder)
    progress = TrainingProgress(activity)
    # Each part of a sharded model runs in all processes at once, so all of them measure everything.
    shares = {"share_out": shared_out} if world_size() > 1 and not is_sharded() else {}
    measured = measure and measure(
        tasks.held_out,
        shots=recipe.training.evaluate_shots,
        num_queries=recipe.training.evaluate_queries,
        seed=recipe.training.seed,
        on_progress=progress.on_evaluation,
        **shares,
    )
    files = base_files(recipe.model.base)
    run = prepare_run(recipe, tasks, activity)
    for sentence in filter(None, (*run.sentences(), remark_on_precision(recipe))):
        activity.say(sentence)
    with explained_ends(folder), folder.held() if is_main_process() else nullcontext():
        point = _decided_together(lambda: _enter_folder(folder, run, plan, files))
        if plan == "resume":
            activity.say(point.sentence())
        activity.begin("starting")
        finished, trainer = train_prepared(
            run, arguments, folder, activity, progress, measure=measured, checkpoint=point.checkpoint
        )
        for sentence in filter(None, (trainer.run_counts.total.sentence(), trainer.throughput_sentence())):
            activity.say(sentence)
    state = trainer.state
    best_step = state.best_global_step if measured else None
    best = state.best_metric if measured else None
    return TrainedRun(folder.path, finished, state.global_step, best, best_step, was_signalled=trainer.was_signalled)


def _plan(folder: RunFolder, recipe: Recipe, existing: Existing) -> _Plan:
    """Look at the output folder and say how to continue.

    Raises:
        UserError: If it holds what ``existing`` does not allow, or cannot be written.
    """
    state = folder.state()
    if existing == "use" and state is RunState.FINISHED:
        folder.require_same_recipe(recipe)
        return "found"
    require_output_folder(folder.path)
    if existing == "resume" or (existing == "use" and state is RunState.STARTED):
        folder.require_resumable(recipe)
        return "resume"
    is_replaced = existing == "replace" or (existing == "use" and state is RunState.REPLACING)
    folder.require_free(recipe, overwrite=is_replaced)
    return "replace" if is_replaced else "start"


def _enter_folder(folder: RunFolder, run: PreparedRun, plan: _Plan, files: str | None) -> ResumePoint:
    """Start the run in its folder, or find the checkpoint from which it resumes."""
    if plan == "resume":
        folder.require_same_start(run.manifest)
        folder.clean_up()
        point = Checkpoints(folder.checkpoints).resume_point(world_size(), is_sharded=is_sharded())
    else:
        folder.begin(run.recipe, run.manifest, overwrite=plan == "replace")
        point = ResumePoint(None, [])
    folder.remember_base(files)
    return point


def _load_tasks(recipe: Recipe, on_progress: OnProgress, *, rehash: bool) -> RecipeTasks:
    """Load the tasks of a recipe; rows are read again by one process of each machine, and others take its records."""
    if not rehash or world_size() == 1:
        return load_recipe_tasks(recipe, rehash=rehash, on_progress=on_progress)
    tasks = failure = None
    if local_rank() == 0:
        try:
            tasks = load_recipe_tasks(recipe, rehash=True, on_progress=on_progress)
        except Exception as error:
            failure = error
    raise_in_all(failure)
    return tasks or load_recipe_tasks(recipe)


def _decided_together(decide: Callable[[], Decision]) -> Decision:
    """Let the main process decide by what is on the disk, and all processes follow.

    Raises:
        UserError: In all of them, if it does in the main process.
    """
    decided: list[Decision | UserError | None] = [None]
    if is_main_process():
        try:
            decided = [decide()]
        except UserError as error:
            decided = [error]
    (decision,) = broadcast_object_list(decided)
    if isinstance(decision, UserError):
        raise decision
    return cast(Decision, decision)


def _replayed_text_hash(recipe: Recipe) -> str | None:
    """Hash the text that a recipe replays; None where it replays none."""
    replay = recipe.sequences.replay
    return None if replay is None else sha256_of_file(Path(expanded(replay.text)))


def _found_run(recipe: Recipe, tasks: RecipeTasks, folder: RunFolder) -> TrainedRun:
    """Return a finished run.

    Raises:
        UserError: If it was trained on other tasks, or over another base.
    """
    known = Manifest.read(folder.path)
    assert known is not None
    base, fingerprint, files = recipe.model.base, known.base_fingerprint, base_files(recipe.model.base)
    of_base = None if base is None else read_manifest(resolve_reference(base))
    has_same_base = folder.has_same_base(files)
    if base is not None and not has_same_base:
        fingerprint = load_model(base, dtype=recipe.model.dtype, device="cpu", check_isolation=False).fingerprint
    now = {
        "tasks": trained_tasks(tasks.train, of_base.tasks if of_base else ()),
        "held_out": tuple(TrainedTask.of(task) for task in tasks.held_out),
        "base_fingerprint": fingerprint,
        "replay_sha256": _replayed_text_hash(recipe),
    }
    folder.require_same_start(known.model_copy(update=now))
    if is_main_process() and not has_same_base:
        folder.remember_base(files)
    newest = Checkpoints(folder.checkpoints).newest()
    state = TrainerState.load_from_json(str(newest / "trainer_state.json")) if newest else TrainerState()
    # With evaluation switched off when the run was resumed, the last model was saved, whatever was measured before.
    was_chosen = recipe.training.evaluate_every is not None
    best, best_step = (state.best_metric, state.best_global_step) if was_chosen else (None, None)
    return TrainedRun(folder.path, True, recipe.num_steps, best, best_step, was_found=True)
