"""A small recipe for tests, changed key by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from manyicl.model.load import LoadedModel
from manyicl.training.job import MakeMeasure
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import RecipeTasks
from manyicl.training.run_folder import RunFolder, RunState
from tests.builders import make_task

TEXT = """
model:
  from_scratch:
    architecture: llama
    config:
      attention_bias: true
      hidden_size: 32
      intermediate_size: 48
      num_hidden_layers: 2
      num_attention_heads: 4
      num_key_value_heads: 2
      attention_dropout: 0.1
    tokenizer: {kind: word, vocabulary_size: 200}
tasks:
  train: [unused]
  evaluate: [unused]
sequences:
  max_context_tokens: 60
  examples_per_episode: [1, 6]
training:
  num_steps: 4
  sequences_per_step: 4
  learning_rate: 1e-2
  num_threads: 1
"""


def small_recipe(output: Path, *overrides: str) -> Recipe:
    return Recipe.parse(TEXT, overrides=[f"output={output}", *overrides])


def small_tasks() -> RecipeTasks:
    return RecipeTasks(
        train=(make_task("one", instruction="good or bad"), make_task("two")),
        held_out=(make_task("three", data_hash="3" * 64),),
    )


def measuring(evaluation: Callable[[LoadedModel], Mapping[str, float]] | None) -> MakeMeasure | None:
    """What `ensure_trained` is given to call this evaluation, whatever the held-out tasks are."""
    return None if evaluation is None else lambda tasks, **settings: evaluation


def is_finished(output: Path) -> bool:
    return RunFolder(output).state() is RunState.FINISHED
