"""What trivial baselines answer to each demonstration given those before it, as the model does in its one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil

from manyicl.errors import UserError
from manyicl.evaluation.baselines import most_frequent_answer, nearest_or_frequent_answers, tfidf_answers
from manyicl.tasks.retrieval import terms
from manyicl.tasks.task import Example, Task

# A baseline learns anew so often on its way through the demonstrations.
MOST_FITS = 16
# Labels x terms, summed over the fits of a logistic regression: some seconds of one core.
MOST_FITTED_WEIGHTS = 2_000_000

# From the demonstrations before and those to answer to their answers; None where a baseline is not defined.
Baseline = Callable[[Sequence[Example], Sequence[Example]], Sequence[str] | None]


def prequential_baselines(task: Task, demonstrations: Sequence[Example], first: int) -> dict[str, tuple[float, ...]]:
    """Score each demonstration from ``first`` on, by baselines that know those before it: 1 if right, else 0.

    A baseline does not learn anew at every demonstration but at most ``MOST_FITS`` times, and fewer where a logistic
    regression has many weights; so it knows a few demonstrations less than the model does, never more.

    Args:
        task: Task of the demonstrations, (N,).
        demonstrations: Demonstrations in the order of the context.
        first: Position of the first one to score, at least 1.

    Returns:
        The scores by the name of each baseline that could be measured, (N - first,); none for a task without a
        closed label set, where answers are rarely repeated.

    Source: Dawid 1984, Statistical Theory: the Prequential Approach.
    """
    if task.labels is None:
        return {}

    def tfidf(before: Sequence[Example], queries: Sequence[Example]) -> Sequence[str] | None:
        return tfidf_answers(task, before, queries)[0]

    ways: dict[str, tuple[Baseline, int]] = {
        "TF-IDF with logistic regression": (tfidf, _num_affordable_fits(demonstrations)),
        "Repeating the answer of the most similar demonstration (BM25)": (_nearest, MOST_FITS),
        "Always giving the most frequent answer": (_majority, MOST_FITS),
    }
    found = {name: _scores(way, demonstrations, first, num_fits) for name, (way, num_fits) in ways.items()}
    return {name: scores for name, scores in found.items() if scores is not None}


def _scores(
    baseline: Baseline, demonstrations: Sequence[Example], first: int, num_fits: int
) -> tuple[float, ...] | None:
    """Answer the demonstrations block by block, each block from all before it; None where the baseline is undefined."""
    if not num_fits or first >= len(demonstrations):
        return None
    block = ceil((len(demonstrations) - first) / num_fits)
    scores: list[float] = []
    for start, end in pairwise((*range(first, len(demonstrations), block), len(demonstrations))):
        queries = demonstrations[start:end]
        if (answers := baseline(demonstrations[:start], queries)) is None:
            return None
        scores += [float(answer == example.answer) for answer, example in zip(answers, queries, strict=True)]
    return tuple(scores)


def _num_affordable_fits(demonstrations: Sequence[Example]) -> int:
    """Count how often a logistic regression of these demonstrations may be fitted."""
    num_labels = len({example.answer for example in demonstrations})
    num_terms = len({term for example in demonstrations for term in terms(example.query.text)})
    return min(MOST_FITS, MOST_FITTED_WEIGHTS // max(1, num_labels * num_terms))


def _majority(before: Sequence[Example], queries: Sequence[Example]) -> Sequence[str]:
    return [most_frequent_answer(before)] * len(queries)


def _nearest(before: Sequence[Example], queries: Sequence[Example]) -> Sequence[str] | None:
    try:
        return nearest_or_frequent_answers(before, queries)
    except UserError as error:
        if error.code != "missing_requirement":
            raise
        return None
