"""Sandboxed Jinja2: example -> query text, answer text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes

from manyicl.errors import UserError, shortened
from manyicl.library_errors import reason
from manyicl.tasks.sandbox import GLOBALS, TASK_SANDBOX, joined, rendered, written
from manyicl.tasks.values import as_written, missing_column

ClassNames = Mapping[str, Mapping[str, str]]


class Template:
    """A text with ``{{ column }}`` in it, rendered without access to anything but the row.

    A template comes from a task file that a stranger may have written, so it runs in Jinja2's immutable
    sandbox, an unknown column is an error instead of an empty string, and rendering is bounded: ``MOST_STEPS``
    loop turns and operations, ``MOST_CHARACTERS`` in the text and in every value made on the way. Macros,
    includes, ``random`` and filters that pad to a width do not exist. ``row['Customer text']`` names any
    column, also one whose name is no identifier or has a meaning of its own, such as ``range``.

    Attributes:
        source: As written.
        columns: The columns that it names, sorted.
        bare_column: The column, if the template is a column alone.
    """

    def __init__(self, source: str) -> None:
        """Compile ``source``; see `compiled`, which does so once.

        Raises:
            UserError: If the syntax is wrong.
        """
        try:
            self._compiled = TASK_SANDBOX.from_string(source)
            syntax = TASK_SANDBOX.parse(source)
        except TemplateSyntaxError as error:
            said = (error.message or "").rstrip(".")
            hint = (
                "A column whose name is no word is written row['a b']." if said.startswith("expected token") else None
            )
            what = f"Template {shortened(source)!r} does not parse: {said}"
            raise UserError("broken_template", what, remedy=hint) from error
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            what = f"Template {shortened(source, 80)!r} does not parse: nested too deeply, or a huge number"
            raise UserError("broken_template", what) from error
        self.source = source
        self._reads_row = any(_reads_row(item) for item in syntax.find_all((nodes.Getitem, nodes.Getattr)))
        self.columns: tuple[str, ...] = _columns_named_in(syntax, self._reads_row)
        self._parts = _plain_parts(syntax, self._reads_row)
        others = [text for text, column in self._parts or () if column is None]
        is_bare = self._parts is not None and len(self._parts) == len(others) + 1 and not "".join(others).strip()
        self.bare_column: str | None = self.columns[0] if is_bare else None

    def render(self, row: Mapping[str, object], class_names: ClassNames | None = None) -> str:
        """Render one row.

        Args:
            row: Column -> value.
            class_names: Column -> class number -> name, applied before the template is rendered.

        Raises:
            UserError: If a column is missing, or the template fails on this row or would write too much.
        """
        for column in self.columns:
            if column not in row:
                error = missing_column(column, row, self._spelling_hint(row))
                error.what = f"Template {self.source!r} names the column {column!r}, which is missing"
                raise error
        named = dict(row)
        for column, names in (class_names or {}).items():
            if column in self.columns:
                named[column] = _class_name(column, row[column], names)
        try:
            if self._parts is not None:
                return joined(text if column is None else written(named[column]) for text, column in self._parts)
            return rendered(self._compiled, self._variables(named))
        except (
            TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            what = f"Template {self.source!r} fails: {reason(error)}"
            raise UserError("template_fails", what, remedy=self._spelling_hint(row).strip() or None) from error

    def _variables(self, row: Mapping[str, object]) -> dict[str, object]:
        variables = {name: value for name, value in row.items() if name not in GLOBALS}
        return {**variables, "row": row} if self._reads_row else variables

    def _spelling_hint(self, row: Mapping[str, object]) -> str:
        """Say how a column is written whose name is written as if it were a word, as in ``{{ a-b }}``."""
        for column in map(str, row):
            as_a_word = re.search(rf"(?<![\w'\"]){re.escape(column)}(?![\w'\"])", self.source)
            if as_a_word and re.search(r"[^\W\d]", column) and not column.isidentifier() and column not in self.columns:
                return f" Such a column is written row[{column!r}]."
        return ""

    def __repr__(self) -> str:
        return f"Template({self.source!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and other.source == self.source

    def __hash__(self) -> int:
        return hash(self.source)


@lru_cache(maxsize=4096)
def compiled(source: str) -> Template:
    """Return the template of a source, compiled once, so that specs hold the source alone.

    Raises:
        UserError: If the syntax is wrong.
    """
    return Template(source)


def _columns_named_in(syntax: nodes.Template, reads_row: bool) -> tuple[str, ...]:
    """List the columns a template reads, by bare name or as ``row['name']``; see ``_reads_row``."""
    names = meta.find_undeclared_variables(syntax) - GLOBALS
    if reads_row:
        names.discard("row")
        names |= {name for item in syntax.find_all((nodes.Getitem, nodes.Getattr)) for name in _column_of_row(item)}
    return tuple(sorted(names))


def _reads_row(item: nodes.Node) -> bool:
    """Tell whether ``row`` means the whole row here, and no column of that name as in ``row[0]``."""
    if not isinstance(item, nodes.Getitem | nodes.Getattr):
        return False
    if not isinstance(item.node, nodes.Name) or item.node.name != "row":
        return False
    return not (isinstance(item, nodes.Getitem) and isinstance(item.arg, nodes.Const | nodes.Slice)) or bool(
        _column_of_row(item)
    )


def _column_of_row(item: nodes.Node) -> tuple[str, ...]:
    """Return the column in ``row['name']`` or ``row.name``, unless it is a method such as ``row.items``."""
    if not isinstance(item, nodes.Getitem | nodes.Getattr):
        return ()
    if not isinstance(item.node, nodes.Name) or item.node.name != "row":
        return ()
    if isinstance(item, nodes.Getattr):
        return () if hasattr(dict, item.attr) else (item.attr,)
    return (item.arg.value,) if isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str) else ()


def _plain_parts(syntax: nodes.Template, reads_row: bool) -> list[tuple[str, str | None]] | None:
    """List the texts and columns, as (text, None) and ("", column), of a template that is made of nothing else."""
    parts: list[tuple[str, str | None]] = []
    for output in syntax.body:
        for part in output.nodes if isinstance(output, nodes.Output) else [output]:
            if isinstance(part, nodes.TemplateData):
                parts.append((part.data, None))
            elif isinstance(part, nodes.Name) and part.name not in GLOBALS and not (reads_row and part.name == "row"):
                parts.append(("", part.name))
            elif column := _column_of_row(part):
                parts.append(("", column[0]))
            else:
                return None
    return parts


def _class_name(column: str, value: object, names: Mapping[str, str]) -> object:
    """Turn a class number, or each of a list, into its name."""
    if isinstance(value, list | tuple):
        return [_class_name(column, part, names) for part in value]
    number = str(as_written(value))
    if number not in names:
        what = f"class_names does not name the class {number!r} of the column {column!r}"
        raise UserError("unknown_class", what, expected=f"one of {sorted(names)}", field=column)
    return names[number]
