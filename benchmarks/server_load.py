"""A mixed load on the task server, and whether everything stayed right under it.

    python -m benchmarks.server_load                      # ten minutes, 200 tasks, 20 keys; 13 minutes in all
    python -m benchmarks.server_load --minutes 60
    python -m benchmarks.server_load --minutes 0.3 --tasks 8 --keys 3 --workers 4 --checked 20   # to see that it runs

The packaged tiny model answers, with memory for the prefixes of ten tasks and disk space for a part of the others.
Workers create, extend, correct, shrink, restore, read and delete tasks of many keys, ask one row, several, and lines
with a bad one among them, send writes twice under one idempotency key, hang up in the middle of an answer, and try to
reach tasks of other keys. This process keeps a copy of every version of every task. It checks, and ends with 1 if one
of these does not hold:

- no status but those that the request may have, none of 500 and above among them;
- a write that is sent twice is carried out once; demonstrations that are read are those that were written;
- no key reads or changes a task of another;
- answers and their log-probabilities are those of an engine without a server, on the same demonstrations, within 1e-4;
  where two answers are as probable as each other within that, either is right;
- resident memory: the mean of the last minute is within 5 % of that of the second one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from benchmarks.server_process import (
    LABELS,
    Pair,
    ServerProcess,
    as_rows,
    machine,
    make_pair,
    make_pairs,
    new_task,
    percentile,
    table,
)

from manyicl.engine.engine import Engine
from manyicl.engine.prefix_cache import PrefixCache
from manyicl.tasks.demonstrations import demonstrations_in_order
from manyicl.tasks.task import Task

MODEL = "builtin:nano"
PREFIXES_IN_MEMORY = 10
TOLERANCE_NATS = 1e-4
TOLERANCE_MEMORY = 0.05
FEWEST_DEMONSTRATIONS, MOST_DEMONSTRATIONS = 12, 60
# Half of the requests go to so many tasks, the others to any.
NUM_POPULAR = 10
MIB = 2**20

# A demonstration: its number, query and answer; in the order of the context.
Demonstrations = tuple[tuple[int, str, str], ...]


def in_context_order(numbers: Sequence[int], pairs: Sequence[Pair]) -> Demonstrations:
    """Put the demonstrations of one write in the order in which the server puts them into the context."""
    order = demonstrations_in_order([answer for _, answer in pairs], seed=0, sampling="balanced")
    return tuple((numbers[i], *pairs[i]) for i in order)


@dataclass(eq=False)
class Copy:
    """What this process knows of a task.

    Attributes:
        id: Its id.
        key: Number of the key whose task it is.
        versions: Version -> demonstrations.
        lock: Held by the worker that changes the task.
        is_deleted: Whether it is deleted, or about to be.
    """

    id: str
    key: int
    versions: dict[int, Demonstrations]
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_deleted: bool = False

    @property
    def newest(self) -> int:
        """Newest version."""
        return max(self.versions)


@dataclass(frozen=True)
class Sample:
    """An answer of the server, to be compared with that of an engine without one."""

    copy: Copy
    version: int
    query: str
    answer: str
    log_probability: float


class FailedCheckError(Exception):
    """Something that must hold does not."""


class Load:
    """Workers, what they know of the tasks, and what they saw."""

    def __init__(self, arguments: argparse.Namespace, server: ServerProcess, keys: Sequence[str]) -> None:
        self.arguments, self.server, self.keys = arguments, server, keys
        self.rng = random.Random(arguments.seed)
        self.copies: list[Copy] = []
        self.samples: list[Sample] = []
        self.num_answers = 0
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.latencies: defaultdict[str, list[float]] = defaultdict(list)
        self.problems: list[str] = []
        self.memory: list[tuple[float, float]] = []
        self.ends = math.inf
        self.actions: Mapping[Callable[[], Awaitable[None]], int] = {
            self.ask_one: 50,
            self.ask_some: 10,
            self.ask_lines: 6,
            self.hang_up: 5,
            self.extend: 8,
            self.correct: 8,
            self.shrink: 3,
            self.restore: 2,
            self.read: 4,
            self.reach_for_another: 3,
            self.replace: 1,
        }

    async def run(self) -> None:
        """Make the tasks, then let all workers work until the time is over."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self.server.url, connector=connector) as self.session:
            await self._together(self._create_tasks)
            for copy in self.copies:
                await asyncio.to_thread(self._wait_until_ready, copy)
            print(f"{len(self.copies)} tasks can answer; {self.arguments.minutes:g} minutes of load begin.", flush=True)
            self.started = time.monotonic()
            self.ends = self.started + 60 * self.arguments.minutes
            watch = asyncio.create_task(self._watch_memory())
            await self._together(self._work)
            await watch

    async def _together(self, work: Callable[[], Awaitable[None]]) -> None:
        await asyncio.gather(*(work() for _ in range(self.arguments.workers)))

    def _wait_until_ready(self, copy: Copy) -> None:
        self.server.key = self.keys[copy.key]
        self.server.wait_until_ready(copy.id)

    async def _create_tasks(self) -> None:
        while len(self.copies) < self.arguments.tasks:
            await self.create()

    async def _work(self) -> None:
        while time.monotonic() < self.ends and len(self.problems) < 20:
            (action,) = self.rng.choices(list(self.actions), list(self.actions.values()))
            try:
                await action()
            except (FailedCheckError, aiohttp.ClientError, KeyError, ValueError) as error:
                self.problems.append(f"{action.__name__}: {type(error).__name__}: {error}")

    async def _watch_memory(self) -> None:
        while time.monotonic() < self.ends:
            sizes = await asyncio.to_thread(self.server.memory_mib)
            self.memory.append((time.monotonic() - self.started, sizes["VmRSS"]))
            await asyncio.sleep(1)

    # --- Requests

    async def send(
        self,
        action: str,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: int,
        expected: Collection[int] = (200,),
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Send a request and check its status; a server that is busy is asked again when it says.

        Returns:
            Status, JSON or lines of JSON, and headers.
        """
        given = {"Authorization": f"Bearer {self.keys[key]}", **(headers or {})}
        data = body if isinstance(body, bytes) else None
        content = None if data is not None else body
        while True:
            started = time.perf_counter()
            async with self.session.request(method, path, data=data, json=content, headers=given) as response:
                text = await response.text()
            self.statuses[action, response.status] += 1
            self.latencies[action].append(time.perf_counter() - started)
            if response.status != 429:
                break
            await asyncio.sleep(float(response.headers["Retry-After"]))
        if response.status not in expected:
            raise FailedCheckError(f"{method} {path} was answered with {response.status}: {text[:500]}")
        if response.content_type == "application/x-ndjson":
            return response.status, [json.loads(line) for line in text.splitlines()], response.headers
        return response.status, json.loads(text) if text else None, response.headers

    async def write(self, action: str, method: str, path: str, body: Any, *, key: int) -> Any:
        """Send a write, one in ten twice under the same idempotency key."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        expected = (200, 201)
        status, content, _ = await self.send(action, method, path, body, key=key, expected=expected, headers=headers)
        if self.rng.random() < 0.1:
            again, same, replayed = await self.send(
                f"{action} again", method, path, body, key=key, expected=expected, headers=headers
            )
            require(again == status, "a write that is sent again has another status")
            require(replayed.get("Idempotent-Replayed") == "true", "a write that is sent again is not called replayed")
            numbers = [one["version"] if action == "create" else one["version"]["version"] for one in (content, same)]
            require(numbers[0] == numbers[1], "a write that is sent again made another version")
        return content

    def some_copy(self) -> Copy:
        """Choose a task, a popular one half of the time."""
        alive = [copy for copy in self.copies if not copy.is_deleted]
        return self.rng.choice(alive[:NUM_POPULAR] if self.rng.random() < 0.5 else alive)

    # --- Asking

    async def ask(self, action: str, num_rows: int, *, with_lines: bool = False) -> None:
        """Ask some rows, and keep some of the answers to compare them later."""
        copy = self.some_copy()
        queries = [make_pair(self.rng)[0] for _ in range(num_rows)]
        rows: list[dict[str, str]] = [{"query": query} for query in queries]
        body: Any = {"rows": rows}
        headers = {}
        if with_lines:
            rows.insert(num_rows // 2, {"text": "no query"})
            body = "".join(json.dumps(row) + "\n" for row in rows).encode()
            headers = {"Content-Type": "application/x-ndjson", "Accept": "application/x-ndjson"}
        status, content, sent = await self.send(
            action, "POST", f"/v1/tasks/{copy.id}/predict", body, key=copy.key, expected=(200, 404), headers=headers
        )
        if status == 404:
            require(copy.is_deleted, "a task is gone")
            return
        predictions = content if with_lines else content["predictions"]
        if copy.is_deleted and len(predictions) < len(rows):
            # The last line says so.
            require(predictions[-1]["problem"]["code"] == "unknown_task", "lines end before a task is gone")
            return
        require(len(predictions) == len(rows), f"{len(rows)} rows have {len(predictions)} answers")
        if with_lines:
            require("problem" in predictions.pop(num_rows // 2), "a bad row has no problem")
        version = int(sent["X-Task-Version"]) if with_lines else content["version"]
        for query, one in zip(queries, predictions, strict=True):
            require("problem" not in one, f"a good row has a problem: {one}")
            self.keep(Sample(copy, version, query, one["answer"], one["log_probability"]))

    def keep(self, sample: Sample) -> None:
        """Keep a random choice of all answers, each as probable as any other to be among them."""
        self.num_answers += 1
        if len(self.samples) < self.arguments.checked:
            self.samples.append(sample)
        elif (place := self.rng.randrange(self.num_answers)) < len(self.samples):
            self.samples[place] = sample

    async def ask_one(self) -> None:
        """Ask one row."""
        await self.ask("predict a row", 1)

    async def ask_some(self) -> None:
        """Ask several rows in one request."""
        await self.ask("predict rows", self.rng.randint(2, 20))

    async def ask_lines(self) -> None:
        """Ask several rows as lines, with a bad one among them."""
        await self.ask("predict lines", self.rng.randint(2, 20), with_lines=True)

    async def hang_up(self) -> None:
        """Ask many rows, and close the connection before they are answered."""
        copy = self.some_copy()
        rows = [{"query": make_pair(self.rng)[0]} for _ in range(self.rng.choice((1, 50, 300)))]
        headers = {"Authorization": f"Bearer {self.keys[copy.key]}"}
        with suppress(TimeoutError):
            async with asyncio.timeout(self.rng.choice((0.001, 0.01, 0.05))):
                async with self.session.post(
                    f"/v1/tasks/{copy.id}/predict", json={"rows": rows}, headers=headers
                ) as response:
                    await response.read()
                    self.statuses["answered before the hang-up", response.status] += 1
                    return
        self.statuses["hang up", 0] += 1

    # --- Writing

    async def create(self) -> None:
        """Make a task of a random key."""
        key = self.rng.randrange(len(self.keys))
        pairs = make_pairs(self.rng.randrange(10**6), self.rng.randint(20, 40))
        body = new_task(uuid.uuid4().hex, pairs)
        created = await self.write("create", "POST", "/v1/tasks", body, key=key)
        require(created["version"] == 1, "a new task has another version than 1")
        self.copies.append(Copy(created["id"], key, {1: in_context_order(range(1, len(pairs) + 1), pairs)}))

    async def change(
        self, action: str, method: str, path: str, body: Any, copy: Copy, changed: Callable[[Any], Demonstrations]
    ) -> None:
        """Change a task whose lock is held, and note the new version."""
        if copy.is_deleted:
            return
        content = await self.write(action, method, f"/v1/tasks/{copy.id}/{path}", body, key=copy.key)
        version = content["version"]["version"]
        require(version == copy.newest + 1, f"after version {copy.newest} comes {version}")
        copy.versions[version] = changed(content)

    async def extend(self) -> None:
        """Add a few demonstrations."""
        copy = self.some_copy()
        pairs = [make_pair(self.rng) for _ in range(self.rng.randint(1, 4))]
        async with copy.lock:
            before = copy.versions[copy.newest]
            if len(before) + len(pairs) > MOST_DEMONSTRATIONS:
                return

            def changed(content: Any) -> Demonstrations:
                first, last = content["numbers"]
                return before + in_context_order(range(first, last + 1), pairs)

            await self.change("extend", "POST", "demonstrations", {"demonstrations": as_rows(pairs)}, copy, changed)

    async def correct(self) -> None:
        """Replace a demonstration."""
        copy = self.some_copy()
        async with copy.lock:
            before = copy.versions[copy.newest]
            number, (query, answer) = self.rng.choice(before)[0], make_pair(self.rng)
            after = tuple((number, query, answer) if one[0] == number else one for one in before)
            (row,) = as_rows([(query, answer)])
            await self.change("correct", "PATCH", f"demonstrations/{number}", row, copy, lambda _: after)

    async def shrink(self) -> None:
        """Remove a demonstration."""
        copy = self.some_copy()
        async with copy.lock:
            before = copy.versions[copy.newest]
            if len(before) <= FEWEST_DEMONSTRATIONS:
                return
            number = self.rng.choice(before)[0]
            after = tuple(one for one in before if one[0] != number)
            await self.change("shrink", "DELETE", f"demonstrations/{number}", None, copy, lambda _: after)

    async def restore(self) -> None:
        """Go back to the demonstrations of an earlier version."""
        copy = self.some_copy()
        async with copy.lock:
            version = self.rng.choice(list(copy.versions))
            after = copy.versions[version]
            await self.change("restore", "POST", f"versions/{version}/restore", {}, copy, lambda _: after)

    async def replace(self) -> None:
        """Delete a task and make another one."""
        copy = self.some_copy()
        async with copy.lock:
            if copy.is_deleted:
                return
            copy.is_deleted = True
            await self.send("delete", "DELETE", f"/v1/tasks/{copy.id}", key=copy.key, expected=(204,))
        path = f"/v1/tasks/{copy.id}"
        await self.send("read what was deleted", "GET", path, key=copy.key, expected=(404,))
        self.copies.remove(copy)
        await self.create()

    # --- Reading

    async def read(self) -> None:
        """Read a version's demonstrations, and the tasks of a key."""
        copy = self.some_copy()
        async with copy.lock:
            if copy.is_deleted:
                return
            version = self.rng.choice(list(copy.versions))
            path = f"/v1/tasks/{copy.id}/demonstrations?version={version}"
            lines = {"Accept": "application/x-ndjson"}
            _, found, _ = await self.send("read demonstrations", "GET", path, key=copy.key, headers=lines)
            columns = [(one["number"], one["columns"]["query"], one["columns"]["answer"]) for one in found]
            require(columns == sorted(copy.versions[version]), f"version {version} has other demonstrations")
        _, page, _ = await self.send("list tasks", "GET", "/v1/tasks?limit=100", key=copy.key)
        own = {one.id for one in self.copies if one.key == copy.key}
        foreign = {one.id for one in self.copies} - own
        require(not foreign & {task["id"] for task in page["data"]}, "a list has tasks of another key")

    async def reach_for_another(self) -> None:
        """Try to read, ask and change a task of another key."""
        copy = self.some_copy()
        key = (copy.key + self.rng.randrange(1, len(self.keys))) % len(self.keys)
        path = f"/v1/tasks/{copy.id}"
        method, path, body = self.rng.choice(
            (
                ("GET", path, None),
                ("GET", f"{path}/demonstrations", None),
                ("POST", f"{path}/predict", {"rows": [{"query": "anna"}]}),
                ("POST", f"{path}/demonstrations", {"demonstrations": as_rows([make_pair(self.rng)])}),
                ("DELETE", path, None),
            )
        )
        await self.send("reach for another's", method, path, body, key=key, expected=(404,))


def require(holds: bool, sentence: str) -> None:
    """Note a check that failed."""
    if not holds:
        raise FailedCheckError(sentence)


def check_answers(engine: Engine, samples: Sequence[Sample]) -> tuple[float, list[str]]:
    """Compare answers with those of an engine without a server.

    Returns:
        The largest difference of log-probabilities, and what is wrong.
    """
    of_versions: defaultdict[tuple[str, Demonstrations], list[Sample]] = defaultdict(list)
    problems, largest = [], 0.0
    for sample in samples:
        if sample.version not in sample.copy.versions:
            problems.append(f"{sample.copy.id} was answered by version {sample.version}, which no write made")
            continue
        of_versions[sample.copy.id, sample.copy.versions[sample.version]].append(sample)
    for (task_id, demonstrations), own in of_versions.items():
        task = Task.from_examples(task_id, [(query, answer) for _, query, answer in demonstrations], labels=LABELS)
        prefix = engine.compile(task, task.train)
        predictions = engine.predict(prefix, [sample.query for sample in own], scores="all")
        for sample, prediction in zip(own, predictions, strict=True):
            assert prediction.scores is not None, "all scores were asked for"
            scores = prediction.scores.log_probabilities
            is_tie = max(scores.values()) - scores[sample.answer] <= TOLERANCE_NATS
            difference = abs(scores[sample.answer] - sample.log_probability)
            largest = max(largest, difference)
            if not is_tie or difference > TOLERANCE_NATS:
                problems.append(
                    f"{task_id}, version {sample.version}, {sample.query!r}: {sample.answer} {sample.log_probability}, "
                    f"without a server {prediction.answer} {scores[sample.answer]}"
                )
    return largest, problems


def check_memory(memory: Sequence[tuple[float, float]]) -> tuple[str, list[str]]:
    """Compare the last minute with the second; of a load of less than three minutes, the last third with the second."""
    whole = memory[-1][0]
    length = min(60.0, whole / 3)
    second = [mib for seconds, mib in memory if length <= seconds < 2 * length]
    last = [mib for seconds, mib in memory if seconds >= whole - length]
    early, late = statistics.mean(second), statistics.mean(last)
    most = max(mib for _, mib in memory)
    sentence = f"{early:.0f} MiB, at the end {late:.0f} MiB, {late / early - 1:+.1%}; most {most:.0f} MiB"
    is_too_much = abs(late / early - 1) > TOLERANCE_MEMORY and whole >= 180
    return sentence, [f"resident memory went from {sentence}"] if is_too_much else []


def memory_options(engine: Engine, num_tasks: int) -> list[str]:
    """Return options for memory for ten prefixes, and disk space for half of the tasks."""
    pairs = make_pairs(0, (FEWEST_DEMONSTRATIONS + MOST_DEMONSTRATIONS) // 2)
    task = Task.from_examples("size", pairs, labels=LABELS)
    cache = engine.prefill(task, task.train).cache
    assert isinstance(cache, PrefixCache), "the engine is in this process"
    size = sum(block.num_bytes for block in cache.blocks)
    memory = math.ceil(PREFIXES_IN_MEMORY * size / MIB)
    return ["--memory-mib", str(memory), "--disk-mib", str(math.ceil(num_tasks * size / 2 / MIB))]


def make_keys(data: Path, num_keys: int) -> list[str]:
    """Make keys, each of an owner of its own."""
    from manyicl.server.database import Database, data_folder
    from manyicl.server.keys import KeyStore

    with data_folder(data):
        database = Database.open(data)
        try:
            keys = KeyStore(database, data)
            return [keys.create(f"owner{number}", "load")[0] for number in range(num_keys)]
        finally:
            database.close()


def report(load: Load) -> str:
    """Write what was sent and how it was answered."""
    lines = []
    for action in sorted({action for action, _ in load.statuses}):
        statuses = sorted((status, number) for (one, status), number in load.statuses.items() if one == action)
        latencies = load.latencies[action]
        lines.append(
            {
                "requests": action,
                "number": f"{sum(number for _, number in statuses):,}",
                "by status": ", ".join(f"{status or 'none'}: {number:,}" for status, number in statuses),
                "p50, ms": f"{1000 * percentile(latencies, 0.5):.0f}" if latencies else "",
                "p95, ms": f"{1000 * percentile(latencies, 0.95):.0f}" if latencies else "",
                "longest, ms": f"{1000 * max(latencies):.0f}" if latencies else "",
            }
        )
    return table(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="time of the load")
    parser.add_argument("--tasks", type=int, default=200, help="tasks at a time")
    parser.add_argument("--keys", type=int, default=20, help="keys, each of an owner of its own")
    parser.add_argument("--workers", type=int, default=16, help="requests at a time")
    parser.add_argument("--checked", type=int, default=2000, help="answers that are compared")
    parser.add_argument("--seed", type=int, default=0, help="what is sent")
    arguments = parser.parse_args(words)
    print(f"{MODEL}; {machine()}; {arguments.workers} requests at a time\n")
    engine = Engine.from_pretrained(MODEL)
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        keys = make_keys(data, arguments.keys)
        options = memory_options(engine, arguments.tasks)
        print(f"manyicl serve {' '.join(options)}\n")
        with ServerProcess(MODEL, data, 1, options, keys[0]) as server:
            load = Load(arguments, server, keys)
            asyncio.run(load.run())
            metrics = prefix_metrics(server)
        memory, problems = check_memory(load.memory)
        largest, wrong = check_answers(engine, load.samples)
        problems = [*load.problems, *problems, *wrong]
        print(f"\n{report(load)}\n\n{metrics}")
        print(f"Resident memory in the second minute {memory}.")
        print(f"{len(load.samples):,} of {load.num_answers:,} answers compared; log-probabilities differ by at most")
        print(f"{largest:.1e} nats.")
        for problem in problems[:20]:
            print(f"WRONG: {problem}")
        if problems:
            print(f"\nLog of the server:\n{server.log_tail()}")
    print("\nAll checks hold." if not problems else f"\n{len(problems)} checks do not hold.")
    return 1 if problems else 0


def prefix_metrics(server: ServerProcess) -> str:
    """Return what the server counted of its prefixes."""
    import urllib.request

    request = urllib.request.Request(f"{server.url}/metrics", headers=server.headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = response.read().decode().splitlines()
    return "\n".join(line for line in lines if "prefix" in line and not line.startswith("#"))


if __name__ == "__main__":
    sys.exit(main())
