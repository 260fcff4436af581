"""Routes for those who watch the server: whether it runs, whether it can answer, and its metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from manyicl.errors import MachineError
from manyicl.server.authentication import Predictor
from manyicl.server.bodies import quickly
from manyicl.server.documented import errors
from manyicl.server.logging import log
from manyicl.server.metrics import CONTENT_TYPE
from manyicl.server.schemas import Health, Readiness
from manyicl.server.services import App, Services

router = APIRouter(tags=["health"])
_TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}}


@router.get("/healthz", response_model=Health, responses=errors())
async def get_health() -> Any:
    """Say that the process runs, also while the model works."""
    return Health(status="ok")


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}, **errors()})
async def get_readiness(response: Response, services: App) -> Any:
    """Say whether all tasks that could answer before can answer now.

    503 while some are compiled again, or the database cannot be read.
    """
    num_done, number = services.service.rebuilt
    state = services.worker.state()
    can_answer = state.is_alive and await _database_answers(services)
    status = "failed" if not can_answer else "compiling" if num_done < number else "ready"
    if services.is_stopping:
        status = "stopping"
    response.status_code = 200 if status == "ready" else 503
    return {
        "status": status,
        "model": services.service.model,
        "num_versions_to_compile": number,
        "num_versions_compiled": num_done,
    }


async def _database_answers(services: Services) -> bool:
    try:
        await quickly(services.tasks.is_there, "")  # any read will do
    except MachineError as error:
        log.error("database_does_not_answer", sentence=str(error))
        return False
    return True


@router.get("/metrics", response_class=Response, responses={200: _TEXT, **errors()})
async def get_metrics(_caller: Predictor, services: App) -> Response:
    """Return metrics in Prometheus' text format; no label names a task or an owner."""
    return Response(services.metrics.as_text(), media_type=CONTENT_TYPE)
