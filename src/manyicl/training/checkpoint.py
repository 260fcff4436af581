"""Checkpoints that are whole or do not count: saved aside, sealed with a hash of each file, renamed into place.

::

    checkpoints/
      checkpoint-20/         whole: seal.json names its files
      checkpoint-40/
      partial/               what is being saved or removed; swept when a run goes on

A kill at any moment leaves a whole checkpoint in its place or a piece in ``partial``, never a piece in place.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from manyicl.errors import MachineError, UserError, counted
from manyicl.training.durable import sync_folder, sync_tree, write_whole

SEAL_FILE = "seal.json"
FULL_DISK_NUMBERS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# safetensors and torch say it in words only, and torch sometimes not even so: then the free room tells.
FULL_DISK_WORDS = ("No space left", "quota exceeded", "File too large")
FULL_BELOW_BYTES = 2**20


class SavingFailedError(MachineError):
    """A checkpoint or the finished model could not be written; the run goes on with --resume once it can be."""


class RunInterrupted(KeyboardInterrupt):
    """A run that has begun was ended at once; what its checkpoints hold is left.

    Attributes:
        checkpoint: The newest; None if there is none yet.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        super().__init__()
        self.checkpoint = checkpoint


class SealedFile(BaseModel):
    """A file of a checkpoint as it was when the checkpoint was whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size: int = Field(ge=0)
    sha256: str


class Seal(BaseModel):
    """The content of seal.json, written into a checkpoint after all its other files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    step: int
    num_processes: int
    best_step: int | None
    files: tuple[SealedFile, ...]

    @property
    def num_bytes(self) -> int:
        """Room that the checkpoint takes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        checkpoint: The newest whole one; None for the beginning.
        left_out: Newer ones, each with the reason.
    """

    checkpoint: Path | None
    left_out: tuple[str, ...]

    def sentence(self) -> str:
        """Say where the run goes on and what was left out."""
        start = self.checkpoint or "the beginning, because there is no whole checkpoint yet"
        if not self.left_out:
            return f"Resuming from {start}."
        left_out = f"{counted(len(self.left_out), 'checkpoint')} left out: {', '.join(self.left_out)}"
        return f"Resuming from {start}; {left_out}."


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path

    @property
    def partial(self) -> Path:
        """Where a checkpoint, or the finished model, stands while it is being written."""
        return self.folder / "partial"

    def place(self, step: int) -> Path:
        """Return where the checkpoint of a step stands once it is whole."""
        return self.folder / f"checkpoint-{step}"

    def clear_partial(self) -> None:
        """Remove what was not finished."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.partial)

    def seal(self, step: int, num_processes: int, best_step: int | None) -> None:
        """Declare the checkpoint that stands in ``partial`` whole and put it in its place.

        Raises:
            SavingFailedError: If it lacks a part, without which transformers would resume to other weights.
        """
        part = self.partial / self.place(step).name
        missing = _missing_parts(part, num_processes)
        if missing:
            raise SavingFailedError(
                f"{part.name} lacks {', '.join(missing)} after saving. All processes must write to one file system."
            )
        names = sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())
        files = tuple(_sealed_file(part, name) for name in names)
        seal = Seal(step=step, num_processes=num_processes, best_step=best_step, files=files)
        sync_tree(part)
        write_whole(part / SEAL_FILE, seal.model_dump_json(indent=2) + "\n")
        if self.place(step).exists():
            self._drop(step)
        part.rename(self.place(step))
        sync_folder(self.folder)

    def rotate(self, num_kept: int) -> None:
        """Remove all but the newest checkpoints and the best one of each, so that a run can go on from any of them."""
        seals = self._seals()
        newest = sorted(seals, reverse=True)[:num_kept]
        kept = {*newest, *(seals[step].best_step for step in newest)}
        for step in set(seals) - kept:
            self._drop(step)

    def newest(self) -> Path | None:
        """Return the newest sealed checkpoint without reading its files."""
        return self.place(max(seals)) if (seals := self._seals()) else None

    def last_good(self) -> str:
        """Say what a run that fails now can go back to."""
        newest = self.newest()
        return f"The last good checkpoint is {newest}." if newest else "There is no checkpoint yet."

    def flaw(self, step: int) -> str | None:
        """Compare a checkpoint with its seal, file by file; None where all are as they were."""
        place = self.place(step)
        if not (place / SEAL_FILE).is_file():
            return (
                f"has no {SEAL_FILE}: an older version made it, or it was cut off" if place.is_dir() else "is missing"
            )
        seal = _read_seal(place)
        if seal is None or seal.step != step:
            return f"has a {SEAL_FILE} that cannot be used"
        for file in seal.files:
            if not (place / file.name).is_file():
                return f"lacks {file.name}"
            if (place / file.name).stat().st_size != file.size or _sealed_file(place, file.name) != file:
                return f"differs from its seal in {file.name}"
        return None

    def resume_point(self, num_processes: int) -> ResumePoint:
        """Find the newest checkpoint from which a run goes on exactly, and sweep away what stands in its way.

        Raises:
            UserError: If there are checkpoints and none can be used, or another number of processes saved it.
        """
        seals = self._seals()
        flaws: dict[int, str] = {}
        chosen = None
        for step in sorted(self._steps(), reverse=True):
            seal = seals.get(step)
            reason = self.flaw(step)
            if reason is None and seal is not None:
                reason = self._flaw_of_best(seal, flaws)
            if reason is None:
                chosen = step
                break
            flaws[step] = reason
        left_out = [f"checkpoint-{step} {reason}" for step, reason in flaws.items()]
        if chosen is None and left_out:
            raise UserError(
                f"--resume: no checkpoint in {str(self.folder)!r} can be used: {', '.join(left_out)}. Start anew with "
                "--overwrite, or remove them and resume from the beginning."
            )
        if chosen is not None and seals[chosen].num_processes != num_processes:
            raise UserError(
                f"--resume: {str(self.place(chosen))!r} was saved by "
                f"{_processes(seals[chosen].num_processes)}; this run has {num_processes}. Resume it with as many, "
                "or start anew with --overwrite."
            )
        cut_off = sorted(self.partial.glob("checkpoint-*"))
        left_out = [*(f"{path.name} was cut off while it was saved" for path in cut_off), *left_out]
        self.clear_partial()
        for step in flaws:
            if step in seals:
                self._drop(step)
        return ResumePoint(self.place(chosen) if chosen is not None else None, tuple(left_out))

    def _flaw_of_best(self, seal: Seal, flaws: dict[int, str]) -> str | None:
        """Say what the best model lacks that a run which goes on here would save at its end."""
        best = seal.best_step
        if best is None or best == seal.step:
            return None
        reason = flaws.get(best) or self.flaw(best)
        return reason and f"needs checkpoint-{best}, the best model, which {reason}"

    def _steps(self) -> list[int]:
        numbered = ((path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in self.folder.glob("checkpoint-*"))
        return [int(number[1]) for path, number in numbered if number and path.is_dir()]

    def _seals(self) -> dict[int, Seal]:
        read = {step: _read_seal(self.place(step)) for step in self._steps()}
        return {step: seal for step, seal in read.items() if seal is not None}

    def _drop(self, step: int) -> None:
        """Remove a checkpoint; a kill half-way leaves it in ``partial``, where it does not count."""
        self.partial.mkdir(exist_ok=True)
        aside = self.partial / f"dropped-{step}"
        with suppress(FileNotFoundError):
            shutil.rmtree(aside)
        self.place(step).rename(aside)
        shutil.rmtree(aside)

    @contextmanager
    def saving(self, what: str) -> Iterator[None]:
        """Turn what goes wrong while a block writes into ``partial`` into one sentence, and remove the piece.

        Raises:
            SavingFailedError: If the disk is full, or the writing fails otherwise.
        """
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            is_full = is_full_disk(error) or shutil.disk_usage(self.folder).free < FULL_BELOW_BYTES
            with suppress(OSError):
                self.clear_partial()
            raise self.failure(what, error, is_full=is_full) from error

    def failure(self, what: str, error: Exception, *, is_full: bool) -> SavingFailedError:
        """Say what was not written, why, what stands and what to do."""
        if is_full:
            newest = self.newest()
            seal = _read_seal(newest) if newest else None
            needed = f"; a checkpoint takes {_amount(seal.num_bytes)}" if seal else ""
            free = _amount(shutil.disk_usage(self.folder).free)
            reason = f"the disk of {str(self.folder.parent)!r} is full ({free} are free without it{needed})"
            remedy = "Make room"
        else:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            remedy = "Mend that"
        return SavingFailedError(
            f"{what} could not be saved: {reason}. {self.last_good()} {remedy}, then go on with --resume."
        )


def is_full_disk(error: Exception) -> bool:
    """Tell whether an error of Python, safetensors or torch means that there is no room left."""
    number = getattr(error, "errno", None)
    return number in FULL_DISK_NUMBERS or any(words in str(error) for words in FULL_DISK_WORDS)


def _missing_parts(checkpoint: Path, num_processes: int) -> list[str]:
    """Name what a checkpoint lacks; transformers would resume from less without a word."""
    states = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{i}.pth" for i in range(num_processes)]
    missing = [name for name in ("trainer_state.json", "scheduler.pt", *states) if not (checkpoint / name).is_file()]
    # Sharded runs (FSDP) keep optimizer and weights in folders of their own.
    if not any(checkpoint.glob("optimizer*")):
        missing.append("optimizer.pt")
    if not any(checkpoint.glob("*.safetensors*")) and not any(checkpoint.glob("pytorch_model*")):
        missing.append("model.safetensors")
    return missing


def _read_seal(checkpoint: Path) -> Seal | None:
    try:
        return Seal.model_validate_json((checkpoint / SEAL_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def _sealed_file(folder: Path, name: str) -> SealedFile:
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return SealedFile(name=name, size=file.tell(), sha256=digest)


def _processes(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.1f} MiB"
