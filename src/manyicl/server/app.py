"""The application: routes, what every request goes through before them, and how errors are answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

import manyicl
from manyicl.errors import MachineError, UserError, quoted
from manyicl.library_errors import lower_case_start
from manyicl.server.documented import openapi_document
from manyicl.server.logging import log
from manyicl.server.middleware import Authentication, BodyLimit, Guard, RateLimit, RequestLog
from manyicl.server.openai_errors import OpenAIErrors
from manyicl.server.problems import ProblemResponse, machine_failed
from manyicl.server.routes import evaluation, health, jobs, openai, predictions, tasks
from manyicl.server.services import Services

DESCRIPTION = "Add a task by giving examples, and let it answer rows. Nothing is trained."
ROUTERS = (tasks.router, predictions.router, evaluation.router, jobs.router, openai.router, health.router)
# Status of a request whose client has gone, in logs and metrics; nobody receives it.
CLIENT_GONE = 499


def create_app(services: Services, on_stop: Callable[[], None] = lambda: None) -> FastAPI:
    """Make the application of a server.

    Args:
        services: Its parts, started.
        on_stop: Called once no request is answered any more.
    """
    # No pages of documentation: they would load scripts from elsewhere. The document itself is at /openapi.json.
    app = FastAPI(
        title="manyicl",
        version=manyicl.__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(services, on_stop),
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]
    _add_middleware(app, services)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(MachineError, _machine_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    return app


def _lifespan(
    services: Services, on_stop: Callable[[], None]
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        services.runner.start()
        try:
            yield
        finally:
            services.runner.stop()
            on_stop()

    return lifespan


def _add_middleware(app: FastAPI, services: Services) -> None:
    """Add what every request goes through; the last one that is added is the first."""
    settings = services.settings
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(RateLimit, limits=services.limits)
    app.add_middleware(Authentication, keys=services.keys)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "If-Match", "Idempotency-Key"],
            expose_headers=["ETag", "Location", "Retry-After", "X-Request-Id"],
        )
    app.add_middleware(Guard, settings=settings, methods_at=_methods_at)
    app.add_middleware(RequestLog, metrics=services.metrics)
    app.add_middleware(OpenAIErrors)


def _id_of(request: Request) -> str | None:
    request_id: str | None = getattr(request.state, "request_id", None)
    return request_id


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return ProblemResponse(error, _id_of(request))


async def _machine_error(request: Request, error: Exception) -> Response:
    """Answer that the machine failed: a full disk, a lost database. What was acknowledged before is not touched."""
    log.error("machine_error", error=type(error).__name__, sentence=str(error))
    return ProblemResponse(machine_failed(), _id_of(request))


async def _invalid_request(request: Request, error: Exception) -> Response:
    """Answer what is wrong with a parameter of the path, the query or a header."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place, *names = map(str, first["loc"])
    what = f"{'.'.join(names)}: {lower_case_start(first['msg'])}"
    found = quoted(first.get("input")) if place != "body" else None
    return ProblemResponse(UserError("wrong_value", what, found=found, field=".".join(names)), _id_of(request))


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer that there is no such address, or not with that method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        problem = UserError("wrong_method", f"this address does not take {request.method}")
    elif error.status_code == 404:
        problem = UserError("unknown_address", "there is no such address", remedy="/openapi.json lists all.")
    else:
        problem = UserError("broken_body", lower_case_start(str(error.detail)))
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = (
            ", ".join(_methods_at(request.url.path)) or "GET"
        )  # Starlette names those of the first route alone
    return ProblemResponse(problem, _id_of(request), headers)


def _methods_at(path: str) -> list[str]:
    """Return the methods that an address takes."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, Route)]
    methods = [method for route in routes if route.path_regex.match(path) for method in route.methods or ()]
    return sorted(set(methods))


async def _client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
