"""The client sends what the routes take, and returns what they answer as records. The server is scripted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manyicl.client import BYTES_PER_REQUEST, ROWS_PER_REQUEST, Client
from manyicl.errors import MachineError, UserError
from tests.scripted_server import Answer, ScriptedServer, Sent, scripted_server

TASK = {
    "id": "tsk_1",
    "name": "my tickets",
    "revision": 4,
    "version": 2,
    "ready_version": 1,
    "state": "ready",
    "labels": ["billing", "login"],
    "num_demonstrations": 2,
    "of_a_later_version": 1,
}
VERSION = {"version": 2, "change": "added", "state": "compiling", "num_demonstrations": 2}
CHANGED = {"task": TASK, "version": VERSION, "numbers": [3, 7]}
JOB = {"id": "job_1", "kind": "predict", "task": "tsk_1", "version": 1, "state": "running", "num_rows": 3}


class Script:
    """Answers of the server by method and path; several for one are given one after the other, the last repeatedly."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], list[Answer]] = {}

    def __call__(self, sent: Sent) -> Answer:
        waiting = self.answers.get((sent.method, sent.path))
        if waiting is None:
            return Answer(404, {"code": "unknown_route", "detail": f"{sent.method} {sent.path}"})
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    def on(self, method: str, path: str, *answers: Any) -> None:
        self.answers[method, path] = [one if isinstance(one, Answer) else Answer(200, one) for one in answers]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def server(script: Script) -> Iterator[ScriptedServer]:
    with scripted_server(script) as running:
        yield running


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Client]:
    with Client(server.url, "mk_a_b", retry_seconds=0) as made:
        yield made


def ndjson(*lines: Any) -> Answer:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return Answer(200, text.encode(), {"Content-Type": "application/x-ndjson", "X-Task-Version": "1"})


def test_pairs_fill_the_columns_of_the_default_templates_and_rows_stay_as_they_are(
    client: Client, script: Script, server: ScriptedServer
) -> None:
    script.on("POST", "/v1/tasks", Answer(201, TASK))
    task = client.create_task(
        "my tickets",
        [("Card declined", "billing"), {"query": "Cannot sign in", "answer": "login"}],
        labels=("billing",),
    )
    (sent,) = server.sent
    assert sent.json == {
        "name": "my tickets",
        "task": {"labels": ["billing"]},
        "settings": {"pinned": False, "abstain_below": None, "blend": False, "num_shots": None, "num_retrieved": 0},
        "demonstrations": [
            {"query": "Card declined", "answer": "billing"},
            {"query": "Cannot sign in", "answer": "login"},
        ],
    }
    assert sent.headers["content-type"] == "application/json"
    assert sent.headers["authorization"] == "Bearer mk_a_b"
    assert len(sent.headers["idempotency-key"]) == 32
    assert task.reference == "tsk_1"


def test_each_write_has_a_key_of_its_own_unless_one_is_given(
    client: Client, script: Script, server: ScriptedServer
) -> None:
    script.on("POST", "/v1/tasks/t/demonstrations", Answer(201, CHANGED, {"Idempotent-Replayed": "true"}))
    task = client.task("t")
    changes = [task.add([("a", "b")]), task.add([("a", "b")]), task.add([("a", "b")], idempotency_key="mine")]
    keys = [sent.headers["idempotency-key"] for sent in server.sent]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"
    assert changes[0].numbers == (3, 7)
    assert changes[0].replayed
    assert (changes[0].task.revision, changes[0].version.change) == (4, "added")


def test_writes_go_to_their_routes_with_the_revision_that_was_read(
    client: Client, script: Script, server: ScriptedServer
) -> None:
    task = client.task("my tickets")
    base = "/v1/tasks/my%20tickets"
    script.on("PATCH", f"{base}/demonstrations/3", Answer(201, CHANGED))
    script.on("DELETE", f"{base}/demonstrations/3", Answer(201, CHANGED))
    script.on("POST", f"{base}/versions/1/restore", Answer(201, CHANGED))
    script.on("PATCH", base, {**TASK, "name": "renamed"})
    script.on("DELETE", "/v1/tasks/renamed", Answer(204))
    task.correct(3, ("Card declined", "login"), if_revision=4)
    task.remove(3, if_revision=4)
    task.restore(1, if_revision=4)
    task.update(name="renamed", pinned=True, if_revision=4)
    task.delete()
    assert [sent.headers.get("if-match") for sent in server.sent] == ['"4"'] * 4 + [None]
    assert server.sent[0].json == {"query": "Card declined", "answer": "login"}
    assert server.sent[3].json == {"name": "renamed", "pinned": True}
    assert [bool(sent.body) for sent in server.sent] == [True, False, False, True, False]


def test_lists_are_read_page_after_page(client: Client, script: Script, server: ScriptedServer) -> None:
    first, last = {"data": [TASK], "next_cursor": "abc="}, {"data": [{**TASK, "id": "tsk_2"}], "next_cursor": None}
    script.on("GET", "/v1/tasks", first, last)
    assert [task.id for task in client.tasks()] == ["tsk_1", "tsk_2"]
    assert [sent.query for sent in server.sent] == [{}, {"cursor": "abc="}]
    script.on("GET", "/v1/tasks/t/demonstrations", {"data": [{"number": 1, "columns": {}}], "next_cursor": None})
    assert [row["number"] for row in client.task("t").demonstrations(version=2)] == [1]
    assert server.sent[-1].query["version"] == "2"
    script.on("GET", "/v1/tasks/t/versions", {"data": [VERSION], "next_cursor": None})
    assert [version.version for version in client.task("t").versions()] == [2]
    script.on("GET", "/v1/jobs", {"data": [JOB], "next_cursor": None})
    assert [job.id for job in client.jobs()] == ["job_1"]


def test_predictions_come_with_the_version_and_the_model(
    client: Client, script: Script, server: ScriptedServer
) -> None:
    predictions = [{"answer": "login", "log_probability": -0.1, "probabilities": {"login": 0.9}, "abstained": False}]
    script.on(
        "POST", "/v1/tasks/t/predict", {"task": "my tickets", "version": 1, "model": "m", "predictions": predictions}
    )
    found = client.task("t").predict([{"text": "Cannot sign in"}], scores="all", abstain_below=None, similar=3)
    assert (found.task, found.version, found.model, len(found)) == ("my tickets", 1, "m", 1)
    assert (found[0].answer, found[0].probabilities) == ("login", {"login": 0.9})
    assert server.sent[0].json == {"rows": [{"text": "Cannot sign in"}], "scores": "all", "similar": 3}
    assert "idempotency-key" not in server.sent[0].headers


def test_many_rows_are_sent_in_portions_to_one_version_and_bad_ones_have_a_problem(
    client: Client, script: Script, server: ScriptedServer
) -> None:
    num_rows = ROWS_PER_REQUEST + 2
    bad = {"problem": {"code": "empty_query", "detail": "it is empty", "row": 1}, "answer": None}
    script.on(
        "POST", "/v1/tasks/t/predict", ndjson(*[{"answer": "a"}] * ROWS_PER_REQUEST), ndjson(bad, {"answer": "b\u2028"})
    )
    found = list(client.task("t").predict_each(({"query": str(number)} for number in range(num_rows)), scores="all"))
    assert len(found) == num_rows
    assert found[-2].problem is not None
    assert (found[-2].problem.code, found[-2].answer, found[-1].answer) == ("empty_query", None, "b\u2028")
    assert [len(sent.body.splitlines()) for sent in server.sent] == [ROWS_PER_REQUEST, 2]
    assert [sent.query for sent in server.sent] == [{"scores": "all"}, {"scores": "all", "version": "1"}]
    assert server.sent[0].headers["content-type"] == server.sent[0].headers["accept"] == "application/x-ndjson"


def test_long_rows_are_sent_in_smaller_portions(client: Client, script: Script, server: ScriptedServer) -> None:
    script.on("POST", "/v1/tasks/t/predict", ndjson({"answer": "a"}))
    long = "x" * (BYTES_PER_REQUEST * 2 // 3)
    assert len(list(client.task("t").predict_each([{"query": long}] * 3, version=1))) == 3
    assert len(server.sent) == 3


def test_too_few_answers_are_no_answers(client: Client, script: Script) -> None:
    script.on("POST", "/v1/tasks/t/predict", ndjson({"answer": "a"}))
    with pytest.raises(MachineError, match="answered 1 of 2 rows"):
        list(client.task("t").predict_each([{"query": "a"}, {"query": "b"}], version=1))
    script.on("POST", "/v1/tasks/t/predict", ndjson({"problem": {"code": "queue_full", "detail": "too many rows"}}))
    with pytest.raises(UserError) as caught:
        list(client.task("t").predict_each([{"query": "a"}, {"query": "b"}], version=1))
    assert caught.value.code == "queue_full"


def test_a_table_is_answered_into_a_file_with_the_columns_of_each_row(
    client: Client, script: Script, server: ScriptedServer, tmp_path: Path
) -> None:
    script.on(
        "POST", "/v1/tasks/t/predict", ndjson({"answer": "ä", "log_probability": -1.0}, {"problem": "it is empty"})
    )
    (tmp_path / "new.csv").write_text("text\n007\n\u2028\n", encoding="utf-8")
    output = tmp_path / "answers.jsonl"
    assert client.task("t").predict_file(tmp_path / "new.csv", output, version=1) == (2, 1)
    first, second = map(json.loads, output.read_text(encoding="utf-8").strip("\n").split("\n"))
    assert first["text"] == "007"
    assert (first["answer"], first["log_probability"]) == ("ä", -1.0)
    assert (second["text"], second["answer"], second["problem"]) == ("\u2028", None, "it is empty.")
    assert server.sent[0].body.count(b"\n") == 2


def test_a_file_of_answers_appears_whole_or_not_at_all(client: Client, script: Script, tmp_path: Path) -> None:
    script.on("POST", "/v1/tasks/t/predict", Answer(413, {"code": "too_large", "detail": "too large"}))
    (tmp_path / "new.csv").write_text("text\na\n", encoding="utf-8")
    with pytest.raises(UserError):
        client.task("t").predict_file(tmp_path / "new.csv", tmp_path / "answers.jsonl", version=1)
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]


EVENTS = (
    'event: part\ndata: {"text": "twenty"}\n\n: a comment\n\nevent: part\r\ndata: {"text": " one\u2028"}\r\n\r\n'
    'event: done\ndata: {"prediction": {"answer": "twenty one", "log_probability": -2.5}}\n\n'
)


def test_a_free_answer_comes_in_parts_and_is_whole_at_the_end(
    client: Client, script: Script, server: ScriptedServer
) -> None:
    script.on("POST", "/v1/tasks/t/predict", Answer(200, EVENTS.encode(), {"Content-Type": "text/event-stream"}))
    with client.task("t").stream({"query": "9 + 12"}, temperature=0.5, seed=1) as answer:
        before = answer.prediction
        assert list(answer) == ["twenty", " one\u2028"]
    assert before is None
    assert answer.prediction is not None
    assert answer.prediction.answer == "twenty one"
    (sent,) = server.sent
    assert sent.headers["accept"] == "text/event-stream"
    assert sent.json == {"rows": [{"query": "9 + 12"}], "temperature": 0.5, "seed": 1}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('event: part\ndata: {"text": "a"}\n\n', MachineError),
        ('event: error\ndata: {"code": "query_too_long", "detail": "too long"}\n\n', UserError),
        ("event: part\ndata: {broken\n\n", MachineError),
    ],
)
def test_a_stream_that_does_not_end_well_raises(
    client: Client, script: Script, content: str, error: type[Exception]
) -> None:
    script.on("POST", "/v1/tasks/t/predict", Answer(200, content.encode()))
    with client.task("t").stream({"query": "a"}) as answer, pytest.raises(error):
        list(answer)


def test_a_job_is_waited_for_and_its_results_are_read(client: Client, script: Script, server: ScriptedServer) -> None:
    script.on("POST", "/v1/jobs", Answer(202, JOB))
    script.on("GET", "/v1/jobs/job_1", JOB, {**JOB, "state": "done", "num_done": 3, "num_problems": 1})
    script.on("GET", "/v1/jobs/job_1/results", ndjson({"row": 1, "answer": "a"}, {"row": 2, "problem": {"code": "x"}}))
    script.on("DELETE", "/v1/jobs/job_1", Answer(204))
    job = client.task("t").submit([{"query": "a"}], scores="all")
    assert server.sent[0].json == {
        "kind": "predict",
        "task": "t",
        "rows": [{"query": "a"}],
        "options": {"scores": "all"},
    }
    assert "idempotency-key" in server.sent[0].headers
    assert job.wait().num_problems == 1
    first, second = job.results()
    assert first.answer == "a"
    assert second.problem is not None
    job.cancel()


def test_a_task_or_a_job_that_failed_raises_its_reason(client: Client, script: Script) -> None:
    problem = {"code": "too_many_demonstrations", "sentence": "They do not fit.", "row": 3}
    script.on("GET", "/v1/tasks/t", {**TASK, "state": "compiling"}, {**TASK, "state": "failed", "problem": problem})
    with pytest.raises(UserError) as caught:
        client.task("t").wait()
    assert caught.value.code == "too_many_demonstrations"
    script.on("GET", "/v1/jobs/job_1", {**JOB, "state": "failed", "problem": problem})
    with pytest.raises(UserError):
        client.job("job_1").wait()
    script.on("GET", "/v1/tasks/t", {**TASK, "state": "compiling"})
    with pytest.raises(MachineError, match="not compiled within"):
        client.task("t").wait(timeout=0.1)


def test_what_cannot_be_sent_is_refused_before_anything_is_sent(client: Client, server: ScriptedServer) -> None:
    task = client.task("t")
    refused: dict[str, Any] = {
        "not_a_list": lambda: task.predict({"query": "one row"}),
        "not_a_row": lambda: task.add([("a", "b"), "c"]),  # type: ignore[list-item]
        "no_json": lambda: task.predict([{"query": float("nan")}]),
        "no_task_named": lambda: client.task(""),
    }
    for code, call in refused.items():
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.code == code
    with pytest.raises(UserError):
        task.predict([{"query": "\ud800"}])
    assert not server.sent


def test_address_and_key_come_from_the_environment_where_they_are_not_given(
    script: Script, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYICL_URL", server.url)
    monkeypatch.setenv("MANYICL_API_KEY", "mk_of_environment")
    script.on("GET", "/v1/tasks", {"data": [], "next_cursor": None})
    with Client() as client:
        assert list(client.tasks()) == []
    assert server.sent[0].headers["authorization"] == "Bearer mk_of_environment"


def test_an_answer_of_something_else_than_a_task_server_is_no_task(client: Client, script: Script) -> None:
    script.on("GET", "/v1/tasks/t", {"hello": "world"})
    with pytest.raises(MachineError, match="no TaskInfo"):
        client.task("t").info()
    script.on("GET", "/v1/tasks/t", Answer(200, b"<html>"))
    with pytest.raises(MachineError, match="broken JSON"):
        client.task("t").info()


def test_the_client_comes_without_torch() -> None:
    heavy = ("torch", "transformers", "fastapi", "sqlalchemy")
    made = "import sys, manyicl; manyicl.Client('http://127.0.0.1:1').close()"
    program = f"{made}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "[]\n"
