"""Rows and the keys of a task file -> Task: rendering, the rules a row must keep, the split."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from manyicl.checked import validated
from manyicl.errors import UserError, counted, did_you_mean, shortened, shown
from manyicl.tasks.rows import LocatedRow
from manyicl.tasks.schema import OneFile, TaskFile, TwoFiles, fit_name
from manyicl.tasks.task import EmptyOptionError, Example, Query, Task, TaskSpec, hash_content
from manyicl.tasks.template import Template, compiled
from manyicl.tasks.values import as_written, columns_in, listed

ON_BOTH_SIDES = "training row that stands in test too"
_UNLABELLED = "-1"  # as the Hub writes the class of a row that has none


class _BadRowError(Exception):
    """A row breaks a rule: ``reason`` is what is counted, the message what is said."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _Sides:
    train: tuple[Example, ...]
    test: tuple[Example, ...]


class TaskBuilder:
    """Renders the rows of one task and holds them to its rules."""

    def __init__(self, spec: TaskFile, place: str, default_name: str = "") -> None:
        """Compile the templates.

        Raises:
            UserError: If a template is wrong.
        """
        self.spec = spec
        self.place = place
        self.name = spec.name or fit_name(default_name)
        self.dropped: Counter[str] = Counter()
        self.query_template = self._template(spec.query, "query")
        self.answer_template = self._template(spec.answer, "answer")
        self.answer_column = self.answer_template.bare_column
        self._require_class_names_read()
        if spec.instruction:
            self._compiled(spec.instruction, "instruction")
        labels = spec.closed_labels
        self.labels = labels if isinstance(labels, tuple) else None
        self.label_set = frozenset(self.labels or ())
        self.closed = labels is not None
        self.task_spec = TaskSpec(
            name=self.name,
            family=spec.family,
            metric=spec.chosen_metric,
            labels=self.labels,
            instruction_template=spec.instruction or None,
            query_template=spec.query,
            class_names=spec.class_names,
            choices_column=spec.choices,
            source=spec.source or self.name,
            max_answer_tokens=spec.max_answer_tokens,
        )

    def _template(self, source: str, key: str) -> Template:
        template = self._compiled(source, key)
        if not template.columns:
            hint = " A column whose name has a meaning of its own is written row['true']." if "{{" in source else ""
            raise UserError(
                f"{self.place}: {key}: the template {source!r} names no column; write one in braces, as in "
                f"'{{{{ {source.strip() if source.strip().isidentifier() else 'text'} }}}}'.{hint}"
            )
        return template

    def _require_class_names_read(self) -> None:
        """Refuse class names of a column that nothing reads: it is misspelt, and they would name nothing."""
        read = {*self.query_template.columns, *self.answer_template.columns}
        for place in filter(None, (self.spec.choices, self.spec.references)):
            read |= columns_in(place)
        for column in self.spec.class_names:
            if column not in read:
                raise UserError(
                    f"{self.place}: class_names: no template, choices or references read the column {column!r}; "
                    f"name one of {sorted(read)}, or leave it out.{did_you_mean(column, read)}"
                )

    def _compiled(self, source: str, key: str) -> Template:
        try:
            return compiled(source)
        except UserError as error:
            raise UserError(f"{self.place}: {key}: {error}") from error

    def two_sided_task(self, train: Sequence[LocatedRow], test: Sequence[LocatedRow]) -> Task:
        """Make the task of rows that come with their sides."""
        sides = _Sides(self._render_all(train), self._render_all(test))
        if test and not sides.test:
            self._refuse_no_test_rows()
        return self._finish(sides)

    def split_task(self, rows: Sequence[LocatedRow]) -> Task:
        """Make the task of rows that are split here."""
        data = self.spec.data
        assert isinstance(data, OneFile)
        groups: dict[str, str] = {}
        if data.group is not None:
            require_column(rows, data.group, Path(data.file))
            # A row without a group, an empty field or null, is a group of its own.
            groups = {row.origin: str(as_written(row.columns[data.group])).strip() for row in rows}
        sides = _split(self._render_all(rows), data, groups, self.closed)
        if sides.test and not sides.train:
            self._refuse_no_rows_to_train_on(sides.test, groups, data)
        if data.test_fraction > 0 and not sides.test:
            raise UserError(
                f"{self.place}: task {self.name!r} has too few rows to leave any for testing; add rows, or set "
                "test_fraction to 0 to use all as demonstrations."
            )
        return self._finish(sides)

    def _refuse_no_rows_to_train_on(
        self, test: Sequence[Example], groups: Mapping[str, str], data: OneFile
    ) -> NoReturn:
        """Say why the split put all rows on the test side."""
        num_groups = len({_group_of(example, groups) for example in test})
        if len(test) == 1:
            cause = "there is one row"
        elif num_groups == 1:
            what = f"value of {data.group!r}, the group" if groups.get(test[0].origin) else "query"
            cause = f"all {len(test):,} rows have the same {what}"
        else:
            cause = f"test_fraction is {data.test_fraction:g} of {len(test):,} rows"
        raise UserError(
            f"{self.place}: task {self.name!r} has no training rows: {cause}, so none is left for training; set "
            "test_fraction to 0, or add rows."
        )

    def _render_all(self, rows: Iterable[LocatedRow]) -> tuple[Example, ...]:
        """Render rows; one that breaks a rule is refused, or dropped and counted, as the task file says."""
        examples = []
        for row in rows:
            try:
                examples.append(self._render(row))
            except _BadRowError as error:
                if self.spec.bad_rows == "refuse":
                    raise UserError(
                        f"{row.place}: {error} Mend the row, or set `bad_rows: drop` in the task file of {self.name!r}."
                    ) from error
                self.dropped[error.reason] += 1
        return tuple(examples)

    def _render(self, row: LocatedRow) -> Example:
        """Render one row to an example.

        Raises:
            UserError: If a column is missing or the row holds several labels.
            _BadRowError: If the row breaks a rule.
        """
        try:
            query = self.task_spec.query(row.columns)
            answers = self._answers(row)
        except EmptyOptionError as error:
            raise _BadRowError("empty option", str(error)) from error
        except UserError as error:
            self._require_short_columns(row)
            raise UserError(f"{row.place}: {error}") from error
        for what, texts in (("query", (query.text,)), ("option", query.choices or ()), ("answer", answers)):
            for text in texts:
                self._require_short(f"the {what}", len(text))
                _require_text(text)
        if not query.text.strip():
            raise _BadRowError("empty query", "the query is empty.")
        for answer in (*answers, *(query.choices or ())):
            _require_answer(answer)
        self._require_known(answers[0], query, row)
        return Example(query, answers[0], answers, row.origin)

    def _require_short_columns(self, row: LocatedRow) -> None:
        """Say that a row is too long where a template failed on it: it may be bad, and the template good for others."""
        read = {*self.query_template.columns, *self.answer_template.columns}
        for column in sorted(read & row.columns.keys()):
            self._require_short(f"the column {column!r}", _num_characters(row.columns[column]))

    def _require_short(self, what: str, num_characters: int) -> None:
        most = self.spec.max_characters
        if num_characters > most:
            raise _BadRowError(
                "text too long",
                f"{what} has {counted(num_characters, 'character')}; max_characters is {most:,}.",
            )

    def _answers(self, row: LocatedRow) -> tuple[str, ...]:
        """Render every accepted answer, the canonical one first, without repeats."""
        self._refuse_unlabelled(row)
        values = row.columns.get(self.answer_column) if self.answer_column is not None else None
        if isinstance(values, list | tuple):
            if not values:
                raise _BadRowError("empty answer", f"the answer column {self.answer_column!r} holds an empty list.")
            answers = [
                self.answer_template.render({**row.columns, str(self.answer_column): answer}, self.spec.class_names)
                for answer in values
            ]
        else:
            answers = [self.answer_template.render(row.columns, self.spec.class_names)]
        if self.closed:
            self._refuse_several_labels(answers, row)
        if self.spec.references is not None:
            references = listed(row.columns, self.spec.references)
            if not isinstance(references, list | tuple):
                raise UserError(
                    f"the column {self.spec.references!r} lists the accepted answers; expected a list, "
                    f"found {references!r}."
                )
            answers += [str(as_written(reference)) for reference in references]
        return tuple(dict.fromkeys(answer.strip() for answer in answers))

    def _refuse_unlabelled(self, row: LocatedRow) -> None:
        for column in self.answer_template.columns:
            names = self.spec.class_names.get(column)
            if names and str(row.columns.get(column)) == _UNLABELLED and _UNLABELLED not in names:
                raise _BadRowError("row without a label", f"the column {column!r} is -1: the row has no label.")

    def _refuse_several_labels(self, answers: Sequence[str], row: LocatedRow) -> None:
        """Refuse a multi-label task: one answer of a closed set is supervised and scored, never several."""
        several = self._several_labels(answers, row)
        if len(several) > 1:
            raise UserError(
                f"task {self.name!r} is multi-label: this row has {sorted(several)}. One answer of a closed "
                "set is expected for each row; keep the rows with one label, or make a yes/no task of each label."
            )

    def _several_labels(self, answers: Sequence[str], row: LocatedRow) -> set[str]:
        """Find several labels in one answer: a list as it stands, a list joined, or a text that joins labels."""
        if len(answers) > 1:
            return set(answers)
        answer = answers[0]
        for column in self.answer_template.columns:
            value = row.columns.get(column)
            if isinstance(value, list | tuple) and answer not in map(str, value):
                return set(map(str, value))
        parts = {part.strip() for part in re.split(r"[,;|]", answer)}
        return parts if self.labels and answer not in self.label_set and parts <= self.label_set else {answer}

    def _require_known(self, answer: str, query: Query, row: LocatedRow) -> None:
        """Hold an answer to the row's options or to the closed set."""
        if query.choices is not None and answer not in query.choices:
            raise _BadRowError(
                "answer is no option",
                f"the answer {shortened(answer)!r} is none of the row's options "
                f"{shortened(repr(list(query.choices)))}.",
            )
        if self.labels is not None and answer not in self.label_set:
            shown = ", ".join(map(repr, self.labels[:12])) + (", …" if len(self.labels) > 12 else "")
            # Where rows are dropped nobody reads it, and among thousands of labels it takes a tenth of a second.
            hint = did_you_mean(shortened(answer), self.labels) if self.spec.bad_rows == "refuse" else ""
            raise _BadRowError(
                "label outside the closed set",
                f"{shortened(answer)!r} is no label of task {self.name!r}; its labels are {shown}.{hint}",
            )

    def _finish(self, sides: _Sides) -> Task:
        """Take repeated rows off the training side, settle the labels, hash the examples."""
        train = self._without_test_rows(sides)
        if not train:
            raise UserError(f"{self.place}: task {self.name!r} has no training rows{self._dropped_note()}.")
        test = sides.test
        labels = self.labels
        if self.closed and labels is None:
            labels = tuple(sorted({example.answer for example in train}))
            if len(labels) < 2:
                raise UserError(
                    f"{self.place}: task {self.name!r} takes its labels from the training rows, and all have "
                    f"the answer {labels[0]!r}; expected two labels at least."
                )
            test = self._with_known_labels(test, labels)
        if sides.test and not test:
            self._refuse_no_test_rows()
        task = Task(self.task_spec.model_copy(update={"labels": labels}), train, test, dropped=dict(self.dropped))
        try:
            return replace(task, data_hash=hash_content(task))
        except UserError as error:  # of the instruction, which alone is rendered here: it needs all labels
            raise UserError(f"{self.place}: instruction: {error}") from error

    def _refuse_no_test_rows(self) -> NoReturn:
        raise UserError(f"{self.place}: task {self.name!r} has no test rows{self._dropped_note()}.")

    def _dropped_note(self) -> str:
        if not self.dropped:
            return ""
        return " left; dropped: " + ", ".join(f"{count} ({reason})" for reason, count in self.dropped.items())

    def _without_test_rows(self, sides: _Sides) -> tuple[Example, ...]:
        asked = {normalised(example.query.text): example for example in reversed(sides.test)}
        train = tuple(example for example in sides.train if normalised(example.query.text) not in asked)
        if num_repeats := len(sides.train) - len(train):
            if self.spec.on_both_sides == "refuse":
                first = next(example for example in sides.train if normalised(example.query.text) in asked)
                twin = asked[normalised(first.query.text)]
                raise UserError(
                    f"{self.place}: task {self.name!r} has {counted(num_repeats, 'training row')} whose query stands "
                    f"in test too; the first is {first.origin}, like {twin.origin}. Take such rows off one side, or "
                    "set `on_both_sides: drop`, which takes them off the training side."
                )
            self.dropped[ON_BOTH_SIDES] += num_repeats
        return train

    def _with_known_labels(self, test: tuple[Example, ...], labels: tuple[str, ...]) -> tuple[Example, ...]:
        known = frozenset(labels)
        unknown = [example for example in test if example.answer not in known]
        if unknown and self.spec.bad_rows == "refuse":
            raise UserError(
                f"{self.place}: {unknown[0].origin}: no training row of task {self.name!r} has the label "
                f"{unknown[0].answer!r}, which stands in {counted(len(unknown), 'test row')}."
                f"{did_you_mean(unknown[0].answer, labels)} "
                "List all labels under `labels:`, take another family if answers are free, or set `bad_rows: drop`."
            )
        if unknown:
            self.dropped["label that no training row has"] += len(unknown)
        return tuple(example for example in test if example.answer in known)


def task_of_examples(
    name: str,
    train: Iterable[tuple[str, str] | Example],
    test: Iterable[tuple[str, str] | Example],
    labels: Iterable[str] | str | None,
    keys: Mapping[str, object],
) -> Task:
    """Make a task of queries and answers; see ``Task.from_examples``.

    Args:
        name: Name of the task.
        train: Training examples or pairs.
        test: Test examples or pairs.
        labels: Closed answer set, ``from_train`` or None.
        keys: Further keys of a task file.
    """
    sides = [
        [_row_of(example, side, n) for n, example in enumerate(examples, 1)]
        for side, examples in (("train", train), ("test", test))
    ]
    values = {
        "name": name,
        "query": "{{ text }}",
        "answer": "{{ answer }}",
        "labels": labels if labels is None or isinstance(labels, str) else tuple(labels),
        "choices": "choices" if any("choices" in row.columns for side in sides for row in side) else None,
        "data": TwoFiles(train=("train",)),
        **keys,
    }
    spec = validated(TaskFile, values, f"Task {name!r}")
    return TaskBuilder(spec, f"Task {name!r}").two_sided_task(*sides)


def _row_of(example: tuple[str, str] | Example, side: str, number: int) -> LocatedRow:
    """Write an example, or a pair of query and answer, as the row that would give it."""
    if isinstance(example, Example):
        references = example.references or (example.answer,)
        columns: dict[str, object] = {"text": example.query.text}
        columns["answer"] = list(references) if len(references) > 1 else references[0]
        if example.query.choices is not None:
            columns["choices"] = list(example.query.choices)
        return LocatedRow(columns, side, number)
    if isinstance(example, str) or len(example) != 2 or not all(isinstance(text, str) for text in example):
        raise UserError(
            "not_an_example",
            "an example is a query and its answer",
            expected="two texts",
            found=shown(example),
            file=side,
            row=number,
        )
    return LocatedRow(dict(zip(("text", "answer"), example, strict=True)), side, number)


def require_column(rows: Sequence[LocatedRow], column: str, path: Path) -> None:
    """Refuse rows that lack a column.

    Raises:
        UserError: If there are no rows, or one lacks the column.
    """
    for row in rows:
        if column not in row.columns:
            raise UserError(
                f"{row.place}: the column {column!r} is missing; the row has {sorted(row.columns)}."
                f"{did_you_mean(column, row.columns)}"
            )
    if not rows:
        raise UserError(f"{path} holds no rows.")


def normalised(query_text: str) -> str:
    """Return what makes two queries the same: letters composed, case folded, white space collapsed.

    Composed and decomposed letters (NFC, NFD) are the same text by Unicode's own rule, and look it. Compatibility
    folding (NFKC) would go on to make ``x²`` the same as ``x2``, and would change which rows of a Chinese task a split
    puts on which side, for the order of these texts decides that.
    """
    return " ".join(unicodedata.normalize("NFC", query_text).casefold().split())


def _split(examples: tuple[Example, ...], data: OneFile, groups: dict[str, str], closed: bool) -> _Sides:
    """Split rows by fraction and seed; whole groups, where a column ties rows, and no repeat across sides.

    Rows with the same query count as one group, so that a repeat does not fall to the other side. Of closed
    labels, the first row of each stays in training unless groups forbid it: a label never shown cannot be given.
    """
    group_of = [_group_of(example, groups) for example in examples]
    order = sorted(set(group_of))
    random.Random(f"split {data.seed}").shuffle(order)
    kept: set[str] = set()
    if closed and not groups:
        first_of_label: dict[str, str] = {}
        rank = {group: position for position, group in enumerate(order)}
        for example, group in sorted(zip(examples, group_of, strict=True), key=lambda pair: rank[pair[1]]):
            first_of_label.setdefault(example.answer, group)
        kept = set(first_of_label.values())
    sizes = Counter(group_of)
    wanted = round(len(examples) * data.test_fraction)
    if data.test_fraction > 0:
        wanted = max(1, wanted)
    test_groups: set[str] = set()
    num_test = 0
    for group in order:
        if num_test >= wanted:
            break
        if group not in kept:
            test_groups.add(group)
            num_test += sizes[group]
    sides = list(zip(examples, group_of, strict=True))
    return _Sides(
        train=tuple(example for example, group in sides if group not in test_groups),
        test=tuple(example for example, group in sides if group in test_groups),
    )


def _group_of(example: Example, groups: Mapping[str, str]) -> str:
    return groups.get(example.origin) or normalised(example.query.text)


def _num_characters(value: object) -> int:
    """Count the characters of a value, lists and mappings counted through."""
    if isinstance(value, Mapping):
        return _num_characters([*value.keys(), *value.values()])
    return sum(map(_num_characters, value)) if isinstance(value, list | tuple) else len(str(value))


def _require_text(text: str) -> None:
    """Refuse half characters: JSON may hold lone surrogates, which no tokenizer or file can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRowError(
            "broken character", f"a text holds half a character, {text[error.start : error.end]!r}."
        ) from error


def _require_answer(answer: str) -> None:
    """Refuse an answer that could not be supervised."""
    if not answer:
        raise _BadRowError("empty answer", "an answer or option is empty.")
