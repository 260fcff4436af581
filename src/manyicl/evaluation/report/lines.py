"""Records -> the lines of every table: models, differences and trivial baselines by shot count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from manyicl.errors import pluralized
from manyicl.evaluation.metrics import METRICS
from manyicl.evaluation.result import Result
from manyicl.evaluation.summary import OVERALL, Group, Summary, summarise
from manyicl.evaluation.uncertainty import Estimate

BASELINES = {
    "majority": "majority answer",
    "chance": "chance",
    "tfidf": "TF-IDF + log. reg.",
    "nearest": "BM25 nearest",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: a model, its worst draws, a difference of two, or a baseline, at every shot count."""

    label: str
    cells: list[Estimate | None]
    kind: Literal["model", "worst", "difference", "baseline"]


@dataclass(frozen=True, slots=True)
class Section:
    """A family, or the mean over families: its lines, and its tasks with theirs."""

    group: str
    num_tasks: int
    lines: list[Line]
    tasks: dict[str, list[Line]]


@dataclass(frozen=True)
class Part:
    """One comparison in a report that may have several: models on tasks, with shot counts of its own.

    Attributes:
        title: Head of the part.
        records: The results that it shows.
        by_task: Whether each task has a curve of its own, as suits a few tasks; else their families and the mean do.
    """

    title: str
    records: Sequence[Result]
    by_task: bool = False

    @cached_property
    def summary(self) -> Summary:
        """Return the scores of its records."""
        return summarise(self.records)

    def curves(self) -> list[Section]:
        """Return what a short table or a picture shows of it: every task, or the mean over families alone."""
        if not self.by_task:
            return sections(self.summary)[:1]
        tasks = self.summary.compared
        return [Section(task, 1, _lines(self.summary, (task,), differences=True), {}) for task in tasks]


def sections(summary: Summary) -> list[Section]:
    """Collect the tables of the mean over families, if there are several, and of each family."""
    groups = (OVERALL, *summary.groups) if len(summary.groups) > 1 else summary.groups
    found = []
    for group in groups:
        members = summary.members(group)
        tasks = {} if group == OVERALL else {task: _lines(summary, (task,)) for task in members}
        found.append(Section(group, len(members), _lines(summary, group, differences=True), tasks))
    if summary.not_compared:
        alone = {task: _lines(summary, (task,)) for task in summary.not_compared}
        found.append(Section("in no mean", len(alone), [], alone))
    return found


def _lines(summary: Summary, group: Group, *, differences: bool = False) -> list[Line]:
    """Return the lines of a group: its models, if wanted their differences from the first, and its baselines.

    Where there are many draws of demonstrations or several orders of each, a model is followed by the worst of them.
    """
    base, *others = summary.models if differences else summary.models[:1]
    lines: list[Line] = []
    for model in summary.models:
        lines.append(Line(model, [summary.score(model, group, n) for n in summary.shots], "model"))
        if summary.worst_label is not None:
            cells = [summary.worst(model, group, n) for n in summary.shots]
            lines.append(Line(f"{model}, {summary.worst_label}", cells, "worst"))
    for other in others:
        cells = [summary.difference(base, other, group, n) for n in summary.shots]
        lines.append(Line(f"{other} − {base}", cells, "difference"))
    for name, label in BASELINES.items():
        if any(scores := [summary.baseline(name, group, n) for n in summary.shots]):
            lines.append(Line(label, scores, "baseline"))
    return lines


# What a reader must know of a result, by the field that says so.
_FLAGS = {
    "beyond_training": "used more tokens or shots than any training sequence had",
    "num_shots_dropped": "have fewer demonstrations than requested, because the context was full",
    "num_shots_missing": "have fewer demonstrations than requested, because the task has no more training rows",
    "num_cut_answers": "cut at least one free answer at the token limit",
    "num_queries_skipped": "skipped test rows that do not fit the context even without demonstrations",
    "seen_in_training": "are on tasks whose source the model was fine-tuned on: those are not unseen",
}
# Those that a comparison needs: what it trained on, and how far, is in its plan.
FLAGS_OF_COMPARISONS = ("num_shots_dropped", "num_shots_missing", "num_cut_answers", "num_queries_skipped")


def flag_notes(records: Sequence[Result], fields: Iterable[str]) -> list[str]:
    """Say in a sentence each how many results have a flag, by the fields that hold flags."""
    counts = {field: sum(bool(getattr(record, field)) for record in records) for field in fields}
    return [f"{count} of {len(records)} results {_FLAGS[field]}." for field, count in counts.items() if count]


def _draws(summary: Summary) -> str:
    """Say over how many draws of demonstrations the cells are."""
    counts = {len({record.seed for record in own}) for (*_, shots), own in summary.by_point.items() if shots} or {1}
    fewest, most = min(counts), max(counts)
    if most == 1:
        return "one draw of demonstrations, without its variance"
    return f"{most} draws of demonstrations" if fewest == most else f"{fewest} to {most} draws of demonstrations"


def notes(summary: Summary) -> list[str]:
    """Say in sentences what a reader of the numbers must know: errors, flags, and what was dropped."""
    records = summary.records
    lines = [
        f"Each cell is a mean and its standard error, over queries and {_draws(summary)}."
        " Tasks are averaged within their family, then families; every task counts in its own metric."
        " The error is that of the mean over these tasks, not over other tasks one might have chosen;"
        " of Q queries it is never below 1 / (Q + 2), and of one query there is none."
    ]
    if summary.num_orders > 1:
        lines.append(f"Each draw was measured in {summary.num_orders} orders, over which it is averaged first.")
    if summary.worst_label is not None:
        name = summary.worst_label.capitalize()
        lines.append(f"“{name}”: the lowest score of each task, averaged like the others; it has no error.")
    lines += flag_notes(records, _FLAGS)
    if any(record.num_retrieved for record in records):
        lines.append(
            "“+ N retrieved”: the N training rows most like a query (BM25), none of them a demonstration, come just "
            "before it; the trivial baselines know the demonstrations alone."
        )
    fewer = sum(record.mean_num_retrieved < record.num_retrieved for record in records)
    if fewer:
        lines.append(
            f"{fewer} of {len(records)} results retrieved fewer rows for a query, because no more are like it, left, "
            "or fit the context."
        )
    # Not every ROUGE is the same: a figure says which one it is.
    metrics = {record.metric for record in records} & METRICS.keys() - {"accuracy"}
    lines += [f"{name}: {METRICS[name].description}." for name in sorted(metrics)]
    for reason in dict.fromkeys(summary.not_compared.values()):
        tasks = [task for task, why in summary.not_compared.items() if why == reason]
        lines.append(f"{', '.join(tasks)}: in no mean. {reason[0].upper()}{reason[1:]}.")
    if number := summary.num_superseded:
        lines.append(
            f"{pluralized(number, 'result')} of the same tasks and models {'is' if number == 1 else 'are'} not shown: "
            "older data, metric or format, or other queries, sampling or limits than those with the most answers."
        )
    return lines
