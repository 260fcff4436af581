"""task.yaml as a checked object: the keys a task file may have, and what each means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from manyicl.checked import MOST_COUNTED, Section, UniqueKeyLoader, parse_yaml, read_text, require_encoding, validated
from manyicl.errors import UserError, did_you_mean, quoted
from manyicl.tasks.rows import Quotes, RowFormat
from manyicl.tasks.sandbox import MOST_CHARACTERS
from manyicl.tasks.spec import Family, require_metric, required_distinct

Delimiter = Annotated[
    Annotated[str, Field(pattern=r'^[^"\r\n]$')] | None,
    Field(description="One character between CSV fields, no double quote or line break."),
]
Encoding = Annotated[
    Annotated[str, AfterValidator(require_encoding)] | None,
    Field(description="Encoding of the text, such as cp1252 or utf-16; by default UTF-8."),
]
Sheet = Annotated[
    str | None, Field(description="Sheet of an Excel workbook; by default the only one with content.", min_length=1)
]
QuotesKey = Annotated[Quotes, Field(description="csv, or none where a double quote is an ordinary character.")]
Count = Annotated[int, Field(ge=1, le=MOST_COUNTED)]
Metric = Literal["accuracy", "macro_f1", "exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "numeric_match"]


# White space, what separates names, and control characters and those that turn a line around; no joiners, which
# Persian, Hindi and emoji need.
_UNFIT_FOR_NAMES = re.compile(r"[\s/\\,:\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


def fit_name(written: str) -> str:
    """Make the name of a task of the name of a file or folder.

    >>> fit_name("my tickets, 2024")
    'my_tickets_2024'
    """
    return _UNFIT_FOR_NAMES.sub("_", written)


def row_format(data: TwoFiles | OneFile) -> RowFormat:
    """Return how the files of a task are to be read."""
    return {"delimiter": data.delimiter, "quotes": data.quotes, "encoding": data.encoding, "sheet": data.sheet}


class TwoFiles(Section):
    """Rows in files of their own for each side."""

    train: tuple[str, ...] = Field(min_length=1, description="Rows that may become demonstrations.")
    test: tuple[str, ...] = Field((), description="Rows that are only test queries; may be omitted.")
    delimiter: Delimiter = None
    quotes: QuotesKey = "csv"
    encoding: Encoding = None
    sheet: Sheet = None

    @field_validator("train", "test", mode="before")
    @classmethod
    def _one_or_several(cls, paths: object) -> object:
        return [paths] if isinstance(paths, str) else paths


class OneFile(Section):
    """Rows in one file, split here by fraction and seed."""

    file: str = Field(description="All rows.")
    test_fraction: float = Field(0.2, ge=0, lt=1, description="Share of the rows that become test queries.")
    seed: int = Field(0, le=MOST_COUNTED, description="Seed of the split.")
    group: str | None = Field(
        None, description="Column whose rows stay on one side together, such as a customer or a document."
    )
    delimiter: Delimiter = None
    quotes: QuotesKey = "csv"
    encoding: Encoding = None
    sheet: Sheet = None


class HubData(Section):
    """Two splits of a dataset of the Hugging Face Hub."""

    hf: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name.")
    config: str | None = Field(None, description="Configuration, where the dataset has several.")
    revision: str | None = Field(None, description="Branch, tag or commit.")
    train: str = Field("train", description="Split whose rows may become demonstrations.")
    test: str = Field("test", description="Split whose rows are only test queries.")
    num_train: Count | None = Field(None, description="Rows of the train split as published; for listings alone.")
    num_test: Count | None = Field(None, description="Rows of the test split as published; for listings alone.")


class TaskFile(Section):
    """The keys of a task.yaml.

    Templates are Jinja2 over the columns of a row. White space around an answer, a reference or an option has
    no meaning and is removed.
    """

    name: str | None = Field(None, description="Unique in a run; by default the name of the folder.")
    family: Family = Field(description="Kind of task; any name where a metric is given.")
    description: str | None = Field(None, description="One line for those who look for a task; no model sees it.")
    metric: Metric | None = Field(None, description="By default the usual one of the family.")
    query: str = Field(description="Template of the query.")
    answer: str = Field(description="Template of the answer; a column alone may hold a list of accepted ones.")
    instruction: str | None = Field(None, description="Template over `labels`; comes once, before all shots.")
    labels: tuple[str, ...] | Literal["from_train"] | None = Field(
        None, description="List of all labels, or from_train; never together with choices."
    )
    class_names: Mapping[str, Mapping[str, str]] = Field(
        default_factory=dict,
        description="Column, or place of choices or references, -> class number -> name, applied before the templates.",
    )
    choices: str | None = Field(
        None,
        description="The row's own options: a column that lists them, column.key where the list is within one, "
        "or columns that hold one each, as in option1, option2.",
    )
    references: str | None = Field(
        None, description="Column that lists every accepted answer, or column.key where the list is within one."
    )
    source: str | None = Field(
        None, description="Origin of the data; tasks of one source are never unseen to each other."
    )
    max_answer_tokens: Count | None = Field(None, description="Limit for free answers.")
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse", description="refuse a row that breaks a rule, or drop and count it."
    )
    on_both_sides: Literal["drop", "refuse"] = Field(
        "drop", description="drop training rows whose query is in test too, and count them, or refuse them."
    )
    max_characters: int = Field(
        1_000_000,
        ge=1,
        le=MOST_CHARACTERS,
        description="Most characters of a query, an option or an answer; a row with a longer one is a bad row.",
    )
    data: TwoFiles | OneFile | HubData = Field(description="Where the rows are.")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and (not name or _UNFIT_FOR_NAMES.search(name)):
            raise ValueError(f"a name has no spaces, slashes, commas, colons or control characters; found {name!r}")
        return name

    @field_validator("class_names", mode="before")
    @classmethod
    def _numbered(cls, names: object) -> object:
        """Read ``{label: [World, Sports]}`` as ``{label: {0: World, 1: Sports}}``."""

        def numbered(classes: object) -> object:
            return {str(n): name for n, name in enumerate(classes)} if isinstance(classes, list) else classes

        return {column: numbered(classes) for column, classes in names.items()} if isinstance(names, dict) else names

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if not isinstance(labels, tuple):
            return labels
        stripped = tuple(label.strip() for label in labels)
        if len(stripped) < 2:
            raise ValueError(f"expected two labels at least, found {list(stripped)}")
        if not all(stripped):
            raise ValueError("a label is empty")
        return required_distinct(stripped)

    @field_validator("data", mode="before")
    @classmethod
    def _of_one_kind(cls, data: object) -> object:
        """Tell by its keys how a task names its rows, and check them as that alone."""
        if isinstance(data, Section):
            return data
        kinds: dict[str, type[Section]] = {"hf": HubData, "file": OneFile, "train": TwoFiles}
        keys = data if isinstance(data, Mapping) else {}
        for key, kind in kinds.items():
            if key in keys:
                return validated(kind, keys, None, "data")
        remedy = next(filter(None, (did_you_mean(str(key), kinds) for key in keys)), None)
        found = quoted(sorted(map(str, keys)) or data)
        what, expected = "data: it does not say where the rows are", "`train` and `test`, or `file`, or `hf`"
        raise UserError("wrong_value", what, expected=expected, found=found, remedy=remedy, field="data")

    @model_validator(mode="after")
    def _has_a_metric(self) -> Self:
        require_metric(self.family, self.metric)
        return self

    @model_validator(mode="after")
    def _one_kind_of_answer(self) -> Self:
        if self.choices is not None and self.labels is not None:
            raise ValueError("labels are one set for all rows, choices a list in each row; give one of them")
        if self.references is not None and (self.choices is not None or self.closed_labels is not None):
            raise ValueError("references list accepted free answers; omit them with labels or choices")
        return self

    @property
    def closed_labels(self) -> tuple[str, ...] | Literal["from_train"] | None:
        """The closed answer set; classification and nli have one even if the file does not say so."""
        if self.labels is None and self.choices is None and self.family in ("classification", "nli"):
            return "from_train"
        return self.labels


def read_task_file(path: Path) -> TaskFile:
    """Read a task.yaml.

    Raises:
        UserError: If it is missing, no YAML, or breaks a rule; it names the file and the key.
    """
    content = parse_yaml(read_text(path), str(path), _TextLoader)
    if not isinstance(content, dict):
        expected = "keys such as family, query, answer and data"
        raise UserError("no_mapping", "not a task file", expected=expected, found=quoted(content), file=path)
    return validated(TaskFile, {key: value for key, value in content.items() if value is not None}, path)


class _TextLoader(UniqueKeyLoader):
    """YAML in which ``yes``, ``007`` and ``1.0`` stay text: a label is what the user wrote."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


def _no_value(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str | None:
    """Read a key without a value as unset, and ``""`` as empty text."""
    return None if node.value == "" and node.style is None else str(loader.construct_scalar(node))


_TextLoader.add_constructor("tag:yaml.org,2002:str", _no_value)
