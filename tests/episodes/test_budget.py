"""Demonstrations beyond the context are chosen balanced by label, and counted."""

from __future__ import annotations

from collections import Counter

from manyicl.episodes.budget import fit_demonstrations
from manyicl.episodes.encoding import Encoder
from tests.builders import byte_level_bpe, make_example, make_task


def test_what_fits_stays_as_given() -> None:
    task, encoder = make_task(), Encoder(byte_level_bpe())
    assert fit_demonstrations(task, task.train, encoder, 10_000, reserve=10) == (task.train, 0)


def test_what_does_not_fit_is_left_out_balanced_by_label_and_counted() -> None:
    encoder = Encoder(byte_level_bpe())
    skewed = [
        *(make_example(f"film {i}", "good") for i in range(30)),
        *(make_example(f"box {i}", "bad") for i in range(8)),
    ]
    task = make_task(train=skewed)
    kept, num_left_out = fit_demonstrations(task, skewed, encoder, 130, reserve=20)
    assert len(kept) + num_left_out == len(skewed)
    labels = Counter(example.answer for example in kept)
    assert abs(labels["good"] - labels["bad"]) <= 1
    assert len(encoder.encode_prefix("", kept)) <= 110
    assert [example for example in skewed if example in kept] == list(kept)
