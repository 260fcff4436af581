"""How many processes `manyicl train` starts on a CPU, and why; imports torch only where it may have a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

from manyicl.errors import pluralized
from manyicl.model import machine
from manyicl.training.checkpoint import Checkpoints
from manyicl.training.memory import model_size, process_bytes
from manyicl.training.processes import is_launched, world_size
from manyicl.training.recipe import Recipe
from manyicl.training.run_folder import RunFolder

# Weights times tokens of a run that is long enough: each process spends about 5 seconds on imports, and this many
# take some minutes on one core.
LEAST_WORK = 1e12


@dataclass(frozen=True)
class ProcessChoice:
    """How many processes train, and why.

    Attributes:
        num_processes: Processes that share each step.
        num_threads: CPU threads of each; None for torch's choice.
        reason: Why, as a part of a sentence.
        is_news: Whether a user would want to know it when a run starts.
    """

    num_processes: int
    num_threads: int | None
    reason: str
    is_news: bool = False

    def sentence(self) -> str:
        """Say what was chosen and why."""
        if self.num_processes == 1:
            return f"Training in one process, because {self.reason}."
        threads = f" of {pluralized(self.num_threads, 'thread')} each" if self.num_threads else ""
        return f"Training in {self.num_processes} processes{threads}, because {self.reason}."


def choose_processes(recipe: Recipe, *, resumes: bool = False) -> ProcessChoice:
    """Choose one process per core where that is faster and fits, and as many as before where a run resumes.

    Processes share the packed sequences of a step, so their number divides ``sequences_per_step``. It changes neither
    which sequences a step sees nor, dropout aside, the update.

    Args:
        recipe: The run.
        resumes: Whether the run in its output folder is resumed.
    """
    training = recipe.training
    if is_launched():
        return ProcessChoice(world_size(), training.num_threads, "a launcher started this command")
    if os.name != "posix":
        return _one_process(recipe, "this system cannot ask processes to stop and save")
    if machine.gpus():
        return _one_process(recipe, "a GPU trains")
    if training.num_processes is not None:
        return _several(recipe, training.num_processes, "training.num_processes says so")
    if resumes and (saved_by := Checkpoints(RunFolder(recipe.output).checkpoints).num_processes()):
        return _several(recipe, saved_by, "as many saved the checkpoint that is resumed")
    if training.num_threads is not None:
        return _one_process(recipe, "training.num_threads is set")
    if "OMP_NUM_THREADS" in os.environ:
        return _one_process(recipe, "OMP_NUM_THREADS is set")
    return _as_many_as_fit(recipe)


def _as_many_as_fit(recipe: Recipe) -> ProcessChoice:
    num_sequences, num_cores, size = recipe.training.sequences_per_step, _num_cores(), model_size(recipe)
    shared_evenly = [number for number in range(num_cores, 0, -1) if num_sequences % number == 0]
    if num_cores == 1:
        return _one_process(recipe, "it may use one core")
    if size is None:
        return _one_process(recipe, "the size of the model is not known before it is loaded")
    if size.num_weights * recipe.num_sequences * recipe.sequences.max_context_tokens < LEAST_WORK:
        return _one_process(recipe, "the run is too short for more to pay")
    if shared_evenly == [1]:
        share = f"a step takes {pluralized(num_sequences, 'sequence')} (training.sequences_per_step)"
        return _one_process(recipe, f"{share}, which processes cannot share evenly", is_news=True)
    _, available = machine.memory_bytes()
    need = process_bytes(recipe, size)
    number = next((number for number in shared_evenly if number * need <= available), 1)
    memory = f"about {need / 2**30:.1f} GiB each, and {available / 2**30:.1f} GiB are available"
    if number == 1:
        return _one_process(recipe, f"more would need {memory}", is_news=True)
    reason = f"there are {num_cores} cores and {num_sequences} sequences a step; processes need {memory}"
    return _several(recipe, number, reason)


def _one_process(recipe: Recipe, reason: str, *, is_news: bool = False) -> ProcessChoice:
    return ProcessChoice(1, recipe.training.num_threads, reason, is_news)


def _several(recipe: Recipe, number: int, reason: str) -> ProcessChoice:
    if number == 1:
        return _one_process(recipe, reason)
    num_threads = recipe.training.num_threads or max(1, _num_cores() // number)
    return ProcessChoice(number, num_threads, reason, is_news=True)


def _num_cores() -> int:
    """Count what computes: two hardware threads of one core are hardly faster than one."""
    processor = machine.processor()
    return min(processor.num_usable_cores, processor.num_physical_cores or processor.num_usable_cores)
