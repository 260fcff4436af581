"""Training in processes of their own, which are killed from outside or kill themselves at a chosen file operation."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial, wraps
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from transformers.models.llama import modeling_llama  # noqa: F401  # once, by the process that all are forked from
from transformers.utils import logging

from manyicl.model.load import LoadedModel
from manyicl.training.job import ensure_trained
from manyicl.training.recipe import Recipe
from tests.training.recipes import measuring, small_recipe, small_tasks

NUM_STEPS = 6
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def scratch_recipe(output: Path) -> Recipe:
    """A new model with dropout, saved after every step."""
    return small_recipe(output, f"training.num_steps={NUM_STEPS}", "training.save_every=1", "training.log_every=4")


def adapter_recipe(output: Path, base: Path, seed: int) -> Recipe:
    """An adapter with dropout, evaluated after every second step and saved after every one."""
    return small_recipe(
        output,
        "model.from_scratch=null",
        f"model.base={base}",
        "model.lora={rank: 4, dropout: 0.1}",
        f"training.num_steps={NUM_STEPS}",
        "training.evaluate_every=2",
        "training.save_every=1",
        "training.log_every=4",
        f"training.seed={seed}",
    )


def score_of_bits(loaded: LoadedModel) -> dict[str, float]:
    """A score that one changed bit of a weight changes, and that draws from the generators as an evaluation might."""
    digest = hashlib.sha256()
    for name, weights in loaded.model.state_dict().items():
        digest.update(name.encode() + weights.numpy().tobytes())
    torch.rand(3)
    return {"score": int.from_bytes(digest.digest()[:4]) / 2**32}


class Moments:
    """Counts the moments at which a run touches its folder, and kills the process at one of them."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self._folder = str(folder)
        self._kill_at = kill_at
        self._lock = threading.Lock()
        self.names: list[str] = []

    def watch(self) -> None:
        """Begin to count what Python does to files, and the writing of weights and states, half-way through."""
        sys.addaudithook(self._see)
        writer: Any = safetensors.torch
        writer.serialize_file = self._halved(writer.serialize_file, 1)
        torch.save = self._halved(torch.save, 1)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            counts = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            counts = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        # Where a whole folder is removed, its files are named without it.
        if counts and (self._is_inside(arguments[0]) or (event == "os.remove" and arguments[1] != -1)):
            self._pass(f"{event} {arguments[0]}")

    def _is_inside(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder)

    def _pass(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            if len(self.names) == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def _halved(self, write: Callable[..., Any], place: int) -> Callable[..., Any]:
        @wraps(write)
        def writing(*arguments: Any, **options: Any) -> Any:
            result = write(*arguments, **options)
            if self._is_inside(arguments[place]):
                with self._lock:
                    if len(self.names) + 1 == self._kill_at:
                        os.truncate(arguments[place], Path(arguments[place]).stat().st_size // 2)
                self._pass(f"half of {arguments[place]}")
            return result

        return writing


def _train(recipe: Recipe, kill_at: int | None, moments_file: Path | None) -> None:
    logging.disable_progress_bar()
    moments = Moments(recipe.output, kill_at)
    moments.watch()
    evaluation = score_of_bits if recipe.training.evaluate_every else None
    ensure_trained(recipe, small_tasks(), measuring(evaluation), console=Console(file=io.StringIO()))
    if moments_file is not None:
        moments_file.write_text("\n".join(moments.names), encoding="utf-8")


def start(recipe: Recipe, kill_at: int | None = None, moments_file: Path | None = None) -> ForkServerProcess:
    """Start a run, or resume it; it kills itself at the ``kill_at``-th moment, if it gets there."""
    process = PROCESSES.Process(target=partial(_train, recipe, kill_at, moments_file))
    process.start()
    return process


def ended(process: ForkServerProcess) -> bool:
    """Wait for a run; return False if it was killed."""
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the run ended with {process.exitcode}"
    return process.exitcode == 0
