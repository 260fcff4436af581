"""The run: recipe -> a folder with a standard model or adapter, and manyicl.json."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from manyicl.episodes.chat_template import chosen_format, describe, require_rows_as_written
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.episodes.text_format import AnyFormat
from manyicl.errors import UserError
from manyicl.model.load import LoadedModel
from manyicl.model.manifest import FILE_NAME, Manifest, TrainedTask
from manyicl.tasks.files import load_tasks
from manyicl.tasks.task import Task
from manyicl.training.checkpoint import Checkpoints, ResumePoint, RunInterrupted, is_full_disk
from manyicl.training.durable import move_whole
from manyicl.training.estimate import SequenceStatistics, sample_sequences
from manyicl.training.progress import TrainingProgress
from manyicl.training.recipe import Recipe
from manyicl.training.requirements import require_machine
from manyicl.training.run_folder import RunFolder
from manyicl.training.start import StartingPoint, starting_point
from manyicl.training.trainer import BEST_METRIC, ManyShotTrainer, Milestones

Evaluation = Callable[[LoadedModel], Mapping[str, float]]


@dataclass(frozen=True)
class RecipeTasks:
    """The tasks that a recipe names.

    Attributes:
        train: Trained on.
        held_out: Only evaluated; of other sources.
    """

    train: tuple[Task, ...]
    held_out: tuple[Task, ...]


@dataclass(frozen=True)
class TrainedRun:
    """What a run gives back.

    Attributes:
        folder: Where the model stands, or the checkpoint if the run was stopped.
        finished: False if a signal ended it early.
        num_steps: Steps taken, those before a resume included.
        best_score: Of the saved model on held-out tasks; None if there were none.
        best_step: After which step it was reached.
    """

    folder: Path
    finished: bool
    num_steps: int
    best_score: float | None
    best_step: int | None


def load_recipe_tasks(recipe: Recipe) -> RecipeTasks:
    """Load the tasks of a recipe and hold that held-out tasks are unseen.

    Raises:
        UserError: If a task cannot be loaded, or training and held-out tasks share a source or a name.
    """
    train = load_tasks(recipe.tasks.train, recipe.tasks.data_root)
    held_out = load_tasks(recipe.tasks.evaluate, recipe.tasks.data_root) if recipe.tasks.evaluate else []
    sources = {task.source: task.name for task in train}
    names = {task.name for task in train}
    for task in held_out:
        if task.source in sources:
            raise UserError(
                f"tasks.evaluate: {task.name!r} comes from the same source ({task.source!r}) as the training task "
                f"{sources[task.source]!r}, so it is not unseen. Leave one of them out."
            )
        if task.name in names:
            raise UserError(f"tasks.evaluate: a training task is named {task.name!r}, too. Rename one of them.")
    return RecipeTasks(tuple(train), tuple(held_out))


def require_unseen_by_base(held_out: Sequence[Task], start: StartingPoint) -> None:
    """Hold that the base was not trained on held-out tasks, or on siblings of them, either.

    Raises:
        UserError: If it was.
    """
    for task in held_out:
        for known in start.base_tasks:
            if known.source == task.source or known.data_hash == task.data_hash:
                raise UserError(
                    f"tasks.evaluate: {task.name!r} is not unseen: the base {start.base!r} was trained on "
                    f"{known.name!r} of the source {known.source!r}. Leave it out, or use another base."
                )


def train(
    recipe: Recipe,
    tasks: RecipeTasks | None = None,
    *,
    evaluation: Evaluation | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> TrainedRun:
    """Train what a recipe describes.

    Args:
        recipe: The run.
        tasks: Its tasks, if they are loaded already.
        evaluation: Asked every ``evaluate_every`` steps and after the last; returns figures, ``score`` among
            them, by which the best model is kept.
        resume: Go on from the last whole checkpoint in the output folder.
        overwrite: Replace a run in the output folder.
        console: Where progress is shown; None for standard error.

    Raises:
        UserError: If recipe, tasks, model and machine do not go together, or the output folder is taken.
        MachineError: If loss or gradient is not a finite number, or the disk is full.
        RunInterrupted: If a second signal, or one while the finished model is saved, ends a run that has begun.
    """
    console = console or Console(stderr=True, quiet=not is_main_process())
    require_machine(recipe)
    if recipe.training.num_threads is not None:
        torch.set_num_threads(recipe.training.num_threads)
    folder = RunFolder(recipe.output)
    _require_usable(folder, recipe, resume=resume, overwrite=overwrite)
    tasks = tasks or load_recipe_tasks(recipe)
    start = starting_point(recipe, tasks.train)
    require_unseen_by_base(tasks.held_out, start)
    sequences = packed_sequences(recipe, tasks.train, start.tokenizer)
    for task in tasks.held_out:
        # Else the engine would refuse to ask it when the first evaluation is due.
        sequences.encoder.require_encodable(task)
    require_rows_as_written(recipe.format, start.tokenizer, sequences.encoder.format, tasks.held_out)
    statistics = sample_sequences(sequences, recipe.objective)
    console.print(statistics.sentence(), highlight=False, soft_wrap=True)
    for line in describe(sequences.encoder.format):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    manifest = run_manifest(recipe, tasks, start, sequences.encoder.format, statistics)
    # The processes find each other here, before one of them chooses where the run goes on.
    arguments = training_arguments(recipe, folder, evaluates=evaluation is not None)
    with _explained_ends(folder), folder.held() if is_main_process() else nullcontext():
        checkpoint = _prepare_folder(folder, recipe, manifest, console, resume=resume, overwrite=overwrite)

        def figures(model: PreTrainedModel) -> Mapping[str, float]:
            assert evaluation is not None
            return evaluation(LoadedModel(model, start.tokenizer, manifest, "in training", str(recipe.output)))

        evaluates = evaluation is not None
        use_cache = start.model.config.use_cache
        trainer = ManyShotTrainer(
            start.model,
            arguments,
            sequences,
            recipe.objective,
            figures if evaluates else None,
            _callbacks(recipe, folder, console, checkpoint, evaluates=evaluates),
        )
        finished = trainer.train_until_stopped(str(checkpoint) if checkpoint else None)
        console.print(trainer.counts.sentence(), highlight=False, soft_wrap=True)
        if finished:
            start.model.config.use_cache = use_cache
            # Until now it held the most of a sample.
            most_shots = max(statistics.most_shots, trainer.counts.most_shots)
            _save(trainer, start, manifest.model_copy(update={"max_trained_shots": most_shots}), folder)
    state = trainer.state
    return TrainedRun(
        recipe.output, finished, state.global_step, state.best_metric, state.best_global_step if evaluates else None
    )


@contextmanager
def _explained_ends(folder: RunFolder) -> Iterator[None]:
    """Let a run that ends early, by Ctrl-C or because a log cannot be written, say what it leaves behind.

    Raises:
        RunInterrupted: Instead of KeyboardInterrupt, once the run has begun.
        SavingFailedError: Instead of OSError, once the run has begun.
    """
    checkpoints = Checkpoints(folder.checkpoints)
    thread_hook = threading.excepthook
    # The writer of TensorBoard's files fails in a thread of its own, and again in this one, which says so.
    threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else thread_hook(failed)
    try:
        yield
    except KeyboardInterrupt:
        if not folder.is_begun:
            raise
        raise RunInterrupted(checkpoints.newest()) from None
    except OSError as error:
        if not folder.is_begun:
            raise
        raise checkpoints.failure("The log of the run", error, is_full=is_full_disk(error)) from error
    finally:
        threading.excepthook = thread_hook


def packed_sequences(recipe: Recipe, tasks: tuple[Task, ...], tokenizer: PreTrainedTokenizerBase) -> PackedSequences:
    """Make the sequences of a whole run."""
    return PackedSequences(
        tasks,
        Encoder(tokenizer, chosen_format(recipe.format, tokenizer, tasks)),
        max_context_tokens=recipe.sequences.max_context_tokens,
        num_sequences=recipe.num_sequences,
        seed=recipe.training.seed,
        episodes=recipe.sequences,
        mixture=recipe.tasks.mixture,
    )


def run_manifest(
    recipe: Recipe, tasks: RecipeTasks, start: StartingPoint, text_format: AnyFormat, statistics: SequenceStatistics
) -> Manifest:
    """Collect what manyicl.json remembers; tasks that the base was trained on are seen, too."""
    own = tuple(TrainedTask.of(task) for task in tasks.train)
    return Manifest(
        text_format=text_format,
        max_context_tokens=recipe.sequences.max_context_tokens,
        max_trained_shots=statistics.most_shots,
        tasks=own + tuple(task for task in start.base_tasks if task not in own),
        held_out=tuple(TrainedTask.of(task) for task in tasks.held_out),
        objective=recipe.objective.supervise,
        base=start.base,
        base_fingerprint=start.base_fingerprint,
        recipe=recipe.model_dump(mode="json"),
    )


def training_arguments(recipe: Recipe, folder: RunFolder, *, evaluates: bool) -> TrainingArguments:
    """Translate a recipe into transformers' arguments, for this process of the run.

    Raises:
        UserError: If the sequences of a step cannot be shared evenly by the processes.
    """
    settings = recipe.training
    num_processes = world_size()
    if settings.sequences_per_step % num_processes:
        raise UserError(
            f"training.sequences_per_step is {settings.sequences_per_step} and {num_processes} processes share them; "
            f"it must be a multiple of {num_processes}."
        )
    on_cpu = not torch.cuda.is_available()
    due = settings.evaluate_every if evaluates else settings.save_every
    interval = due or recipe.num_steps
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=recipe.num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.sequences_per_step // num_processes,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        lr_scheduler_kwargs=_schedule_arguments(recipe),
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_betas[0],
        adam_beta2=settings.adam_betas[1],
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cache=False,
        seed=settings.seed,
        # Without it, torchrun on a CPU would run unrelated trainings side by side.
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and num_processes > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0 if on_cpu else 2,
        dataloader_pin_memory=not on_cpu,
        logging_steps=settings.log_every,
        # The default logs a loss that is not a number as zero.
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=settings.keep_checkpoints,
        load_best_model_at_end=evaluates,
        metric_for_best_model=BEST_METRIC if evaluates else None,
        greater_is_better=True if evaluates else None,
    )
    # One process trains on one device; transformers would spread a batch of one sequence over all GPUs it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _schedule_arguments(recipe: Recipe) -> dict[str, Any]:
    if recipe.training.schedule != "warmup_stable_decay":
        return {}
    return {"num_decay_steps": max(1, round(recipe.training.decay_share * recipe.num_steps))}


def world_size() -> int:
    """Return how many processes torchrun or accelerate started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_processes() -> None:
    """Leave the process group that transformers formed, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_main_process() -> bool:
    """Tell whether this process writes files and shows progress."""
    return int(os.environ.get("RANK", "0")) == 0


def _require_usable(folder: RunFolder, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Find out that the output folder is taken before anything is loaded."""
    if resume:
        folder.require_same_recipe(recipe)
    elif is_main_process():
        # Another process may look when this one has begun the folder already.
        folder.require_free(recipe, overwrite=overwrite)


def _prepare_folder(
    folder: RunFolder, recipe: Recipe, manifest: Manifest, console: Console, *, resume: bool, overwrite: bool
) -> Path | None:
    """Begin the folder, or find the checkpoint from which its run goes on."""
    if not resume:
        if is_main_process():
            folder.begin(recipe, manifest, overwrite=overwrite)
        return None
    folder.require_same_start(manifest)
    point = _resume_point(folder)
    console.print(point.sentence(), highlight=False, soft_wrap=True)
    return point.checkpoint


def _resume_point(folder: RunFolder) -> ResumePoint:
    """Let one process read the checkpoints and sweep, and all of them go on from the one it chose."""
    found: list[ResumePoint | UserError | None] = [None]
    if is_main_process():
        folder.write_recipe_if_missing()
        try:
            found = [Checkpoints(folder.checkpoints).resume_point(world_size())]
        except UserError as error:
            found = [error]
    if world_size() > 1:
        broadcast_object_list(found)
    point = found[0]
    if isinstance(point, UserError):
        raise point
    assert point is not None
    return point


def _callbacks(
    recipe: Recipe, folder: RunFolder, console: Console, checkpoint: Path | None, *, evaluates: bool
) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [Milestones(recipe.training.save_every, evaluates)]
    if is_main_process():
        # What was logged after the checkpoint will be logged again.
        first_step = int(checkpoint.name.rpartition("-")[2]) + 1 if checkpoint else 0
        writer = SummaryWriter(str(folder.logs), purge_step=first_step)
        callbacks += [TrainingProgress(console), TensorBoardCallback(writer)]
    return callbacks


def _save(trainer: ManyShotTrainer, start: StartingPoint, manifest: Manifest, folder: RunFolder) -> None:
    """Write the finished model with save_pretrained, first aside; then put its files in place, manyicl.json last.

    ``Trainer.save_model`` would add a pickle of its arguments. Sharded weights are gathered first.

    Raises:
        SavingFailedError: If it cannot be written; the checkpoint of the last step stays.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if not is_main_process():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    checkpoints = trainer.checkpoints
    with checkpoints.saving("The finished model"):
        checkpoints.clear_partial()
        aside = checkpoints.partial / "model"
        aside.mkdir(parents=True)
        model.save_pretrained(str(aside), state_dict=state)
        start.tokenizer.save_pretrained(str(aside))
        manifest.write(aside)
        move_whole(aside, folder.path, last=FILE_NAME)
    checkpoints.clear_partial()
