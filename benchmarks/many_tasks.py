"""Time and memory until the first step of a run over many tasks, and what building a packed sequence costs.

    python benchmarks/many_tasks.py --tasks 100 300 1000 --rows 1000
    python benchmarks/many_tasks.py --tasks 10000 --rows 1000 --folder DIR    # the second time: known tasks alone

Writes so many synthetic task folders of so many rows into a temporary folder and starts the training of a random model
of a million weights over all of them, twice in processes of their own: before and after their tokens are on the disk.
Times count from the end of the imports; memory is the peak above what the imports take, as the operating system counts
it. With --workers, data-loader workers build sequences too, started by spawn and by forkserver.

With --folder tasks and tokens stay there, about 200 bytes a row, and only the run with known tokens is repeated where
they are found. Reading them from a disk that is not in memory yet takes longer; say which of the two was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

CONTEXT = 2048
NUM_SEQUENCES_TIMED = 100
NUM_PHRASES = 4096
AIM_SECONDS, AIM_MB = 10, 2000
WORDS = ["".join(parts) for parts in product(("ka", "lo", "mi", "ru", "se", "ta"), repeat=4)]
RECIPE = """
model: {{base: "{base}"}}
tasks: {{train: ["{tasks}"]}}
sequences: {{max_context_tokens: {context}, examples_per_episode: [4, 40], rename_labels: {renamed}}}
training: {{num_steps: 2, sequences_per_step: 1, learning_rate: 1e-3, num_threads: 1}}
output: "{output}"
"""


def write_tasks(folder: Path, num_tasks: int, num_rows: int) -> None:
    """Write task folders; each has an instruction and labels of its own, and no two rows of one are alike."""
    rng = random.Random(0)
    phrases = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(NUM_PHRASES)]
    for number in range(num_tasks):
        place = folder / f"task_{number:06d}"
        place.mkdir(parents=True, exist_ok=True)
        rng = random.Random(number)
        labels = rng.sample(WORDS, rng.randint(2, 8))
        for side, count in (("train", num_rows), ("test", 20)):
            drawn = zip(rng.choices(phrases, k=count), rng.choices(labels, k=count), strict=True)
            rows = (
                f'{{"text": "{side} {row} {phrase}", "label": "{label}"}}\n'
                for row, (phrase, label) in enumerate(drawn)
            )
            (place / f"{side}.jsonl").write_text("".join(rows), encoding="utf-8")
        (place / "task.yaml").write_text(
            f"family: classification\ninstruction: 'Kind {number}: {{{{ labels | join(\", \") }}}}.'\n"
            f"query: 'Text: {{{{ text }}}}'\nanswer: '{{{{ label }}}}'\nlabels: {json.dumps(labels)}\n"
            "data: {train: train.jsonl, test: test.jsonl}\n",
            encoding="utf-8",
        )


def write_base(folder: Path) -> None:
    """Write a random model of about a million weights with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([" ".join(WORDS), "\n\n", "0123456789"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))


def memory_bytes() -> int:
    """Return the memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its seconds are written down."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return wrapped


def measure(folder: Path, with_workers: bool, renamed: float) -> None:
    """Train two steps over the tasks of a folder, and print the figures as JSON."""
    from manyicl.training import job, train
    from manyicl.training.recipe import Recipe
    from manyicl.training.trainer import ManyShotTrainer

    output = folder / "run"
    text = RECIPE.format(base=folder / "base", tasks=folder / "tasks", context=CONTEXT, output=output, renamed=renamed)
    recipe = Recipe.parse(text, overrides=[])
    figures: dict[str, float] = {}
    runs: list[train.PreparedRun] = []
    ends: list[float] = []
    for name, module, function in (
        ("check recipe", job, "check_recipe"),
        ("load tasks", job, "load_recipe_tasks"),
        ("load model", train, "starting_point"),
        ("packed sequences", train, "packed_sequences"),
        ("sample 32", train, "sample_sequences"),
    ):
        setattr(module, function, timed(figures, name, getattr(module, function)))
    prepare, end_step = train.prepare_run, ManyShotTrainer.count_step_time

    def kept(*arguments: Any, **named: Any) -> train.PreparedRun:
        runs.append(prepare(*arguments, **named))
        return runs[-1]

    def end_seen(trainer: ManyShotTrainer) -> None:
        ends.append(time.perf_counter())
        end_step(trainer)

    for owner, function, replacement in (job, "prepare_run", kept), (ManyShotTrainer, "count_step_time", end_seen):
        setattr(owner, function, replacement)
    bare = memory_bytes()
    started = time.perf_counter()
    job.ensure_trained(recipe, existing="replace")
    figures["first step"] = ends[0] - started
    figures["a step"] = ends[1] - ends[0]
    figures["peak MB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - bare) / 1e6
    sequences = runs[0].sequences
    sequences.num_sequences = 10_000
    from manyicl.training.batch import sequence_tensors

    seconds: dict[str, float] = {}
    build = timed(seconds, "build", sequences.__getitem__)
    collate = timed(seconds, "collate", sequence_tensors)
    for index in range(1_000, 1_000 + NUM_SEQUENCES_TIMED):
        collate(build(index), recipe.objective)
    figures |= {f"{name} ms": 1000 * total / NUM_SEQUENCES_TIMED for name, total in seconds.items()}
    if with_workers:
        figures |= seconds_of_workers(sequences, recipe)
    print("FIGURES " + json.dumps(figures))


def seconds_of_workers(sequences: Any, recipe: Any) -> dict[str, float]:
    """Time how long data-loader workers take from their start to the first sequence."""
    from torch.utils.data import DataLoader

    from manyicl.training.batch import Collator

    figures = {}
    for method in ("spawn", "forkserver"):
        started = time.perf_counter()
        loader = DataLoader(
            sequences, 1, num_workers=2, multiprocessing_context=method, collate_fn=Collator(recipe.objective)
        )
        next(iter(loader))
        figures[method] = time.perf_counter() - started
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--rows", type=int, default=1000, help="Training rows of a task.")
    parser.add_argument("--workers", action="store_true", help="Also start data-loader workers.")
    parser.add_argument("--rename-labels", type=float, default=0.0, help="Share of episodes with other labels.")
    parser.add_argument("--folder", type=Path, help="Where to write; kept, and used again where it is there.")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.workers, arguments.rename_labels)
        return
    with tempfile.TemporaryDirectory() as temporary:
        for num_tasks in arguments.tasks:
            folder = (arguments.folder or Path(temporary)) / f"{num_tasks}x{arguments.rows}"
            if not (folder / "written").exists():
                write_base(folder / "base")
                started = time.perf_counter()
                write_tasks(folder / "tasks", num_tasks, arguments.rows)
                (folder / "written").touch()
                print(
                    f"{num_tasks:,} tasks of {arguments.rows:,} rows written in {time.perf_counter() - started:.0f} s",
                    flush=True,
                )
            tokenized = folder / "tokenized"
            if not tokenized.exists():
                print(f"{num_tasks:,} tasks, not tokenized before: {shown(run(folder, arguments))}", flush=True)
                tokenized.touch()
            figures = run(folder, arguments)
            print(f"{num_tasks:,} tasks, tokenized before: {shown(figures)}", flush=True)
            print(
                f"{num_tasks:,} tasks: first step after {figures['first step']:.1f} s (aim: {AIM_SECONDS}), "
                f"{figures['peak MB']:,.0f} MB above the imports (aim: {AIM_MB:,}).",
                flush=True,
            )


def run(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(folder)]
    command += ["--rename-labels", str(arguments.rename_labels)]
    command += ["--workers"] if arguments.workers else []
    environment = {**os.environ, "MANYICL_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FIGURES "))
    figures: dict[str, float] = json.loads(line.removeprefix("FIGURES "))
    return figures


def shown(figures: dict[str, float]) -> str:
    """Write figures on one line."""
    return "  ".join(f"{name} {value:,.2f}" for name, value in figures.items())


if __name__ == "__main__":
    main()
