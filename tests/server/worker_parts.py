"""A worker over a tiny model, with what it reads, reports and computes in view."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from manyicl.engine.engine import Engine
from manyicl.engine.prediction import Prediction
from manyicl.errors import UserError
from manyicl.server.engine_worker import Compiled, EngineWorker, TaskSource
from manyicl.server.prefix_making import Prefixes
from manyicl.server.records import VersionKey
from manyicl.tasks.task import Task
from tests.builders import make_example, make_task, tiny_loaded
from tests.server.prefixes_in_memory import PrefixesInMemory

# Longer than anything takes on a machine that is busy with other things.
SECONDS = 60.0
LABELS = ("good", "bad", "so so")


def closed_task(num_examples: int = 24, first: int = 0) -> Task:
    rows = [make_example(f"film {i} was fine", LABELS[i % 3]) for i in range(first, first + num_examples)]
    return make_task(labels=LABELS, train=rows, test=(), instruction="Is it {{ labels | join(', ') }}?")


def free_task(num_examples: int = 4) -> Task:
    rows = [make_example(f"film {i} was fine", f"red {i}") for i in range(num_examples)]
    return make_task("free", rows, (), labels=None, family="qa", metric="exact_match", max_answer_tokens=12)


def key(name: str, version: int = 1) -> VersionKey:
    return VersionKey(f"tsk_{name}", version)


class Bench:
    """A worker, the versions it can read, and what it reported."""

    def __init__(self, engine: Engine, prefixes: Prefixes | None = None, **settings: Any) -> None:
        self.engine = engine
        self.prefixes = PrefixesInMemory()
        self.sources: dict[VersionKey, TaskSource] = {}
        self.loaded: list[VersionKey] = []
        self.ready: dict[VersionKey, Compiled] = {}
        self.failed: dict[VersionKey, UserError] = {}
        self.reported: list[VersionKey] = []
        self._changed = threading.Condition()
        settings = {"fill_seconds": 0.0, **settings}
        self.worker = EngineWorker(
            engine, prefixes or self.prefixes, self.load, self.on_ready, self.on_failed, **settings
        )

    def add(self, version: VersionKey, task: Task | None = None, **fields: Any) -> VersionKey:
        self.sources[version] = TaskSource(version, task or closed_task(), **fields)
        return version

    def load(self, version: VersionKey) -> TaskSource:
        self.loaded.append(version)
        if version not in self.sources:
            raise UserError("unknown_task", "there is no such task")
        return self.sources[version]

    def on_ready(self, version: VersionKey, compiled: Compiled) -> None:
        with self._changed:
            self.ready[version] = compiled
            self.reported.append(version)
            self._changed.notify_all()

    def on_failed(self, version: VersionKey, error: UserError) -> None:
        with self._changed:
            self.failed[version] = error
            self.reported.append(version)
            self._changed.notify_all()

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        ends = time.monotonic() + SECONDS
        with self._changed:
            while not is_so():
                assert time.monotonic() < ends, "it did not happen in time"
                self._changed.wait(0.01)

    def compiled(self, version: VersionKey) -> Compiled:
        self.worker.compile(version)
        self.wait_for(lambda: version in self.ready)
        return self.ready[version]

    def keep_ready(self, version: VersionKey, task: Task | None = None) -> VersionKey:
        """Add a version whose prefix is in memory; before the worker starts."""
        self.add(version, task)
        task = self.sources[version].task
        self.prefixes.put(version, self.engine.compile(task, task.train), pinned=False)
        return version

    def answers(
        self, version: VersionKey, rows: Sequence[Any], num_retrieved: int = 0, **options: Any
    ) -> list[Prediction]:
        ticket = self.worker.predict(version, rows, options, num_retrieved)  # type: ignore[arg-type]
        return ticket.future.result(SECONDS)

    @contextmanager
    def running(self) -> Iterator[Bench]:
        self.worker.start()
        try:
            yield self
        finally:
            self.worker.stop(0)
            assert not self.worker.state().is_alive


def tiny_engine(seed: int = 0) -> Engine:
    return Engine.local(tiny_loaded(seed=seed))


class Passes:
    """Counts the forward passes of an engine's model, and the calls of `Engine.predict` with their rows."""

    def __init__(self, engine: Engine, monkeypatch: Any) -> None:
        self.num_forward = 0
        self.rows: list[list[Any]] = []
        predict = engine.predict

        def seen(prefix: Any, rows: Any, **options: Any) -> Any:
            self.rows.append(list(rows))
            return predict(prefix, rows, **options)

        monkeypatch.setattr(engine, "predict", seen)
        self._handle = engine.backend.model.register_forward_pre_hook(self._count)  # type: ignore[attr-defined]

    def _count(self, *_: Any) -> None:
        self.num_forward += 1

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
