"""The levels that cost nothing: majority answer, chance, and TF-IDF with logistic regression."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from manyicl.evaluation.metrics import METRICS
from manyicl.evaluation.words import words
from manyicl.tasks.task import Example, Task


@dataclass(frozen=True, slots=True)
class Level:
    """A level beside a score: its value in the task's metric, None where undefined, and the reason."""

    score: float | None
    note: str = ""


def majority_answer(task: Task) -> str:
    """Return the most frequent answer of the training side; among equals, the one that comes first there."""
    return Counter(example.answer for example in task.train).most_common(1)[0][0]


def majority_level(task: Task, queries: Sequence[Example]) -> Level:
    """Score of always giving the most frequent training answer. Defined for free answers too."""
    if task.choices_column is not None:
        return Level(None, "each row has its own options")
    return _score(task, [majority_answer(task)] * len(queries), queries)


def chance_level(task: Task, queries: Sequence[Example]) -> Level:
    """Expected accuracy of guessing evenly among the labels, or among each row's options."""
    if task.metric != "accuracy":
        return Level(None, f"not defined for {task.metric}")
    if task.labels is not None:
        return Level(1 / len(task.labels))
    if task.choices_column is None:
        return Level(None, "answers are free")
    options = [len(dict.fromkeys(query.query.choices or ())) for query in queries]
    if 0 in options:
        return Level(None, "a row states no options")
    return Level(fmean(1 / count for count in options))


def tfidf_level(task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> Level:
    """Score of TF-IDF with logistic regression trained on exactly the demonstrations the model is shown.

    Both with scikit-learn's default settings, words of any script: what a person would try first. Where only
    one label was seen it is always answered; without demonstrations nothing is defined.
    """
    if task.labels is None:
        return Level(None, "needs a closed label set")
    if not demonstrations:
        return Level(None, "no demonstrations")
    seen = list(dict.fromkeys(example.answer for example in demonstrations))
    if len(seen) == 1:
        return _score(task, seen * len(queries), queries, "only one label seen, always answered")
    if not any(words(example.query.text) for example in demonstrations):
        most_common = Counter(example.answer for example in demonstrations).most_common(1)[0][0]
        return _score(task, [most_common] * len(queries), queries, "no words in the demonstrations")
    return _score(task, _tfidf_predictions(tuple(demonstrations), tuple(queries)), queries)


@lru_cache(maxsize=1024)
def _tfidf_predictions(demonstrations: tuple[Example, ...], queries: tuple[Example, ...]) -> tuple[str, ...]:
    """Fit and answer; kept, because every model of a comparison is shown the same demonstrations."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(TfidfVectorizer(analyzer=words), LogisticRegression(max_iter=1000))
    pipeline.fit([example.query.text for example in demonstrations], [example.answer for example in demonstrations])
    return tuple(str(label) for label in pipeline.predict([example.query.text for example in queries]))


def _score(task: Task, predictions: Sequence[str], queries: Sequence[Example], note: str = "") -> Level:
    references = [example.references for example in queries]
    return Level(METRICS[task.metric].score(predictions, references), note)
