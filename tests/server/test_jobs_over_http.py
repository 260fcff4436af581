"""Jobs and evaluations over HTTP, with the real database and a worker without a model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from manyicl.server.services import Services
from tests.server.fakes import BROKEN, TOO_LONG, echo_task, fake_client, fake_services, fake_worker, mood_task
from tests.server.fakes import client_of as client_with

LINES = {"Content-Type": "application/x-ndjson"}
ROWS = [{"text": "what a film"}, {"text": "so dull"}, {"text": "new"}]


@pytest.fixture(name="client")
def _client(tmp_path: Path) -> Iterator[TestClient]:
    with fake_client(tmp_path / "data") as client:
        assert client.post("/v1/tasks", json=mood_task()).status_code == 201
        yield client


def services_of(client: TestClient) -> Services:
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    return services


def submitted(client: TestClient, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


def finished(client: TestClient, job: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        found: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
        if found["finished_at"] is not None:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def results(client: TestClient, job: str, **parameters: int) -> list[dict[str, Any]]:
    answer = client.get(f"/v1/jobs/{job}/results", params=parameters)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_job_answers_its_rows_and_says_how_far_it_is(client: TestClient) -> None:
    job = submitted(client, {"task": "mood", "rows": ROWS, "options": {"scores": "all"}})
    assert (job["kind"], job["version"], job["num_rows"], job["summary"]) == ("predict", 1, 3, None)
    found = finished(client, job["id"])
    assert (found["state"], found["num_done"], found["num_problems"], found["problem"]) == ("done", 3, 0, None)
    answers = results(client, job["id"])
    assert [(one["row"], one["answer"]) for one in answers] == [(1, "good"), (2, "bad"), (3, "bad")]
    assert answers[0]["probabilities"]["good"] > 0.9
    assert [one["row"] for one in results(client, job["id"], after=1, limit=1)] == [2]


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("application/x-ndjson", '{"text": "what a film"}\n{"text": \n{"text": "so dull"}\n{"words": "a"}\n'),
        ("text/csv", "text,more\nwhat a film,a\nonly one\nso dull,b\n,c\n"),
        ("application/json", json.dumps([{"text": "what a film"}, "no row", {"text": "so dull"}, {"words": "a"}])),
    ],
)
def test_a_bad_row_of_a_job_is_a_problem_in_its_place_and_the_others_are_answered(
    client: TestClient, content_type: str, content: str
) -> None:
    query = {"task": "mood"}
    if content_type == "application/json":
        query, content = {}, json.dumps({"task": "mood", "rows": json.loads(content)})
    answer = client.post("/v1/jobs", params=query, content=content, headers={"Content-Type": content_type})
    assert answer.status_code == 202, answer.text
    job = finished(client, answer.json()["id"])
    assert (job["state"], job["num_rows"], job["num_problems"]) == ("done", 4, 2)
    found = results(client, job["id"])
    assert [one["answer"] for one in found] == ["good", None, "bad", None]
    assert [(one["row"], one["problem"]["row"]) for one in found if one.get("problem")] == [(2, 2), (4, 4)]


def test_a_form_with_a_file_makes_a_job(client: TestClient) -> None:
    files = {"file": ("rows.csv", b"text\nwhat a film\nso dull\n", "text/csv")}
    fields = {"task": "mood", "options": '{"similar": 1}', "kind": "predict"}
    answer = client.post("/v1/jobs", files=files, data=fields)
    assert answer.status_code == 202, answer.text
    assert answer.json()["options"]["similar"] == 1
    assert [one["answer"] for one in results(client, finished(client, answer.json()["id"])["id"])] == ["good", "bad"]


def test_a_row_that_only_the_worker_can_refuse_is_a_problem_too(client: TestClient) -> None:
    job = finished(client, submitted(client, {"task": "mood", "rows": [{"text": TOO_LONG}, ROWS[0]]})["id"])
    first, second = results(client, job["id"])
    assert (first["problem"]["code"], first["problem"]["row"], second["answer"]) == ("query_too_long", 1, "good")


def test_a_job_is_made_once_for_one_idempotency_key(client: TestClient) -> None:
    body = {"task": "mood", "rows": ROWS}
    first = submitted(client, body, **{"Idempotency-Key": "a"})
    again = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "a"})
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first["id"], "true")
    assert len(client.get("/v1/jobs").json()["data"]) == 1
    other = client.post("/v1/jobs", json={**body, "rows": ROWS[:1]}, headers={"Idempotency-Key": "a"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_an_evaluation_job_has_its_scores_as_its_summary(client: TestClient) -> None:
    rows = [{**row, "label": label} for row, label in zip(ROWS, ("good", "good", "bad"), strict=True)]
    job = finished(client, submitted(client, {"kind": "evaluate", "task": "mood", "rows": [*rows, ROWS[0]]})["id"])
    assert (job["state"], job["num_problems"]) == ("done", 1)
    summary = job["summary"]
    assert (summary["metric"], summary["accuracy"], summary["num_scored"]) == ("accuracy", pytest.approx(2 / 3), 3)
    assert [one["row"] for one in summary["errors"]] == [2]
    found = results(client, job["id"])
    assert [one.get("right") for one in found] == [True, False, True, None]
    # The same rows at once, and as lines.
    at_once = client.post("/v1/tasks/mood/evaluate", json={"rows": rows})
    assert at_once.status_code == 200, at_once.text
    body = at_once.json()
    assert {name: body[name] for name in ("accuracy", "macro_f1", "labels", "confusion", "errors")} == {
        name: summary[name] for name in ("accuracy", "macro_f1", "labels", "confusion", "errors")
    }
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, ROWS[0]])
    as_lines = client.post("/v1/tasks/mood/evaluate", content=lines, headers=LINES).json()
    assert {name: as_lines[name] for name in summary} == summary
    assert as_lines["version"] == 1
    assert as_lines["task"] == job["task"]


def test_an_evaluation_in_json_names_all_rows_that_cannot_be_used_and_scores_none(client: TestClient) -> None:
    rows = [{"text": "a", "label": "good"}, {"text": "b"}, {"text": "c", "label": "gut"}, {"label": "good"}, 5]
    answer = client.post("/v1/tasks/mood/evaluate", json={"rows": rows})
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_rows")
    found = [(one["row"], one["code"]) for one in answer.json()["errors"]]
    assert found == [
        (2, "missing_column"),
        (3, "unknown_label"),
        (4, "missing_column"),
        (5, "not_an_object"),
    ]
    assert fake_worker(services_of(client)).options == []
    one_bad = client.post("/v1/tasks/mood/evaluate", json={"rows": rows[:2]}).json()
    assert (one_bad["code"], one_bad["row"], one_bad["field"]) == ("missing_column", 2, "label")


def test_an_evaluation_of_lines_counts_rows_that_cannot_be_used(client: TestClient) -> None:
    lines = '{"text": "what a film", "label": "good"}\n\n{"text": "b"}\n{\n{"text": "new", "label": "good"}\n'
    found = client.post("/v1/tasks/mood/evaluate", content=lines, headers=LINES).json()
    assert (found["accuracy"], found["num_rows"], found["num_problems"]) == (0.5, 4, 2)
    # Numbers are those of lines.
    assert [(one["row"], one["code"]) for one in found["problems"]] == [(3, "missing_column"), (4, "broken_json")]
    assert [one["row"] for one in found["errors"]] == [5]


def test_free_answers_are_evaluated_by_their_metric(client: TestClient) -> None:
    client.post("/v1/tasks", json=echo_task())
    rows = [{"query": "a b", "answer": "A B"}, {"query": "d", "answer": "D"}, {"query": "e", "answer": "x"}]
    found = client.post("/v1/tasks/echo/evaluate", json={"rows": rows}).json()
    assert found["metric"] == "rougeL"
    assert found["rougeL"] == pytest.approx(2 / 3)
    assert [one["row"] for one in found["errors"]] == [3]
    assert (found["labels"], found["confusion"]) == (None, None)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"task": "none", "rows": ROWS}, 404, "unknown_task"),
        ({"task": "mood", "rows": ROWS, "version": 9}, 404, "unknown_version"),
        ({"task": "mood", "rows": []}, 422, "no_rows"),
        ({"rows": ROWS}, 422, "missing_key"),
        ({"task": "mood", "rows": ROWS, "kind": "compile"}, 422, "wrong_value"),
        ({"task": "mood", "rows": ROWS, "options": {"version": 1}}, 422, "unknown_key"),
        ({"task": "mood", "rows": ROWS, "options": {"temperature": 1.0}}, 422, "conflicting_options"),
        ({"task": "mood", "rows": ROWS, "options": {"retrieve": 3}}, 422, "no_tokens_reserved"),
    ],
)
def test_a_job_that_could_never_be_done_is_refused(
    client: TestClient, body: dict[str, Any], status: int, code: str
) -> None:
    answer = client.post("/v1/jobs", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert client.get("/v1/jobs").json()["data"] == []


def test_what_a_job_is_to_do_is_said_in_one_place(client: TestClient) -> None:
    answer = client.post("/v1/jobs", params={"kind": "predict"}, json={"task": "mood", "rows": ROWS})
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_key")
    unknown = client.post("/v1/jobs", params={"task": "mood", "nonsense": 1}, content="{}", headers=LINES)
    assert unknown.status_code == 422
    without = client.post("/v1/jobs", content='{"text": "a"}', headers=LINES)
    assert (without.status_code, without.json()["code"], without.json()["field"]) == (422, "missing_key", "task")


def test_settings_that_change_meanwhile_do_not_change_a_job(client: TestClient) -> None:
    worker = fake_worker(services_of(client))
    worker.open.clear()
    job = submitted(client, {"task": "mood", "rows": ROWS})
    client.patch("/v1/tasks/mood", json={"abstain_below": 0.99})
    worker.open.set()
    assert finished(client, job["id"])["options"] == {"abstain_below": None, "blend": False, "retrieve": 0}
    assert all(one["abstained"] is False for one in results(client, job["id"]))


def test_a_cancelled_job_ends_and_a_finished_one_is_forgotten(client: TestClient) -> None:
    worker = fake_worker(services_of(client))
    worker.open.clear()
    job = submitted(client, {"task": "mood", "rows": ROWS})
    deadline = time.monotonic() + 60
    while not worker.options:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    answer = client.delete(f"/v1/jobs/{job['id']}")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert results(client, job["id"]) == []
    assert len(worker.cancelled) == 1
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 200
    for answer in (client.get(f"/v1/jobs/{job['id']}"), client.delete(f"/v1/jobs/{job['id']}")):
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")


def test_the_jobs_of_a_task_go_with_it(client: TestClient) -> None:
    worker = fake_worker(services_of(client))
    worker.open.clear()
    job = submitted(client, {"task": "mood", "rows": ROWS})
    client.post("/v1/tasks", json=echo_task())
    assert client.delete("/v1/tasks/mood").status_code == 204
    worker.open.set()
    assert client.get(f"/v1/jobs/{job['id']}").json()["code"] == "unknown_job"
    # What ended in the middle takes no other job with it.
    other = submitted(client, {"task": "echo", "rows": [{"query": "d"}]})
    assert finished(client, other["id"])["state"] == "done"


def test_a_job_of_a_version_that_fails_later_says_why(client: TestClient) -> None:
    services = services_of(client)
    worker = fake_worker(services)
    services.runner.stop()
    worker.compiles.clear()
    client.post("/v1/tasks", json={"name": "bad", "demonstrations": [{"query": "a", "answer": BROKEN}]})
    job = submitted(client, {"task": "bad", "rows": [{"query": "a"}]})
    worker.compiles.set()
    deadline = time.monotonic() + 30
    while client.get("/v1/tasks/bad").json()["state"] == "compiling":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    services.runner.start()
    found = finished(client, job["id"])
    assert (found["state"], found["num_done"], found["problem"]["code"]) == ("failed", 0, "version_failed")


def test_a_failed_version_takes_no_jobs(client: TestClient) -> None:
    client.post("/v1/tasks", json={"name": "bad", "demonstrations": [{"query": "a", "answer": BROKEN}]})
    client.post("/v1/tasks/bad/predict", json={"rows": [{"query": "a"}]})
    answer = client.post("/v1/jobs", json={"task": "bad", "rows": [{"query": "a"}]})
    assert (answer.status_code, answer.json()["code"]) == (409, "version_failed")


def test_an_owner_may_have_only_so_many_unfinished_jobs(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.server.job_service.MOST_UNFINISHED", 2)
    fake_worker(services_of(client)).open.clear()
    for _ in range(2):
        submitted(client, {"task": "mood", "rows": ROWS})
    answer = client.post("/v1/jobs", json={"task": "mood", "rows": ROWS})
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_jobs")
    assert int(answer.headers["retry-after"]) > 1


def test_more_rows_than_a_job_may_have_are_refused(tmp_path: Path) -> None:
    with fake_client(tmp_path / "data", max_job_rows=2, max_rows=1) as client:
        client.post("/v1/tasks", json=mood_task())
        assert client.post("/v1/jobs", json={"task": "mood", "rows": ROWS[:2]}).status_code == 202
        answer = client.post("/v1/jobs", json={"task": "mood", "rows": ROWS})
        assert (answer.status_code, answer.json()["code"]) == (413, "too_many_rows")
        answer = client.post("/v1/tasks/mood/evaluate", json={"rows": ROWS[:2]})
        assert (answer.status_code, answer.json()["code"]) == (413, "too_many_rows")


def test_the_rows_of_a_job_count_towards_the_limit_on_rows(tmp_path: Path) -> None:
    with fake_client(tmp_path / "data", rows_per_minute=4) as client:
        client.post("/v1/tasks", json=mood_task())
        submitted(client, {"task": "mood", "rows": ROWS})
        answer = client.post("/v1/jobs", json={"task": "mood", "rows": ROWS})
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_requests")


def test_a_job_is_done_where_fewer_rows_may_wait_than_a_portion_has(tmp_path: Path) -> None:
    with fake_client(tmp_path / "data", max_waiting_rows=2) as client:
        client.post("/v1/tasks", json=mood_task())
        job = submitted(client, {"task": "mood", "rows": ROWS})
        assert finished(client, job["id"])["num_done"] == 3


def test_jobs_come_in_pages_and_are_those_of_their_owner(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data", has_keys=True) as services:
        assert services.keys is not None
        keys = [services.keys.create(owner, "test", {"manage", "predict"})[0] for owner in ("ann", "bob")]
        with client_with(services, keys[0]) as ann, client_with(services, keys[1]) as bob:
            ann.post("/v1/tasks", json=mood_task())
            jobs = [submitted(ann, {"task": "mood", "rows": ROWS})["id"] for _ in range(3)]
            first = ann.get("/v1/jobs", params={"limit": 2}).json()
            rest = ann.get("/v1/jobs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
            assert [job["id"] for job in first["data"] + rest["data"]] == jobs
            assert rest["next_cursor"] is None
            assert bob.get("/v1/jobs").json()["data"] == []
            for path in (f"/v1/jobs/{jobs[0]}", f"/v1/jobs/{jobs[0]}/results"):
                assert bob.get(path).json()["code"] == "unknown_job"
            assert bob.delete(f"/v1/jobs/{jobs[0]}").status_code == 404
            assert bob.post("/v1/jobs", json={"task": "mood", "rows": ROWS}).json()["code"] == "unknown_task"
            assert bob.post("/v1/tasks/mood/evaluate", json={"rows": ROWS}).json()["code"] == "unknown_task"
            assert ann.get(f"/v1/jobs/{jobs[0]}").status_code == 200


def test_an_unfinished_job_is_resumed_by_the_next_server_on_the_folder(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data") as services, client_with(services) as client:
        client.post("/v1/tasks", json=mood_task())
        fake_worker(services).open.clear()
        job = submitted(client, {"task": "mood", "rows": ROWS * 200})
    with fake_services(tmp_path / "data") as services, client_with(services) as client:
        assert finished(client, job["id"])["state"] == "done"
        answers = [*results(client, job["id"], limit=400), *results(client, job["id"], after=400)]
        assert [one["row"] for one in answers] == list(range(1, 601))
