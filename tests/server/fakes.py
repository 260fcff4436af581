"""A server without a model: the real database and routes, and a worker that answers from the demonstrations."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from manyicl.engine.label_scores import LabelScores
from manyicl.engine.prediction import AnswerPart, Prediction
from manyicl.engine.queries import AnswerOptions, StreamedRow
from manyicl.errors import UserError
from manyicl.server.app import create_app
from manyicl.server.database import Database
from manyicl.server.job_store import JobStore
from manyicl.server.keys import KeyStore
from manyicl.server.records import VersionKey
from manyicl.server.services import Services
from manyicl.server.settings import ServerSettings
from manyicl.server.task_service import TaskService
from manyicl.server.task_store import TaskStore
from manyicl.server.work import Compiled, StreamTicket, TaskSource, Ticket, WorkerState, queue_full
from manyicl.tasks.task import Query, Task

MODEL = "fake-model"
URL = "http://127.0.0.1:8000"
# A query with this text cannot be answered, as one that is too long for the context.
TOO_LONG = "too long"
# Demonstrations with this answer make a version fail.
BROKEN = "broken"


class FakeWorker:
    """Answers a query like the demonstration with the same text, else with the first label or its text in capitals.

    ``open`` and ``compiles`` can be cleared to let predictions and compilations wait.
    """

    def __init__(self, service: TaskService, max_waiting_rows: int = 4096) -> None:
        self.service = service
        self.model = MODEL
        self.max_waiting_rows = max_waiting_rows
        self.open, self.compiles = threading.Event(), threading.Event()
        self.open.set()
        self.compiles.set()
        self.compiled: list[VersionKey] = []
        self.failed: dict[VersionKey, UserError] = {}
        self.cancelled: list[Ticket] = []
        self.forgotten: list[str] = []
        self.pinned: dict[str, bool] = {}
        self.options: list[tuple[AnswerOptions, int]] = []
        self._sources: dict[VersionKey, TaskSource] = {}
        self._num_waiting = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(8)

    def compile(self, key: VersionKey) -> None:
        self._threads.submit(self._compile, key)

    def _compile(self, key: VersionKey) -> None:
        self.compiles.wait()
        with self._lock:
            if key in self._sources:
                return
            try:
                source = self.service.source(key)
            except UserError:
                return
            self._sources[key] = source
        if any(example.answer == BROKEN for example in source.task.train):
            self.failed[key] = UserError("broken_labels", "the labels cannot be told apart")
            self.service.on_failed(key, self.failed[key])
            return
        answers = tuple((shots, -0.5, shots % 2) for shots in range(len(source.task.train)))
        self.compiled.append(key)
        self.service.on_ready(key, Compiled(10 * len(answers), len(answers), 0, answers, MODEL))

    def predict(
        self,
        key: VersionKey,
        rows: Sequence[StreamedRow],
        options: AnswerOptions,
        num_retrieved: int = 0,
        *,
        first_number: int = 1,
    ) -> Ticket:
        ticket = Ticket(rows, options.get("bad_rows") == "report", first_number)
        self._enqueue(ticket, key, options, num_retrieved)
        return ticket

    def stream(self, key: VersionKey, row: StreamedRow, options: AnswerOptions, num_retrieved: int = 0) -> StreamTicket:
        ticket = StreamTicket([row], options.get("bad_rows") == "report")
        self._enqueue(ticket, key, options, num_retrieved)
        return ticket

    def _enqueue(self, ticket: Ticket, key: VersionKey, options: AnswerOptions, num_retrieved: int) -> None:
        with self._lock:
            if self._num_waiting + len(ticket.rows) > self.max_waiting_rows:
                raise queue_full(self._num_waiting, self.max_waiting_rows)
            self._num_waiting += len(ticket.rows)
        self.options.append((options, num_retrieved))
        ticket.future.add_done_callback(lambda future: self.cancelled.append(ticket) if future.cancelled() else None)
        self._threads.submit(self._answer, ticket, key, options)

    def _answer(self, ticket: Ticket, key: VersionKey, options: AnswerOptions) -> None:
        try:
            while not self.open.wait(0.01):
                if not ticket.is_open:
                    return
            self._compile(key)
            if key in self.failed:
                raise self.failed[key]
            task = self._sources[key].task
            for position, row in enumerate(ticket.rows):
                prediction = self._prediction(task, row, options)
                if isinstance(ticket, StreamTicket):
                    for letter in prediction.answer:
                        ticket.put_part(AnswerPart(1, letter))
                    ticket.put_part(AnswerPart(1, "", prediction))
                ticket.put(position, prediction)
        except Exception as error:
            ticket.fail(error)
        finally:
            with self._lock:
                self._num_waiting -= len(ticket.rows)

    @staticmethod
    def _prediction(task: Task, row: StreamedRow, options: AnswerOptions) -> Prediction:
        if isinstance(row, UserError):
            return Prediction("", float("nan"), problem=row)
        assert isinstance(row, Query), "rows are rendered before they come to the worker"
        if row.text == TOO_LONG:
            return Prediction("", float("nan"), problem=UserError("query_too_long", "the query does not fit"))
        known = {example.query.text: example.answer for example in task.train}
        labels = row.choices or task.labels
        answer = known.get(row.text, labels[0] if labels else row.text.upper())
        scores = None
        if labels and options.get("scores") == "all":
            values = {label: -0.1 if label == answer else -3.0 for label in labels}
            scores = LabelScores(values, dict.fromkeys(labels, 1))
        below = options.get("abstain_below") or 0
        abstained = scores is not None and scores.probabilities[answer] < below
        return Prediction(answer, -0.1, scores, abstained=abstained, num_shots=len(task.train))

    def forget(self, task_id: str) -> Future[None]:
        self.forgotten.append(task_id)
        return _done()

    def set_pinned(self, task_id: str, pinned: bool) -> Future[None]:
        self.pinned[task_id] = pinned
        return _done()

    def state(self) -> WorkerState:
        return WorkerState(num_waiting_rows=self._num_waiting, seconds_per_row=0.5)

    def stop(self, drain_seconds: float = 0) -> None:
        self.open.set()
        self.compiles.set()
        self._threads.shutdown(cancel_futures=True)


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


@contextmanager
def fake_services(data: Path, *, has_keys: bool = False, **settings: Any) -> Iterator[Services]:
    """The parts of a server on a new data folder; ``services.worker`` is a `FakeWorker`."""
    data.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {"model": "builtin:nano", "data": data, "require_keys": has_keys, **settings}
    checked = ServerSettings(**values)
    database = Database.open(data)
    tasks = TaskStore(database, limits=checked.store_limits)
    service = TaskService(tasks, checked, MODEL)
    worker = FakeWorker(service, checked.max_waiting_rows)
    keys = KeyStore(database, data) if has_keys else None
    jobs = JobStore(database, limits=checked.store_limits)
    services = Services(checked, tasks, jobs, keys, worker, service)
    service.start(worker)
    try:
        yield services
    finally:
        worker.stop()
        database.close()


def fake_worker(services: Services) -> FakeWorker:
    """The fake worker of a server."""
    assert isinstance(services.worker, FakeWorker)
    return services.worker


@contextmanager
def fake_client(data: Path, **settings: Any) -> Iterator[TestClient]:
    """A client of a server without a model; ``client.app.state.services`` are its parts."""
    with fake_services(data, **settings) as services, client_of(services) as client:
        yield client


@contextmanager
def client_of(services: Services, key: str | None = None) -> Iterator[TestClient]:
    """A client of a server, with a key or without."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with TestClient(create_app(services), base_url=URL, headers=headers, raise_server_exceptions=False) as client:
        yield client


def mood_task(name: str = "mood") -> dict[str, Any]:
    """The body of a request that makes a task with two labels."""
    rows = [{"text": "what a film", "label": "good"}, {"text": "so dull", "label": "bad"}]
    keys = {"query": "{{ text }}", "answer": "{{ label }}", "labels": "from_train"}
    return {"name": name, "task": keys, "demonstrations": [*rows, {"text": "I laughed", "label": "good"}]}


def echo_task(name: str = "echo") -> dict[str, Any]:
    """The body of a request that makes a task with free answers."""
    return {"name": name, "demonstrations": [{"query": "a b", "answer": "A B"}, {"query": "c", "answer": "C"}]}
