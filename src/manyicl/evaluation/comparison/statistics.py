"""Records of a comparison -> its numbers: means, differences, shares of a gap, ablations, and what is measured besides.

Seen and unseen tasks are never averaged together. Within either, means are over the tasks that every regime answered
with the same queries, families weighing alike. An *arm* is one way to adapt the model; its trainings differ in their
seed alone. A *point* is an arm at a shot count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Literal

from manyicl.evaluation.comparison.arms import (
    ALL_ANSWERS,
    BASE,
    DEDICATED,
    EQUAL_ANSWERS,
    FEW_SHOT,
    LAST_ANSWER,
    ZERO_SHOT,
    Arm,
    Point,
    arm_of,
)
from manyicl.evaluation.comparison.estimates import (
    Measured,
    ScoreTable,
    ShareOfGap,
    Weighted,
    difference_of,
    family_weights,
    levels_of,
    mean_of,
    score_table,
    share_of_gap,
)
from manyicl.evaluation.comparison.records import IMPORTED, CellRecord, ComparisonRecords
from manyicl.evaluation.comparison.settings import Comparison, VariantSettings
from manyicl.evaluation.comparison.side_measures import (
    Cost,
    Forgotten,
    PositionMean,
    cost_of,
    forgotten,
    mean_by_position,
)
from manyicl.evaluation.result import Result
from manyicl.evaluation.summary import OVERALL
from manyicl.evaluation.uncertainty import Estimate
from manyicl.tasks.spec import family_order

ComparedRole = Literal["unseen", "seen"]
ROLES: tuple[ComparedRole, ...] = ("unseen", "seen")

BASELINE_LABELS = {
    "majority": "majority answer of all rows",
    "tfidf": "TF-IDF + log. reg.",
    "nearest": "nearest neighbour",
}


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
        worst: Mean over tasks and trainings of the worst draw and order; None where there is one alone.
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
    """Second minus first on the same tasks, training seeds, draws and queries.

    Attributes:
        first: The first point.
        second: The second point.
        tasks: The tasks.
        measured: The difference.
        levels: Means of the first and the second at the training seeds that both have.
    """

    first: Point
    second: Point
    tasks: tuple[str, ...]
    measured: Measured
    levels: tuple[float, float]

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
        lines: What answers, an arm or the name of a trivial baseline -> mean at each number of examples, None where it
            was not measured.
        differences: Many-shot minus dedicated at each number of examples.
    """

    tasks: tuple[str, ...]
    num_examples: tuple[int, ...]
    lines: Mapping[Arm | str, tuple[Measured | None, ...]]
    differences: tuple[Difference | None, ...]


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
        measured, levels = difference_of(one, other), levels_of(one, other)
        if measured is None or levels is None:
            return None
        return Difference(first, second, tuple(tasks), measured, levels)

    def worst(self, point: Point, tasks: Sequence[str]) -> float | None:
        """Mean over tasks of the worst draw and order of each training, averaged over the trainings."""
        weights = family_weights({task: self.families[task] for task in tasks})
        total = 0.0
        for task in tasks:
            rows = [[one.score for one in row] for row in self.results.get((point.arm, task, point.shots), {}).values()]
            if not point.shots or not rows or min(map(len, rows)) < 2:
                return None
            total += weights[task] * fmean(map(min, rows))
        return total if tasks else None

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

    @cached_property
    def in_weights_and_context(self) -> tuple[Point, Point] | None:
        """Dedicated models and many-shot at the largest number of examples that both have.

        Where there is none, each with its most; None where either was not measured.
        """
        model, shots = self.point(ALL_ANSWERS), self.shots_of(ALL_ANSWERS)
        if model is None or not self.dedicated:
            return None
        equal = [(arm, count) for arm in self.dedicated if (count := arm.num_examples) in shots and count is not None]
        if not equal:
            return Point(self.dedicated[-1], 0), model
        arm, count = equal[-1]
        return Point(arm, 0), Point(ALL_ANSWERS, count)

    def differences(self, role: str) -> list[Difference]:
        """The differences that sentences speak of: many-shot, all answers, against every other regime."""
        tasks, with_dedicated = self.compared(role), self.dedicated_tasks(role)
        model = self.point(ALL_ANSWERS)
        found = [
            self.difference(point, model, tasks) for arm in (BASE, ZERO_SHOT, FEW_SHOT) for point in self.points(arm)
        ]
        found.append(self.difference(self.point(LAST_ANSWER), model, tasks))
        found.append(self.difference(self.point(LAST_ANSWER), self.point(EQUAL_ANSWERS), tasks))
        if (pair := self.in_weights_and_context) is not None:
            found.append(self.difference(*pair, with_dedicated))
        for arm in self.arms:
            if arm.replay:
                found.append(self.difference(self.point(Arm(arm.regime)), self.point(arm), tasks))
            if arm.regime == "import":
                found.append(self.difference(self.point(arm), model, tasks))
        return [one for one in found if one is not None]

    def shares(self, role: str) -> dict[Point, ShareOfGap]:
        """Share of the gap between base and dedicated models that many-shot closes, by the point of the base.

        The base has no example, or as many as the many-shot model.
        """
        tasks, pair = self.dedicated_tasks(role), self.in_weights_and_context
        if pair is None:
            return {}
        upper, middle = (self.weighted(point, tasks) for point in pair)
        found: dict[Point, ShareOfGap] = {}
        for point in dict.fromkeys(Point(BASE, shots) for shots in (0, pair[1].shots)):
            lower = self.weighted(point, tasks)
            if lower is None or middle is None or upper is None:
                continue
            if _same_queries(lower, middle) and _same_queries(lower, upper):
                share = share_of_gap(lower, middle, upper)
                found |= {point: share} if share is not None else {}
        return found

    # Examples in context against examples in weights

    def in_weights(self, role: str) -> InWeights | None:
        """Compare many-shot after N examples with models that were trained on N examples of the task."""
        tasks = self.dedicated_tasks(role)
        if not tasks:
            return None
        counts = tuple(arm.num_examples or 0 for arm in self.dedicated)
        lines: dict[Arm | str, tuple[Measured | None, ...]] = {
            DEDICATED: tuple(self.score(Point(arm, 0), tasks) for arm in self.dedicated)
        }
        for arm in (ALL_ANSWERS, BASE):
            lines[arm] = tuple(self.score(Point(arm, count), tasks) for count in counts)
        for name in BASELINE_LABELS:
            lines[name] = tuple(self.baseline(name, count, tasks) for count in counts)
        for arm in self.arms:
            if arm.imported is not None and (point := self.point(arm)) is not None:
                lines[arm] = (self.score(point, tasks),) * len(counts)
        known = {key: cells for key, cells in lines.items() if any(cell is not None for cell in cells)}
        differences = tuple(
            self.difference(Point(arm, 0), Point(ALL_ANSWERS, count), tasks)
            for arm, count in zip(self.dedicated, counts, strict=True)
        )
        return InWeights(tasks, counts, known, differences)

    def baseline(self, name: str, shots: int, tasks: Sequence[str]) -> Measured | None:
        """Mean of a trivial baseline that knows the same demonstrations, or, of the majority answer, all training rows.

        None unless every task has it. Every draw and order counts once, whatever the number of models that had it.
        """
        scores = []
        for task in tasks:
            found: dict[tuple[int, int], float] = {}
            for arm in self.arms:
                draws = self.results.get((arm, task, shots), {}) if arm.is_main else {}
                found |= {
                    (one.seed, one.order): value
                    for row in draws.values()
                    for one in row
                    if (value := getattr(one, name, None)) is not None
                }
            scores.append(fmean(found.values()) if found else None)
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
            if not arm.variant and (means := mean_by_position(scores)):
                found[arm] = means
        return {arm: found[arm] for arm in self.arms if arm in found}

    def forgotten(self) -> dict[Arm, Forgotten]:
        """What each arm lost elsewhere; the base is where all began."""
        base = next((one for cell in self.cells.get(BASE, ()) for one in cell.forgetting), None)
        found = {arm: forgotten(self.cells.get(arm, ()), base) for arm in self.arms if arm != BASE}
        return {arm: one for arm, one in found.items() if one is not None}

    def costs(self) -> dict[Arm, Cost]:
        """What each arm costs to train."""
        return {arm: cost_of(self.cells[arm]) for arm in self.arms if self.cells.get(arm)}

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
