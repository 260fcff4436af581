"""Scores by position are those of the demonstrations of one pass, each given those before it."""

from __future__ import annotations

from dataclasses import replace
from math import log
from statistics import fmean

import pytest

from manyicl.engine.engine import Engine
from manyicl.errors import UserError
from manyicl.evaluation.positions import score_positions
from tests.builders import make_example, make_task, tiny_loaded


def test_each_position_scores_as_a_query_after_the_demonstrations_before_it() -> None:
    engine, task = Engine.local(tiny_loaded()), make_task()
    scores = score_positions(engine, task, 9, 3)
    demonstrations = task.demonstrations(9, 3, "random")
    answers = engine.compile(task, demonstrations).answers
    nats = []
    for shot, example in enumerate(demonstrations):
        prefix = engine.prefill(task, demonstrations[:shot], [example.query])
        (prediction,) = engine.predict(prefix, [example.query], scores="all")
        assert prediction.scores is not None
        nats.append(-prediction.scores.log_probabilities[example.answer])
    assert [(one.first, one.last, one.num_answers) for one in scores] == [
        (0, 0, 1),
        (1, 1, 1),
        (2, 3, 2),
        (4, 7, 4),
        (8, 8, 1),
    ]
    for one in scores:
        assert one.nats_per_answer == pytest.approx(fmean(nats[one.first : one.last + 1]), abs=1e-4)
        assert one.accuracy is not None
        assert one.accuracy * one.num_answers == sum(answer.is_right for answer in answers[one.first : one.last + 1])


def test_draws_are_pooled_by_position() -> None:
    engine, task = Engine.local(tiny_loaded()), make_task()
    together = score_positions(engine, task, 5, 0, num_draws=2)
    apart = [score_positions(engine, task, 5, seed) for seed in (0, 1)]
    for pooled, *single in zip(together, *apart, strict=True):
        assert pooled.num_answers == sum(one.num_answers for one in single)
        assert pooled.nats_per_answer == pytest.approx(fmean(one.nats_per_answer for one in single))


def test_free_answers_have_no_accuracy() -> None:
    task = make_task(
        train=[make_example(f"film {n}", f"{n} books") for n in range(4)], labels=None, metric="exact_match"
    )
    scores = score_positions(Engine.local(tiny_loaded()), task, 100, 0)
    assert [one.last for one in scores] == [0, 1, 3]
    assert all(one.accuracy is None for one in scores)


def test_no_example_at_all_is_refused() -> None:
    with pytest.raises(UserError) as error:
        score_positions(Engine.local(tiny_loaded()), make_task(), 0, 0)
    assert (error.value.code, error.value.field) == ("out_of_range", "num_examples")


def test_in_the_channel_form_every_label_is_scored_for_each_position() -> None:
    engine = Engine.local(replace(tiny_loaded(), manifest=None), text_format="channel")
    choices = [make_example(f"film {n}", ("red", "long")[n % 2], ("red", "long", "box")) for n in range(5)]
    quiz = make_task("quiz", choices, [], labels=None, family="qa", choices_column="options")
    for task in (make_task(instruction="good?"), quiz):
        scores = score_positions(engine, task, 5, 3)
        assert [(one.first, one.last) for one in scores] == [(0, 0), (1, 1), (2, 3), (4, 4)]
        demonstrations = task.demonstrations(5, 3, "random")
        nats, right = [], []
        for shot, example in enumerate(demonstrations):
            prefix = engine.prefill(task, demonstrations[:shot], [example.query])
            (prediction,) = engine.predict(prefix, [example.query])
            assert prediction.scores is not None
            nats.append(-log(prediction.scores.probabilities[example.answer]))
            right.append(prediction.answer == example.answer)
        for one in scores:
            own = slice(one.first, one.last + 1)
            assert one.nats_per_answer == pytest.approx(fmean(nats[own]), abs=1e-3)
            assert one.accuracy == fmean(right[own])
