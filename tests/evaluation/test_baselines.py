"""Trivial baselines."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from manyicl.errors import UserError
from manyicl.evaluation.baselines import (
    chance_level,
    majority_answer,
    majority_level,
    nearest_answers,
    nearest_level,
    tfidf_level,
)
from tests.builders import make_example, make_task

RED = [make_example(f"a warm rose number {i}", "red") for i in range(12)]
BLUE = [make_example(f"the cold sea number {i}", "blue") for i in range(8)]
TASK = make_task(train=RED + BLUE, test=RED[:3] + BLUE[:7], labels=("red", "blue"))


def test_the_majority_is_that_of_the_training_side() -> None:
    assert majority_answer(TASK) == "red"
    assert majority_level(TASK, TASK.test).score == pytest.approx(0.3)


def test_free_answers_have_a_majority_too() -> None:
    task = make_task(train=[make_example("q", "1,000")] * 2, labels=None, family="math", metric="numeric_match")
    assert majority_level(task, [make_example("p", "1000"), make_example("r", "7")]).score == 0.5


def test_chance_follows_labels_and_each_rows_options() -> None:
    assert chance_level(TASK, TASK.test).score == 0.5
    task = make_task(labels=None, choices_column="choices")
    rows = [make_example("q", "a", ("a", "b")), make_example("q", "a", ("a", "b", "c", "d"))]
    assert chance_level(task, rows).score == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert majority_level(task, rows).score is None


def test_a_guess_may_hit_any_answer_that_a_row_accepts() -> None:
    rows = [replace(make_example("the film", "good"), references=accepted) for accepted in (("good", "bad"), ("good",))]
    assert chance_level(make_task(), rows).score == pytest.approx((1 + 1 / 2) / 2)


def test_chance_of_a_free_answer_is_not_defined() -> None:
    level = chance_level(make_task(labels=None), [])
    assert level.score is None
    assert level.note == "answers are free"


def test_tfidf_learns_from_the_demonstrations_it_is_shown() -> None:
    assert tfidf_level(TASK, RED[4:] + BLUE[4:], TASK.test).score == 1.0


def test_tfidf_without_demonstrations_is_not_defined() -> None:
    level = tfidf_level(TASK, [], TASK.test)
    assert level.score is None
    assert level.note == "no demonstrations"


def test_tfidf_that_saw_one_label_always_answers_it() -> None:
    level = tfidf_level(TASK, BLUE[:1], TASK.test)
    assert level.score == pytest.approx(0.7)
    assert "one label" in level.note


def test_tfidf_reads_texts_without_latin_letters() -> None:
    russian = [make_example(f"тёплый день {i}", "red") for i in range(5)]
    russian += [make_example(f"холодная ночь {i}", "blue") for i in range(5)]
    assert tfidf_level(TASK, russian, [make_example("очень холодная", "blue")]).score == 1.0


def test_tfidf_without_any_word_falls_back_to_the_most_frequent_label() -> None:
    demonstrations = [make_example("!!", "red"), make_example("??", "blue"), make_example("..", "blue")]
    level = tfidf_level(TASK, demonstrations, TASK.test)
    assert level.score == pytest.approx(0.7)
    assert "no words" in level.note


def test_tfidf_needs_closed_labels() -> None:
    assert tfidf_level(make_task(labels=None), RED, RED).note == "needs a closed label set"


def test_the_nearest_neighbour_repeats_the_answer_of_the_example_most_like_the_query() -> None:
    pytest.importorskip("bm25s")
    assert nearest_answers([*RED[4:], *BLUE[4:]], [make_example("the sea", ""), make_example("rose", "")]) == [
        "blue",
        "red",
    ]


def test_a_query_like_no_example_has_no_nearest_answer() -> None:
    pytest.importorskip("bm25s")
    queries = [make_example("zebra", "blue"), make_example("rose", "red")]
    assert nearest_answers([*RED[:1], *BLUE[:2]], queries) == [None, "red"]


def test_the_nearest_neighbour_names_the_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"manyicl\[retrieval\]"):
        nearest_answers(RED, TASK.test)


def test_the_nearest_level_repeats_an_answer_and_falls_back_to_the_most_frequent_one() -> None:
    pytest.importorskip("bm25s")
    queries = [make_example("zebra", "blue"), make_example("rose", "red"), make_example("the rose", "blue")]
    assert nearest_level(TASK, [*RED[:1], *BLUE[:2]], queries).score == pytest.approx(2 / 3)


def test_free_answers_have_a_nearest_level_too() -> None:
    pytest.importorskip("bm25s")
    task = make_task(labels=None, family="math", metric="numeric_match")
    known = [make_example("two and two", "4"), make_example("three apples", "3")]
    assert nearest_level(task, known, [make_example("apples", "3.0")]).score == 1.0


def test_without_demonstrations_or_with_options_of_each_row_there_is_no_nearest_level() -> None:
    assert nearest_level(TASK, [], TASK.test) == (None, "no demonstrations")
    options = make_task(labels=None, choices_column="choices")
    assert nearest_level(options, RED, RED) == (None, "each row has its own options")


def test_a_nearest_level_that_needs_an_extra_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    level = nearest_level(TASK, RED[:3], [make_example("not seen before", "red")])
    assert level.score is None
    assert "manyicl[retrieval]" in level.note
