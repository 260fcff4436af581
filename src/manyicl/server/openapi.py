"""The OpenAPI document of the server, and the page of the reference made of it.

python -m manyicl.server.openapi > docs/api.md
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from manyicl.server.schemas import MOST_COUNTED

if TYPE_CHECKING:
    from manyicl.server.services import Services

Schema = Mapping[str, Any]

INTRODUCTION = """\
# API of the server

Made from the OpenAPI document, which a running server gives at `/openapi.json`, and from which clients can be
generated. [The task server](server.md) shows how it is used.

An error is a [`Problem`](#problem) as `application/problem+json`; on the paths for OpenAI's SDK it is an
[`ErrorOut`](#errorout) as `application/json`. An address that is not on this page
is answered with 404, another method with 405. These may come from everywhere; others are named with their paths:

| Status | Meaning |
| --- | --- |
"""
TAGS = {
    "tasks": "Tasks",
    "predictions": "Predictions",
    "evaluation": "Evaluation",
    "jobs": "Jobs",
    "openai": "For OpenAI's SDK",
    "health": "Health and metrics",
}
# Statuses with the same meaning on nearly all paths.
EVERYWHERE = ("400", "401", "403", "408", "413", "415", "422", "429", "500", "503")


def document() -> dict[str, Any]:
    """Return the OpenAPI document, without a server."""
    from types import SimpleNamespace

    from manyicl.server.app import create_app
    from manyicl.server.settings import ServerSettings

    # Routes are only described here, and no request comes.
    settings = ServerSettings(model="builtin:nano", data=Path())
    parts = SimpleNamespace(settings=settings, keys=None, limits=None, metrics=None)
    return create_app(cast("Services", parts)).openapi()


def page(document: Schema) -> str:
    """Write the page of the reference: every path, then every object."""
    return "\n".join([*_lines(document), ""])


def _lines(document: Schema) -> Iterator[str]:
    routes = defaultdict(list)
    meanings: dict[str, str] = {}
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            routes[(route.get("tags") or ["health"])[0]].append((f"{method.upper()} {path}", route))
            for status, answer in route["responses"].items():
                if status in EVERYWHERE:
                    meanings.setdefault(status, answer["description"])
    yield INTRODUCTION + "\n".join(f"| {status} | {meanings[status]} |" for status in sorted(meanings))
    for tag in sorted(routes, key=lambda one: list(TAGS).index(one) if one in TAGS else len(TAGS)):
        yield from ("", f"## {TAGS.get(tag, tag.capitalize())}")
        for name, route in routes[tag]:
            yield from _route(name, route)
    yield from ("", "## Objects")
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield from _object(name, schema)


def _route(name: str, route: Schema) -> Iterator[str]:
    yield from ("", f"### `{name}`", "", _sentences(route.get("description", "")))
    if parameters := route.get("parameters"):
        yield from ("", "| Parameter | Where | Type | Meaning |", "| --- | --- | --- | --- |")
        for one in parameters:
            kind, meaning = _kind(one["schema"]), _sentences(one.get("description", ""))
            yield f"| `{one['name']}` | {one['in']} | {kind} | {meaning} |"
    if body := route.get("requestBody"):
        kinds = [_content(kind, one.get("schema", {})) for kind, one in body["content"].items()]
        yield from ("", f"Body: {_alternatives(kinds)}.")
    yield ""
    for status, answer in route["responses"].items():
        if not status.startswith("2"):
            continue
        kinds = [_content(kind, one.get("schema", {})) for kind, one in answer.get("content", {}).items()]
        yield f"Answer {status}: {_alternatives(kinds) or 'nothing'}."
    others = {status: answer for status, answer in route["responses"].items() if status[0] in "45"}
    own = [f"{status}: {answer['description']}" for status, answer in others.items() if status not in EVERYWHERE]
    if own:
        yield from ("", *(f"- {line}" for line in own))


def _content(media_type: str, schema: Schema) -> str:
    """Write one way in which a body or an answer comes."""
    kind = _kind(schema)
    if media_type == "application/json":
        return kind
    fields = ", ".join(f"`{name}`" for name in schema.get("properties", {}))
    return f"`{media_type}`" + (f" with the fields {fields}" if fields else "")


def _object(name: str, schema: Schema) -> Iterator[str]:
    yield from ("", f"### {name}", "", _sentences(schema.get("description", "")))
    properties = schema.get("properties", {})
    if not properties:
        return
    required = set(schema.get("required", ()))
    yield from ("", "| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |")
    for key, one in properties.items():
        default = "required" if key in required else _value(one.get("default"))
        yield f"| `{key}` | {_kind(one)} | {default} | {_sentences(one.get('description', ''))} |"


def _kind(schema: Schema) -> str:
    """Write the type of a value."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for alternatives in ("anyOf", "oneOf", "allOf"):
        if alternatives in schema:
            return _alternatives([_kind(one) for one in schema[alternatives]])
    if "enum" in schema or "const" in schema:
        return _alternatives([_value(value) for value in schema.get("enum", [schema.get("const")])])
    kind = schema.get("type", "any value")
    if kind == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}: {_kind(schema['prefixItems'][0])}"
        return f"list of {_kind(schema.get('items', {}))}"
    if kind == "object" and isinstance(values := schema.get("additionalProperties"), Mapping):
        return f"object of {_kind(values)}"
    return f"{kind}{_range(schema)}"


def _range(schema: Schema) -> str:
    """Write between which numbers a value lies."""
    bounds = {"above": schema.get("exclusiveMinimum"), "at least": schema.get("minimum")}
    most = schema.get("maximum")
    bounds["at most"] = None if most is None or most >= MOST_COUNTED else most
    found = ", ".join(f"{words} {bound:,}" for words, bound in bounds.items() if bound is not None)
    return f" ({found})" if found else ""


def _alternatives(kinds: list[str]) -> str:
    return " or ".join(dict.fromkeys(kinds))


def _value(value: object) -> str:
    """Write a default or an allowed value; a default that is an object by its name alone."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "its defaults" if isinstance(value, Mapping) else f"`{value}`"


def _sentences(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(page(document()), end="")
