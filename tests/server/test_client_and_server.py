"""The client and the commands against a running server with a fake worker: what one sends, the other takes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from manyicl.cli.tasks import app
from manyicl.client import Client, RemoteTask
from manyicl.errors import MachineError, UserError
from manyicl.served import Change, RefusedRequestError
from manyicl.server.app import create_app
from manyicl.tasks.files import load_task
from manyicl.tasks.starter_tables import write_starter_tables
from tests.server.fakes import BROKEN, TOO_LONG, FakeWorker, fake_services
from tests.server.running import running, running_fake

PAIRS = [("what a film", "good"), ("so dull", "bad"), ("I laughed", "good")]


@pytest.fixture(name="served", scope="module")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, FakeWorker]]:
    with running_fake(tmp_path_factory.mktemp("client") / "data", request_seconds=5) as (url, worker):
        yield url, worker


@pytest.fixture(name="client")
def _client(served: tuple[str, FakeWorker]) -> Iterator[Client]:
    """A client of a server without tasks."""
    with Client(served[0], retry_seconds=0) as client:
        yield client
        for task in list(client.tasks()):
            client.task(task.id).delete()


@pytest.fixture(name="mood")
def _mood(client: Client) -> RemoteTask:
    return client.create_task("mood", PAIRS, labels=("good", "bad"), abstain_below=0.5)


def test_a_task_is_made_read_and_deleted(client: Client, mood: RemoteTask) -> None:
    info = mood.wait()
    assert (info.name, info.version, info.ready_version, info.state) == ("mood", 1, 1, "ready")
    assert (info.labels, info.num_demonstrations, info.num_shots) == (["good", "bad"], 3, 3)
    assert info.settings["abstain_below"] == 0.5
    assert info.prefix is not None
    assert client.task("mood").info() == info
    assert [task.name for task in client.tasks()] == ["mood"]
    mood.delete()
    with pytest.raises(RefusedRequestError) as caught:
        mood.info()
    assert (caught.value.code, caught.value.status) == ("unknown_task", 404)


def test_demonstrations_are_added_corrected_removed_and_restored(client: Client, mood: RemoteTask) -> None:
    added = mood.add([("a waste", "bad"), ("again!", "good")], if_revision=mood.info().revision)
    assert (added.numbers, added.version.version, added.version.change) == ((4, 5), 2, "added")
    assert mood.correct(2, ("so dull", "good"), if_revision=added.task.revision).version.change == "corrected"
    assert mood.remove(1).task.num_demonstrations == 4
    rows = {row["number"]: row["columns"]["answer"] for row in mood.demonstrations()}
    assert rows == {2: "good", 3: "good", 4: "bad", 5: "good"}
    assert len(list(mood.demonstrations(version=1))) == 3
    assert mood.restore(1).version.num_demonstrations == 3
    assert [version.change for version in mood.versions()] == ["created", "added", "corrected", "removed", "restored"]
    with pytest.raises(UserError) as caught:
        mood.remove(1, if_revision=1)
    assert caught.value.code == "changed_meanwhile"


def test_the_same_write_under_one_key_is_carried_out_once(client: Client) -> None:
    tasks = [client.create_task("mood", PAIRS, labels="from_train", idempotency_key="k") for _ in range(2)]
    assert tasks[0].reference == tasks[1].reference
    changes = [tasks[0].add([("a waste", "bad")], idempotency_key="a") for _ in range(2)]
    assert [change.replayed for change in changes] == [False, True]
    assert changes[1].task.num_demonstrations == 4
    with pytest.raises(UserError) as caught:
        tasks[0].add([("another", "bad")], idempotency_key="a")
    assert caught.value.code == "idempotency_key_reused"


def test_settings_and_the_name_are_changed(client: Client, mood: RemoteTask) -> None:
    named = client.task("mood")
    info = named.update(name="moods", pinned=True, if_revision=1)
    assert (info.name, info.settings["pinned"], info.revision) == ("moods", True, 2)
    assert named.info().id == mood.info().id


def test_rows_are_answered_whole_or_not_at_all(mood: RemoteTask) -> None:
    found = mood.predict([{"query": "so dull"}, {"query": "what a film"}], scores="all")
    assert [one.answer for one in found] == ["bad", "good"]
    assert found[0].probabilities is not None
    assert found.version == 1
    with pytest.raises(RefusedRequestError) as caught:
        mood.predict([{"query": "so dull"}, {"wrong": "column"}, {"query": " "}])
    assert [error.row for error in caught.value.errors] == [2, 3]
    with pytest.raises(UserError) as alone:
        mood.predict([{"query": "so dull"}, {"query": " "}])
    assert (alone.value.code, alone.value.row) == ("empty_query", 2)
    assert str(alone.value).count("Query 2") == 1


def test_where_the_best_answer_is_not_probable_enough_there_is_a_guess(mood: RemoteTask) -> None:
    (found,) = mood.predict([{"query": "so dull"}], abstain_below=0.999)
    assert (found.answer, found.abstained, found.guess) == (None, True, "bad")


def test_many_rows_are_answered_in_order_and_a_bad_one_has_its_problem(mood: RemoteTask) -> None:
    queries = [PAIRS[number % 3][0] for number in range(600)]
    queries[300] = TOO_LONG
    found = list(mood.predict_each({"query": query} for query in queries))
    assert [one.answer for one in found[:3]] == ["good", "bad", "good"]
    assert len(found) == 600
    assert [number for number, one in enumerate(found) if one.problem is not None] == [300]
    assert found[300].problem is not None
    assert found[300].problem.code == "query_too_long"


def test_a_table_is_answered_into_a_file(mood: RemoteTask, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("query,id\nso dull,7\n,8\nwhat a film,9\n", encoding="utf-8")
    assert mood.predict_file(tmp_path / "new.csv", tmp_path / "answers.jsonl") == (3, 1)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["answer"]) for line in lines] == [("7", "bad"), ("8", None), ("9", "good")]


def test_a_column_with_the_name_of_a_part_of_an_answer_is_kept(mood: RemoteTask, tmp_path: Path) -> None:
    (tmp_path / "known.csv").write_text("query,answer,problem\nso dull,good,late\n", encoding="utf-8")
    assert mood.predict_file(tmp_path / "known.csv", tmp_path / "answers.jsonl") == (1, 0)
    line = json.loads((tmp_path / "answers.jsonl").read_text(encoding="utf-8"))
    assert (line["answer"], line["input_answer"], line["input_problem"]) == ("bad", "good", "late")


def test_a_free_answer_comes_in_parts(client: Client) -> None:
    echo = client.create_task("echo", [("a b", "A B"), ("c", "C")])
    with echo.stream({"query": "hello"}, temperature=0.5, seed=1) as answer:
        assert "".join(answer) == "HELLO"
    assert answer.prediction is not None
    assert answer.prediction.answer == "HELLO"
    with pytest.raises(UserError) as caught:
        echo.stream({"query": TOO_LONG})
    assert caught.value.code == "query_too_long"


def test_closing_a_stream_gives_the_answer_up(client: Client, served: tuple[str, FakeWorker]) -> None:
    echo, worker = client.create_task("echo", [("a b", "A B"), ("c", "C")]), served[1]
    echo.wait()
    worker.open.clear()
    with Client(served[0], timeout=0.2, retry_seconds=0) as impatient, pytest.raises(MachineError, match="timeout"):
        impatient.task("echo").stream({"query": "hello"})
    is_cancelled = threading.Event()
    for _ in range(200):
        if worker.cancelled:
            break
        is_cancelled.wait(0.01)
    assert worker.cancelled
    worker.open.set()


def test_a_full_queue_is_waited_for(
    served: tuple[str, FakeWorker], mood: RemoteTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    mood.wait()
    worker = served[1]
    monkeypatch.setattr(worker, "max_waiting_rows", 1)
    worker.open.clear()
    threading.Timer(0.3, worker.open.set).start()
    with Client(served[0], retry_seconds=20) as patient:
        first = threading.Thread(target=patient.task("mood").predict, args=([{"query": "so dull"}],))
        first.start()
        (found,) = patient.task("mood").predict([{"query": "so dull"}])
        first.join()
    assert found.answer == "bad"


def test_a_restart_goes_unnoticed_and_a_write_is_carried_out_once(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data") as services:
        with running(create_app(services)) as url:
            port = urlsplit(url).port or 0
            client = Client(url, retry_seconds=20)
            task = client.create_task("mood", PAIRS, labels=("good", "bad"))
        changes: list[Change] = []
        writing = threading.Thread(target=lambda: changes.append(task.add([("a waste", "bad")])))
        writing.start()
        writing.join(0.5)
        assert writing.is_alive(), "nothing answers now"
        with running(create_app(services), port):
            writing.join(20)
            assert [change.task.num_demonstrations for change in changes] == [4]
            assert task.predict(["a waste"])[0].answer == "bad"
            client.close()


def test_a_starter_table_is_pushed_and_pulled(
    served: tuple[str, FakeWorker], client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYICL_URL", served[0])
    (folder,) = [one for one in write_starter_tables(tmp_path / "tables") if one.name == "tickets"]

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    original = load_task(folder)
    assert f"made with {len(original.train)} demonstrations" in run("push", folder)
    assert run("push", folder).endswith("tickets: 0 added\n")  # after the log of the server
    assert [task.num_demonstrations for task in client.tasks()] == [len(original.train)]
    run("pull", "tickets", tmp_path / "copy")
    copy = load_task(tmp_path / "copy")
    assert copy.spec == original.spec
    assert [one.query.text for one in copy.train] == [one.query.text for one in original.train]


def test_a_push_ends_with_the_reason_where_the_task_cannot_be_compiled(
    served: tuple[str, FakeWorker], client: Client, tmp_path: Path
) -> None:
    table = tmp_path / "odd.csv"
    table.write_text(f"text,label\na,{BROKEN}\nb,other\n")
    arguments = ["push", f"{table}:text:label,test_fraction=0", "--url", served[0]]
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert caught.value.code == "broken_labels"
    assert [task.state for task in client.tasks()] == ["failed"]


def test_known_answers_are_compared_at_once_and_by_a_job(client: Client, mood: RemoteTask) -> None:
    rows = [{"query": "so dull", "answer": "bad"}, {"query": "what a film", "answer": "bad"}]
    found = mood.evaluate(rows)
    assert found["num_rows"] == 2
    job = mood.submit(rows, kind="evaluate")
    info = job.wait(timeout=30)
    assert (info.state, info.num_done, info.num_problems) == ("done", 2, 0)
    assert info.summary is not None
    assert info.summary["accuracy"] == found["accuracy"] == 0.5
    assert [one.id for one in client.jobs()] == [job.id]


def test_a_job_answers_rows_in_order_with_the_problems_of_bad_ones(client: Client, mood: RemoteTask) -> None:
    job = mood.submit(["so dull", TOO_LONG, "what a film"], idempotency_key="of a job")
    assert job.wait(timeout=30).num_problems == 1
    results = list(job.results())
    assert [one.answer for one in results] == ["bad", None, "good"]
    assert results[1].problem is not None
    assert mood.submit(["so dull", TOO_LONG, "what a film"], idempotency_key="of a job").id == job.id
    job.cancel()
    with pytest.raises(UserError) as caught:
        job.info()
    assert caught.value.code == "unknown_job"


def test_texts_fill_the_only_column_of_a_task(client: Client, mood: RemoteTask) -> None:
    assert [one.answer for one in mood.predict(["so dull", "what a film"])] == ["bad", "good"]
    assert [one.answer for one in mood.predict_each(["so dull"])] == ["bad"]
    rows = [{"a": "x", "b": "y", "label": "1"}, {"a": "z", "b": "y", "label": "2"}]
    keys = {"query": "{{ a }} {{ b }}", "answer": "{{ label }}"}
    two = client.create_task("two", rows, labels="from_train", **keys)  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        two.predict(["x"])
    assert caught.value.code == "query_needs_columns"
