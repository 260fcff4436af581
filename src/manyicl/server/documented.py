"""Parts of the OpenAPI document that FastAPI cannot derive: bodies of several types, and the errors of a route."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from manyicl.server.problems import PROBLEM_TYPE
from manyicl.server.row_input import JSON_LINES
from manyicl.server.schemas import NewDemonstrations, NewTask, PredictIn, Problem, TaskChanges

_REF = "#/components/schemas/{model}"
# What FastAPI says of a wrong parameter, which is answered in another shape here.
_NOT_OURS = "HTTPValidationError"
# Models of bodies that routes read themselves; others add theirs with `body_of`.
_MODELS: dict[str, type[BaseModel]] = {
    model.__name__: model for model in (NewDemonstrations, NewTask, PredictIn, Problem, TaskChanges)
}
_MEANINGS = {
    400: "The request cannot be read, or names another host.",
    401: "A valid API key is needed.",
    403: "The key does not allow it, or a web page of another site sent the request.",
    404: "There is no such thing, or it is another owner's.",
    408: "The body did not arrive in time.",
    409: "It conflicts with what is there.",
    412: "The task was changed meanwhile (`If-Match`).",
    413: "The request is larger than a limit.",
    415: "The content type is not accepted.",
    422: "Something in the request breaks a rule; `errors` names all bad rows.",
    429: "Too many requests, or too many rows wait; `Retry-After` says when to try again.",
    500: "The server failed.",
    503: "The server cannot answer now; `Retry-After` says when to try again.",
}
# What any route may answer: guards, keys and limits go before it.
_EVERYWHERE = (400, 401, 403, 422, 429, 503)
_WITH_BODY = (408, 413, 415)
_TEXT = {"type": "string"}


def errors(*statuses: int, body: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return the documented errors of a route: those of every route, and its own.

    Args:
        *statuses: Its own.
        body: Whether it takes a body.
    """
    schema = {"$ref": _REF.format(model=Problem.__name__)}
    known = sorted({*_EVERYWHERE, *statuses, *(_WITH_BODY if body else ())})
    return {
        status: {"description": _MEANINGS[status], "content": {PROBLEM_TYPE: {"schema": schema}}} for status in known
    }


def body_of(
    model: type[BaseModel] | None, *, lines: bool = False, fields: Iterable[str] = (), required: bool = True
) -> dict[str, Any]:
    """Return what describes the body of a route that reads it itself.

    Args:
        model: What JSON must be; None for a row.
        lines: Whether rows may also come as JSON lines, a table, or a form with a file.
        fields: Further fields of such a form.
        required: Whether there must be one.
    """
    schema: dict[str, Any] = {"type": "object", "description": "Column -> value."}
    if model is not None:
        _MODELS[model.__name__] = model
        schema = {"$ref": _REF.format(model=model.__name__)}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if lines:
        properties = {"file": {**_TEXT, "format": "binary"}, **dict.fromkeys(fields, _TEXT)}
        form = {"type": "object", "required": ["file"], "properties": properties}
        content |= {JSON_LINES: {"schema": _TEXT}, "text/csv": {"schema": _TEXT}}
        content |= {"multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": required, "content": content}}


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of the application, with the models of bodies that routes read themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        kinds = [(model, "validation") for model in _MODELS.values()]
        _, schemas = models_json_schema(kinds, ref_template=_REF)  # type: ignore[arg-type]
        components = document.setdefault("components", {}).setdefault("schemas", {})
        for name, schema in schemas.get("$defs", {}).items():
            components.setdefault(name, schema)
        for name in (_NOT_OURS, "ValidationError"):
            components.pop(name, None)
        for route in (route for methods in document["paths"].values() for route in methods.values()):
            if _NOT_OURS in str(route["responses"].get("422")):
                del route["responses"]["422"]
        app.openapi_schema = document
    return app.openapi_schema
