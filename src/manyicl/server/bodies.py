"""Bodies of requests: JSON, JSON lines, tables, or a form with a file; read whole, within the limit, then parsed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from manyicl.checked import validated
from manyicl.errors import UserError, located, quoted
from manyicl.library_errors import reason
from manyicl.server.conditions import idempotency_of, matching_revisions
from manyicl.server.middleware import JSON, MULTIPART
from manyicl.server.records import Idempotency
from manyicl.server.row_input import (
    ROW_CONTENT_TYPES,
    InputRow,
    RowKind,
    at_most,
    body_and_rows,
    json_body,
    kind_of_upload,
    media_type,
    rows_in,
    with_numbers,
)
from manyicl.server.services import services_of

MOST_FIELDS = 20
# A body that takes less than a millisecond to parse.
SMALL_BYTES = 16 * 1024
FILE_FIELD = "file"
ResultT = TypeVar("ResultT")
ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Body:
    """The whole body of a request.

    Attributes:
        content: Its bytes.
        content_type: Its content type, with parameters.
        if_match: Revisions that the header ``If-Match`` allows; None for any.
        idempotency: Idempotency key, and what it belongs to.
    """

    content: bytes
    content_type: str
    if_match: frozenset[int] | None = None
    idempotency: Idempotency | None = None

    @property
    def media_type(self) -> str:
        """Content type without parameters."""
        return media_type(self.content_type)


@dataclass(frozen=True)
class RowsAndKeys:
    """What a body says besides its rows, and its rows.

    Attributes:
        keys: Key -> value, from JSON or from the fields of a form.
        rows: Rows, or why one cannot be used.
        is_lines: Whether the rows came as lines, so that each has an answer of its own.
    """

    keys: Mapping[str, Any]
    rows: list[InputRow] = field(default_factory=list)
    is_lines: bool = False


async def read_body(request: Request) -> Body:
    """Read a body whole; its size was bounded on the way (see `manyicl.server.middleware.BodyLimit`).

    Raises:
        UserError: If it is too large, or a header is wrong.
    """
    headers = request.headers
    if_match, content_type = matching_revisions(headers.get("if-match")), headers.get("content-type", "")
    content = b"".join([part async for part in request.stream()])
    target = request.url.path + "?" + request.url.query
    key = headers.get("idempotency-key")
    idempotent = partial(idempotency_of, key, request.method, target, content_type, content)
    # Hashing a large body takes a tenth of a second.
    idempotency = idempotent() if key is None or len(content) <= SMALL_BYTES else await quickly(idempotent)
    return Body(content, content_type, if_match, idempotency)


async def in_thread(request: Request, work: Callable[[], ResultT]) -> ResultT:
    """Parse, render or check rows in a thread: many rows of few requests at a time, few rows without waiting."""
    return await to_thread.run_sync(work, limiter=None if _is_small(request) else services_of(request).rendering)


async def write_in_thread(request: Request, owner: str, task: str, write: Callable[[], ResultT]) -> ResultT:
    """Check and write a change of a task in a thread. Those that wait for their turn keep no thread from others."""
    services = services_of(request)
    limiter = services.writing if _is_small(request) else services.rendering
    async with services.writing_of_task.of(f"{owner}/{task}"), services.writing_of_owner.of(owner):
        return await to_thread.run_sync(write, limiter=limiter)


def _is_small(request: Request) -> bool:
    headers = request.headers
    length = headers.get("content-length", "" if "transfer-encoding" in headers else "0")
    return length.isdecimal() and len(length) < 10 and int(length) <= SMALL_BYTES


async def quickly(work: Callable[..., ResultT], *arguments: Any, **named: Any) -> ResultT:
    """Run what takes milliseconds, as a query of the database, in a thread."""
    return await to_thread.run_sync(partial(work, *arguments, **named))


def json_of(body: Body, model: type[ModelT]) -> ModelT:
    """Read a JSON object.

    Raises:
        UserError: If the body is of another type, or breaks a rule.
    """
    require_type(body, JSON)
    return validated(model, with_numbers(json_body(body.content)), None)


def columns_of(body: Body) -> dict[str, Any]:
    """Read a row as a JSON object; its numbers stay the text that is written there.

    Raises:
        UserError: If the body is of another type, or no object.
    """
    require_type(body, JSON)
    return json_body(body.content)


def require_type(body: Body, *expected: str) -> None:
    """Refuse a body of another type.

    Raises:
        UserError: If so.
    """
    if body.media_type not in expected:
        what, found = "this address does not take such a body", quoted(body.media_type)
        raise UserError("wrong_content_type", what, expected=f"one of {', '.join(expected)}", found=found)


async def rows_of(request: Request, body: Body, key: str, most: int) -> RowsAndKeys:
    """Read rows in whatever form they come.

    Args:
        request: The request.
        body: Its body.
        key: Key of the rows in JSON.
        most: Most rows.

    Raises:
        UserError: If the body cannot be read, or has no rows or too many.
    """
    if body.media_type == MULTIPART:
        return await _rows_of_form(request, body, key, most)
    if body.media_type == JSON:
        parse = partial(body_and_rows, body.content, key, key)
        keys, rows = parse() if len(body.content) <= SMALL_BYTES else await in_thread(request, parse)
        return RowsAndKeys(keys, _required(list(at_most(rows, most)), key, keys))
    kind = ROW_CONTENT_TYPES[body.media_type]
    rows = await in_thread(request, lambda: list(at_most(rows_in([body.content], kind, key), most)))
    return RowsAndKeys({}, _required(rows, key), is_lines=True)


async def _rows_of_form(request: Request, body: Body, key: str, most: int) -> RowsAndKeys:
    """Read the file of a form; its other fields are texts, or JSON where they begin like an object."""

    def read() -> RowsAndKeys:
        # The parser is asynchronous, but has nothing to wait for: in a thread it keeps nobody else waiting.
        keys, kind, content = asyncio.run(_fields_and_file(body))
        rows = list(at_most(rows_in([content], kind, key), most))
        return RowsAndKeys(keys, _required(rows, key), is_lines=True)

    return await in_thread(request, read)


async def _fields_and_file(body: Body) -> tuple[dict[str, Any], RowKind, bytes]:
    """Return the fields of a form, and the kind and content of its file."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body.content

    headers = Headers({"content-type": body.content_type})
    parser = MultiPartParser(headers, stream(), max_files=1, max_fields=MOST_FIELDS)
    parser.spool_max_size = len(body.content) + 1  # never a temporary file
    try:
        form = await parser.parse()
    except (MultiPartException, LookupError, ValueError) as error:
        raise UserError("broken_body", f"the form cannot be read, {reason(error)}") from error
    try:
        keys: dict[str, Any] = {}
        for name, value in form.multi_items():
            if isinstance(value, str):
                with located(field=name):
                    keys[name] = _object_or_text(value)
        file = form.get(FILE_FIELD)
        if not isinstance(file, UploadFile):
            what, remedy = f"the form has no file in the field {FILE_FIELD!r}", "`curl -F file=@rows.csv` sends one."
            raise UserError("missing_key", what, remedy=remedy, field=FILE_FIELD)
        return keys, kind_of_upload(file.content_type, file.filename), await file.read()
    finally:
        await form.close()


def _object_or_text(value: str) -> Any:
    """Parse a field of a form that begins like a JSON object; one that begins with two braces is a template."""
    start = value.lstrip()
    is_object = start.startswith("{") and not start.startswith("{{")
    return json_body(value.encode("utf-8", "replace")) if is_object else value


def _required(rows: list[InputRow], key: str, others: Iterable[str] = ()) -> list[InputRow]:
    if not rows:
        found = f"the keys {', '.join(map(quoted, names))}" if (names := list(others)) else None
        raise UserError("no_rows", f"there are no rows in {key!r}", expected="one at least", found=found, field=key)
    return rows
