"""What the words alone say: TF-IDF with logistic regression, fitted on demonstrations."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from manyicl.errors import UserError
from manyicl.tasks.retrieval import terms
from manyicl.tasks.task import Example

# Labels x terms that a logistic regression is fitted for: its solver keeps some twenty copies of them, 1.6 GB here.
MOST_WEIGHTS = 10_000_000


@dataclass(frozen=True)
class WordClassifier:
    """A linear classifier of texts by their words, with scikit-learn's default settings: what one would try first.

    Terms are words of any script; where a script has no spaces, as in Chinese and Thai, they are its characters and
    each two neighbours.

    Attributes:
        labels: Labels that have examples, in the order in which they first occur.
        counts: Number of examples of each.
        note: Why it does not look at the words of a text; empty where it does.
    """

    labels: tuple[str, ...]
    counts: tuple[int, ...]
    note: str = ""
    _pipeline: Any = None

    @classmethod
    def fit(cls, examples: Sequence[Example]) -> Self:
        """Learn from examples, at least one. Where they hold one label or no word, only labels are counted.

        Raises:
            UserError: If labels and terms are too many to fit.
        """
        counts = Counter(example.answer for example in examples)
        known = tuple(counts), tuple(counts.values())
        if len(counts) == 1:
            return cls(*known, "only one label seen, always answered")
        texts = [example.query.text for example in examples]
        num_terms = len({term for text in texts for term in terms(text)})
        if len(counts) * num_terms > MOST_WEIGHTS:
            raise UserError("too_many_weights", f"{len(counts):,} labels x {num_terms:,} terms are too many to fit")
        if not num_terms:
            return cls(*known, "no words in the demonstrations")
        return cls(*known, _pipeline=_fitted(texts, [example.answer for example in examples]))

    def answers(self, texts: Sequence[str]) -> list[str]:
        """Return the most probable label of each text; without words the most frequent one, the first of equals."""
        if self._pipeline is None:
            return [self.labels[int(np.argmax(self.counts))]] * len(texts)
        return [str(label) for label in self._pipeline.predict(list(texts))]

    def log_probabilities(self, texts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """Return the log-probability of each label for each text, (Q, L); each row's probabilities sum to 1.

        A label without an example counts as if it had one of many: of N examples and M such labels, each of these has
        the probability 1 / (N + M), whatever the text.

        Args:
            texts: Texts of queries, (Q,).
            labels: The whole label set, (L,), all labels with examples among it.
        """
        column = {label: number for number, label in enumerate(labels)}
        num_examples, num_absent = sum(self.counts), len(labels) - len(self.labels)
        found = np.full((len(texts), len(labels)), 1 / (num_examples + num_absent))
        own, shares = self._shares(texts)
        found[:, [column[label] for label in own]] = shares * num_examples / (num_examples + num_absent)
        log_probabilities: NDArray[np.float64] = np.log(np.maximum(found, np.finfo(float).tiny))
        return log_probabilities

    def _shares(self, texts: Sequence[str]) -> tuple[Sequence[str], NDArray[np.float64]]:
        """Return labels and the probability of each of these for each text."""
        if self._pipeline is None or not texts:
            shares = np.array(self.counts) / sum(self.counts)
            return self.labels, np.tile(shares, (len(texts), 1))
        return tuple(map(str, self._pipeline.classes_)), self._pipeline.predict_proba(list(texts))


def _fitted(texts: Sequence[str], answers: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(TfidfVectorizer(analyzer=terms), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        # Of labels with one or two demonstrations each, it asks whether they are numbers.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        return pipeline.fit(texts, answers)
