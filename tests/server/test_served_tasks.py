"""Tasks from a table to their scores, on a server in a process of its own with the small model that is packaged."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import httpx
import pytest

from manyicl.engine.engine import Engine
from manyicl.tasks.task import Example, Task
from tests.server_processes import ServerProcess, server_process

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

LABELS = ("hat", "lamp")
PHRASES = [" ".join(words) for words in product(("a", "the", "one"), ("red", "blue", "white", "pink"), LABELS)]
TRAIN = [(text, text.split()[-1]) for text in PHRASES[::2]]
KEYS = {"query": "{{ text }}", "answer": "{{ label }}", "labels": list(LABELS)}
LINES = {"Content-Type": "application/x-ndjson"}
# Enough rows for a job to be killed in the middle, whatever the machine.
NUM_ROWS = 6_000


@pytest.fixture(name="server", scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with server_process(folder / "data", folder / "server.log") as server:
        server.start()
        yield server


@pytest.fixture(name="http")
def _http(server: ServerProcess) -> Iterator[httpx.Client]:
    if not server.is_alive():
        server.start()
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as http:
        yield http


@pytest.fixture(name="engine", scope="module")
def _engine() -> Engine:
    return Engine.from_pretrained("builtin:nano")


def csv_of(rows: list[tuple[str, str]]) -> bytes:
    return "".join(["text,label\n", *(f'"{text}",{label}\n' for text, label in rows)]).encode()


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def checked(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ready(http: httpx.Client, task: str) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while True:
        found: dict[str, Any] = checked(http.get(f"/v1/tasks/{task}"), 200)
        if found["state"] != "compiling":
            assert found["state"] == "ready", found["problem"]
            return found
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(http: httpx.Client, job: str) -> dict[str, Any]:
    deadline = time.monotonic() + 300
    while True:
        found: dict[str, Any] = checked(http.get(f"/v1/jobs/{job}"), 200)
        if found["finished_at"] is not None:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def results(http: httpx.Client, job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while lines := http.get(f"/v1/jobs/{job}/results", params={"after": len(found)}).text.splitlines():
        found += map(json.loads, lines)
    return found


def test_a_table_becomes_a_task_that_answers_as_the_engine_does(http: httpx.Client, engine: Engine) -> None:
    files, fields = (
        {"file": ("things.csv", csv_of(TRAIN[:6]), "text/csv")},
        {"name": "things", "task": json.dumps(KEYS)},
    )
    task = checked(http.post("/v1/tasks", files=files, data=fields), 201)
    assert (task["num_demonstrations"], task["labels"]) == (6, list(LABELS))
    more = json_lines([{"text": text, "label": label} for text, label in TRAIN[6:]])
    added = checked(http.post("/v1/tasks/things/demonstrations", content=more, headers=LINES), 201)
    assert added["numbers"] == [7, len(TRAIN)]
    found = ready(http, "things")
    assert (found["num_shots"], found["num_dropped"], found["ready_version"]) == (len(TRAIN), 0, 2)

    rows = [{"text": text} for text in PHRASES]
    query = {"scores": "all"}
    lines = http.post("/v1/tasks/things/predict", content=json_lines(rows), headers=LINES, params=query)
    assert (lines.status_code, lines.headers["content-type"]) == (200, "application/x-ndjson")
    served = list(map(json.loads, lines.text.splitlines()))
    shown = checked(http.get("/v1/tasks/things/demonstrations", params={"limit": 1000}), 200)["data"]
    assert [(row["columns"]["text"], row["columns"]["label"]) for row in shown] == TRAIN

    local = Task.from_examples("things", TRAIN, labels=LABELS)
    prefix = engine.prefill(local, in_context(local))
    offline = list(engine.predict(prefix, PHRASES, scores="all"))
    assert [one["answer"] for one in served] == [prediction.answer for prediction in offline]
    for one, prediction in zip(served, offline, strict=True):
        assert prediction.scores is not None
        assert one["scores"] == pytest.approx(dict(prediction.scores.log_probabilities), abs=1e-4)


def in_context(task: Task) -> list[Example]:
    """The order in the context: each write in the balanced order, one write after the other."""
    writes = [Task(task.spec, rows) for rows in (task.train[:6], task.train[6:])]
    return [example for write in writes for example in write.demonstrations(len(write.train))]


def test_a_table_with_answers_is_scored_at_once_and_by_a_job_alike(http: httpx.Client) -> None:
    checked(http.post("/v1/tasks", json=new_task("scored")), 201)
    rows = [(text, text.split()[-1]) for text in PHRASES] + [("a red box", "hat")]
    broken = csv_of(rows) + b"a row,with,too many\na red hat,box\n"
    query, headers = {"scores": "all"}, {"Content-Type": "text/csv"}
    at_once = checked(http.post("/v1/tasks/scored/evaluate", content=broken, headers=headers, params=query), 200)
    assert (at_once["num_rows"], at_once["num_problems"]) == (len(rows) + 2, 2)
    assert [one["code"] for one in at_once["problems"]] == ["wrong_number_of_fields", "unknown_label"]
    assert at_once["accuracy"] > 0.8
    assert at_once["num_errors"] == sum(one["num_answers"] for one in at_once["confusion"])
    of_job = {"kind": "evaluate", "task": "scored", **query}
    job = checked(http.post("/v1/jobs", content=broken, headers=headers, params=of_job), 202)
    summary = ended(http, job["id"])["summary"]
    assert {name: at_once[name] for name in ("accuracy", "macro_f1", "labels", "confusion")} == {
        name: summary[name] for name in ("accuracy", "macro_f1", "labels", "confusion")
    }
    # At once a row of a table is named by its line, after the header; a job counts its rows.
    assert [one["row"] + 1 for one in summary["errors"]] == [one["row"] for one in at_once["errors"]]


def new_task(name: str) -> dict[str, Any]:
    return {"name": name, "task": KEYS, "demonstrations": [{"text": text, "label": label} for text, label in TRAIN]}


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "stopped"])
def test_a_job_goes_through_a_restart_with_each_row_answered_once(
    server: ServerProcess, http: httpx.Client, *, is_killed: bool
) -> None:
    name = f"long-{is_killed}"
    checked(http.post("/v1/tasks", json=new_task(name)), 201)
    ready(http, name)
    rows = [{"text": PHRASES[n % len(PHRASES)]} for n in range(NUM_ROWS)]
    job = checked(http.post("/v1/jobs", json={"task": name, "rows": rows}), 202)["id"]
    deadline = time.monotonic() + 120
    while not (num_done := checked(http.get(f"/v1/jobs/{job}"), 200)["num_done"]):
        assert time.monotonic() < deadline
    assert num_done < NUM_ROWS, "the job was over before it could be interrupted"
    started = time.monotonic()
    (server.kill if is_killed else server.stop)()
    assert time.monotonic() - started < 30
    server.start()
    before = checked(http.get(f"/v1/jobs/{job}"), 200)
    assert num_done <= before["num_done"] < NUM_ROWS
    after = ended(http, job)
    assert (after["state"], after["num_done"], after["num_problems"]) == ("done", NUM_ROWS, 0)
    found = results(http, job)
    assert [one["row"] for one in found] == list(range(1, NUM_ROWS + 1))
    at_once = checked(http.post(f"/v1/tasks/{name}/predict", json={"rows": rows[: len(PHRASES)]}), 200)["predictions"]
    for one in found:
        expected = at_once[(one["row"] - 1) % len(PHRASES)]
        assert one["answer"] == expected["answer"]
        assert one["log_probability"] == pytest.approx(expected["log_probability"], abs=1e-4)
