"""Processes that write to a database until they are killed, and say which writes were acknowledged."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from manyicl.server.database import Database
from manyicl.server.job_store import JobStore
from manyicl.server.task_store import TaskStore
from tests.server.simple_store import apply, random_operations

# Forks from a process that has the imports, and no threads or open databases.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["__main__", "tests.server.writers"])
PORTION = 7
MOST_WRITES = 12
MOST_WAIT_SECONDS = 0.03


def write_tasks(data: Path, url: str | None, seed: int, start: int, acknowledged: Connection) -> None:
    """Do random operations from number ``start`` on, without end; each has its number as idempotency key."""
    store = TaskStore(Database.open(data, url))
    for number, operation in islice(enumerate(random_operations(seed)), start, None):
        apply(store, operation, f"operation {number}")
        acknowledged.send_bytes(str(number).encode())


def write_results(data: Path, url: str | None, job_id: str, acknowledged: Connection) -> None:
    """Give the waiting rows of a job their results, in portions, until all have one."""
    store = JobStore(Database.open(data, url))
    while rows := store.waiting_rows(job_id, PORTION):
        assert store.put_results(job_id, [(number, {"answer": row["text"]}) for number, row in rows], 1)
        acknowledged.send_bytes(str(rows[-1][0]).encode())
    time.sleep(60)


def killed_at_random(write: Callable[..., None], arguments: tuple[Any, ...], rng: random.Random) -> int | None:
    """Run a writer, kill it with SIGKILL a moment after some writes, and return the last number that it sent."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=write, args=(*arguments, sender))
    process.start()
    sender.close()
    numbers = list(islice(_received(receiver), rng.randint(0, MOST_WRITES)))
    # A write takes some milliseconds: kills are in all of its parts, and, without a wait, at the start of the process.
    time.sleep(rng.uniform(0, MOST_WAIT_SECONDS))
    process.kill()
    process.join()
    process.close()
    numbers += _received(receiver)
    receiver.close()
    return numbers[-1] if numbers else None


def _received(receiver: Connection) -> Iterator[int]:
    while True:
        try:
            yield int(receiver.recv_bytes())
        except EOFError:
            return
