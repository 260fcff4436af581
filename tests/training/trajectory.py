"""Losses of the first 20 steps of a tiny model in float32, kept in trajectory.json with the versions that gave them.

::

    python -m tests.training.trajectory    # records them anew, after a change that is meant to change them
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manyicl.training.recipe import Recipe
from manyicl.training.run_folder import RunFolder
from manyicl.training.start import starting_point
from manyicl.training.train import packed_sequences, training_arguments
from manyicl.training.trainer import ManyShotTrainer
from tests.builders import byte_level_bpe, tiny_model
from tests.training.recipes import small_recipe, small_tasks

PATH = Path(__file__).with_name("trajectory.json")
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers")
# Every path that decides a loss: packing, renamed labels, balanced order, weights of answers, schedule, clipping.
SETTINGS = (
    "training.num_steps=20",
    "training.log_every=1",
    "training.schedule=warmup_stable_decay",
    "training.warmup_steps=4",
    "training.max_grad_norm=0.5",
    "objective={weighting: answer, context_weight: 0.1}",
)
CASES = {
    "full": (
        "model.from_scratch.config.attention_dropout=0",
        "sequences={{max_context_tokens: 60, examples_per_episode: [1, 6], rename_labels: 0.5}}",
    ),
    "lora": (
        "model.from_scratch=null",
        "model.base={base}",
        "model.lora={{rank: 4, dropout: 0.1}}",
        "sequences={{max_context_tokens: 200, sampling: balanced}}",
    ),
}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.values.append(kwargs["logs"]["loss"])


def losses(name: str, folder: Path) -> list[float]:
    """Train one of the cases and return the loss of each step."""
    base = folder / "base"
    tokenizer = byte_level_bpe()
    tiny_model(vocabulary_size=len(tokenizer)).save_pretrained(str(base))
    tokenizer.save_pretrained(str(base))
    changes = [change.format(base=base) for change in CASES[name]]
    return _losses(small_recipe(folder / "run", *SETTINGS, *changes))


def _losses(recipe: Recipe) -> list[float]:
    tasks = small_tasks()
    start = starting_point(recipe, tasks.train)
    seen = Losses()
    arguments = training_arguments(recipe, RunFolder(recipe.output), evaluates=False)
    sequences = packed_sequences(recipe, tasks.train, start.tokenizer)
    ManyShotTrainer(start.model, arguments, sequences, recipe.objective, callbacks=[seen]).train()
    return seen.values


def recorded() -> dict[str, Any]:
    """Return what trajectory.json holds."""
    measured = {}
    for name in CASES:
        with TemporaryDirectory() as folder:
            measured[name] = losses(name, Path(folder))
    versions = {"python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}}
    return {"versions": versions, **measured}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    PATH.write_text(json.dumps(recorded(), indent=2) + "\n", encoding="utf-8")
