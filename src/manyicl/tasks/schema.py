"""task.yaml as a checked object: the keys a task file may have, and what each means."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from manyicl.errors import UserError, did_you_mean
from manyicl.tasks.rows import Quotes
from manyicl.tasks.task import Family

METRIC_OF_FREE_ANSWERS: Mapping[str, str] = {
    "qa": "exact_match",
    "summarization": "rougeL",
    "generation": "rougeL",
    "math": "numeric_match",
}
Metric = Literal["accuracy", "macro_f1", "exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "numeric_match"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TwoFiles(_Section):
    """Rows in files of their own for each side."""

    train: tuple[str, ...] = Field(min_length=1, description="Rows that may become demonstrations.")
    test: tuple[str, ...] = Field((), description="Rows that are only ever asked; may be left out.")
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="Between CSV fields.")
    quotes: Quotes = Field("csv", description="csv, or none where a double quote is an ordinary character.")

    @field_validator("train", "test", mode="before")
    @classmethod
    def _one_or_several(cls, paths: object) -> object:
        return [paths] if isinstance(paths, str) else paths


class OneFile(_Section):
    """Rows in one file, split here by fraction and seed."""

    file: str = Field(description="All rows.")
    test_fraction: float = Field(0.2, ge=0, lt=1, description="Share of the rows that are only ever asked.")
    seed: int = Field(0, description="Of the split.")
    group: str | None = Field(
        None, description="Column whose rows stay on one side together, such as a customer or a document."
    )
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="Between CSV fields.")
    quotes: Quotes = Field("csv", description="csv, or none where a double quote is an ordinary character.")


class HubData(_Section):
    """Two splits of a dataset of the Hugging Face Hub."""

    hf: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name.")
    config: str | None = Field(None, description="Configuration, where the dataset has several.")
    revision: str | None = Field(None, description="Branch, tag or commit.")
    train: str = Field("train", description="Split whose rows may become demonstrations.")
    test: str = Field("test", description="Split whose rows are only ever asked.")


class TaskFile(_Section):
    """The keys of a task.yaml.

    Templates are Jinja2 over the columns of a row. White space around an answer, a reference or an option has
    no meaning and is removed.
    """

    name: str | None = Field(None, description="Unique in a run; by default the name of the folder.")
    family: Family = Field(description="What kind of task it is.")
    metric: Metric | None = Field(None, description="By default the usual one of the family.")
    query: str = Field(description="Template of what is asked.")
    answer: str = Field(description="Template of the answer; a column alone may hold a list of accepted ones.")
    instruction: str | None = Field(None, description="Template over `labels`; stands once before all shots.")
    labels: tuple[str, ...] | Literal["from_train"] | None = Field(
        None, description="The closed answer set, or from_train; never together with choices."
    )
    class_names: Mapping[str, Mapping[str, str]] = Field(
        default_factory=dict, description="Column -> class number -> name, applied before the templates."
    )
    choices: str | None = Field(None, description="Column that holds the row's own list of options.")
    references: str | None = Field(None, description="Column that lists every accepted answer.")
    source: str | None = Field(
        None, description="What it was drawn from; tasks of one source are never unseen to each other."
    )
    max_answer_tokens: int | None = Field(None, ge=1, description="Limit for free answers.")
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse", description="refuse a row that breaks a rule, or drop and count it."
    )
    data: TwoFiles | OneFile | HubData = Field(description="Where the rows are.")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or any(c in name for c in "/\\,:\n\t ")):
            raise ValueError("a name has no spaces, slashes, commas or colons")
        return name

    @field_validator("class_names", mode="before")
    @classmethod
    def _numbered(cls, names: object) -> object:
        """Read ``{label: [World, Sports]}`` as ``{label: {0: World, 1: Sports}}``."""
        if not isinstance(names, dict):
            return names
        return {
            column: {str(number): name for number, name in enumerate(of_column)}
            if isinstance(of_column, list)
            else of_column
            for column, of_column in names.items()
        }

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if not isinstance(labels, tuple):
            return labels
        stripped = tuple(label.strip() for label in labels)
        if len(stripped) < 2:
            raise ValueError(f"expected two labels at least, found {list(stripped)}")
        for label in stripped:
            if not label or "\n\n" in label:
                raise ValueError(f"a label is empty or holds a blank line: {label!r}")
            if stripped.count(label) > 1:
                raise ValueError(f"{label!r} stands twice")
        return stripped

    @model_validator(mode="after")
    def _one_kind_of_answer(self) -> Self:
        if self.choices is not None and self.labels is not None:
            raise ValueError("labels are one set for all rows, choices a list in each row; give one of them")
        if self.references is not None and (self.choices is not None or self.closed_labels is not None):
            raise ValueError("references list accepted free answers; leave them out beside labels or choices")
        return self

    @property
    def closed_labels(self) -> tuple[str, ...] | Literal["from_train"] | None:
        """The closed answer set; classification and nli have one even if the file does not say so."""
        if self.labels is None and self.choices is None and self.family in ("classification", "nli"):
            return "from_train"
        return self.labels

    @property
    def chosen_metric(self) -> str:
        """The metric named, or the usual one: accuracy for closed answers, else by family."""
        if self.metric is not None:
            return self.metric
        if self.closed_labels is not None or self.choices is not None:
            return "accuracy"
        return METRIC_OF_FREE_ANSWERS[self.family]


def read_task_file(path: Path) -> TaskFile:
    """Read a task.yaml.

    Raises:
        UserError: If it is missing, no YAML, or breaks a rule; it names the file and the key.
    """
    try:
        content = _read_yaml(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys such as family, query, answer and data; found {content!r}.")
    content = {key: value for key, value in content.items() if value is not None}
    data = content.get("data")
    if data is not None:
        content["data"] = checked(_kind_of_data(data, path), data, f"{path}: data")
    return checked(TaskFile, content, str(path))


def _kind_of_data(data: object, path: Path) -> type[TwoFiles] | type[OneFile] | type[HubData]:
    """Tell by its keys how a task names its rows."""
    if not isinstance(data, dict):
        raise UserError(f"{path}: data: expected `train` and `test`, or `file`, or `hf`; found {data!r}.")
    for key, kind in (("hf", HubData), ("file", OneFile), ("train", TwoFiles)):
        if key in data:
            return kind
    nearest = next((hint for key in data if (hint := did_you_mean(str(key), ("train", "file", "hf")))), "")
    raise UserError(
        f"{path}: data: expected `train` and `test`, or `file`, or `hf`; found {sorted(map(str, data))}.{nearest}"
    )


ModelT = TypeVar("ModelT", bound=BaseModel)


def checked(model: type[ModelT], values: Mapping[Any, Any], place: str) -> ModelT:
    """Validate ``values``; the first thing wrong becomes one sentence that begins with ``place``.

    Raises:
        UserError: If anything is wrong.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt key says more than the required key that it leaves missing.
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"] if not (isinstance(part, str) and "[" in part))
    known = list(model.model_fields)
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(key, known) or f" Known keys: {', '.join(known)}."
        raise UserError(f"{place}: unknown key {key!r}.{hint}")
    if first["type"] == "missing":
        raise UserError(f"{place}: the key {key!r} is missing.")
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    found = "" if first["type"] == "value_error" else f"; found {first['input']!r}"
    hint = ""
    if first["type"] == "literal_error":
        hint = did_you_mean(str(first["input"]), first["ctx"]["expected"].replace("'", "").split(", "))
    raise UserError(f"{place}: {key + ': ' if key else ''}{reason}{found}.{hint}")


class _TextLoader(yaml.SafeLoader):
    """YAML in which ``yes``, ``007`` and ``1.0`` stay text: a label is what the person wrote."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _no_value(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str | None:
    """Read a key without a value as unset, and ``""`` as empty text."""
    return None if node.value == "" and node.style is None else str(loader.construct_scalar(node))


_TextLoader.add_constructor("tag:yaml.org,2002:str", _no_value)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _TextLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: not valid YAML, {getattr(error, 'problem', None) or error}.") from error
