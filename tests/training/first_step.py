"""Gradients just before the first optimizer step; also run by torchrun as a script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))

from manyicl.training.processes import end_processes, is_main_process
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


def spoil_second_process() -> None:
    """Let the loss of one process of two be no number."""
    names = vars(sys.modules[ManyShotTrainer.__module__])
    loss = names["sequence_loss"]
    names["sequence_loss"] = lambda *arguments: loss(*arguments) * (1 if is_main_process() else float("nan"))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["spoilt"]:
        spoil_second_process()
        first_step(first_step_recipe(folder))
    measured = first_step(first_step_recipe(folder, *sys.argv[2:]))
    if is_main_process():
        torch.save(measured, folder / "first_step.pt")
    end_processes()
