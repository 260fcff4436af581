"""Predictions: JSON, lines in and out, and free answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from manyicl.checked import validated
from manyicl.errors import UserError
from manyicl.server.answering import (
    Client,
    answers,
    client_of,
    parts_of,
    require_all_answers,
    require_all_rows,
    require_answerable,
    started,
)
from manyicl.server.authentication import Predictor
from manyicl.server.bodies import in_thread, read_body, rows_of
from manyicl.server.documented import body_of, errors
from manyicl.server.prediction_json import json_line, prediction_json
from manyicl.server.problems import problem
from manyicl.server.routes.parameters import EVENTS, TaskName
from manyicl.server.row_input import JSON_LINES, ROWS
from manyicl.server.schemas import AnswerChoices, PredictIn, PredictOut
from manyicl.server.services import App, Services
from manyicl.server.task_service import Question, task_without_rows

# nginx would keep the parts of an answer until it has many.
UNBUFFERED = {"X-Accel-Buffering": "no"}

router = APIRouter(prefix="/v1/tasks", tags=["predictions"])


@router.post(
    "/{task}/predict",
    response_model=PredictOut,
    responses={
        200: {"content": {JSON_LINES: {"schema": {"type": "string"}}, EVENTS: {"schema": {"type": "string"}}}},
        **errors(404, 409, body=True),
    },
    openapi_extra=body_of(PredictIn, lines=True),
)
async def predict(
    task: TaskName, request: Request, caller: Predictor, services: App, choices: Annotated[AnswerChoices, Query()]
) -> Response:
    """Answer rows.

    JSON is answered with JSON; a row that cannot be answered makes the whole request fail, and the error names all
    such rows. Lines and tables, whose options are in the query, are answered with lines in the same order; a row that
    cannot be answered has its `problem` there. With `Accept: text/event-stream` one free answer comes as it is written.
    """
    body = await read_body(request)
    content = await rows_of(request, body, ROWS, services.settings.max_rows)
    services.limits.count_rows(caller, len(content.rows))
    given = choices.model_dump(exclude_unset=True)
    chosen = validated(AnswerChoices, {**given, **content.keys}, None)
    question = await in_thread(request, lambda: services.service.question(caller.owner, task, chosen, content.rows))
    wants_events = EVENTS in request.headers.get("accept", "")
    if wants_events:
        return await _events(request, services, question)
    if content.is_lines:
        return await _lines(request, services, question)
    async with client_of(request, services) as client:
        return await _json(services, client, question)


async def _json(services: Services, client: Client, question: Question) -> Response:
    """Answer all rows, or none."""
    require_all_rows(question)
    await require_answerable(services, question.version)
    predictions = [one async for one in answers(services, client, question)]
    require_all_answers(question, predictions)
    version = await require_answerable(services, question.version)  # which may have become ready for these rows
    found = {
        "task": question.task.id,
        "version": version.key.version,
        "model": version.model,
        "predictions": list(map(prediction_json, predictions)),
    }
    return Response(json_line(found), media_type="application/json")


async def _lines(request: Request, services: Services, question: Question) -> Response:
    """Answer row by row; what fails before the first answer has a status of its own."""
    await require_answerable(services, question.version)
    headers = {"X-Task-Version": str(question.version.key.version), **UNBUFFERED}

    async def lines() -> AsyncIterator[bytes]:
        async with client_of(request, services) as client:
            numbers = iter(question.numbers)
            async for prediction in answers(services, client, question):
                number = next(numbers)
                if prediction.problem is not None:
                    prediction.problem.at(row=number)
                yield json_line(prediction_json(prediction))

    parts = await started(lines(), lambda error: json_line({"problem": problem(error)}))
    return StreamingResponse(parts, media_type=JSON_LINES, headers=headers)


async def _events(request: Request, services: Services, question: Question) -> Response:
    """Send one free answer as it is written.

    Raises:
        UserError: If there are several rows, the task has labels, or the row cannot be answered.
    """
    require_all_rows(question)
    if len(question.rows) != 1:
        what = "server-sent events answer one row"
        raise UserError("one_row_needed", what, found=str(len(question.rows)), field=ROWS)
    if task_without_rows(question.task, question.version).is_closed:
        what, remedy = "server-sent events are for free answers, and the task has labels", "Accept JSON."
        raise UserError("not_streamable", what, remedy=remedy)
    await require_answerable(services, question.version)
    parts = await started(_parts(request, services, question), lambda error: _event("error", problem(error)))
    return StreamingResponse(parts, media_type=EVENTS, headers=UNBUFFERED)


async def _parts(request: Request, services: Services, question: Question) -> AsyncIterator[bytes]:
    async for part in parts_of(request, services, question):
        if part.text:
            yield _event("part", {"text": part.text})
        if part.prediction is not None:
            yield _event("done", prediction_json(part.prediction))


def _event(name: str, value: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode()
