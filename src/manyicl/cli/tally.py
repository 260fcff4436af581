"""Counts of the rows that `manyicl predict` answers, and how its answers compare with those that the rows have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from manyicl.cli.answers import ANSWER_COLUMNS, STANDARD_STREAM, Row
from manyicl.cli.mistake_tables import print_mistakes
from manyicl.errors import UserError, pluralized
from manyicl.printing import say

if TYPE_CHECKING:
    from rich.console import Console

    from manyicl.activity import Activity
    from manyicl.cli.answer_columns import AnswerColumns
    from manyicl.cli.demonstrations import Demonstrations
    from manyicl.engine.task_prefix import TaskPrefix
    from manyicl.evaluation.known_answers import KnownAnswers
    from manyicl.tasks.rows import LocatedRow


@dataclass
class Tally:
    """Counts of the rows of an output.

    Attributes:
        layout: Columns that answers have.
        examples: Demonstrations, with the task that says in which columns a row's own answer is.
        num_retrieved: Training rows that are retrieved for each query.
        num_rows: Rows that are written.
        num_problems: Rows among them that could not be answered.
        num_abstained: Rows among them for which the model abstained.
        num_continued: Rows among them that an interrupted run had written.
        prefix: What came before the last queries; None where none was answered.
        has_earlier_answers: Whether the rows are an earlier output, whose answers are no truth to compare with.
    """

    layout: AnswerColumns
    examples: Demonstrations
    num_retrieved: int = 0
    num_rows: int = 0
    num_problems: int = 0
    num_abstained: int = 0
    num_continued: int = 0
    prefix: TaskPrefix | None = None
    has_earlier_answers: bool = False

    @cached_property
    def known(self) -> KnownAnswers:
        """How the answers compare with those that rows have, made at the first row that has the columns of one.

        The rows before it lack them and are counted so; where no row has them, the module is not loaded.
        """
        from manyicl.evaluation.known_answers import KnownAnswers

        retrievable = self.examples.retrievable if self.num_retrieved else ()
        given = chain(self.examples.chosen, retrievable)
        known = KnownAnswers(self.examples.newest_task, (example.query for example in given))
        known.num_rows = known.num_without = self.num_rows
        return known

    @cached_property
    def _known_columns(self) -> tuple[str, ...]:
        from manyicl.tasks.template import compiled

        template = self.examples.newest_task.spec.answer_template
        return compiled(template).columns if template is not None else ()

    @property
    def has_known(self) -> bool:
        """Whether any row has the columns of an answer of its own."""
        return "known" in self.__dict__

    def count(self, row: Row, answer: Row) -> None:
        """Count a row by its own columns and those of its answer, in which files of text have text."""
        has_problem = self.layout.may_have_problems and bool(answer["problem"])
        self.num_problems += has_problem
        abstained = self.layout.may_abstain and answer["abstained"] in (True, "true")
        self.num_abstained += abstained
        self.has_earlier_answers = self.has_earlier_answers or self._holds_earlier_answer(row)
        is_known = self.has_known or (self._known_columns and all(column in row for column in self._known_columns))
        if is_known and not self.has_earlier_answers:
            guess = answer["guess"] if abstained else None
            self.known.add(row, None if abstained else answer["answer"] or "", guess, has_problem)
        self.num_rows += 1

    def _holds_earlier_answer(self, row: Row) -> bool:
        """Tell whether what seems a row's own answer is that of a model, from an output that is now the input."""
        return not ANSWER_COLUMNS.isdisjoint(self._known_columns) and ANSWER_COLUMNS.issubset(row)

    def take(self, answers: Iterable[Row], rows: Iterable[LocatedRow]) -> None:
        """Count rows that are written already, together with the rows that they answer, from the first."""
        for answer, row in zip(answers, rows, strict=False):
            self.count(row.columns, answer)
        self.num_continued = self.num_rows

    def noting(self, show: Callable[[TaskPrefix], None], activity: Activity) -> Callable[[TaskPrefix], None]:
        """Return a function that shows what comes before the queries from now on, and keeps it for the summary."""

        def note(prefix: TaskPrefix) -> None:
            self.prefix = prefix
            show(prefix)
            activity.restart()

        return note

    def print_summary(self, console: Console, output: Path, model: str, seconds: float, *, as_json: bool) -> None:
        """Print how many rows are written, how the answers compare with those that rows have, and how many lack one.

        The last is printed even where the console is quiet, or the summary is JSON on standard output.
        """
        if as_json:
            typer.echo(json.dumps(self.as_json(output, model, seconds), ensure_ascii=False, indent=2))
        else:
            if output != STANDARD_STREAM:
                say(console, f"{pluralized(self.num_rows, 'answer')} written to {output}")
            if self.has_known:
                print_known_answers(self.known, console)
            elif self.has_earlier_answers:
                say(console, "Compared with nothing: the column `answer` of the rows holds earlier answers of a model.")
        if self.num_problems:
            what = f"{self.num_problems:,} of {pluralized(self.num_rows, 'row')} could not be answered"
            typer.echo(f"{what}; the column `problem` says why.", err=True)

    def as_json(self, output: Path, model: str, seconds: float) -> dict[str, Any]:
        """Return the summary that ``--json`` prints."""
        prefix = self.prefix
        return {
            "output": str(output),
            "model": model,
            "task": self.examples.queried_task.name,
            "num_rows": self.num_rows,
            "num_problems": self.num_problems,
            "num_abstained": self.num_abstained,
            "num_continued": self.num_continued,
            "num_shots": None if prefix is None else prefix.num_shots,
            "num_dropped": None if prefix is None else prefix.num_dropped,
            "num_prefix_tokens": None if prefix is None else prefix.num_tokens,
            "seconds": round(seconds, 3),
            "scores": self.known.as_json() if self.has_known else None,
        }


def require_summary_apart(output: Path, as_json: bool) -> None:
    """Refuse ``--json`` where standard output holds the answers.

    Raises:
        UserError: If so.
    """
    if output == STANDARD_STREAM and as_json:
        what = "--json prints a summary on standard output, where the answers are already"
        raise UserError("conflicting_options", what, remedy="Name a file with --output.", field="--json")


def print_known_answers(known: KnownAnswers, console: Console) -> None:
    """Print the scores of answers against those that rows have, and which rows are in no score."""
    found = known.as_json()
    where = ", ".join(f"`{column}`" for column in known.columns)
    scores = {name: found[name] for name in (known.score_name, "macro_f1") if found.get(name) is not None}
    text = ", ".join(f"{name} {value:.3f}" for name, value in scores.items()) or "no score"
    say(console, f"Compared with {where}: {text}, {pluralized(known.num_scored, 'row')}.")
    if known.pairs:
        print_mistakes(known.pairs, console)
    if omitted := "; ".join(_omitted(known)):
        say(console, f"In no score: {omitted}.")
    if known.num_demonstrations:
        what = f"{known.num_demonstrations:,} of the scored rows are among the examples that the model is given"
        say(console, f"{what}, with their answers: they say nothing of new rows.")


def _omitted(known: KnownAnswers) -> Iterator[str]:
    """Say which rows are in no score."""
    if known.num_without:
        yield f"{pluralized(known.num_without, 'row')} without an answer there"
    if known.num_unusable:
        more = ", …" if known.num_unusable > len(known.unusable) else ""
        what = "whose answer there is none of the task's"
        yield f"{pluralized(known.num_unusable, 'row')} {what} ({', '.join(map(repr, known.unusable))}{more})"
    if known.num_problems:
        yield f"{pluralized(known.num_problems, 'row')} that could not be answered"
    if known.num_abstained:
        right = f"its guess would have been right for {known.num_guesses_right:,}"
        yield f"{pluralized(known.num_abstained, 'row')} for which the model abstained ({right})"
