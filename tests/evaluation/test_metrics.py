"""Prediction, references -> score."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer
from sklearn.metrics import f1_score

from manyicl.errors import UserError
from manyicl.evaluation.metrics import METRICS, exact_match, metrics_of, numeric_match, token_f1
from manyicl.tasks.words import words
from tests.builders import make_task

AWKWARD = ["", " ", "the", "A", "!!!", "1/0", "9" * 5000, "русский текст", "日本語です", "🎉", "a\n\nb", "-", "1e999"]


@pytest.mark.parametrize(
    "text",
    ["съешь ещё этих мягких булок", "日本語の文章です", "हिन्दी में लिखा", "plain words", "🎉 🎈"],
)
@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL"])
def test_identical_texts_of_any_script_score_one(text: str, metric: str) -> None:
    assert METRICS[metric].score([text], [(text,)]) == 1.0


@given(st.text(st.characters(max_codepoint=127)))
@settings(max_examples=200, deadline=None)
def test_on_ascii_words_are_those_of_rouge_score(text: str) -> None:
    assert words(text) == DefaultTokenizer().tokenize(text)


def test_a_vowel_sign_stays_in_its_word() -> None:
    assert words("हिन्दी में") == ["हिन्दी", "में"]


def test_composed_and_decomposed_letters_are_the_same_word() -> None:
    assert words("cafe\u0301") == words("caf\u00e9")


def test_rouge_takes_the_best_reference() -> None:
    assert METRICS["rougeL"].score(["red box"], [("nothing alike", "red box")]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("1,000", "1000"),
        ("1000.0", "1,000"),
        ("3/4", "0.75"),
        ("0.75", "3 / 4"),
        (r"\frac{3}{4}", "3/4"),
        ("22 1 / 2 days", "22.5"),
        ("-5", "- 5"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("rs . 25,000", "25000"),
        ("50%", "50"),
        ("32 %", "32%"),
        ("22cm", "22"),
        (".5", "0.5"),
        ("1e3", "1000"),
        ("5 - 3 = 2", "2"),
        ("He has 3 + 4 = 7 apples.", "7"),
        ("7", "She adds 3 and 4.\n#### 7"),
        ("7", "3 + 4 = 7"),
        ("x = -2", "-2"),
        ("0.33333333", "1/3"),
        ("None of these", "none of these"),
        ("2^11-1", "2 ^ 11 - 1"),
        ("12,345,678", "12345678"),
        ("The sum 1, 2, 3", "3"),
    ],
)
def test_the_same_number_written_otherwise_matches(prediction: str, reference: str) -> None:
    assert numeric_match(prediction, (reference,)) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("1,000", "1"),
        ("5", "-5"),
        ("0.5", "50%"),
        ("12345678", "12345679"),
        ("0.333", "1/3"),
        ("3/0", "3"),
        ("none", "3"),
        ("3", "none of these"),
        ("1, 372", "628, 372"),
        ("2", "y^2 > x^2"),
        ("1.5", "15"),
        ("", "0"),
    ],
)
def test_another_number_does_not_match(prediction: str, reference: str) -> None:
    assert numeric_match(prediction, (reference,)) == 0.0


def test_a_minus_between_numbers_is_no_sign() -> None:
    assert numeric_match("8-3", ("3",)) == 1.0


def test_exact_match_follows_squad() -> None:
    assert exact_match("The Eiffel  Tower.", ("eiffel tower",)) == 1.0
    assert exact_match("tower", ("eiffel tower",)) == 0.0


@pytest.mark.parametrize(("prediction", "reference"), [("A", "the"), ("...", "!"), ("", "the"), ("", "")])
def test_two_texts_of_which_squad_leaves_nothing_are_equal(prediction: str, reference: str) -> None:
    assert exact_match(prediction, (reference,)) == 1.0
    assert token_f1(prediction, (reference,)) == 1.0


@pytest.mark.parametrize(("prediction", "reference"), [("the", "cat"), ("cat", "!"), ("", "cat")])
def test_a_text_of_which_squad_leaves_nothing_equals_no_other(prediction: str, reference: str) -> None:
    assert exact_match(prediction, (reference,)) == 0.0
    assert token_f1(prediction, (reference,)) == 0.0


def test_token_f1_counts_repeated_words_once_each() -> None:
    assert token_f1("red red red", ("red box",)) == pytest.approx(2 * 1 / 5)


def test_macro_f1_is_that_of_scikit_learn() -> None:
    truth, predictions = ["a", "b", "c", "a", "b"], ["a", "c", "c", "b", "b"]
    expected = f1_score(truth, predictions, average="macro")
    assert METRICS["macro_f1"].score(predictions, [(one,) for one in truth]) == pytest.approx(expected)


def test_macro_f1_accepts_any_reference() -> None:
    assert METRICS["macro_f1"].score(["b", "a"], [("a", "b"), ("a",)]) == 1.0


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.of_example])
def test_every_score_lies_between_zero_and_one(name: str) -> None:
    of_example = METRICS[name].of_example
    assert of_example is not None
    assert all(0 <= of_example(answer, (reference,)) <= 1 for answer in AWKWARD for reference in AWKWARD)


def test_an_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"nknown metric 'acuracy'.* Did you mean 'accuracy'\?"):
        metrics_of(make_task(metric="acuracy"))


def test_macro_f1_needs_a_closed_label_set() -> None:
    with pytest.raises(UserError, match="no closed label set"):
        metrics_of(make_task(labels=None, metric="macro_f1"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metric": "accuracy"}, ("accuracy", "macro_f1")),
        ({"metric": "macro_f1"}, ("macro_f1", "accuracy")),
        ({"labels": None, "choices_column": "choices"}, ("accuracy",)),
        ({"labels": None, "family": "qa", "metric": "token_f1"}, ("token_f1", "exact_match")),
        ({"labels": None, "family": "summarization", "metric": "rougeL"}, ("rougeL", "rouge1", "rouge2")),
        ({"labels": None, "family": "math", "metric": "numeric_match"}, ("numeric_match", "exact_match")),
    ],
)
def test_the_primary_metric_comes_first_and_companions_follow(
    changes: dict[str, object], expected: tuple[str, ...]
) -> None:
    assert metrics_of(make_task(**changes)) == expected  # type: ignore[arg-type]


def test_a_set_without_predictions_has_no_score() -> None:
    with pytest.raises(ValueError, match="0 predictions"):
        METRICS["accuracy"].score([], [])
