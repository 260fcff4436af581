"""Records -> means with standard errors per task, per family and over families, for tables, plots and pages."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from manyicl.errors import UserError
from manyicl.evaluation.result import Result
from manyicl.evaluation.uncertainty import (
    Estimate,
    independent_difference,
    mean_of_seed_means,
    mean_over_families,
    mean_over_seeds_and_queries,
    paired_difference,
    spread,
)
from manyicl.tasks.spec import family_order
from manyicl.tasks.task import Family

OVERALL = "mean over families"
# So many draws of demonstrations, or several orders, have a line for the worst of them.
FEWEST_DRAWS_WITH_WORST = 5
# Fields of a record that hold the score of a trivial baseline.
BASELINE_FIELDS = ("majority", "tfidf", "nearest", "chance")

Point = tuple[str, str, int]  # model, task, shots
Group = str | tuple[str, ...]  # a family, `OVERALL`, or tasks by name


@dataclass(frozen=True)
class Summary:
    """What a set of records says, ready to be shown.

    Attributes:
        records: Records that count, see `summarise`.
        models: Display names, in the order in which the models were first measured; a model that retrieves rows counts
            as another one.
        shots: Requested shot counts, ascending.
        families: Task -> family, by family and name; every task that was measured.
        not_compared: Task -> why it is in no mean: a model lacks a shot count, or models were measured in different
            metrics or on different rows.
        tasks: Score of (model, task, shots), over seeds and queries.
        by_point: Records of (model, task, shots), one per seed and order of its demonstrations.
        num_superseded: Records that others of the same model and task replace.
    """

    records: tuple[Result, ...]
    models: tuple[str, ...]
    shots: tuple[int, ...]
    families: dict[str, Family]
    not_compared: dict[str, str]
    tasks: dict[Point, Estimate]
    by_point: dict[Point, tuple[Result, ...]]
    num_superseded: int

    @property
    def compared(self) -> tuple[str, ...]:
        """Tasks that can be compared between all models at all shot counts: means are over these alone."""
        return tuple(task for task in self.families if task not in self.not_compared)

    @property
    def groups(self) -> tuple[str, ...]:
        """Families of the compared tasks, in the usual order."""
        return tuple(sorted({self.families[task] for task in self.compared}, key=family_order))

    @property
    def num_orders(self) -> int:
        """Orders in which the demonstrations of a draw were measured, at most."""
        return 1 + max(record.order for record in self.records)

    @property
    def worst_label(self) -> str | None:
        """What a table calls the worst score; None where there is one order, and so few draws that it says little."""
        if self.num_orders > 1:
            return "worst draw and order"
        return "worst draw" if len({record.seed for record in self.records}) >= FEWEST_DRAWS_WITH_WORST else None

    def metrics(self, task: str) -> tuple[str, ...]:
        """Return the metrics in which a task was measured: one, but for a task that is not compared."""
        return tuple(sorted({record.metric for record in self.records if record.task == task}))

    def members(self, group: Group) -> tuple[str, ...]:
        """Return the compared tasks of a family, all of them for ``OVERALL``, or the named tasks themselves."""
        if isinstance(group, tuple):
            return group
        return tuple(task for task in self.compared if group in (OVERALL, self.families[task]))

    def score(self, model: str, group: Group, shots: int) -> Estimate | None:
        """Mean score of a group, families weighing alike; None where a task of it was not measured."""
        return self._mean(group, lambda task: self.tasks.get((model, task, shots)))

    def worst(self, model: str, group: Group, shots: int) -> Estimate | None:
        """Mean over a group of each task's worst draw and order, without an error; None where a task has one alone."""

        def of_task(task: str) -> Estimate | None:
            scores = [record.score for record in self.by_point.get((model, task, shots), ())]
            return Estimate(min(scores), None, len(scores)) if len(scores) > 1 else None

        return self._mean(group, of_task)

    def difference(self, first: str, second: str, group: Group, shots: int) -> Estimate | None:
        """Mean of second minus first, paired where ``pairing`` says so; None unless all tasks were measured."""
        return self._change(group, (first, shots), (second, shots))

    def growth(self, model: str, group: Group, fewer: int, more: int) -> Estimate | None:
        """Mean change of a model's score from fewer to more shots, paired over the same queries where they are."""
        return self._change(group, (model, fewer), (model, more))

    def _change(self, group: Group, first: tuple[str, int], second: tuple[str, int]) -> Estimate | None:
        """Mean of second minus first, each a model and a shot count."""

        def of_task(task: str) -> Estimate | None:
            before, after = (self.by_point.get((model, task, shots)) for model, shots in (first, second))
            return _difference(before, after) if before and after else None

        return self._mean(group, of_task)

    def baseline(self, name: str, group: Group, shots: int, models: Sequence[str] = ()) -> Estimate | None:
        """Mean of one of `BASELINE_FIELDS` over draws, as these models, or all, recorded it.

        None unless every task has it. A task whose models were measured in different metrics, or on different rows, has
        none.
        """

        def of_task(task: str) -> Estimate | None:
            records = [r for model in models or self.models for r in self.by_point.get((model, task, shots), ())]
            if len({(record.metric, record.data_hash) for record in records}) > 1:
                return None
            of_draw: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
            for record in records:
                if (score := getattr(record, name)) is not None:
                    of_draw[record.seed, record.order].append(score)
            return Estimate(fmean(map(fmean, of_draw.values())), None, len(of_draw)) if of_draw else None

        return self._mean(group, of_task)

    def _mean(self, group: Group, of_task: Callable[[str], Estimate | None]) -> Estimate | None:
        tasks = self.members(group)
        known = [(self.families[task], one) for task in tasks if (one := of_task(task)) is not None]
        return mean_over_families(known) if known and len(known) == len(tasks) else None


def summarise(records: Iterable[Result]) -> Summary:
    """Group records by model, task and shots, and estimate each score over seeds and queries.

    Two records of a model belong together only if they answered the same queries of the same data in the same metric,
    text format and limits. Where a folder holds several such sets for one task, those of older data, metric or format
    are superseded; of the others that with the most answers counts, the newest among equals. A record of an earlier
    version, which does not know its limit of answers, belongs to any.

    Raises:
        UserError: If there is no record.
    """
    # A folder may hold a copy of another one.
    distinct = {(r.stem, r.model_name, r.model_fingerprint, r.created): r for r in records}
    everything = sorted(distinct.values(), key=lambda record: record.created)
    if not everything:
        raise UserError("no_results", "there is no result to show", remedy="Run `manyicl evaluate` first.")
    names = _display_names(everything)
    of_task: defaultdict[tuple[str, str], list[Result]] = defaultdict(list)
    for record in everything:
        of_task[names[_model(record)], record.task].append(record)
    groups: defaultdict[Point, list[Result]] = defaultdict(list)
    for (model, task), own in of_task.items():
        for record in _that_count(own):
            groups[model, task, record.num_shots].append(record)
    by_point = {point: tuple(sorted(draws, key=lambda r: (r.seed, r.order))) for point, draws in groups.items()}
    records = tuple(record for draws in by_point.values() for record in draws)
    families = dict(sorted({r.task: r.family for r in records}.items(), key=lambda i: (family_order(i[1]), i[0])))
    measured = {(model, shots) for model, _, shots in by_point}
    return Summary(
        records=records,
        models=tuple(dict.fromkeys(names.values())),
        shots=tuple(sorted({shots for _, shots in measured})),
        families=families,
        not_compared={
            task: why for task in families if (why := _why_not_compared(task, by_point, measured)) is not None
        },
        tasks={point: estimate(draws) for point, draws in by_point.items()},
        by_point=by_point,
        num_superseded=len(everything) - len(records),
    )


def _why_not_compared(
    task: str, by_point: Mapping[Point, Sequence[Result]], measured: Iterable[tuple[str, int]]
) -> str | None:
    """Say why a task can be in no mean; None if it can be."""
    points = [by_point.get((model, task, shots), ()) for model, shots in measured]
    if not all(points):
        return "some model lacks a shot count there"
    records = [record for point in points for record in point]
    if len({record.metric for record in records}) > 1:
        return "the models were measured in different metrics there"
    if len({record.data_hash for record in records}) > 1:
        return "its rows, answers, labels or instruction changed between the measurements; evaluate the models again"
    return None


def estimate(records: Sequence[Result]) -> Estimate:
    """Estimate the score of a task from its records, one per seed and order, that answered the same queries."""
    draws = _draws(records)
    tables = [draw.query_scores for draw in draws if draw.query_scores is not None]
    if len(tables) == len(draws):
        return mean_over_seeds_and_queries(tables)
    return mean_of_seed_means([d.score for d in draws], [d.standard_error for d in draws], records[0].num_queries)


class _Draw(NamedTuple):
    """One draw of demonstrations, averaged over the orders in which they were measured.

    Attributes:
        conditions: What two draws have in common if they may be paired.
        score: Score of the draw.
        standard_error: Its standard error over queries; None for one query.
        query_scores: Scores of the queries, (Q,); None where only the whole set has a score.
        resampled_scores: Scores of resampled queries; None where each query has a score.
    """

    conditions: tuple[object, ...]
    score: float
    standard_error: float | None
    query_scores: NDArray[np.float64] | None
    resampled_scores: NDArray[np.float64] | None


def _draws(records: Sequence[Result]) -> list[_Draw]:
    """Average the records of each draw, so that its orders do not count as independent draws."""
    orders: defaultdict[int, list[Result]] = defaultdict(list)
    for record in records:
        orders[record.seed].append(record)
    found = []
    for seed, own in sorted(orders.items()):
        errors = [record.standard_error for record in own if record.standard_error is not None]
        conditions = seed, tuple((r.order, r.queries_hash, r.data_hash, r.metric) for r in own)
        found.append(
            _Draw(
                conditions,
                fmean(record.score for record in own),
                fmean(errors) if len(errors) == len(own) else None,
                _mean_scores([record.query_scores for record in own]),
                _mean_scores([record.resampled_scores for record in own]),
            )
        )
    return found


def _mean_scores(scores: Sequence[tuple[float, ...] | None]) -> NDArray[np.float64] | None:
    """Average scores over the orders of a draw; None where one has none."""
    known = [each for each in scores if each]
    if len(known) < len(scores):
        return None
    mean: NDArray[np.float64] = np.mean(known, axis=0)
    return mean


def _difference(first: Sequence[Result], second: Sequence[Result]) -> Estimate:
    """Estimate second minus first: paired where draws, orders and queries are the same, otherwise as independent."""
    one, other = _draws(first), _draws(second)
    # Without demonstrations there is no way in which they were chosen.
    samplings = {record.sampling for record in (*first, *second) if record.num_shots}
    are_same = len(samplings) <= 1 and [draw.conditions for draw in one] == [draw.conditions for draw in other]
    pairs = list(zip(one, other, strict=True)) if are_same else []
    scores = [(a.query_scores, b.query_scores) for a, b in pairs]
    known = [(a, b) for a, b in scores if a is not None and b is not None]
    if known and len(known) == len(pairs):
        return paired_difference([a for a, _ in known], [b for _, b in known])
    resampled = [(a.resampled_scores, b.resampled_scores) for a, b in pairs]
    errors = [spread(b - a) for a, b in resampled if a is not None and b is not None]
    if errors and len(errors) == len(pairs):
        return mean_of_seed_means([b.score - a.score for a, b in pairs], errors, first[0].num_queries, "paired")
    return independent_difference(estimate(first), estimate(second))


def _that_count(records: Sequence[Result]) -> list[Result]:
    """Return those of a model's records of a task that belong together and count; see `summarise`.

    Args:
        records: The records, in the order of their creation.
    """
    current = [record for record in records if _content(record) == _content(records[-1])]
    sets: dict[tuple[object, ...], dict[tuple[int, int, int], Result]] = {}
    limits = {record.max_answer_tokens for record in current} - {None} or {None}
    for record in current:
        for limit in limits if record.max_answer_tokens is None else (record.max_answer_tokens,):
            conditions = record.queries_hash, record.sampling, record.max_context_tokens, limit
            # One to which a record is added becomes the newest.
            points = sets.pop(conditions, {})
            points[record.num_shots, record.seed, record.order] = record
            sets[conditions] = points
    return list(max(reversed(sets.values()), key=lambda s: sum(r.num_queries for r in s.values())).values())


def _content(record: Result) -> tuple[object, ...]:
    """Return what, once it has changed, makes the earlier records of a model and task obsolete."""
    return record.data_hash, record.metric, json.dumps(record.text_format, sort_keys=True)


def _model(record: Result) -> tuple[str, str]:
    return record.line, record.model_fingerprint


def _display_names(records: Sequence[Result]) -> dict[tuple[str, str], str]:
    """Call each model by its name, with its fingerprint where two models share a name."""
    models = dict.fromkeys(map(_model, records))
    shared = Counter(name for name, _ in models)
    return {(name, hash_): f"{name} ({hash_[:8]})" if shared[name] > 1 else name for name, hash_ in models}
