"""What processes do that `in_processes` starts in tests; also run as a script that starts them."""

from __future__ import annotations

import io
import os
import signal
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))

from manyicl.errors import MachineError, UserError
from manyicl.training.launch import in_processes
from manyicl.training.processes import is_main_process, raise_in_all, world_size
from manyicl.training.stopping import taking_signals

if TYPE_CHECKING:
    from manyicl.tasks.task import Task
    from manyicl.training.job import TrainedRun
    from manyicl.training.recipe import Recipe
    from manyicl.training.recipe_tasks import RecipeTasks


class UnpicklableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def threads_of_torch() -> list[int]:
    """Return the number of threads of torch in each process."""
    counts: list[int] = [0] * world_size()
    torch.distributed.all_gather_object(counts, torch.get_num_threads())
    return counts


def meet() -> float:
    """Wait for the others, which never come where one fails."""
    numbers = torch.tensor(float(os.environ["RANK"]) + 1)
    torch.distributed.all_reduce(numbers)
    return numbers.item()


def describe(greeting: str) -> tuple[str, int, int, float, bool]:
    """Return what a process is given, and the sum over all of them."""
    return greeting, world_size(), torch.get_num_threads(), meet(), is_main_process()


def fail(how: str) -> None:
    """Fail as a user's mistake, a failing machine, a bug or a kill does."""
    if how == "mistake":
        raise UserError("a_code", "something is wrong", remedy="Make it right.", field="a.key")
    if how == "machine":
        raise MachineError("The disk is full.")
    if how == "bug":
        raise UnpicklableError("a bug", "of ours")
    os.kill(os.getpid(), signal.SIGKILL)


def fail_in_second(how: str) -> float:
    """Fail in one process of two, while the other waits."""
    meet()
    if not is_main_process():
        fail(how)
    return meet()


def fail_in_second_and_then_first(how: str, then: str) -> float:
    """Fail in one process of two; the other notices that and fails in its own way."""
    meet()
    if not is_main_process():
        fail(how)
    try:
        return meet()
    except RuntimeError as error:
        if then == "aborts":
            os.abort()
        raise MachineError(f"A checkpoint could not be saved: {error}") from error


def fail_in_second_and_tell_first() -> None:
    """Fail in one process of two by a bug that the other is told of; it is the first to end."""
    from accelerate.state import PartialState

    PartialState(cpu=True, backend="gloo")
    failure = None
    if not is_main_process():
        failure = ZeroDivisionError("seven by nothing")
    try:
        raise_in_all(failure)
    except ZeroDivisionError:
        time.sleep(0.5)
        raise


def die_while_reporting() -> None:
    """Let the report of this process be cut off by a kill."""

    def send_half(sender: Connection, report: bytes) -> None:
        os.write(sender.fileno(), struct.pack("!i", len(report)) + report[: len(report) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection.send_bytes = send_half  # type: ignore[method-assign, assignment]


class LoadedError(Exception):
    """Ends a run once its tasks are loaded."""


def load_with_rehash(recipe: Recipe, wrong: Recipe) -> list[tuple[tuple[str, ...], tuple[str, ...], UserError]]:
    """Load the tasks of a run whose rows are read again, then those of one with a mistake in its rows.

    Returns:
        For each process, the files of the tasks that it read, the hash of each task that it has, and the mistake.
    """
    from manyicl.tasks import task_cache
    from manyicl.tasks.files import load_place
    from manyicl.training import job

    read, hashes = list[str](), list[str]()

    def noted(place: str | Path, data_root: Path | None) -> Task:
        read.append(str(place))
        return load_place(place, data_root)

    def loaded(recipe: Recipe, tasks: RecipeTasks, *others: object) -> None:
        hashes.extend(task.data_hash for side in tasks for task in side)
        raise LoadedError

    vars(task_cache)["load_place"], vars(job)["prepare_run"] = noted, loaded
    with suppress(LoadedError):
        job.ensure_trained(recipe, rehash=True, console=Console(file=io.StringIO()))
    own = tuple(read), tuple(hashes)
    with pytest.raises(UserError) as mistake:
        job.ensure_trained(wrong, rehash=True, console=Console(file=io.StringIO()))
    of_processes: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(of_processes, (*own, mistake.value))
    return of_processes


def train_all_small(recipes: Sequence[Recipe]) -> list[TrainedRun]:
    """Train on the small tasks again and again."""
    return [train_small(recipe) for recipe in recipes]


def train_small(recipe: Recipe) -> TrainedRun:
    """Train on the small tasks."""
    from manyicl.training.job import ensure_trained
    from tests.training.recipes import small_tasks

    return ensure_trained(recipe, small_tasks(), console=Console(file=io.StringIO()))


def wait_for_signals(folder: Path, *, stops: bool) -> str:
    """Write down that this process is there, then wait for a signal, and stop at it or do not."""
    asked: list[int] = []
    meet()
    (folder / f"{os.getpid()}").touch()
    with taking_signals(lambda number, frame: asked.append(number)):
        while not (asked and stops):
            time.sleep(0.05)
    meet()
    return f"stopped by {len(asked)} of {signal.Signals(asked[0]).name}"


if __name__ == "__main__":
    job = partial(wait_for_signals, Path(sys.argv[1]), stops=sys.argv[2] == "stops")
    try:
        print(in_processes(job, 2, 1))
    except KeyboardInterrupt:
        print("ended at once")
