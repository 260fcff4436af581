"""What this machine offers: cores, memory, GPUs, libraries and their versions, as plain data.

The only place that looks. Nothing is imported before it is called, and no network is touched.
"""

from __future__ import annotations

import math
import os
import platform
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from manyicl.errors import UserError
from manyicl.library_errors import reason

PROC = Path("/proc")
CONTROL_GROUPS = Path("/sys/fs/cgroup")

CORE_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
OPTIONAL_LIBRARIES = ("bitsandbytes", "flash-attn", "liger-kernel", "bm25s", "lm-eval", "ray")

# What Linux calls the instructions that decide how fast this package computes.
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bfloat16",
    "amx_bf16": "AMX bfloat16",
    "sve": "SVE",
    "bf16": "Arm bfloat16",
}
_FAST_BFLOAT16 = frozenset({"AVX-512 bfloat16", "AMX bfloat16", "Arm bfloat16"})
# Older GPUs (Volta, Turing) emulate bfloat16.
_FIRST_WITH_BFLOAT16 = (8, 0)


@dataclass(frozen=True)
class Processor:
    """The CPU.

    Attributes:
        name: Name of the CPU, as the system calls it.
        num_physical_cores: None where the system does not say.
        num_logical_cores: Hardware threads.
        num_usable_cores: Those that this process may use, by affinity and by the quota of its container.
        features: Instructions that matter here; empty where the system lists none.
        fast_bfloat16: Whether it multiplies bfloat16 matrices itself, judged by ``features`` alone, never measured;
            None where nothing is listed.
    """

    name: str
    num_physical_cores: int | None
    num_logical_cores: int
    num_usable_cores: int
    features: tuple[str, ...]
    fast_bfloat16: bool | None


@dataclass(frozen=True)
class Gpu:
    """A device that torch can use.

    Attributes:
        name: Model of the device.
        memory_gib: In all.
        compute_capability: Major and minor.
        bfloat16: Whether it computes in bfloat16 itself; older ones emulate it.
    """

    name: str
    memory_gib: float
    compute_capability: tuple[int, int]
    bfloat16: bool


@dataclass(frozen=True)
class Machine:
    """All that a run can depend on.

    Attributes:
        system: Operating system and architecture.
        python: Version of Python.
        processor: The CPU.
        memory_gib: Memory that this process may use, by the machine and by the limit of its container.
        available_memory_gib: Memory of the machine that is not in use now.
        num_torch_threads: CPU threads that torch uses unless told otherwise.
        gpus: Those that torch sees.
        cuda: CUDA version that torch is built for; None for a build without.
        gpu_driver: Version of the NVIDIA driver that is loaded; None if none is.
        libraries: Version of each library that is always there.
        optional_libraries: Version of each that some features need; None where it is not installed.
        hub_offline: Whether HF_HUB_OFFLINE keeps it from the Hub.
        hub_token: Whether a token of the Hub is set; its value is never read out.
    """

    system: str
    python: str
    processor: Processor
    memory_gib: float
    available_memory_gib: float
    num_torch_threads: int
    gpus: tuple[Gpu, ...]
    cuda: str | None
    gpu_driver: str | None
    libraries: dict[str, str | None]
    optional_libraries: dict[str, str | None]
    hub_offline: bool
    hub_token: bool


def this_machine() -> Machine:
    """Look at everything. Imports torch."""
    import torch
    from huggingface_hub import constants, get_token

    total, available = memory_bytes()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        processor=processor(),
        memory_gib=total / 2**30,
        available_memory_gib=available / 2**30,
        num_torch_threads=torch.get_num_threads(),
        gpus=gpus(),
        cuda=cuda_version(),
        gpu_driver=_found_in_proc("driver/nvidia/version", r"^NVRM version:.*?\s(\d+\.\d+[.\d]*)\s") or None,
        libraries={name: library_version(name) for name in CORE_LIBRARIES},
        optional_libraries={name: library_version(name) for name in OPTIONAL_LIBRARIES},
        hub_offline=bool(constants.HF_HUB_OFFLINE),
        hub_token=get_token() is not None,
    )


def library_version(name: str) -> str | None:
    """Return the installed version of a distribution, without importing it; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def import_library(module: str) -> Any:
    """Import an optional library.

    Raises:
        UserError: If it is missing, or was built for another torch, as compiled ones often are.
    """
    try:
        return import_module(module)
    except ImportError as error:
        what = f"The library {module.partition('.')[0]} cannot be imported: {reason(error)}"
        remedy = "Install it for the torch that is here, or leave out what needs it."
        raise UserError("library_not_importable", what, remedy=remedy) from error


def gpus() -> tuple[Gpu, ...]:
    """List the devices that torch can use."""
    if (library_version("torch") or "").endswith("+cpu"):
        return ()  # known without the seconds that importing it takes
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(
        Gpu(
            name=device.name,
            memory_gib=device.total_memory / 2**30,
            compute_capability=(device.major, device.minor),
            bfloat16=(device.major, device.minor) >= _FIRST_WITH_BFLOAT16,
        )
        for device in map(torch.cuda.get_device_properties, range(num_gpus))
    )


def cuda_version() -> str | None:
    """Return the CUDA version that torch is built for; None for builds for CPUs or other devices."""
    import torch

    return torch.version.cuda


def processor() -> Processor:
    """Look at the CPU."""
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    logical = os.cpu_count() or 1
    # Nothing is listed outside Linux.
    flags = set(_found_in_proc("cpuinfo", r"^(?:flags|Features)\s*:(.*)$").split())
    features = tuple(name for flag, name in _FEATURES.items() if flag in flags)
    return Processor(
        name=_found_in_proc("cpuinfo", r"^model name\s*:(.*)$") or platform.processor() or platform.machine(),
        num_physical_cores=psutil.cpu_count(logical=False),
        num_logical_cores=logical,
        num_usable_cores=_num_usable_cores(logical),
        features=features,
        fast_bfloat16=bool(_FAST_BFLOAT16 & set(features)) if features else None,
    )


def _num_usable_cores(logical: int) -> int:
    # Python has no affinity outside Linux.
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    quota, _, period = _control_group_text("cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        return max(1, min(affinity, math.ceil(int(quota) / int(period))))
    return affinity


def memory_bytes() -> tuple[int, int]:
    """Return the memory that this process may use, and what is available of the machine's."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used = _control_group_text("memory.max"), _control_group_text("memory.current")
    if not limit.isdigit():
        return int(memory.total), int(memory.available)
    total = min(int(memory.total), int(limit))
    # What a container uses includes files that the kernel keeps in memory only until it is needed.
    kept_files = _control_group_number("memory.stat", r"^inactive_file (\d+)$")
    free = int(limit) - max(0, int(used) - kept_files) if used.isdigit() else total
    return total, max(0, min(total, free, int(memory.available)))


def _control_group_text(name: str) -> str:
    """Read a file of the control group (version 2) that a container runs in; nothing where there is none."""
    own = CONTROL_GROUPS / _found_in_proc("self/cgroup", r"^0::/(.*)$")
    return (_text(own / name) or _text(CONTROL_GROUPS / name)).strip()


def _control_group_number(name: str, pattern: str) -> int:
    """Return a number of the control group's statistics; 0 where there is none."""
    match = re.search(pattern, _control_group_text(name), re.MULTILINE)
    return int(match[1]) if match else 0


def _found_in_proc(file: str, pattern: str) -> str:
    """Return what a pattern captures in a file of the kernel; nothing where there is none."""
    match = re.search(pattern, _text(PROC / file), re.MULTILINE)
    return match[1].strip() if match else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
