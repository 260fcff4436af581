"""All answers against the last answer, on the same episodes and model: what a second of training supervises.

    python benchmarks/objectives.py                                  # nano world, small model from scratch
    python benchmarks/objectives.py --tasks recipes/real/train --data-root DATA --context 2048

Prints a Markdown table. Both objectives see the same sequences, so tokens per second should be near each other and
answers per second as many times apart as an episode holds answers. Sequences are timed apart from steps.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.model.manifest import library_versions
from manyicl.tasks.files import load_tasks
from manyicl.tasks.task import Task
from manyicl.training.batch import Batch, sequence_tensors
from manyicl.training.loss import sequence_loss
from manyicl.training.recipe import ObjectiveSettings, Recipe
from manyicl.training.start import starting_point
from manyicl.training.throughput import TrainingFlops, matrix_rate
from manyicl.training.train import packed_sequences


@dataclass(frozen=True)
class Speed:
    """What one objective reached."""

    name: str
    answers_per_second: float
    tokens_per_second: float
    flops_per_second: float
    answers_per_row: float
    step_seconds: float


def recipe_for(context: int, hidden_size: int, num_layers: int, num_threads: int) -> Recipe:
    """Describe a small model from scratch; nothing is written to its output."""
    config = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 32,
        "tie_word_embeddings": True,
    }
    scratch = {"architecture": "llama", "config": config, "tokenizer": {"kind": "byte_bpe", "vocabulary_size": 4096}}
    return Recipe.model_validate(
        {
            "model": {"from_scratch": scratch},
            "tasks": {"train": ["given"]},
            "sequences": {"max_context_tokens": context},
            "training": {
                "num_steps": 1_000,
                "sequences_per_step": 1,
                "learning_rate": 1e-3,
                "num_threads": num_threads,
            },
            "output": "unused",
        }
    )


def build_seconds(sequences: PackedSequences, objective: ObjectiveSettings, num_sequences: int) -> float:
    """Time drawing, encoding and making tensors of sequences that were never built before, per sequence."""
    started = time.perf_counter()
    for index in range(500, 500 + num_sequences):
        sequence_tensors(sequences[index], objective)
    return (time.perf_counter() - started) / num_sequences


def measure(name: str, model: PreTrainedModel, batches: Sequence[Batch], optimizer: torch.optim.Optimizer) -> Speed:
    """Take one optimizer step per sequence; the first is not timed."""
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        sequence_loss(model, batch, batch["weights"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    timed, total = batches[1:], sum(seconds[1:])
    num_answers = sum(batch["counts"].num_answers for batch in timed)
    num_tokens = sum(batch["input_ids"].shape[1] for batch in timed)
    formula = TrainingFlops.of(model)
    flops = sum(formula(batch["segment_lengths"], len(batch["targets"])) for batch in timed)
    per_second = (num_answers / total, num_tokens / total, flops / total)
    return Speed(name, *per_second, num_answers / len(timed), total / len(timed))


def nano_tasks() -> list[Task]:
    """Write the training tasks of the nano world and load them."""
    from manyicl.tasks.nanoworld.world import write_nano_world

    with TemporaryDirectory() as folder:
        return load_tasks(write_nano_world(Path(folder), split="train"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", help="Patterns of task folders; the nano world if left out.")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    tasks = tuple(load_tasks(arguments.tasks, arguments.data_root) if arguments.tasks else nano_tasks())
    recipe = recipe_for(arguments.context, arguments.hidden_size, arguments.layers, arguments.threads)
    start = starting_point(recipe, tasks)
    sequences = packed_sequences(recipe, tasks, start.tokenizer)
    drawn = [sequences[index] for index in range(arguments.sequences + 1)]
    objectives = {name: ObjectiveSettings(supervise=name) for name in ("all_answers", "last_answer")}
    building = build_seconds(sequences, objectives["all_answers"], arguments.sequences)
    start.model.train()
    optimizer = torch.optim.AdamW(start.model.parameters(), lr=0.0)
    batches = {
        name: [sequence_tensors(sequence, objective) for sequence in drawn] for name, objective in objectives.items()
    }
    # Run once unmeasured, so that neither objective pays for warming up.
    measure("warm-up", start.model, batches["all_answers"][:3], optimizer)
    speeds = [measure(name, start.model, batches[name], optimizer) for name in objectives]

    versions = library_versions()
    num_weights = sum(weights.numel() for weights in start.model.parameters())
    print(
        f"{len(tasks)} tasks, sequences of {arguments.context:,} tokens, llama with {num_weights / 1e6:.1f}M weights, "
        f"float32, {arguments.threads} thread(s), {platform.processor() or platform.machine()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    print()
    rate = matrix_rate(torch.float32, torch.device("cpu"))
    columns = ("Objective", "Supervised answers/s", "Tokens/s", "Share of the matrix rate", "Answers per sequence")
    print("| " + " | ".join((*columns, "Seconds per step (1 sequence)")) + " |")
    print("| --- | --- | --- | --- | --- | --- |")
    for speed in speeds:
        print(
            f"| {speed.name} | {speed.answers_per_second:,.1f} | {speed.tokens_per_second:,.0f} | "
            f"{speed.flops_per_second / rate:.1%} | "
            f"{speed.answers_per_row:.1f} | {speed.step_seconds:.3f} |"
        )
    unused = sum(sequence.unused_share for sequence in drawn) / len(drawn)
    ratio = speeds[0].answers_per_second / speeds[1].answers_per_second
    print()
    print(
        f"All answers supervise {ratio:.1f} times as many answers per second. {unused:.1%} of a sequence stays unused. "
        f"Building a sequence takes {1000 * building:.1f} ms, {building / speeds[0].step_seconds:.1%} of a step."
    )


if __name__ == "__main__":
    main()
