"""A server on a free port of loopback, as uvicorn runs it, for clients that open connections of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from manyicl.server.app import create_app
from manyicl.server.listening import reserved
from manyicl.server.settings import ServerSettings
from tests.server.fakes import FakeWorker, fake_services, fake_worker


@contextmanager
def running(app: FastAPI, port: int = 0) -> Iterator[str]:
    """Serve an application until the block ends, on a free port unless one is given; gives its address."""
    with reserved(ServerSettings(model="builtin:nano", data=Path(), port=port)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server ended before it started"
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def running_fake(data: Path, **settings: Any) -> Iterator[tuple[str, FakeWorker]]:
    """Serve on a new data folder with a worker that needs no model; gives the address and the worker."""
    with fake_services(data, **settings) as services, running(create_app(services)) as url:
        yield url, fake_worker(services)
