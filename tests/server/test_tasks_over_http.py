"""Tasks are made, changed and read over HTTP; what is acknowledged is there, once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from starlette.testclient import TestClient

from manyicl.errors import MachineError
from manyicl.server.database import FILE_NAME, Database
from manyicl.server.services import Services
from manyicl.server.task_service import TaskService
from tests.server.fakes import BROKEN, echo_task, fake_client, fake_worker, mood_task


@pytest.fixture(name="client")
def _client(tmp_path: Path) -> Iterator[TestClient]:
    with fake_client(tmp_path / "data") as client:
        yield client


def services_of(client: TestClient) -> Services:
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    return services


def made(client: TestClient, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = client.post("/v1/tasks", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    task: dict[str, Any] = answer.json()
    return task


def ready(client: TestClient, task: str) -> dict[str, Any]:
    """Wait until the newest version is settled: a prediction for it waits."""
    version = client.get(f"/v1/tasks/{task}").json()["version"]
    client.post(f"/v1/tasks/{task}/predict", json={"rows": [{"text": "x", "query": "x"}], "version": version})
    found: dict[str, Any] = client.get(f"/v1/tasks/{task}").json()
    return found


def test_a_task_is_made_of_rows_and_found_by_id_and_name(client: TestClient) -> None:
    answer = client.post("/v1/tasks", json=mood_task())
    task = answer.json()
    assert (answer.status_code, answer.headers["etag"]) == (201, '"1"')
    assert answer.headers["location"] == f"/v1/tasks/{task['id']}"
    assert task["labels"] == ["bad", "good"]
    found = ready(client, "mood")
    assert found["id"] == task["id"] == client.get(answer.headers["location"]).json()["id"]
    assert (found["state"], found["ready_version"], found["num_shots"], found["num_tokens"]) == ("ready", 1, 3, 30)
    assert found["majority"] == pytest.approx(2 / 3)
    assert found["curve"][0] == {
        "shots": [0, 0],
        "num_answers": 1,
        "accuracy": 0.0,
        "standard_error": None,
        "nats_per_answer": 0.5,
    }
    assert client.get("/v1/tasks/mood/curve").json()["curve"] == found["curve"]


def test_columns_are_query_and_answer_unless_templates_say_otherwise(client: TestClient) -> None:
    task = made(client, echo_task())
    assert task["task"] == {"family": "generation", "query": "{{ query }}", "answer": "{{ answer }}"}
    assert task["labels"] is None


def test_numbers_stay_the_text_that_was_sent_and_labels_may_be_numbers(client: TestClient) -> None:
    body = '{"name": "stars", "task": {"labels": [1, 2]}, "demonstrations": [{"query": 1.50, "answer": 1}]}'
    answer = client.post("/v1/tasks", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["labels"] == ["1", "2"]
    rows = client.get("/v1/tasks/stars/demonstrations").json()["data"]
    assert rows == [{"number": 1, "added_in": 1, "columns": {"query": "1.50", "answer": "1"}}]


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("application/x-ndjson", '{"query": "a", "answer": "x"}\n\n{"query": "b", "answer": "y"}\n'),
        ("text/csv", "query,answer\na,x\nb,y\n"),
        ("text/tab-separated-values", "query\tanswer\na\tx\nb\ty\n"),
    ],
)
def test_a_task_is_made_of_lines_and_of_a_table(client: TestClient, content_type: str, content: str) -> None:
    query = {"name": "letters", "labels": "from_train"}
    headers = {"Content-Type": content_type}
    answer = client.post("/v1/tasks", params=query, content=content, headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.json()["labels"] == ["x", "y"]
    assert answer.json()["task"]["family"] == "classification"


def test_a_task_is_made_of_a_form_with_a_file(client: TestClient) -> None:
    fields = {"name": "letters", "task": json.dumps({"labels": ["x", "y", "z"]}), "settings": '{"pinned": true}'}
    files = {"file": ("rows.csv", b"query,answer\na,x\nb,y\n", "application/octet-stream")}
    answer = client.post("/v1/tasks", data=fields, files=files)
    assert answer.status_code == 201, answer.text
    assert answer.json()["labels"] == ["x", "y", "z"]
    assert answer.json()["settings"]["pinned"] is True


def test_a_template_in_a_field_of_a_form_is_a_text_and_broken_json_names_its_field(client: TestClient) -> None:
    files = {"file": ("rows.csv", b"text,answer\na,x\nb,y\n", "text/csv")}
    answer = client.post("/v1/tasks", data={"name": "letters", "query": "{{ text }}"}, files=files)
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, "unknown_key", "query")
    broken = client.post("/v1/tasks", data={"name": "letters", "task": "{'labels': 1}"}, files=files)
    assert (broken.status_code, broken.json()["code"], broken.json()["field"]) == (400, "broken_json", "task")


def test_an_error_of_several_rows_says_what_is_wrong_with_the_first(client: TestClient) -> None:
    rows = [{"query": "a", "answer": "x"}, {"text": "b"}, {"text": "c"}]
    answer = client.post("/v1/tasks", json={"name": "t", "demonstrations": rows})
    assert "2 rows of 3 cannot be used; the first is row 2: " in answer.json()["detail"]
    assert "names the column 'query', which is missing" in answer.json()["detail"]


def test_a_body_without_rows_is_told_which_keys_it_has(client: TestClient) -> None:
    made(client, mood_task())
    answer = client.post("/v1/tasks/mood/predict", json={"text": "so dull"})
    assert (answer.json()["code"], answer.json()["field"]) == ("no_rows", "rows")
    assert answer.json()["found"] == "the keys 'text'"


def test_each_change_makes_a_version_and_an_earlier_one_comes_back(client: TestClient) -> None:
    made(client, mood_task())
    rows = {"demonstrations": [{"text": "meh", "label": "mixed"}]}
    added = client.post("/v1/tasks/mood/demonstrations", json=rows).json()
    assert (added["version"]["version"], added["numbers"], added["version"]["labels"]) == (
        2,
        [4, 4],
        ["bad", "good", "mixed"],
    )
    corrected = client.patch("/v1/tasks/mood/demonstrations/2", json={"text": "so dull", "label": "mixed"})
    assert (corrected.status_code, corrected.headers["etag"]) == (200, '"3"')
    removed = client.delete("/v1/tasks/mood/demonstrations/4").json()
    assert removed["version"]["labels"] == ["good", "mixed"]
    restored = client.post("/v1/tasks/mood/versions/1/restore", json={})
    assert (restored.status_code, restored.json()["version"]["change"]) == (201, "restored")
    versions = client.get("/v1/tasks/mood/versions").json()["data"]
    changes = ["created", "added", "corrected", "removed", "restored"]
    assert [(one["version"], one["change"], one["num_demonstrations"]) for one in versions] == list(
        zip(range(1, 6), changes, (3, 4, 4, 3, 3), strict=True)
    )
    first = client.get("/v1/tasks/mood/demonstrations", params={"version": 1}).json()["data"]
    last = client.get("/v1/tasks/mood/demonstrations").json()["data"]
    assert [row["columns"] for row in first] == [row["columns"] for row in last] == mood_task()["demonstrations"]


def test_demonstrations_come_as_pages_and_as_lines(client: TestClient) -> None:
    made(client, mood_task())
    page = client.get("/v1/tasks/mood/demonstrations", params={"limit": 2}).json()
    rest = client.get("/v1/tasks/mood/demonstrations", params={"cursor": page["next_cursor"]}).json()
    assert [row["number"] for row in (*page["data"], *rest["data"])] == [1, 2, 3]
    assert rest["next_cursor"] is None
    refused = client.get("/v1/tasks/mood/demonstrations", params={"cursor": "2"})
    assert (refused.status_code, refused.json()["code"]) == (422, "bad_cursor")
    lines = client.get("/v1/tasks/mood/demonstrations", headers={"Accept": "application/x-ndjson"})
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["number"] for line in lines.text.splitlines()] == [1, 2, 3]


def test_the_order_in_the_context_is_mixed_and_a_change_leaves_what_comes_before(client: TestClient) -> None:
    rows = [{"query": f"q{n}", "answer": "a" if n < 20 else "b"} for n in range(40)]
    task = made(client, {"name": "sorted", "task": {"labels": ["a", "b"]}, "demonstrations": rows})
    service, tasks = services_of(client).service, services_of(client).tasks

    def order(version: int) -> list[str]:
        key = tasks.version(tasks.get("local", task["id"]).newest.key._replace(version=version)).key
        return [example.query.text for example in service.source(key).task.train]

    first = order(1)
    assert sorted(first) == sorted(row["query"] for row in rows)
    answers = ["a" if int(text[1:]) < 20 else "b" for text in first]
    assert all(set(answers[n : n + 2]) == {"a", "b"} for n in range(0, 40, 2))
    client.patch("/v1/tasks/sorted/demonstrations/8", json={"query": "q7, better", "answer": "b"})
    assert order(2) == [text if text != "q7" else "q7, better" for text in first]
    client.delete("/v1/tasks/sorted/demonstrations/8")
    assert order(3) == [text for text in first if text != "q7"]
    client.post("/v1/tasks/sorted/demonstrations", json={"demonstrations": [{"query": "new", "answer": "a"}]})
    assert order(4) == [*order(3), "new"]


def test_a_new_version_is_compiled_from_the_newest_one_that_is_ready(client: TestClient) -> None:
    task = made(client, mood_task())
    ready(client, "mood")
    services = services_of(client)
    fake_worker(services).compiles.clear()
    for text in ("one", "two"):
        client.post("/v1/tasks/mood/demonstrations", json={"demonstrations": [{"text": text, "label": "good"}]})
    newest = services.tasks.get("local", task["id"]).newest.key
    source = services.service.source(newest)
    assert (newest.version, source.answers, source.earlier) == (3, None, newest._replace(version=1))
    first = services.service.source(newest._replace(version=1))
    assert first.answers is not None
    assert first.earlier is None
    fake_worker(services).compiles.set()


def test_no_change_changes_no_revision(client: TestClient) -> None:
    made(client, mood_task())
    for changes in ({}, {"name": "mood"}, {"name": "mood", "pinned": False}):
        unchanged = client.patch("/v1/tasks/mood", json=changes)
        assert (unchanged.status_code, unchanged.headers["etag"], unchanged.json()["revision"]) == (200, '"1"', 1)


def test_settings_and_name_change_under_an_etag(client: TestClient) -> None:
    task = made(client, mood_task())
    body = {"name": "temper", "pinned": True, "abstain_below": 0.5}
    changed = client.patch("/v1/tasks/mood", json=body, headers={"If-Match": '"1"'})
    assert changed.json()["settings"] | {"pinned": True, "abstain_below": 0.5} == changed.json()["settings"]
    assert fake_worker(services_of(client)).pinned == {task["id"]: True}
    late = client.patch("/v1/tasks/temper", json={"pinned": False}, headers={"If-Match": '"1"'})
    assert (late.status_code, late.json()["code"]) == (412, "changed_meanwhile")
    assert client.patch("/v1/tasks/temper", json={"abstain_below": None}).json()["settings"]["abstain_below"] is None
    assert client.get("/v1/tasks/mood").status_code == 404


@pytest.mark.parametrize("if_match", ['W/"1"', '"7"', '"x"', '""'])
def test_a_write_for_another_revision_is_refused(client: TestClient, if_match: str) -> None:
    made(client, mood_task())
    for method, path, body in (
        ("POST", "/v1/tasks/mood/demonstrations", {"demonstrations": [{"text": "n", "label": "bad"}]}),
        ("PATCH", "/v1/tasks/mood/demonstrations/1", {"text": "n", "label": "bad"}),
        ("DELETE", "/v1/tasks/mood/demonstrations/1", None),
        ("POST", "/v1/tasks/mood/versions/1/restore", {}),
        ("PATCH", "/v1/tasks/mood", {"pinned": True}),
        ("DELETE", "/v1/tasks/mood", None),
    ):
        answer = client.request(method, path, json=body, headers={"If-Match": if_match})
        assert (answer.status_code, answer.json()["code"]) == (412, "changed_meanwhile"), path
    assert client.get("/v1/tasks/mood").json()["revision"] == 1


def test_the_same_request_with_its_key_is_done_once(client: TestClient) -> None:
    key = {"Idempotency-Key": "5f0c"}
    first = client.post("/v1/tasks", json=mood_task(), headers=key)
    again = client.post("/v1/tasks", json=mood_task(), headers=key)
    assert first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
    other = client.post("/v1/tasks", json=mood_task("other"), headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    rows = {"demonstrations": [{"text": "n", "label": "bad"}]}
    for _ in range(3):
        added = client.post("/v1/tasks/mood/demonstrations", json=rows, headers={"Idempotency-Key": "add"})
        assert added.json()["version"]["version"] == 2
    assert client.get("/v1/tasks/mood").json()["num_demonstrations"] == 4
    assert len(client.get("/v1/tasks").json()["data"]) == 1


def test_a_form_that_is_sent_again_is_the_same_request_whatever_its_boundary(client: TestClient) -> None:
    for replayed in (None, "true"):
        files = {"file": ("rows.csv", b"query,answer\na,x\nb,y\n", "text/csv")}
        answer = client.post("/v1/tasks", data={"name": "t"}, files=files, headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.headers.get("idempotent-replayed")) == (201, replayed)


def test_the_characters_of_a_task_are_limited(tmp_path: Path) -> None:
    with fake_client(tmp_path / "data", max_task_characters=20) as client:
        rows = [{"query": "ab", "answer": "x"}, {"query": "c" * 15, "answer": "y"}]
        made(client, {"name": "t", "demonstrations": rows})
        answer = client.post("/v1/tasks/t/demonstrations", json={"demonstrations": [{"query": "d", "answer": "z"}]})
        assert (answer.status_code, answer.json()["code"]) == (413, "task_too_large")
        assert (answer.json()["expected"], answer.json()["found"]) == ("at most 20 characters", "21")


def test_the_most_frequent_answer_is_counted_as_answers_are_read(client: TestClient) -> None:
    rows = [{"query": number, "answer": number} for number in "012"]
    task = {"labels": "from_train", "class_names": {"answer": {"0": "neg", "1": "pos", "2": "neg"}}}
    found = made(client, {"name": "t", "task": task, "demonstrations": rows})
    services = services_of(client)
    record = services.tasks.get("local", "t")
    restarted = TaskService(services.tasks, services.settings, "fake-model")
    assert found["majority"] == restarted.majority(record, record.newest) == pytest.approx(2 / 3)


def test_all_bad_rows_are_named_and_nothing_is_stored(client: TestClient) -> None:
    rows = [{"query": "a", "answer": "x"}, {"query": "b"}, {"query": "", "answer": "x"}, {"query": "c", "answer": "y"}]
    answer = client.post("/v1/tasks", json={"name": "t", "task": {"labels": ["x", "z"]}, "demonstrations": rows})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    errors = answer.json()["errors"]
    assert [(one["row"], one["code"]) for one in errors] == [
        (2, "missing_column"),
        (3, "empty_query"),
        (4, "unknown_label"),
    ]
    assert errors[1]["detail"].startswith("Demonstration 3: ")
    alone = client.post("/v1/tasks", json={"name": "t", "demonstrations": [rows[0], rows[2]]}).json()
    assert (alone["row"], alone["detail"].split(": ")[0]) == (2, "Demonstration 2")
    assert client.get("/v1/tasks").json() == {"data": [], "next_cursor": None}


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"name": "a b"}, "wrong_value", "name"),
        ({"name": "tsk_1"}, "wrong_value", "name"),
        ({"name": ".."}, "wrong_value", "name"),
        ({"nam": "x"}, "unknown_key", "nam"),
        ({"task": {"query": "{{ query"}}, "broken_template", "query"),
        ({"task": {"query": "x" * 20_001}}, "text_too_long", "task.query"),
        ({"task": {"description": "x" * 20_001}}, "text_too_long", "task.description"),
        ({"task": {"instruction": "{{ '\\ud800' }}"}}, "half_a_character", "instruction"),
        ({"task": {"data": {"file": "/etc/passwd"}}}, "unknown_key", "task.data"),
        ({"task": {"labels": ["one"]}}, "wrong_value", "task.labels"),
        ({"settings": {"num_shots": -1}}, "wrong_value", "settings.num_shots"),
        ({"settings": {"abstain_below": 0.5}}, "conflicting_options", "abstain_below"),
        ({"settings": {"blend": True}}, "not_blendable", "blend"),
        ({"demonstrations": []}, "no_rows", "demonstrations"),
        ({"demonstrations": "x"}, "not_a_list", "demonstrations"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_its_field(
    client: TestClient, changes: dict[str, Any], code: str, field: str
) -> None:
    answer = client.post("/v1/tasks", json={**echo_task(), **changes})
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem.get("field")) == (422, code, field), problem


def test_a_server_without_its_database_is_not_ready(client: TestClient) -> None:
    file = services_of(client).settings.data / FILE_NAME
    file.rename(aside := file.with_name("aside"))
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")
    aside.rename(file)
    assert client.get("/readyz").json()["status"] == "ready"


@pytest.mark.parametrize("name", ["a b", "a/b", "a@1", "a,b", "a:b", "a\u200bb", "a\u202eb", "\ufeffa"])
def test_a_name_is_refused_with_what_a_name_may_not_hold(client: TestClient, name: str) -> None:
    expected = client.post("/v1/tasks", json=echo_task(name)).json()["expected"]
    assert expected.endswith("no spaces, invisible characters, '/', '\\', ',', ':' or '@'")


def test_what_is_wrong_is_said_without_names_of_the_code(client: TestClient) -> None:
    detail = client.post("/v1/tasks", json={**echo_task(), "settings": []}).json()["detail"]
    assert detail == "settings: input should be a mapping; found []."


def test_errors_of_rows_stay_short_whatever_names_columns_have(client: TestClient) -> None:
    column = "".join(chr(ord("a") + number % 26) for number in range(19_000))
    made(
        client,
        {"name": "t", "task": {"query": f"{{{{ {column} }}}}"}, "demonstrations": [{column: "a", "answer": "b"}]},
    )
    rows = [{f"c{number}": 1 for number in range(5_000)}, {"z" * 20_000: 1}, {f"{column[:-1]}1": 1}]
    errors = client.post("/v1/tasks/t/predict", json={"rows": rows}).json()["errors"]
    assert [one["code"] for one in errors] == ["missing_column"] * len(rows)
    assert max(len(str(one)) for one in errors) < 1_500


@pytest.mark.parametrize("body", ["", "{", "[]", '{"name": NaN}', '{"name": "a", "name": "b"}', "\ufeff{", '"x"'])
def test_a_body_that_is_no_object_is_refused(client: TestClient, body: str) -> None:
    answer = client.post("/v1/tasks", content=body.encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["status"] == answer.status_code


def test_deeply_nested_json_and_halves_of_characters_are_refused(client: TestClient) -> None:
    for body in (
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"name": "\\ud800"}',
        '{"name": "x", "demonstrations": [{"a\\u0000": 1}]}',
    ):
        answer = client.post("/v1/tasks", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), answer.text


def test_names_are_unique_and_pages_follow_each_other(client: TestClient) -> None:
    for number in range(5):
        made(client, echo_task(f"echo{number}"))
    taken = client.post("/v1/tasks", json=echo_task("echo3"))
    assert (taken.status_code, taken.json()["code"]) == (409, "name_taken")
    names, cursor = [], None
    while True:
        query = {"limit": 2} if cursor is None else {"limit": 2, "cursor": cursor}
        page = client.get("/v1/tasks", params=query).json()
        names += [task["name"] for task in page["data"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert names == [f"echo{number}" for number in range(5)]


def test_a_deleted_task_is_gone_and_the_worker_forgets_it(client: TestClient) -> None:
    task = made(client, mood_task())
    assert client.delete("/v1/tasks/mood").status_code == 204
    assert fake_worker(services_of(client)).forgotten[0] == task["id"]
    for path in ("mood", task["id"], f"{task['id']}/versions", f"{task['id']}/demonstrations"):
        assert client.get(f"/v1/tasks/{path}").json()["code"] == "unknown_task"


def test_a_version_that_cannot_be_compiled_says_why_and_the_one_before_answers(client: TestClient) -> None:
    made(client, mood_task())
    ready(client, "mood")
    client.post("/v1/tasks/mood/demonstrations", json={"demonstrations": [{"text": "b", "label": BROKEN}]})
    found = ready(client, "mood")
    assert (found["state"], found["version"], found["ready_version"]) == ("failed", 2, 1)
    assert found["problem"]["code"] == "broken_labels"
    rows = {"rows": [{"text": "so dull"}]}
    assert client.post("/v1/tasks/mood/predict", json=rows).json()["version"] == 1
    failed = client.post("/v1/tasks/mood/predict", json={**rows, "version": 2})
    assert (failed.status_code, failed.json()["code"]) == (409, "version_failed")
    assert "cannot be told apart" in failed.json()["detail"]


def test_the_last_demonstration_stays_and_labels_cannot_become_one(client: TestClient) -> None:
    made(client, {"name": "one", "demonstrations": [{"query": "a", "answer": "b"}]})
    assert client.delete("/v1/tasks/one/demonstrations/1").json()["code"] == "last_demonstration"
    made(client, mood_task())
    assert client.delete("/v1/tasks/mood/demonstrations/2").json()["code"] == "one_label"
    assert client.delete("/v1/tasks/mood/demonstrations/9").json()["code"] == "unknown_demonstration"


def test_more_demonstrations_than_the_limit_are_refused(tmp_path: Path) -> None:
    with fake_client(tmp_path / "data", max_demonstrations=3) as client:
        made(client, mood_task())
        answer = client.post("/v1/tasks/mood/demonstrations", json={"demonstrations": [{"text": "n", "label": "bad"}]})
        assert (answer.status_code, answer.json()["code"]) == (413, "too_many_demonstrations")


def test_templates_of_a_request_are_bounded_in_time(tmp_path: Path) -> None:
    loops = "{% for a in range(200) %}{% for b in range(200) %}{% endfor %}{% endfor %}{{ query }}"
    rows = [{"query": str(number), "answer": "x"} for number in range(1000)]
    with fake_client(tmp_path / "data", render_seconds=0.3) as client:
        body = {"name": "slow", "task": {"query": loops}, "demonstrations": rows}
        answer = client.post("/v1/tasks", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "templates_too_slow"), answer.text
        made(client, {**body, "demonstrations": rows[:1]})
        answer = client.post("/v1/tasks/slow/predict", json={"rows": rows})
        assert answer.json()["code"] == "templates_too_slow"


def test_a_write_whose_commit_is_in_doubt_is_answered_with_how_to_find_out(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(client, mood_task())
    writing = Database.writing

    @contextmanager
    def writing_and_broken(database: Database) -> Iterator[Connection]:
        with writing(database) as connection:
            yield connection
        raise MachineError("The database failed: the connection is closed.")

    rows, key = {"demonstrations": [{"text": "n", "label": "bad"}]}, {"Idempotency-Key": "add"}
    monkeypatch.setattr(Database, "writing", writing_and_broken)
    doubtful = client.post("/v1/tasks/mood/demonstrations", json=rows, headers=key)
    assert (doubtful.status_code, doubtful.json()["code"]) == (503, "machine_failed")
    assert "send the request again with the same Idempotency-Key" in doubtful.json()["remedy"]
    assert "Nothing" not in doubtful.json()["detail"]
    monkeypatch.setattr(Database, "writing", writing)
    again = client.post("/v1/tasks/mood/demonstrations", json=rows, headers=key)
    assert (again.status_code, again.headers["idempotent-replayed"], again.json()["numbers"]) == (201, "true", [4, 4])
    assert client.get("/v1/tasks/mood").json()["num_demonstrations"] == 4


def test_a_lost_database_is_a_failure_of_the_machine_and_paths_stay_in_the_log(
    client: TestClient, tmp_path: Path
) -> None:
    made(client, mood_task())
    ready(client, "mood")
    (tmp_path / "data" / "manyicl.sqlite").rename(tmp_path / "lost")
    for answer in (
        client.get("/v1/tasks/mood"),
        client.post("/v1/tasks", json=echo_task()),
        client.post("/v1/tasks/mood/predict", json={"rows": [{"text": "a"}]}),
        client.delete("/v1/tasks/mood"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "machine_failed")
        assert str(tmp_path) not in answer.text
        assert "retry-after" in answer.headers
    assert client.get("/healthz").status_code == 200
    (tmp_path / "lost").rename(tmp_path / "data" / "manyicl.sqlite")
    assert client.get("/v1/tasks/mood").json()["state"] == "ready"


def test_a_task_is_deleted_even_where_its_prefixes_cannot_be(client: TestClient) -> None:
    made(client, mood_task())
    failed: Future[None] = Future()
    failed.set_exception(OSError("the disk is broken"))
    fake_worker(services_of(client)).forget = lambda task_id: failed  # type: ignore[method-assign]
    assert client.delete("/v1/tasks/mood").status_code == 204
    assert client.get("/v1/tasks/mood").status_code == 404
