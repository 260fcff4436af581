"""Seconds and memory of each step with thousands of labels: load, check, prefill, predict, metrics.

    python benchmarks/many_labels.py --labels 10000

Makes a task of random words, three rows a label, and runs it through a tiny random model, one step after the other, in
one process on one thread. Prints a Markdown table: what a step took on the processor, and the most memory until then.
The model's weights say nothing, so nothing is told about quality.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from manyicl.engine.engine import Engine
from manyicl.episodes.checks import check_task
from manyicl.evaluation.baselines import majority_level, nearest_answers, tfidf_level
from manyicl.evaluation.metrics import METRICS
from manyicl.evaluation.shot_curve import EvaluationSettings, choose_queries
from manyicl.model.attention import ATTENTION
from manyicl.model.load import LoadedModel, fingerprint
from manyicl.model.manifest import library_versions
from manyicl.tasks.files import load_task
from manyicl.tasks.task import Task

SYLLABLES = [consonant + vowel for consonant in "bcdfghklmnprst" for vowel in "aeiou"]
MAX_CONTEXT_TOKENS = 512

ResultT = TypeVar("ResultT")


def timed(step: str, run: Callable[[], ResultT]) -> ResultT:
    """Run one step and print its row of the table."""
    started = time.process_time()
    result = run()
    seconds = time.process_time() - started
    most_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {step} | {seconds:,.2f} | {most_mib:,.0f} |", flush=True)
    return result


def write_task(folder: Path, num_labels: int, rng: random.Random) -> None:
    """Write a task with two training rows and one test row for each label of one to three random words."""

    def word() -> str:
        return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4)))

    labels: dict[str, None] = {}
    while len(labels) < num_labels:
        labels[" ".join(word() for _ in range(rng.randint(1, 3)))] = None
    named = list(labels)
    for side, times in (("train", 2), ("test", 1)):
        rows = ({"text": f"{word()} {word()} {i}", "label": named[i % num_labels]} for i in range(times * num_labels))
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = {
        "family": "classification",
        "query": "{{ text }}",
        "answer": "{{ label }}",
        "labels": named,
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
    }
    (folder / "task.yaml").write_text(json.dumps(spec), encoding="utf-8")


def tiny_model(task: Task) -> LoadedModel:
    """Make a random model of a few thousand weights with a byte-level tokenizer trained on the labels."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(task.labels or (), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    return LoadedModel(model, tokenizer, None, fingerprint(model), "random")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=10_000, help="How many; default %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Of the words; default %(default)s.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    print(f"{arguments.labels:,} labels, {platform.machine()}, one thread; {versions}\n")
    print("| Step | seconds of processor | MiB at most |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, arguments.labels, random.Random(arguments.seed))
        task = timed("load the task", lambda: load_task(folder))
    engine = Engine.local(tiny_model(task), max_context_tokens=MAX_CONTEXT_TOKENS)
    queries = [example.query for example in task.test[:200]]
    timed("check it", lambda: check_task(task, engine.encoder, MAX_CONTEXT_TOKENS))
    timed("choose 200 queries", lambda: choose_queries(engine, task, EvaluationSettings(num_queries=200)))
    prefix = timed("prefill 4 demonstrations", lambda: engine.prefill(task, task.demonstrations(4), queries))
    timed("the best label of 8 queries", lambda: list(engine.predict(prefix, queries[:8])))
    timed("all scores of 4 queries", lambda: list(engine.predict(prefix, queries[:4], scores="all")))
    answers, references = zip(*((one.answer, one.references) for one in task.test), strict=True)
    for metric in ("accuracy", "macro_f1"):
        timed(f"{metric} of all test rows", partial(METRICS[metric].score, answers, references))
    timed("majority level", lambda: majority_level(task, task.test))
    timed("TF-IDF level, 256 demonstrations", lambda: tfidf_level(task, task.train[:256], task.test[:200]))
    timed("nearest answers, 200 queries", lambda: nearest_answers(task.train, task.test[:200]))


if __name__ == "__main__":
    main()
