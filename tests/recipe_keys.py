"""Tables of keys for docs/recipes.md and docs/compare.md, made from the pydantic models that check them.

::

    python -m tests.recipe_keys    # writes the tables anew; a test holds that they are up to date
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from manyicl.evaluation.comparison.settings import CompareSettings
from manyicl.training.recipe import Recipe

DOCS = Path(__file__).parents[1] / "docs"
PAGE, COMPARE_PAGE = DOCS / "recipes.md", DOCS / "compare.md"
TABLE = re.compile(r"<!-- keys of (?P<section>[\w.]+) -->\n\n.*?<!-- end -->", re.DOTALL)
TOP_LEVEL = "recipe"
BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
KINDS: Mapping[Any, str] = {
    bool: "`true` or `false`",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    Any: "value",
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe, as its pydantic field says."""

    name: str
    values: str
    default: str
    meaning: str


def sections(page: Path = PAGE) -> dict[str, list[Key]]:
    """Every key of a page that holds a value, by the section it stands in."""
    return dict(_sections(TOP_LEVEL, Recipe) if page == PAGE else _sections("compare", CompareSettings))


def table(section: str) -> str:
    """The table of one section, with the marks that stand around it on the page."""
    lines = ["| Key | Values | Default | Meaning |", "| --- | --- | --- | --- |"]
    keys = {**sections(), **sections(COMPARE_PAGE)}[section]
    lines += [f"| `{key.name}` | {key.values} | {key.default} | {key.meaning} |" for key in keys]
    return "\n".join([f"<!-- keys of {section} -->", "", *lines, "", "<!-- end -->"])


def with_tables(page: str) -> str:
    """The page with every table made anew."""
    return TABLE.sub(lambda found: table(found["section"]), page)


def _sections(name: str, *models: type[BaseModel]) -> Iterator[tuple[str, list[Key]]]:
    """Yield a section, which may be one of several models, and then those in it."""
    prefix = "" if name == TOP_LEVEL else f"{name}."
    fields = [(f"{prefix}{key}", field) for model in models for key, field in model.model_fields.items()]
    inner = {key: found for key, field in fields if (found := _models_in(field.annotation))}
    keys: dict[str, Key] = {}
    for key, field in fields:
        if key not in inner:
            keys[key] = _either(keys.get(key), _key(key, field))
    if keys:
        yield name, list(keys.values())
    for key, found in inner.items():
        yield from _sections(key, *found)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) not in (Union, types.UnionType, Annotated):
        return []
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _either(first: Key | None, other: Key) -> Key:
    """Join what two models say of one key."""
    if first is None or first == other:
        return other
    parts = zip(astuple(first), astuple(other), strict=True)
    return Key(*(one if one == two else f"{one}, or {two}" for one, two in parts))


def _key(name: str, field: FieldInfo) -> Key:
    values = ", ".join([_values(field.annotation), *_bounds(field.metadata)])
    if not field.description and len(get_args(field.annotation)) != 1:
        raise ValueError(f"{name} has no description; give its field one")
    return Key(name, _cell(values), _cell(_default(field)), _cell(field.description or "The only one there is."))


def _bounds(metadata: Iterable[Any]) -> list[str]:
    return [
        f"{words} {_number(getattr(limit, attribute))}"
        for limit in metadata
        for kind, (attribute, words) in BOUNDS.items()
        if isinstance(limit, kind)
    ]


def _values(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return ", or ".join(_values(part) for part in arguments if part is not type(None))
    if origin is Annotated:
        return ", ".join([_values(arguments[0]), *_bounds(getattr(arguments[1], "metadata", ()))])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_plural(arguments[0])}"
        return f"[{', '.join(KINDS[part] for part in arguments)}]"
    if origin is not None and issubclass(origin, Mapping):
        return f"{{name: {KINDS.get(arguments[1], 'value')}}}"
    return KINDS[annotation]


def _plural(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _plural(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return _values(annotation)
    return {int: "whole numbers", float: "numbers", str: "texts"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return "unset"
    if isinstance(default, str):
        return f"`{json.dumps(default)}`" if not default.strip() else f"`{default}`"
    if isinstance(default, float):
        return f"`{_number(default)}`"
    return f"`{json.dumps(default)}`"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for page in (PAGE, COMPARE_PAGE):
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
