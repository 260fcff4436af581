"""Routes for OpenAI's SDK, with a task as the model: decisions, chat completions, models."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from manyicl.checked import validated
from manyicl.errors import UserError
from manyicl.server.answering import answers, client_of, parts_of, require_answerable, started
from manyicl.server.authentication import Predictor
from manyicl.server.bodies import in_thread, quickly, read_body, require_type
from manyicl.server.documented import body_of
from manyicl.server.middleware import JSON
from manyicl.server.openai_shapes import (
    END_OF_EVENTS,
    INPUT,
    MESSAGES,
    ChatIn,
    ChatOut,
    DecisionIn,
    DecisionOut,
    ErrorOut,
    ModelOut,
    ModelsOut,
    chat_out,
    chunk,
    decision_answer,
    decision_usage,
    event,
    finish_reason,
    labels_of,
    model_out,
    named_model,
    new_id,
    openai_error,
    openai_status,
    row_of,
    seconds,
)
from manyicl.server.problems import problem
from manyicl.server.records import Caller, TaskRecord, VersionRecord
from manyicl.server.routes.parameters import EVENTS
from manyicl.server.row_input import json_body, with_numbers
from manyicl.server.schemas import AnswerChoices
from manyicl.server.services import App, Services
from manyicl.server.task_service import Question, task_without_rows

if TYPE_CHECKING:
    from manyicl.engine.prediction import Prediction

MODELS_AT_ONCE = 1000
_STATUSES = {
    400: "The request breaks a rule, or the task's labels do not fit it.",
    401: "A valid API key is needed.",
    403: "The key does not allow it, or a web page of another site sent the request.",
    404: "There is no such task or version, or it is another owner's.",
    408: "The body did not arrive in time.",
    409: "The task cannot answer: compiling it failed.",
    413: "The request is larger than a limit.",
    415: "The content type is not accepted.",
    429: "Too many requests, or too many rows wait; `Retry-After` says when to try again.",
    500: "The server failed.",
    503: "The server cannot answer now; `Retry-After` says when to try again.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut, "description": meaning} for status, meaning in _STATUSES.items()
}
ModelT = TypeVar("ModelT", bound=BaseModel)

router = APIRouter(prefix="/v1", tags=["openai"], responses=_ERRORS)
ModelName = Annotated[
    str, Path(max_length=250, pattern=r"^[^/\x00-\x1f\x7f]+$", description="A task: `name` or `name@version`.")
]


@router.get("/models", response_model=ModelsOut)
async def list_models(caller: Predictor, services: App) -> Any:
    """Return your tasks as models."""

    def found() -> ModelsOut:
        tasks, cursor = services.tasks.page(caller.owner, MODELS_AT_ONCE)
        while cursor is not None:
            more, cursor = services.tasks.page(caller.owner, MODELS_AT_ONCE, cursor)
            tasks += more
        return ModelsOut(data=list(map(model_out, tasks)))

    return await quickly(found)


@router.get("/models/{model}", response_model=ModelOut)
async def get_model(model: ModelName, caller: Predictor, services: App) -> Any:
    """Return a task as a model."""
    record, found = await quickly(_task_and_version, services, caller, model)
    if "@" not in model:
        return model_out(record)
    return ModelOut(id=f"{record.name}@{found.key.version}", created=seconds(found.created_at))


@router.post("/decisions", response_model=DecisionOut, openapi_extra=body_of(DecisionIn))
async def create_decision(request: Request, caller: Predictor, services: App) -> Any:
    """Answer questions on one query with the labels of a task.

    `choice` takes labels of the task, `predicate` a task with the labels true and false, or yes and no, `score` labels
    as levels. Where the most probable answer is less probable than the task's `abstain_below`, the answer is a refusal.
    """
    given = await _body(request, DecisionIn, INPUT)
    services.limits.count_rows(caller, 1)
    question = await in_thread(
        request, lambda: _question(services, caller, given.model, given.input, INPUT, {"scores": "all"})
    )
    if question.version.labels is not None:  # before anything is computed
        for number, one in enumerate(given.questions, start=1):
            labels_of(one, question.version.labels, number)
    version, prediction = await _answered(request, services, question, INPUT)
    assert prediction.scores is not None, "all were wanted, of a task with labels or options"
    probabilities, below = prediction.scores.probabilities, question.how.options.get("abstain_below")
    found = [
        decision_answer(one, labels_of(one, list(probabilities), number), probabilities, below)
        for number, one in enumerate(given.questions, start=1)
    ]
    name = f"{question.task.name}@{version.key.version}"
    return DecisionOut(model=name, answers=found, usage=decision_usage(version.num_tokens))


@router.post(
    "/chat/completions",
    response_model=ChatOut,
    responses={200: {"content": {EVENTS: {"schema": {"type": "string"}}}}},
    openapi_extra=body_of(ChatIn),
)
async def create_completion(request: Request, caller: Predictor, services: App) -> Any:
    """Answer a query with the text of a free answer, whole or in parts; of a task with labels, with a label."""
    from manyicl.episodes.budget import max_answer_tokens

    given = await _body(request, ChatIn, MESSAGES)
    services.limits.count_rows(caller, 1)
    question = await in_thread(
        request, lambda: _question(services, caller, given.model, given.messages, MESSAGES, given.sampling())
    )
    task = task_without_rows(question.task, question.version)
    if not task.is_closed:
        given.require_tokens(max_answer_tokens(task))
    if given.stream:
        return await _stream(request, services, question, is_closed=task.is_closed)
    version, prediction = await _answered(request, services, question, MESSAGES)
    return chat_out(prediction, f"{question.task.name}@{version.key.version}", int(time.time()))


async def _body(request: Request, model: type[ModelT], query: str) -> ModelT:
    """Read the body; numbers in the query stay the text that is written there, as in rows.

    Raises:
        UserError: If it breaks a rule.
    """
    body = await read_body(request)
    require_type(body, JSON)
    content = json_body(body.content)
    keys = {name: value if name == query else with_numbers(value) for name, value in content.items()}
    return validated(model, keys, None)


def _question(
    services: Services, caller: Caller, model: str, content: Any, field: str, choices: dict[str, Any]
) -> Question:
    """Find the task and the version that a model name stands for, and render the query.

    Raises:
        UserError: If there is no such task or version, or the query cannot be answered.
    """
    record, version = _task_and_version(services, caller, model)
    without_rows = task_without_rows(record, version)
    if "scores" in choices and not without_rows.is_closed:
        what, remedy = f"task {record.name!r} has no labels", "Use /v1/chat/completions for free answers."
        raise UserError("no_labels", what, remedy=remedy, field="model")
    row = row_of(content, without_rows, field)
    chosen = AnswerChoices(version=version.key.version, **choices)
    question = services.service.question(caller.owner, record.id, chosen, [row])
    _require_no_problem(question.rows[0], field)
    return question


def _task_and_version(services: Services, caller: Caller, model: str) -> tuple[TaskRecord, VersionRecord]:
    """Return the task and the version that a model name stands for.

    Raises:
        UserError: If there is none.
    """
    try:
        task, number = named_model(model)
        return services.service.version_that_answers(caller.owner, task, number)
    except UserError as error:
        error.field = "model"
        raise


def _require_no_problem(row: object, field: str) -> None:
    if isinstance(row, UserError):
        row.row, row.field = None, row.field or field  # it is the only one
        raise row


async def _answered(
    request: Request, services: Services, question: Question, field: str
) -> tuple[VersionRecord, Prediction]:
    """Answer the only row, which came in that field of the body.

    Raises:
        UserError: If it cannot be answered.
    """
    await require_answerable(services, question.version)
    async with client_of(request, services) as client:
        (prediction,) = [one async for one in answers(services, client, question)]
    _require_no_problem(prediction.problem, field)
    # It may have become ready for this row.
    return await require_answerable(services, question.version), prediction


async def _stream(request: Request, services: Services, question: Question, *, is_closed: bool) -> Response:
    """Send a completion in parts; a label comes as one part."""
    await require_answerable(services, question.version)
    name = f"{question.task.name}@{question.version.key.version}"
    parts = _label(request, services, question) if is_closed else _parts(request, services, question)
    return StreamingResponse(await started(_chunks(parts, name), _error_event), media_type=EVENTS)


def _error_event(error: UserError) -> bytes:
    fields = problem(error)
    return event(openai_error(fields, openai_status(fields["status"])))


async def _chunks(parts: AsyncIterator[str | Prediction], model: str) -> AsyncIterator[bytes]:
    """Turn parts of an answer into events of the SDK."""
    completion_id, created = new_id(), int(time.time())
    has_begun = False
    async for part in parts:
        if not has_begun:
            yield chunk(completion_id, model, created, {"role": "assistant", "content": ""})
            has_begun = True
        if isinstance(part, str):
            yield chunk(completion_id, model, created, {"content": part})
            continue
        if part.abstained:
            refusal = chat_out(part, model, created).choices[0].message.refusal
            yield chunk(completion_id, model, created, {"refusal": refusal})
        yield chunk(completion_id, model, created, {}, finish_reason(part))
        yield END_OF_EVENTS


async def _label(request: Request, services: Services, question: Question) -> AsyncIterator[str | Prediction]:
    _, prediction = await _answered(request, services, question, MESSAGES)
    if not prediction.abstained:
        yield prediction.answer
    yield prediction


async def _parts(request: Request, services: Services, question: Question) -> AsyncIterator[str | Prediction]:
    """Yield the text of a free answer as it is written, then the whole prediction.

    Raises:
        UserError: If it cannot be given.
    """
    try:
        async for part in parts_of(request, services, question):
            if part.text:
                yield part.text
            if part.prediction is not None:
                yield part.prediction
    except UserError as error:
        raise error.at(field=MESSAGES)  # noqa: B904
