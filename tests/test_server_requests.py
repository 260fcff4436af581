"""Requests are tried again where that is safe, and a refusal becomes an error with the fields of its problem."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Iterator
from itertools import chain, repeat

import pytest

from manyicl.errors import MachineError, UserError
from manyicl.served import RefusedRequestError
from manyicl.server_requests import Requests
from tests.scripted_server import Answer, Sent, scripted_server

DONE = Answer(200, {"done": True})
BUSY = Answer(429, {"code": "queue_full", "detail": "the queue is full."}, {"Retry-After": "2"})
AWAY = Answer(503, {"code": "starting", "detail": "The server starts.", "request_id": "req_1"})
FAILED = Answer(503, {"code": "machine_failed", "detail": "The disk failed, and the connection broke off."})
DROPPED = Answer(drops=True)


def answers(*scripted: Answer) -> Callable[[Sent], Answer]:
    waiting: Iterator[Answer] = chain(scripted, repeat(DONE))
    return lambda _: next(waiting)


def requests_to(url: str, waits: list[float], retry_seconds: float = 1000.0) -> Requests:
    return Requests(url, "mk_a_b", timeout=5, retry_seconds=retry_seconds, sleep=waits.append)


@pytest.mark.parametrize("failing", [BUSY, AWAY, FAILED, DROPPED, Answer(200, {"done": True}, breaks_off=True)])
def test_a_request_is_sent_again_with_the_same_headers_until_it_is_answered(failing: Answer) -> None:
    waits: list[float] = []
    with scripted_server(answers(failing, failing)) as server:
        requests = requests_to(server.url, waits)
        response = requests.send("POST", "/v1/tasks", headers={"Idempotency-Key": "k"}, content=b"{}")
        requests.close()
    assert response.json() == {"done": True}
    assert [(sent.headers["idempotency-key"], sent.body) for sent in server.sent] == [("k", b"{}")] * 3
    assert len(waits) == 2
    assert waits == [2.0, 2.0] or waits[0] < waits[1]


@pytest.mark.parametrize(("failing", "is_sent_again"), [(BUSY, True), (AWAY, True), (FAILED, False), (DROPPED, False)])
def test_what_must_not_be_carried_out_twice_is_sent_again_only_where_nothing_was_done(
    failing: Answer, is_sent_again: bool
) -> None:
    with scripted_server(answers(failing)) as server:
        requests = requests_to(server.url, [])
        if is_sent_again:
            requests.send("DELETE", "/v1/tasks/t", repeatable=False)
        else:
            with pytest.raises(MachineError, match="broke off"):
                requests.send("DELETE", "/v1/tasks/t", repeatable=False)
        requests.close()
    assert len(server.sent) == (2 if is_sent_again else 1)


def test_a_wait_that_is_longer_than_the_patience_ends_at_once_with_the_reason() -> None:
    waits: list[float] = []
    with scripted_server(answers(BUSY)) as server:
        requests = requests_to(server.url, waits, retry_seconds=1)
        with pytest.raises(RefusedRequestError) as caught:
            requests.send("GET", "/v1/tasks")
        requests.close()
    assert (caught.value.code, caught.value.status, waits) == ("queue_full", 429, [])


def test_a_refusal_is_not_sent_again_and_has_the_fields_of_the_problem() -> None:
    problem = {
        "code": "bad_rows",
        "title": "2 rows are bad",
        "detail": "Query 3: it is empty.",
        "row": 3,
        "field": "text",
        "request_id": "req_7",
        "errors": [{"code": "empty_query", "detail": "it is empty", "row": 3}, {"code": "missing_column", "row": 5}],
    }
    with scripted_server(answers(Answer(422, problem))) as server:
        requests = requests_to(server.url, [])
        with pytest.raises(UserError) as caught:
            requests.send("POST", "/v1/tasks/t/predict")
        requests.close()
    error = caught.value
    assert isinstance(error, RefusedRequestError)
    assert len(server.sent) == 1
    assert (error.code, error.row, error.field, error.status) == ("bad_rows", 3, "text", 422)
    assert error.request_id == "req_7"
    assert str(error) == "Query 3: it is empty."
    assert [(one.code, one.row) for one in error.errors] == [("empty_query", 3), ("missing_column", 5)]
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.status, str(again)) == (error.code, error.status, str(error))


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (
            Answer(500, {"detail": "It failed.", "request_id": "req_9"}),
            MachineError,
            "It failed. Its log names .* req_9",
        ),
        (Answer(404, b"<html>nothing here</html>"), UserError, "answered with status 404"),
        (Answer(401, ["no problem document"]), UserError, "answered with status 401"),
        (Answer(307, None, {"Location": "https://elsewhere.example/"}), UserError, "redirects; found '?https://else"),
    ],
)
def test_any_other_answer_becomes_one_sentence(answer: Answer, error: type[Exception], words: str) -> None:
    with scripted_server(answers(answer)) as server:
        requests = requests_to(server.url, [])
        with pytest.raises(error, match=words):
            requests.send("GET", "/v1/tasks")
        requests.close()
    assert len(server.sent) == 1


def test_the_key_is_sent_as_a_bearer_token() -> None:
    with scripted_server(answers()) as server:
        requests = requests_to(f"{server.url}/", [])
        requests.send("GET", "/v1/tasks")
        requests.close()
    assert server.sent[0].headers["authorization"] == "Bearer mk_a_b"
    assert server.sent[0].path == "/v1/tasks"


def test_no_proxy_is_between_a_client_and_its_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_server(answers()) as proxy, scripted_server(answers()) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for variable in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(variable, raising=False)
        requests = requests_to(server.url, [])
        requests.send("GET", "/v1/tasks")
        requests.close()
        elsewhere = requests_to("http://tasks.example.org", [], retry_seconds=0)
        elsewhere.send("GET", "/v1/tasks")
        elsewhere.close()
    assert len(server.sent) == len(proxy.sent) == 1
    assert proxy.sent[0].headers["host"] == "tasks.example.org"


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    requests = requests_to(f"http://127.0.0.1:{port}", [], retry_seconds=0)
    with pytest.raises(MachineError, match=rf"The server http://127.0.0.1:{port} cannot be reached"):
        requests.send("GET", "/v1/tasks")
    requests.close()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://server", "http://", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError) as caught:
        requests_to(url, [])
    assert caught.value.code == "bad_url"


@pytest.mark.parametrize("key", ["mk_a_b\r\nHost: other", " mk_a_b", "mk_ä"])
def test_a_key_that_is_none_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(UserError) as caught:
        Requests("http://127.0.0.1:1", key, timeout=1, retry_seconds=0)
    assert caught.value.code == "bad_key"
    assert key not in str(caught.value)
