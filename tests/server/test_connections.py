"""A client that never finishes what it began to send does not keep its connection, and so others out."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from manyicl.server import connections, listening
from manyicl.server.app import create_app
from manyicl.server.connections import Connection
from manyicl.server.settings import ServerSettings
from tests.server.fakes import fake_services

HEADER_SECONDS = READ_SECONDS = 0.2
LONG = 20.0
# More than the buffers of a connection hold.
NUM_PARTS = 300
SHORT_REQUEST = b"GET /short HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(name="address")
def _address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(connections, "HEADER_SECONDS", HEADER_SECONDS)
    monkeypatch.setattr(connections, "READ_SECONDS", READ_SECONDS)

    def short(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("short")

    def slow(_request: Request) -> PlainTextResponse:
        time.sleep(5 * HEADER_SECONDS)
        return PlainTextResponse("slow")

    def long(_request: Request) -> StreamingResponse:
        return StreamingResponse(b"x" * 100_000 for _ in range(NUM_PARTS))

    routes = [Route("/short", short, methods=["GET", "POST"]), Route("/slow", slow), Route("/long", long)]
    app = Starlette(routes=routes)
    config = uvicorn.Config(app, http=Connection, log_config=None, lifespan="off", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def read_to_the_end(connection: socket.socket) -> bytes:
    """Read until the server closes the connection; fails where it does not."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def read_until(connection: socket.socket, end: bytes) -> None:
    """Read an answer, which may come in several parts."""
    answer = b""
    while not answer.endswith(end):
        part = connection.recv(65536)
        assert part, "the connection was closed"
        answer += part


def send_slowly(connection: socket.socket, content: bytes) -> None:
    for byte in content:
        connection.sendall(bytes([byte]))
        time.sleep(HEADER_SECONDS / 10)


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"GET /short HTTP/1.1\r\nHo", b""),
        (SHORT_REQUEST + b"GET /short", b"short"),
        (b"POST /short HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nnot", b"short"),  # answered without its body
    ],
    ids=["nothing", "half of the headers", "a second request", "half of a body"],
)
def test_a_connection_ends_on_which_nothing_whole_comes(address: tuple[str, int], sent: bytes, answered: bytes) -> None:
    with socket.create_connection(address, timeout=LONG) as connection:
        connection.sendall(sent)
        assert read_to_the_end(connection).endswith(answered)


def test_headers_that_come_byte_by_byte_do_not_keep_a_connection(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=LONG) as connection, pytest.raises(OSError, match=r"reset|pipe"):
        send_slowly(connection, b"x" * 1_000)


def test_slow_answers_and_requests_one_after_the_other_keep_theirs(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=LONG) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(connection, b"slow")
        end = time.monotonic() + 5 * HEADER_SECONDS
        while time.monotonic() < end:
            connection.sendall(SHORT_REQUEST)
            read_until(connection, b"short")
            time.sleep(HEADER_SECONDS / 10)


def test_a_client_that_reads_nothing_of_its_answer_has_gone(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=LONG) as connection:
        connection.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(10 * READ_SECONDS)
        assert len(read_to_the_end(connection)) < 100_000 * NUM_PARTS


def test_a_client_that_reads_slowly_gets_its_answer_whole(address: tuple[str, int]) -> None:
    num_bytes, end, part = 0, b"0\r\n\r\n", b""
    with socket.create_connection(address, timeout=LONG) as connection:
        connection.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        while not part.endswith(end):
            part = connection.recv(1_000_000)
            num_bytes += len(part)
            time.sleep(READ_SECONDS / 20)
    assert num_bytes > 100_000 * NUM_PARTS


def test_the_server_listens_with_such_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []
    monkeypatch.setattr(listening._Server, "run", lambda server, sockets: configs.append(server.config))
    with fake_services(tmp_path / "data") as services, socket.create_server(("127.0.0.1", 0)) as address:
        listening.listen(create_app(services), services, address, print)
    assert [config.http for config in configs] == [Connection]


def test_no_answer_waits_for_the_acknowledgement_of_its_first_packet(tmp_path: Path) -> None:
    with listening.reserved(ServerSettings(model="builtin:nano", data=tmp_path, port=0)) as address:
        assert asyncio.run(_no_delay_of_an_accepted_connection(address))


async def _no_delay_of_an_accepted_connection(address: socket.socket) -> int:
    """Return the option TCP_NODELAY of a connection that asyncio accepted on an address."""
    option: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def accepted(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        option.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(accepted, sock=address):
        _, writer = await asyncio.open_connection(*address.getsockname())
        found = await option
        writer.close()
        await writer.wait_closed()
        return found
