r"""What the task server costs beside its engine: rows a second, latency, compiling meanwhile, restarts after kills.

    manyicl models get smollm2
    python -m benchmarks.server_throughput                              # all; about half an hour on two idle cores
    python -m benchmarks.server_throughput --only throughput            # or: latency, compile, restart
    python -m benchmarks.server_throughput --model builtin:nano --tasks 1 3 --clients 1 4 --seconds 2 \
        --demonstrations 20 --many 200 --restarts 1                     # a minute, to see that it runs

Everything is measured in one run, on an otherwise idle machine: the engine alone answers the same rows in this process
with as many threads, while the server has nothing to do. Each task has four labels, so that an answer takes one or a
few tokens. Every client sends a row, waits for its answer and sends the next; this process sends all requests, and
shares the machine with the server. Answers are compared: the share that differs from the engine's is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import torch
from benchmarks.server_process import LABELS, ServerProcess, machine, make_pairs, new_task, percentile, table

from manyicl.engine.engine import Engine
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.tasks.demonstrations import demonstrations_in_order
from manyicl.tasks.task import Task

PARTS = ("throughput", "latency", "compile", "restart")
NUM_ROWS = 512
# What is compared takes turns, as the speed of a machine drifts.
TURNS = 3
# Between the answer to a row and the next row, where requests come now and then.
PAUSE_SECONDS = 0.1
AIM_THROUGHPUT, AIM_LATENCY, AIM_COMPILING = 0.8, 1.3, 3.0

# Number of a task, and a query.
Row = tuple[int, str]


@dataclass
class Answers:
    """Rows that were answered within some time.

    Attributes:
        seconds: The time.
        latencies: Seconds that each row took.
        answers: Answer of each different row.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    answers: dict[Row, str] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        """Rows a second."""
        return len(self.latencies) / self.seconds


class EngineAlone:
    """The engine that the server uses, in this process, with the same demonstrations in the same order.

    It scores all labels, as the server does where a task has few.
    """

    def __init__(self, model: str, num_tasks: int, num_demonstrations: int) -> None:
        self.engine = Engine.from_pretrained(model)
        self.prefixes = [self._compiled(number, num_demonstrations) for number in range(num_tasks)]

    def _compiled(self, number: int, num_demonstrations: int) -> TaskPrefix:
        pairs = make_pairs(number, num_demonstrations)
        in_order = [pairs[i] for i in demonstrations_in_order([answer for _, answer in pairs], 0, "balanced")]
        task = Task.from_examples(f"task{number}", in_order, labels=LABELS)
        return self.engine.prefill(task, task.train)

    def answer(self, rows: Sequence[Row]) -> dict[Row, str]:
        """Answer rows, those of a task together."""
        answers: dict[Row, str] = {}
        for number, prefix in enumerate(self.prefixes):
            queries = [query for task, query in rows if task == number]
            predictions = self.engine.predict(prefix, queries, scores="all")
            for query, prediction in zip(queries, predictions, strict=True):
                answers[number, query] = prediction.answer
        return answers

    def rows_per_second(self, rows: Sequence[Row], seconds: float, at_once: int = NUM_ROWS) -> float:
        """Answer so many rows at once, from the first again after the last, until the time is over."""
        started, num_answered = time.perf_counter(), 0
        for first in itertools.cycle(range(0, len(rows), at_once)):
            num_answered += len(self.answer(rows[first : first + at_once]))
            if time.perf_counter() >= started + seconds:
                break
        return num_answered / (time.perf_counter() - started)

    def latencies(self, rows: Sequence[Row], seconds: float) -> list[float]:
        """Answer rows one by one, and return how long each took."""
        found: list[float] = []
        ends = time.perf_counter() + seconds
        for task, query in endlessly(rows):
            started = time.perf_counter()
            list(self.engine.predict(self.prefixes[task], [query], scores="all"))
            found.append(time.perf_counter() - started)
            if time.perf_counter() >= ends:
                break
        return found


def note(progress: str) -> None:
    """Say on the terminal what was measured so far; tables follow when they are whole."""
    print(progress, file=sys.stderr, flush=True)


def endlessly(rows: Sequence[Row], first: int = 0) -> Iterator[Row]:
    while True:
        yield from rows[first:]
        yield from rows[:first]


def rows_of(num_tasks: int) -> list[Row]:
    """Make the rows of some tasks, which take turns; none of them is a demonstration."""
    return [(i % num_tasks, f"today {query}") for i, (query, _) in enumerate(make_pairs(10_000, NUM_ROWS))]


@dataclass(frozen=True)
class Protocol:
    """How a server is asked.

    Attributes:
        request: Row -> path and JSON of the request for its answer.
        answer: JSON that comes back -> answer.
    """

    request: Callable[[Row], tuple[str, Any]]
    answer: Callable[[Any], str]


MANYICL = Protocol(
    lambda row: (f"/v1/tasks/task{row[0]}/predict", {"rows": [{"query": row[1]}]}),
    lambda content: str(content["predictions"][0]["answer"]),
)


async def ask(session: aiohttp.ClientSession, row: Row, answers: Answers, protocol: Protocol = MANYICL) -> None:
    """Send one row and note its answer."""
    path, body = protocol.request(row)
    started = time.perf_counter()
    async with session.post(path, json=body) as response:
        content = await response.read()
    answers.latencies.append(time.perf_counter() - started)
    if response.status != 200:
        raise SystemExit(f"The server answered {response.status}: {content.decode()}")
    answers.answers[row] = protocol.answer(json.loads(content))


async def ask_for(
    server: ServerProcess,
    rows: Sequence[Row],
    num_clients: int,
    seconds: float,
    pause: float = 0.0,
    protocol: Protocol = MANYICL,
) -> Answers:
    """Let clients send their rows for some time, each the next row once it has its answer."""
    answers = Answers()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector) as session:
        started = time.perf_counter()

        async def client(number: int) -> None:
            for row in endlessly(rows, number * len(rows) // num_clients):
                await ask(session, row, answers, protocol)
                if time.perf_counter() >= started + seconds:
                    break
                await asyncio.sleep(pause)

        await asyncio.gather(*(client(number) for number in range(num_clients)))
        answers.seconds = time.perf_counter() - started
    return answers


async def ask_until(server: ServerProcess, rows: Sequence[Row], work: Coroutine[Any, Any, None]) -> Answers:
    """Let one client send rows now and then, until other work is done."""
    answers = Answers()
    async with aiohttp.ClientSession(server.url) as session:
        started = time.perf_counter()
        other = asyncio.ensure_future(work)
        for row in endlessly(rows):
            await ask(session, row, answers)
            if other.done():
                break
            await asyncio.sleep(PAUSE_SECONDS)
        other.result()
        answers.seconds = time.perf_counter() - started
    return answers


class Benchmark:
    """A server with its tasks, and the engine alone beside it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.alone = EngineAlone(arguments.model, max(arguments.tasks), arguments.demonstrations)
        self.server = ServerProcess(arguments.model, folder / "data", arguments.threads)
        self.folder = folder

    def make_tasks(self) -> None:
        """Make the tasks, and wait until they can answer."""
        for number in range(max(self.arguments.tasks)):
            pairs = make_pairs(number, self.arguments.demonstrations)
            self.server.request("/v1/tasks", new_task(f"task{number}", pairs))
        for number in range(max(self.arguments.tasks)):
            found = self.server.wait_until_ready(f"task{number}")
        print(f"Prefixes of {found['num_tokens']:,} tokens from {found['num_shots']} demonstrations.\n", flush=True)

    def ask(self, num_tasks: int, num_clients: int, pause: float = 0.0) -> Answers:
        """Let the server answer for the usual time, after a second that does not count."""
        rows = rows_of(num_tasks)
        asyncio.run(ask_for(self.server, rows, num_clients, min(1.0, self.arguments.seconds), pause))
        return asyncio.run(ask_for(self.server, rows, num_clients, self.arguments.seconds, pause))

    def throughput(self) -> None:
        """Compare rows a second with those of the engine alone on the same rows, in turns."""
        lines = []
        for num_tasks in self.arguments.tasks:
            rows = rows_of(num_tasks)
            expected = self.alone.answer(rows)
            for num_clients in self.arguments.clients:
                turns = [self._turn(rows, num_tasks, num_clients) for _ in range(TURNS)]
                found = [answers for answers, _, _ in turns]
                answers = {row: answer for one in found for row, answer in one.answers.items()}
                latencies = [seconds for one in found for seconds in one.latencies]
                differing = sum(expected[row] != answer for row, answer in answers.items())
                rates = [[one.per_second, alone, at_once] for one, alone, at_once in turns]
                server, alone, at_once = map(statistics.median, zip(*rates, strict=True))
                lines.append(
                    {
                        "tasks, clients": f"{num_tasks}, {num_clients}",
                        "server, rows/s": f"{server:.1f}",
                        "engine, all rows at once": f"{alone:.1f}",
                        "ratio": _ratios([one / other for one, other, _ in rates]),
                        "engine, as many as clients": f"{at_once:.1f}",
                        "ratio to that": _ratios([one / other for one, _, other in rates]),
                        "p50, ms": f"{1000 * percentile(latencies, 0.5):.0f}",
                        "p95, ms": f"{1000 * percentile(latencies, 0.95):.0f}",
                        "answers that differ": f"{differing} of {len(answers)}",
                    }
                )
                note(" | ".join(lines[-1].values()))
        print(f"## Rows of one-row requests a second, medians of {TURNS} turns (lowest, highest)\n")
        print(f"{table(lines)}\n\nAim: ratio {AIM_THROUGHPUT} at 64 clients for one task.\n")

    def _turn(self, rows: Sequence[Row], num_tasks: int, num_clients: int) -> tuple[Answers, float, float]:
        """Let the server answer for a while, and the engine with all rows at once and with as many as clients."""
        alone = self.alone.rows_per_second(rows, self.arguments.seconds)
        found = self.ask(num_tasks, num_clients)
        return found, alone, self.alone.rows_per_second(rows, self.arguments.seconds, at_once=num_clients)

    def latency(self) -> None:
        """Compare the time of a single request with that of the engine, in turns."""
        rows, server, alone = rows_of(1), [], []
        for _ in range(TURNS):
            alone.append(statistics.median(self.alone.latencies(rows, self.arguments.seconds / TURNS)))
            server.append(statistics.median(asyncio.run(self._single(rows)).latencies))
        ratio = statistics.median(one / other for one, other in zip(server, alone, strict=True))
        print(f"## A single request, medians of {TURNS} turns\n")
        times = [1000 * statistics.median(found) for found in (server, alone)]
        print(f"Server {times[0]:.1f} ms, engine {times[1]:.1f} ms, ratio {ratio:.2f}. Aim: under {AIM_LATENCY}.\n")

    async def _single(self, rows: Sequence[Row]) -> Answers:
        return await ask_for(self.server, rows, 1, self.arguments.seconds / TURNS)

    def compile(self) -> None:
        """Compare the latency while a task that fills the context is compiled with that of a server at rest."""
        idle = asyncio.run(ask_for(self.server, rows_of(1), 1, 3 * self.arguments.seconds, PAUSE_SECONDS))
        body = new_task("many", make_pairs(77, self.arguments.many))
        compiling = asyncio.run(ask_until(self.server, rows_of(1), self._compile(body)))
        task = self.server.wait_until_ready("many")
        one, other = (percentile(found.latencies, 0.95) for found in (idle, compiling))
        print("## One-row requests, one every 0.1 s after the answer before, while a long task is compiled\n")
        print(f"The task: {task['num_tokens']:,} tokens, {task['num_shots']} demonstrations, {task['num_dropped']} did")
        print(f"not fit; compiled in {compiling.seconds:.0f} s meanwhile. p95 {1000 * other:.0f} ms of")
        print(f"{len(compiling.latencies)} requests, longest {1000 * max(compiling.latencies):.0f} ms; at rest")
        print(f"{1000 * one:.0f} ms of {len(idle.latencies)}. Ratio {other / one:.2f}. Aim: under {AIM_COMPILING:g}.\n")

    async def _compile(self, body: Any) -> None:
        """Make a task and wait until it can answer."""
        async with aiohttp.ClientSession(self.server.url) as session:
            async with session.post("/v1/tasks", json=body) as response:
                created = await response.json()
            while created["state"] != "ready":
                await asyncio.sleep(0.5)
                async with session.get(f"/v1/tasks/{created['id']}") as response:
                    created = await response.json()

    def restart(self) -> None:
        """Kill the server, start it at once, and take the time until a task that was in use answers."""
        lines = []
        for name, before in (("prefixes on the disk", lambda: None), ("prefixes deleted", self._delete_prefixes)):
            seconds = [self._seconds_of_a_restart(before) for _ in range(self.arguments.restarts)]
            healthy, answered = (statistics.median(column) for column in zip(*seconds, strict=True))
            lines.append({"": name, "answers /healthz, s": f"{healthy:.1f}", "first answer, s": f"{answered:.1f}"})
        print("## From kill -9 to the first answer of a task that was in use\n")
        print(f"{table(lines)}\n\nMedians of {self.arguments.restarts}; loading Python and the model included.\n")

    def _seconds_of_a_restart(self, before: Callable[[], None]) -> tuple[float, float]:
        row = rows_of(1)[0]
        path, body = "/v1/tasks/task0/predict", {"rows": [{"query": row[1]}]}
        self.server.request(path, body)
        # What is compiled is written after the answer.
        time.sleep(2)
        killed = time.perf_counter()
        self.server.kill()
        before()
        self.server.start()
        self.server.wait()
        healthy = time.perf_counter() - killed
        self.server.wait_for(path, body)
        return healthy, time.perf_counter() - killed

    def _delete_prefixes(self) -> None:
        shutil.rmtree(self.folder / "data" / "prefixes")


def _ratios(found: Sequence[float]) -> str:
    return f"{statistics.median(found):.2f} ({min(found):.2f}, {max(found):.2f})"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2", help="model that answers")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 20], help="numbers of tasks that rows are of")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="numbers of clients")
    parser.add_argument("--seconds", type=float, default=10.0, help="time of each measurement")
    parser.add_argument("--demonstrations", type=int, default=80, help="demonstrations of a task")
    parser.add_argument("--many", type=int, default=1000, help="demonstrations of the task that fills the context")
    parser.add_argument("--restarts", type=int, default=3, help="kills of the server")
    threads = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=threads, help="threads of a forward pass, on both sides")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="what is measured")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.model}; {machine()}; {arguments.threads} threads on both sides\n")
    with TemporaryDirectory() as folder:
        benchmark = Benchmark(arguments, Path(folder))
        with benchmark.server:
            benchmark.make_tasks()
            for part in PARTS:
                if part in arguments.only:
                    note(f"measuring {part}")
                    getattr(benchmark, part)()


if __name__ == "__main__":
    main()
