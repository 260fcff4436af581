"""What a training step costs from 512 to 16,384 tokens, split into attention and the rest, beside its floor.

    python -m benchmarks.training_step --data-root DATA                             # LoRA, float32, to 8,192 tokens
    python -m benchmarks.training_step --data-root DATA --precision bf16            # bfloat16 autocast
    python -m benchmarks.training_step --data-root DATA --mode full --tokens 512 2048 8192
    python -m benchmarks.training_step --data-root DATA --tokens 16384 --precision bf16
    python -m benchmarks.training_step --data-root DATA --profile --tokens 768 2048 8192
    python -m benchmarks.training_step --data-root DATA --processes 2 --threads 1   # with every core busy

Needs `manyicl models get smollm2`; without --data-root the starter tables of the package are packed. A step is forward,
backward, clipping and AdamW on one packed sequence, all answers supervised. The floor is what no implementation on this
machine can go below: the operations of the linear layers that this kind of training needs (frozen weights have no
gradient of their own) at the rate of a large matrix product measured in the same run, and bare calls of
`scaled_dot_product_attention` with the same segments, forward and backward. Norms, rotary positions, activations,
the loss and the optimizer are not in it. A step's attention is what torch's profiler counts for these calls in it.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.training_tasks import loaded_with_adapter, task_folders
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from manyicl.episodes.encoding import Encoder
from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.model.load import load_model
from manyicl.model.manifest import library_versions
from manyicl.tasks.files import load_task
from manyicl.tasks.task import Task
from manyicl.training.batch import Batch, sequence_tensors
from manyicl.training.loss import most_logits_at_once, sequence_loss
from manyicl.training.recipe import ObjectiveSettings
from manyicl.training.start import recompute_activations
from manyicl.training.throughput import TrainingFlops, matrix_rate

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
LENGTHS = (512, 1024, 2048, 4096, 8192)
# From this length on a step is timed once, and activations are recomputed.
LONG, RECOMPUTED = 8192, 16384
OPERATORS_SHOWN = 12
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = (
    *("Training", "Tokens", "Segments", "Targets", "Seconds", "Tokens/s", "Attention, s", "The rest, s"),
    *("Floor: linear layers, s", "Floor: attention, s", "Floor / step"),
)
ATTENTION_OPERATORS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)


@dataclass(frozen=True)
class Floor:
    """What a step cannot go below on this machine, in seconds."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.linear + self.attention


class Step:
    """One optimizer step, always on the same packed sequence."""

    def __init__(self, model: PreTrainedModel, batch: Batch, *, autocast: bool = False) -> None:
        self.model = model
        self.batch = batch
        self.autocast = autocast
        self.trained = [weights for weights in model.parameters() if weights.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)
        most = most_logits_at_once(model.config.get_text_config().vocab_size)
        # As the trainer does where a sequence could have so many supervised positions.
        self.most_logits = most if batch["input_ids"].shape[1] > most else None

    def run(self) -> None:
        """Take the step."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = sequence_loss(self.model, self.batch, self.batch["weights"].sum(), self.most_logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        """Take the step and time it."""
        started = time.perf_counter()
        self.run()
        return time.perf_counter() - started

    def profiled(self) -> tuple[float, profile]:
        """Take the step under the profiler; return its seconds and what the profiler saw."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            seconds = self.seconds()
        return seconds, profiler


def floor(model: PreTrainedModel, batch: Batch, *, autocast: bool = False, recomputes: bool = False) -> Floor:
    """Measure the matrix rate and the bare attention calls, and return the floor of a step."""
    dtype = torch.bfloat16 if autocast else torch.float32
    formula, lengths = TrainingFlops.of(model), batch["segment_lengths"]
    per_token = formula.forward_per_token * (2 if recomputes else 1) + formula.backward_per_token
    operations = per_token * sum(lengths) + (formula.forward_per_target + formula.backward_per_target) * len(
        batch["targets"]
    )
    config = model.config.get_text_config()
    attention = config.num_hidden_layers * attention_seconds(config, lengths, dtype, recomputes=recomputes)
    return Floor(operations / matrix_rate(dtype, CPU), attention)


def attention_seconds(
    config: PreTrainedConfig, lengths: Sequence[int], dtype: torch.dtype, *, recomputes: bool = False
) -> float:
    """Time bare attention calls for the segments of one layer, forward and backward."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads

    def states(num_heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, num_heads, length, size, dtype=dtype, requires_grad=True)

    segments = [tuple(states(num, length) for num in (heads, key_heads, key_heads)) for length in lengths]

    def pass_once() -> None:
        for query, key, value in segments:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            if recomputes:
                with torch.no_grad():
                    F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            torch.autograd.grad(attended, (query, key, value), attended.detach())

    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        pass_once()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def attention_in(profiler: profile) -> float:
    """Return the seconds that a profiled step spent in attention calls, forward and backward."""
    events = [event for event in profiler.key_averages() if event.key in ATTENTION_OPERATORS]
    assert events, "no attention kernel was seen; torch chose another one"
    return float(sum(event.cpu_time_total for event in events)) / 1e6


def operators(profiler: profile, seconds: float) -> str:
    """Return the operators that took most of a profiled step, as a Markdown table."""
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:OPERATORS_SHOWN]
    lines = [
        f"| {event.key} | {event.count:,} | {event.self_cpu_time_total / 1e6:.3f} | "
        f"{event.self_cpu_time_total / 1e6 / seconds:.1%} |"
        for event in events
    ]
    return "\n".join(("| Operator | Calls | Seconds | Share of the step |\n| --- | ---: | ---: | ---: |", *lines))


def packed_batch(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Batch:
    """Pack real tasks into a sequence of so many tokens, as a run would."""
    sequences = PackedSequences(tasks, Encoder(tokenizer), max_context_tokens=num_tokens, num_sequences=1, seed=0)
    return sequence_tensors(sequences[0], ObjectiveSettings())


def measure(model: PreTrainedModel, batch: Batch, name: str, *, autocast: bool, with_operators: bool) -> None:
    """Print one row of the table, and the operators of the step if wanted."""
    num_tokens = batch["input_ids"].shape[1]
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    step = Step(model, batch, autocast=autocast)
    if num_tokens < LONG:
        step.run()  # the first step allocates
    bound = floor(model, batch, autocast=autocast, recomputes=recomputes)
    profiled, profiler = step.profiled()
    seconds = min(step.seconds() for _ in range(2)) if num_tokens < LONG else profiled
    attention = seconds * attention_in(profiler) / profiled
    print(
        f"| {name} | {num_tokens:,}{', recomputed' if recomputes else ''} | {len(batch['segment_lengths'])} | "
        f"{len(batch['targets']):,} | {seconds:.2f} | {num_tokens / seconds:,.0f} | {attention:.2f} | "
        f"{seconds - attention:.2f} | {bound.linear:.2f} | {bound.attention:.2f} | {bound.total / seconds:.2f} |",
        flush=True,
    )
    if with_operators:
        print(f"\nOperators of the step above, under the profiler:\n\n{operators(profiler, profiled)}\n", flush=True)


def loaded(reference: str, mode: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base with an adapter, or with all of its weights to be trained."""
    if mode == "lora":
        model, tokenizer = loaded_with_adapter(reference)
    else:
        whole = load_model(reference, dtype="float32", device="cpu", check_isolation=False)
        model, tokenizer = whole.model, whole.tokenizer
        model.requires_grad_(True)
    return model.train(), tokenizer


@contextmanager
def other_cores_busy(num_processes: int) -> Iterator[None]:
    """Run the same measurement in other processes meanwhile, over and over."""
    options = list(sys.argv[1:])
    command = [sys.executable, "-m", "benchmarks.training_step", *options, "--repeat-forever"]
    others = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(num_processes - 1)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    tasks = [load_task(folder, arguments.data_root) for folder in task_folders(arguments.data_root)["mixture"]]
    print(
        f"{arguments.model}, {arguments.threads} thread(s) in each of {arguments.processes} process(es), "
        f"{len(tasks)} tasks, {platform.processor() or platform.machine()}, "
        + ", ".join(f"{name} {version}" for name, version in library_versions().items())
    )
    rates = {precision: matrix_rate(DTYPES[precision], CPU) for precision in arguments.precision}
    print("Matrix rate: " + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items()) + "\n")
    print(f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}", flush=True)
    for mode in arguments.mode:
        model, tokenizer = loaded(arguments.model, mode)
        for num_tokens in sorted(arguments.tokens):
            if num_tokens >= RECOMPUTED:
                recompute_activations(model)
            batch = packed_batch(tasks, tokenizer, num_tokens)
            for precision in arguments.precision:
                name, autocast = f"{mode}, {precision}", precision == "bf16"
                measure(model, batch, name, autocast=autocast, with_operators=arguments.profile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--mode", nargs="+", choices=("lora", "full"), default=("lora",))
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=("float32",))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processes", type=int, default=1, help="Others do the same meanwhile; the first is measured.")
    parser.add_argument("--profile", action="store_true", help="Print the largest operators of each step.")
    parser.add_argument("--repeat-forever", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.repeat_forever:
        while True:
            run(arguments)
    with other_cores_busy(arguments.processes):
        run(arguments)


if __name__ == "__main__":
    main()
