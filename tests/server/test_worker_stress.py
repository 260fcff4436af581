"""Many threads at once: every ticket ends, right or with its own error; nothing stays in use; the thread survives."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from manyicl.engine.engine import Engine
from manyicl.engine.prediction import Prediction
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.errors import MachineError, UserError
from manyicl.server.prefix_store import PrefixStore
from manyicl.server.records import VersionKey
from manyicl.server.work import StreamTicket, TaskSource, Ticket
from manyicl.tasks.retrieval import Retriever
from tests.engine.parts import backend_of
from tests.server.worker_parts import Bench, closed_task, free_task, tiny_engine

LONGEST = "the long red box was by the door"
ROWS = ["film 3 was good", "a", LONGEST, "play 7 was fine", "boom", " "]
NUM_TASKS = 6
CLOSED_CALLS: list[dict[str, Any]] = [{"scores": "all"}, {"scores": "all", "blend": True}]
CALLS: list[dict[str, Any]] = [{}, {"num_similar": 2}, {"bad_rows": "report"}]


@dataclass
class Client:
    """A user who does one thing after another, and what came of it."""

    bench: Bench
    tasks: dict[str, int]
    lock: threading.Lock
    draw: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[VersionKey, str, dict[str, Any], int, Prediction]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def act(self, num_acts: int) -> None:
        """Act; whatever is unexpected is noted."""
        for _ in range(num_acts):
            try:
                self.draw.choice([self.predict] * 6 + [self.stream, self.add, self.replace, self.compile, self.pin])()
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")

    def version(self) -> VersionKey:
        with self.lock:
            task_id = self.draw.choice(list(self.tasks))
            return VersionKey(task_id, self.draw.randint(1, self.tasks[task_id]))

    def predict(self) -> None:
        version = self.version()
        rows = self.draw.choices(ROWS[: self.draw.choice([4, 4, 4, 6])], k=self.draw.choice([1, 1, 2, 20]))
        options = self.draw.choice(CALLS + (CLOSED_CALLS if "closed" in version.task_id else []))
        num_retrieved = 0 if options.get("blend") else self.draw.choice([0, 0, 2])
        try:
            ticket = self.bench.worker.predict(version, rows, options, num_retrieved)  # type: ignore[arg-type]
        except UserError as error:
            self.note_error(error, rows)
            return
        if self.draw.random() < 0.2:
            time.sleep(self.draw.choice([0, 0.003, 0.02]))
            ticket.cancel()
        self.finish(ticket, version, rows, options, num_retrieved)

    def stream(self) -> None:
        version = self.version()
        ticket = self.bench.worker.stream(version, row := self.draw.choice(ROWS[:4]), {})
        if self.draw.random() < 0.5:
            time.sleep(self.draw.choice([0, 0.003, 0.02]))
            ticket.cancel()
        self.finish(ticket, version, [row], {})

    def finish(
        self, ticket: Ticket, version: VersionKey, rows: list[str], options: dict[str, Any], num_retrieved: int = 0
    ) -> None:
        try:
            if isinstance(ticket, StreamTicket):
                text = "".join(part.text for part in ticket)
                assert ticket.future.result(0)[0].answer == text
            predictions = ticket.future.result(60)
        except CancelledError:
            self.counts["cancelled"] += 1
        except (UserError, MachineError) as error:
            self.note_error(error, rows)
        else:
            self.counts["answered"] += 1
            pairs = zip(rows, predictions, strict=True)
            self.answers += [(version, row, options, num_retrieved, prediction) for row, prediction in pairs]

    def note_error(self, error: UserError | MachineError, rows: list[str]) -> None:
        code = error.code if isinstance(error, UserError) else "machine"
        self.counts[code] += 1
        # Tokens are reserved for a query as long as the longest demonstration.
        of_rows = {"boom": "machine", " ": "empty_query", LONGEST: "query_too_long"}
        if code not in {"unknown_task", "queue_full"} | {of_rows[row] for row in rows if row in of_rows}:
            self.wrong.append(f"{code} for {rows}")

    def add(self) -> None:
        """Make a longer or a corrected version of a task."""
        with self.lock:
            task_id = self.draw.choice(list(self.tasks))
            newest = VersionKey(task_id, self.tasks[task_id])
            source = self.bench.sources[newest]
            task = source.task
            train = list(task.train)
            if self.draw.random() < 0.5 and len(train) < 40:
                train += train[:3]
            else:
                train[self.draw.randrange(len(train))] = train[0]
            newer = VersionKey(task_id, newest.version + 1)
            self.bench.add(newer, replace(task, train=tuple(train)), **limits(source))
            self.tasks[task_id] += 1
        self.bench.worker.compile(newer)

    def replace(self) -> None:
        """Delete a task and make another one."""
        with self.lock:
            task_id = self.draw.choice(list(self.tasks))
            new = new_task_id(self.draw)
            for version in range(1, self.tasks.pop(task_id) + 1):
                del self.bench.sources[VersionKey(task_id, version)]
            add_task(self.bench, self.tasks, new, self.draw)
        forgotten = self.bench.worker.forget(task_id)
        self.bench.worker.compile(VersionKey(new, 1))
        if self.draw.random() < 0.5:
            forgotten.result(60)
        self.finish(self.bench.worker.predict(VersionKey(task_id, 1), ["a"], {}), VersionKey(task_id, 1), ["a"], {})

    def compile(self) -> None:
        self.bench.worker.compile(self.version())

    def pin(self) -> None:
        self.bench.worker.set_pinned(self.version().task_id, self.draw.random() < 0.3)


def limits(source: TaskSource) -> dict[str, Any]:
    return {"num_shots": source.num_shots, "num_retrieved": source.num_retrieved}


def new_task_id(draw: random.Random) -> str:
    return f"tsk_{draw.choice(['closed', 'closed', 'free'])}_{draw.randrange(10**12)}"


def add_task(bench: Bench, tasks: dict[str, int], task_id: str, draw: random.Random) -> None:
    task = closed_task(draw.randint(5, 40)) if "closed" in task_id else free_task(draw.randint(2, 8))
    retrieves = draw.random() < 0.4
    bench.add(VersionKey(task_id, 1), task, num_shots=4 if retrieves else None, num_retrieved=2 if retrieves else 0)
    tasks[task_id] = 1


def failing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each pass with a certain row fail."""
    predict, stream = engine.predict, engine.stream

    def checked(rows: Any) -> Any:
        if "boom" in rows:
            raise RuntimeError
        return rows

    monkeypatch.setattr(engine, "predict", lambda prefix, rows, **options: predict(prefix, checked(rows), **options))
    monkeypatch.setattr(engine, "stream", lambda prefix, rows, **options: stream(prefix, checked(rows), **options))


def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.engine.prefix_cache.FIRST_TIMED_CHUNK_TOKENS", 32)
    monkeypatch.setattr("manyicl.engine.local.OBSERVED_CHUNK_TOKENS", 32)


@pytest.mark.parametrize(
    ("seed", "num_acts"), [(0, 15), *(pytest.param(seed, 200, marks=pytest.mark.slow) for seed in range(1, 4))]
)
def test_many_threads_cancel_delete_and_fail_and_all_others_get_their_answers(
    seed: int, num_acts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, offline = tiny_engine(), tiny_engine()
    short_chunks(monkeypatch)
    failing(engine, monkeypatch)
    draw, tasks, lock = random.Random(seed), dict[str, int](), threading.Lock()
    one = engine.compile(task := closed_task(), task.train)
    num_bytes = sum(block.num_bytes for block in one.cache.blocks)  # type: ignore[attr-defined]
    with PrefixStore(tmp_path, backend_of(engine), memory_bytes=3 * num_bytes, disk_bytes=20 * num_bytes) as store:
        bench = Bench(engine, store, max_waiting_rows=60, fill_seconds=0.001, rows_per_pass=16)
        for _ in range(NUM_TASKS):
            add_task(bench, tasks, new_task_id(draw), draw)
        kept: dict[VersionKey, TaskSource] = {}
        add = bench.add

        def remember(version: VersionKey, *given: Any, **fields: Any) -> VersionKey:
            add(version, *given, **fields)
            kept[version] = bench.sources[version]
            return version

        kept |= bench.sources
        monkeypatch.setattr(bench, "add", remember)
        clients = [Client(bench, tasks, lock, random.Random(f"{seed} {i}")) for i in range(8)]
        with bench.running():
            threads = [threading.Thread(target=client.act, args=(num_acts,)) for client in clients]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            bench.wait_for(lambda: bench.worker.state().num_waiting_rows == 0)
            state = bench.worker.state()
            assert state.is_alive
        store.flush()
        for task_id in tasks:
            store.set_pinned(task_id, False)
        assert store.usage().memory_bytes <= store.usage().memory_budget or store.usage().num_resident == 1
        gone = {version.task_id for version in kept} - set(tasks)
        assert gone
        assert not any(version.task_id in gone for version in store.residents())
        written = {path.parent.name for path in tmp_path.rglob("*") if path.is_file()}
        assert written & set(tasks)
        assert not written & gone
        assert all(one.num_users == 0 for one in store._residents.values())
    counts = sum((client.counts for client in clients), Counter[str]())
    assert [wrong for client in clients for wrong in client.wrong] == []
    assert min(counts[name] for name in ("answered", "cancelled", "unknown_task", "machine")) > 0, counts
    answers = [answer for client in clients for answer in client.answers]
    prefixes: dict[VersionKey, TaskPrefix] = {}
    for version, row, options, num_retrieved, prediction in draw.sample(answers, min(60, len(answers))):
        if version not in prefixes:
            prefixes[version] = offline_prefix(offline, kept[version])
        expected = offline_answer(offline, prefixes[version], row, options, num_retrieved)
        if prediction.problem is not None:
            assert expected.problem is not None
            continue
        assert prediction.log_probability == pytest.approx(expected.log_probability, abs=1e-4)
        assert prediction.similar == expected.similar
        if prediction.scores is not None and expected.scores is not None:
            assert prediction.scores.probabilities == pytest.approx(expected.scores.probabilities, abs=1e-3)


def offline_prefix(engine: Engine, source: TaskSource) -> TaskPrefix:
    """Compile a task as the engine does without a server."""
    task = source.task
    is_all_shown = source.num_shots is None or source.num_shots >= len({(one.query, one.answer) for one in task.train})
    num_reserved = 0 if is_all_shown else source.num_retrieved
    return engine.compile(task, task.train[: source.num_shots], num_retrieved=num_reserved)


def offline_answer(
    engine: Engine, prefix: TaskPrefix, row: str, options: dict[str, Any], num_retrieved: int
) -> Prediction:
    """Answer a row as the engine does without a server."""
    retrieve = Retriever(prefix.rows, num_retrieved) if num_retrieved and prefix.rows else None
    options = {**options, "bad_rows": "report"}
    (prediction,) = engine.predict(prefix, [row], retrieve=retrieve, **options)
    return prediction
