"""Routes of tasks, their demonstrations and versions."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from manyicl.checked import validated
from manyicl.errors import UserError
from manyicl.server.authentication import Manager, Predictor
from manyicl.server.bodies import RowsAndKeys, columns_of, json_of, quickly, read_body, rows_of, write_in_thread
from manyicl.server.conditions import entity_tag, matching_revisions
from manyicl.server.documented import body_of, errors
from manyicl.server.pages import page_of, position_of
from manyicl.server.prediction_json import json_line
from manyicl.server.records import VersionKey, Written
from manyicl.server.routes.parameters import (
    REPLAYED,
    USUAL_IN_PAGE,
    Cursor,
    DemonstrationNumber,
    IdempotencyKey,
    IfMatch,
    Limit,
    TaskName,
    Version,
    VersionNumber,
)
from manyicl.server.row_input import DEMONSTRATIONS, JSON_LINES
from manyicl.server.schemas import (
    CurveOut,
    DemonstrationPage,
    NewDemonstrations,
    NewTask,
    NewTaskKeys,
    TaskChanges,
    TaskOfTable,
    TaskOut,
    TaskPage,
    VersionPage,
    WrittenOut,
)
from manyicl.server.services import App, Services
from manyicl.server.task_json import (
    curve,
    demonstration_out,
    task_out,
    version_out,
    written_out,
)

_CREATED = {
    "headers": {
        "Location": {"description": "Address of the task.", "schema": {"type": "string"}},
        "ETag": {"description": "Revision of the task.", "schema": {"type": "string"}},
    }
}

router = APIRouter(prefix="/v1/tasks", tags=["tasks"])


@router.post(
    "",
    status_code=201,
    response_model=TaskOut,
    responses={201: _CREATED, **errors(409, body=True)},
    openapi_extra=body_of(NewTask, lines=True, fields=("name", "task", "settings")),
)
async def create_task(
    request: Request,
    response: Response,
    caller: Manager,
    services: App,
    table: Annotated[TaskOfTable, Query()],
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Make a task from demonstrations. It is stored when the answer comes; its state says when it can answer."""
    body = await read_body(request)
    content = await rows_of(request, body, DEMONSTRATIONS, services.settings.max_demonstrations)
    new = validated(NewTaskKeys, _keys_of_new_task(content, table), None)
    create = partial(services.service.create, caller.owner, new, content.rows, body.idempotency)
    written = await write_in_thread(request, caller.owner, new.name, create)
    _note_write(response, written)
    response.headers["Location"] = f"/v1/tasks/{written.task.id}"
    return await quickly(task_out, services, written.task)


def _keys_of_new_task(content: RowsAndKeys, table: TaskOfTable) -> dict[str, Any]:
    """Put together what the body and the query say of a new task; in JSON the body says everything."""
    given = table.model_dump(exclude_none=True)
    if not content.is_lines:
        if given:
            what, remedy = "the query says something of a task that the body describes", "Say it in the body."
            raise UserError("unknown_key", what, remedy=remedy, field=next(iter(given)))
        return dict(content.keys)
    if given.get("labels") == ["from_train"]:
        given["labels"] = "from_train"
    name = given.pop("name", None)
    named = {"name": name} if name is not None else {}
    keys = dict(content.keys)
    return {**named, **keys, "task": {**given, **_mapping(keys, "task")}}


def _mapping(keys: dict[str, Any], key: str) -> dict[str, Any]:
    value = keys.get(key, {})
    if not isinstance(value, dict):
        raise UserError("wrong_value", f"{key}: it is no JSON object", field=key)
    return value


@router.get("", response_model=TaskPage, responses=errors())
async def list_tasks(caller: Predictor, services: App, cursor: Cursor = None, limit: Limit = USUAL_IN_PAGE) -> Any:
    """Return your tasks, oldest first."""

    def page() -> TaskPage:
        tasks, next_cursor = services.tasks.page(caller.owner, limit, cursor)
        return TaskPage(data=[task_out(services, task, is_whole=False) for task in tasks], next_cursor=next_cursor)

    return await quickly(page)


@router.get("/{task}", response_model=TaskOut, responses=errors(404))
async def get_task(task: TaskName, response: Response, caller: Predictor, services: App) -> Any:
    """Return a task: its state, its newest version, how well its demonstrations were predicted."""
    record = await quickly(services.tasks.get, caller.owner, task)
    response.headers["ETag"] = entity_tag(record)
    return await quickly(task_out, services, record)


@router.patch(
    "/{task}",
    response_model=TaskOut,
    responses=errors(404, 409, 412, body=True),
    openapi_extra=body_of(TaskChanges),
)
async def change_task(
    task: TaskName, request: Request, response: Response, caller: Manager, services: App, if_match: IfMatch = None
) -> Any:
    """Change the name or settings of a task."""
    body = await read_body(request)
    changes = json_of(body, TaskChanges)
    update = partial(services.service.update, caller.owner, task, changes, body.if_match)
    record = await write_in_thread(request, caller.owner, task, update)
    response.headers["ETag"] = entity_tag(record)
    return await quickly(task_out, services, record)


@router.delete("/{task}", status_code=204, response_class=Response, responses=errors(404, 412))
async def delete_task(
    task: TaskName, request: Request, caller: Manager, services: App, if_match: IfMatch = None
) -> None:
    """Delete a task with all its versions, demonstrations and prefixes."""
    delete = partial(services.service.delete, caller.owner, task, matching_revisions(if_match))
    await write_in_thread(request, caller.owner, task, delete)


@router.get("/{task}/curve", response_model=CurveOut, responses=errors(404))
async def get_curve(task: TaskName, caller: Predictor, services: App) -> Any:
    """Return how well the demonstrations were predicted, each given those before it."""

    def found() -> CurveOut:
        record = services.tasks.get(caller.owner, task)
        version = services.service.answering_version(record)
        majority = services.service.majority(record, version)
        return CurveOut(task=record.id, version=record.ready, curve=curve(version) or [], majority=majority)

    return await quickly(found)


# --- Demonstrations


@router.post(
    "/{task}/demonstrations",
    status_code=201,
    response_model=WrittenOut,
    responses=errors(404, 409, 412, body=True),
    openapi_extra=body_of(NewDemonstrations, lines=True),
)
async def add_demonstrations(
    task: TaskName,
    request: Request,
    response: Response,
    caller: Manager,
    services: App,
    if_match: IfMatch = None,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Add demonstrations, after those that are there; makes a new version."""
    body = await read_body(request)
    content = await rows_of(request, body, DEMONSTRATIONS, services.settings.max_demonstrations)
    if content.keys:
        key = next(iter(content.keys))
        raise UserError("unknown_key", f"unknown key {key!r}", expected=f"{DEMONSTRATIONS!r} alone", field=key)
    add = partial(services.service.add, caller.owner, task, content.rows, body.if_match, body.idempotency)
    return await _written(services, response, await write_in_thread(request, caller.owner, task, add))


@router.get(
    "/{task}/demonstrations",
    response_model=DemonstrationPage,
    responses={200: {"content": {JSON_LINES: {"schema": {"type": "string"}}}}, **errors(404)},
)
async def list_demonstrations(
    task: TaskName,
    request: Request,
    caller: Predictor,
    services: App,
    version: Version = None,
    cursor: Cursor = None,
    limit: Limit = USUAL_IN_PAGE,
) -> Any:
    """Return demonstrations by number, as pages of JSON, or all as JSON lines where `Accept` says so."""
    record = await quickly(services.tasks.get, caller.owner, task)
    key = VersionKey(record.id, version or record.newest.key.version)
    if JSON_LINES in request.headers.get("accept", ""):
        rows = await quickly(services.tasks.demonstrations, key)
        # Each part is made in a thread.
        parts = (rows[start : start + USUAL_IN_PAGE] for start in range(0, len(rows), USUAL_IN_PAGE))
        lines = (b"".join(json_line(demonstration_out(row).model_dump()) for row in part) for part in parts)
        return StreamingResponse(lines, media_type=JSON_LINES)
    found = await quickly(services.tasks.demonstrations, key, position_of(cursor), limit + 1)
    page, next_cursor = page_of(found, limit, lambda row: row.number)
    return DemonstrationPage(data=list(map(demonstration_out, page)), next_cursor=next_cursor)


@router.patch(
    "/{task}/demonstrations/{number}",
    response_model=WrittenOut,
    responses=errors(404, 409, 412, body=True),
    openapi_extra=body_of(None),
)
async def correct_demonstration(
    task: TaskName,
    number: DemonstrationNumber,
    request: Request,
    response: Response,
    caller: Manager,
    services: App,
    if_match: IfMatch = None,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Replace a demonstration by the row of the body; it keeps its number and its place in the context."""
    body = await read_body(request)
    columns = columns_of(body)
    correct = partial(services.service.correct, caller.owner, task, number, columns, body.if_match, body.idempotency)
    return await _written(services, response, await write_in_thread(request, caller.owner, task, correct))


@router.delete("/{task}/demonstrations/{number}", response_model=WrittenOut, responses=errors(404, 409, 412))
async def remove_demonstration(
    task: TaskName,
    number: DemonstrationNumber,
    request: Request,
    response: Response,
    caller: Manager,
    services: App,
    if_match: IfMatch = None,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Remove a demonstration; earlier versions keep it."""
    body = await read_body(request)
    remove = partial(services.service.remove, caller.owner, task, [number], body.if_match, body.idempotency)
    return await _written(services, response, await write_in_thread(request, caller.owner, task, remove))


# --- Versions


@router.get("/{task}/versions", response_model=VersionPage, responses=errors(404))
async def list_versions(
    task: TaskName, caller: Predictor, services: App, cursor: Cursor = None, limit: Limit = USUAL_IN_PAGE
) -> Any:
    """Return the versions of a task, oldest first."""
    versions, next_cursor = await quickly(services.tasks.versions, caller.owner, task, limit, cursor)
    return VersionPage(data=list(map(version_out, versions)), next_cursor=next_cursor)


@router.post(
    "/{task}/versions/{version}/restore",
    status_code=201,
    response_model=WrittenOut,
    responses=errors(404, 409, 412, body=True),
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}}},
)
async def restore_version(
    task: TaskName,
    version: VersionNumber,
    request: Request,
    response: Response,
    caller: Manager,
    services: App,
    if_match: IfMatch = None,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Make a new version with the demonstrations of an earlier one."""
    body = await read_body(request)
    restore = partial(services.service.restore, caller.owner, task, version, body.if_match, body.idempotency)
    return await _written(services, response, await write_in_thread(request, caller.owner, task, restore))


async def _written(services: Services, response: Response, written: Written) -> WrittenOut:
    _note_write(response, written)
    return await quickly(written_out, services, written.task, written.version, written.numbers)


def _note_write(response: Response, written: Written) -> None:
    response.headers["ETag"] = entity_tag(written.task)
    if written.replayed:
        response.headers[REPLAYED] = "true"
