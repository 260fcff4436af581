"""The processes that torchrun or accelerate started for a run: how many there are, and which one this is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from manyicl.errors import MachineError, UserError, quoted
from manyicl.library_errors import reason

if TYPE_CHECKING:
    import torch

# A process waits for the others, which may still evaluate their tasks; the default of half an hour could be too short.
SECONDS_WAITED = 24 * 3600

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class AnotherProcessFailedError(MachineError):
    """A process fails because another one did, for a reason that the other one shows."""


def world_size() -> int:
    """Return how many processes share a run; 1 without a launcher.

    Raises:
        UserError: If the environment does not say so in a number.
    """
    return _number("WORLD_SIZE", default=1, least=1)


def is_launched() -> bool:
    """Tell whether torchrun or accelerate started this command, or `training.launch` this process."""
    return any(name in os.environ for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU"))


def is_main_process() -> bool:
    """Tell whether this process writes files and shows progress.

    Raises:
        UserError: If the environment gives no number for its rank.
    """
    return rank() == 0


def rank() -> int:
    """Return the number of this process among all that share a run, from 0."""
    return _number("RANK", default=0, least=0)


def local_rank() -> int:
    """Return the number of this process on its machine, which is that of its GPU."""
    return _number("LOCAL_RANK", default=0, least=0)


def processes_per_machine() -> int:
    """Return how many processes were started on this machine."""
    return _number("LOCAL_WORLD_SIZE", default=1, least=1)


def is_sharded() -> bool:
    """Tell whether accelerate was told to shard the weights over processes (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def any_process(is_so: bool, device: torch.device) -> bool:
    """Tell in all processes whether something is so in one of them; they meet here."""
    import torch

    if world_size() == 1:
        return is_so
    anywhere = torch.tensor(float(is_so), device=device)
    torch.distributed.all_reduce(anywhere)
    return bool(anywhere)


def raise_in_all(failure: Exception | None) -> None:
    """Let every process fail where one of them has failed; they meet here.

    Raises:
        Exception: The failure of this process, or else the first of another one, as an error that ends a command.
    """
    if world_size() > 1:
        from accelerate.utils import gather_object

        failures = gather_object([None if failure is None else _for_other_processes(failure)])
        failure = failure or next((other for other in failures if other is not None), None)
    if failure is not None:
        raise failure


def _for_other_processes(failure: Exception) -> Exception:
    """Return an error that other processes can read, and that ends a command in one sentence."""
    if isinstance(failure, UserError | MachineError):
        return failure
    return AnotherProcessFailedError(f"Another process failed: {type(failure).__name__}, {reason(failure)}.")


def is_consequence(failure: BaseException) -> bool:
    """Tell whether a process failed only because another one had: it was told so, or its connection was cut."""
    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, AnotherProcessFailedError) or (isinstance(seen, RuntimeError) and _is_of_connection(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _is_of_connection(error: RuntimeError) -> bool:
    """Recognise an error of the process group; gloo raises no class of its own, and names its source file."""
    import torch

    return (
        isinstance(error, torch.distributed.DistError) or re.search(r"\bgloo\b", str(error), re.IGNORECASE) is not None
    )


def shared_out(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Outcome]]) -> list[Outcome]:
    """Let each process do its share of some work, and return the outcomes of all in each of them.

    Args:
        items: What there is to do; the same in all processes. Each takes every n-th, if there are n processes.
        work: Called with the items of this process.

    Raises:
        Exception: In all processes, what ``work`` raises in one of them.
    """
    outcomes: Sequence[Outcome] = ()
    failure = None
    try:
        outcomes = work(items[rank() :: world_size()])
    except Exception as error:
        failure = error
    raise_in_all(failure)
    if world_size() == 1:
        return list(outcomes)
    from accelerate.utils import gather_object

    return list(chain.from_iterable(gather_object([outcomes])))


def end_processes() -> None:
    """Leave the process group that transformers formed, if there is one."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def loopback_interface() -> str:
    """Return the name of the network interface that no other machine reaches.

    Raises:
        MachineError: If there is none.
    """
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return str(name)
    raise MachineError("There is no network interface with the address 127.0.0.1, over which processes could meet.")


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        what = f"the environment variable {name} is wrong"
        expected = f"a whole number of at least {least}, as torchrun sets it"
        remedy = "Unset it, or start with torchrun or accelerate."
        raise UserError("wrong_environment", what, expected=expected, found=quoted(text), remedy=remedy, field=name)
    return int(text)
