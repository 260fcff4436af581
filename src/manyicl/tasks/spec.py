"""TaskSpec: everything about a task except its examples, as plain data that converts to JSON and pickles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manyicl.errors import UserError, did_you_mean, quoted
from manyicl.tasks.example import Query
from manyicl.tasks.template import class_name, compiled
from manyicl.tasks.values import as_option, as_text, has_place, value_at

FAMILIES: tuple[str, ...] = ("classification", "nli", "qa", "summarization", "generation", "math")
Family = Annotated[str, Field(pattern=r"^[^\s/\\,:]+$")]  # one of these, or any other name together with a metric

Columns = Mapping[str, object]
_METRIC_OF_FREE_ANSWERS = {"summarization": "rougeL", "generation": "rougeL", "math": "numeric_match"}


def _usual_metric(known: dict[str, Any]) -> str:
    is_closed = known.get("labels") is not None or known.get("choices_column") is not None
    return "accuracy" if is_closed else _METRIC_OF_FREE_ANSWERS.get(known.get("family", ""), "exact_match")


def require_metric(family: str, metric: str | None) -> None:
    """Refuse a family of the user's own, or a misspelt one, without a metric: only the known ones have a usual one.

    Raises:
        UserError: If it has none.
    """
    if family not in FAMILIES and metric is None:
        expected = f"one of {', '.join(FAMILIES)}, or any other name together with a metric"
        what, remedy = "family: no metric is usual for it", did_you_mean(family, FAMILIES)
        raise UserError("wrong_value", what, expected=expected, found=repr(family), remedy=remedy, field="family")


def family_order(family: str) -> tuple[int, str]:
    """Return the place of a family among others: the known ones in their order, then those of the user's own."""
    return (FAMILIES.index(family) if family in FAMILIES else len(FAMILIES), family)


def required_distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return labels, none of which is given twice.

    Raises:
        ValueError: If one is.
    """
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise ValueError(f"the label {repeated[0]!r} is given twice")
    return labels


class TaskSpec(BaseModel):
    """A task without its examples: name, labels, templates as text. Frozen; converts to JSON and back; pickles.

    Templates are compiled when they are first used and cached by their text, so a spec stays plain data.

    Examples:
        >>> spec = TaskSpec(
        ...     name="mood", family="classification", query_template="Review: {{ text }}", labels=("good", "bad")
        ... )
        >>> spec.query({"text": "what a film"}).text
        'Review: what a film'
        >>> TaskSpec.model_validate_json(spec.model_dump_json()) == spec
        True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="Name of the task, unique in a run.")
    family: Family = Field(description="Kind of task, such as classification or qa.")
    query_template: str = Field(description="Jinja2 template that renders the columns of a row to the query text.")
    instruction_template: str | None = Field(
        None, description="Jinja2 template of the instruction, with `labels` in scope; none without an instruction."
    )
    answer_template: str | None = Field(
        None, description="Jinja2 template that renders the columns of a row to its answer; none where it is not known."
    )
    references_column: str | None = Field(
        None, description="Place of a row's list of further accepted answers, as `value_at` reads it."
    )
    class_names: Mapping[str, Mapping[str, str]] = Field(
        default_factory=dict,
        description="Column, or place of options or accepted answers, -> class number -> name, applied before a "
        "template is rendered.",
    )
    labels: tuple[str, ...] | None = Field(
        None, min_length=1, description="Closed answer set in a fixed order; none for free answers and row options."
    )
    choices_column: str | None = Field(
        None, description="Place of a row's own options in multiple choice, as `value_at` reads it."
    )
    metric: str = Field(
        default_factory=_usual_metric,
        description="Name of a metric of manyicl.evaluation.metrics; by default the usual one of the family.",
    )
    source: str = Field(
        default_factory=lambda known: str(known.get("name", "")),
        description="Origin of the data; tasks of one source are siblings, never unseen to each other.",
    )
    max_answer_tokens: int | None = Field(None, ge=1, description="Limit for free answers, in tokens.")

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return labels and required_distinct(labels)

    @model_validator(mode="after")
    def _has_a_metric(self) -> Self:
        try:
            require_metric(self.family, self.metric if "metric" in self.model_fields_set else None)
        except UserError as error:  # pydantic collects the other kind
            raise ValueError(str(error)) from error
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the query template names, sorted."""
        return compiled(self.query_template).columns

    @property
    def is_closed(self) -> bool:
        """Whether every answer is one of the task's labels or of the row's own options."""
        return self.labels is not None or self.choices_column is not None

    def instruction(self, labels: tuple[str, ...] | None = None) -> str:
        """Render the instruction, with ``labels`` instead of the task's own if they were renamed."""
        if self.instruction_template is None:
            return ""
        return compiled(self.instruction_template).render({"labels": list(labels or self.labels or ())})

    def query(self, row: Columns | str) -> Query:
        """Render a row as a query; a plain string is enough if the template has one column.

        Raises:
            UserError: If a column is missing, or a string is given to a template with several columns.
        """
        template = compiled(self.query_template)
        if isinstance(row, str):
            if len(template.columns) != 1 or self.choices_column is not None:
                columns = f"the columns {list(template.columns)}; a plain string fills one"
                what = f"A query of task {self.name!r} has {columns}"
                raise UserError("query_needs_columns", what, remedy="Give a mapping with these keys.")
            row = {template.columns[0]: row}
        if not isinstance(row, Mapping):
            raise UserError("query_not_a_mapping", f"A query of task {self.name!r} is a mapping", found=quoted(row))
        # The same text as if the row were in a file: a number as its text, NaN as nothing.
        as_in_file: Columns = as_text(dict(row))
        return Query(template.render(as_in_file, self.class_names), self._choices(as_in_file))

    def _choices(self, row: Columns) -> tuple[str, ...] | None:
        """Read the row's own options, if the task has any."""
        if self.choices_column is None:
            return None
        column, options = self.choices_column, value_at(row, self.choices_column)
        if not isinstance(options, list | tuple) or not options:
            what = f"The options of task {self.name!r} are read from the column {column!r}"
            is_empty = options == [] or (options is None and has_place(row, column))
            code, expected = "empty_option" if is_empty else "not_a_list", "a non-empty list"
            raise UserError(code, what, expected=expected, found=quoted(options), field=column)
        if any(option is None or not str(option).strip() for option in options):
            what = f"An option in the column {column!r} is empty"
            raise UserError("empty_option", what, found=quoted(list(options)), field=column)
        if any(isinstance(option, list | tuple | Mapping) for option in options):
            what, expected = f"An option in the column {column!r} is itself a list or a mapping", "texts"
            raise UserError("option_not_text", what, expected=expected, found=quoted(list(options)), field=column)
        # An option that is there twice is one answer, not its own rival.
        return tuple(dict.fromkeys(map(as_option, self.named(options, column))))

    def named(self, values: Sequence[object], place: str) -> Sequence[object]:
        """Turn the class numbers at a place of a row into their names; other values stay.

        Raises:
            UserError: If a number has no name.
        """
        names = self.class_names.get(place)
        return values if names is None else [class_name(place, value, names) for value in values]
