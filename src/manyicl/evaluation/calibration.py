"""Confidences of answers among labels -> whether they can be relied on: calibration, and accuracy against coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from manyicl.evaluation.metrics import accuracy
from manyicl.evaluation.result import PredictedAnswer

NUM_BINS = 10
# Shares of the answers that are kept, the surest first.
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


class Bin(NamedTuple):
    """Answers of like confidence.

    Attributes:
        low: Lowest confidence of the bin.
        high: Highest confidence.
        num_answers: Answers in it.
        confidence: Mean confidence of these.
        accuracy: Share of them that is right.
    """

    low: float
    high: float
    num_answers: int
    confidence: float
    accuracy: float


class Covered(NamedTuple):
    """What is right among the surest answers.

    Attributes:
        least_share: Share of the answers to be kept at least.
        share: Share that is: more, where answers are as sure as the last of them.
        threshold: Confidence of the last of them.
        accuracy: Share of the kept answers that is right.
    """

    least_share: float
    share: float
    threshold: float
    accuracy: float

    @property
    def abstain_below(self) -> str:
        """The threshold with four digits, never above it: ``predict --abstain-below`` of it keeps these answers."""
        return str(math.floor(10_000 * self.threshold) / 10_000)


class Calibration(NamedTuple):
    """How confidences and right answers go together.

    Attributes:
        num_answers: Answers with a confidence.
        error: Expected calibration error over ten bins of equal width: mean over answers of the distance between
            confidence and accuracy of their bin.
        confidence: Mean confidence.
        accuracy: Share of the answers that is right.
        bins: Bins that hold an answer, by rising confidence.
        coverage: Accuracy at each of ``COVERAGES``, all answers first.
    """

    num_answers: int
    error: float
    confidence: float
    accuracy: float
    bins: tuple[Bin, ...]
    coverage: tuple[Covered, ...]

    def at(self, least_share: float) -> Covered:
        """Return what is right among this share of the answers, one of ``COVERAGES``."""
        return next(one for one in self.coverage if one.least_share == least_share)


def calibration(predictions: Sequence[PredictedAnswer]) -> Calibration | None:
    """Compare the confidence of answers with how often they are right; None where none has a confidence.

    The reliability curve is ``sklearn.calibration.calibration_curve``.

    Source: Guo et al. 2017, arXiv:1706.04599, for the expected calibration error; El-Yaniv and Wiener 2010, *On the
    Foundations of Noise-free Selective Classification*, JMLR 11, for accuracy against coverage.
    """
    from sklearn.calibration import calibration_curve

    known = [line for line in predictions if line.confidence is not None]
    if not known:
        return None
    # A sum of probabilities may be above 1 by a rounding error.
    confidences = np.minimum(np.array([line.confidence for line in known], dtype=float), 1.0)
    rights = np.array([accuracy(line.answer, line.references) for line in known])
    shares, means = calibration_curve(rights, confidences, n_bins=NUM_BINS, strategy="uniform")
    edges = np.linspace(0, 1, NUM_BINS + 1)
    # As the curve does, which leaves out empty bins and says no counts.
    counts = np.bincount(np.searchsorted(edges[1:-1], confidences), minlength=NUM_BINS)
    filled = np.flatnonzero(counts)
    bins = tuple(
        Bin(float(edges[place]), float(edges[place + 1]), int(counts[place]), float(mean), float(share))
        for place, mean, share in zip(filled, means, shares, strict=True)
    )
    error = sum(one.num_answers * abs(one.accuracy - one.confidence) for one in bins) / len(known)
    covered = tuple(_covered(confidences, rights, least_share) for least_share in COVERAGES)
    return Calibration(len(known), error, float(confidences.mean()), float(rights.mean()), bins, covered)


def sentence(found: Calibration) -> str:
    """Say how far confidences can be relied on, and what is right among the surest answers."""
    surest = found.at(0.8)
    return (
        f"It is {100 * found.confidence:.0f} % sure on average and {100 * found.accuracy:.0f} % right; the expected "
        f"calibration error over {NUM_BINS} bins of equal width is {found.error:.3f}. Of the surest "
        f"{100 * surest.share:.0f} % of the answers {100 * surest.accuracy:.0f} % are right (--abstain-below "
        f"{surest.abstain_below})."
    )


def _covered(confidences: NDArray[np.float64], rights: NDArray[np.float64], least_share: float) -> Covered:
    """Keep so many of the surest answers, and all that are as sure as the last of them."""
    num_kept = max(1, math.ceil(least_share * len(confidences) - 1e-9))
    threshold = np.sort(confidences)[-num_kept]
    kept = confidences >= threshold
    return Covered(least_share, float(kept.mean()), float(threshold), float(rights[kept].mean()))
