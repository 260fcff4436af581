"""Counts of the rows that `manyicl predict` answers, and how its answers compare with those that the rows have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from manyicl.cli.answers import STANDARD_STREAM, Row
from manyicl.cli.mistake_tables import print_mistakes, say
from manyicl.errors import pluralized

if TYPE_CHECKING:
    from rich.console import Console

    from manyicl.cli.answer_columns import AnswerColumns
    from manyicl.cli.demonstrations import Demonstrations
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
    """

    layout: AnswerColumns
    examples: Demonstrations
    num_retrieved: int = 0
    num_rows: int = 0
    num_problems: int = 0

    @cached_property
    def known(self) -> KnownAnswers:
        """How the answers compare with those that rows have; its module is not loaded where none has one."""
        from manyicl.evaluation.known_answers import KnownAnswers

        retrievable = self.examples.retrievable if self.num_retrieved else ()
        given = chain(self.examples.chosen, retrievable)
        return KnownAnswers(self.examples.newest_task, (example.query for example in given))

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
        self.num_rows += 1
        self.num_problems += has_problem
        if self._known_columns and all(column in row for column in self._known_columns):
            abstained = self.layout.may_abstain and answer["abstained"] in (True, "true")
            guess = answer["guess"] if abstained else None
            self.known.add(row, None if abstained else answer["answer"] or "", guess, has_problem)

    def take(self, answers: Iterable[Row], rows: Iterable[LocatedRow]) -> None:
        """Count rows that are written already, together with the rows that they answer, from the first."""
        for answer, row in zip(answers, rows, strict=False):
            self.count(row.columns, answer)

    def print_summary(self, console: Console, output: Path) -> None:
        """Print how many rows are written, how the answers compare with those that rows have, and how many lack one."""
        if output != STANDARD_STREAM:
            say(console, f"{pluralized(self.num_rows, 'answer')} written to {output}")
        if self.has_known and self.known.num_without < self.known.num_rows:
            print_known_answers(self.known, console)
        if self.num_problems:
            what = f"{self.num_problems:,} of {pluralized(self.num_rows, 'row')} could not be answered"
            say(console, f"{what}; the column `problem` says why.")


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
