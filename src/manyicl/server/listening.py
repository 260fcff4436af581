"""Listen for requests until a signal ends the server; then let those in progress end."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from manyicl.errors import UserError
from manyicl.library_errors import reason
from manyicl.server.services import Services
from manyicl.server.settings import ServerSettings

# Connections and requests at a time; the next ones are answered 503 at once.
MOST_CONCURRENT = 1024
WAITING_CONNECTIONS = 2048


def listen(app: FastAPI, services: Services, on_listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C: then no connection is accepted any more, and requests in progress may end.

    Args:
        app: The application.
        services: Its parts.
        on_listening: Called with the address once it accepts connections.

    Raises:
        UserError: If the address cannot be listened on.
    """
    settings = services.settings
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # what a proxy says of a client changes nothing here
        ws="none",
        lifespan="on",
        limit_concurrency=MOST_CONCURRENT,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    with _socket(settings) as listening:
        _Server(config, services, lambda: on_listening(_url(settings, listening))).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Says when it listens, and that it stops, to whom that matters."""

    def __init__(self, config: uvicorn.Config, services: Services, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._services, self._on_listening = services, on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._services.is_stopping = True
        await super().shutdown(sockets)


def _socket(settings: ServerSettings) -> socket.socket:
    """Open the socket; uvicorn itself would end the process where the address is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host.strip("[]"), settings.port))
        listening.listen(WAITING_CONNECTIONS)
    except OSError as error:
        listening.close()
        what = f"cannot listen on {settings.host}, port {settings.port}: {reason(error)}"
        raise UserError("cannot_listen", what, remedy="Take another port.", field="--port") from error
    return listening


def _url(settings: ServerSettings, listening: socket.socket) -> str:
    host = settings.host.strip("[]")
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
