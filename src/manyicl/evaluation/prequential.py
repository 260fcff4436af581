"""What trivial baselines answer to each demonstration given those before it, as the model does in its one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from manyicl.errors import UserError, pluralized
from manyicl.evaluation.baselines import most_frequent_answer, nearest_or_frequent_answers, tfidf_answers
from manyicl.tasks.retrieval import terms
from manyicl.tasks.task import Example, Task

# A baseline learns anew so often on its way through the demonstrations.
MOST_FITS = 16
# Labels x terms, summed over the fits of a logistic regression: some seconds of one core.
MOST_FITTED_WEIGHTS = 2_000_000

TFIDF = "TF-IDF with logistic regression"
NEAREST = "Repeating the answer of the most similar demonstration (BM25)"
MAJORITY = "Always giving the most frequent answer"

# From the demonstrations before and those to answer to their answers; None where a baseline is not defined.
Baseline = Callable[[Sequence[Example], Sequence[Example]], Sequence[str] | None]


class PrequentialBaselines(NamedTuple):
    """What baselines scored.

    Attributes:
        scores: By the name of each baseline that could be measured, 1 for each right answer, else 0, (Q,).
        notes: Sentences on those that were not measured, or that knew fewer demonstrations than the others did.
    """

    scores: dict[str, tuple[float, ...]]
    notes: list[str]


def prequential_baselines(task: Task, demonstrations: Sequence[Example], first: int) -> PrequentialBaselines:
    """Score each demonstration from ``first`` on, by baselines that know those before it: 1 if right, else 0.

    A baseline does not learn anew at every demonstration but at most ``MOST_FITS`` times, and fewer where a logistic
    regression has many weights; so it knows a few demonstrations fewer than the model does, never more.

    Args:
        task: Task of the demonstrations, (N,).
        demonstrations: Demonstrations in the order of the context.
        first: Position of the first one to score, at least 1.

    Returns:
        Their scores, (N - first,) each; none for a task without a closed label set, where answers are rarely repeated.

    Source: Dawid 1984, Statistical Theory: the Prequential Approach.
    """
    if task.labels is None or first >= len(demonstrations):
        return PrequentialBaselines({}, [])

    def tfidf(before: Sequence[Example], queries: Sequence[Example]) -> Sequence[str] | None:
        return tfidf_answers(task, before, queries)[0]

    num_fits = _num_affordable_fits(demonstrations)
    ways: dict[str, tuple[Baseline, int]] = {
        TFIDF: (tfidf, num_fits),
        NEAREST: (_nearest, MOST_FITS),
        MAJORITY: (_majority, MOST_FITS),
    }
    found = {name: _scores(way, demonstrations, first, fits) for name, (way, fits) in ways.items() if fits}
    scores = {name: each for name, each in found.items() if each is not None}
    notes = []
    if not num_fits:
        notes.append(f"{TFIDF} was not measured: with so many labels and different words a single fit takes long.")
    elif TFIDF in scores and (block := _block(demonstrations, first, num_fits)) > _block(
        demonstrations, first, MOST_FITS
    ):
        fewer = pluralized(block - 1, "demonstration")
        notes.append(
            f"{TFIDF} knew up to {fewer} fewer than the model: with so many labels and different words, fits take long."
        )
    if NEAREST not in scores:
        notes.append(f"{NEAREST} was not measured: it needs the extra manyicl[retrieval].")
    return PrequentialBaselines(scores, notes)


def _block(demonstrations: Sequence[Example], first: int, num_fits: int) -> int:
    """Return how many demonstrations are answered after one fit."""
    return ceil((len(demonstrations) - first) / num_fits)


def _scores(
    baseline: Baseline, demonstrations: Sequence[Example], first: int, num_fits: int
) -> tuple[float, ...] | None:
    """Answer the demonstrations block by block, each block from all before it; None where the baseline is undefined."""
    block = _block(demonstrations, first, num_fits)
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
