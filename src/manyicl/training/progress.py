"""What a user sees while a model trains: one bar on a terminal, one line per log entry elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, and supervised answers per second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar."""
        self._bar.start()
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, status="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss and the speed."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            status = (
                f"loss {logs['loss']:.3f}  {logs['answers_per_second']:,.0f} answers/s  "
                f"{logs['tokens_per_second']:,.0f} tokens/s"
            )
            self._bar.update(self._task, status=status)
            if not self._console.is_terminal:
                self._console.print(
                    f"step {state.global_step:,}/{state.max_steps:,}  {status}", highlight=False, soft_wrap=True
                )
        figures = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if figures:
            text = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            self._console.print(
                f"step {state.global_step:,}/{state.max_steps:,}  held-out: {text}", highlight=False, soft_wrap=True
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        self._bar.stop()
