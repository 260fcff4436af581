"""Examples retrieved for each query, after a shared prefix: what they add, what they cost, what BM25 alone reaches.

    python benchmarks/retrieval.py --tasks recipes/real/unseen --data-root DATA --model runs/one-model

Prints Markdown tables. Every column answers the same queries: after the shared demonstrations alone; with k examples
of each query's own between them and the query, most similar by BM25 or drawn at random; by repeating the answer of the
most similar training row; by always giving the most frequent answer. The prefix is encoded once per seed and used by
all. Examples of a query's own may fill half of the context; of k long ones only the most similar that fit are
shown, and the second table says how many.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from manyicl.engine.engine import Engine
from manyicl.engine.queries import Retrieve
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.evaluation.baselines import majority_answer, nearest_answers
from manyicl.evaluation.metrics import METRICS
from manyicl.evaluation.shot_curve import EvaluationSettings, choose_queries
from manyicl.evaluation.uncertainty import (
    Estimate,
    mean_of_independent,
    mean_over_seeds_and_queries,
    paired_difference,
)
from manyicl.model.load import load_model
from manyicl.model.manifest import library_versions
from manyicl.tasks.files import load_tasks
from manyicl.tasks.retrieval import Retriever
from manyicl.tasks.task import Example, Query, Task

SHARED, BM25, MAJORITY = "shared only", "BM25 nearest", "majority"
SHARE_FOR_OWN_EXAMPLES = 0.5

Scores = tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """What one task gave.

    Attributes:
        task: Scored by accuracy where its answers are a closed set.
        scores: Column -> scores of the queries, one row per seed, (S, Q).
        milliseconds: Column -> per query, mean over seeds; without the prefill of the prefix.
        num_shared: Shared demonstrations shown, mean over seeds.
        num_own: Column -> examples of a query's own, mean over queries and seeds.
    """

    task: Task
    scores: dict[str, list[Scores]]
    milliseconds: dict[str, float]
    num_shared: float
    num_own: dict[str, float]


def retrieved_column(k: int) -> str:
    return f"+ {k} retrieved"


def random_column(k: int) -> str:
    return f"+ {k} random"


def own_examples(engine: Engine, retriever: Retriever, k: int, seed: int) -> dict[str, Retrieve]:
    """Give each query the examples retrieved for it, and as many drawn from the same rows; both as far as they fit."""
    budget = int(SHARE_FOR_OWN_EXAMPLES * engine.max_context_tokens)

    def that_fit(examples: Sequence[Example]) -> tuple[Example, ...]:
        fitting: list[Example] = []
        room = budget
        for example in reversed(examples):
            room -= engine.encoder.num_shot_tokens(example)
            if room < 0:
                break
            fitting.append(example)
        return tuple(reversed(fitting))

    def retrieved_that_fit(query: Query) -> tuple[Example, ...]:
        return that_fit(retriever(query))

    def random_that_fit(query: Query) -> tuple[Example, ...]:
        rng = random.Random(f"{seed} {k} {query.text}")
        return that_fit(rng.sample(retriever.candidates, len(retrieved_that_fit(query))))

    return {retrieved_column(k): retrieved_that_fit, random_column(k): random_that_fit}


def measure(engine: Engine, task: Task, num_shared: int, retrieved_counts: Sequence[int], num_seeds: int) -> Measured:
    """Answer all queries of a task in every way."""
    queries = [example.query for example in task.test]
    scores: defaultdict[str, list[Scores]] = defaultdict(list)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    num_own: defaultdict[str, list[int]] = defaultdict(list)
    shared_shown: list[int] = []
    for seed in range(num_seeds):
        shared = task.demonstrations(min(num_shared, len(task.train) - 1), seed)
        ways: dict[str, Retrieve] = {}
        for k in retrieved_counts:
            ways.update(own_examples(engine, Retriever(task.train, k, exclude=shared), k, seed))
        prefix = prefix_with_room(engine, task, shared, ways)
        shared_shown.append(prefix.num_shots)
        list(engine.predict(prefix, queries[:1]))  # not timed: what is set up once
        for column, own in [(SHARED, None), *ways.items()]:
            started = time.perf_counter()
            answers = [prediction.answer for prediction in engine.predict(prefix, queries, retrieve=own)]
            seconds[column].append((time.perf_counter() - started) / len(queries))
            scores[column].append(scored(task, answers))
            num_own[column] += [len(own(query)) for query in queries] if own else [0]
    majority = majority_answer(task)
    found = [majority if answer is None else answer for answer in nearest_answers(task.train, task.test)]
    scores[BM25] = [scored(task, found)] * num_seeds
    scores[MAJORITY] = [scored(task, [majority] * len(queries))] * num_seeds
    return Measured(
        task,
        dict(scores),
        {column: 1000 * mean(values) for column, values in seconds.items()},
        mean(shared_shown),
        {column: mean(values) for column, values in num_own.items()},
    )


def prefix_with_room(engine: Engine, task: Task, shared: Sequence[Example], ways: dict[str, Retrieve]) -> TaskPrefix:
    """Encode the shared demonstrations that leave room for the longest own examples of any way."""

    def longest(query: Query) -> tuple[Example, ...]:
        sets = [tuple(own(query)) for own in ways.values()]
        return max(sets, key=lambda examples: sum(map(engine.encoder.num_shot_tokens, examples)), default=())

    return engine.prefill(task, shared, [example.query for example in task.test], retrieve=longest)


def scored(task: Task, answers: Sequence[str]) -> Scores:
    return METRICS[task.metric].of_each(answers, [example.references for example in task.test])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def shown(estimate: Estimate, sign: str = "") -> str:
    return f"{100 * estimate.mean:{sign}.1f} ± {100 * (estimate.standard_error or math.nan):.1f}"


def print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def print_header(*cells: str) -> None:
    print_row(*cells)
    print_row(*["---"] * len(cells))


def print_scores(measured: Sequence[Measured], columns: Sequence[str]) -> None:
    """Print percent with standard error per task, and the mean over tasks."""
    print_header("Task", *columns)
    of_columns: defaultdict[str, list[Estimate]] = defaultdict(list)
    for one in measured:
        estimates = {column: mean_over_seeds_and_queries(one.scores[column]) for column in columns}
        for column, estimate in estimates.items():
            of_columns[column].append(estimate)
        print_row(one.task.name, *(shown(estimate) for estimate in estimates.values()))
    print_row("**mean**", *(shown(mean_of_independent(of_columns[column])) for column in columns))


def print_costs(measured: Sequence[Measured], columns: Sequence[str]) -> None:
    """Print shots, and milliseconds per query, per task and in the mean."""
    print_header("Task", "Training rows", "Shared shown", *(f"{column}: own, ms" for column in columns))
    for one in measured:
        costs = (f"{one.num_own[column]:.1f}, {one.milliseconds[column]:.1f}" for column in columns)
        print_row(one.task.name, f"{len(one.task.train):,}", f"{one.num_shared:.1f}", *costs)
    means = [
        f"{mean([one.num_own[column] for one in measured]):.1f}, "
        f"{mean([one.milliseconds[column] for one in measured]):.1f}"
        for column in columns
    ]
    print_row("**mean**", "", f"{mean([one.num_shared for one in measured]):.1f}", *means)


def print_differences(measured: Sequence[Measured], retrieved_counts: Sequence[int]) -> None:
    """Print what retrieved examples add, paired by query, in the mean over tasks."""
    print_header("k", *(f"k retrieved minus {other}" for other in ("shared only", "k random", BM25, MAJORITY)))
    for k in retrieved_counts:
        others = (SHARED, random_column(k), BM25, MAJORITY)
        differences = [
            mean_of_independent(
                [paired_difference(one.scores[other], one.scores[retrieved_column(k)]) for one in measured]
            )
            for other in others
        ]
        print_row(k, *(shown(difference, "+") for difference in differences))


def counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(part) for part in text.split(",")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True, help="Patterns of task folders.")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--model", required=True, help="Folder or hf:owner/name.")
    parser.add_argument("--context", type=int, help="Longest prefix and query; the trained context if left out.")
    parser.add_argument("--shared", type=int, default=32, help="Shared demonstrations, as far as they fit.")
    parser.add_argument("--retrieve", type=counts, default=(2, 4, 8), help="Retrieved examples, such as 0,2,4,8.")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2, help="Draws of the shared and of the random examples.")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model)
    trained_context = loaded.manifest.max_context_tokens if loaded.manifest else None
    engine = Engine.local(loaded, max_context_tokens=arguments.context or trained_context)
    retrieved_counts = [k for k in arguments.retrieve if k > 0]  # none is "shared only"
    settings = EvaluationSettings(num_queries=arguments.queries)
    measured = []
    for task in load_tasks(arguments.tasks, arguments.data_root):
        scored_task = task.with_spec(metric="accuracy") if task.labels or task.choices_column else task
        asked, _ = choose_queries(engine, scored_task, settings)
        measured.append(measure(engine, asked, arguments.shared, retrieved_counts, arguments.seeds))

    asked_ways = [column for k in retrieved_counts for column in (retrieved_column(k), random_column(k))]
    num_weights = sum(weights.numel() for weights in loaded.model.parameters())
    print(
        f"{len(measured)} tasks, up to {arguments.queries} queries, {arguments.seeds} seed(s), up to "
        f"{arguments.shared} shared demonstrations; model with {num_weights / 1e6:.1f}M weights, context of "
        f"{engine.max_context_tokens:,} tokens, {arguments.threads} thread(s), "
        f"{platform.processor() or platform.machine()}, "
        + ", ".join(f"{name} {version}" for name, version in library_versions().items())
    )
    print("\nPercent with standard error, in accuracy or the task's metric; means count every task the same:\n")
    print_scores(measured, [SHARED, *asked_ways, BM25, MAJORITY])
    print("\nPaired by seed and query, points in the mean over tasks:\n")
    print_differences(measured, retrieved_counts)
    print("\nOwn examples per query, and milliseconds per query with the prefix encoded:\n")
    print_costs(measured, [SHARED, *asked_ways])


if __name__ == "__main__":
    main()
