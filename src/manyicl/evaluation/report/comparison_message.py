"""Numbers of a comparison -> the sentences to read first, with the same care whether the answer is yes or no."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from manyicl.errors import pluralized
from manyicl.evaluation.comparison.arms import ALL_ANSWERS, BASE, EQUAL_ANSWERS, FEW_SHOT, LAST_ANSWER, ZERO_SHOT, Point
from manyicl.evaluation.comparison.estimates import Measured, ShareOfGap
from manyicl.evaluation.comparison.statistics import ROLES, ComparedRole, Difference, Statistics
from manyicl.evaluation.report.message import COUNTS_RIGHT_ANSWERS

_NAMES = {
    "base": "the base",
    "zero_shot": "zero-shot fine-tuning",
    "few_shot": "few-shot fine-tuning",
    "last_answer": "supervising the last answer alone",
}


@dataclass(frozen=True)
class Message:
    """What one kind of tasks shows.

    Attributes:
        role: Seen or unseen tasks.
        heading: Which tasks, and how many.
        answer: Whether one many-shot model replaces one model per task.
        others: How it compares with the other regimes.
    """

    role: ComparedRole
    heading: str
    answer: str
    others: str


def messages(numbers: Statistics) -> list[Message]:
    """Say what the comparison shows, for unseen and for seen tasks apart."""
    found = []
    for role in ROLES:
        tasks = numbers.compared(role)
        if tasks:
            heading = f"{pluralized(len(tasks), f'{role} task')}"
            found.append(Message(role, heading, replaces(numbers, role), " ".join(_others(numbers, role))))
    return found


def replaces(numbers: Statistics, role: ComparedRole) -> str:
    """Say whether one many-shot model replaces one model per task."""
    if numbers.point(ALL_ANSWERS) is None:
        return "Many-shot fine-tuning with all answers was not measured, so nothing can be said of it."
    pair, tasks = numbers.in_weights_and_context, numbers.dedicated_tasks(role)
    if pair is None or not tasks:
        return "Models per task were not measured, so whether one model replaces them is not known."
    upper, model = pair
    difference = numbers.difference(upper, model, tasks)
    if difference is None:
        return "Many-shot and dedicated models have no training seed in common, so they cannot be compared."
    other, score = difference.levels
    count = upper.arm.num_examples or 0
    unit = unit_of(numbers, tasks)
    levels = (
        f"with {percent(score)}{unit} after {pluralized(model.shots, 'example')} in its context against "
        f"{percent(other)}{unit} of models trained on {pluralized(count, 'example')} of their task"
    )
    some = (
        ""
        if tasks == numbers.compared(role)
        else f" (on the {pluralized(len(tasks), 'task')} with models of their own)"
    )
    verdicts = {
        "higher": "Yes, and more: one many-shot model is better than one model per task",
        "lower": "No: one many-shot model is worse than one model per task",
        "not distinguishable": "Undecided: one many-shot model and one model per task are not distinguishable",
        "one training": "Not claimed: one training each does not tell one many-shot model from one model per task",
    }
    shares = numbers.shares(role)
    closes = f" {share_sentence(*list(shares.items())[-1])}" if shares else ""
    with_interval = "; intervals are of 95%" if difference.measured.interval is not None else ""
    return f"{verdicts[difference.reading]}{some}, {levels} ({by(difference.measured)}{with_interval}).{closes}"


def share_sentence(base: Point, share: ShareOfGap) -> str:
    """Say which share of the gap between the base and the dedicated models many-shot closes."""
    gap = f"the gap between the base with {pluralized(base.shots, 'example')} and those models"
    if share.share is None:
        reason = "with one training each, its size is not known"
        if share.gap.interval is not None:
            reason = f"it is not above the noise ({interval(share.gap, is_signed=True)})"
        return f"No share of {gap} is given, since {reason}."
    low, high = share.interval or (None, None)
    if low is None or high is None:
        return f"It closes {share.share:.0%} of {gap}; the data do not bound it."
    return f"It closes {share.share:.0%} of {gap} ({low:.0%} to {high:.0%})."


def _others(numbers: Statistics, role: ComparedRole) -> Iterator[str]:
    """Say how many-shot with all answers compares with the other regimes of one model."""
    tasks, model = numbers.compared(role), numbers.point(ALL_ANSWERS)
    pairs = [
        difference
        for arm in (BASE, FEW_SHOT, ZERO_SHOT, LAST_ANSWER)
        if (difference := numbers.difference(numbers.point(arm), model, tasks)) is not None
    ]
    for reading, beginning in (
        ("higher", "It is better than"),
        ("lower", "It is worse than"),
        ("not distinguishable", "It is not distinguishable from"),
        ("one training", "With one training each nothing is claimed of how it differs from"),
    ):
        named = [f"{_named(one)} ({by(one.measured)})" for one in pairs if one.reading == reading]
        if named:
            yield f"{beginning} {enumerated(named)}."
    equal = numbers.difference(numbers.point(LAST_ANSWER), numbers.point(EQUAL_ANSWERS), tasks)
    if equal is not None:
        compared = {
            "higher": "all answers are still better than the last answer alone",
            "lower": "all answers are worse than the last answer alone",
            "not distinguishable": "all answers and the last answer alone are not distinguishable",
            "one training": "one training of each shows no difference that can be claimed",
        }
        yield f"With as many supervised answers instead of tokens, {compared[equal.reading]} ({by(equal.measured)})."


def _named(difference: Difference) -> str:
    return _NAMES.get(difference.first.arm.regime, difference.first.label)


def forgetting_sentence(numbers: Statistics) -> str:
    """Say what the models lost elsewhere; nothing if it was not measured."""
    found = [(arm, one) for arm, one in numbers.forgotten().items() if not (arm.variant or arm.equal_answers)]
    losses = [
        f"{arm.label} {signed(one.rise.mean, 2)}"
        + ("" if (ends := one.rise.interval) is None else f" ({signed(ends[0], 2)} to {signed(ends[1], 2)})")
        for arm, one in found
        if one.rise is not None
    ]
    if not losses:
        return ""
    return f"Elsewhere, nats per token of general text changed since the base by: {'; '.join(losses)}."


def enumerated(names: Sequence[str]) -> str:
    """Join names as a sentence does."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def unit_of(numbers: Statistics, tasks: Sequence[str]) -> str:
    """Return what a percentage counts, if all tasks count right answers."""
    return " right" if metrics_of(numbers, tasks) <= COUNTS_RIGHT_ANSWERS else ""


def metrics_of(numbers: Statistics, tasks: Sequence[str]) -> set[str]:
    """Metrics of tasks."""
    chosen = set(tasks)
    return {
        result.metric
        for (_, task, _), rows in numbers.results.items()
        if task in chosen
        for row in rows.values()
        for result in row
    }


def percent(value: float) -> str:
    """Write a score: ``61.2 %``."""
    return f"{100 * value:.1f} %"


def by(measured: Measured) -> str:
    """Write a difference in points with its interval: ``+5.0 points, +1.2 to +8.8``."""
    text = f"{signed(100 * measured.mean)} points"
    if measured.interval is not None:
        return f"{text}, {interval(measured, is_signed=True)}"
    if measured.interval_of_queries is not None:
        low, high = measured.interval_of_queries
        return f"{text}; over queries alone {signed(100 * low)} to {signed(100 * high)}"
    return text


def interval(measured: Measured, *, is_signed: bool = False) -> str:
    """Write the interval of a score or a difference in percent; an empty text without one."""
    if measured.interval is None:
        return ""
    low, high = (100 * end for end in measured.interval)
    return f"{signed(low, 1)} to {signed(high, 1)}" if is_signed else f"{low:.1f}–{high:.1f}"


def signed(value: float, decimals: int = 1) -> str:
    """Write a number with its sign."""
    return f"{value:+.{decimals}f}".replace("-", "−")
