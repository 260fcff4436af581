"""Trivial baselines go through the demonstrations as the model does: each is answered from those before it."""

from __future__ import annotations

import sys

import pytest

from manyicl.evaluation import prequential
from manyicl.evaluation.baselines import most_frequent_answer
from manyicl.evaluation.prequential import MAJORITY, NEAREST, TFIDF, prequential_baselines
from manyicl.tasks.retrieval import terms
from manyicl.tasks.task import Example, Task
from tests.builders import make_example, make_task


def words_that_say_it(number: int) -> list[Example]:
    return [make_example(f"w{n % 3} says it {n}", "abc"[n % 3]) for n in range(number)]


def task_of(demonstrations: list[Example]) -> Task:
    labels = tuple(sorted({example.answer for example in demonstrations}))
    return Task.from_examples("t", [(one.query.text, one.answer) for one in demonstrations], labels=labels)


def test_each_is_answered_from_those_before_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrations = words_that_say_it(37)
    task = task_of(demonstrations)
    monkeypatch.setattr(prequential, "MOST_FITS", 100)
    found = prequential_baselines(task, demonstrations, 5).scores
    expected = tuple(float(most_frequent_answer(demonstrations[:n]) == demonstrations[n].answer) for n in range(5, 37))
    assert found[MAJORITY] == expected
    assert set(map(len, found.values())) == {32}
    # The answer of a demonstration has no part in what is answered to it, nor have later ones.
    changed = [*demonstrations[:20], make_example(demonstrations[20].query.text, "c"), *demonstrations[21:]]
    for name, scores in prequential_baselines(task, changed, 5).scores.items():
        assert scores[:15] == found[name][:15]


def test_words_that_name_the_answer_are_learned_by_those_that_read_words() -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    demonstrations = words_that_say_it(48)
    found = prequential_baselines(task_of(demonstrations), demonstrations, 24).scores
    assert sum(found[TFIDF]) == sum(found[NEAREST]) == 24
    assert sum(found[MAJORITY]) < 12


@pytest.mark.parametrize("num_fits", [1, 2, 5, 16])
def test_fewer_fits_know_less_and_score_every_demonstration(num_fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prequential, "MOST_FITS", num_fits)
    learned: list[int] = []

    def counting(before: list[Example], queries: list[Example]) -> list[str]:
        learned.append(len(before))
        return [most_frequent_answer(before)] * len(queries)

    monkeypatch.setattr(prequential, "_majority", counting)
    demonstrations = words_that_say_it(31)
    assert len(prequential_baselines(task_of(demonstrations), demonstrations, 15).scores[MAJORITY]) == 16
    assert learned[0] == 15
    assert len(learned) <= num_fits


def test_a_logistic_regression_too_large_to_fit_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrations = words_that_say_it(31)
    monkeypatch.setattr(prequential, "MOST_FITTED_WEIGHTS", 3)
    found = prequential_baselines(task_of(demonstrations), demonstrations, 15)
    assert TFIDF not in found.scores
    assert MAJORITY in found.scores
    assert found.notes[0].startswith(f"{TFIDF} was not measured")


def test_a_logistic_regression_that_learned_seldom_is_said_to_know_less(monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrations = words_that_say_it(31)
    weights = 3 * len({term for example in demonstrations for term in terms(example.query.text)})
    monkeypatch.setattr(prequential, "MOST_FITTED_WEIGHTS", 2 * weights)
    found = prequential_baselines(task_of(demonstrations), demonstrations, 15)
    assert len(found.scores[TFIDF]) == 16
    # Two fits for 16 demonstrations: the eighth after a fit has seven before it that the fit did not see.
    assert found.notes[0].startswith(f"{TFIDF} knew up to 7 demonstrations fewer than the model")
    # So many fits as there are demonstrations to answer, as the other baselines have.
    assert prequential_baselines(task_of(demonstrations), demonstrations, 29).notes == []
    monkeypatch.setattr(prequential, "MOST_FITTED_WEIGHTS", 8 * weights)
    assert (
        prequential_baselines(task_of(demonstrations), demonstrations, 15)
        .notes[0]
        .startswith(f"{TFIDF} knew up to 1 demonstration fewer than the model")
    )


def test_free_answers_are_compared_with_nothing() -> None:
    task = make_task(labels=None)
    assert prequential_baselines(task, task.train, 5) == ({}, [])
    assert prequential_baselines(task_of(words_that_say_it(3)), words_that_say_it(1), 1) == ({}, [])


def test_without_bm25s_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    demonstrations = words_that_say_it(31)
    found = prequential_baselines(task_of(demonstrations), demonstrations, 15)
    assert set(found.scores) == {TFIDF, MAJORITY}
    assert found.notes == [f"{NEAREST} was not measured: it needs the extra manyicl[retrieval]."]
