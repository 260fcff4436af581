"""Errors of the routes for OpenAI's SDK in its shape, whatever refuses a request: a route, a guard, a limit."""

from __future__ import annotations

import json

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyicl.server.openai_shapes import openai_error, openai_status
from manyicl.server.problems import PROBLEM_TYPE

# Paths of these routes, and of what is below them.
PATHS = ("/v1/decisions", "/v1/chat/completions", "/v1/models")


class OpenAIErrors:
    """Rewrites problem documents on their way out, on these paths alone."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or not _is_of_openai(scope["path"]):
            await self._app(scope, receive, send)
            return
        held: Message | None = None
        body = b""

        async def send_rewritten(message: Message) -> None:
            nonlocal held, body
            if message["type"] == "http.response.start" and _is_problem(message):
                held = message
                return
            if held is None:
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                content = _rewritten(held, body)
                await send(held)
                await send({"type": "http.response.body", "body": content})

        await self._app(scope, receive, send_rewritten)


def _is_of_openai(path: str) -> bool:
    return any(path == one or path.startswith(f"{one}/") for one in PATHS)


def _is_problem(message: Message) -> bool:
    return Headers(raw=message["headers"]).get("content-type", "").startswith(PROBLEM_TYPE)


def _rewritten(start: Message, body: bytes) -> bytes:
    """Change status and headers of a response, and return its new body."""
    start["status"] = openai_status(start["status"])
    content = json.dumps(openai_error(json.loads(body), start["status"]), ensure_ascii=False).encode()
    headers = MutableHeaders(raw=list(start["headers"]))
    headers["content-type"], headers["content-length"] = "application/json", str(len(content))
    start["headers"] = headers.raw
    return content
