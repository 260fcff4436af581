"""One task of lm-evaluation-harness through its own model and through shared prefixes, side by side.

    python benchmarks/harness.py                                     # 4,096 tokens, 77 labels; about 20 minutes
    python benchmarks/harness.py --tokens 256 --labels 6 --queries 4 --slow-queries 2

A Llama shape of 135M parameters with random weights in bfloat16 and a byte-level BPE tokenizer, both made here and
saved to a temporary folder that both load. The task shows every query the same examples (``sampler: first_n``) and
chooses among labels of one to five tokens. Prints a Markdown table. Times are of all that lm-eval does between task
and metrics, tokenizing included, with the prefill spread over the queries; lm-eval's own model answers few queries,
and its time per query is that of those few.
"""

from __future__ import annotations

import argparse
import logging
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from manyicl.engine.label_trie import num_shared_tokens, tries_of
from manyicl.engine.packing import ActivationBudget
from manyicl.engine.prefix_cache import extend_blocks
from manyicl.engine.scoring import score_labels
from manyicl.evaluation.harness import HarnessModel
from manyicl.model.manifest import library_versions

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": 0,
}
QUERY_WORDS = 12
MOST_LABEL_WORDS = 5
TASK = "benchmark"
# Bounds on queries in flight under which the engine alone is measured; the first is its default here.
BEST_MEMORY_MIB = (64, 256)


@dataclass(frozen=True)
class Run:
    """What one way reached.

    Attributes:
        num_queries: Queries answered.
        seconds: Of all that lm-eval does, per query.
        network_seconds: Of the network alone, prefill included, per query.
        scores: Of each query, log-likelihood and greedy flag of every label.
        requests: What lm-eval handed over, as tokens.
    """

    num_queries: int
    seconds: float
    network_seconds: float
    scores: list[list[tuple[float, bool]]]
    requests: list[Any]


def make_words(count: int = 1500) -> list[str]:
    """Make words of one to three syllables."""
    rng = random.Random(0)
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvz" for vowel in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(syllables, k=rng.randint(1, 3)))] = None
    return list(words)


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every word behind a space is one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(["Text: Answer:", *words])] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> int:
    """Save a random model and its tokenizer; returns how many weights it has."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(weights.numel() for weights in model.parameters())


def make_labels(words: Sequence[str], count: int) -> list[str]:
    """Draw labels of one to five words; about half share their first word with another."""
    rng = random.Random(1)
    firsts = rng.sample(words, max(2, 3 * count // 4))
    labels: dict[str, None] = {}
    while len(labels) < count:
        labels[" ".join([rng.choice(firsts), *rng.choices(words, k=rng.randint(0, MOST_LABEL_WORDS - 1))])] = None
    return list(labels)


def make_task(
    words: Sequence[str], labels: Sequence[str], tokenizer: PreTrainedTokenizerFast, num_tokens: int, num_queries: int
) -> tuple[dict[str, Any], int]:
    """Make a task whose examples fill so many tokens; returns how many examples these are."""
    rng = random.Random(2)

    def row() -> dict[str, str]:
        return {"text": " ".join(rng.choices(words, k=QUERY_WORDS)), "answer": rng.choice(labels)}

    shown: list[dict[str, str]] = []
    filled = 0
    while filled < num_tokens:
        shown.append(row())
        filled += len(tokenizer.encode(f"Text: {shown[-1]['text']}\nAnswer: {shown[-1]['answer']}\n\n"))
    rows = {"train": Dataset.from_list(shown), "test": Dataset.from_list([row() for _ in range(num_queries)])}
    task = {
        "task": TASK,
        "output_type": "multiple_choice",
        "custom_dataset": lambda **_: rows,
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": len(shown),
        "doc_to_text": "Text: {{text}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": list(labels),
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return task, len(shown)


def measure(model: Any, task: dict[str, Any], num_queries: int) -> Run:
    """Let lm-eval run the task through a model."""
    network_seconds = 0.0
    requests: list[Any] = []
    score = model._loglikelihood_tokens

    def timed_score(*arguments: Any, **keywords: Any) -> Any:
        nonlocal network_seconds
        started = time.perf_counter()
        answers = score(*arguments, **keywords)
        network_seconds += time.perf_counter() - started
        requests.extend(arguments[0])
        return answers

    # A short request first, so that neither pays for warming up.
    model.loglikelihood([Instance("loglikelihood", {}, ("Text:", " Answer:"), 0)] * 2, disable_tqdm=True)
    model._loglikelihood_tokens = timed_score
    loaded = TaskManager(include_defaults=False).load([dict(task)])
    started = time.perf_counter()
    results: Any = lm_eval.evaluate(model, loaded, limit=num_queries, bootstrap_iters=0)
    seconds = time.perf_counter() - started
    scores = [[answer[0] for answer in sample["resps"]] for sample in results["samples"][TASK]]
    return Run(num_queries, seconds / num_queries, network_seconds / num_queries, scores, requests)


def measure_best(
    model: HarnessModel, requests: Sequence[tuple[Any, list[int], list[int]]]
) -> tuple[float, dict[int, float]]:
    """Find the best label of the same queries with the engine alone.

    Args:
        model: Whose network is asked.
        requests: Every context with every label, as tokens, as lm-eval handed them over.

    Returns:
        Seconds of the prefill, and seconds per query behind it under each bound on memory.
    """
    labels: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for _, context, label in requests:
        labels.setdefault(tuple(context), []).append(tuple(label))
    contexts = list(labels)
    num_shared = min(num_shared_tokens(contexts[0], other) for other in contexts[1:])
    started = time.perf_counter()
    blocks = extend_blocks(model.model, (), contexts[0][:num_shared])
    prefill = time.perf_counter() - started
    seconds = {}
    for mib in BEST_MEMORY_MIB:
        memory = ActivationBudget.after(model.model, blocks, mib)
        started = time.perf_counter()
        tries = [tries_of(labels[context], memory.slots_per_query()) for context in contexts]
        score_labels(model.model, blocks, [context[num_shared:] for context in contexts], tries, memory, "best")
        seconds[mib] = (time.perf_counter() - started) / len(contexts)
    return prefill, seconds


def best_and_margin(scores: Sequence[tuple[float, bool]]) -> tuple[int, float]:
    """Return the best label of a query, the first of equals, and how far it is above the next."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i][0])
    return order[0], scores[order[0]][0] - scores[order[1]][0]


def compare(ours: Run, theirs: Run) -> str:
    """Say how far the answers to the queries that both answered agree."""
    both = list(zip(ours.scores, theirs.scores, strict=False))
    bests = [(best_and_margin(one), best_and_margin(other)) for one, other in both]
    num_equal = sum(one[0] == other[0] for one, other in bests)
    pairs = [(a, b) for one, other in both for a, b in zip(one, other, strict=True)]
    difference = max(abs(a[0] - b[0]) for a, b in pairs)
    text = (
        f"{num_equal} of {len(both)} predictions on common queries are equal; log-likelihoods of {len(pairs)} options "
        f"differ by {difference:.3f} nats at most, greedy flags in {sum(a[1] != b[1] for a, b in pairs)}."
    )
    margins = [other[1] for one, other in bests if one[0] != other[0]]
    if margins:
        text += f" Where predictions differ, the best label leads by {max(margins):.3f} nats at most."
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="Tokens of examples before every query.")
    parser.add_argument("--labels", type=int, default=77)
    parser.add_argument("--queries", type=int, default=32, help="Answered behind shared prefixes.")
    parser.add_argument("--slow-queries", type=int, default=1, help="Of these, answered by lm-eval's own model.")
    parser.add_argument(
        "--softmax-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="Of lm-eval's own model; in its default, bfloat16, log-likelihoods are rounded to 1/16 nat and more.",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if not 1 <= arguments.slow_queries <= arguments.queries or arguments.labels < 2:
        parser.error("expected 1 <= --slow-queries <= --queries, and at least 2 --labels")

    torch.set_num_threads(arguments.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    words = make_words()
    tokenizer = make_tokenizer(words)
    labels = make_labels(words, arguments.labels)
    task, num_shots = make_task(words, labels, tokenizer, arguments.tokens, arguments.queries)
    with TemporaryDirectory() as folder:
        num_weights = save_model(Path(folder), tokenizer)
        model = HarnessModel.from_pretrained(folder, dtype="bfloat16", device="cpu")
        ours = measure(model, task, arguments.queries)
        prefill, best = measure_best(model, ours.requests)
        del model
        theirs = measure(
            HFLM(
                folder,
                trust_remote_code=False,
                device="cpu",
                dtype="bfloat16",
                softmax_dtype=arguments.softmax_dtype,
                batch_size=1,
            ),
            task,
            arguments.slow_queries,
        )

    versions = {**library_versions(), "lm_eval": version("lm_eval")}
    label_tokens = [len(tokenizer.encode(f" {label}")) for label in labels]
    print(
        f"{num_shots} examples of {arguments.tokens:,} tokens, {len(labels)} labels of {min(label_tokens)} to "
        f"{max(label_tokens)} tokens, llama with {num_weights / 1e6:.0f}M random weights, bfloat16, "
        f"{arguments.threads} thread(s), {platform.processor() or platform.machine()}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
    )
    print()
    print("| Way | Queries | Seconds per query | of these in the network | times ours |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, run in (("shared prefixes (manyicl)", ours), (f"lm-eval's HFLM, {arguments.softmax_dtype}", theirs)):
        print(
            f"| {name} | {run.num_queries} | {run.seconds:.3f} | {run.network_seconds:.3f} | "
            f"{run.seconds / ours.seconds:,.1f} |"
        )
    for mib, seconds in best.items():
        print(
            f"| the best label alone behind the prefix, {mib} MiB in flight (manyicl) | {ours.num_queries} "
            f"| {seconds:.3f} | {seconds:.3f} | {seconds / ours.seconds:,.2f} |"
        )
    print()
    faster = ", ".join(f"{theirs.network_seconds / seconds:,.0f} ({mib} MiB)" for mib, seconds in best.items())
    print(
        f"Prefilling takes {prefill:.1f} s, once. Behind it the best label of a query is found so many times faster "
        f"than lm-eval's own model scores the labels, in the network alone: {faster}."
    )
    print(
        f"{compare(ours, theirs)} lm-eval's own model was measured on {theirs.num_queries} of {ours.num_queries} "
        f"queries; all of them would take it {theirs.seconds * ours.num_queries / 60:,.1f} minutes at that rate."
    )


if __name__ == "__main__":
    main()
