"""Time a training step and the engine on one CUDA GPU, with random weights in the shape of SmolLM2-135M.

    python benchmarks/gpu_step.py                 # every setting, about two minutes
    python benchmarks/gpu_step.py --profile       # and what the kernels of one step cost
    python benchmarks/gpu_step.py --processes 10  # that many trainings side by side on the GPU, and nothing else

A step is forward, backward and AdamW of LoRA (rank 16, all linear layers) on one packed sequence, every sixteenth token
supervised. docs/performance.md has the figures.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.multiprocessing as multiprocessing
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from manyicl.engine.label_trie import tries_of
from manyicl.engine.packing import ActivationBudget
from manyicl.engine.prefix_cache import extend_blocks
from manyicl.engine.scoring import score_labels
from manyicl.model.attention import ATTENTION, packed_arguments
from manyicl.training.loss import answer_loss
from manyicl.training.throughput import TrainingFlops, matrix_rate

VOCABULARY = 49152
NUM_WARM_UP, NUM_TIMED = 2, 4
SECONDS_SIDE_BY_SIDE = 7.0
SIDE_BY_SIDE_SEGMENTS = (5, 10, 100)


@dataclass(frozen=True)
class Setting:
    """How a step is computed.

    Attributes:
        name: Printed before its figures.
        dtype: Type of the frozen weights.
        autocast: Compute in bfloat16.
        one_call: All segments in one kernel call; otherwise each by itself.
        num_tokens: Length of the packed sequence.
        num_segments: Episodes in it.
        checkpointing: Recompute activations in the backward pass.
    """

    name: str
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = True
    one_call: bool = True
    num_tokens: int = 8192
    num_segments: int = 5
    checkpointing: bool = False


SETTINGS = (
    Setting("float32 weights, segments one by one", torch.float32, one_call=False),
    Setting("float32 weights", torch.float32),
    Setting("bfloat16 weights"),
    Setting("20 segments", num_segments=20),
    Setting("20 segments one by one", num_segments=20, one_call=False),
    Setting("without autocast", autocast=False),
    Setting("gradient checkpointing", checkpointing=True),
    Setting("16,384 tokens", num_tokens=16384, num_segments=2),
    Setting("4,096 tokens", num_tokens=4096, num_segments=2),
)


def network(dtype: torch.dtype) -> PreTrainedModel:
    """Make the network with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=16384,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype)
    torch.nn.Module.to(model, torch.device("cuda"))
    return model


class Step:
    """One optimizer step, always on the same tokens."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = cast(Any, get_peft_model(network(setting.dtype), adapter).train())
        if setting.checkpointing:
            self.model.enable_input_require_grads()
            self.model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.weights = [weights for weights in self.model.parameters() if weights.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=True)
        length = setting.num_tokens // setting.num_segments
        self.lengths = [length] * (setting.num_segments - 1)
        self.lengths.append(setting.num_tokens - sum(self.lengths))
        self.packed = dict(packed_arguments(self.lengths, "cuda"))
        if not setting.one_call:
            self.packed = {name: value for name, value in self.packed.items() if not name.startswith("max")}
        self.ids = torch.randint(VOCABULARY, (1, setting.num_tokens), device="cuda")
        self.positions = torch.arange(10, setting.num_tokens - 1, 16, device="cuda")
        self.flops = TrainingFlops.of(self.model, recomputes=setting.checkpointing)

    def run(self) -> None:
        """Take the step and wait for the GPU."""
        targets = self.ids[0, self.positions + 1]
        with torch.autocast("cuda", torch.bfloat16, enabled=self.setting.autocast):
            logits = self.model(
                input_ids=self.ids, logits_to_keep=self.positions, use_cache=False, **self.packed
            ).logits[0]
            weights = torch.ones(len(targets), device="cuda")
            loss = answer_loss(logits, targets, weights, float(len(targets)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.cuda.synchronize()


def time_step(setting: Setting, rate: float, *, profiled: bool = False) -> None:
    """Print seconds, tokens per second, share of the matrix rate and peak memory of a setting."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = Step(setting)
    for _ in range(NUM_WARM_UP):
        step.run()
    started = time.perf_counter()
    for _ in range(NUM_TIMED):
        step.run()
    seconds = (time.perf_counter() - started) / NUM_TIMED
    memory = torch.cuda.max_memory_allocated() / 2**30
    flops, repeated = (
        step.flops(step.lengths, len(step.positions)),
        step.flops.recomputed(step.lengths, len(step.positions)),
    )
    shares = f"{flops / seconds / rate:.1%} of the matrix rate, {(flops + repeated) / seconds / rate:.1%} with repeated"
    speed = f"{setting.num_tokens / seconds:,.0f} tokens/s"
    print(f"{setting.name:40} {seconds:.3f} s  {speed}  {shares}  {memory:.1f} GiB", flush=True)
    if profiled:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step.run()
        print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=45))


def time_engine() -> None:
    """Print what a prefix of 4,096 tokens and 100 queries with 8 labels of 3 tokens cost."""
    model = network(torch.bfloat16).eval()
    rng = random.Random(0)

    def ids(num_tokens: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(num_tokens)]

    for _ in range(2):
        started = time.perf_counter()
        blocks = extend_blocks(model, (), ids(4096))
        torch.cuda.synchronize()
        print(f"prefill of 4,096 tokens: {time.perf_counter() - started:.3f} s", flush=True)
    queries = [tuple(ids(rng.randrange(15, 90))) for _ in range(100)]
    labels = tuple(tuple(ids(3)) for _ in range(8))
    for mib in (64, None):
        budget = ActivationBudget.after(model, blocks, mib)
        tries = tries_of(labels, budget.slots_per_query())
        for _ in range(2):
            started = time.perf_counter()
            score_labels(model, blocks, queries, [tries] * len(queries), budget, "all")
            print(f"100 queries, budget {mib or 'default'}: {time.perf_counter() - started:.3f} s", flush=True)


def train_beside_others(number: int, barrier: Any, figures: Any) -> None:
    """Take steps for some seconds, at the same time as the other processes; what each did goes into a queue."""
    step = Step(Setting("beside others", torch.float32, num_segments=SIDE_BY_SIDE_SEGMENTS[number % 3]))
    for _ in range(NUM_WARM_UP + 1):
        step.run()
    barrier.wait()
    started, num_steps = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS_SIDE_BY_SIDE:
        step.run()
        num_steps += 1
    per_second = num_steps * step.setting.num_tokens / (time.perf_counter() - started)
    figures.put((per_second, torch.cuda.max_memory_reserved() / 2**30))


def time_side_by_side(num_processes: int) -> None:
    """Print the tokens per second of trainings that share the GPU."""
    context = multiprocessing.get_context("spawn")
    barrier, figures = context.Barrier(num_processes), context.Queue()
    processes = [
        context.Process(target=train_beside_others, args=(number, barrier, figures)) for number in range(num_processes)
    ]
    for process in processes:
        process.start()
    found = [figures.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    speeds = [speed for speed, _ in found]
    each = f"each {min(speeds):,.0f} to {max(speeds):,.0f}"
    memory = f"at most {max(gib for _, gib in found):.1f} GiB reserved"
    print(f"{num_processes} processes: {sum(speeds):,.0f} tokens/s, {each}, {memory}", flush=True)


def main() -> None:
    """Time every setting, then the engine; or trainings side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    if arguments.processes:
        time_side_by_side(arguments.processes)
        return
    profiled = arguments.profile
    rate = matrix_rate(torch.bfloat16, torch.device("cuda"))
    print(torch.__version__, torch.cuda.get_device_name(), f"{rate / 1e12:.0f} TFLOP/s in bfloat16", flush=True)
    for setting in SETTINGS:
        time_step(setting, rate, profiled=profiled and setting.name == "bfloat16 weights")
    time_engine()


if __name__ == "__main__":
    main()
