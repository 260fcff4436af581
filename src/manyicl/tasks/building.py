"""Rows and the keys of a task file -> Task: rendering, and the rules for rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NoReturn

from manyicl.checked import require_whole_characters, validated
from manyicl.errors import UserError, did_you_mean, located, pluralized, quoted, shortened
from manyicl.tasks.accepted_answers import AcceptedAnswers
from manyicl.tasks.leakage import ON_BOTH_SIDES, leaked
from manyicl.tasks.rows import LocatedRow
from manyicl.tasks.schema import OneFile, TaskFile, TwoFiles, fit_name
from manyicl.tasks.spec import TaskSpec
from manyicl.tasks.split import split
from manyicl.tasks.task import Example, Pairs, Query, Task, hash_content
from manyicl.tasks.template import Template, compiled
from manyicl.tasks.values import as_written, missing_column, num_characters

MOST_DROPPED_NOTED = 1_000
# Code of the error of a bad row -> how it is counted where such rows are dropped.
_BAD_ROWS = {
    "empty_query": "empty query",
    "empty_answer": "empty answer",
    "empty_option": "empty option",
    "option_not_text": "option that is no text",
    "text_too_long": "text too long",
    "half_a_character": "broken character",
    "row_without_label": "row without a label",
    "not_an_option": "answer is no option",
    "unknown_label": "label outside the closed set",
}


@contextmanager
def _within_key(key: str) -> Iterator[None]:
    """Name the key of the task file in which a mistake is."""
    try:
        yield
    except UserError as error:
        error.what = f"{key}: {error.what}"
        raise error.at(field=key)  # noqa: B904


class TaskBuilder:
    """Renders the rows of one task and checks its rules."""

    def __init__(self, keys: TaskFile, file: str | None, default_name: str = "") -> None:
        """Compile the templates.

        Args:
            keys: Keys of a task file.
            file: File that errors name.
            default_name: Name of the task where the keys give none.

        Raises:
            UserError: If a template is wrong.
        """
        self.keys = keys
        self.file = file
        self.name = keys.name or fit_name(default_name)
        self.dropped: Counter[str] = Counter()
        self.dropped_rows: defaultdict[str, list[str]] = defaultdict(list)
        with located(file=file):
            query_template = self._template(keys.query, "query")
            answer_template = self._template(keys.answer, "answer")
            with _within_key("instruction"):
                compiled(keys.instruction or "")
            self.read_columns = {*query_template.columns, *answer_template.columns}
            self._require_class_names_read()
        self.is_closed = keys.closed_labels is not None
        self.labels = keys.closed_labels if isinstance(keys.closed_labels, tuple) else None
        self.label_set = frozenset(self.labels or ())
        values = keys.model_dump(include={"family", "metric", "class_names", "source", "max_answer_tokens"})
        values |= {"name": self.name, "labels": self.labels, "choices_column": keys.choices}
        values |= {"query_template": keys.query, "instruction_template": keys.instruction}
        values |= {"answer_template": keys.answer, "references_column": keys.references}
        self.spec = TaskSpec(**{key: value for key, value in values.items() if value})
        self.accepted = AcceptedAnswers(self.spec, is_closed=self.is_closed)

    def _template(self, source: str, key: str) -> Template:
        with _within_key(key):
            template = compiled(source)
        if not template.columns:
            column = source.strip() if source.strip().isidentifier() else "text"
            hint = " A column whose name has a meaning of its own is written row['true']." if "{{" in source else ""
            what = f"{key}: the template {quoted(source)} names no column"
            remedy = f"Write one in braces, as in '{{{{ {column} }}}}'.{hint}"
            raise UserError("template_without_column", what, remedy=remedy, field=key)
        return template

    def _require_class_names_read(self) -> None:
        """Refuse class names of a column that no template reads nor is all of a row's options or accepted answers."""
        read = self.read_columns.union(filter(None, (self.keys.choices, self.keys.references)))
        for column in self.keys.class_names:
            if column not in read:
                what = f"class_names: no template reads the column {column!r}, nor is it choices or references"
                remedy, expected = did_you_mean(column, read) or "Leave it out.", f"one of {sorted(read)}"
                raise UserError("no_effect", what, expected=expected, remedy=remedy, field="class_names")

    def drop(self, reason: str, origins: Iterable[str]) -> None:
        """Count rows that are dropped, and note where the first ones are."""
        for origin in origins:
            self.dropped[reason] += 1
            if len(self.dropped_rows[reason]) < MOST_DROPPED_NOTED:
                self.dropped_rows[reason].append(origin)

    def two_sided_task(self, train: Sequence[LocatedRow], test: Sequence[LocatedRow]) -> Task:
        """Make the task of rows that come with their sides."""
        with located(file=self.file):
            examples = self._render_all(train), self._render_all(test)
            if test and not examples[1]:
                self._refuse_no_rows("test")
            return self._finish(*examples)

    def split_task(self, rows: Sequence[LocatedRow], data: OneFile) -> Task:
        """Make the task of rows that are split here."""
        groups: dict[str, str] = {}
        if data.group is not None:
            require_column(rows, data.group, Path(data.file))
            # A row without a group, an empty field or null, is a group of its own.
            groups = {row.origin: str(as_written(row.columns[data.group])).strip() for row in rows}
        with located(file=self.file):
            examples = self._render_all(rows)
            if not examples:
                self._refuse_no_rows("training")
            return self._finish(*split(examples, data, groups, self.is_closed))

    def _refuse_no_rows(self, side: str) -> NoReturn:
        counts = ", ".join(f"{count} ({reason})" for reason, count in self.dropped.items())
        note = f" left; dropped: {counts}" if counts else ""
        raise UserError(f"no_{side}_rows", f"task {self.name!r} has no {side} rows{note}")

    def _render_all(self, rows: Iterable[LocatedRow]) -> tuple[Example, ...]:
        """Render rows; one that breaks a rule is refused, or dropped and counted, as the task file says."""
        examples = []
        for row in rows:
            try:
                examples.append(self.example(row))
            except UserError as error:
                reason = _BAD_ROWS.get(error.code)
                if reason is not None and self.keys.bad_rows == "drop":
                    self.drop(reason, [row.origin])
                    continue
                if reason is not None:
                    remedy = f"Fix the row, or set `bad_rows: drop` in a task.yaml for {self.name!r}."
                    error.remedy = f"{error.remedy or ''} {remedy}".strip()
                raise error.at(file=row.file, row=row.line)  # noqa: B904
        return tuple(examples)

    def task_of(self, examples: Iterable[Example]) -> Task:
        """Make the task of rendered rows, all for training.

        Raises:
            UserError: If there are none, or all have the same label.
        """
        return self._finish(tuple(examples), ())

    def example(self, row: LocatedRow) -> Example:
        """Render one row to an example.

        Raises:
            UserError: If a column is missing, the row holds several labels, or breaks a rule (``_BAD_ROWS``).
        """
        try:
            query = self.spec.query(row.columns)
            answers = self.accepted(row.columns)
        except UserError as error:
            if error.code not in _BAD_ROWS:  # a row that is too long may be bad, and the template good for others
                for column in sorted(self.read_columns & row.columns.keys()):
                    self._require_short(f"the column {column!r}", num_characters(row.columns[column]))
            raise
        for what, texts in (("query", (query.text,)), ("option", query.choices or ()), ("answer", answers)):
            for text in texts:
                self._require_short(f"the {what}", len(text))
                require_whole_characters(text)
        if not query.text.strip():
            raise UserError("empty_query", "the query is empty", field="query")
        if not all(answers):
            raise UserError("empty_answer", "an answer or option is empty")
        self._require_known(answers[0], query)
        return Example(query, answers[0], answers, row.origin)

    def _require_short(self, what: str, num_characters: int) -> None:
        if num_characters > self.keys.max_characters:
            expected = f"at most {self.keys.max_characters:,} (max_characters)"
            found = pluralized(num_characters, "character")
            raise UserError("text_too_long", f"{what} is too long", expected=expected, found=found)

    def _require_known(self, answer: str, query: Query) -> None:
        """Check an answer against the row's options or the closed set."""
        if query.choices is not None and answer not in query.choices:
            what = f"the answer {shortened(answer)!r} is none of the row's options"
            raise UserError("not_an_option", what, expected=f"one of {shortened(repr(list(query.choices)))}")
        if self.labels is not None and answer not in self.label_set:
            named = ", ".join(map(quoted, self.labels[:12])) + (", …" if len(self.labels) > 12 else "")
            # Where rows are dropped nobody reads it, and among thousands of labels it takes a tenth of a second.
            hint = did_you_mean(shortened(answer), self.labels) if self.keys.bad_rows == "refuse" else None
            what = f"{shortened(answer)!r} is no label of task {self.name!r}"
            raise UserError("unknown_label", what, expected=f"one of {named}", remedy=hint)

    def _finish(self, train: tuple[Example, ...], test: tuple[Example, ...]) -> Task:
        """Take leaked rows off the training side, settle the labels, hash the examples."""
        train = self._without_test_queries(train, test)
        if not train:
            self._refuse_no_rows("training")
        labels = self.labels
        if self.is_closed and labels is None:
            labels = tuple(sorted({example.answer for example in train}))
            if len(labels) < 2:
                all_equal = f"and all have the answer {labels[0]!r}"
                what = f"task {self.name!r} takes its labels from the training rows, {all_equal}"
                raise UserError("one_label", what, expected="two labels at least")
            test = self._with_known_labels(test, labels)
        spec = TaskSpec(**{**self.spec.model_dump(exclude_unset=True), "labels": labels})
        dropped_rows = {reason: tuple(origins) for reason, origins in self.dropped_rows.items()}
        task = Task(spec, train, test, dropped=dict(self.dropped), dropped_rows=dropped_rows)
        with _within_key("instruction"):  # which alone is rendered here: it needs all labels
            require_whole_characters(task.instruction())
            return replace(task, data_hash=hash_content(task))

    def _without_test_queries(self, train: tuple[Example, ...], test: tuple[Example, ...]) -> tuple[Example, ...]:
        pairs = leaked(train, test)
        if not pairs:
            return train
        if self.keys.on_both_sides == "refuse":
            rows, places = pluralized(len(pairs), "training row"), [example.origin for example in pairs[0]]
            what = f"task {self.name!r} has {rows} whose query is in test too; the first is {', like '.join(places)}"
            remedy = (
                "Take such rows off one side, or set `on_both_sides: drop`, which takes them off the training side."
            )
            raise UserError("on_both_sides", what, remedy=remedy)
        self.drop(ON_BOTH_SIDES, (example.origin for example, _ in pairs))
        leaks = {id(example) for example, _ in pairs}
        return tuple(example for example in train if id(example) not in leaks)

    def _with_known_labels(self, test: tuple[Example, ...], labels: tuple[str, ...]) -> tuple[Example, ...]:
        label_set = frozenset(labels)
        unknown = [example for example in test if example.answer not in label_set]
        if not unknown:
            return test
        if self.keys.bad_rows == "refuse":
            label, rows = unknown[0].answer, pluralized(len(unknown), "test row")
            what = f"{unknown[0].origin}: no training row of task {self.name!r} has the label {label!r}"
            remedy = "List all labels under `labels:` in a task.yaml, take another family if answers are free"
            remedy = f"{did_you_mean(label, labels)} {remedy}, or set `bad_rows: drop`."
            raise UserError("label_only_in_test", what, found=f"{rows} with such labels", remedy=remedy)
        self.drop("label that no training row has", (example.origin for example in unknown))
        if len(unknown) == len(test):
            self._refuse_no_rows("test")
        return tuple(example for example in test if example.answer in label_set)


def task_of_examples(
    name: str, train: Pairs, test: Pairs, labels: Iterable[str] | str | None, keys: Mapping[str, object]
) -> Task:
    """Make a task of queries and answers; see ``Task.from_examples``.

    Args:
        name: Name of the task.
        train: Training examples or pairs.
        test: Test examples or pairs.
        labels: Closed answer set, ``from_train`` or None.
        keys: Further keys of a task file.

    Raises:
        UserError: If the name is no text, or the examples make no task.
    """
    if not isinstance(name, str):
        raise UserError("wrong_type", "the name of a task is a text", found=quoted(name), field="name")
    sides = [[_row_of(example, "train", number) for number, example in enumerate(train, 1)]]
    sides.append([_row_of(example, "test", number) for number, example in enumerate(test, 1)])
    values: dict[str, object] = {"name": name, "query": "{{ text }}", "answer": "{{ answer }}", **keys}
    values["labels"] = labels if labels is None or isinstance(labels, str) else tuple(labels)
    values["choices"] = "choices" if any("choices" in row.columns for row in chain(*sides)) else None
    values["data"] = TwoFiles(train=("train",))
    return TaskBuilder(validated(TaskFile, values, None), None).two_sided_task(*sides)


def _row_of(example: tuple[str, str] | Example, side: str, number: int) -> LocatedRow:
    """Write an example, or a pair of query and answer, as the row that would give it."""
    if isinstance(example, Example):
        references = list(example.references or (example.answer,))
        columns = {"text": example.query.text, "answer": references if len(references) > 1 else references[0]}
        if example.query.choices is not None:
            columns["choices"] = list(example.query.choices)
        return LocatedRow(columns, side, number)
    is_pair = isinstance(example, Sequence) and not isinstance(example, str) and len(example) == 2
    if not is_pair or not all(isinstance(text, str) for text in example):
        what = "an example is a query and its answer"
        raise UserError("not_an_example", what, expected="two texts", found=quoted(example), file=side, row=number)
    return LocatedRow(dict(zip(("text", "answer"), example, strict=True)), side, number)


def require_column(rows: Sequence[LocatedRow], column: str, path: Path) -> None:
    """Refuse rows that lack a column.

    Raises:
        UserError: If there are no rows, or one lacks the column.
    """
    for row in rows:
        if column not in row.columns:
            raise missing_column(column, row.columns).at(file=row.file, row=row.line)
    if not rows:
        raise UserError("no_rows", "the file holds no rows", file=path)
