"""Questions of a decision and the labels of a task, where the arithmetic has edges."""

from __future__ import annotations

import pytest

from manyicl.errors import UserError
from manyicl.server.openai_shapes import (
    ChoiceQuestion,
    ChoiceValue,
    PredicateQuestion,
    ScoreLevel,
    ScoreQuestion,
    decision_answer,
    labels_of,
    named_model,
    openai_error,
)

CHOICE = ChoiceQuestion(
    type="choice", choices=[ChoiceValue(value=label) for label in ("a", "b")], instructions="", name="q"
)
SCORE = ScoreQuestion(type="score", levels=[ScoreLevel(label="b"), ScoreLevel(label="a")], instructions="")


def test_shares_are_those_among_the_labels_of_the_question() -> None:
    answer = decision_answer(CHOICE, ["a", "b"], {"a": 0.125, "b": 0.375, "c": 0.5}, 0.75)
    assert answer.type == "choice"
    assert (answer.choice, answer.confidence) == ("b", 0.75)
    assert decision_answer(CHOICE, ["a", "b"], {"a": 0.125, "b": 0.375, "c": 0.5}, 0.76).type == "refusal"


def test_labels_that_are_all_impossible_are_equally_probable() -> None:
    answer = decision_answer(CHOICE, ["a", "b"], {"a": 0.0, "b": 0.0, "c": 1.0}, None)
    assert answer.type == "choice"
    assert [one.probability for one in answer.probabilities] == [0.5, 0.5]


def test_levels_count_from_zero_in_the_order_of_the_question() -> None:
    answer = decision_answer(SCORE, labels_of(SCORE, ["a", "b"], 1), {"a": 0.25, "b": 0.75}, None)
    assert answer.type == "score"
    assert answer.score == pytest.approx(0.25)
    assert [(one.label, one.value) for one in answer.probabilities] == [("b", 0), ("a", 1)]


@pytest.mark.parametrize("labels", [("true", "false"), ("No", "Yes"), ("0", "1"), ("FALSE", "TRUE")])
def test_a_predicate_takes_any_way_to_write_yes_and_no(labels: tuple[str, str]) -> None:
    yes, no = labels_of(PredicateQuestion(type="predicate", instructions=""), labels, 1)
    assert yes.casefold() in ("true", "yes", "1")
    assert {yes, no} == set(labels)


@pytest.mark.parametrize("labels", [("true", "no"), ("yes", "no", "maybe"), ("a", "b")])
def test_other_labels_are_no_yes_and_no(labels: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="question 3 does not fit"):
        labels_of(PredicateQuestion(type="predicate", instructions=""), labels, 3)


@pytest.mark.parametrize("name", ["t@", "t@0", "t@-1", "t@1.5", "t@²", "t@1@2", "t@99999999999"])
def test_what_follows_the_at_sign_is_a_version(name: str) -> None:
    with pytest.raises(UserError) as caught:
        named_model(name)
    assert caught.value.code == "unknown_version"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (409, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_a_status_has_a_type_of_error(status: int, kind: str) -> None:
    fields = openai_error({"detail": "It is so.", "code": "c", "field": "f"}, status)["error"]
    assert fields == {"message": "It is so.", "type": kind, "param": "f", "code": "c"}
