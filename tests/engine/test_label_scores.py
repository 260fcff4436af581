"""Probabilities, margin and corrections follow from the scores, each by its formula."""

from __future__ import annotations

import math

import pytest

from manyicl.engine.label_scores import LabelScores, mean_scores
from tests.engine.parts import refused

SCORES = LabelScores(
    {"good": math.log(0.2), "bad": math.log(0.1), "so so": math.log(0.1)}, {"good": 1, "bad": 1, "so so": 2}
)


def test_probabilities_are_shares_among_the_labels() -> None:
    assert SCORES.probabilities == pytest.approx({"good": 0.5, "bad": 0.25, "so so": 0.25})
    far = LabelScores({"a": -2000.0, "b": -2001.0}, {"a": 1, "b": 1})
    assert far.probabilities["a"] == pytest.approx(1 / (1 + math.exp(-1)))


def test_the_margin_is_between_the_best_two_and_infinite_for_one() -> None:
    assert SCORES.margin == pytest.approx(math.log(2))
    assert LabelScores({"a": -1.0}, {"a": 1}).margin == math.inf


def test_the_first_of_equal_labels_is_the_best() -> None:
    assert LabelScores({"b": -1.0, "a": -1.0}, {"a": 1, "b": 1}).best == "b"


def test_scores_per_token_let_long_labels_win() -> None:
    assert SCORES.per_token().best == "so so"


def test_a_prior_is_taken_away_and_must_be_of_the_same_labels() -> None:
    prior = LabelScores({"good": math.log(0.4), "bad": math.log(0.1), "so so": math.log(0.3)}, SCORES.num_tokens)
    corrected = SCORES.corrected(prior)
    assert corrected.best == "bad"
    assert corrected.log_probabilities["good"] == pytest.approx(math.log(0.5))
    with refused("foreign_prior"):
        SCORES.corrected(LabelScores({"x": -1.0}, {"x": 1}))


def test_a_mean_is_of_probabilities() -> None:
    other = LabelScores({"good": math.log(0.4), "bad": math.log(0.3), "so so": math.log(0.1)}, SCORES.num_tokens)
    mean = mean_scores([SCORES, other]).log_probabilities
    assert mean == pytest.approx({"good": math.log(0.3), "bad": math.log(0.2), "so so": math.log(0.1)})
    with refused("foreign_prior"):
        mean_scores([])
