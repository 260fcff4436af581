"""The reference of the API is that of the OpenAPI document, and names all of it."""

from __future__ import annotations

import json
import re

from manyicl.server.openapi import document, page
from tests.documents import DOCS

PAGE = DOCS / "api.md"
DOCUMENT = document()


def test_the_page_of_the_api_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(DOCUMENT), "python -m manyicl.server.openapi > docs/api.md"


def test_the_page_names_every_path_and_every_key() -> None:
    written, described = PAGE.read_text(encoding="utf-8"), DOCUMENT
    routes = {f"{method.upper()} {path}" for path, methods in described["paths"].items() for method in methods}
    assert set(re.findall(r"^### `(.*)`$", written, re.MULTILINE)) == routes
    for name, schema in described["components"]["schemas"].items():
        (section,) = re.findall(rf"^### {name}$(.*?)(?=^### |\Z)", written, re.MULTILINE | re.DOTALL)
        assert re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE) == list(schema.get("properties", {}))


def test_everything_that_the_document_refers_to_is_in_it() -> None:
    names = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(DOCUMENT)))
    assert names <= DOCUMENT["components"]["schemas"].keys()
    assert "422" not in DOCUMENT["paths"]["/v1/models/{model}"]["get"]["responses"]


def test_a_type_is_written_with_its_bounds_and_alternatives() -> None:
    properties = {
        "share": {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": "null"}]},
        "scores": {"enum": ["best", "all"], "type": "string", "default": "best"},
        "rows": {"type": "array", "items": {"$ref": "#/components/schemas/Row"}},
        "number": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
    }
    schemas = {"Thing": {"properties": properties, "required": ["rows"]}, "Row": {"description": "A row."}}
    text = page({"paths": {}, "components": {"schemas": schemas}})
    assert "| `share` | number (above 0, at most 1) or null | null |  |" in text
    assert "| `scores` | `best` or `all` | `best` |  |" in text
    assert "| `rows` | list of [Row](#row) | required |  |" in text
    assert "| `number` | integer (at least 1) | null |  |" in text
