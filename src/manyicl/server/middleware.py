"""What every request goes through before its route, as plain ASGI: logs, guards, keys, limits, sizes.

Starlette's `BaseHTTPMiddleware` would hide from a route that its client has gone.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyicl.errors import MachineError, UserError, quoted
from manyicl.server.authentication import LOCAL_CALLER, OPEN_PATHS, key_in, wrong_key
from manyicl.server.logging import log, place_of
from manyicl.server.metrics import ServerMetrics
from manyicl.server.problems import ProblemResponse, machine_failed, too_busy
from manyicl.server.rate_limits import RateLimits
from manyicl.server.records import Caller
from manyicl.server.row_input import ROW_CONTENT_TYPES, media_type
from manyicl.server.settings import ServerSettings

if TYPE_CHECKING:
    from manyicl.server.keys import KeyStore

JSON = "application/json"
MULTIPART = "multipart/form-data"
# A web page elsewhere can send none of them without asking first, but for multipart, which the origin check refuses.
CONTENT_TYPES = frozenset({JSON, MULTIPART, *ROW_CONTENT_TYPES})
WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+?)\.?(?::\d{1,5})?", re.IGNORECASE)
_SAFETY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class RequestLog:
    """Gives every request an id, counts and logs it, and turns what nobody caught into an answer without details."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        """Wrap an application."""
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started, status = time.monotonic(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["Server-Timing"] = f"total;dur={(time.monotonic() - started) * 1000:.1f}"
                for name, value in _SAFETY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:  # whatever it is, the client gets an answer
            log.error("unexpected_error", error=place_of(error))
            if status == 0:
                response = ProblemResponse(UserError("server_error", "the server failed"), request_id)
                await response(scope, receive, send_and_note)
        finally:
            self._metrics.in_flight.dec()
            self._note(scope, status, time.monotonic() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route, caller = scope.get("route"), scope["state"].get("caller")
        template = getattr(route, "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.count_request(method, template, status, seconds)
        key_id = caller.key_id if isinstance(caller, Caller) else None
        fields = {"method": method, "route": template, "status": status, "seconds": round(seconds, 4)}
        log.info("request", **fields, **({} if key_id is None else {"key": key_id}))


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Guard:
    """Refuses what a web page elsewhere, or a name that was pointed at this machine, could send.

    A page of another site reaches a server on loopback in two ways: directly, where a browser names the page's origin,
    or after its own name was given this machine's address (DNS rebinding), where the header Host names it. A request
    that a browser sends without asking first can have a few content types only, none of which is accepted.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, methods_at: Callable[[str], Collection[str]]) -> None:
        """Wrap an application.

        Args:
            app: The application.
            settings: Settings of the server.
            methods_at: Gives the methods that a path takes.
        """
        self._app = app
        self._methods_at = methods_at
        self._hosts = settings.accepted_hosts
        self._origins = frozenset(settings.allowed_origins)
        self._has_keys = settings.require_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it before its body is read."""
        if scope["type"] == "http":
            try:
                self._check(scope["method"], scope["path"], Headers(scope=scope))
            except UserError as error:
                await refused(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = self._required_host(headers)
        self._require_origin(headers, host)
        if not self._has_keys and any(name in headers for name in _FORWARDED):
            what = "the request comes through a proxy, and the server has no API keys"
            remedy = "Make a key with `manyicl keys create` and restart the server."
            raise UserError("forwarded_without_keys", what, remedy=remedy)
        if method in WITH_BODY and method in self._methods_at(path):
            kind = media_type(headers.get("content-type"))
            if kind not in CONTENT_TYPES or len(headers.getlist("content-type")) != 1:
                what, expected = "the content type is not accepted", f"one of {', '.join(sorted(CONTENT_TYPES))}"
                remedy = "For JSON, and where there is no body, send the header `Content-Type: application/json`."
                raise UserError(
                    "wrong_content_type", what, expected=expected, found=quoted(kind or None), remedy=remedy
                )

    def _required_host(self, headers: Headers) -> str:
        """Return the host that the request names, with its port."""
        hosts = headers.getlist("host")
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if found is None or (self._hosts is not None and found[1].lower() not in self._hosts):
            remedy = "Use the address that the server printed, or start it with `--allow-host NAME`."
            raise UserError("wrong_host", "the server does not have the name in the header Host", remedy=remedy)
        return hosts[0]

    def _require_origin(self, headers: Headers, host: str) -> None:
        origins = headers.getlist("origin")
        if any(origin in self._origins for origin in origins) and len(origins) == 1:
            return
        is_own = len(origins) == 1 and urlsplit(origins[0]).scheme in ("http", "https")
        is_own = is_own and urlsplit(origins[0]).netloc.lower() == host.lower()
        if (origins and not is_own) or (not origins and headers.get("sec-fetch-site") in ("cross-site", "same-site")):
            remedy = "Start the server with `--allow-origin ORIGIN` if that page may use it."
            raise UserError("foreign_origin", "a web page of another site sent the request", remedy=remedy)


class Authentication:
    """Finds out who sends a request, before its body is read."""

    def __init__(self, app: ASGIApp, keys: KeyStore | None) -> None:
        """Wrap an application; without keys everyone is the local user."""
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["caller"] = await self._caller(Headers(scope=scope))
        except (UserError, MachineError) as error:
            await refused(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _caller(self, headers: Headers) -> Caller:
        if self._keys is None:
            return LOCAL_CALLER
        caller = await run_in_threadpool(self._keys.caller_of, key_in(headers.get("authorization")))
        if caller is None:
            raise wrong_key()
        return caller


class RateLimit:
    """Counts the requests of each caller, and says how many are left."""

    def __init__(self, app: ASGIApp, limits: RateLimits) -> None:
        """Wrap an application."""
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        caller = scope["state"].get("caller") if scope["type"] == "http" else None
        if caller is None:
            await self._app(scope, receive, send)
            return
        try:
            left = self._limits.count_request(caller)
        except UserError as error:
            await refused(error, scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start" and left:
                MutableHeaders(scope=message).update(left)
            await send(message)

        await self._app(scope, receive, send_with_limits)


class BodyLimit:
    """Counts the bytes of a body as they are read, whatever its header says, and the time that they take."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        """Wrap an application."""
        self._app = app
        self._most = settings.max_body_bytes
        self._most_in_flight = settings.max_bytes_in_flight
        self._seconds = settings.body_seconds
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it where its body is too large."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isascii() and length.isdecimal() and (len(length) > 18 or int(length) > self._most):
            await refused(self._too_large(), scope, receive, send)
            return
        end, num_bytes, is_whole = time.monotonic() + self._seconds, 0, False

        async def receive_within_limits() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # what comes now is that the client has gone
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.001, end - time.monotonic()))
            except TimeoutError:
                what = f"the body did not arrive within {self._seconds:g} seconds"
                raise UserError("slow_body", what) from None
            if message["type"] == "http.request":
                num_new = len(message.get("body", b""))
                num_bytes += num_new
                self._in_flight += num_new
                is_whole = not message.get("more_body", False)
                if num_bytes > self._most:
                    raise self._too_large()
                if self._in_flight > self._most_in_flight:
                    raise too_busy("queue_full", "the server holds as many requests as fit its memory", 1)
            return message

        try:
            await self._app(scope, receive_within_limits, send)
        finally:
            self._in_flight -= num_bytes

    def _too_large(self) -> UserError:
        expected, remedy = f"at most {self._most:,} bytes", "Send the rows in several requests."
        return UserError("body_too_large", "the body of the request is too large", expected=expected, remedy=remedy)


async def refused(error: UserError | MachineError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error as the answer."""
    if isinstance(error, MachineError):
        log.error("machine_error", sentence=str(error))
        error = machine_failed()
    await ProblemResponse(error, scope["state"].get("request_id"))(scope, receive, send)
