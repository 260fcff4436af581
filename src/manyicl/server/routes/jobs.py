"""Routes of jobs: predictions and evaluations of many rows, which go through restarts."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from manyicl.checked import validated
from manyicl.errors import UserError
from manyicl.server.authentication import Predictor
from manyicl.server.bodies import RowsAndKeys, in_thread, quickly, read_body, rows_of
from manyicl.server.documented import body_of, errors
from manyicl.server.prediction_json import json_line
from manyicl.server.records import JobRecord
from manyicl.server.routes.parameters import (
    MOST_IN_PAGE,
    REPLAYED,
    USUAL_IN_PAGE,
    Cursor,
    IdempotencyKey,
    Limit,
)
from manyicl.server.row_input import JSON_LINES, ROWS
from manyicl.server.schemas import MOST_COUNTED, AnswerChoices, JobOfLines, JobOut, JobPage, NewJob, NewJobKeys
from manyicl.server.services import App

_ACCEPTED = {"headers": {"Location": {"description": "Address of the job.", "schema": {"type": "string"}}}}
_LINES = {
    "content": {JSON_LINES: {"schema": {"type": "string"}}},
    "description": "One JSON object a line, by rising `row`: an answer as in a prediction, or a `problem`.",
}

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
JobId = Annotated[str, Path(max_length=200, pattern=r"^[^/\x00-\x1f\x7f]+$", description="Id of the job.")]
After = Annotated[int, Query(ge=0, le=MOST_COUNTED, description="Row after which results begin; 0 for all.")]
MostResults = Annotated[int, Query(ge=1, le=MOST_IN_PAGE, description="Most results.")]


@router.post(
    "",
    status_code=202,
    response_model=JobOut,
    responses={202: _ACCEPTED, **errors(404, 409, body=True)},
    openapi_extra=body_of(NewJob, lines=True, fields=("kind", "task", "version", "options")),
)
async def create_job(
    request: Request,
    response: Response,
    caller: Predictor,
    services: App,
    lines: Annotated[JobOfLines, Query()],
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Have many rows answered or evaluated in the background. A bad row becomes a problem of its result."""
    services.require_running()
    body = await read_body(request)
    content = await rows_of(request, body, ROWS, services.settings.max_job_rows)
    services.limits.count_rows(caller, len(content.rows))
    new = _new_job(content, lines)
    choices = AnswerChoices(**new.options.model_dump(exclude_unset=True), version=new.version)
    create = partial(services.job_service.create, caller.owner, new.kind, new.task, choices)
    job, is_replayed = await in_thread(request, partial(create, content.rows, body.idempotency))
    if is_replayed:
        response.headers[REPLAYED] = "true"
    services.runner.wake()
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job_out(job)


def _new_job(content: RowsAndKeys, lines: JobOfLines) -> NewJobKeys:
    """Put together what the body and the query say of a job; in JSON the body says everything."""
    given = lines.model_dump(exclude_unset=True)
    if not content.is_lines:
        if given:
            what, remedy = "the query says something of a job that the body describes", "Say it in the body."
            raise UserError("unknown_key", what, remedy=remedy, field=next(iter(given)))
        return validated(NewJobKeys, content.keys, None)
    keys = {**given, **content.keys}
    of_job = {name: keys.pop(name) for name in ("kind", "task", "version") if name in keys}
    options = keys.pop("options", {})
    if not isinstance(options, dict):
        raise UserError("wrong_value", "options: it is no JSON object", field="options")
    return validated(NewJobKeys, {**of_job, "options": {**keys, **options}}, None)


@router.get("", response_model=JobPage, responses=errors())
async def list_jobs(caller: Predictor, services: App, cursor: Cursor = None, limit: Limit = USUAL_IN_PAGE) -> Any:
    """Return your jobs, oldest first."""
    jobs, next_cursor = await quickly(services.jobs.page, caller.owner, limit, cursor)
    return JobPage(data=list(map(job_out, jobs)), next_cursor=next_cursor)


@router.get("/{job}", response_model=JobOut, responses=errors(404))
async def get_job(job: JobId, caller: Predictor, services: App) -> Any:
    """Return how far a job is, and the scores of an evaluation that is done."""
    return job_out(await quickly(services.jobs.get, caller.owner, job))


@router.get("/{job}/results", response_class=Response, responses={200: _LINES, **errors(404)})
async def get_results(
    job: JobId, caller: Predictor, services: App, after: After = 0, limit: MostResults = MOST_IN_PAGE
) -> Any:
    """Return results by row, as JSON lines, up to the first row that has none yet. Read on after the last `row`."""

    def lines() -> bytes:
        record = services.jobs.get(caller.owner, job)
        found = services.jobs.results(record.id, after, limit)
        return b"".join(json_line({"row": number, **result}) for number, result in found)

    return Response(await quickly(lines), media_type=JSON_LINES)


@router.delete("/{job}", response_model=JobOut, responses=errors(404))
async def delete_job(job: JobId, caller: Predictor, services: App) -> Any:
    """Cancel a job that is not finished, and keep its results so far; or delete a finished one with its rows."""

    def cancelled_or_deleted() -> JobRecord:
        record = services.jobs.get(caller.owner, job)
        if record.finished_at is not None:
            return services.jobs.delete(caller.owner, job)
        record = services.jobs.cancel(caller.owner, job)
        services.runner.cancelled(record.id)
        return record

    return job_out(await quickly(cancelled_or_deleted))


def job_out(job: JobRecord) -> JobOut:
    """Return a job."""
    return JobOut(
        id=job.id,
        kind=job.kind,
        task=job.key.task_id,
        version=job.key.version,
        options=dict(job.options),
        state=job.state,
        num_rows=job.num_rows,
        num_done=job.num_done,
        num_problems=job.num_problems,
        created_at=job.created_at,
        finished_at=job.finished_at,
        problem=None if job.problem is None else dict(job.problem),
        summary=None if job.summary is None else dict(job.summary),
    )
