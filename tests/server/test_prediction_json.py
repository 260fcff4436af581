"""Predictions become objects that every JSON parser reads."""

from __future__ import annotations

import json
import math

import pytest

from manyicl.engine.label_scores import LabelScores
from manyicl.engine.prediction import Prediction
from manyicl.errors import UserError
from manyicl.server.prediction_json import error_json, json_line, prediction_json
from manyicl.tasks.example import Example, Query


def test_a_prediction_has_its_scores_and_the_numbers_of_similar_demonstrations() -> None:
    scores = LabelScores({"good": -0.1, "bad": -math.inf}, {"good": 1, "bad": 1})
    similar = (Example(Query("a film"), "good", ("good",), "demonstrations:17"),)
    found = prediction_json(Prediction("good", -0.1, scores, "bad", math.inf, num_shots=4, similar=similar))
    assert found["probabilities"] == {"good": 1.0, "bad": 0.0}
    assert found["scores"] == {"good": -0.1, "bad": None}
    assert found["margin"] is None
    assert (found["probability"], found["second_probability"]) == (1.0, 0.0)
    assert found["similar"] == [{"demonstration": 17, "text": "a film", "answer": "good"}]
    assert json.loads(json_line(found)) == found


def test_an_abstention_has_no_answer_and_says_what_it_would_have_been() -> None:
    found = prediction_json(Prediction("good", -0.7, abstained=True))
    assert (found["answer"], found["guess"], found["abstained"]) == (None, "good", True)


def test_a_row_without_an_answer_says_why_and_nothing_else() -> None:
    error = UserError("missing_column", "the column 'text' is missing", file="rows", row=3, field="text")
    found = prediction_json(Prediction("", math.nan, problem=error))
    assert found.pop("problem") == error_json(error)
    assert set(found.values()) == {None}


def test_the_error_of_a_row_names_no_file() -> None:
    error = UserError("broken_json", "broken JSON", file="rows", row=3)
    assert error_json(error) == {"row": 3, "code": "broken_json", "detail": "Query 3: broken JSON."}


def test_no_line_holds_what_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        json_line({"score": math.nan})
    assert json_line({"text": "zwei\nZeilen"}).count(b"\n") == 1
