"""Check that nothing became slower than it should be: ratios measured side by side, each with the least it must reach.

    python -m benchmarks.regression                     # about 3 minutes on two cores; ends with 1 if a ratio is missed
    python -m benchmarks.regression --only floor isolation

Times depend on the machine, ratios of two times measured in the same run hardly do. Needs no model and no network: a
Llama shape of 135M random weights in float32. Run it on an idle machine, with as many threads as you like. The least
ratios leave room for machines that differ; a change that brings one of them down for good reason changes it here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from benchmarks import logits_memory
from benchmarks.engine import SHAPE, best_of, copied_cache_pass, queries, random_ids, search
from benchmarks.training_step import Step, floor
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from manyicl.engine.prefix_cache import extend_blocks
from manyicl.model.attention import ATTENTION, isolated_attention, packed_arguments
from manyicl.model.manifest import library_versions
from manyicl.training.batch import Batch
from manyicl.training.counts import SequenceCounts
from manyicl.training.merged_projections import merge_projections
from manyicl.training.recipe import LoraSettings
from manyicl.training.start import with_adapter

PREFIX_TOKENS, NUM_QUERIES, BATCH_OF_COPIES = 1024, 32, 8
STEP_SEGMENTS = (256, 256, 256)
SHORT_SEGMENTS = (48,) * 16
ATTENTION_SEGMENTS = (256,) * 8
TOKENS_PER_ANSWER = 16
# As many as logits_memory.py takes at once at most.
TOKENS_WITH_LOGITS = 2048


@dataclass(frozen=True)
class Check:
    """A ratio and the least that it must reach.

    Attributes:
        name: How --only calls it.
        sentence: What is divided by what.
        least: The least ratio.
        measure: Returns it.
    """

    name: str
    sentence: str
    least: float
    measure: Callable[[], float]


def base() -> PreTrainedModel:
    """Make the random model in float32."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SHAPE), attn_implementation=ATTENTION, dtype=torch.float32
    )
    return model


def adapted() -> PreTrainedModel:
    """Make it with an adapter in training, as `manyicl train` does on a CPU."""
    model = with_adapter(base(), LoraSettings(rank=16, alpha=32))
    merge_projections(model)
    model.train()
    return model


def random_batch(lengths: Sequence[int], *, last_answer_only: bool = False) -> Batch:
    """Make a packed sequence of random tokens with an answer of two tokens after every 14."""
    ids = torch.tensor([random_ids(sum(lengths), 0)])
    starts = [0, *accumulate(lengths)]
    answers = [
        list(range(start + TOKENS_PER_ANSWER - 3, end - 1, TOKENS_PER_ANSWER)) for start, end in pairwise(starts)
    ]
    kept = [of_segment[-1:] if last_answer_only else of_segment for of_segment in answers]
    positions = torch.tensor([first + offset for of_segment in kept for first in of_segment for offset in (0, 1)])
    return Batch(
        input_ids=ids,
        packed=packed_arguments(lengths),
        segment_lengths=tuple(lengths),
        supervised_positions=positions,
        targets=ids[0, positions + 1],
        weights=torch.ones(len(positions)),
        counts=SequenceCounts(),
        task_names=(),
    )


# --- Training


def step_against_floor() -> float:
    """Divide the floor by the time of a step."""
    model, batch = adapted(), random_batch(STEP_SEGMENTS)
    step = Step(model, batch)
    seconds = best_of(2, step.run)
    return floor(model, batch).total / seconds


def packed_against_one_by_one() -> float:
    """Divide the time of short episodes, each a pass of its own, by that of one packed sequence."""
    model = adapted()
    packed = best_of(2, Step(model, random_batch(SHORT_SEGMENTS)).run)
    steps = [Step(model, random_batch((length,))) for length in SHORT_SEGMENTS]

    def one_by_one() -> None:
        for step in steps:
            step.run()

    return best_of(1, one_by_one) / packed


def all_answers_against_last() -> float:
    """Divide the time of a step that supervises the last answers by that of one that supervises all."""
    model = adapted()
    seconds = [
        best_of(2, Step(model, random_batch(STEP_SEGMENTS, last_answer_only=only)).run) for only in (True, False)
    ]
    return seconds[0] / seconds[1]


def isolated_against_dense_mask() -> float:
    """Divide the time of attention with a dense mask by that of attention split by segment; forward and backward."""
    num_tokens, heads, key_heads = sum(ATTENTION_SEGMENTS), SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    size = SHAPE["hidden_size"] // heads
    query, key, value = (
        torch.randn(1, num, num_tokens, size, requires_grad=True) for num in (heads, key_heads, key_heads)
    )
    ends = packed_arguments(ATTENTION_SEGMENTS)["cu_seq_lens_q"]
    segment = torch.repeat_interleave(torch.arange(len(ATTENTION_SEGMENTS)), torch.tensor(ATTENTION_SEGMENTS))
    mask = (segment[:, None] == segment[None]).tril()

    def split() -> Tensor:
        return isolated_attention(torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=ends)[0]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    def both_ways(attend: Callable[[], Tensor]) -> None:
        attended = attend()
        torch.autograd.grad(attended, (query, key, value), attended.detach())

    return best_of(5, partial(both_ways, dense)) / best_of(5, partial(both_ways, split))


def logits_at_once_against_chunks() -> float:
    """Divide the peak memory of a step with all logits at once by that with logits in chunks."""
    context = multiprocessing.get_context("spawn")
    # A process each, since a peak is that of its whole life.
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        once, chunks = pool.map(logits_memory.measure, [TOKENS_WITH_LOGITS] * 2, [False, True])
    return once / chunks


# --- Engine


def engine_seconds(model: PreTrainedModel, prefix: Sequence[int], asked: Sequence[tuple[int, ...]]) -> float:
    """Return the engine's seconds for a one-token answer to each query after a prefix that is there."""
    labels = [(token,) for token in range(2000, 2006)]
    blocks = extend_blocks(model, (), prefix)
    return best_of(3, lambda: search(model, blocks, asked, labels)) / NUM_QUERIES


def engine_against_copied_cache() -> float:
    """Divide transformers' time of one-token answers, from copies of a cache, by the engine's after one prefix."""
    model, prefix, asked = base().eval(), random_ids(PREFIX_TOKENS, 0), queries(NUM_QUERIES)
    ours = engine_seconds(model, prefix, asked)
    model.set_attn_implementation("sdpa")
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    copied = best_of(3, partial(copied_cache_pass, model, cache, asked[:BATCH_OF_COPIES])) / BATCH_OF_COPIES
    return copied / ours


def engine_against_recomputing() -> float:
    """Divide the time of reading prefix and query anew by that of a query after the prefix."""
    model, prefix, asked = base().eval(), random_ids(PREFIX_TOKENS, 0), queries(NUM_QUERIES)
    ours = engine_seconds(model, prefix, asked)
    return best_of(1, lambda: extend_blocks(model, (), (*prefix, *asked[0]))) / ours


CHECKS = (
    # First: a process is said to have needed, at least, what the one that started it held then.
    Check("logits", "memory of all logits at once / in chunks", 1.7, logits_at_once_against_chunks),
    Check("floor", "floor / training step, LoRA, 768 tokens in 3 segments", 0.6, step_against_floor),
    Check("packed", "16 episodes of 48 tokens one by one / packed", 1.7, packed_against_one_by_one),
    Check("answers", "step with the last answers supervised / with all", 0.85, all_answers_against_last),
    Check("isolation", "attention with a dense mask / split, 8 segments of 256", 4.0, isolated_against_dense_mask),
    Check("copies", "query from a copied cache / packed, after 1,024 tokens", 1.4, engine_against_copied_cache),
    Check("recomputing", "query with its prefix anew / packed, after 1,024 tokens", 30, engine_against_recomputing),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"Llama shape of 135M random weights, float32, {arguments.threads} thread(s), "
        f"{platform.processor() or platform.machine()}; "
        + ", ".join(f"{name} {version}" for name, version in library_versions().items())
    )
    started, missed = time.perf_counter(), []
    print("\n| Check | Ratio of | Measured | At least | |\n| --- | --- | ---: | ---: | --- |", flush=True)
    for check in CHECKS:
        if arguments.only and check.name not in arguments.only:
            continue
        ratio = check.measure()
        missed += [check.name] if ratio < check.least else []
        verdict = "MISSED" if ratio < check.least else "reached"
        print(f"| {check.name} | {check.sentence} | {ratio:.2f} | {check.least} | {verdict} |", flush=True)
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes. Missed: {', '.join(missed) or 'nothing'}.")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
