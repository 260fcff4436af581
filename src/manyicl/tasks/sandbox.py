"""The sandbox that templates of strangers render in: Jinja2's immutable one, with all work counted.

Jinja2 cannot be interrupted, so every way to repeat or to grow is counted instead: loops and ranges by turn,
operators, filters, methods and lists by the size of what they make. As no value grows past the limit, no single
operation takes long, and as there are few operations, neither do all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isfinite
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_CHARACTERS = 4_000_000
MOST_STEPS = 100_000
_CHARACTERS_A_STEP = 1_000
_MOST_BITS = 20_000
_MOST_DECIMALS = 100


def as_written(value: object) -> object:
    """Turn JSON's ``true``, ``false`` and ``null`` into the text a person expects to read; null is nothing."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else value


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps = 0
        self.characters = 0

    def spend(self, steps: int) -> None:
        """Count loop turns and operations.

        Raises:
            SecurityError: If there are too many.
        """
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise SecurityError(f"it takes more than {MOST_STEPS:,} steps; loop over less")

    def write(self, num_characters: int) -> None:
        """Count text that is written out.

        Raises:
            SecurityError: If it is too much.
        """
        self.characters += num_characters
        _require_room(self.characters)

    def made(self, value: Any) -> Any:
        """Count a value by its size and return it; what is not yet a value is counted as it is read.

        Raises:
            SecurityError: If it is too large.
        """
        if isinstance(value, Iterator):
            return self.turns(value)
        self.spend(1 + _required_size(value) // _CHARACTERS_A_STEP)
        return value

    def turns(self, values: Iterable[Any], num_characters: int = 0) -> Iterator[Any]:
        """Yield ``values``, each of which costs a step and writes so many characters of the template itself."""
        for value in values:
            self.spend(1)
            self.write(num_characters)
            yield value


BUDGET = " budget"  # with a space, so that no template can name or shadow it


def _budget(context: Context) -> Budget:
    budget = context.parent[BUDGET]
    assert isinstance(budget, Budget)
    return budget


def _require_room(num_characters: int) -> None:
    if num_characters > MOST_CHARACTERS:
        raise SecurityError(f"it makes more than {MOST_CHARACTERS:,} characters")


def _required_size(value: object, known: dict[int, int] | None = None) -> int:
    """Return the characters that a value holds, lists and mappings counted through.

    Args:
        value: To be measured.
        known: Sizes of lists and mappings by identity: one may hold another many times over.

    Raises:
        SecurityError: If they are too many.
    """
    known = {} if known is None else known
    if isinstance(value, str | bytes):
        size = len(value)
    elif isinstance(value, list | tuple | set | frozenset | dict):
        if id(value) not in known:
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            known[id(value)] = 1 + len(value) + sum(_required_size(part, known) for part in parts)
        size = known[id(value)]
    else:
        size = 1
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise SecurityError(f"a number has more than {_MOST_BITS:,} bits")
    _require_room(size)
    return size


def _require_bounded(name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Refuse a filter or method whose result would be far larger than what it is given.

    Args:
        name: Of the filter or method.
        value: What it is applied to; of ``join``, what stands between.
        arguments: Given to it.
    """
    if name == "replace" and len(arguments) >= 2:
        text, old, new = str(value), str(arguments[0]), str(arguments[1])
        _require_room(len(text) + text.count(old) * len(new))
    if name == "join" and arguments and isinstance(arguments[0], Sequence):
        _require_room(_required_size(arguments[0]) + len(arguments[0]) * len(str(value)))
    if name == "round" and any(isinstance(a, int) and abs(a) > _MOST_DECIMALS for a in arguments):
        raise SecurityError(f"it rounds to more than {_MOST_DECIMALS} decimals")
    if name == "tojson" and arguments:
        raise SecurityError("tojson takes no indent here")


@pass_context
def _written(context: Context, value: object) -> object:
    """Count what a template writes, and refuse what no one means to read."""
    if callable(value) and not isinstance(value, Undefined):
        raise SecurityError("a function stands where a value should; call it with (), or write row['…'] for a column")
    value = str(as_written(value)) if _required_size(value) else ""
    _budget(context).write(len(value))
    return value


def _counted_filter(name: str) -> Callable[..., Any]:
    """Return Jinja2's filter of that name, its work counted."""

    @pass_context
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        if name == "join":
            value = list(value)
            separator = args[0] if args else kwargs.get("d", "")
            _require_bounded(name, separator, [value])
        elif name == "replace":
            old, new = (*args, *(kwargs[key] for key in ("old", "new") if key in kwargs))[:2]
            _require_bounded(name, value, [old, new])
        else:
            _require_bounded(name, value, [*args, *kwargs.values()])
        value = budget.made(value)
        try:
            return budget.made(_PLAIN.call_filter(name, value, args, kwargs, context=context))
        except AssertionError as error:  # so Jinja2 refuses arguments, such as those of truncate(0)
            raise SecurityError(f"{name}: {error}") from error

    return counted


@pass_context
def _made(context: Context, value: Any) -> Any:
    return _budget(context).made(value)


@pass_context
def _turns(context: Context, values: Iterable[Any], num_characters: int) -> Iterator[Any]:
    return _budget(context).turns(values, num_characters)


_MADE, _TURNS = " made", " turns"
# fmt: off
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "safe", "select", "selectattr", "sort", "string", "striptags", "sum", "title", "tojson",
    "trim", "truncate", "unique", "upper", "wordcount",
)
_METHODS = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "get", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isspace", "istitle", "isupper", "items",
    "join", "keys", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
    "values",
})
# fmt: on
GLOBALS = frozenset({"range"})
_REFUSED = (
    nodes.Macro,
    nodes.CallBlock,
    nodes.Block,
    nodes.Extends,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
)


class _Counted(NodeTransformer):
    """Puts the counting filters around all that repeats, joins or compares, and refuses what is not counted."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, _REFUSED) or (isinstance(node, nodes.For) and node.recursive):
            raise TemplateSyntaxError(
                "macros, blocks, includes and recursive loops are not for task files", node.lineno
            )
        if isinstance(node, nodes.Const) and isinstance(node.value, float) and not isfinite(node.value):
            raise TemplateSyntaxError("a number is too large", node.lineno)
        if isinstance(node, nodes.Name) and node.name == "self":
            raise TemplateSyntaxError("a column named self is written row['self']", node.lineno)
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            num_characters = sum(len(text.data) for part in node.body for text in _texts_in(part))
            node.iter = _filter(_TURNS, node.iter, nodes.Const(num_characters))
        elif isinstance(node, nodes.Concat):
            return _filter("join", nodes.List(node.nodes, lineno=node.lineno))
        elif _makes_a_value(node):
            return _filter(_MADE, node)
        elif isinstance(node, nodes.Test):
            node.node = _filter(_MADE, node.node)
            node.args = [_filter(_MADE, argument) for argument in node.args]
        elif isinstance(node, nodes.Compare):
            node.expr = _filter(_MADE, node.expr)
            for operand in node.ops:
                operand.expr = _filter(_MADE, operand.expr)
        return node


def _makes_a_value(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Slice)
    return isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load")


def _texts_in(node: nodes.Node) -> list[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else list(node.find_all(nodes.TemplateData))


def _filter(name: str, node: nodes.Node, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja2's immutable sandbox, with all work counted."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        syntax = _Counted().visit(super()._parse(source, name, filename))
        assert isinstance(syntax, nodes.Template)
        syntax.set_environment(self)
        return syntax

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = attr in _METHODS or isinstance(obj, LoopContext) or not callable(value)
        return allowed and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Offer no ``str.format``, which pads to any width."""

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | list | tuple | dict):
            if function.__name__ == "join":
                args = tuple(list(argument) for argument in args)
            _require_bounded(function.__name__, owner, args)
            budget.made(owner)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, range):
            budget.spend(len(result))
        return budget.made(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _require_bounded_result(operator, left, right)
        return _budget(context).made(super().call_binop(context, operator, left, right))


def _require_bounded_result(operator: str, left: Any, right: Any) -> None:
    """Refuse an operator whose result would be far larger than what it is given."""
    if operator == "%" and isinstance(left, str | bytes):
        raise SecurityError("texts are not formatted with %; write {{ }} beside each other")
    for value, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
            _require_room(_required_size(value) * times)
    if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
        num_bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if num_bits > _MOST_BITS:
            raise SecurityError(f"a number has more than {_MOST_BITS:,} bits")


_PLAIN = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
# Not optimized: that computes constants before anything is counted, and writes an endless one as a name.
ENVIRONMENT = _Environment(undefined=StrictUndefined, optimized=False, finalize=_written)
ENVIRONMENT.globals = {name: ENVIRONMENT.globals[name] for name in sorted(GLOBALS)}
ENVIRONMENT.filters = {name: _counted_filter(name) for name in _FILTERS} | {_MADE: _made, _TURNS: _turns}
