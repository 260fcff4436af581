"""A server that is killed at any moment keeps every acknowledged write exactly once."""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server_processes import ServerProcess, server_process

# Words that the tokenizer of the small model knows.
LABELS = ("hat", "lamp")
NUM_WRITERS = 4
MOST_WRITES_BETWEEN = 40
MOST_TASKS = 4
GIVE_UP_SECONDS = 180
PAUSE = 0.05
# Share of the writes that are not sent again when the answer does not come.
ABANDONED = 0.25
AWAY = (429, 503)

Rows = dict[int, dict[str, str]]


@dataclass
class Expected:
    """A task as its writer knows it.

    Attributes:
        id: Its id.
        versions: What made each version, and its demonstrations by number.
        num_numbers: Numbers given so far.
        jobs: Jobs on it.
    """

    id: str
    versions: list[tuple[str, Rows]]
    num_numbers: int
    jobs: list[str] = field(default_factory=list)


class NoAnswerError(Exception):
    """The server went away before it answered, and the write is not sent again."""


class Writer(threading.Thread):
    """Writes to tasks of its own at random, and keeps what the server must hold then."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(name=f"writer {seed}")
        self.url = url
        self.rng = random.Random(seed)
        self.seed = seed
        self.is_over, self.is_lost = threading.Event(), threading.Event()
        self.tasks: list[Expected] = []
        self.deleted: list[str] = []
        self.num_acknowledged = self.num_sent_again = self.num_replayed = self.num_abandoned = 0
        self.num_texts = self.num_names = 0
        self.error: BaseException | None = None
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def run(self) -> None:
        try:
            while not self.is_over.is_set():
                self.write()
        except BaseException as error:
            self.error = error

    def write(self) -> None:
        choice = self.rng.random()
        if not self.tasks or (choice < 0.1 and len(self.tasks) < MOST_TASKS):
            self.create()
            return
        task = self.rng.choice(self.tasks)
        numbers = sorted(task.versions[-1][1])
        if choice < 0.5:
            self.add(task)
        elif choice < 0.7:
            self.correct(task, self.rng.choice(numbers))
        elif choice < 0.8 and len(numbers) > 2:
            self.remove(task, self.rng.choice(numbers))
        elif choice < 0.9:
            self.restore(task, self.rng.randint(1, len(task.versions)))
        elif choice < 0.97:
            self.make_job(task)
        else:
            self.delete(task)

    def row(self) -> dict[str, str]:
        self.num_texts += 1
        return {"text": f"text {self.seed} {self.num_texts}", "label": self.rng.choice(LABELS)}

    def create(self) -> None:
        self.num_names += 1
        name, rows = f"task-{self.seed}-{self.num_names}", [self.row() for _ in range(self.rng.randint(2, 4))]
        keys = {"query": "{{ text }}", "answer": "{{ label }}", "labels": list(LABELS)}
        body = {"name": name, "task": keys, "demonstrations": rows}
        try:
            answer = self.send("POST", "/v1/tasks", body, 201)
        except NoAnswerError:
            found = self.read(f"/v1/tasks/{name}")
            if found.status_code == 404:
                return
            answer = found.json()
        assert answer["version"] == 1
        by_number = dict(enumerate(rows, start=1))
        self.tasks.append(Expected(answer["id"], [("created", by_number)], len(rows)))

    def add(self, task: Expected) -> None:
        rows = [self.row() for _ in range(self.rng.randint(1, 3))]
        new = {task.num_numbers + n: row for n, row in enumerate(rows, start=1)}
        after = {**task.versions[-1][1], **new}
        if self.change(task, "added", after, "POST", "demonstrations", {"demonstrations": rows}):
            task.num_numbers += len(rows)

    def correct(self, task: Expected, number: int) -> None:
        row = self.row()
        after = {**task.versions[-1][1], number: row}
        self.change(task, "corrected", after, "PATCH", f"demonstrations/{number}", row)

    def remove(self, task: Expected, number: int) -> None:
        after = {n: row for n, row in task.versions[-1][1].items() if n != number}
        self.change(task, "removed", after, "DELETE", f"demonstrations/{number}", None)

    def restore(self, task: Expected, version: int) -> None:
        self.change(task, "restored", task.versions[version - 1][1], "POST", f"versions/{version}/restore", None)

    def change(self, task: Expected, change: str, after: Rows, method: str, path: str, body: Any) -> bool:
        """Send a change of demonstrations; tell whether it was carried out."""
        status = 201 if method == "POST" else 200
        try:
            answer = self.send(method, f"/v1/tasks/{task.id}/{path}", body, status)
        except NoAnswerError:
            newest = self.read(f"/v1/tasks/{task.id}").json()["version"]
            assert newest in (len(task.versions), len(task.versions) + 1)
            found = self.demonstrations(task, newest)
            if newest == len(task.versions):
                assert found == task.versions[-1][1]
                return False
            assert found == after
        else:
            assert answer["version"]["version"] == len(task.versions) + 1, (change, answer)
        task.versions.append((change, dict(after)))
        return True

    def make_job(self, task: Expected) -> None:
        body = {"kind": "predict", "task": task.id, "rows": [{"text": f"query {n}"} for n in range(3)]}
        task.jobs.append(self.send("POST", "/v1/jobs", body, 202, may_abandon=False)["id"])

    def delete(self, task: Expected) -> None:
        key, has_failed = uuid.uuid4().hex, False
        while not self.is_lost.is_set():
            try:
                status = self.once("DELETE", f"/v1/tasks/{task.id}", None, key).status_code
            except httpx.TransportError:
                has_failed = True
                time.sleep(PAUSE)
                continue
            assert status in (204, *AWAY) or (status == 404 and has_failed)
            if status not in AWAY:
                break
        self.num_acknowledged += 1
        self.tasks.remove(task)
        self.deleted.append(task.id)

    def send(self, method: str, path: str, body: Any, status: int, *, may_abandon: bool = True) -> dict[str, Any]:
        """Send a write until it is answered, with one idempotency key; or give it up when the server goes away."""
        key, deadline = uuid.uuid4().hex, time.monotonic() + GIVE_UP_SECONDS
        is_abandoned, is_again = may_abandon and self.rng.random() < ABANDONED, False
        while True:
            assert not self.is_lost.is_set()
            assert time.monotonic() < deadline, f"{method} {path} is never answered"
            try:
                response = self.once(method, path, body, key)
            except httpx.TransportError:
                if is_abandoned:
                    self.num_abandoned += 1
                    raise NoAnswerError from None
                self.num_sent_again += not is_again
                is_again = True
                time.sleep(PAUSE)
                continue
            if response.status_code in AWAY:
                time.sleep(PAUSE)
                continue
            assert response.status_code == status, (method, path, response.status_code, response.text)
            self.num_acknowledged += 1
            self.num_replayed += "idempotent-replayed" in response.headers
            found: dict[str, Any] = response.json()
            return found

    def once(self, method: str, path: str, body: Any, key: str) -> httpx.Response:
        content = None if body is None else json.dumps(body).encode()
        headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
        return self.client.request(method, path, content=content, headers=headers)

    def read(self, path: str, **parameters: Any) -> httpx.Response:
        """Read until the server answers."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while True:
            assert not self.is_lost.is_set()
            assert time.monotonic() < deadline, f"{path} is never answered"
            try:
                response = self.client.get(path, params=parameters, headers={"Accept": "application/x-ndjson, */*"})
            except httpx.TransportError:
                time.sleep(PAUSE)
                continue
            if response.status_code not in AWAY:
                assert response.status_code < 500
                return response

    def demonstrations(self, task: Expected, version: int) -> Rows:
        lines = self.read(f"/v1/tasks/{task.id}/demonstrations", version=version).text.splitlines()
        return {one["number"]: one["columns"] for one in map(json.loads, lines)}


def pages(writer: Writer, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        page = writer.read(path, limit=100, **({} if cursor is None else {"cursor": cursor})).json()
        found += page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def wait_until(is_so: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, why
        time.sleep(0.1)


def wait_for_writes(writers: list[Writer], number: int) -> None:
    """Wait until so many further writes are acknowledged, however fast this machine is."""
    before, deadline = sum(writer.num_acknowledged for writer in writers), time.monotonic() + GIVE_UP_SECONDS
    while sum(writer.num_acknowledged for writer in writers) < before + number:
        assert time.monotonic() < deadline, "hardly anything is acknowledged"
        assert not any(writer.error for writer in writers)
        time.sleep(0.002)


def kill_at_random(server: ServerProcess, writers: list[Writer], num_kills: int, rng: random.Random) -> None:
    for _ in range(num_kills):
        is_early = rng.random() < 0.15  # while it starts, migrates and resumes
        server.start(waits=not is_early)
        if not is_early:
            wait_for_writes(writers, rng.randint(0, MOST_WRITES_BETWEEN))
        time.sleep(rng.uniform(0.0, 0.2))
        server.kill()
        assert [writer.error for writer in writers if writer.error] == []
    server.start()


def require_all_as_expected(writers: list[Writer]) -> None:
    """Check that the server holds what the writers know, once, and nothing else."""
    reader = writers[0]
    expected = {task.id: task for writer in writers for task in writer.tasks}
    assert {task["id"] for task in pages(reader, "/v1/tasks")} == set(expected)
    for task in expected.values():
        versions = pages(reader, f"/v1/tasks/{task.id}/versions")
        assert [one["version"] for one in versions] == list(range(1, len(task.versions) + 1))
        assert [one["change"] for one in versions] == [change for change, _ in task.versions]
        for number, (_, rows) in enumerate(task.versions, start=1):
            assert reader.demonstrations(task, number) == rows, (task.id, number)
    deleted = [task_id for writer in writers for task_id in writer.deleted]
    assert all(reader.read(f"/v1/tasks/{task_id}").status_code == 404 for task_id in deleted)
    jobs = [job for task in expected.values() for job in task.jobs]
    assert sorted(job["id"] for job in pages(reader, "/v1/jobs")) == sorted(jobs)


def require_work_resumed(writers: list[Writer]) -> None:
    """Check that every task gets ready and every job is done, each row with one result."""
    reader = writers[0]
    tasks = [task for writer in writers for task in writer.tasks]
    for task in tasks:
        path = f"/v1/tasks/{task.id}"
        wait_until(lambda path=path: reader.read(path).json()["state"] == "ready", "a task never gets ready")  # type: ignore[misc]
        for job in task.jobs:
            path = f"/v1/jobs/{job}"
            wait_until(lambda path=path: reader.read(path).json()["state"] == "done", "a job is never done")  # type: ignore[misc]
            results = [json.loads(line) for line in reader.read(f"{path}/results").text.splitlines()]
            assert [one["row"] for one in results] == [1, 2, 3]
            assert all(one["answer"] in LABELS for one in results)


def run(folder: Path, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    with server_process(folder / "data", folder / "server.log") as server:
        writers = [Writer(server.url, seed * 100 + n) for n in range(NUM_WRITERS)]
        for writer in writers:
            writer.start()
        try:
            kill_at_random(server, writers, num_kills, rng)
        except BaseException:
            for writer in writers:
                writer.is_lost.set()
            raise
        finally:
            for writer in writers:
                writer.is_over.set()
            for writer in writers:
                writer.join(GIVE_UP_SECONDS)
        assert [writer.error for writer in writers if writer.error] == []
        require_all_as_expected(writers)
        require_work_resumed(writers)
        server.kill()
        server.start()
        require_all_as_expected(writers)
        for writer in writers:
            writer.client.close()
        names = ("num_acknowledged", "num_sent_again", "num_replayed", "num_abandoned")
        counts = {name: sum(getattr(writer, name) for writer in writers) for name in names}
        print(f"{num_kills} kills; {counts}")
        # Otherwise nothing was tested.
        assert counts["num_acknowledged"] > 5 * num_kills
        assert counts["num_sent_again"] > num_kills
        assert counts["num_abandoned"] > 0


@pytest.mark.server
@pytest.mark.timeout(1200)
def test_twenty_kills_during_mixed_writes_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    run(tmp_path, num_kills=20, seed=1)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(7200)
def test_two_hundred_kills_during_mixed_writes_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    run(tmp_path, num_kills=200, seed=2)
