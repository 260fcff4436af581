"""Rows are answered over HTTP: JSON whole or not at all, lines one by one, free answers as they are written."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from manyicl.server.app import create_app
from manyicl.server.services import Services
from tests.server.fakes import TOO_LONG, FakeWorker, client_of, echo_task, fake_services, fake_worker, mood_task

LINES = {"Content-Type": "application/x-ndjson"}
EVENTS = {"Accept": "text/event-stream"}


@pytest.fixture(name="services")
def _services(tmp_path: Path) -> Iterator[Services]:
    with fake_services(tmp_path / "data", max_waiting_rows=600, request_seconds=20) as services:
        yield services


@pytest.fixture(name="client")
def _client(services: Services) -> Iterator[TestClient]:
    with client_of(services) as client:
        for body in (mood_task(), echo_task()):
            assert client.post("/v1/tasks", json=body).status_code == 201
        yield client


def predicted(client: TestClient, task: str, texts: list[str], **options: Any) -> list[dict[str, Any]]:
    column = "text" if task == "mood" else "query"
    body = {"rows": [{column: text} for text in texts], **options}
    answer = client.post(f"/v1/tasks/{task}/predict", json=body)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["predictions"]
    return found


def test_rows_are_answered_in_order_and_the_version_is_named(client: TestClient) -> None:
    body = {"rows": [{"text": "so dull"}, {"text": "I laughed"}]}
    found = client.post("/v1/tasks/mood/predict", json=body).json()
    assert (found["version"], found["model"]) == (1, "fake-model")
    assert [one["answer"] for one in found["predictions"]] == ["bad", "good"]


def test_more_rows_than_may_wait_are_answered_portion_by_portion(client: TestClient) -> None:
    texts = [f"row {number}" for number in range(1500)]
    assert [one["answer"] for one in predicted(client, "echo", texts)] == [text.upper() for text in texts]


def test_few_labels_are_all_scored_unless_the_request_says_otherwise(client: TestClient, services: Services) -> None:
    (answered,) = predicted(client, "mood", ["so dull"])
    assert fake_worker(services).options[-1][0]["scores"] == "all"
    assert answered["probability"] == answered["probabilities"]["bad"] > 0.5
    (answered,) = predicted(client, "mood", ["so dull"], scores="best")
    assert fake_worker(services).options[-1][0]["scores"] == "best"
    assert "probability" not in answered
    predicted(client, "echo", ["x"])
    assert fake_worker(services).options[-1][0]["scores"] == "best"


def test_options_of_the_request_go_before_those_of_the_task(client: TestClient, services: Services) -> None:
    worker = fake_worker(services)
    client.patch("/v1/tasks/mood", json={"abstain_below": 0.99})
    (abstained,) = predicted(client, "mood", ["so dull"])
    assert (abstained["answer"], abstained["abstained"], abstained["guess"]) == (None, True, "bad")
    assert worker.options[-1][0]["scores"] == "all"
    (answered,) = predicted(client, "mood", ["so dull"], abstain_below=None, scores="best_two", similar=2)
    assert answered["answer"] == "bad"
    assert worker.options[-1][0] | {"scores": "best_two", "num_similar": 2} == worker.options[-1][0]
    predicted(client, "echo", ["x"], temperature=0.5, seed=3)
    sampling = worker.options[-1][0].get("sampling")
    assert sampling is not None
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 1.0, 3)


@pytest.mark.parametrize(
    ("task", "options", "code"),
    [
        ("echo", {"scores": "all"}, "conflicting_options"),
        ("echo", {"abstain_below": 0.5}, "conflicting_options"),
        ("mood", {"temperature": 0.5}, "conflicting_options"),
        ("mood", {"retrieve": 1}, "no_tokens_reserved"),
        ("mood", {"scores": "some"}, "wrong_value"),
        ("mood", {"version": 9}, "unknown_version"),
        ("mood", {"verion": 1}, "unknown_key"),
        ("mood", {"abstain_below": 2}, "wrong_value"),
        ("nobody", {}, "unknown_task"),
    ],
)
def test_options_that_do_not_suit_the_task_are_refused(
    client: TestClient, task: str, options: dict[str, Any], code: str
) -> None:
    body = {"rows": [{"text": "a", "query": "a"}], **options}
    assert client.post(f"/v1/tasks/{task}/predict", json=body).json()["code"] == code


def test_in_json_one_bad_row_is_enough_and_all_are_named(client: TestClient, services: Services) -> None:
    body = {"rows": [{"text": "so dull"}, {"txt": "a"}, {"text": " "}, "plain"]}
    answer = client.post("/v1/tasks/mood/predict", json=body)
    assert answer.status_code == 422
    assert [(one["row"], one["code"]) for one in answer.json()["errors"]] == [
        (2, "missing_column"),
        (3, "empty_query"),
        (4, "not_an_object"),
    ]
    assert not fake_worker(services).options, "nothing was predicted"
    late = client.post("/v1/tasks/mood/predict", json={"rows": [{"text": "so dull"}, {"text": TOO_LONG}]})
    assert (late.status_code, late.json()["code"], late.json()["row"]) == (422, "query_too_long", 2)


def test_in_lines_a_bad_row_has_its_problem_and_the_others_their_answers(client: TestClient) -> None:
    content = '{"query": "a"}\n\n{"broken\n{"other": 1}\n{"query": "too long"}\n{"query": "b"}\n'
    answer = client.post("/v1/tasks/echo/predict", content=content, headers=LINES)
    assert answer.headers["content-type"] == "application/x-ndjson"
    found = [json.loads(line) for line in answer.text.splitlines()]
    assert [one["answer"] for one in found] == ["A", None, None, None, "B"]
    problems = [(one["problem"]["row"], one["problem"]["code"]) for one in found[1:4]]
    assert problems == [(3, "broken_json"), (4, "missing_column"), (5, "query_too_long")]


def test_a_table_is_answered_with_lines_and_options_in_the_query(client: TestClient) -> None:
    query: dict[str, str | int] = {"scores": "all", "version": 1}
    headers = {"Content-Type": "text/csv"}
    answer = client.post("/v1/tasks/mood/predict", params=query, content="text\nso dull\nx\n", headers=headers)
    assert [json.loads(line)["probabilities"].keys() for line in answer.text.splitlines()] == [{"bad", "good"}] * 2


def test_a_free_answer_comes_in_parts_that_join_to_it(client: TestClient) -> None:
    body = {"rows": [{"query": "größe"}]}
    answer = client.post("/v1/tasks/echo/predict", json=body, headers=EVENTS)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in answer.text.split("\n\n") if event]
    parts = [json.loads(data.removeprefix("data: "))["text"] for name, data in events if name == "event: part"]
    assert len(parts) > 1
    done = json.loads(events[-1][1].removeprefix("data: "))
    assert (events[-1][0], "".join(parts), done["answer"]) == ("event: done", "GRÖSSE", "GRÖSSE")


@pytest.mark.parametrize(
    ("task", "rows", "code"),
    [
        ("mood", [{"text": "a"}], "not_streamable"),
        ("echo", [{"query": "a"}, {"query": "b"}], "one_row_needed"),
        ("echo", [{"query": ""}], "empty_query"),
        ("echo", [{"query": TOO_LONG}], "query_too_long"),
    ],
)
def test_what_cannot_be_streamed_has_a_status_of_its_own(
    client: TestClient, task: str, rows: list[dict[str, str]], code: str
) -> None:
    answer = client.post(f"/v1/tasks/{task}/predict", json={"rows": rows}, headers=EVENTS)
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_a_full_queue_is_said_at_once_with_when_to_come_again(client: TestClient, services: Services) -> None:
    worker = fake_worker(services)
    predicted(client, "echo", ["x"])
    worker.open.clear()
    key = services.tasks.get("local", "echo").newest.key
    worker.predict(key, [], {})
    with services_waiting(worker, 600):
        for body in (
            {"json": {"rows": [{"query": "a"}]}},
            {"json": {"rows": [{"query": "a"}]}, "headers": EVENTS},
            {"content": '{"query": "a"}', "headers": {"Content-Type": "application/x-ndjson"}},
        ):
            answer = client.post("/v1/tasks/echo/predict", **body)
            assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) == 300
    worker.open.set()


class services_waiting:  # noqa: N801
    """Pretends that so many rows wait."""

    def __init__(self, worker: FakeWorker, number: int) -> None:
        self._worker, self._number = worker, number

    def __enter__(self) -> None:
        self._worker._num_waiting += self._number

    def __exit__(self, *_: object) -> None:
        self._worker._num_waiting -= self._number


def test_too_many_rows_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data", max_rows=2) as services, client_of(services) as client:
        client.post("/v1/tasks", json=echo_task())
        answer = client.post("/v1/tasks/echo/predict", json={"rows": [{"query": "a"}] * 3})
        assert (answer.status_code, answer.json()["code"], answer.json()["expected"]) == (
            413,
            "too_many_rows",
            "at most 2",
        )


def test_a_task_without_a_ready_version_is_waited_for(client: TestClient, services: Services) -> None:
    fake_worker(services).compiles.clear()
    client.post("/v1/tasks", json=echo_task("later"))
    threading.Timer(0.3, fake_worker(services).compiles.set).start()
    started = time.monotonic()
    assert predicted(client, "later", ["a"])[0]["answer"] == "A"
    assert time.monotonic() - started > 0.2


def test_waiting_for_a_version_ends(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data", request_seconds=0.2) as services, client_of(services) as client:
        fake_worker(services).compiles.clear()
        client.post("/v1/tasks", json=echo_task())
        answer = client.post("/v1/tasks/echo/predict", json={"rows": [{"query": "a"}]})
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["title"].startswith("the task is not compiled yet; there was no answer within 0.2 s")
        services.is_stopping = True
        answer = client.post("/v1/tasks/echo/predict", json={"rows": [{"query": "a"}]})
        assert (answer.status_code, answer.json()["code"]) == (503, "stopping")


def test_waiting_for_an_answer_of_a_compiled_task_ends(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data", request_seconds=0.2) as services, client_of(services) as client:
        client.post("/v1/tasks", json=echo_task())
        assert predicted(client, "echo", ["a"])[0]["answer"] == "A"
        fake_worker(services).open.clear()
        for headers in ({}, EVENTS):
            answer = client.post("/v1/tasks/echo/predict", json={"rows": [{"query": "a"}]}, headers=headers)
            assert (answer.status_code, answer.json()["title"]) == (503, "there was no answer within 0.2 seconds")


async def _until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("kind", ["json", "lines", "events"])
def test_a_client_that_goes_away_takes_its_rows_out_of_the_queue(
    client: TestClient, services: Services, kind: str
) -> None:
    worker = fake_worker(services)
    predicted(client, "echo", ["x"])
    worker.open.clear()
    app = create_app(services)
    content_type = "application/x-ndjson" if kind == "lines" else "application/json"
    accept = "text/event-stream" if kind == "events" else "*/*"
    body = b'{"query": "a"}' if kind == "lines" else b'{"rows": [{"query": "a"}]}'
    headers = [(b"host", b"127.0.0.1"), (b"content-type", content_type.encode()), (b"accept", accept.encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/tasks/echo/predict",
        "raw_path": b"/v1/tasks/echo/predict",
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }

    async def disconnecting() -> list[Message]:
        gone, sent = asyncio.Event(), list[Message]()
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        request = asyncio.create_task(app(scope, receive, send))
        await _until(lambda: worker._num_waiting == 1)
        gone.set()
        await asyncio.wait_for(request, 10)
        await _until(lambda: worker._num_waiting == 0)
        return sent

    sent = asyncio.run(disconnecting())
    assert len(worker.cancelled) == 1
    assert all(message.get("status", 499) == 499 for message in sent)
    worker.open.set()
    assert predicted(client, "echo", ["y"])[0]["answer"] == "Y"
