from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.errors import MachineError, UserError
from manyicl.training.batch import Collator
from manyicl.training.recipe import Recipe
from manyicl.training.requirements import check_recipe
from manyicl.training.run_folder import RunFolder
from manyicl.training.start import starting_point
from manyicl.training.train import packed_sequences, training_arguments
from manyicl.training.trainer import ManyShotTrainer
from tests.reference.one_step import slow_loss
from tests.training.first_step import first_step, first_step_recipe
from tests.training.recipes import small_recipe, small_tasks
from tests.training.test_throughput import trainer_for


def slow_first_step(recipe: Recipe) -> tuple[list[Tensor], float]:
    """One large batch: every episode of the step alone, one backward pass."""
    tasks = small_tasks()
    start = starting_point(recipe, tasks.train)
    sequences = packed_sequences(recipe, tasks.train, start.tokenizer)
    start.model.train()
    loss = slow_loss(
        start.model, [episode for sequence in sequences for episode in sequence.episodes], recipe.objective
    )
    loss.backward()
    return [weights.grad for weights in start.model.parameters() if weights.grad is not None], loss.item()


def assert_same_step(step: tuple[list[Tensor], float], expected: tuple[list[Tensor], float]) -> None:
    assert step[1] == pytest.approx(expected[1], rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in expected[0])
    assert scale > 1e-3
    for gradient, slow in zip(step[0], expected[0], strict=True):
        assert (gradient - slow).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("objective", ["{}", "{supervise: last_answer}", "{weighting: answer, context_weight: 0.5}"])
def test_gradient_accumulation_gives_the_update_of_one_large_batch(tmp_path: Path, objective: str) -> None:
    recipe = first_step_recipe(tmp_path, f"objective={objective}")
    assert_same_step(first_step(recipe), slow_first_step(recipe))


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    recipe = first_step_recipe(tmp_path, "training.gradient_checkpointing=true")
    assert_same_step(first_step(recipe), slow_first_step(first_step_recipe(tmp_path)))


def test_rows_that_two_processes_cannot_share_evenly_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="sequences_per_step is 4 and 3 processes share them"):
        check_recipe(small_recipe(tmp_path), with_tasks=False)


def test_a_loss_that_is_not_a_number_ends_the_run_and_names_step_and_tasks(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    tasks = small_tasks()
    start = starting_point(recipe, tasks.train)
    with torch.no_grad():
        next(start.model.parameters()).fill_(float("nan"))
    trainer = ManyShotTrainer(
        start.model,
        training_arguments(recipe, RunFolder(tmp_path), evaluates=False),
        packed_sequences(recipe, tasks.train, start.tokenizer),
        recipe.objective,
    )
    with pytest.raises(
        MachineError, match=r"became nan in step 1, in a sequence with tasks (one|two|one, two)\. There is no"
    ):
        trainer.train()


class Waits(TorchDispatchMode):
    """Notes the operations for which a device must have finished: a number is read from it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_no_sequence_of_a_step_waits_for_the_device(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    sequences = cast(PackedSequences, trainer.train_dataset)
    model, collate = cast(PreTrainedModel, trainer.model), cast(Collator, trainer.data_collator)
    for trainer.most_logits in (None, 3):
        _, weight = trainer.get_batch_samples(iter([collate([sequences[0]])]), 1, model.device)
        for index in (0, 1):
            batch = collate([sequences[index]])
            with Waits() as waits:
                trainer.compute_loss(model, batch, num_items_in_batch=weight).backward()
            assert waits.names == []
        with Waits() as waits:
            assert trainer._get_grad_norm(model) > 0
        assert waits.names
