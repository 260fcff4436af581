"""Records -> means with errors per task, family and over families, as tables, plots and pages show them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from manyicl.errors import UserError
from manyicl.evaluation.result import Result
from manyicl.evaluation.uncertainty import (
    Estimate,
    estimate_over_tasks,
    independent_difference,
    mean_of_seed_means,
    mean_over_families,
    mean_over_seeds_and_queries,
    paired_difference,
    spread,
)
from manyicl.tasks.task import FAMILIES

OVERALL = "mean over families"

Point = tuple[str, str, int]  # model, task, shots


@dataclass(frozen=True)
class Summary:
    """What a set of records says, ready to be shown.

    Attributes:
        records: Records that count, see `summarise`.
        models: Display names, in the order in which the models were first measured.
        shots: Requested shot counts, ascending.
        families: Task -> family, by family and name; every task that was measured.
        compared: Tasks measured at every shot count of every model: means are over these alone.
        tasks: Score of (model, task, shots), over seeds and queries.
        by_point: Records of (model, task, shots), one per seed.
        num_superseded: Records that newer ones of the same model and task replace.
    """

    records: tuple[Result, ...]
    models: tuple[str, ...]
    shots: tuple[int, ...]
    families: dict[str, str]
    compared: tuple[str, ...]
    tasks: dict[Point, Estimate]
    by_point: dict[Point, tuple[Result, ...]]
    num_superseded: int

    @property
    def groups(self) -> tuple[str, ...]:
        """Families of the compared tasks, in the usual order."""
        present = {self.families[task] for task in self.compared}
        return tuple(family for family in FAMILIES if family in present)

    @property
    def not_compared(self) -> tuple[str, ...]:
        """Tasks that lack a point of some model, and are therefore in no mean."""
        return tuple(task for task in self.families if task not in self.compared)

    def members(self, group: str) -> tuple[str, ...]:
        """Return the compared tasks of a family, or all of them for ``OVERALL``."""
        return tuple(task for task in self.compared if group in (OVERALL, self.families[task]))

    def shots_of(self, model: str) -> tuple[int, ...]:
        """Return the shot counts at which a model was measured."""
        return tuple(sorted({shots for name, _, shots in self.tasks if name == model}))

    def score(self, model: str, group: str, shots: int) -> Estimate | None:
        """Mean of a family, or over families for ``OVERALL``; None where it was not measured."""
        members = self.members(group)
        if not members or any((model, task, shots) not in self.tasks for task in members):
            return None
        return mean_over_families([(self.families[t], self.tasks[model, t, shots]) for t in members])

    def score_over_tasks(self, model: str, shots: int) -> Estimate | None:
        """Mean over families with the error of having chosen these tasks; None with too few of them."""
        if self.score(model, OVERALL, shots) is None:
            return None
        return estimate_over_tasks([(self.families[t], self.tasks[model, t, shots].mean) for t in self.compared])

    def difference(self, first: str, second: str, group: str, shots: int) -> Estimate | None:
        """Mean of second minus first, paired where ``pairing`` says so; None unless all tasks were measured."""
        members = self.members(group)
        points = [(self.by_point.get((first, t, shots)), self.by_point.get((second, t, shots))) for t in members]
        pairs = [(before, after) for before, after in points if before and after]
        if not members or len(pairs) < len(members):
            return None
        families = (self.families[task] for task in members)
        return mean_over_families([(family, _difference(*pair)) for family, pair in zip(families, pairs, strict=True)])

    def task_level(self, level: str, task: str, shots: int | None = None) -> float | None:
        """Level of a task, over the seeds and models that recorded it: chance, majority or tfidf."""
        values = [
            value
            for record in self.records
            if record.task == task and shots in (None, record.num_shots)
            if (value := getattr(record, level)) is not None
        ]
        return fmean(values) if values else None

    def level(self, level: str, group: str, shots: int | None = None) -> float | None:
        """Mean of a level, families weighing alike; None unless every compared task of the group has it."""
        values = [(self.families[task], self.task_level(level, task, shots)) for task in self.members(group)]
        known = [(family, Estimate(value, 0.0, 1)) for family, value in values if value is not None]
        return mean_over_families(known).mean if known and len(known) == len(values) else None


def summarise(records: Iterable[Result]) -> Summary:
    """Group records by model, task and shots, and estimate each score over seeds and queries.

    Two records belong together only if they answered the same queries in the same metric. Where a folder holds
    several such sets for one task, the newest counts and the others are counted as superseded.

    Raises:
        UserError: If there is no record.
    """
    # A folder may hold a copy of another one.
    distinct = {(r.stem, r.model_name, r.model_fingerprint, r.created): r for r in records}
    everything = sorted(distinct.values(), key=lambda record: record.created)
    if not everything:
        raise UserError("no_results", "there is no result to show", remedy="Run `manyicl evaluate` first.")
    kept = _newest_questions(everything)
    names = _display_names(everything)
    groups: defaultdict[Point, dict[int, Result]] = defaultdict(dict)
    for record in kept:
        point = names[record.model_name, record.model_fingerprint], record.task, record.num_shots
        groups[point][record.seed] = record
    by_point = {point: tuple(seeds[seed] for seed in sorted(seeds)) for point, seeds in groups.items()}
    families = {record.task: str(record.family) for record in kept}
    ordered = dict(sorted(families.items(), key=lambda item: (FAMILIES.index(item[1]), item[0])))
    measured = {(model, shots) for model, _, shots in by_point}
    return Summary(
        records=tuple(record for seeds in by_point.values() for record in seeds),
        models=tuple(dict.fromkeys(names[r.model_name, r.model_fingerprint] for r in everything)),
        shots=tuple(sorted({shots for _, shots in measured})),
        families=ordered,
        compared=tuple(t for t in ordered if all((model, t, shots) in by_point for model, shots in measured)),
        tasks={point: estimate(seeds) for point, seeds in by_point.items()},
        by_point=by_point,
        num_superseded=len(everything) - sum(map(len, by_point.values())),
    )


def estimate(seeds: Sequence[Result]) -> Estimate:
    """Estimate the score of a task from its records, one per seed, that answered the same queries."""
    tables = [record.query_scores for record in seeds if record.query_scores is not None]
    if len(tables) == len(seeds):
        return mean_over_seeds_and_queries(tables)
    return mean_of_seed_means(
        [record.score for record in seeds], [record.standard_error for record in seeds], seeds[0].num_queries
    )


def _difference(first: Sequence[Result], second: Sequence[Result]) -> Estimate:
    """Estimate second minus first: paired where seeds and queries are the same, else as independent."""
    after_of_seed = {record.seed: record for record in second}
    pairs = [(before, after_of_seed[before.seed]) for before in first if before.seed in after_of_seed]
    is_same = len(pairs) == len(first) == len(second) and len({r.queries_hash for r in (*first, *second)}) == 1
    scores = [(a.query_scores, b.query_scores) for a, b in pairs if a.query_scores and b.query_scores]
    if is_same and len(scores) == len(pairs):
        return paired_difference([a for a, _ in scores], [b for _, b in scores])
    resampled = [(a.resampled_scores, b.resampled_scores) for a, b in pairs]
    errors = [spread(np.subtract(b, a)) for a, b in resampled if a and b]
    if is_same and len(errors) == len(pairs):
        differences = [after.score - before.score for before, after in pairs]
        return mean_of_seed_means(differences, errors, first[0].num_queries, pairing="paired")
    return independent_difference(estimate(first), estimate(second))


def _newest_questions(records: Sequence[Result]) -> list[Result]:
    """Keep, for each model and task, the records that answer the same queries as its newest record."""

    def question(record: Result) -> tuple[object, ...]:
        return record.data_hash, record.queries_hash, record.metric, record.sampling, record.max_context_tokens

    newest = {(r.model_fingerprint, r.model_name, r.task): question(r) for r in records}
    return [r for r in records if newest[r.model_fingerprint, r.model_name, r.task] == question(r)]


def _display_names(records: Sequence[Result]) -> dict[tuple[str, str], str]:
    """Call each model by its name, with its fingerprint where two models share a name."""
    fingerprints: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        fingerprints[record.model_name].add(record.model_fingerprint)
    return {
        (r.model_name, r.model_fingerprint): r.model_name
        if len(fingerprints[r.model_name]) == 1
        else f"{r.model_name} ({r.model_fingerprint[:8]})"
        for r in records
    }
