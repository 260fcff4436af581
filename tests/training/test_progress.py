"""What a training says of itself while it runs."""

from __future__ import annotations

from typing import cast

from transformers import TrainerControl, TrainerState

from manyicl.activity import Activity
from manyicl.training.progress import TrainingProgress


class Heard:
    """An activity that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_scores_on_held_out_tasks_have_three_digits_and_counts_of_tasks_none() -> None:
    heard = Heard()
    logs = {"eval_score_at_8_shots": 0.51234, "eval_tasks_below_8_shots": 1, "epoch": 1.0}
    progress = TrainingProgress(cast(Activity, heard))
    progress.on_log(None, TrainerState(global_step=3, max_steps=1_000), TrainerControl(), logs=logs)
    assert heard.said == ["step 3/1,000  held-out: score_at_8_shots 0.512  tasks_below_8_shots 1"]
