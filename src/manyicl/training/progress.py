"""Progress display during training: a bar on a terminal, otherwise one line per log entry."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from manyicl.printing import SECONDS_BETWEEN_LINES, duration
from manyicl.tasks.files import OnProgress
from manyicl.training.processes import is_sharded, world_size
from manyicl.training.throughput import throughput_text

SECONDS_BEFORE_A_BAR = 1.0


@contextmanager
def preparing(console: Console, what: str) -> Iterator[OnProgress]:
    """Show how many tasks are prepared, if that takes longer than a moment: a bar, or a line now and then.

    Args:
        console: Where it is shown.
        what: What is done, such as ``tokenizing tasks``.
    """
    started = written_at = time.monotonic()
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    number = bar.add_task("", total=None)

    def show(num_done: int, num_all: int) -> None:
        nonlocal written_at
        now = time.monotonic()
        if now - started > SECONDS_BEFORE_A_BAR:
            bar.start()
        bar.update(number, completed=num_done, total=num_all)
        if not console.is_terminal and now - written_at >= SECONDS_BETWEEN_LINES:
            written_at = now
            console.print(f"{what}: {num_done:,}/{num_all:,}", highlight=False, soft_wrap=True)

    try:
        yield show
    finally:
        bar.stop()


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, speed and memory, and how far an evaluation is."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._written_at = 0.0
        self._began = (0.0, 0)
        # How many tokens the run has processed so far, once it is known who counts them.
        self.num_tokens: Callable[[], int] = lambda: 0
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, status="")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the bar."""
        self._began = (time.monotonic(), state.global_step)
        self._written_at = time.monotonic()
        self._bar.start()
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar, or say how far the run is where nothing was said for a while."""
        self._bar.update(self._task, completed=state.global_step)
        if not self._console.is_terminal and time.monotonic() - self._written_at >= SECONDS_BETWEEN_LINES:
            self._say_step(state, "")

    def _say_step(self, state: TrainerState, status: str) -> None:
        """Print a line with the step, tokens so far and the time that the rest will take."""
        began_at, first_step = self._began
        self._written_at = time.monotonic()
        done, left = state.global_step - first_step, state.max_steps - state.global_step
        parts = [_step(state), *([status] if status else [])]
        parts.append(f"{self.num_tokens():,} tokens so far")
        if done and left:
            parts.append(f"about {duration((self._written_at - began_at) / done * left)} left")
        self.say("  ".join(parts))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the loss and the speed, and the scores of an evaluation."""
        logs: Mapping[str, float] = kwargs["logs"]
        if "loss" in logs:
            rate = f"learning rate {logs['learning_rate']:.1e}  " if "learning_rate" in logs else ""
            status = f"loss {logs['loss']:.3f}  {rate}{throughput_text(logs)}"
            self._bar.update(self._task, status=status)
            if not self._console.is_terminal:
                self._say_step(state, status)
        figures = [f"{name[5:]} {value:.3f}" for name, value in logs.items() if name.startswith("eval_")]
        if figures:
            self.say(f"{_step(state)}  held-out: {'  '.join(figures)}")

    def on_evaluation(self, num_done: int, num_all: int) -> None:
        """Show how many scores of an evaluation are measured."""
        whose = f" of the first of {world_size()} processes" if world_size() > 1 and not is_sharded() else ""
        status = f"evaluating on held-out tasks: {num_done:,}/{num_all:,} scores{whose}"
        self._bar.update(self._task, status=status)
        now = time.monotonic()
        if not self._console.is_terminal and (num_done == 0 or now - self._written_at >= SECONDS_BETWEEN_LINES):
            self._written_at = now
            self.say(status)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, soft_wrap=True)


def _step(state: TrainerState) -> str:
    return f"step {state.global_step:,}/{state.max_steps:,}"
