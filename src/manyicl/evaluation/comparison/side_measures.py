"""What is measured of the trainings of an arm besides its scores: accuracy by position, forgetting, cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from manyicl.evaluation.comparison.records import CellRecord, Forgetting, PositionScore
from manyicl.evaluation.uncertainty import Estimate


@dataclass(frozen=True)
class PositionMean:
    """Accuracy of the demonstrations at some positions of a sequence, each answered after those before it."""

    first: int
    last: int
    accuracy: float
    num_answers: int
    num_tasks: int


@dataclass(frozen=True)
class Forgotten:
    """What an arm lost elsewhere.

    Attributes:
        before: Nats per token of general text of the base, on average over the trainings.
        after: The same after training.
        rise: After minus before, over trainings; the text is the same for all.
        probes: Score on the probe tasks, before and after.
        steps: Step -> rise, along training, for the steps that every training measured.
    """

    before: float | None
    after: float | None
    rise: Estimate | None
    probes: tuple[float, float] | None
    steps: Mapping[int, float]


@dataclass(frozen=True)
class Cost:
    """What a training of an arm costs, on average over the training seeds; of dedicated models, all of them.

    Attributes:
        num_models: Models that one seed trains.
        learning_rates: Rates in use.
        peak_memory_gib: Most memory of any training, if it was recorded.
    """

    num_models: int
    num_trainings: int
    num_steps: float
    num_tokens: float
    num_answers: float
    seconds: float
    peak_memory_gib: float | None
    learning_rates: tuple[float, ...]


def mean_by_position(scores: Sequence[PositionScore]) -> list[PositionMean]:
    """Average tasks at each range of positions; tasks that are too long to reach far are in none."""
    by_task: defaultdict[str, defaultdict[int, list[PositionScore]]] = defaultdict(lambda: defaultdict(list))
    for one in scores:
        # The last range of a task ends with its demonstrations.
        by_task[one.task][one.first].append(one)
    if not by_task:
        return []
    reach = sorted((max(ranges) for ranges in by_task.values()), reverse=True)
    far = reach[(len(reach) - 1) // 2]
    ranges = [by_task[task] for task in by_task if far in by_task[task]]
    means = []
    for first in sorted(set.intersection(*(set(one) for one in ranges))):
        if first <= far:
            cells = [one[first] for one in ranges]
            found = [score for one in cells for score in one]
            accuracy = fmean(fmean(score.accuracy or 0.0 for score in one) for one in cells)
            num_answers, last = sum(score.num_answers for score in found), max(score.last for score in found)
            means.append(PositionMean(first, last, accuracy, num_answers, len(cells)))
    return means


def forgotten(cells: Sequence[CellRecord], base: Forgetting | None) -> Forgotten | None:
    """Compare the last measurement of each training with its first, or with that of the base."""
    pairs = []
    by_step: defaultdict[int, list[float]] = defaultdict(list)
    for cell in cells:
        moments = sorted(cell.forgetting, key=lambda one: one.step)
        before = next((one for one in moments if one.step == 0), base)
        if not moments or before is None or (before is moments[-1] and cell.num_steps):
            continue
        pairs.append((before, moments[-1]))
        for one in [before, *moments]:
            if one.nats_per_token is not None and before.nats_per_token is not None:
                by_step[one.step].append(one.nats_per_token - before.nats_per_token)
    if not pairs:
        return None
    nats = [(a.nats_per_token, b.nats_per_token) for a, b in pairs]
    known = [(a, b) for a, b in nats if a is not None and b is not None]
    probes = [(fmean(a.probes.values()), fmean(b.probes.values())) for a, b in pairs if a.probes and b.probes]
    return Forgotten(
        before=fmean(a for a, _ in known) if known else None,
        after=fmean(b for _, b in known) if known else None,
        rise=_over_trainings([b - a for a, b in known]),
        probes=(fmean(a for a, _ in probes), fmean(b for _, b in probes)) if probes else None,
        steps={step: fmean(rises) for step, rises in sorted(by_step.items()) if len(rises) >= len(pairs)},
    )


def _over_trainings(values: Sequence[float]) -> Estimate | None:
    """Mean over trainings with the error of having trained these; no error for one."""
    if not values:
        return None
    mean, count = fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, count, pairing="paired")
    error = (sum((value - mean) ** 2 for value in values) / (count - 1) / count) ** 0.5
    return Estimate(mean, error, count, count - 1, "paired")


def cost_of(cells: Sequence[CellRecord]) -> Cost:
    """Average what the trainings of an arm took over their seeds, of several models over seeds that have them all."""
    num_models = len({cell.task for cell in cells})
    of_seed = Counter(cell.training_seed for cell in cells)
    seeds = {seed for seed, count in of_seed.items() if count == num_models} or set(of_seed)
    cells = [cell for cell in cells if cell.training_seed in seeds]
    memory = [cell.peak_memory_gib for cell in cells if cell.peak_memory_gib is not None]

    def per_seed(values: Iterable[float]) -> float:
        return sum(values) / len(seeds)

    return Cost(
        num_models=num_models,
        num_trainings=len(seeds),
        num_steps=per_seed(cell.num_steps for cell in cells),
        num_tokens=per_seed(cell.num_tokens for cell in cells),
        num_answers=per_seed(cell.num_answers for cell in cells),
        seconds=per_seed(cell.seconds for cell in cells),
        peak_memory_gib=max(memory, default=None),
        learning_rates=tuple(sorted({cell.learning_rate for cell in cells if cell.learning_rate is not None})),
    )
