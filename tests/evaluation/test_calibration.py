"""Confidence against right answers, counted by hand."""

from __future__ import annotations

import random

import pytest

from manyicl.evaluation.calibration import COVERAGES, Bin, calibration, sentence
from manyicl.evaluation.result import PredictedAnswer

# Confidence, whether it is right.
ANSWERS = ((0.95, True), (0.91, False), (0.85, True), (0.85, True), (0.42, True), (0.48, False))


def answered(confidence: float | None, is_right: bool) -> PredictedAnswer:
    return PredictedAnswer(
        origin="test.jsonl:1",
        query="x",
        answer="a" if is_right else "b",
        references=("a",),
        scores={},
        log_probability=None,
        confidence=confidence,
    )


def test_the_error_is_the_distance_within_each_bin_weighted_by_its_answers() -> None:
    found = calibration([answered(*one) for one in ANSWERS])
    assert found is not None
    assert [one.num_answers for one in found.bins] == [2, 2, 2]
    assert [one.confidence for one in found.bins] == pytest.approx([0.45, 0.85, 0.93])
    assert [one.accuracy for one in found.bins] == [0.5, 1.0, 0.5]
    assert [(one.low, one.high) for one in found.bins] == [
        pytest.approx(ends) for ends in ((0.4, 0.5), (0.8, 0.9), (0.9, 1))
    ]
    assert found.error == pytest.approx((2 * 0.05 + 2 * 0.15 + 2 * 0.43) / 6)
    assert [found.accuracy, found.confidence] == pytest.approx([4 / 6, 4.46 / 6])
    assert isinstance(found.bins[0], Bin)


def test_the_surest_answers_are_kept_and_all_that_are_as_sure() -> None:
    found = calibration([answered(*one) for one in ANSWERS])
    assert found is not None
    half = found.at(0.5)
    # Three of six, and a fourth that is as sure as the third.
    assert [half.share, half.threshold, half.accuracy] == pytest.approx([4 / 6, 0.85, 0.75])
    assert half.abstain_below == "0.85"
    everything = found.at(1.0)
    assert [everything.share, everything.accuracy] == pytest.approx([1, 4 / 6])
    assert "Of the surest 83 % of the answers 60 % are right (--abstain-below 0.48)." in sentence(found)


@pytest.mark.parametrize("seed", range(5))
def test_abstaining_below_the_threshold_keeps_those_answers(seed: int) -> None:
    rng = random.Random(seed)
    lines = [answered(rng.random(), rng.random() < 0.6) for _ in range(97)]
    found = calibration(lines)
    assert found is not None
    assert sum(one.num_answers for one in found.bins) == 97
    for one, least_share in zip(found.coverage, COVERAGES, strict=True):
        kept = [line for line in lines if line.confidence is not None and line.confidence >= one.threshold]
        assert len(kept) / 97 == pytest.approx(one.share)
        assert least_share <= one.share + 1e-9 < least_share + 2 / 97
        assert float(one.abstain_below) <= one.threshold


def test_answers_that_are_as_right_as_they_are_sure_have_no_error() -> None:
    found = calibration([answered(1.0, True), answered(0.0, False), answered(1.0 + 1e-12, True), answered(None, False)])
    assert found is not None
    assert (found.num_answers, found.error) == (3, 0.0)


def test_without_confidences_there_is_nothing_to_say() -> None:
    assert calibration([answered(None, True)]) is None
    assert calibration([]) is None
