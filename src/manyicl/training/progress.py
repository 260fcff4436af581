"""How far a training is: step, loss, speed, tokens so far and time left, through the activity of the command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from manyicl.activity import Activity
from manyicl.errors import pluralized
from manyicl.training.processes import is_sharded, world_size
from manyicl.training.throughput import throughput_text


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, speed and memory, and how far an evaluation is."""

    def __init__(self, activity: Activity) -> None:
        """Take the activity in which it is shown."""
        self._activity = activity
        self._status = ""
        # How many tokens the run has processed so far, once it is known who counts them.
        self.num_tokens: Callable[[], int] = lambda: 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin to count steps; those of a run that is resumed are found."""
        self._activity.begin("training", total=state.max_steps, found=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step."""
        self._activity.show(state.global_step, state.max_steps)
        self._show_status()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say the loss and the speed, and the scores of an evaluation."""
        logs: Mapping[str, float] = kwargs["logs"]
        if "loss" in logs:
            rate = f"learning rate {logs['learning_rate']:.1e}  " if "learning_rate" in logs else ""
            self._status = f"loss {logs['loss']:.3f}  {rate}{throughput_text(logs)}"
            self._show_status()
            if not self._activity.has_bar:
                parts = [_step(state), self._status, f"{self._tokens()} so far", self._activity.time_left()]
                self._activity.say("  ".join(filter(None, parts)))
        figures = [f"{name[5:]} {_figure(value)}" for name, value in logs.items() if name.startswith("eval_")]
        if figures:
            self._activity.say(f"{_step(state)}  held-out: {'  '.join(figures)}")

    def on_evaluation(self, num_done: int, num_all: int) -> None:
        """Show how many scores of an evaluation are measured."""
        whose = f" of the first of {world_size()} processes" if world_size() > 1 and not is_sharded() else ""
        status = f"evaluating on held-out tasks: {num_done:,}/{num_all:,} scores{whose}"
        self._activity.now(status)
        if num_done == 0 and not self._activity.has_bar:
            self._activity.say(status)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin what is left to do."""
        self._activity.begin("saving")

    def _show_status(self) -> None:
        self._activity.now(self._status, self._tokens())

    def _tokens(self) -> str:
        return pluralized(self.num_tokens(), "token")


def _figure(value: float) -> str:
    """Write a count as it is, and anything else to three digits."""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _step(state: TrainerState) -> str:
    return f"step {state.global_step:,}/{state.max_steps:,}"
