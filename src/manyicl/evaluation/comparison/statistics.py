"""Records of a comparison -> its numbers: means, differences, shares of a gap, forgetting, cost, and what is missing.

Seen and unseen tasks are never averaged together. Within either, means are over the tasks that every regime answered
with the same queries, families weighing alike. An *arm* is one way to adapt the model; its trainings differ in their
seed alone. A *point* is an arm at a shot count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Literal

from manyicl.errors import pluralized
from manyicl.evaluation.comparison.estimates import (
    Measured,
    ScoreTable,
    ShareOfGap,
    Weighted,
    difference_of,
    family_weights,
    mean_of,
    score_table,
    share_of_gap,
)
from manyicl.evaluation.comparison.records import CellRecord, ComparisonRecords, Forgetting, PositionScore
from manyicl.evaluation.comparison.settings import Comparison, VariantSettings
from manyicl.evaluation.grid import CellState
from manyicl.evaluation.result import Result
from manyicl.evaluation.summary import OVERALL
from manyicl.evaluation.uncertainty import Estimate
from manyicl.tasks.spec import family_order

ComparedRole = Literal["unseen", "seen"]
ROLES: tuple[ComparedRole, ...] = ("unseen", "seen")

IMPORTED = "import_"
# Cells that wait which a sentence names.
MOST_NAMED = 6
_REGIMES = {
    "base": "base",
    "zero_shot": "zero-shot",
    "few_shot": "few-shot",
    "last_answer": "many-shot, last answer",
    "all_answers": "many-shot, all answers",
    "dedicated": "one model per task",
    "import": "imported",
}
_BASELINES = {"majority": "majority answer", "tfidf": "TF-IDF + log. reg.", "nearest": "nearest neighbour"}


@dataclass(frozen=True)
class Arm:
    """One way to adapt the model.

    Attributes:
        regime: Its regime, or ``import`` for answers that were given as a file.
        replay: Whether general text was replayed.
        variant: Name of an ablation of all answers.
        equal_answers: Whether it has as many supervised answers as the last-answer regime, and so fewer tokens.
        num_examples: Examples that a dedicated model was trained on.
        imported: Name of imported answers.
    """

    regime: str
    replay: bool = False
    variant: str | None = None
    equal_answers: bool = False
    num_examples: int | None = None
    imported: str | None = None

    @property
    def label(self) -> str:
        """What tables and plots call it."""
        if self.imported is not None:
            return f"imported: {self.imported}"
        if self.variant is not None:
            return f"variant {self.variant}"
        name = _REGIMES.get(self.regime, self.regime)
        if self.num_examples is not None:
            name = f"{name}, {pluralized(self.num_examples, 'example')}"
        return name + (", equal answers" if self.equal_answers else "") + (" + replay" if self.replay else "")

    @property
    def is_main(self) -> bool:
        """Whether it is one of the regimes with one model for all tasks, at the common budget, without replay."""
        return self.regime not in ("dedicated", "import") and not (self.replay or self.variant or self.equal_answers)

    @property
    def place(self) -> tuple[object, ...]:
        """Its place among other arms."""
        order = list(_REGIMES).index(self.regime) if self.regime in _REGIMES else len(_REGIMES)
        return (
            (self.variant or "", order, self.replay, self.equal_answers),
            (self.num_examples or 0, self.imported or ""),
        )


BASE, ZERO_SHOT, FEW_SHOT = Arm("base"), Arm("zero_shot"), Arm("few_shot")
LAST_ANSWER, ALL_ANSWERS = Arm("last_answer"), Arm("all_answers")
EQUAL_ANSWERS = Arm("all_answers", equal_answers=True)


@dataclass(frozen=True)
class Point:
    """An arm at a shot count."""

    arm: Arm
    shots: int

    @property
    def label(self) -> str:
        """What tables call it: dedicated models are evaluated without demonstrations, as everyone knows."""
        if self.arm.regime in ("dedicated", "import"):
            return self.arm.label
        return f"{self.arm.label}, {pluralized(self.shots, 'shot')}"


@dataclass(frozen=True)
class Plan:
    """What a comparison was to be, as far as its numbers need it.

    Attributes:
        model: The base model, as it was given.
        shots: Shot counts, ascending.
        few_shot: Demonstrations of few-shot fine-tuning.
        num_training_seeds: Trainings of each regime.
        num_draws: Draws of demonstrations per training.
        budget: What regimes have in common.
        num_tokens: Tokens of a training.
        regimes: Regimes to be compared.
        dedicated_examples: Examples of dedicated models.
        dedicated_budget: ``each`` where every dedicated model gets the whole budget, ``share`` where they share it.
        variants: Ablation -> what it changes.
    """

    model: str = "the base"
    shots: tuple[int, ...] = ()
    few_shot: int = 16
    num_training_seeds: int = 1
    num_draws: int = 1
    budget: str = "tokens"
    num_tokens: int | None = None
    regimes: tuple[str, ...] = ()
    dedicated_examples: tuple[int, ...] = ()
    dedicated_budget: str | None = None
    variants: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of a table of means.

    Attributes:
        point: The arm and the shot count.
        cells: Group of tasks -> mean, None where a task of it was not measured.
        worst: Mean over tasks of the worst of all draws, orders and trainings; None where there is one alone.
    """

    point: Point
    cells: Mapping[str, Measured | None]
    worst: float | None

    @property
    def overall(self) -> Measured | None:
        """Mean over families."""
        return self.cells.get(OVERALL)


@dataclass(frozen=True)
class Difference:
    """Second minus first on the same tasks, training seeds, draws and queries."""

    first: Point
    second: Point
    tasks: tuple[str, ...]
    measured: Measured

    @property
    def reading(self) -> Literal["higher", "lower", "not distinguishable", "one training"]:
        """What the difference shows of the second: nothing where its interval holds zero, or there is none."""
        if self.measured.is_distinct is None:
            return "one training"
        if not self.measured.is_distinct:
            return "not distinguishable"
        return "higher" if self.measured.mean > 0 else "lower"


@dataclass(frozen=True)
class InWeights:
    """Examples in context against the same number of examples in weights.

    Attributes:
        tasks: Tasks with dedicated models on every number of examples.
        num_examples: Numbers of examples, ascending.
        lines: What answers -> mean at each number of examples, None where it was not measured.
        differences: Many-shot minus dedicated at each number of examples.
    """

    tasks: tuple[str, ...]
    num_examples: tuple[int, ...]
    lines: Mapping[str, tuple[Measured | None, ...]]
    differences: tuple[Difference | None, ...]


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


@dataclass(frozen=True)
class Statistics:
    """The numbers of a comparison, finished or not.

    Attributes:
        plan: What was to be compared.
        families: Task -> family, of all tasks with a role.
        roles: Task -> role.
        cells: Finished cells of each arm.
        results: Arm, task and shot count -> training seed -> results, one per draw.
    """

    plan: Plan
    families: Mapping[str, str]
    roles: Mapping[str, str]
    cells: Mapping[Arm, tuple[CellRecord, ...]]
    results: Mapping[tuple[Arm, str, int], Mapping[int, Sequence[Result]]]

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """Arms with a result or a finished cell, in the order of tables."""
        return tuple(sorted({*self.cells, *(arm for arm, _, _ in self.results)}, key=lambda arm: arm.place))

    @cached_property
    def tables(self) -> dict[tuple[Arm, str, int], ScoreTable | None]:
        """Score tables of all points and tasks; None where results do not belong together."""
        return {
            (arm, task, shots): score_table(draws, is_constant=_is_constant(arm, shots))
            for (arm, task, shots), draws in self.results.items()
        }

    @cached_property
    def all_results(self) -> tuple[Result, ...]:
        """Every result that counts."""
        return tuple(one for rows in self.results.values() for row in rows.values() for one in row)

    @cached_property
    def _shots(self) -> dict[Arm, tuple[int, ...]]:
        found: defaultdict[Arm, set[int]] = defaultdict(set)
        for arm, _, shots in self.results:
            found[arm].add(shots)
        return {arm: tuple(sorted(counts)) for arm, counts in found.items()}

    def shots_of(self, arm: Arm) -> tuple[int, ...]:
        """Shot counts at which an arm was measured, ascending."""
        return self._shots.get(arm, ())

    def points(self, arm: Arm) -> tuple[Point, ...]:
        """Return the points that an arm was made for; the base, made for none, without and with all examples."""
        measured = self.shots_of(arm)
        if not measured:
            return ()
        if arm.regime == "base":
            return tuple(Point(arm, shots) for shots in dict.fromkeys((measured[0], measured[-1])))
        if arm.regime in ("zero_shot", "dedicated", "import"):
            return (Point(arm, measured[0]),)
        if arm.regime == "few_shot":
            return (Point(arm, max((n for n in measured if n <= self.plan.few_shot), default=measured[0])),)
        return (Point(arm, measured[-1]),)

    def point(self, arm: Arm) -> Point | None:
        """Return the point that an arm was made for; of the base, that with all examples."""
        return next(reversed(self.points(arm)), None)

    # Which tasks

    def tasks_of(self, role: str) -> tuple[str, ...]:
        """Tasks of a role, by family and name."""
        tasks = [task for task, its_role in self.roles.items() if its_role == role]
        return tuple(sorted(tasks, key=lambda task: (family_order(self.families[task]), task)))

    def compared(self, role: str) -> tuple[str, ...]:
        """Tasks of a role that every regime answered, with the same queries; means are over these alone."""
        return self._compared.get(role, ())

    @cached_property
    def _compared(self) -> dict[str, tuple[str, ...]]:
        return {
            role: tuple(task for task in self.tasks_of(role) if self.why_not_compared(role, task) is None)
            for role in ROLES
        }

    def why_not_compared(self, role: str, task: str) -> str | None:
        """Say why a task is in no mean; None if it is."""
        tables = {point: self.tables.get((point.arm, task, point.shots)) for point in self._needed[role]}
        if not tables:
            return "nothing was measured on it yet"
        missing = [point.label for point, table in tables.items() if table is None]
        if missing:
            return f"no usable result of {', '.join(missing)}"
        if len({table.queries_hash for table in tables.values() if table is not None}) > 1:
            return "the regimes did not answer the same queries"
        return None

    @cached_property
    def _needed(self) -> defaultdict[str, list[Point]]:
        """Points of the regimes of one model for all tasks that were measured on some task of a role."""
        measured = dict.fromkeys((self.roles.get(task, ""), arm) for arm, task, _ in self.results)
        found: defaultdict[str, list[Point]] = defaultdict(list)
        for role, arm in sorted(measured, key=lambda pair: pair[1].place):
            if arm.is_main:
                found[role] += self.points(arm)
        return found

    def groups(self, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return the tasks of the mean over families and, if there are several, those of each family."""
        families = sorted({self.families[task] for task in tasks}, key=family_order)
        members = {family: tuple(task for task in tasks if self.families[task] == family) for family in families}
        return {OVERALL: tuple(tasks), **(members if len(families) > 1 else {})}

    def dedicated_tasks(self, role: str) -> tuple[str, ...]:
        """Compared tasks with a dedicated model on every number of examples that any task has one on."""
        arms = [arm for arm in self.arms if arm.regime == "dedicated"]
        tasks = [task for task in self.compared(role) if arms]
        return tuple(task for task in tasks if all(self.tables.get((arm, task, 0)) is not None for arm in arms))

    # Means and differences

    def weighted(self, point: Point, tasks: Sequence[str]) -> Weighted | None:
        """Return the tables of tasks with their weights; None where one is missing."""
        weights = family_weights({task: self.families[task] for task in tasks})
        tables = [(weights[task], self.tables.get((point.arm, task, point.shots))) for task in tasks]
        known = [(weight, table) for weight, table in tables if table is not None]
        return known if tasks and len(known) == len(tables) else None

    def score(self, point: Point, tasks: Sequence[str]) -> Measured | None:
        """Mean over tasks, families weighing alike."""
        weighted = self.weighted(point, tasks)
        return mean_of(weighted) if weighted is not None else None

    def difference(self, first: Point | None, second: Point | None, tasks: Sequence[str]) -> Difference | None:
        """Second minus first, paired; None where either was not measured, or on other queries."""
        if first is None or second is None:
            return None
        one, other = self.weighted(first, tasks), self.weighted(second, tasks)
        if one is None or other is None or not _same_queries(one, other):
            return None
        measured = difference_of(one, other)
        return Difference(first, second, tuple(tasks), measured) if measured is not None else None

    def worst(self, point: Point, tasks: Sequence[str]) -> float | None:
        """Mean over tasks of the worst score of any draw, order and training."""
        weights = family_weights({task: self.families[task] for task in tasks})
        scores = [
            [result.score for row in self.results.get((point.arm, task, point.shots), {}).values() for result in row]
            for task in tasks
        ]
        if not scores or _is_constant(point.arm, point.shots) or min(map(len, scores)) < 2:
            return None
        return sum(weights[task] * min(one) for task, one in zip(tasks, scores, strict=True))

    def row(self, point: Point, tasks: Sequence[str]) -> Row:
        """Return a line of a table over these tasks and their families."""
        cells = {group: self.score(point, members) for group, members in self.groups(tasks).items()}
        return Row(point, cells, self.worst(point, tasks))

    def headline(self, role: str) -> list[Row]:
        """Each arm at the shots it was made for, on the compared tasks; without ablations."""
        tasks = self.compared(role)
        points = (point for arm in self.arms if not arm.variant for point in self.points(arm))
        return [row for point in points if (row := self.row(point, tasks)).overall is not None]

    def beside_dedicated(self, role: str) -> list[Row]:
        """The same on the tasks that have dedicated models, where those are not all."""
        tasks = self.dedicated_tasks(role)
        if not tasks or tasks == self.compared(role):
            return []
        points = (point for arm in self.arms if not arm.variant for point in self.points(arm))
        return [row for point in points if (row := self.row(point, tasks)).overall is not None]

    def curve(self, arm: Arm, tasks: Sequence[str]) -> dict[int, Measured]:
        """Mean of an arm at every shot count."""
        scores = {shots: self.score(Point(arm, shots), tasks) for shots in self.shots_of(arm)}
        return {shots: score for shots, score in scores.items() if score is not None}

    @cached_property
    def dedicated(self) -> tuple[Arm, ...]:
        """Dedicated arms by their number of examples."""
        return tuple(arm for arm in self.arms if arm.regime == "dedicated")

    def differences(self, role: str) -> list[Difference]:
        """The differences that sentences speak of: many-shot, all answers, against every other regime."""
        tasks, with_dedicated = self.compared(role), self.dedicated_tasks(role)
        model = self.point(ALL_ANSWERS)
        found = [
            self.difference(point, model, tasks) for arm in (BASE, ZERO_SHOT, FEW_SHOT) for point in self.points(arm)
        ]
        found.append(self.difference(self.point(LAST_ANSWER), model, tasks))
        found.append(self.difference(self.point(LAST_ANSWER), self.point(EQUAL_ANSWERS), tasks))
        found += [self.difference(self.point(arm), model, with_dedicated) for arm in self.dedicated[-1:]]
        for arm in self.arms:
            if arm.replay:
                found.append(self.difference(self.point(Arm(arm.regime)), self.point(arm), tasks))
            if arm.regime == "import":
                found.append(self.difference(self.point(arm), model, tasks))
        return [one for one in found if one is not None]

    def shares(self, role: str) -> dict[Point, ShareOfGap]:
        """Share of the gap between base and dedicated models that many-shot closes, by the point of the base."""
        tasks, model = self.dedicated_tasks(role), self.point(ALL_ANSWERS)
        if model is None or not self.dedicated:
            return {}
        upper, middle = self.weighted(Point(self.dedicated[-1], 0), tasks), self.weighted(model, tasks)
        found: dict[Point, ShareOfGap] = {}
        for point in self.points(BASE):
            lower = self.weighted(point, tasks)
            if lower is None or middle is None or upper is None:
                continue
            if _same_queries(lower, middle) and _same_queries(lower, upper):
                share = share_of_gap(lower, middle, upper)
                found |= {point: share} if share is not None else {}
        return found

    # Examples in context against examples in weights

    def in_weights(self, role: str, family: str | None = None) -> InWeights | None:
        """Compare many-shot after N examples with models that were trained on N examples of the task."""
        tasks = tuple(t for t in self.dedicated_tasks(role) if family in (None, self.families[t]))
        if not tasks:
            return None
        counts = tuple(arm.num_examples or 0 for arm in self.dedicated)
        lines: dict[str, tuple[Measured | None, ...]] = {
            _REGIMES["dedicated"]: tuple(self.score(Point(arm, 0), tasks) for arm in self.dedicated)
        }
        for arm in (ALL_ANSWERS, BASE):
            lines[arm.label] = tuple(self.score(Point(arm, count), tasks) for count in counts)
        for name, label in _BASELINES.items():
            lines[label] = tuple(self.baseline(name, count, tasks) for count in counts)
        for arm in self.arms:
            if arm.imported is not None and (point := self.point(arm)) is not None:
                lines[arm.label] = (self.score(point, tasks),) * len(counts)
        known = {label: cells for label, cells in lines.items() if any(cell is not None for cell in cells)}
        differences = tuple(
            self.difference(Point(arm, 0), Point(ALL_ANSWERS, count), tasks)
            for arm, count in zip(self.dedicated, counts, strict=True)
        )
        return InWeights(tasks, counts, known, differences)

    def baseline(self, name: str, shots: int, tasks: Sequence[str]) -> Measured | None:
        """Mean of a trivial baseline that knows the same demonstrations; None unless every task has it."""
        scores = []
        for task in tasks:
            found: list[float] = []
            for arm in self.arms:
                draws = self.results.get((arm, task, shots), {}) if arm.is_main else {}
                found += [
                    value for row in draws.values() for one in row if (value := getattr(one, name, None)) is not None
                ]
            scores.append(fmean(found) if found else None)
        known = [score for score in scores if score is not None]
        if not known or len(known) < len(scores):
            return None
        weights = family_weights({task: self.families[task] for task in tasks})
        mean = sum(weights[task] * score for task, score in zip(tasks, known, strict=True))
        return Measured(Estimate(mean, None, len(known)), 0, 0, 0, len(known))

    # Along a sequence, forgetting, cost, ablations

    def positions(self, role: str = "unseen") -> dict[Arm, list[PositionMean]]:
        """Accuracy by position within a sequence, over the tasks that reach as far as half of the tasks do."""
        tasks = set(self.tasks_of(role))
        found: dict[Arm, list[PositionMean]] = {}
        for arm, cells in self.cells.items():
            scores = [one for cell in cells for one in cell.positions if one.task in tasks and one.accuracy is not None]
            if not arm.variant and (means := _mean_by_position(scores)):
                found[arm] = means
        return {arm: found[arm] for arm in self.arms if arm in found}

    def forgotten(self) -> dict[Arm, Forgotten]:
        """What each arm lost elsewhere; the base is where all began."""
        base = next((one for cell in self.cells.get(BASE, ()) for one in cell.forgetting), None)
        found = {arm: _forgotten(self.cells.get(arm, ()), base) for arm in self.arms if arm != BASE}
        return {arm: one for arm, one in found.items() if one is not None}

    def costs(self) -> dict[Arm, Cost]:
        """What each arm costs to train."""
        return {arm: _cost(self.cells[arm]) for arm in self.arms if self.cells.get(arm)}

    def ablations(self, role: str = "unseen") -> list[tuple[Row, Difference | None]]:
        """Each ablation, and how it differs from all answers at the same training seeds."""
        tasks, reference = self.compared(role), self.point(ALL_ANSWERS)
        found = []
        for arm in self.arms:
            point = self.point(arm)
            if arm.variant is not None and point is not None:
                found.append((self.row(point, tasks), self.difference(reference, point, tasks)))
        return [(row, difference) for row, difference in found if row.overall is not None]


def _is_constant(arm: Arm, shots: int) -> bool:
    """Tell whether no seed changes what an arm answers."""
    return arm.regime == "import" or (arm.regime == "base" and shots == 0)


def _same_queries(first: Weighted, second: Weighted) -> bool:
    return [table.queries_hash for _, table in first] == [table.queries_hash for _, table in second]


def _mean_by_position(scores: Sequence[PositionScore]) -> list[PositionMean]:
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


def _forgotten(cells: Sequence[CellRecord], base: Forgetting | None) -> Forgotten | None:
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


def _cost(cells: Sequence[CellRecord]) -> Cost:
    seeds = {cell.training_seed for cell in cells}
    memory = [cell.peak_memory_gib for cell in cells if cell.peak_memory_gib is not None]

    def per_seed(values: Iterable[float]) -> float:
        return sum(values) / len(seeds)

    return Cost(
        num_models=len({cell.task for cell in cells}),
        num_trainings=len(seeds),
        num_steps=per_seed(cell.num_steps for cell in cells),
        num_tokens=per_seed(cell.num_tokens for cell in cells),
        num_answers=per_seed(cell.num_answers for cell in cells),
        seconds=per_seed(cell.seconds for cell in cells),
        peak_memory_gib=max(memory, default=None),
        learning_rates=tuple(sorted({cell.learning_rate for cell in cells if cell.learning_rate is not None})),
    )


def plan_of(settings: Comparison) -> Plan:
    """Return what the file of a comparison says was to be compared."""
    compare, model = settings.compare, settings.model
    has_dedicated = "dedicated" in compare.regimes
    return Plan(
        model=model.base or (f"a new {model.from_scratch.architecture}" if model.from_scratch else "the base"),
        shots=settings.shots,
        few_shot=compare.few_shot_demonstrations,
        num_training_seeds=compare.num_training_seeds,
        num_draws=compare.num_draws,
        budget=compare.budget,
        num_tokens=settings.training.num_tokens,
        regimes=compare.regimes,
        dedicated_examples=compare.dedicated.num_examples if has_dedicated else (),
        dedicated_budget=compare.dedicated.budget if has_dedicated else None,
        variants={name: _changes(one) for name, one in compare.variants.items()},
    )


def _changes(variant: VariantSettings) -> str:
    share = [] if variant.task_share == 1 else [f"{variant.task_share:.0%} of the training tasks"]
    return ", ".join([*variant.set, *share])


def arm_of(cell: CellRecord) -> Arm:
    """Return the arm that a cell is a training of."""
    return Arm(cell.regime, cell.replay, cell.variant, cell.equal == "answers", cell.num_examples)


def statistics_of(records: ComparisonRecords) -> Statistics:
    """Sort the records of a comparison by arm, task and shot count; results of unfinished cells do not count."""
    plan = plan_of(records.settings)
    cells = {cell.name: cell for cell in records.cells}
    by_arm: defaultdict[Arm, list[CellRecord]] = defaultdict(list)
    for cell in records.cells:
        by_arm[arm_of(cell)].append(cell)
    found: defaultdict[tuple[Arm, str, int], defaultdict[int, dict[tuple[int, int], Result]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for result in sorted(records.results, key=lambda one: one.created):
        if result.num_retrieved or result.task not in records.roles:
            continue
        name = result.model_name
        if name in cells:
            arm, seed = arm_of(cells[name]), cells[name].training_seed
        elif name.startswith(IMPORTED):
            arm, seed = Arm("import", imported=name.removeprefix(IMPORTED)), 0
        else:
            continue
        found[arm, result.task, result.num_shots][seed][result.seed, result.order] = result
    return Statistics(
        plan=plan,
        families={task: one.family for task, one in records.roles.items()},
        roles={task: one.role for task, one in records.roles.items()},
        cells={arm: tuple(its_cells) for arm, its_cells in by_arm.items()},
        results={
            point: {row: [draws[seed] for seed in sorted(draws)] for row, draws in sorted(rows.items())}
            for point, rows in found.items()
        },
    )


def omissions(records: ComparisonRecords, statistics: Statistics) -> list[str]:
    """Say in sentences what is missing from the numbers, and why."""
    plan = statistics.plan
    waiting = [report.cell.name for report in records.failures if report.state is CellState.WAITING]
    others = [report for report in records.failures if report.state is not CellState.WAITING]
    lines = [report.sentence().removesuffix(".") + "." for report in others]
    if waiting:
        more = "" if len(waiting) <= MOST_NAMED else f" and {len(waiting) - MOST_NAMED} more"
        lines.append(f"{pluralized(len(waiting), 'cell')} not started: {', '.join(waiting[:MOST_NAMED])}{more}.")
    cells = {cell.name for cell in records.cells}
    unfinished = {r.model_name for r in records.results if r.model_name not in cells} - {
        r.model_name for r in records.results if r.model_name.startswith(IMPORTED)
    }
    lines += [f"{name}: its results do not count, since the cell is not done." for name in sorted(unfinished)]
    trained = {arm.regime for arm in statistics.cells}
    lines += [
        f"{_REGIMES.get(name, name)}: no cell of this regime is done." for name in plan.regimes if name not in trained
    ]
    for arm, its_cells in statistics.cells.items():
        num_seeds = len({cell.training_seed for cell in its_cells})
        if not arm.variant and num_seeds < plan.num_training_seeds:
            lines.append(f"{arm.label}: {num_seeds} of {pluralized(plan.num_training_seeds, 'seed')} done.")
    for role in ROLES:
        for task in statistics.tasks_of(role):
            if (reason := statistics.why_not_compared(role, task)) is not None:
                lines.append(f"{task} ({role}) is in no mean: {reason}.")
        compared, with_models = statistics.compared(role), statistics.dedicated_tasks(role)
        if statistics.dedicated and len(with_models) < len(compared):
            number = f"{len(compared) - len(with_models)} of {pluralized(len(compared), f'{role} task')}"
            lines.append(f"{number} without a model per task of every size, and in no comparison with those.")
    return lines
