"""Trivial baselines: majority answer, chance, TF-IDF with logistic regression, nearest neighbour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean
from typing import NamedTuple

from manyicl.engine.linear import WordClassifier
from manyicl.errors import UserError
from manyicl.evaluation.metrics import METRICS
from manyicl.tasks.retrieval import Retriever
from manyicl.tasks.task import Example, Task


class Level(NamedTuple):
    """Score of a trivial baseline in the task's metric, None where undefined, and the reason."""

    score: float | None
    note: str = ""


def majority_answer(task: Task) -> str:
    """Return the most frequent answer of the training side; among equals, the one that comes first there."""
    return most_frequent_answer(task.train)


def most_frequent_answer(examples: Sequence[Example]) -> str:
    """Return the most frequent answer; among equals, the one that comes first."""
    return Counter(example.answer for example in examples).most_common(1)[0][0]


def majority_level(task: Task, queries: Sequence[Example]) -> Level:
    """Score of always giving the most frequent training answer. Defined for free answers too."""
    if task.choices_column is not None:
        return Level(None, "each row has its own options")
    return _score(task, [majority_answer(task)] * len(queries), queries)


def chance_level(task: Task, queries: Sequence[Example]) -> Level:
    """Expected accuracy of guessing evenly among the labels, or among each row's options; a row may accept several."""
    if task.metric != "accuracy":
        return Level(None, f"not defined for {task.metric}")
    if not task.is_closed:
        return Level(None, "answers are free")
    labels = frozenset(task.labels or ())
    options = [frozenset(query.query.choices) if query.query.choices else labels for query in queries]
    if not all(options):
        return Level(None, "a row states no options")
    if not options:
        return Level(None, "no queries")
    return Level(
        fmean(len(own.intersection(query.references)) / len(own) for own, query in zip(options, queries, strict=True))
    )


def tfidf_level(task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> Level:
    """Score of `tfidf_answers`."""
    answers, note = tfidf_answers(task, demonstrations, queries)
    return Level(None, note) if answers is None else _score(task, answers, queries, note)


def tfidf_answers(
    task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]
) -> tuple[Sequence[str] | None, str]:
    """Answer by TF-IDF with logistic regression trained on exactly the demonstrations in the context.

    If only one label was seen, it is always the answer; without demonstrations the baseline is undefined.

    Returns:
        The answers, None where undefined, and what is special about them or missing.
    """
    if task.labels is None:
        return None, "needs a closed label set"
    if not demonstrations:
        return None, "no demonstrations"
    return _word_answers(tuple(demonstrations), tuple(queries))


@lru_cache(maxsize=1024)
def _word_answers(
    demonstrations: tuple[Example, ...], queries: tuple[Example, ...]
) -> tuple[tuple[str, ...] | None, str]:
    """Fit and answer; cached, because all models of a comparison have the same demonstrations."""
    try:
        classifier = WordClassifier.fit(demonstrations)
    except UserError as error:
        return None, error.what
    return tuple(classifier.answers([example.query.text for example in queries])), classifier.note


def nearest_level(task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> Level:
    """Score of repeating the answer of the demonstration most like the query. Defined for free answers too."""
    if task.choices_column is not None:
        return Level(None, "each row has its own options")
    if not demonstrations:
        return Level(None, "no demonstrations")
    answers, note = _repeated_answers(tuple(demonstrations), tuple(queries))
    return Level(None, note) if answers is None else _score(task, answers, queries)


@lru_cache(maxsize=1024)
def _repeated_answers(
    demonstrations: tuple[Example, ...], queries: tuple[Example, ...]
) -> tuple[tuple[str, ...] | None, str]:
    """Find the nearest of each; cached as `_word_answers` is."""
    try:
        return tuple(nearest_or_frequent_answers(demonstrations, queries)), ""
    except UserError as error:
        if error.code != "missing_requirement":
            raise
        return None, f"{error.what}: {error.remedy}"


def nearest_or_frequent_answers(demonstrations: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """Return the answer of the example nearest to each query; the most frequent where none shares a word with it.

    Raises:
        UserError: If bm25s is not installed.
    """
    frequent = most_frequent_answer(demonstrations)
    return [frequent if answer is None else answer for answer in nearest_answers(demonstrations, test)]


def nearest_answers(demonstrations: Sequence[Example], test: Sequence[Example]) -> list[str | None]:
    """Return the answer of the example nearest to each query by BM25; None where none shares a word with it.

    Raises:
        UserError: If bm25s is not installed.
    """
    most_similar = Retriever(demonstrations, 1)
    found = [most_similar(example.query) for example in test]
    return [examples[-1].answer if examples else None for examples in found]


def _score(task: Task, predictions: Sequence[str], queries: Sequence[Example], note: str = "") -> Level:
    references = [example.references for example in queries]
    return Level(METRICS[task.metric].score(predictions, references), note)
