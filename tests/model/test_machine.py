"""What is looked at, from the files of other machines; and that looking costs nothing until asked."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.model import machine
from manyicl.model.machine import OPTIONAL_LIBRARIES, import_library, memory_bytes, processor, this_machine

CPU_INFO = {
    "epyc": ("model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
    "xeon": ("model name\t: Xeon\nflags\t\t: avx2 avx512f amx_bf16 amx_tile\n", True),
    "older": ("model name\t: i5\nflags\t\t: fpu sse2 avx2\n", False),
    "graviton": ("processor\t: 0\nFeatures\t: fp asimd sve bf16\n", True),
    "silent": ("", None),
}


@pytest.fixture(name="proc")
def _proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "self").mkdir()
    (tmp_path / "groups").mkdir()
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "groups")
    return tmp_path


def test_a_machine_is_described_and_can_be_written_down() -> None:
    here = this_machine()
    assert here.processor.num_usable_cores >= 1
    assert 0 < here.available_memory_gib <= here.memory_gib
    assert here.libraries["torch"] is not None
    assert set(here.optional_libraries) == set(OPTIONAL_LIBRARIES)
    assert json.loads(json.dumps(asdict(here)))["num_torch_threads"] == here.num_torch_threads


@pytest.mark.parametrize("name", CPU_INFO)
def test_fast_bfloat16_is_judged_by_the_instructions_that_are_listed(name: str, proc: Path) -> None:
    text, fast = CPU_INFO[name]
    (proc / "cpuinfo").write_text(text, encoding="utf-8")
    found = processor()
    assert found.fast_bfloat16 is fast
    assert bool(found.features) is bool(text)


def test_a_container_may_hold_fewer_cores_and_less_memory_than_the_machine(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    assert processor().num_usable_cores == 4
    (proc / "self" / "cgroup").write_text("0::/job\n", encoding="utf-8")
    (proc / "groups" / "cpu.max").write_text("max 100000\n", encoding="utf-8")
    assert processor().num_usable_cores == 4
    (proc / "groups" / "job").mkdir()
    (proc / "groups" / "job" / "cpu.max").write_text("150000 100000\n", encoding="utf-8")
    (proc / "groups" / "job" / "memory.max").write_text("104857600\n", encoding="utf-8")
    assert processor().num_usable_cores == 2
    assert this_machine().memory_gib == pytest.approx(100 / 1024)
    (proc / "groups" / "job" / "memory.current").write_text("83886080\n", encoding="utf-8")
    (proc / "groups" / "job" / "memory.stat").write_text(
        "anon 1\ninactive_file 20971520\nactive_file 9\n", encoding="utf-8"
    )
    assert memory_bytes() == (100 * 2**20, 40 * 2**20), "of the 80 MiB in use, 20 can be given back"


def test_the_driver_is_read_where_it_is_loaded(proc: Path) -> None:
    assert this_machine().gpu_driver is None
    (proc / "driver" / "nvidia").mkdir(parents=True)
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (builder)",
    ):
        (proc / "driver" / "nvidia" / "version").write_text(text, encoding="utf-8")
        assert this_machine().gpu_driver == "535.104.05"


def test_that_a_token_is_set_is_known_but_not_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    here = this_machine()
    assert here.hub_token is True
    assert "secret" not in repr(here)


def test_a_library_that_cannot_be_imported_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "built_for_another.py").write_text("raise ImportError('undefined symbol: x')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="built_for_another cannot be imported: undefined symbol: x"):
        import_library("built_for_another")
    with pytest.raises(UserError, match="no module named 'never_written'"):
        import_library("never_written.inner")


def test_looking_is_imported_cheaply() -> None:
    code = (
        "import sys, manyicl.model.machine, manyicl.cli.doctor;"
        "print([name for name in ('torch', 'transformers', 'psutil') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
