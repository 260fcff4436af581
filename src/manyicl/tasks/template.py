"""Sandboxed Jinja2: example -> query text, answer text."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from manyicl.errors import UserError, did_you_mean

ClassNames = Mapping[str, Mapping[str, str]]


def as_written(value: object) -> object:
    """Turn JSON's ``true``, ``false`` and ``null`` into the text a person expects to read; null is nothing."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else value


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, keep_trailing_newline=False, finalize=as_written
)


class Template:
    """A text with ``{{ column }}`` in it, rendered without access to anything but the row.

    A template comes from a task file that a stranger may have written, so it runs in Jinja2's immutable
    sandbox and an unknown column is an error instead of an empty string. A column whose name is no
    identifier is written ``{{ row['Customer text'] }}``.
    """

    def __init__(self, source: str, class_names: ClassNames | None = None) -> None:
        """Compile ``source``; ``class_names`` (column -> class number -> name) apply before it is rendered.

        Raises:
            UserError: If the syntax is wrong.
        """
        try:
            self._compiled = _ENVIRONMENT.from_string(source)
            self.columns: tuple[str, ...] = _columns_named_in(_ENVIRONMENT.parse(source))
        except TemplateSyntaxError as error:
            raise UserError(f"Template {source!r} does not parse: {(error.message or '').rstrip('.')}.") from error
        self.source = source
        self._class_names = {column: names for column, names in (class_names or {}).items() if column in self.columns}

    def render(self, row: Mapping[str, object]) -> str:
        """Render one row.

        Raises:
            UserError: If a column is missing or the template fails on this row.
        """
        missing = [column for column in self.columns if column not in row]
        if missing:
            raise UserError(
                f"Template {self.source!r} names the column {missing[0]!r}, which the row lacks; "
                f"its columns are {sorted(map(str, row))}.{did_you_mean(missing[0], map(str, row))}"
            )
        named = {
            **row,
            **{column: _class_name(column, row[column], names) for column, names in self._class_names.items()},
        }
        try:
            return self._compiled.render({"row": named, **named})
        except (TemplateError, TypeError, ValueError, ArithmeticError, KeyError, OverflowError) as error:
            raise UserError(f"Template {self.source!r} fails on a row: {error}.") from error

    def __repr__(self) -> str:
        return f"Template({self.source!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and other.source == self.source and other._class_names == self._class_names

    def __hash__(self) -> int:
        return hash(self.source)


def _columns_named_in(syntax: nodes.Template) -> tuple[str, ...]:
    """List the columns a template reads, by bare name or as ``row['name']``."""
    names = meta.find_undeclared_variables(syntax) - set(_ENVIRONMENT.globals)
    subscripts = {
        item.arg.value
        for item in syntax.find_all(nodes.Getitem)
        if isinstance(item.node, nodes.Name) and item.node.name == "row" and isinstance(item.arg, nodes.Const)
    }
    if subscripts:
        names = (names - {"row"}) | subscripts
    return tuple(sorted(names))


def _class_name(column: str, value: object, names: Mapping[str, str]) -> object:
    """Turn a class number, or each of a list, into its name."""
    if isinstance(value, list | tuple):
        return [_class_name(column, part, names) for part in value]
    number = str(as_written(value))
    if number not in names:
        raise UserError(
            f"The column {column!r} holds {number!r}, which class_names does not name; it names {sorted(names)}."
        )
    return names[number]
