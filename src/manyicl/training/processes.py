"""The processes that torchrun or accelerate started for a run: how many there are, and which one this is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from manyicl.errors import UserError, quoted

if TYPE_CHECKING:
    import torch


def world_size() -> int:
    """Return how many processes share a run; 1 without a launcher.

    Raises:
        UserError: If the environment does not say so in a number.
    """
    return _number("WORLD_SIZE", default=1, least=1)


def is_main_process() -> bool:
    """Tell whether this process writes files and shows progress.

    Raises:
        UserError: If the environment gives no number for its rank.
    """
    return _number("RANK", default=0, least=0) == 0


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


def end_processes() -> None:
    """Leave the process group that transformers formed, if there is one."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        what = f"the environment variable {name} is wrong"
        expected = f"a whole number of at least {least}, as torchrun sets it"
        remedy = "Unset it, or start with torchrun or accelerate."
        raise UserError("wrong_environment", what, expected=expected, found=quoted(text), remedy=remedy, field=name)
    return int(text)
