"""transformers.Trainer with our packed sequences, our loss and an evaluation that was handed in."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.errors import MachineError, NotFiniteError
from manyicl.library_errors import reason
from manyicl.training.batch import Batch, Collator
from manyicl.training.checkpoint import Checkpoints
from manyicl.training.counts import RunCounts, RunLoss, SequenceCounts
from manyicl.training.loss import head_is_separable, most_logits_at_once, sequence_loss
from manyicl.training.processes import any_process, is_main_process, raise_in_all
from manyicl.training.recipe import ObjectiveSettings
from manyicl.training.stopping import SECONDS_OF_ONE_REQUEST, taking_signals
from manyicl.training.throughput import Throughput, TrainingFlops, matrix_rate, throughput_text

# Name of the figure that picks the best model, in what an evaluation returns.
BEST_METRIC = "score"

STOPPING = b"\nStopping once this step, and its evaluation if one is due, is saved. Ctrl-C again ends at once.\n"

LOWER_THE_RATE = "lower training.learning_rate or lengthen the warm-up and start anew with --overwrite"

MetricFunction = Callable[[PreTrainedModel], Mapping[str, float]]


class ManyShotTrainer(Trainer):
    """Trains on packed sequences with `answer_loss`; steps, schedules and sharding are transformers'.

    Three things differ from the library. The loss is divided by the summed weight of the targets of the whole step,
    gathered over processes, and multiplied by the number of processes, because their gradients are then averaged: so
    accumulation and processes give the update of one large batch. A loss or gradient that is not a number ends the
    run before it reaches the weights. And a checkpoint is written aside, completed and moved to its place, before an
    older one goes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        sequences: PackedSequences,
        objective: ObjectiveSettings,
        evaluation: MetricFunction | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """Prepare a run over all packed sequences, in their order.

        Args:
            model: Model to be trained, in place.
            arguments: Arguments of transformers; one sequence per device and micro-batch, sequential sampling.
            sequences: Packed sequences of the whole run, one long epoch.
            objective: Which tokens are targets.
            evaluation: Called with the model in evaluation mode; returns figures, ``score`` among them.
            callbacks: Callbacks besides transformers' own.
        """
        assert arguments.per_device_train_batch_size == 1
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=sequences,
            # transformers refuses to evaluate without a data set; our evaluation brings its own queries.
            eval_dataset=sequences if evaluation else None,
            data_collator=cast(Any, Collator(objective)),
            callbacks=[run := RunCounts(), loss := RunLoss(), TrainerHooks(self), *(callbacks or ())],
        )
        self.remove_callback(PrinterCallback)
        if self.is_fsdp_enabled and arguments.bf16:
            # accelerate would sum gradients, and return losses, in bfloat16.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        self.checkpoints = Checkpoints(Path(str(arguments.output_dir)))
        self.most_logits: int | None = None
        self.was_signalled = False
        self._evaluation = evaluation
        self.run_counts = run
        self._step_losses: list[tuple[Tensor, tuple[str, ...]]] = []
        self._run_loss = loss
        self._step_tasks: set[str] = set()
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        self._flops = TrainingFlops.of(model, recomputes=recomputes)
        self._since_log = self._before_log = Throughput()
        self._step_started = 0.0
        self._matrix_rate: float | None = None
        self._why_no_rate = ""
        # 5.23 asks the first, 5.17 the second, whether the loss still has to be divided by the accumulation steps.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Take the sequences of one optimizer step; sum target weights and counts over all processes."""
        self._step_started = time.perf_counter()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        waited = time.perf_counter() - self._step_started
        self._step_losses.clear()
        self._step_tasks = {name for batch in batches for name in batch["task_names"]}
        weight = sum(float(batch["weights"].sum(dtype=torch.float64)) for batch in batches)
        held = [(batch["segment_lengths"], len(batch["targets"])) for batch in batches]
        work = Throughput(
            counts=sum((batch["counts"] for batch in batches), SequenceCounts()),
            flops=sum(self._flops(*each) for each in held),
            recomputed_flops=sum(self._flops.recomputed(*each) for each in held),
            seconds_waiting=waited,
        )
        of_processes = gather_object([(weight, work)])
        weight = sum(weight for weight, _ in of_processes)
        work = sum((work for _, work in of_processes), Throughput())
        self._since_log += work
        self.run_counts.total += work.counts
        return batches, torch.tensor(weight or 1.0, device=device, dtype=torch.float32)

    def chunk_logits(self) -> str | None:
        """Let the head make the logits of many positions in chunks, where nothing changes them afterwards.

        Returns:
            What was decided; None where no sequence can have so many supervised positions.
        """
        model, sequences = cast(PreTrainedModel, self.model), cast(PackedSequences, self.train_dataset)
        most = most_logits_at_once(model.config.get_text_config().vocab_size)
        if sequences.max_context_tokens <= most:
            return None
        first = cast(Collator, self.data_collator)([sequences[0]])
        with self.accelerator.autocast():
            # Before the first step, a model that FSDP will shard is still on the CPU.
            if head_is_separable(model, cast(Batch, send_to_device(first, model.device))):
                self.most_logits = most
                self._flops = replace(self._flops, most_logits=most)
                return f"Logits are made for at most {most:,} supervised positions at a time."
        return (
            "Logits are made for all supervised positions of a sequence at once, because the model caps or scales them."
        )

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Count the operations of a packed sequence by the formula of the estimates; transformers sums them up."""
        return self._flops(inputs["segment_lengths"], len(inputs["targets"]))

    def count_step_time(self) -> None:
        """Add the time of the step that has ended, in all processes; the device is not waited for."""
        seconds = (time.perf_counter() - self._step_started) * self.accelerator.num_processes
        self._since_log += Throughput(seconds=seconds)

    def _figures(self, throughput: Throughput) -> dict[str, float]:
        return throughput.figures(self.args.device, self._matrix_rate, self.accelerator.num_processes)

    def throughput(self) -> dict[str, float]:
        """Return the figures of all steps since the run was started or last resumed, and its number of processes."""
        figures = self._figures(self._before_log + self._since_log)
        return {**figures, "num_processes": self.accelerator.num_processes} if figures else {}

    def throughput_sentence(self) -> str:
        """Say how fast the run was, and why its utilisation is not known, if it is not."""
        figures = self.throughput()
        return f"Speed: {throughput_text(figures)}.{self._why_no_rate}" if figures else ""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return one sequence's part of the step's loss, times the number of processes.

        Where it is not a finite number, all processes end together before the optimizer's step: those whose loss is
        finite would wait forever for the gradients of one that ended by itself. It is looked at only then, because a
        device would have to be waited for at each sequence.
        """
        assert num_items_in_batch is not None
        assert not return_outputs
        batch = cast(Batch, inputs)
        # accelerate's autocast is around the model's forward alone, and chunks call its parts.
        with self.accelerator.autocast():
            loss = sequence_loss(model, batch, num_items_in_batch, self.most_logits)
        self._step_losses.append((loss.detach(), batch["task_names"]))
        return cast(Tensor, loss * self.accelerator.num_processes)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Refuse the gradient of a step before it reaches the weights, where it would spoil all of them.

        Raises:
            NotFiniteError: In all processes, if the loss of one of them or the gradient is not a finite number.
        """
        failure = self._failure_of_step()
        if any_process(failure is not None, self.args.device):
            raise_in_all(failure)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise self._not_a_number(f"The norm of the gradient became {float(norm)}", "sequences", self._step_tasks)
        return norm

    def _failure_of_step(self) -> NotFiniteError | None:
        """Look at the losses of the step, all at once; describe the first that is not a finite number."""
        values = torch.stack([loss for loss, _ in self._step_losses]).tolist()
        for value, (_, tasks) in zip(values, self._step_losses, strict=True):
            if not math.isfinite(value):
                return self._not_a_number(f"The loss became {value}", "a sequence", tasks)
        return None

    def _not_a_number(self, what: str, where: str, tasks: Iterable[str]) -> NotFiniteError:
        """Say in which step and tasks, to which checkpoint the run can go back, and what to change."""
        names = ", ".join(sorted(set(tasks)))
        return NotFiniteError(
            f"{what} in step {self.state.global_step + 1}, in {where} with tasks {names}. "
            f"{self.checkpoints.last_good()} Resuming would meet the same sequences again: {LOWER_THE_RATE}, or look "
            "at these tasks with `manyicl tasks check`."
        )

    def _get_output_dir(self, trial: Any) -> str:
        """Say where transformers writes a checkpoint: not where complete ones are."""
        return str(self.checkpoints.partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Save a checkpoint aside, list its files, put it in its place, and only then let an older one go.

        Raises:
            MachineError: If it cannot be written, or a weight is not a finite number.
        """
        step = self.state.global_step
        raise_in_all(self._error_in_weights())
        self._run_loss.since_log = self.accelerator.gather(self._tr_loss.reshape(1)).mean().item()
        self._run_loss.logged_step = self._globalstep_last_logged
        self._run_loss.before_log = self._total_loss_scalar
        writes = self.is_world_process_zero()
        with self.checkpoints.saving(f"checkpoint-{step}"):
            if writes:
                self.checkpoints.clear_partial()
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.point_to_best()
            self.accelerator.wait_for_everyone()
            if writes:
                # transformers has written where the best one was while it was being saved.
                self.state.save_to_json(str(self.checkpoints.partial / f"checkpoint-{step}" / "trainer_state.json"))
                self.checkpoints.complete(step, self.accelerator.num_processes, self.state.best_global_step)
        if writes:
            self.checkpoints.rotate(self.args.save_total_limit or step)
        self.accelerator.wait_for_everyone()

    def point_to_best(self) -> None:
        """Say where the best checkpoint is, or will be; a run folder may have moved since."""
        best = self.state.best_global_step
        self.state.best_model_checkpoint = str(self.checkpoints.path(best)) if best else None

    def _determine_best_metric(self, metrics: Mapping[str, float], trial: Any) -> bool:
        """Tell whether this is the best model so far; of equal ones it is the last, which was trained for longest."""
        score = metrics[f"eval_{BEST_METRIC}"]
        if self.state.best_metric is not None and not score >= self.state.best_metric:
            return False
        self.state.best_metric, self.state.best_global_step = score, self.state.global_step
        return True

    def _load_best_model(self) -> None:
        """Load the best model.

        Raises:
            MachineError: If its checkpoint is gone or not as it was saved; transformers would keep the last model.
        """
        best = self.state.best_global_step
        assert best is not None
        if error := self.checkpoints.integrity_error(best):
            raise MachineError(
                f"The best model is that of checkpoint-{best}, which {error}, so the run cannot end as it should. "
                "Restore it and continue with --resume, or start anew with --overwrite."
            )
        super()._load_best_model()

    def _error_in_weights(self) -> NotFiniteError | None:
        """Name a weight that is not a finite number, in this process's part of a sharded model."""
        assert self.model is not None
        for name, weights in self.model.named_parameters():
            if not weights.requires_grad:
                continue
            local = weights.to_local() if hasattr(weights, "to_local") else weights
            # Both are NaN where any weight is; no copy is made.
            if local.numel() and not torch.isfinite(torch.stack(local.detach().aminmax())).all():
                return NotFiniteError(
                    f"A weight of {name} is not a finite number after step {self.state.global_step}, so no checkpoint "
                    f"is saved. {self.checkpoints.last_good()} To avoid it, {LOWER_THE_RATE}."
                )
        return None

    def restore(self) -> None:
        """Restore from a checkpoint what transformers does not: sums of losses, intervals, and the best one."""
        self._run_loss.restore(self.state)
        self._tr_loss += self._run_loss.since_log
        self._total_loss_scalar = self._run_loss.before_log
        self._globalstep_last_logged = self._run_loss.logged_step
        # It goes by those of the checkpoint, though the recipe may say something else now.
        self.state.compute_steps(self.args, self.state.max_steps)
        self.point_to_best()

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Call the evaluation that was handed in and log its figures.

        Every process calls it, so that they can share the work, or run a sharded model, all at once.
        """
        if self._evaluation is None:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        try:
            with torch.no_grad():
                figures = self._evaluation(model)
        except MachineError as error:
            kind = NotFiniteError if isinstance(error, NotFiniteError) else MachineError
            raise kind(
                f"The evaluation after step {self.state.global_step} failed: {error} {self.checkpoints.last_good()}"
            ) from error
        model.train()
        metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed, utilisation and memory to lines that report a loss, and the counts to the last one."""
        if "loss" in logs:
            logs.update(self._figures(self._since_log))
            self._before_log, self._since_log = self._before_log + self._since_log, Throughput()
        if "train_loss" in logs:
            logs.update(asdict(self.run_counts.total))
            # transformers takes the mean over the part since the run was resumed.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def train_until_stopped(self, checkpoint: str | None = None) -> bool:
        """Train from the start or a checkpoint; return False if a signal ended the run early.

        The first Ctrl-C (or SIGTERM) lets the step and a due evaluation finish and saves a checkpoint; a second one
        ends it at once.
        """
        stop = StopAfterStep()
        self.add_callback(stop)
        with taking_signals(stop.on_signal):
            dtype = torch.bfloat16 if self.args.bf16 else cast(PreTrainedModel, self.model).dtype
            try:
                self._matrix_rate = matrix_rate(dtype, self.args.device)
            except RuntimeError as error:
                self._why_no_rate = f" The matrix rate could not be measured: {reason(error)}."
            self.train(resume_from_checkpoint=checkpoint)
        self.was_signalled = stop.was_signalled
        return not stop.stopped


class TrainerHooks(TrainerCallback):
    """Tells the trainer when transformers has restored what it restores, and when a step has ended."""

    def __init__(self, trainer: ManyShotTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore the rest."""
        self._trainer.restore()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the time of the step, before it is logged, evaluated and saved."""
        self._trainer.count_step_time()


class StopAfterStep(TrainerCallback):
    """Turns a signal into: finish this step, save a checkpoint, stop."""

    def __init__(self) -> None:
        self._signalled_at: float | None = None
        self.stopped = False

    @property
    def was_signalled(self) -> bool:
        """Whether a signal came, also one in the last step, after which the run is finished."""
        return self._signalled_at is not None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; end the run at a later one."""
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            if is_main_process():
                # Python's own streams may be in the middle of a write when a signal arrives.
                with suppress(OSError):  # a closed terminal takes no words
                    os.write(2, STOPPING)
        elif now - self._signalled_at > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop all processes at the same step, if any of them received a signal.

        An evaluation that is due still runs: without it, the best model could be another one.
        """
        if state.global_step < state.max_steps and any_process(self._signalled_at is not None, args.device):
            self.stopped = control.should_training_stop = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop at a checkpoint that was due anyway, if the signal came during its evaluation."""
        self.on_step_end(args, state, control)
        control.should_save = False


class Milestones(TrainerCallback):
    """Saves between evaluations if configured, and saves and evaluates after the last step."""

    def __init__(self, save_every: int | None) -> None:
        self._save_every = save_every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request what is due after this step."""
        is_last = state.global_step >= state.max_steps
        if is_last or (self._save_every and state.global_step % self._save_every == 0):
            control.should_save = True
        if is_last:
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO
