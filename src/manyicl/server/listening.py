"""Listen for requests until a signal ends the server; then let those in progress end."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from manyicl.errors import UserError
from manyicl.library_errors import reason
from manyicl.server.connections import Connection
from manyicl.server.services import Services
from manyicl.server.settings import ServerSettings

# Connections and requests at a time; the next ones are answered 503 at once.
MOST_CONCURRENT = 1024


def listen(app: FastAPI, services: Services, address: socket.socket, on_listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C: then no connection is accepted any more, and requests in progress may end.

    Args:
        app: The application.
        services: Its parts.
        address: From `reserved`.
        on_listening: Called with the address once it accepts connections.
    """
    settings = services.settings
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # what a proxy says of a client changes nothing here
        http=Connection,
        ws="none",
        lifespan="on",
        limit_concurrency=MOST_CONCURRENT,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    _Server(config, services, lambda: on_listening(_url(settings, address))).run(sockets=[address])


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


def reserved(settings: ServerSettings) -> socket.socket:
    """Reserve the address of a server, on which nothing listens yet, so that one that is taken is refused at once.

    Raises:
        UserError: If it cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio switches off Nagle's algorithm only where the protocol is named; with it, each answer waits 40 ms for the
    # client's delayed acknowledgement of its first packet.
    address = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        address.close()
        what = f"cannot listen on {settings.host}, port {settings.port}: {reason(error)}"
        raise UserError("cannot_listen", what, remedy="Take another port.", field="--port") from error
    return address


def _url(settings: ServerSettings, address: socket.socket) -> str:
    host = settings.host.strip("[]")
    return f"http://{f'[{host}]' if ':' in host else host}:{address.getsockname()[1]}"
