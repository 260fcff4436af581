"""Whatever is requested with one key, on any route: nothing of another owner is read or changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from manyicl.server.records import TaskRecord, VersionKey
from manyicl.server.services import Services
from tests.server.fakes import client_of, fake_services

# In all texts of the owner, and in nothing that the other sends.
SECRET = "sesame"
OPEN = ("/healthz", "/readyz", "/metrics", "/openapi.json")


@dataclass
class Two:
    """An owner with a task and a job, and another owner with a client and a task of the same name.

    Attributes:
        services: Parts of the server.
        mallory: Client of the other owner.
        ann: Client of the owner.
        task: Id of the owner's task.
        job: Id of the owner's job.
        routes: Methods and paths of all routes.
    """

    services: Services
    mallory: TestClient
    ann: TestClient
    task: str
    job: str
    routes: list[tuple[str, str]]

    def state(self) -> tuple[Any, ...]:
        """All that is stored of the owner."""
        tasks = self.services.tasks
        record: TaskRecord = tasks.get("ann", self.task)
        versions, _ = tasks.versions("ann", self.task, 1000)
        rows = [tasks.demonstrations(VersionKey(self.task, one.key.version)) for one in versions]
        return record, versions, rows, len(tasks.page("ann", 1000)[0]), self.services.jobs.get("ann", self.job)


def task_with_secrets(name: str) -> dict[str, Any]:
    labels = [f"{SECRET} one", f"{SECRET} two"]
    rows = [{"query": f"{SECRET} {number}", "answer": labels[number % 2]} for number in range(4)]
    keys = {"labels": labels, "instruction": f"{SECRET}: {{{{ labels | join(', ') }}}}"}
    return {"name": name, "task": keys, "demonstrations": rows}


@pytest.fixture(name="two", scope="module")
def _two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with fake_services(tmp_path_factory.mktemp("server") / "data", has_keys=True) as services:
        assert services.keys is not None
        (ann, _), (mallory, _) = services.keys.create("ann", "a"), services.keys.create("mallory", "m")
        with client_of(services, ann) as of_ann, client_of(services, mallory) as of_mallory:
            task = of_ann.post("/v1/tasks", json=task_with_secrets("shared-name")).json()["id"]
            rows = {"demonstrations": [{"query": f"{SECRET} new", "answer": f"{SECRET} one"}]}
            assert of_ann.post(f"/v1/tasks/{task}/demonstrations", json=rows).status_code == 201
            asked = {"task": task, "rows": [{"query": f"{SECRET} 1"}]}
            job = of_ann.post("/v1/jobs", json=asked).json()["id"]
            _wait_for_job(of_ann, job)
            document = of_ann.get("/openapi.json").json()
            routes = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
            yield Two(services, of_mallory, of_ann, task, job, routes)


def _wait_for_job(client: TestClient, job: str) -> None:
    for _ in range(1000):
        if client.get(f"/v1/jobs/{job}").json()["state"] == "done":
            return
    raise AssertionError("the job is not done")


def row(answer: str) -> dict[str, str]:
    return {"query": "x", "answer": answer, "text": "x"}


# Bodies that some route takes, and parts of them that name what is another's.
def bodies(two: Two) -> st.SearchStrategy[Any]:
    rows = st.lists(st.builds(row, st.sampled_from(["a", "b"])), max_size=3)
    names = st.sampled_from([two.task, "shared-name", f"{two.task}@1", f"{two.task}@2", two.job])
    messages = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.just("x")}), max_size=2)
    questions = st.just([{"name": "q", "type": "choice", "choices": [{"value": "a"}]}])
    whole = {
        "name": names,
        "task": st.one_of(names, st.just({"labels": ["a", "b"]})),
        "model": names,
        "input": st.just("x"),
        "messages": messages,
        "questions": questions,
        "stream": st.booleans(),
        "kind": st.sampled_from(["predict", "evaluate"]),
        "version": st.integers(1, 3),
        "pinned": st.booleans(),
        "abstain_below": st.just(0.5),
        "demonstrations": rows,
        "rows": rows,
        "query": st.just("x"),
        "answer": st.just("a"),
    }
    return st.one_of(
        st.fixed_dictionaries({}, optional=whole),
        st.fixed_dictionaries({"rows": rows, "task": names}, optional={"version": whole["version"]}),
        st.fixed_dictionaries({"model": names, "messages": messages}, optional={"stream": st.booleans()}),
        st.fixed_dictionaries({"model": names, "input": st.just("x"), "questions": questions}),
        st.fixed_dictionaries({"demonstrations": rows}),
        st.builds(row, st.sampled_from(["a", "b"])),
        st.just({}),
    )


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_key_ever_reads_or_changes_anothers(two: Two, data: st.DataObject) -> None:
    method, path = data.draw(st.sampled_from(two.routes))
    values = {
        "task": data.draw(st.sampled_from([two.task, two.task.upper(), "shared-name", f"{two.task}%20", two.job])),
        "job": data.draw(st.sampled_from([two.job, two.task])),
        "model": data.draw(st.sampled_from([two.task, f"{two.task}@1", "shared-name"])),
        "number": data.draw(st.sampled_from(["1", "5"])),
        "version": data.draw(st.sampled_from(["1", "2"])),
    }
    query = data.draw(st.fixed_dictionaries({}, optional={"version": st.integers(1, 2), "limit": st.just(1000)}))
    headers = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "If-Match": st.sampled_from(['"1"', '"2"', "*"]),
                "Idempotency-Key": st.sampled_from(["k1", "k2"]),
                "Accept": st.sampled_from(["application/x-ndjson", "text/event-stream"]),
            },
        )
    )
    body = data.draw(bodies(two)) if method in ("POST", "PATCH", "PUT") else None
    before = two.state()
    address = path.format_map(values)
    answer = two.mallory.request(method, address, params=query, json=body, headers=headers)
    assert answer.status_code < 500, answer.text
    assert SECRET not in answer.text
    assert SECRET not in str(answer.headers)
    assert two.state() == before
    if "{" in path and answer.status_code < 300:
        # Only what is their own answers: a task that they gave the same name.
        assert "shared-name" in address, (method, address)


def test_the_routes_do_something_for_their_owner(two: Two) -> None:
    """So that the test above does not hold for want of anything to see."""
    for method, path in two.routes:
        if method == "GET" and path not in OPEN:
            answer = two.ann.get(path.format_map({"task": two.task, "job": two.job, "model": two.task}))
            assert answer.status_code == 200, path
            if path in (
                "/v1/tasks",
                "/v1/tasks/{task}",
                "/v1/tasks/{task}/demonstrations",
                "/v1/tasks/{task}/versions",
            ):
                assert SECRET in answer.text, path
    assert SECRET in json.dumps(two.ann.get(f"/v1/jobs/{two.job}/results").text)


def test_the_tasks_and_jobs_of_an_owner_are_in_no_list_of_another(two: Two) -> None:
    for path in ("/v1/tasks", "/v1/jobs"):
        listing = two.mallory.get(path, params={"limit": 1000}).json()["data"]
        assert not {two.task, two.job} & {one["id"] for one in listing}


def test_an_idempotency_key_of_one_owner_is_free_for_another(two: Two) -> None:
    body = {"name": "same", "demonstrations": [{"query": "a", "answer": "b"}]}
    ids = {
        client.post("/v1/tasks", json=body, headers={"Idempotency-Key": "same"}).json()["id"]
        for client in (two.ann, two.mallory)
    }
    assert len(ids) == 2
