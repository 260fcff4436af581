"""Errors as `application/problem+json` (RFC 9457): one table says which HTTP status an error has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from manyicl.errors import UserError
from manyicl.server.bad_rows import BadRowsError
from manyicl.server.prediction_json import error_json, sentence

PROBLEM_TYPE = "application/problem+json"
# A mistake in what a request says, as all rules for tasks and rows find them.
OTHER_MISTAKES = 422
STATUSES: Mapping[str, int] = {
    "broken_json": 400,
    "broken_body": 400,
    "wrong_host": 400,
    "key_needed": 401,
    "wrong_key": 401,
    "foreign_origin": 403,
    "forwarded_without_keys": 403,
    "not_allowed": 403,
    "unknown_address": 404,
    "unknown_task": 404,
    "unknown_version": 404,
    "unknown_demonstration": 404,
    "unknown_job": 404,
    "wrong_method": 405,
    "slow_body": 408,
    "name_taken": 409,
    "too_many_tasks": 409,
    "too_many_kept_jobs": 409,
    "too_many_pinned_tasks": 409,
    "version_failed": 409,
    "changed_meanwhile": 412,
    "body_too_large": 413,
    "too_many_rows": 413,
    "too_many_demonstrations": 413,
    "task_too_large": 413,
    "wrong_content_type": 415,
    "queue_full": 429,
    "too_many_requests": 429,
    "too_many_jobs": 429,
    "too_many_idempotency_keys": 429,
    "server_error": 500,
    "not_ready": 503,
    "stopping": 503,
    "machine_failed": 503,
    "database_unavailable": 503,
}
# How long a client waits before it tries again where nothing better is known.
USUAL_RETRY_SECONDS = 1.0


class BusyError(UserError):
    """The server cannot do it now.

    Attributes:
        retry_seconds: When it is worth trying again.
    """

    retry_seconds: float = USUAL_RETRY_SECONDS


def too_busy(code: str, what: str, retry_seconds: float, remedy: str | None = None) -> BusyError:
    """Make the error for what can be tried again after some seconds."""
    error = BusyError(code, what, remedy=remedy)
    error.retry_seconds = retry_seconds
    return error


def machine_failed() -> BusyError:
    """Make the error for a failure of the disk or the database; the log says which, with paths of this machine.

    Whether a write is stored is not always known: the connection to PostgreSQL may break while it commits.
    """
    what = "the disk, the database or the model of the server failed"
    remedy = (
        "A write is stored whole or not at all: send the request again with the same Idempotency-Key, or read the task "
        "first if it had none. Tell who runs the server."
    )
    return too_busy("machine_failed", what, 5, remedy)


def status_of(error: UserError) -> int:
    """Return the HTTP status of an error."""
    return STATUSES.get(error.code, OTHER_MISTAKES)


def problem(error: UserError, request_id: str | None = None) -> dict[str, Any]:
    """Return an error as the fields of a problem document; the file of an error is none of a caller's business."""
    fields: dict[str, Any] = {
        "type": f"urn:manyicl:error:{error.code}",
        "title": error.what,
        "status": status_of(error),
        "detail": sentence(error),
        "code": error.code,
        "row": error.row,
        "field": error.field,
        "expected": error.expected,
        "found": error.found,
        "remedy": error.remedy,
    }
    if isinstance(error, BadRowsError):
        fields["errors"] = [error_json(one) for one in error.errors]
    fields["request_id"] = request_id
    return {name: value for name, value in fields.items() if value is not None}


class ProblemResponse(Response):
    """Answers with an error."""

    media_type = PROBLEM_TYPE

    def __init__(self, error: UserError, request_id: str | None = None, headers: Mapping[str, str] | None = None):
        """Take the error, and headers that belong to it.

        Args:
            error: What is wrong.
            request_id: Id of the request, to find it in the logs.
            headers: Further headers.
        """
        status = status_of(error)
        content = json.dumps(problem(error, request_id), ensure_ascii=False).encode("utf-8", "replace")
        super().__init__(content, status, {**_headers_of(error, status), **(headers or {})})


def _headers_of(error: UserError, status: int) -> dict[str, str]:
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if status in (429, 503):
        seconds = getattr(error, "retry_seconds", USUAL_RETRY_SECONDS)
        return {"Retry-After": str(max(1, math.ceil(seconds)))}
    return {}
