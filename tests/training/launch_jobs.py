"""What processes do that `in_processes` starts in tests; also run as a script that starts them."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))

from manyicl.errors import UserError
from manyicl.training.launch import in_processes
from manyicl.training.processes import is_main_process, world_size
from manyicl.training.stopping import taking_signals

if TYPE_CHECKING:
    from manyicl.training.job import TrainedRun
    from manyicl.training.recipe import Recipe


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


def fail_in_second(how: str) -> float:
    """Fail in one process of two, while the other waits."""
    meet()
    if not is_main_process():
        if how == "mistake":
            raise UserError("a_code", "something is wrong", remedy="Make it right.", field="a.key")
        if how == "bug":
            raise UnpicklableError("a bug", "of ours")
        os.kill(os.getpid(), signal.SIGKILL)
    return meet()


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
