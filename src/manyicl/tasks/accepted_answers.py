"""Row -> its accepted answers, as the task's answer template renders them: for examples, and to score predictions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from manyicl.errors import UserError, quoted
from manyicl.tasks.spec import TaskSpec
from manyicl.tasks.template import compiled
from manyicl.tasks.values import as_option, as_written, has_place, value_at

_UNLABELLED = "-1"  # as the Hub writes the class of a row that has none


class AcceptedAnswers:
    """Renders the accepted answers of a row.

    Attributes:
        columns: Columns that the answer template names.
    """

    def __init__(self, spec: TaskSpec, *, is_closed: bool | None = None) -> None:
        """Take a task with an answer template.

        Args:
            spec: The task.
            is_closed: Whether its answers are of one set of labels; None for what the spec says, which does not know
                labels that are still to be taken from the training rows.
        """
        assert spec.answer_template is not None, "a task that was read from rows has one"
        self._spec = spec
        self._is_closed = spec.labels is not None if is_closed is None else is_closed
        self._label_set = frozenset(spec.labels or ())
        self._template = compiled(spec.answer_template)
        self.columns = self._template.columns
        self._named_columns = spec.class_names.keys() & set(self.columns)
        # The names of options are under their place, of which the template of the answer knows a part.
        self._option_names = {} if self._named_columns else spec.class_names.get(spec.choices_column or "", {})

    def __call__(self, row: Mapping[str, object]) -> tuple[str, ...]:
        """Render every accepted answer, the canonical one first, without repeats; any of them may be empty.

        Raises:
            UserError: If a column is missing, the row has no label, or several.
        """
        template, class_names = self._template, self._spec.class_names
        for column in self._named_columns:
            if str(row.get(column)) == _UNLABELLED and _UNLABELLED not in class_names[column]:
                raise UserError("row_without_label", f"the column {column!r} is -1: the row has no label", field=column)
        bare = template.bare_column
        values = row.get(bare) if bare is not None else None
        if isinstance(values, list | tuple):
            answers = [template.render({**row, str(bare): answer}, class_names) for answer in values]
            if not answers:
                raise UserError("empty_answer", f"the answer column {bare!r} holds an empty list", field=bare)
        else:
            answers = [template.render(row, class_names)]
        answers = [self._option_names.get(answer.strip(), answer) for answer in answers]
        if self._is_closed and len(labels := self._labels_in(answers, row)) > 1:
            # One answer of a closed set is supervised and scored, never several.
            what = f"task {self._spec.name!r} is multi-label: this row has {sorted(labels)}"
            remedy = (
                "Keep the rows with one label, or make a yes/no task of each label. If an answer is one label all the "
                "same, list the task's labels."
            )
            raise UserError("several_labels", what, expected="one label in each row", remedy=remedy)
        if self._spec.references_column is not None:
            place = self._spec.references_column
            references = value_at(row, place)
            if not isinstance(references, list | tuple):
                what = f"the column {place!r} lists the accepted answers"
                code = "empty_answer" if references is None and has_place(row, place) else "not_a_list"
                raise UserError(code, what, expected="a list", found=quoted(references), field=place)
            answers += [str(as_written(reference)) for reference in self._spec.named(references, place)]
        plain = str.strip if self._spec.choices_column is None else as_option
        return tuple(dict.fromkeys(map(plain, answers)))

    def _labels_in(self, answers: Sequence[str], row: Mapping[str, object]) -> set[str]:
        """Find several labels in one answer: a list as it is, a list joined, or a text that joins labels."""
        if len(answers) > 1:
            return set(answers)
        answer = answers[0]
        if answer in self._label_set:
            return {answer}
        for column in self._template.columns:
            value = row.get(column)
            if isinstance(value, list | tuple) and answer not in map(str, value):
                return set(map(str, value))
        parts = {part.strip() for part in re.split(r"[,;|]", answer)}
        return parts if self._label_set and parts <= self._label_set else {answer}
