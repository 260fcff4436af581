"""Predictions against the answers that their rows already have, counted as they come: only counts are kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from manyicl.errors import UserError, shortened
from manyicl.evaluation.metrics import METRICS, accuracy, expected_and_answered
from manyicl.evaluation.mistakes import confusions, label_scores
from manyicl.tasks.accepted_answers import AcceptedAnswers
from manyicl.tasks.task import Query, Task
from manyicl.tasks.values import as_written

# So many answers outside the labels are named.
MOST_UNUSABLE_NAMED = 3


class KnownAnswers:
    """Scores of answers whose rows hold the right one.

    A row counts if every column of the task's answer template is there and not empty. Its answer is rendered as that of
    a training row. A row that could not be answered, or for which the model abstained, is in no score and counted.

    Attributes:
        columns: Columns that the task's answer template names.
        pairs: Expected and answered label -> number; empty without labels that all rows share.
        num_rows: Rows that are counted here.
        num_without: Rows among them in which one of the columns is missing or empty.
        num_unusable: Rows among them whose answer is none of the labels or options, or cannot be rendered.
        unusable: The first of these answers, as they are in their rows.
        num_problems: Rows with a known answer that could not be answered.
        num_abstained: Rows with a known answer for which the model abstained.
        num_guesses_right: Rows among them where its guess would have been right.
        num_demonstrations: Scored rows whose query is a demonstration too.
        num_scored: Rows that are in the scores.
        num_right: Rows among them whose answer is accepted, of a task with labels or options.
    """

    def __init__(self, task: Task, demonstrated: Iterable[Query] = ()) -> None:
        """Take the task, and queries whose answers the model may have in its context.

        Raises:
            UserError: If the task does not know its answer template, as of a file of an earlier version.
        """
        if task.spec.answer_template is None:
            what = f"task {task.name!r} does not know in which column answers are"
            raise UserError("no_answer_template", what, remedy="Compile the task again, or name it with --task.")
        self._task = task
        self._labels = frozenset(task.labels or ())
        self._accepted = AcceptedAnswers(task.spec)
        self._accepted_alone = AcceptedAnswers(task.spec.model_copy(update={"references_column": None}))
        self._demonstrated = frozenset(demonstrated)
        self._sum = 0.0
        self.columns = self._accepted.columns
        self.pairs: Counter[tuple[str, str]] = Counter()
        self.unusable: list[str] = []
        self.num_rows = self.num_without = self.num_unusable = self.num_problems = 0
        self.num_abstained = self.num_guesses_right = self.num_demonstrations = self.num_scored = self.num_right = 0

    def add(self, row: Mapping[str, object], answer: str | None, guess: str | None, has_problem: bool) -> None:
        """Count one row.

        Args:
            row: The columns of the query.
            answer: What was answered; None where the model abstained.
            guess: What it would have answered then.
            has_problem: Whether the row could not be answered.
        """
        self.num_rows += 1
        if not all(str(as_written(row.get(column))).strip() for column in self.columns):
            self.num_without += 1
            return
        if has_problem:
            self.num_problems += 1
            return
        references = self._references(row)
        if references is None:
            return
        if answer is None:
            self.num_abstained += 1
            self.num_guesses_right += round(accuracy(guess or "", references))
        else:
            self._score(row, answer, references)

    def _score(self, row: Mapping[str, object], answer: str, references: tuple[str, ...]) -> None:
        self.num_scored += 1
        self.num_right += round(accuracy(answer, references))
        if self._labels:
            self.pairs[expected_and_answered(answer, references)] += 1
        elif (of_example := METRICS[self._task.metric].of_example) is not None:
            self._sum += of_example(answer, references)
        self.num_demonstrations += bool(self._demonstrated) and self._task.query(row) in self._demonstrated

    def _references(self, row: Mapping[str, object]) -> tuple[str, ...] | None:
        """Return the accepted answers of a row; None, and count it, where they are no answers of the task."""
        try:
            references = self._accepted_of(row)
            if not all(references):
                self.num_without += 1
                return None
            options = self._labels or (self._task.choices_column and frozenset(self._task.query(row).choices or ()))
        except UserError as error:
            if error.code in ("row_without_label", "empty_answer"):
                self.num_without += 1
                return None
            self._count_unusable(row)
            return None
        if options and references[0] not in options:
            self._count_unusable(row)
            return None
        return references

    def _accepted_of(self, row: Mapping[str, object]) -> tuple[str, ...]:
        """Render the answers; without the list of further ones where the row has none."""
        try:
            return self._accepted(row)
        except UserError as error:
            if error.code != "not_a_list":
                raise
            return self._accepted_alone(row)

    def _count_unusable(self, row: Mapping[str, object]) -> None:
        self.num_unusable += 1
        values = (row[column] for column in self.columns)
        answer = ", ".join(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in values)
        if len(self.unusable) < MOST_UNUSABLE_NAMED and (name := shortened(answer)) not in self.unusable:
            self.unusable.append(name)

    @property
    def score_name(self) -> str:
        """Name of the main score: accuracy of answers among labels or options, else the task's metric."""
        return "accuracy" if self._task.is_closed else self._task.metric

    def as_json(self) -> dict[str, Any]:
        """Return counts and scores; ``labels`` and ``confusions`` only of a task with labels, null without a score."""
        counts = (
            "num_rows",
            "num_scored",
            "num_without",
            "num_unusable",
            "num_problems",
            "num_abstained",
            "num_guesses_right",
            "num_demonstrations",
        )
        found: dict[str, Any] = {"columns": list(self.columns), **{name: getattr(self, name) for name in counts}}
        total = self.num_right if self._task.is_closed else self._sum
        found[self.score_name] = total / self.num_scored if self.num_scored else None
        if self.pairs:
            scores = label_scores(self.pairs)
            found["macro_f1"] = sum(one.f1 for one in scores) / len(scores)
            found["labels"] = [one._asdict() for one in scores]
            found["confusions"] = [one._asdict() for one in confusions(self.pairs)]
        return found
