"""The sandbox in which untrusted templates render: Jinja2's immutable sandbox, with a limit on all work.

Jinja2 cannot be interrupted, so every way to repeat or to grow is counted instead: loops by turn; operators, filters,
calls and lists by the size of what they make. As no value grows past the limit, no single operation takes long, and as
there are few operations, neither do all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from math import isfinite
from typing import Any

import jinja2
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from manyicl.tasks.values import as_written

MOST_CHARACTERS = 4_000_000
MOST_STEPS = 100_000
_CHARACTERS_A_STEP = 1_000
# These look at every character or element in Python, up to a microsecond each, where others work at the speed of C.
_LOOKING_AT_EACH = frozenset(
    {"dictsort", "groupby", "max", "min", "sort", "striptags", "sum", "title", "unique", "wordcount"}
)
_CHARACTERS_LOOKED_AT_A_STEP = 20
# These compare each character of a text with each of a part that they look for.
_COMPARING_EACH = frozenset({"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"})
_COMPARISONS_A_STEP = 10_000
# These test each element, also of those that they leave out.
_TESTING_EACH = frozenset({"reject", "rejectattr", "select", "selectattr"})
_CHARACTERS_AN_ELEMENT = 16  # what an element of a list costs to look at and to keep
_MOST_BITS = 20_000
_MOST_DECIMALS = 100
_WIDEST_INDENT = 99
_BUDGET = " budget"  # with a space, so that no template can name or shadow it
_CHARGED = " charged"
_TURNS = " turns"


class Budget:
    """What one rendering, or several together, may still do."""

    def __init__(self) -> None:
        self.steps = 0
        self.characters = 0

    @property
    def is_spent(self) -> bool:
        """Whether nothing more may be done."""
        return self.steps > MOST_STEPS or self.characters > MOST_CHARACTERS

    def spend(self, steps: int) -> None:
        """Count loop turns and operations."""
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise SecurityError(f"it takes more than {MOST_STEPS:,} steps; loop over less")

    def charged(self, value: Any, characters_a_step: int = _CHARACTERS_A_STEP) -> Any:
        """Count a value by its size and return it; what is read one by one is counted as it is read."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.turns(value)
        self.spend((len(value) if isinstance(value, range) else 0) + 1 + _required_size(value) // characters_a_step)
        return value

    def compared(self, text: object, *parts: object) -> None:
        """Count the comparisons of all characters of a text with all of each part."""
        self.spend(len(str(text)) * sum(len(part) for part in parts if isinstance(part, str)) // _COMPARISONS_A_STEP)

    def turns(self, values: Iterable[Any], num_steps: int = 1) -> Iterator[Any]:
        """Yield values, each of which costs a step, or so many."""
        for value in values:
            self.spend(num_steps)
            yield value

    def written(self, text: str) -> str:
        """Count text that is written, and return it."""
        self.spend(1)
        self.characters += len(text)
        _require_room(self.characters)
        return text


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[_BUDGET]
    return budget


def _require_room(num_characters: int) -> None:
    if num_characters > MOST_CHARACTERS:
        raise SecurityError(f"it makes more than {MOST_CHARACTERS:,} characters")


def _require_bits(num_bits: int) -> None:
    if num_bits > _MOST_BITS:
        raise SecurityError(f"a number has more than {_MOST_BITS:,} bits")


def _required_size(value: object, known: dict[int, int] | None = None) -> int:
    """Return the characters that a value holds, lists and mappings counted through.

    Args:
        value: Value to be measured.
        known: Sizes of lists and mappings by identity: one may hold another many times over.

    Raises:
        SecurityError: If they are too many.
    """
    size = 1
    if isinstance(value, str | bytes):
        size = len(value)
    elif isinstance(value, int):
        _require_bits(value.bit_length())
    elif isinstance(value, list | tuple | set | frozenset | dict):
        known = {} if known is None else known
        if id(value) not in known:
            size += _CHARACTERS_AN_ELEMENT * len(value)
            _require_room(size)
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            known[id(value)] = size + sum(_required_size(part, known) for part in parts)
        size = known[id(value)]
    _require_room(size)
    return size


def _limit_replace(text: Any, old: Any, new: Any, count: Any = None) -> None:
    _require_room(len(str(text)) + str(text).count(str(old)) * len(str(new)))


def _limit_join(values: Any, d: Any = "", attribute: Any = None) -> None:
    _require_room(_required_size(values) + len(values) * len(str(d)))


def _limit_indent(text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    if (len(width) if isinstance(width, str) else width) > _WIDEST_INDENT:
        raise SecurityError(f"it indents by more than {_WIDEST_INDENT}")
    _require_room(len(str(text)) + len(str(text).splitlines()) * _WIDEST_INDENT)


def _limit_round(number: Any, precision: Any = 0, method: Any = None) -> None:
    if abs(precision) > _MOST_DECIMALS:
        raise SecurityError(f"it rounds to more than {_MOST_DECIMALS} decimals")


# Filters that may make far more than what they are given: each is refused before it does.
_LIMITS: Mapping[str, Callable[..., None]] = {
    "replace": _limit_replace,
    "join": _limit_join,
    "indent": _limit_indent,
    "round": _limit_round,
}


def _limit_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse an operator before it makes far more than what it is given."""
    if operator == "%" and isinstance(left, str | bytes):
        raise SecurityError("texts are not formatted with %; write {{ }} next to each other")
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**":
            _require_bits(left.bit_length() * right)
        elif operator == "*":
            _require_bits(left.bit_length() + right.bit_length())
    elif operator == "*":
        for repeated, times in ((left, right), (right, left)):
            if isinstance(repeated, str | bytes | list | tuple) and isinstance(times, int):
                _require_room(_required_size(repeated) * times)


def _charging_filter(name: str) -> Callable[..., Any]:
    """Return Jinja2's filter of that name, its work counted."""
    looks_at_each, limit = name in _LOOKING_AT_EACH, _LIMITS.get(name)

    @pass_context
    def charging(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        if name == "join" or (looks_at_each and isinstance(value, Iterator)):
            value = list(value)
        value = budget.charged(value, _CHARACTERS_LOOKED_AT_A_STEP if looks_at_each else _CHARACTERS_A_STEP)
        if limit is not None:
            limit(value, *args, **kwargs)
        if name in _COMPARING_EACH:
            budget.compared(value, *args, *kwargs.values())
        if name in _TESTING_EACH:
            # What each is compared with may be long.
            value = budget.turns(value, 1 + sum(_required_size(part) // _CHARACTERS_A_STEP for part in args))
        try:
            return budget.charged(_PLAIN.call_filter(name, value, args, kwargs, context=context))
        except AssertionError as error:  # so Jinja2 refuses arguments, such as those of truncate(0)
            raise SecurityError(f"{name}: {error}") from error

    return charging


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers does for chat templates, its work counted."""
    _limit_indent("", indent or 0)
    budget = _budget(context)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return "".join(map(budget.written, encoder.iterencode(budget.charged(value))))


def written(value: object) -> str:
    """Return the text that a task's template writes for a value, and refuse what nobody means to read."""
    if isinstance(value, list | tuple | dict):
        kind = "mapping" if isinstance(value, dict) else "list"
        raise SecurityError(f"a {kind} is no text; write its parts, as in {{{{ column | join(', ') }}}}")
    if callable(value) and not isinstance(value, Undefined):
        what = "a function is written in place of a value"
        raise SecurityError(f"{what}; call it with (), or write row['…'] for a column")
    return _written_as_python(as_written(value))


def _written_as_python(value: object) -> str:
    """Return the text that a chat template writes for a value."""
    return str(value) if _required_size(value) else ""


def joined(texts: Iterable[str]) -> str:
    """Join all that a template writes, unless that is too much."""
    texts = list(texts)
    _require_room(sum(map(len, texts)))
    return "".join(texts)


def uncounted(node: nodes.Node) -> nodes.Node:
    """Return the node of a parsed template without the counting filters around it."""
    while isinstance(node, nodes.Filter) and node.name in (_CHARGED, _TURNS):
        assert node.node is not None
        node = node.node
    return node


class _Counting(NodeTransformer):
    """Puts the counting filters around all that repeats, joins or compares, and refuses what is not counted."""

    def __init__(self, refused: tuple[type[nodes.Node], ...]) -> None:
        self.refused = refused
        self.is_repeated = False

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, self.refused) or (isinstance(node, nodes.For) and node.recursive):
            what = "macros, blocks, includes and recursive loops are refused; only a chat template may have macros"
            raise TemplateSyntaxError(what, node.lineno)
        if isinstance(node, nodes.Const) and isinstance(node.value, float) and not isfinite(node.value):
            raise TemplateSyntaxError("a number is too large", node.lineno)
        if isinstance(node, nodes.Name) and node.name == "self":
            raise TemplateSyntaxError("self means nothing; a column named self is written row['self']", node.lineno)
        if isinstance(node, nodes.NSRef) and node.attr.startswith("_"):
            raise TemplateSyntaxError(f"{node.attr!r} is no name for a value", node.lineno)
        was_repeated = self.is_repeated
        self.is_repeated |= isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
        super().generic_visit(node, *args, **kwargs)
        self.is_repeated = was_repeated
        if isinstance(node, nodes.TemplateData) and self.is_repeated:
            return nodes.Const(node.data, lineno=node.lineno)  # written like a value, and so counted
        if isinstance(node, nodes.For):
            node.iter = _filter(_TURNS, node.iter)
        elif isinstance(node, nodes.Operand | nodes.Compare):
            node.expr = _filter(_CHARGED, node.expr)
        elif isinstance(node, nodes.Test):
            node.node, node.args = _filter(_CHARGED, node.node), [_filter(_CHARGED, part) for part in node.args]
        elif isinstance(node, nodes.Concat):
            return _filter("join", nodes.List(node.nodes, lineno=node.lineno))
        elif (
            isinstance(node, nodes.List | nodes.Dict)
            or (isinstance(node, nodes.Tuple) and node.ctx == "load")
            or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
        ):
            return _filter(_CHARGED, node)
        return node


def _filter(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's immutable sandbox, with all work counted."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(
        self,
        refused: tuple[type[nodes.Node], ...],
        filters: tuple[str, ...],
        write: Callable[[Any], str],
        **options: Any,
    ) -> None:
        # Not optimized: that computes constants before anything is counted, and writes an endless one as a name.
        super().__init__(
            optimized=False,
            finalize=pass_context(lambda context, value: _budget(context).written(write(value))),
            **options,
        )
        self.refused = refused
        self.filters = {name: _charging_filter(name) for name in filters}
        self.filters[_CHARGED] = pass_context(lambda context, value: _budget(context).charged(value))
        self.filters[_TURNS] = pass_context(lambda context, values: _budget(context).turns(values))
        self.filters["tojson"] = _tojson
        self.globals = {"range": range}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        syntax = _Counting(self.refused).visit(super()._parse(source, name, filename))
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
            budget.charged(owner)
            if function.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])
                _limit_join(args[0], owner)
            elif function.__name__ == "replace":
                _limit_replace(owner, *args)
            elif function.__name__ in _COMPARING_EACH:
                budget.compared(owner, *args, *kwargs.values())
        return budget.charged(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _limit_operator(operator, left, right)
        return _budget(context).charged(super().call_binop(context, operator, left, right))


class _Generation(Extension):
    """Reads ``{% generation %}``, with which a chat template marks an answer, as what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _new_dict(*pairs: Any, **values: Any) -> dict[Any, Any]:
    return dict(*pairs, **values)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def rendered(template: jinja2.Template, variables: Mapping[str, object], budget: Budget | None = None) -> str:
    """Render a template of a `_Sandbox`.

    Raises:
        jinja2.TemplateError: If it fails, or does or writes too much.
    """
    values = {**template.environment.globals, **variables, _BUDGET: budget or Budget()}
    return joined(template.root_render_func(template.new_context(values, shared=True)))


def render_chat_template(source: str, variables: Mapping[str, object], budget: Budget | None = None) -> str:
    """Render the chat template of a model folder as transformers does, with all work counted.

    Args:
        source: Template in Jinja2, possibly from an untrusted source.
        variables: What it reads, such as ``messages``, ``add_generation_prompt`` and ``bos_token``.
        budget: Shared with other renderings, so that many of them take no longer than one may; None for its own.

    Raises:
        jinja2.TemplateError: If it is wrong, fails, refuses the messages, or does or writes too much.
    """
    try:
        return rendered(_compiled_chat_template(source), variables, budget)
    except RecursionError as error:
        raise TemplateError("it calls itself without end") from error


@lru_cache(maxsize=256)
def _compiled_chat_template(source: str) -> jinja2.Template:
    try:
        return CHAT_SANDBOX.from_string(source)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise TemplateSyntaxError("it is nested too deeply, or holds a huge number", 1) from error


# fmt: off
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "safe", "select", "selectattr", "sort", "string", "striptags", "sum", "title",
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
_OTHER_FILES = (nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)
_PLAIN = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
TASK_SANDBOX = _Sandbox((nodes.Macro, nodes.CallBlock, *_OTHER_FILES), _FILTERS, written, undefined=StrictUndefined)
CHAT_SANDBOX = _Sandbox(
    _OTHER_FILES,
    (*_FILTERS, "indent"),
    _written_as_python,
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, loopcontrols],
)
CHAT_SANDBOX.globals |= {
    "namespace": Namespace,
    "dict": _new_dict,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
