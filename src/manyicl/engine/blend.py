"""The blend: a model's label scores combined with those of a linear classifier on the same demonstrations.

::

    score of a label = model weight x log p(label) of the model among the labels
                     + word weight  x log p(label) of the words
    probability      = softmax of these scores over the labels

The two weights are fitted on demonstrations, by the log-loss of scores that neither part had seen the answer for: the
model's given only the demonstrations before (prequential, Dawid 1984), the classifier's from the other folds of a
cross-validation. So the model is judged after fewer demonstrations than it has in the end, and the classifier after
nine tenths of them; the weights err on the side of the words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import log_softmax

from manyicl.engine.label_scores import LabelScores
from manyicl.engine.linear import WordClassifier
from manyicl.tasks.task import Example

# Weights are fitted on the last half of the demonstrations, at most so many; each costs a query.
MOST_FITTED = 64
# With fewer demonstrations, or fewer of their last half whose text comes once, the weights are fixed.
FEWEST_DEMONSTRATIONS, FEWEST_FITTED = 16, 8
NUM_FOLDS = 10

Scores = NDArray[np.float64]


class BlendWeights(BaseModel):
    """Weights of the two parts of a blend."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: float = Field(ge=0, description="Weight of the model's log-probabilities among the labels.")
    words: float = Field(ge=0, description="Weight of the linear classifier's log-probabilities.")
    num_fitted: int = Field(ge=0, description="Demonstrations that they were fitted on; 0 where they are fixed.")


# Where nothing is fitted; a linear classifier of few examples is less sure of itself than it could be, a model more.
FIXED_WEIGHTS = BlendWeights(model=0.5, words=1.0, num_fitted=0)
# A weight that is e times the fixed one, or the e-th part of it, costs half of so many nats of log-loss, summed over
# demonstrations.
PULL = 2.0
MOST_LOG_FACTOR = 10.0


@dataclass(frozen=True)
class Blend:
    """Label scores of a task's model and words, combined.

    Attributes:
        labels: Label set of the task.
        weights: Weights of the two parts.
        classifier: Fitted on all demonstrations.
    """

    labels: tuple[str, ...]
    weights: BlendWeights
    classifier: WordClassifier

    @classmethod
    def of(cls, labels: Sequence[str], demonstrations: Sequence[Example], weights: BlendWeights) -> Self:
        """Fit the classifier on demonstrations, at least one."""
        return cls(tuple(labels), weights, WordClassifier.fit(demonstrations))

    def scores(self, texts: Sequence[str], model: Sequence[LabelScores]) -> list[LabelScores]:
        """Combine the model's scores of queries with those of their words; the probabilities of each sum to 1.

        Args:
            texts: Texts of the queries, (Q,).
            model: The model's scores of every label, (Q,).
        """
        of_model = model_log_probabilities([one.log_probabilities for one in model], self.labels)
        rows = blended(self.weights, of_model, self.classifier.log_probabilities(texts, self.labels))
        return [
            LabelScores(dict(zip(self.labels, row, strict=True)), one.num_tokens)
            for one, row in zip(model, rows.tolist(), strict=True)
        ]


def blended(weights: BlendWeights, model: Scores, words: Scores) -> Scores:
    """Combine log-probabilities of labels, (Q, L) each, to those of the blend."""
    combined: Scores = log_softmax(weights.model * model + weights.words * words, axis=1)
    return combined


def model_log_probabilities(scores: Sequence[Mapping[str, float]], labels: Sequence[str]) -> Scores:
    """Turn a model's scores of labels into log-probabilities among the labels, (Q, L)."""
    table = np.array([[one[label] for label in labels] for one in scores], dtype=float).reshape(-1, len(labels))
    among: Scores = log_softmax(table, axis=1)
    return among


def fitted_positions(demonstrations: Sequence[Example]) -> list[int]:
    """Return the demonstrations that weights are fitted on; none where these are too few.

    They are the last half, up to ``MOST_FITTED``: in the first half a model is still learning from its context and
    worse than it will be. Those whose text comes twice are omitted, for each part may have seen the answer.
    """
    counts = Counter(example.query.text for example in demonstrations)
    last_half = range(len(demonstrations) // 2, len(demonstrations))
    single = [position for position in last_half if counts[demonstrations[position].query.text] == 1]
    are_enough = len(demonstrations) >= FEWEST_DEMONSTRATIONS and len(single) >= FEWEST_FITTED
    return single[-MOST_FITTED:] if are_enough else []


def held_out_words(demonstrations: Sequence[Example], labels: Sequence[str], positions: Sequence[int]) -> Scores:
    """Score the words of some demonstrations by classifiers that were fitted on the folds without them, (N, L).

    The examples of each label are dealt out to the folds in turn, beginning with the first fold for every label: where
    labels are balanced, what is left is balanced. Otherwise the label that is to be found would be the one with fewer
    examples left, and the classifier would seem worse than it is.
    """
    num_before: Counter[str] = Counter()
    fold_of = []
    for example in demonstrations:
        fold_of.append(num_before[example.answer] % NUM_FOLDS)
        num_before[example.answer] += 1
    row_of = {position: row for row, position in enumerate(positions)}
    found = np.empty((len(positions), len(labels)))
    for fold in range(NUM_FOLDS):
        held_out = [position for position in positions if fold_of[position] == fold]
        if not held_out:
            continue
        rest = [example for position, example in enumerate(demonstrations) if fold_of[position] != fold]
        texts = [demonstrations[position].query.text for position in held_out]
        found[[row_of[p] for p in held_out]] = WordClassifier.fit(rest).log_probabilities(texts, labels)
    return found


def fit_weights(model: Scores, words: Scores, answers: Sequence[int]) -> BlendWeights:
    """Fit the weights of the two parts by logistic regression, their logarithms drawn to those of the fixed weights.

    Args:
        model: The model's log-probabilities of labels for examples that it has not seen, (N, L).
        words: Those of classifiers that have not seen them either, (N, L).
        answers: Column of the right label of each, (N,); fewer than ``FEWEST_FITTED`` give the fixed weights.
    """
    if len(answers) < FEWEST_FITTED:
        return FIXED_WEIGHTS
    from scipy.optimize import minimize

    fixed, parts = np.array([FIXED_WEIGHTS.model, FIXED_WEIGHTS.words]), np.stack([model, words])
    rows, columns = np.arange(len(answers)), list(answers)
    right = parts[:, rows, columns]

    def loss(log_factors: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Return the penalised log-loss of weights that are multiples of the fixed ones, in nats, and its gradient."""
        weights = fixed * np.exp(log_factors)
        log_probabilities = log_softmax(np.tensordot(weights, parts, axes=1), axis=1)
        expected = (np.exp(log_probabilities) * parts).sum(axis=2)
        nats = PULL / 2 * log_factors @ log_factors - log_probabilities[rows, columns].sum()
        return float(nats), (expected - right).sum(axis=1) * weights + PULL * log_factors

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-MOST_LOG_FACTOR, MOST_LOG_FACTOR)] * 2)
    of_model, of_words = map(float, fixed * np.exp(found.x))
    return BlendWeights(model=of_model, words=of_words, num_fitted=len(answers))
