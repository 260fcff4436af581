"""The training itself: a prepared model and its packed sequences -> checkpoints and a finished model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from manyicl.activity import Activity
from manyicl.episodes.chat_template import chosen_format, describe, require_rows_as_written, template_identity
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.episodes.replay import Replay
from manyicl.episodes.text_format import AnyFormat
from manyicl.episodes.token_store import TokenStore
from manyicl.errors import MachineError, pluralized
from manyicl.library_errors import reason
from manyicl.model.load import LoadedModel
from manyicl.model.manifest import Manifest, TrainedTask
from manyicl.tasks.task import Task
from manyicl.training.checkpoint import Checkpoints
from manyicl.training.estimate import SequenceStatistics, num_weights, sample_sequences
from manyicl.training.processes import SECONDS_WAITED, is_main_process, world_size
from manyicl.training.progress import TrainingProgress
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import RecipeTasks, require_unseen_by_base
from manyicl.training.run_folder import RunFolder, RunState
from manyicl.training.start import StartingPoint, starting_point
from manyicl.training.trainer import ManyShotTrainer, Milestones

Measure = Callable[[LoadedModel], Mapping[str, float]]


@dataclass(frozen=True)
class PreparedRun:
    """Everything that a run needs before its first step.

    Attributes:
        recipe: The run.
        start: The model before its first step.
        sequences: Packed sequences of the whole run.
        statistics: Means over the first of them.
        manifest: What the finished model will remember; its shot count is that of the sequences looked at.
    """

    recipe: Recipe
    start: StartingPoint
    sequences: PackedSequences
    statistics: SequenceStatistics
    manifest: Manifest

    def sentences(self) -> Iterator[str]:
        """Say what is trained and where, what a packed sequence holds, and how examples are written."""
        yield self._opening()
        yield self.statistics.sentence()
        yield from describe(self.sequences.encoder.format)

    def _opening(self) -> str:
        recipe, model = self.recipe, self.start.model
        num_all, num_trained = num_weights(model)
        sequences = pluralized(recipe.training.sequences_per_step, "sequence")
        return (
            f"Training {recipe.model.base or 'a new model'} on {model.device}: {num_trained:,} of {num_all:,} weights, "
            f"{pluralized(recipe.num_steps, 'step')} of {sequences} of at most {recipe.sequences.max_context_tokens:,} "
            f"tokens, into {recipe.output}."
        )


def prepare_run(recipe: Recipe, tasks: RecipeTasks, activity: Activity | None = None) -> PreparedRun:
    """Load or make the model of a recipe, and check that tasks, text format and model go together.

    Args:
        recipe: The run.
        tasks: Its tasks.
        activity: Shows that the model is loaded, and how many tasks are tokenized, of how many that were not before.

    Raises:
        UserError: If they do not.
    """
    activity = activity or Activity()
    activity.begin(f"loading {recipe.model.base}" if recipe.model.base else "making a new model")
    start = starting_point(recipe, tasks.train)
    require_unseen_by_base(tasks.held_out, start.base, start.base_tasks)
    sequences = packed_sequences(recipe, tasks.train, start.tokenizer, activity)
    for task in tasks.held_out:
        # The engine would refuse to evaluate on it when the first evaluation is due.
        sequences.encoder.require_encodable(task)
    require_rows_as_written(recipe.format, start.tokenizer, sequences.encoder.format, tasks.held_out)
    activity.begin("looking at the first packed sequences")
    statistics = sample_sequences(sequences, recipe.objective)
    manifest = run_manifest(recipe, tasks, start, sequences.encoder.format, statistics, sequences.replay)
    return PreparedRun(recipe, start, sequences, statistics, manifest)


def packed_sequences(
    recipe: Recipe,
    tasks: tuple[Task, ...],
    tokenizer: PreTrainedTokenizerBase,
    activity: Activity | None = None,
) -> PackedSequences:
    """Return the packed sequences of a whole run; tasks whose rows are in files are tokenized once."""
    say = activity.say if activity else None
    activity = activity or Activity()
    activity.begin("tokenizing tasks")
    encoder = Encoder(tokenizer, chosen_format(recipe.format, tokenizer))
    store = TokenStore(
        encoder,
        identity=template_identity(recipe.format, tokenizer),
        check=lambda task: require_rows_as_written(recipe.format, tokenizer, encoder.format, [task]),
        say=say,
    )
    context, replay = recipe.sequences.max_context_tokens, recipe.sequences.replay
    return PackedSequences(
        tasks,
        encoder,
        max_context_tokens=context,
        num_sequences=recipe.num_sequences,
        seed=recipe.training.seed,
        episodes=recipe.sequences,
        mixture=recipe.tasks.mixture,
        shots=store.shots_of(tasks, activity.show),
        replay=None if replay is None else Replay(replay, encoder, context),
    )


def training_arguments(recipe: Recipe, folder: RunFolder, *, evaluates: bool) -> TrainingArguments:
    """Translate a recipe into transformers' arguments, for this process of the run; the processes meet here."""
    settings = recipe.training
    num_processes = world_size()
    on_cpu = not torch.cuda.is_available()
    due = settings.evaluate_every if evaluates else settings.save_every
    interval = due if isinstance(due, int) else recipe.num_steps
    named_alike = {"learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "seed"}
    arguments = TrainingArguments(
        **settings.model_dump(include=named_alike),
        output_dir=str(folder.checkpoints),
        max_steps=recipe.num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.sequences_per_step // num_processes,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        lr_scheduler_kwargs={"num_decay_steps": recipe.num_decay_steps} if recipe.num_decay_steps else {},
        adam_beta1=settings.adam_betas[0],
        adam_beta2=settings.adam_betas[1],
        use_cache=False,
        # Without it, torchrun on a CPU would run unrelated trainings side by side.
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and num_processes > 1 else None,
        ddp_find_unused_parameters=False,
        ddp_timeout=SECONDS_WAITED,
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
    )
    # One process trains on one device; transformers would spread a batch of one sequence over all GPUs it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def run_manifest(
    recipe: Recipe,
    tasks: RecipeTasks,
    start: StartingPoint,
    text_format: AnyFormat,
    statistics: SequenceStatistics,
    replay: Replay | None = None,
) -> Manifest:
    """Collect what manyicl.json remembers."""
    return Manifest(
        text_format=text_format,
        max_context_tokens=recipe.sequences.max_context_tokens,
        max_trained_shots=statistics.most_shots,
        tasks=trained_tasks(tasks.train, start.base_tasks),
        held_out=tuple(TrainedTask.of(task) for task in tasks.held_out),
        objective=recipe.objective.supervise,
        base=start.base,
        base_fingerprint=start.base_fingerprint,
        replay_sha256=replay.text.sha256 if replay else None,
        recipe=recipe.model_dump(mode="json"),
    )


def trained_tasks(tasks: Sequence[Task], base_tasks: Sequence[TrainedTask]) -> tuple[TrainedTask, ...]:
    """List the tasks that a model has seen: those of its run, then those that its base was trained on."""
    own = tuple(TrainedTask.of(task) for task in tasks)
    known = set(own)
    return own + tuple(task for task in base_tasks if task not in known)


def train_prepared(
    run: PreparedRun,
    arguments: TrainingArguments,
    folder: RunFolder,
    activity: Activity,
    progress: TrainingProgress,
    *,
    measure: Measure | None,
    checkpoint: Path | None,
) -> tuple[bool, ManyShotTrainer]:
    """Train to the last step, or until a signal stops the run, and save the finished model.

    Args:
        run: What is trained.
        arguments: Of transformers.
        folder: Where the run lives; it has started.
        activity: Shows what is done.
        progress: Shows in it how far the run is.
        measure: Called when an evaluation is due, with the model; returns figures, ``score`` among them.
        checkpoint: Where the run resumes; None for its beginning.

    Returns:
        Whether the run is finished, and its trainer.
    """
    start, manifest = run.start, run.manifest
    use_cache = start.model.config.use_cache
    callbacks: list[TrainerCallback] = [Milestones(run.recipe.training.save_every)]
    if is_main_process():
        # What was logged after the checkpoint will be logged again.
        first_step = int(checkpoint.name.rpartition("-")[2]) + 1 if checkpoint else 0
        callbacks += [progress, TensorBoardCallback(SummaryWriter(str(folder.path / "logs"), purge_step=first_step))]

    def figures(model: PreTrainedModel) -> Mapping[str, float]:
        assert measure is not None
        try:
            return measure(LoadedModel(model, start.tokenizer, manifest, "in training", str(folder.path)))
        except OSError as error:  # not of the run folder, whose disk would be blamed
            raise MachineError(f"An evaluation could not read or write a file: {reason(error)}.") from error

    evaluation = None if measure is None else figures
    trainer = ManyShotTrainer(start.model, arguments, run.sequences, run.recipe.objective, evaluation, callbacks)
    progress.num_tokens = lambda: trainer.run_counts.total.num_tokens
    if sentence := trainer.chunk_logits():
        activity.say(sentence)
    finished = trainer.train_until_stopped(str(checkpoint) if checkpoint else None)
    if finished:
        start.model.config.use_cache = use_cache
        # Until now it was the most of a sample.
        most_shots = max(run.statistics.most_shots, trainer.run_counts.total.most_shots)
        known_now = {"max_trained_shots": most_shots, "throughput": trainer.throughput()}
        save_finished(trainer, start, manifest.model_copy(update=known_now), folder)
    return finished, trainer


@contextmanager
def explained_ends(folder: RunFolder) -> Iterator[None]:
    """Let a run that ends early, by Ctrl-C or because a log cannot be written, say what it leaves.

    Raises:
        RunInterrupted: Instead of KeyboardInterrupt, once the run has started.
        SavingFailedError: Instead of OSError, once the run has started.
    """
    thread_hook = threading.excepthook
    # The writer of TensorBoard's files fails in a thread of its own, and again in this one, which says so.
    threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else thread_hook(failed)
    try:
        yield
    except KeyboardInterrupt:
        raise folder.interruption() from None
    except OSError as error:
        if folder.state() not in (RunState.STARTED, RunState.FINISHED):
            raise
        raise Checkpoints(folder.checkpoints).failure("The log of the run", error) from error
    finally:
        threading.excepthook = thread_hook


def save_finished(trainer: ManyShotTrainer, start: StartingPoint, manifest: Manifest, folder: RunFolder) -> None:
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
        # peft writes a model card without content, under a name that the user may want.
        (aside / "README.md").unlink(missing_ok=True)
        start.tokenizer.save_pretrained(str(aside))
        manifest.write(aside)
        folder.put_in_place(aside)
    checkpoints.clear_partial()
