"""No web page elsewhere, no name pointed at this machine and no body of any size gets past the middleware."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message

from manyicl.errors import UserError
from manyicl.server.app import ROUTERS, create_app
from manyicl.server.keys import KeyStore
from manyicl.server.logging import place_of, set_up_logging
from manyicl.server.services import Services
from manyicl.server.settings import ServerSettings
from tests.server.fakes import URL, client_of, echo_task, fake_client, fake_services, mood_task

WRITES = ("POST", "PATCH", "DELETE")
# What a page of another site can send without the browser asking first.
SIMPLE_TYPES = ("text/plain", "application/x-www-form-urlencoded", "text/plain;charset=utf-8", None)
# Written so that they can be searched for in logs and answers.
SECRET = "open sesame"


@pytest.fixture(name="client", scope="module")
def _client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with fake_client(tmp_path_factory.mktemp("guards") / "data") as client:
        assert client.post("/v1/tasks", json=mood_task()).status_code == 201
        assert client.post("/v1/tasks/mood/predict", json={"rows": [{"text": "x"}]}).status_code == 200
        yield client


def routes_of(client: TestClient) -> list[tuple[str, str]]:
    """Return method and path of every route that is called with the API, and of the open ones."""
    document = client.get("/openapi.json").json()
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


def filled(path: str, task: str = "mood") -> str:
    """Put values in the place of the parameters of a path."""
    values = {"{task}": task, "{number}": "1", "{version}": "1", "{job}": "job_1", "{model}": task}
    for name, value in values.items():
        path = path.replace(name, value)
    assert "{" not in path, path
    return path


def code_of(answer: Any) -> str:
    """Return the code of an error, in our shape or in that of OpenAI's SDK."""
    content = answer.json()
    code: str = content.get("error", content)["code"]
    return code


def test_the_document_names_every_route(client: TestClient) -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, Route)]
    in_app = {(method, route.path) for route in routes for method in route.methods or ()}
    assert in_app == set(routes_of(client))
    assert len(in_app) > 20


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]", "a b"])
def test_a_name_that_was_pointed_at_this_machine_is_refused_on_every_route(client: TestClient, host: str) -> None:
    for method, path in routes_of(client):
        answer = client.request(method, filled(path), headers={"Host": host, "Content-Type": "application/json"})
        assert (answer.status_code, code_of(answer)) == (400, "wrong_host"), path


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "localhost."])
def test_names_of_this_machine_are_accepted(client: TestClient, host: str) -> None:
    assert client.get("/v1/tasks", headers={"Host": host}).status_code == 200


def test_several_hosts_are_refused(client: TestClient) -> None:
    answer = client.get("/v1/tasks", headers=[("Host", "127.0.0.1:8000"), ("Host", "evil.example")])
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Origin": "http://localhost:8000"},
        {"Origin": "file://127.0.0.1:8000"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_reaches_no_route(client: TestClient, headers: dict[str, str]) -> None:
    before = client.get("/v1/tasks/mood").json()
    for method, path in routes_of(client):
        answer = client.request(method, filled(path), headers={"Content-Type": "application/json", **headers})
        assert (answer.status_code, code_of(answer)) == (403, "foreign_origin"), path
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/v1/tasks/mood").json() == before


def test_a_page_of_the_server_itself_may_use_it(client: TestClient) -> None:
    headers = {"Origin": URL, "Sec-Fetch-Site": "same-origin"}
    assert client.get("/v1/tasks", headers=headers).status_code == 200


def test_a_page_that_was_allowed_may_use_it_and_no_other(tmp_path: Path) -> None:
    page = "https://page.example"
    with fake_client(tmp_path / "data", allowed_origins=(page,)) as client:
        answer = client.get("/v1/tasks", headers={"Origin": page, "Sec-Fetch-Site": "cross-site"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page)
        asking = {"Origin": page, "Access-Control-Request-Method": "POST"}
        assert client.options("/v1/tasks", headers=asking).status_code == 200
        assert client.get("/v1/tasks", headers={"Origin": "https://other.example"}).status_code == 403
        assert client.options("/v1/tasks", headers={**asking, "Origin": "https://other.example"}).status_code == 403


def test_without_an_allowed_page_nobody_may_ask_first(client: TestClient) -> None:
    asking = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/tasks", headers=asking).status_code == 403


@pytest.mark.parametrize("content_type", SIMPLE_TYPES)
def test_what_changes_something_needs_a_content_type_that_no_form_has(
    client: TestClient, content_type: str | None
) -> None:
    before = client.get("/v1/tasks/mood").json()
    for method, path in routes_of(client):
        if method in ("POST", "PUT", "PATCH"):
            headers = {} if content_type is None else {"Content-Type": content_type}
            answer = client.request(method, filled(path), content=json.dumps(echo_task()), headers=headers)
            assert (answer.status_code, code_of(answer)) == (415, "wrong_content_type"), path
    assert client.get("/v1/tasks/mood").json() == before
    assert len(client.get("/v1/tasks").json()["data"]) == 1


def test_a_request_through_a_proxy_needs_keys(client: TestClient) -> None:
    answer = client.get("/v1/tasks", headers={"X-Forwarded-For": "203.0.113.7"})
    assert (answer.status_code, code_of(answer)) == (403, "forwarded_without_keys")


def test_every_answer_forbids_guessing_and_framing_and_names_its_request(client: TestClient) -> None:
    for answer in (client.get("/healthz"), client.get("/nowhere"), client.get("/v1/tasks", headers={"Host": "x"})):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-request-id"].startswith("req_")
        assert "server-timing" in answer.headers
    kept = client.get("/healthz", headers={"X-Request-Id": "mine-1"})
    assert kept.headers["x-request-id"] == "mine-1"
    replaced = client.get("/nowhere", headers={"X-Request-Id": "a\tb"})
    assert replaced.headers["x-request-id"] == replaced.json()["request_id"] != "a\tb"


def test_unknown_addresses_and_methods_are_problems_too(client: TestClient) -> None:
    answer = client.get("/nowhere")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    answer = client.put("/v1/tasks", json={})
    assert (answer.status_code, code_of(answer), answer.headers["allow"]) == (405, "wrong_method", "GET, POST")


# --- Sizes


def test_a_body_is_refused_by_its_header_before_it_is_read(client: TestClient) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": str(10**9)}
    answer = client.post("/v1/tasks", content=b"{}", headers=headers)
    assert (answer.status_code, code_of(answer)) == (413, "body_too_large")
    assert answer.json()["expected"] == "at most 33,554,432 bytes"


@pytest.mark.parametrize("content_length", [None, "10"])
def test_a_body_is_counted_while_it_is_read_whatever_its_header_says(
    tmp_path: Path, content_length: str | None
) -> None:
    with fake_services(tmp_path / "data", max_body_bytes=10_000) as services:
        status, num_read, _ = asyncio.run(sent(services, endless(b"x" * 1000), content_length))
    assert (status, num_read) == (413, 11)


def test_bodies_together_have_a_limit(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data", max_body_bytes=10_000, max_bytes_in_flight=15_000) as services:

        async def three() -> list[int]:
            app = create_app(services)
            waiting = asyncio.Event()
            requests = [sent(services, held(b"x" * 9_000, waiting), app=app) for _ in range(2)]
            tasks = [asyncio.ensure_future(request) for request in requests]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            waiting.set()
            await asyncio.gather(*tasks)
            last, _, _ = await sent(services, held(b"x" * 9_000, waiting), app=app)
            return [next(iter(done)).result()[0], last]

        assert asyncio.run(three()) == [429, 400], "the third found the space of the others free again"


def test_a_body_that_does_not_arrive_is_given_up(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data", body_seconds=0.1) as services:
        status, _, body = asyncio.run(sent(services, held(b"{", asyncio.Event())))
    assert (status, json.loads(body)["code"]) == (408, "slow_body")


async def endless(part: bytes) -> AsyncIterator[bytes]:
    while True:
        yield part


async def held(part: bytes, until: asyncio.Event) -> AsyncIterator[bytes]:
    yield part
    await until.wait()


async def sent(
    services: Services, parts: AsyncIterator[bytes], content_length: str | None = None, app: Any = None
) -> tuple[int, int, bytes]:
    """Send a body in parts; return the status of the answer, how many parts were read, and the answer."""
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    if content_length is not None:
        headers.append((b"content-length", content_length.encode()))
    scope = {
        **{"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/tasks"},
        **{"raw_path": b"/v1/tasks", "query_string": b"", "root_path": "", "headers": headers},
        **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "asgi": {"version": "3.0"}},
    }
    num_read, messages = 0, list[Message]()

    async def receive() -> Message:
        nonlocal num_read
        part = await anext(parts, None)
        num_read += part is not None
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    async def send(message: Message) -> None:
        messages.append(message)

    await (app or create_app(services))(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in messages)
    return messages[0]["status"], num_read, body


# --- Keys


def test_without_a_key_every_route_but_the_open_ones_is_closed(tmp_path: Path) -> None:
    with fake_client(tmp_path / "data", has_keys=True) as client:
        for headers in ({}, {"Authorization": "Bearer mk_0_0"}, {"Authorization": "Basic bWs="}):
            for method, path in routes_of(client):
                answer = client.request(method, filled(path), headers={"Content-Type": "application/json", **headers})
                if path in ("/healthz", "/readyz"):
                    assert answer.status_code == 200
                    continue
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
                assert code_of(answer) == ("wrong_key" if headers else "key_needed")


def test_a_key_allows_what_its_scopes_say_until_it_is_revoked(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data", has_keys=True) as services:
        keys = services.keys
        assert keys is not None
        both, _ = keys.create("ann", "all")
        predict, record = keys.create("ann", "ask", ["predict"])
        with client_of(services, both) as client:
            assert client.post("/v1/tasks", json=mood_task()).status_code == 201
        with client_of(services, predict) as client:
            assert client.get("/v1/tasks/mood").status_code == 200
            assert client.post("/v1/tasks/mood/predict", json={"rows": [{"text": "x"}]}).status_code == 200
            for method, path in routes_of(client):
                manages = (
                    method in WRITES and path.startswith("/v1/tasks") and not path.endswith(("predict", "evaluate"))
                )
                if manages:
                    answer = client.request(method, filled(path), headers={"Content-Type": "application/json"})
                    assert (answer.status_code, code_of(answer)) == (403, "not_allowed"), path
            keys.revoke(record.id)
            assert client.get("/v1/tasks/mood").status_code == 401


def test_a_key_has_limits_of_its_own_and_headers_say_what_is_left(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data", has_keys=True) as services:
        assert services.keys is not None
        key, _ = services.keys.create("ann", "few", requests_per_minute=4, rows_per_minute=2)
        other, _ = services.keys.create("ann", "more")
        with client_of(services, key) as client:
            client.post("/v1/tasks", json=mood_task())
            answer = client.post("/v1/tasks/mood/predict", json={"rows": [{"text": "x"}] * 2})
            assert (answer.status_code, answer.headers["ratelimit-remaining"]) == (200, "2")
            answer = client.post("/v1/tasks/mood/predict", json={"rows": [{"text": "x"}]})
            assert (answer.status_code, code_of(answer)) == (429, "too_many_requests")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert client.get("/v1/tasks").headers["ratelimit-remaining"] == "0"
            answer = client.get("/v1/tasks")
            assert (answer.status_code, code_of(answer)) == (429, "too_many_requests")
        with client_of(services, other) as client:
            assert client.get("/v1/tasks").status_code == 200


@pytest.mark.parametrize(
    ("host", "hosts", "require_keys", "has_keys", "is_refused"),
    [
        ("127.0.0.1", (), False, False, False),
        ("::1", (), False, False, False),
        ("localhost", (), False, False, False),
        ("127.0.0.1", (), True, False, True),
        ("127.0.0.1", ("tasks.example",), False, False, True),
        ("0.0.0.0", (), False, False, True),
        ("::", (), False, False, True),
        ("192.168.0.4", (), False, False, True),
        ("tasks.example", (), False, False, True),
        ("0.0.0.0", (), False, True, False),
        ("127.0.0.1", (), False, True, False),
    ],
)
def test_a_server_that_others_reach_needs_a_key_to_start(
    host: str, hosts: tuple[str, ...], require_keys: bool, has_keys: bool, is_refused: bool
) -> None:
    values: dict[str, Any] = {"model": "m", "data": "d", "host": host, "require_keys": require_keys}
    settings = ServerSettings(**values, allowed_hosts=hosts)
    if is_refused:
        with pytest.raises(UserError, match="manyicl keys create --data d --owner NAME") as caught:
            settings.require_safe(has_keys=has_keys)
        assert caught.value.code == "keys_needed"
    else:
        assert settings.require_safe(has_keys=has_keys).require_keys is has_keys


# --- Logs


def test_no_text_of_a_task_or_a_row_is_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    try:
        with fake_services(tmp_path / "data", has_keys=True) as services:
            assert isinstance(services.keys, KeyStore)
            key, _ = services.keys.create("ann", "all")
            with client_of(services, key) as client:
                rows = [{"query": SECRET, "answer": SECRET}]
                client.post("/v1/tasks", json={"name": "open-sesame", "demonstrations": rows})
                client.post("/v1/tasks/open-sesame/predict", json={"rows": [{"query": SECRET}, {SECRET: 1}]})
                client.post(f"/v1/tasks/open-sesame/predict?version={SECRET}", json={"rows": [{"query": SECRET}]})
                client.get(f"/v1/tasks/{SECRET}", headers={"X-Request-Id": SECRET})
                logging.getLogger("manyicl.server.worker").error("it failed", exc_info=ValueError(SECRET))
                services.service.question = _failing  # type: ignore[method-assign, assignment]
                answer = client.post("/v1/tasks/open-sesame/predict", json={"rows": [{"query": SECRET}]})
                assert (answer.status_code, code_of(answer)) == (500, "server_error")
                assert SECRET not in answer.text
        written = capfd.readouterr()
    finally:
        for name in ("manyicl.server", "uvicorn.error"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
    lines = [json.loads(line) for line in written.err.splitlines()]
    assert {"request", "unexpected_error", "it failed"} <= {line["event"] for line in lines}
    assert all(line["request_id"] for line in lines if line["event"] == "request")
    for text in (written.err, written.out):
        assert "sesame" not in text
        assert key not in text


def _failing(*_: object) -> None:
    raise ValueError(SECRET)


def test_an_error_is_placed_without_its_message() -> None:
    with pytest.raises(ValueError, match=SECRET) as caught:
        _failing()
    assert place_of(caught.value).startswith("ValueError at test_guards.py:")
    assert "sesame" not in place_of(caught.value)
