"""Gradients just before the first optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manyicl.training.recipe import Recipe
from manyicl.training.run_folder import RunFolder
from manyicl.training.start import starting_point
from manyicl.training.train import packed_sequences, training_arguments
from manyicl.training.trainer import ManyShotTrainer
from tests.training.recipes import small_recipe, small_tasks


class GradientsBeforeTheStep(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = kwargs["model"].parameters()
        self.gradients = [weights.grad.clone() for weights in parameters if weights.grad is not None]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])


def first_step(recipe: Recipe) -> tuple[list[Tensor], float]:
    tasks = small_tasks()
    start = starting_point(recipe, tasks.train)
    seen = GradientsBeforeTheStep()
    trainer = ManyShotTrainer(
        start.model,
        training_arguments(recipe, RunFolder(recipe.output), evaluates=False),
        packed_sequences(recipe, tasks.train, start.tokenizer),
        recipe.objective,
        callbacks=[seen],
    )
    trainer.train()
    return seen.gradients, seen.losses[0]


def first_step_recipe(output: Path, *overrides: str) -> Recipe:
    """One step over four uneven sequences, without dropout and without cutting the gradient."""
    return small_recipe(
        output,
        "training.num_steps=1",
        "training.log_every=1",
        "training.max_grad_norm=0",
        "model.from_scratch.config.attention_dropout=0",
        *overrides,
    )
