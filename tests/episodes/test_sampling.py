"""Seed and index alone fix an episode; names, orders and weights follow the settings."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyicl.episodes.sampling import (
    EpisodeSettings,
    Mixture,
    draw_episode,
    draw_label_names,
    plain_words,
    sequence_rng,
    shuffled_lazily,
)
from manyicl.errors import UserError
from tests.builders import make_task


@given(length=st.integers(0, 200), seed=st.integers())
def test_a_lazy_shuffle_is_a_permutation(length: int, seed: int) -> None:
    assert sorted(shuffled_lazily(length, random.Random(seed))) == list(range(length))


def test_a_lazy_shuffle_puts_every_number_first_equally_often() -> None:
    rng = random.Random(0)
    firsts = [next(shuffled_lazily(5, rng)) for _ in range(5000)]
    assert all(900 < firsts.count(number) < 1100 for number in range(5))


def test_no_example_stands_twice_in_an_episode() -> None:
    task = make_task()
    shots = list(draw_episode(task, EpisodeSettings(), sequence_rng(0, 0)).examples)
    assert len(shots) == len({shot.query.text for shot in shots}) == len(task.train)


def test_renamed_labels_are_other_words_used_consistently() -> None:
    task = make_task(instruction="one of {{ labels | join(', ') }}")
    words = sorted(plain_words(task))
    drawn = draw_episode(task, EpisodeSettings(rename_labels=1.0), sequence_rng(0, 3), words)
    old_answers = {example.query.text: example.answer for example in task.train}
    names = {(old_answers[shot.query.text], shot.answer) for shot in drawn.examples}
    assert len(names) == 2
    assert not {new for _, new in names} & {"good", "bad"}
    assert all(new in drawn.instruction for _, new in names)


def test_new_names_are_those_that_a_list_without_the_labels_would_give() -> None:
    rng = random.Random(0)
    num_compared = 0
    for seed in range(400):
        # Few candidates are shuffled, of many some are picked: Python's sample does either.
        words = sorted({f"w{rng.randrange(10_000)}" for _ in range(rng.choice((3, 8, 40, 900)))})
        known = rng.sample(words, rng.randint(0, min(4, len(words))))
        labels = tuple(dict.fromkeys([*known, *(f"label {n}" for n in range(rng.randint(1, 6)))]))
        candidates = [word for word in words if word not in labels]
        if len(candidates) < len(labels):
            continue
        expected = dict(zip(labels, random.Random(seed).sample(candidates, len(labels)), strict=True))
        assert draw_label_names(labels, words, random.Random(seed)) == expected
        num_compared += 1
    assert num_compared > 250


def test_labels_are_renamed_in_the_asked_share_of_episodes() -> None:
    task = make_task()
    words = sorted(plain_words(task))
    settings = EpisodeSettings(rename_labels=0.3)
    first_answers = [next(draw_episode(task, settings, sequence_rng(0, i), words).examples).answer for i in range(1000)]
    assert 240 < sum(answer not in ("good", "bad") for answer in first_answers) < 360


def test_the_instruction_is_omitted_in_the_asked_share_of_episodes() -> None:
    task = make_task(instruction="Which is it?")
    settings, words = EpisodeSettings(omit_instruction=0.3, rename_labels=0.5), sorted(plain_words(task))
    drawn = [draw_episode(task, settings, sequence_rng(0, i), words) for i in range(1000)]
    without = [one for one in drawn if not one.instruction]
    assert 240 < len(without) < 360
    assert 100 < sum(one.new_names is not None for one in without) < 180


def test_balanced_episodes_alternate_the_labels() -> None:
    drawn = draw_episode(make_task(), EpisodeSettings(sampling="balanced"), sequence_rng(0, 0))
    answers = [shot.answer for shot in islice(drawn.examples, 10)]
    assert answers.count("good") == 5


def test_a_range_of_shots_is_drawn_evenly() -> None:
    counts = [
        draw_episode(make_task(), EpisodeSettings(examples_per_episode=(2, 4)), sequence_rng(0, i)).num_examples
        for i in range(600)
    ]
    assert {2, 3, 4} == set(counts)
    assert all(150 < counts.count(number) < 250 for number in (2, 3, 4))


def test_mixtures_weigh_by_size_and_by_name_or_family() -> None:
    small, large = make_task("small", train=make_task().train[:10]), make_task("large")
    assert Mixture().task_weights([small, large]) == [1, 1]
    assert Mixture(kind="size").task_weights([small, large]) == [10, 40]
    assert Mixture(kind="size", temperature=2.0).task_weights([small, large]) == pytest.approx([10**0.5, 40**0.5])
    weighted = Mixture(kind="weights", weights={"classification": 2.0, "small": 3.0})
    assert weighted.task_weights([small, large]) == [3, 2]
    tweets = [make_task("tweet_a"), make_task("tweet_b")]
    patterns = Mixture(kind="weights", weights={"tweet_*": 3.0})
    assert patterns.task_weights([*tweets, small]) == [1.5, 1.5, 1]


def test_a_weight_for_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'large'"):
        Mixture(kind="weights", weights={"larg": 2.0}).task_weights([make_task("large")])
