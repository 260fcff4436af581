"""transformers.Trainer with our rows, our loss and an evaluation that was handed in."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from manyicl.episodes.row import RowSource
from manyicl.errors import MachineError
from manyicl.training.batch import Batch, Collator
from manyicl.training.counts import RowCounts, RunCounts
from manyicl.training.loss import row_loss
from manyicl.training.recipe import ObjectiveSettings

# Name of the figure that picks the best model, in what an evaluation returns.
BEST_METRIC = "score"

# Under torchrun one Ctrl-C arrives twice: from the terminal, and handed on by torchrun.
SECONDS_OF_ONE_REQUEST = 2.0

MetricFunction = Callable[[PreTrainedModel], Mapping[str, float]]


class ManyShotTrainer(Trainer):
    """Trains on packed rows with `answer_loss`; checkpoints, schedules and sharding are transformers'.

    Two things differ from the library's own step. The loss is divided by the summed weight of the targets of the
    whole step, gathered over processes, and multiplied by the number of processes, because their gradients are
    then averaged: so accumulation and processes give the update of one large batch. And a loss that is not a
    number ends the run instead of being logged as zero.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: RowSource,
        objective: ObjectiveSettings,
        evaluation: MetricFunction | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """Prepare a run over all rows of the source, in their order.

        Args:
            model: To be trained, in place.
            arguments: One row per device and micro-batch, sequential sampling.
            rows: The whole run, one long epoch.
            objective: Which tokens are targets.
            evaluation: Called with the model in evaluation mode; returns figures, ``score`` among them.
            callbacks: Added to transformers' own.
        """
        assert arguments.per_device_train_batch_size == 1
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            # transformers refuses to evaluate without a data set; our evaluation brings its own queries.
            eval_dataset=rows if evaluation else None,
            data_collator=cast(Any, Collator(objective)),
            callbacks=[run := RunCounts(), *(callbacks or ())],
        )
        self.remove_callback(PrinterCallback)
        self._evaluation = evaluation
        self._run = run
        self._since_log = RowCounts()
        self._logged_at = time.perf_counter()
        # 5.23 asks the first, 5.17 the second, whether the loss still has to be divided by the accumulation steps.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Take the rows of one optimizer step; sum the weights of their targets, and counts, over all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        weight = sum(float(batch["weights"].sum(dtype=torch.float64)) for batch in batches)
        counts = sum((batch["counts"] for batch in batches), RowCounts())
        if self.accelerator.num_processes > 1:
            own = torch.tensor([[weight, *astuple(counts)]], dtype=torch.float64, device=device)
            gathered = self.accelerator.gather(own).cpu()
            weight = float(gathered[:, 0].sum())
            counts = sum((RowCounts(*map(int, row)) for row in gathered[:, 1:].tolist()), RowCounts())
        self._since_log += counts
        self._run.total += counts
        return batches, torch.tensor(weight, device=device, dtype=torch.float32)

    @property
    def counts(self) -> RowCounts:
        """All rows of the run so far, over all processes, those before a resume included."""
        return self._run.total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return one row's part of the step's loss, times the number of processes.

        Raises:
            MachineError: If the loss is not a finite number.
        """
        assert num_items_in_batch is not None
        assert not return_outputs
        batch = cast(Batch, inputs)
        loss = row_loss(model, batch, num_items_in_batch)
        if not torch.isfinite(loss):
            names = ", ".join(sorted(set(batch["task_names"])))
            raise MachineError(
                f"The loss became {loss.item()} in step {self.state.global_step + 1}, in a row with tasks {names}. "
                "Lower training.learning_rate, lengthen the warm-up, or look at these tasks with `manyicl tasks check`."
            )
        return cast(Tensor, loss * self.accelerator.num_processes)

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Call the evaluation that was handed in and log its figures.

        Every process evaluates: a sharded model can only run on all of them at once.
        """
        if self._evaluation is None:
            return {}
        started = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with torch.no_grad():
            figures = self._evaluation(model)
        model.train()
        metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._logged_at += time.perf_counter() - started
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add supervised answers and tokens per second to lines that report a loss, and the counts to the last one."""
        if "loss" in logs:
            now = time.perf_counter()
            seconds = max(now - self._logged_at, 1e-9)
            logs["answers_per_second"] = self._since_log.num_answers / seconds
            logs["tokens_per_second"] = self._since_log.num_tokens / seconds
            self._since_log, self._logged_at = RowCounts(), now
        if "train_loss" in logs:
            logs.update(asdict(self.counts))
        super().log(logs, start_time)

    def train_until_stopped(self, checkpoint: str | None = None) -> bool:
        """Train from the start or a checkpoint; return False if a signal ended the run early.

        The first Ctrl-C (or SIGTERM) lets the step finish and saves a checkpoint; a second one ends it at once.
        """
        stop = StopAfterStep(self.accelerator.num_processes)
        self.add_callback(stop)
        with stop.listening():
            self._logged_at = time.perf_counter()
            self.train(resume_from_checkpoint=checkpoint)
        return not stop.stopped


class StopAfterStep(TrainerCallback):
    """Turns a signal into: finish this step, save a checkpoint, stop."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._asked_at: float | None = None
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM while the block runs; outside the main thread, take none."""
        try:
            previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop all processes at the same step, if any of them was asked to."""
        if self._any_process_asked(args.device) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control

    def _any_process_asked(self, device: torch.device) -> bool:
        if self._num_processes == 1:
            return self._asked_at is not None
        asked = torch.tensor(float(self._asked_at is not None), device=device)
        torch.distributed.all_reduce(asked)
        return bool(asked)


class Milestones(TrainerCallback):
    """Saves between evaluations where asked, and saves and evaluates after the last step."""

    def __init__(self, save_every: int | None, evaluates: bool) -> None:
        self._save_every = save_every
        self._evaluates = evaluates

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for what is due after this step."""
        if self._save_every and state.global_step % self._save_every == 0:
            control.should_save = True
        if state.global_step >= state.max_steps:
            control.should_save = True
            control.should_evaluate = self._evaluates
        return control
