"""Functions run in several processes that share a run, joined by torch.distributed on the loopback."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from manyicl.training.processes import end_processes
from tests.training.killing import PROCESSES

SECONDS_ALLOWED = 120


def outcomes(
    function: Callable[..., Any],
    *arguments: object,
    num_processes: int = 2,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call a function in each process, as a launcher would start it; return what it returned or raised, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    launched |= {"LOCAL_WORLD_SIZE": str(num_processes), **(environment or {})}
    started = []
    for rank in range(num_processes):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        own = {**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = PROCESSES.Process(target=_run, args=(function, arguments, own, sender))
        process.start()
        sender.close()
        started.append((process, receiver))
    try:
        return [_outcome(receiver) for _, receiver in started]
    finally:
        for process, _ in started:
            process.join(5)
            process.kill()


def results(function: Callable[..., Any], *arguments: object, **options: Any) -> list[Any]:
    """Return what `outcomes` does, and raise the first error."""
    found = outcomes(function, *arguments, **options)
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return found


def _outcome(receiver: Connection) -> Any:
    assert receiver.poll(SECONDS_ALLOWED), "a process waits for another"
    return pickle.loads(receiver.recv_bytes())


def _run(
    function: Callable[..., Any], arguments: tuple[object, ...], environment: dict[str, str], sender: Connection
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        outcome = function(*arguments)
    except BaseException as error:
        outcome = error
    # By value: torch would hand over shared memory, which goes with this process.
    sender.send_bytes(pickle.dumps(outcome))
    end_processes()
