"""Machines that are not here: what tests put in the place of the one look at this one."""

from __future__ import annotations

import pytest

from manyicl.model import machine
from manyicl.model.machine import Gpu

H100 = Gpu("NVIDIA H100", 79.6, (9, 0), True)
T4 = Gpu("Tesla T4", 14.7, (7, 5), False)
GPU_LIBRARIES = {"bitsandbytes": "0.50.2", "flash-attn": "2.8.3", "liger-kernel": "0.8.5"}


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    gpus: tuple[Gpu, ...] = (H100,),
    cuda: str | None = "12.8",
    libraries: dict[str, str] | None = None,
) -> None:
    """Let this machine look like another one; by default one GPU and all libraries for it."""
    installed = GPU_LIBRARIES if libraries is None else libraries
    found = machine.library_version
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    monkeypatch.setattr(machine, "cuda_version", lambda: cuda)
    monkeypatch.setattr(
        machine, "library_version", lambda name: installed.get(name) if name in GPU_LIBRARIES else found(name)
    )
