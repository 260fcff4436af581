"""Training on a CPU: one process with one thread, one with two, and two processes with one thread each.

    manyicl models get smollm2                                                 # once
    python benchmarks/training_processes.py                                    # float32
    python benchmarks/training_processes.py --bf16
    python benchmarks/training_processes.py --tasks 'recipes/real/train/*' --data-root DATA

LoRA of rank 16 on all linear layers of builtin:smollm2. Every step takes two packed sequences of 2,048 tokens, the same
in all three, on tasks of the nano world or those given. Prints a Markdown table: tokens per second of the steps after
the first, from the trainer's own log. Processes start as `manyicl train` starts them. Other work on the machine spoils
the figures.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from manyicl.model import machine
from manyicl.model.manifest import library_versions
from manyicl.tasks.files import load_tasks
from manyicl.training.launch import in_processes
from manyicl.training.recipe import Recipe
from manyicl.training.run_folder import RunFolder
from manyicl.training.start import starting_point
from manyicl.training.train import packed_sequences, training_arguments
from manyicl.training.trainer import ManyShotTrainer

SEQUENCES_PER_STEP = 2
# Number of processes, and threads of each.
SETTINGS = ((1, 1), (1, 2), (2, 1))


def recipe_for(arguments: argparse.Namespace, tasks: list[str], output: Path) -> Recipe:
    """Describe the run, the same for all settings."""
    return Recipe.model_validate(
        {
            "model": {"base": arguments.model, "lora": {"rank": 16, "alpha": 32}},
            "tasks": {"train": tasks, "data_root": arguments.data_root},
            "sequences": {"max_context_tokens": arguments.context},
            "training": {
                "num_steps": arguments.steps,
                "sequences_per_step": SEQUENCES_PER_STEP,
                "learning_rate": 1e-4,
                "bf16": arguments.bf16,
                "log_every": 1,
            },
            "output": str(output),
        }
    )


class Logged(TrainerCallback):
    """Keeps what the trainer logs of each step."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the lines that report a loss."""
        if "loss" in kwargs["logs"]:
            self.steps.append(dict(kwargs["logs"]))


def train(recipe: Recipe) -> list[Mapping[str, float]]:
    """Train in this process, one of those that were started, and return what was logged."""
    logging.disable_progress_bar()
    tasks = tuple(load_tasks(list(recipe.tasks.train), recipe.tasks.data_root))
    start = starting_point(recipe, tasks)
    trainer = ManyShotTrainer(
        start.model,
        training_arguments(recipe, RunFolder(recipe.output), evaluates=False),
        packed_sequences(recipe, tasks, start.tokenizer),
        recipe.objective,
        callbacks=[logged := Logged()],
    )
    trainer.chunk_logits()
    trainer.train()
    return logged.steps


def main() -> None:
    """Measure the settings one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", help="Patterns of task folders; the nano world if omitted.")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=2, help="Steps of each setting; the first does not count.")
    parser.add_argument("--bf16", action="store_true", help="Compute in bfloat16 over float32 weights.")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: the first does not count, so give at least 2")

    cpu = machine.processor()
    dtype = "bfloat16 (autocast)" if arguments.bf16 else "float32"
    print(f"{cpu.name}, {cpu.num_usable_cores} cores, {', '.join(cpu.features)}; Python {platform.python_version()}")
    print(", ".join(f"{name} {version}" for name, version in library_versions().items()))
    print(f"{arguments.model}, LoRA of rank 16, {dtype}, {SEQUENCES_PER_STEP} x {arguments.context:,} tokens a step\n")
    print("| Processes | Threads each | tokens/s | relative | loss of step 1 | GiB each |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    first = None
    with TemporaryDirectory() as folder:
        tasks = arguments.tasks or nano_tasks(Path(folder) / "tasks")
        for num_processes, num_threads in SETTINGS:
            recipe = recipe_for(arguments, tasks, Path(folder) / f"{num_processes}-{num_threads}")
            steps = in_processes(partial(train, recipe), num_processes, num_threads)
            speed = median(step["tokens_per_second"] for step in steps[1:])
            first = first or speed
            memory = max(step["peak_memory_gib"] for step in steps)
            print(
                f"| {num_processes} | {num_threads} | {speed:,.1f} | {speed / first:.2f} | {steps[0]['loss']:.6f} | "
                f"{memory:.1f} |",
                flush=True,
            )


def nano_tasks(folder: Path) -> list[str]:
    """Write the training tasks of the nano world."""
    from manyicl.tasks.nanoworld.world import write_nano_world

    return [str(path) for path in write_nano_world(folder, split="train")]


if __name__ == "__main__":
    main()
