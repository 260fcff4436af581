"""Sandboxed Jinja2: example -> query text, answer text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from functools import lru_cache

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes

from manyicl.errors import UserError, quoted, shortened
from manyicl.library_errors import reason
from manyicl.tasks.sandbox import GLOBALS, TASK_SANDBOX, joined, rendered, uncounted, written
from manyicl.tasks.values import as_written, missing_column

_FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
ClassNames = Mapping[str, Mapping[str, str]]


class Template:
    """A text with ``{{ column }}`` in it, rendered without access to anything but the row.

    A template may come from an untrusted task file, so it runs in Jinja2's immutable
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
            UserError: If the syntax is wrong, or a column is compared with a number, which it never equals.
        """
        try:
            syntax = TASK_SANDBOX.parse(source)
            self._compiled = TASK_SANDBOX.from_string(syntax)
        except TemplateSyntaxError as error:
            said = (error.message or "").rstrip(".")
            is_odd_name = said.startswith("expected token")
            hint = "A column whose name is no word is written row['a b']." if is_odd_name else None
            what = f"Template {shortened(source)!r} does not parse: {said}"
            raise UserError("broken_template", what, remedy=hint) from error
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            what = f"Template {shortened(source, 80)!r} does not parse: nested too deeply, or a huge number"
            raise UserError("broken_template", what) from error
        self.source = source
        found = map(_columns_of_row, syntax.find_all((nodes.Getitem, nodes.Getattr)))
        reads = [columns for columns in found if columns is not None]
        names = meta.find_undeclared_variables(syntax) - GLOBALS
        _require_texts_compared_with_texts(source, syntax, names)
        self._reads_row = bool(reads)
        self.columns: tuple[str, ...] = tuple(sorted((names - {"row"} if reads else names).union(*reads)))
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
                error.what = f"Template {quoted(self.source)} names the column {quoted(column)}, which is missing"
                raise error
        named = dict(row)
        for column, names in (class_names or {}).items():
            if column in self.columns:
                named[column] = class_name(column, row[column], names)
        try:
            if self._parts is not None:
                return joined(text if column is None else written(named[column]) for text, column in self._parts)
            variables = {name: value for name, value in named.items() if name not in GLOBALS}
            return rendered(self._compiled, {**variables, "row": named} if self._reads_row else variables)
        except _FAILURES as error:
            what = f"Template {quoted(self.source)} fails: {reason(error)}"
            raise UserError("template_fails", what, remedy=self._spelling_hint(row)) from error

    def _spelling_hint(self, row: Mapping[str, object]) -> str:
        """Say how a column is written whose name is written as if it were a word, as in ``{{ a-b }}``."""
        for column in map(str, row):
            if column.isidentifier() or column in self.columns or column not in self.source:
                continue
            as_a_word = re.search(rf"(?<![\w'\"]){re.escape(column)}(?![\w'\"])", self.source)
            if as_a_word and re.search(r"[^\W\d]", column):
                return f" Such a column is written row[{quoted(column)}]."
        return ""


@lru_cache(maxsize=4096)
def compiled(source: str) -> Template:
    """Return the template of a source, compiled once, so that specs hold the source alone.

    Raises:
        UserError: If the syntax is wrong.
    """
    return Template(source)


def _columns_of_row(item: nodes.Node) -> tuple[str, ...] | None:
    """Return the column that ``row['name']`` or ``row.name`` reads, and none for ``row.items()`` and ``row[column]``.

    Returns:
        None where the item does not read the row, as ``row[0]``, which reads a column of that name.
    """
    if not isinstance(item, nodes.Getitem | nodes.Getattr):
        return None
    if not isinstance(item.node, nodes.Name) or item.node.name != "row":
        return None
    if isinstance(item, nodes.Getattr):
        return () if hasattr(dict, item.attr) else (item.attr,)
    if isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str):
        return (item.arg.value,)
    return None if isinstance(item.arg, nodes.Const | nodes.Slice) else ()


_EQUALITIES = ("eq", "ne", "in", "notin")
_EQUALITY_TESTS = ("eq", "==", "equalto", "ne", "!=", "in", "sameas")


def _require_texts_compared_with_texts(source: str, syntax: nodes.Template, columns: Set[str]) -> None:
    """Refuse ``label == 1``: the numbers of a row are texts, so that it would be false in every row.

    Raises:
        UserError: If a column is compared with a number, or looked for among numbers.
    """
    for one, other in _compared(syntax):
        is_column = (isinstance(one, nodes.Name) and one.name in columns) or bool(_columns_of_row(one))
        numbers = [value for value in _constants(other) if type(value) in (int, float)]
        if is_column and numbers:
            what = f"Template {quoted(source)} compares a column with the number {numbers[0]}, which it never equals"
            remedy = f"Numbers of a row are texts, written '{numbers[0]}'; `column | int` is a number."
            raise UserError("broken_template", what, remedy=remedy)


def _constants(node: nodes.Node) -> list[object]:
    """Return the value of a constant, or the constants of a list; Jinja2 makes some lists constants itself."""
    if isinstance(node, nodes.List | nodes.Tuple):
        return [constant for item in node.items for constant in _constants(item)]
    if not isinstance(node, nodes.Const):
        return []
    return list(node.value) if isinstance(node.value, list | tuple) else [node.value]


def _compared(syntax: nodes.Template) -> Iterator[tuple[nodes.Node, nodes.Node]]:
    """Yield what is compared for equality with what, either way."""
    for compared in syntax.find_all(nodes.Compare):
        if compared.ops[0].op in _EQUALITIES:
            one, other = uncounted(compared.expr), uncounted(compared.ops[0].expr)
            yield from ((one, other), (other, one))
    for test in syntax.find_all(nodes.Test):
        if test.name in _EQUALITY_TESTS and test.args:
            yield uncounted(test.node), uncounted(test.args[0])


def _plain_parts(syntax: nodes.Template, reads_row: bool) -> list[tuple[str, str | None]] | None:
    """List the texts and columns, as (text, None) and ("", column), of a template that is made of nothing else."""
    parts: list[tuple[str, str | None]] = []
    for output in syntax.body:
        for part in output.nodes if isinstance(output, nodes.Output) else [output]:
            if isinstance(part, nodes.TemplateData):
                parts.append((part.data, None))
            elif isinstance(part, nodes.Name) and part.name not in GLOBALS and not (reads_row and part.name == "row"):
                parts.append(("", part.name))
            elif column := _columns_of_row(part):
                parts.append(("", column[0]))
            else:
                return None
    return parts


def class_name(column: str, value: object, names: Mapping[str, str]) -> object:
    """Turn a class number, or each of a list, into its name.

    Raises:
        UserError: If a number has no name.
    """
    if isinstance(value, list | tuple):
        return [class_name(column, part, names) for part in value]
    number = str(as_written(value))
    if number not in names:
        what = f"class_names does not name the class {number!r} of the column {column!r}"
        raise UserError("unknown_class", what, expected=f"one of {sorted(names)}", field=column)
    return names[number]
