"""What to do, from what `manyicl compile` measured of a task: which baseline, how many shots, whether to retrieve.

Every sentence is about numbers that were measured in the same call; what was not measured is not advised. A difference
whose interval of 95 % includes zero is a tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from manyicl.errors import pluralized
from manyicl.evaluation.uncertainty import Estimate, independent_difference, mean_over_queries, paired_difference

# Fewer answers say nothing of whether a score rises, nor of which of two answers better.
FEWEST_COMPARED = 8
# Fewer answers nearly always tie: a tie of more of them is worth the advice to use fewer shots.
FEWEST_FOR_A_TIE = 32
# Rows outside a prefix on which it is measured what retrieved rows add.
FEWEST_ROWS = 16
# Shots are saved only where there are at least so many times as many.
LEAST_SAVING = 1.5


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Scores of rows that are not in the prefix, with rows retrieved for each and without.

    Attributes:
        num_retrieved: Most rows that were retrieved for each.
        without: Score of each row after the prefix alone, (Q,).
        with_retrieved: Score of each row after the prefix and its retrieved rows, (Q,).
        seconds: Time that the measurement took.
        num_too_long: Rows that did not fit after the prefix, or not with their retrieved rows; they count on no side.
    """

    num_retrieved: int
    without: Sequence[float]
    with_retrieved: Sequence[float]
    seconds: float = 0.0
    num_too_long: int = 0


def first_compared(num_answers: int) -> int:
    """Return the first of the demonstrations on which model and baselines are compared: the last half of them."""
    return num_answers - num_answers // 2


def advice(
    right: Sequence[float],
    nats: Sequence[float],
    baselines: Mapping[str, Sequence[float]],
    retrieval: Retrieval | None = None,
    notes: Sequence[str] = (),
) -> list[str]:
    """Say in sentences what the measurements of one pass mean; a baseline that beats the model comes first.

    Args:
        right: 1 for each demonstration that the model predicted right given those before it, else 0, (N,).
        nats: Negative log-probability of each answer, (N,).
        baselines: Scores of trivial baselines, by what they do, on the demonstrations from `first_compared` on.
        retrieval: What retrieved rows changed; None where that was not measured.
        notes: What must be known of the baselines; shown where the model is compared with them.
    """
    sentences = list(_against_baselines(right[first_compared(len(right)) :], baselines))
    if sentences:
        sentences += notes
    sentences.append(_shots(right, nats))
    if retrieval is not None:
        sentences.append(_on_retrieval(retrieval))
    return sentences


def _against_baselines(right: Sequence[float], baselines: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """Compare the model with the best of the baselines, on the same demonstrations."""
    if not baselines or len(right) < FEWEST_COMPARED:
        return
    name, scores = max(baselines.items(), key=lambda item: sum(item[1]))
    difference = paired_difference(right, scores)
    model, baseline = sum(right) / len(right), sum(scores) / len(scores)
    where = f"of the last {len(right)} demonstrations, each given those before it"
    if difference.includes_zero:
        yield (
            f"{name} ties with the model within the noise: right on {baseline:.2f} {where}; the model on {model:.2f} "
            f"({_signed(difference)})."
        )
    elif difference.mean > 0:
        yield (
            f"{name} is better than the model: right on {baseline:.2f} {where}; the model on {model:.2f} "
            f"({_signed(difference)}). Use it, unless more examples change that."
        )
    else:
        yield (
            f"The model is better than trivial baselines: right on {model:.2f} {where}. The best of them is right on "
            f"{baseline:.2f}: {name[0].lower() if name[1:2].islower() else name[0]}{name[1:]}."
        )


def _shots(right: Sequence[float], nats: Sequence[float]) -> str:
    """Say whether fewer shots are better or as good, else whether the last doubling of shots helped."""
    num_shots = len(right)
    start = _start_of_last_group(num_shots)
    falls, ties = [], []
    for shots, group in _smaller_prefixes(right, nats, start):
        last = Estimates.of(right[start:], nats[start:])
        change = independent_difference(group.right, last.right)
        said = (
            f"{shots // 2}–{shots - 1} shots give {group.right.mean:.2f}, {start}–{num_shots - 1} give "
            f"{last.right.mean:.2f}"
        )
        saving = f"{num_shots / shots:.1f}".removesuffix(".0")
        if change.includes_zero:
            # Where the answers get surer, more shots are worth something that counting right ones does not show yet.
            surer = independent_difference(group.nats, last.nats)
            if surer.mean >= 0 or surer.includes_zero:
                tie = f"{said}, a tie within the noise ({_signed(change)}): `--shots {shots}` is {saving} times smaller"
                ties.append(f"{tie} and, as far as this shows, as good.")
        elif change.mean < 0:
            fall = f"{said} ({_signed(change)}): `--shots {shots}` is better, and {saving} times smaller."
            falls.append((group.right.mean, fall))
    if falls:
        return max(falls)[1]
    return ties[0] if ties else growth(right)


@dataclass(frozen=True, slots=True)
class Estimates:
    """Share of right answers, and nats per answer, of a group of demonstrations."""

    right: Estimate
    nats: Estimate

    @classmethod
    def of(cls, right: Sequence[float], nats: Sequence[float]) -> Estimates:
        """Average both."""
        return cls(mean_over_queries(right), mean_over_queries(nats))


def _start_of_last_doubling(num_answers: int) -> int:
    start = 1
    while 2 * start < num_answers:
        start *= 2
    return start


def _start_of_last_group(num_answers: int) -> int:
    """Return where the last doubling begins, or the one before it where few answers are in the last."""
    start = _start_of_last_doubling(num_answers)
    return start if num_answers - start >= FEWEST_FOR_A_TIE else max(1, start // 2)


def _smaller_prefixes(right: Sequence[float], nats: Sequence[float], start: int) -> Iterator[tuple[int, Estimates]]:
    """Yield each smaller number of shots that can be compared, and the doubling of shots that led to it."""
    shots = 2 * FEWEST_FOR_A_TIE
    while shots <= start and LEAST_SAVING * shots <= len(right):
        yield shots, Estimates.of(right[shots // 2 : shots], nats[shots // 2 : shots])
        shots *= 2


def growth(right: Sequence[float]) -> str:
    """Say whether the last doubling of shots helped, as far as the numbers show."""
    start = _start_of_last_doubling(len(right))
    if len(right) - start < start / 2:
        # A few answers after a power of two are no doubling.
        start = max(1, start // 2)
    before, last = right[start // 2 : start], right[start:]
    if min(len(before), len(last)) < FEWEST_COMPARED:
        return "Too few demonstrations to say whether more would help."
    if all(last):
        return "Every one of the last was right."
    change = independent_difference(mean_over_queries(before), mean_over_queries(last))
    if change.mean > 0 and not change.includes_zero:
        return f"Still rising at the last doubling ({_signed(change)}): more examples should help."
    return f"No clear rise at the last doubling ({_signed(change)})."


def _on_retrieval(measured: Retrieval) -> str:
    """Say whether retrieved rows helped, on rows that are neither in the prefix nor retrieved for themselves."""
    num_rows = len(measured.without) + measured.num_too_long
    if len(measured.without) < FEWEST_ROWS:
        return (
            f"What {measured.num_retrieved} similar rows retrieved for each query add was not measured: "
            f"{measured.num_too_long} of {pluralized(num_rows, 'row')} did not fit the context after the prefix, with "
            "them or without."
        )
    change = paired_difference(measured.without, measured.with_retrieved)
    without, with_retrieved = (mean_over_queries(scores).mean for scores in (measured.without, measured.with_retrieved))
    too_long = f" ({measured.num_too_long} more were too long)" if measured.num_too_long else ""
    said = (
        f"Measured on {pluralized(len(measured.without), 'row')} that the prefix does not hold{too_long}, in "
        f"{measured.seconds:.0f} s: {without:.2f} right, {with_retrieved:.2f} with {measured.num_retrieved} similar "
        f"rows retrieved for each"
    )
    if change.includes_zero:
        return f"{said}, a tie within the noise ({_signed(change)})."
    if change.mean < 0:
        return f"{said} ({_signed(change)}): do not retrieve."
    return f"{said} ({_signed(change)}): compile and answer with `--retrieve {measured.num_retrieved}`."


def _signed(difference: Estimate) -> str:
    """Write a difference and its standard error."""
    error = "" if difference.standard_error is None else f" ± {difference.standard_error:.2f}"
    return f"{difference.mean:+.2f}{error}"
