"""Checkpoints that are either complete or ignored: saved aside, listed in a manifest, renamed into place.

::

    checkpoints/
      checkpoint-20/         complete: manifest.json lists its files with their sizes
      checkpoint-40/
      partial/               what is being saved or removed; cleaned up when the run resumes

A kill at any moment leaves a complete checkpoint or something in ``partial``. Files are not hashed, because all
processes would wait for one that reads gigabytes: names and sizes show what is missing or cut off, not a changed byte.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from manyicl.atomic import sync_folder, sync_tree, write_atomically
from manyicl.errors import MachineError, UserError, pluralized
from manyicl.library_errors import reason

MANIFEST_FILE = "manifest.json"
FULL_DISK_NUMBERS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# safetensors and torch say it in words only, and torch sometimes not even so: then the free space tells.
FULL_DISK_WORDS = ("No space left", "quota exceeded", "File too large")
FULL_BELOW_BYTES = 2**20


class SavingFailedError(MachineError):
    """A checkpoint or the finished model could not be written; the run resumes with --resume once it can be."""


class RunInterrupted(KeyboardInterrupt):
    """A run that had started was ended at once; what its checkpoints hold is left.

    Attributes:
        checkpoint: The newest complete one; None if there is none yet.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        super().__init__()
        self.checkpoint = checkpoint


class CheckpointManifest(BaseModel):
    """The content of manifest.json, written into a checkpoint after all its other files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = 2
    step: int
    num_processes: int
    best_step: int | None
    files: dict[str, int] = Field(description="Path of each file in the checkpoint -> its size in bytes.")

    @property
    def is_sharded(self) -> bool:
        """Tell whether the weights were shared out over processes, by the folder that accelerate then writes."""
        return any(name.startswith("pytorch_model_fsdp") for name in self.files)


class ResumePoint(NamedTuple):
    """Where a run resumes.

    Attributes:
        checkpoint: The newest complete one; None for the beginning.
        skipped: Newer checkpoints that cannot be used, each with the reason.
    """

    checkpoint: Path | None
    skipped: list[str]

    def sentence(self) -> str:
        """Say where the run resumes and what was skipped."""
        start = self.checkpoint or "the beginning, because there is no complete checkpoint yet"
        skipped = f"; {pluralized(len(self.skipped), 'checkpoint')} skipped: {', '.join(self.skipped)}"
        return f"Resuming from {start}{skipped if self.skipped else ''}."


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path

    @property
    def partial(self) -> Path:
        """Folder in which a checkpoint, or the finished model, is while it is being written."""
        return self.folder / "partial"

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is once it is complete."""
        return self.folder / f"checkpoint-{step}"

    def clear_partial(self) -> None:
        """Remove what was not finished."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.partial)

    def complete(self, step: int, num_processes: int, best_step: int | None) -> None:
        """List the files of the checkpoint that is in ``partial``, and move it to its place.

        Raises:
            SavingFailedError: If it lacks a part, without which transformers would resume to other weights.
        """
        written = self.partial / self.path(step).name
        if missing := _missing_parts(written, num_processes):
            raise SavingFailedError(
                f"{written.name} lacks {', '.join(missing)} after saving. All processes must write to one file system."
            )
        files = sorted(path for path in written.rglob("*") if path.is_file())
        sizes = {file.relative_to(written).as_posix(): file.stat().st_size for file in files}
        manifest = CheckpointManifest(step=step, num_processes=num_processes, best_step=best_step, files=sizes)
        sync_tree(written)
        write_atomically(written / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
        if self.path(step).exists():
            self._remove(step)
        written.rename(self.path(step))
        sync_folder(self.folder)

    def rotate(self, num_kept: int) -> None:
        """Remove all but the newest checkpoints and the best one of each, so that a run can resume from any of them."""
        manifests = self._manifests()
        newest = list(manifests)[:num_kept]
        kept = {*newest, *(manifests[step].best_step for step in newest)}
        for step in set(manifests) - kept:
            self._remove(step)

    def newest(self) -> Path | None:
        """Return the newest checkpoint with a manifest, without looking at its files."""
        return next(map(self.path, self._manifests()), None)

    def num_processes(self) -> int | None:
        """Return how many processes saved the newest checkpoint; None if there is none."""
        return next((manifest.num_processes for manifest in self._manifests().values()), None)

    def last_good(self) -> str:
        """Say what a run that fails now can go back to."""
        newest = self.newest()
        return f"The last good checkpoint is {newest}." if newest else "There is no checkpoint yet."

    def integrity_error(self, step: int) -> str | None:
        """Compare the files of a checkpoint with its manifest; None where all are there in their sizes."""
        manifest = _read_manifest(self.path(step))
        if manifest is None or manifest.step != step:
            return f"has no {MANIFEST_FILE}: an older version made it, or it was cut off or replaced"
        for name, size in manifest.files.items():
            file = self.path(step) / name
            if not file.is_file():
                return f"lacks {name}"
            if file.stat().st_size != size:
                return f"differs from its manifest in the size of {name}"
        return None

    def resume_point(self, num_processes: int, *, is_sharded: bool = False) -> ResumePoint:
        """Find the newest checkpoint from which a run resumes exactly, and remove incomplete ones.

        Args:
            num_processes: Processes that resume.
            is_sharded: Whether they share the weights (FSDP); transformers does not read the other kind.

        Raises:
            UserError: If there are checkpoints and none can be used, or another number of processes saved it, or such
                that share their weights otherwise.
        """
        manifests = self._manifests()
        unusable: dict[int, str] = {}
        chosen = None
        for step in self._steps():
            error = self.integrity_error(step)
            best = manifests[step].best_step if error is None else None
            if best is not None and (error := unusable.get(best) or self.integrity_error(best)):
                error = f"needs checkpoint-{best}, the best model, which {error}"
            if error is None:
                chosen = self.path(step)
                break
            unusable[step] = error
        skipped = [f"checkpoint-{step} {error}" for step, error in unusable.items()]
        if chosen is None and skipped:
            what = f"no checkpoint can be used: {', '.join(skipped)}"
            remedy = "Start anew with --overwrite, or remove them and resume from the beginning."
            raise UserError("no_usable_checkpoint", what, remedy=remedy, file=self.folder)
        if chosen is not None and (saved_by := manifests[step].num_processes) != num_processes:
            what = "the checkpoint was saved by another number of processes"
            expected, found = str(saved_by), str(num_processes)
            remedy = (
                f"Resume with as many (on a CPU, training.num_processes={saved_by}), or start anew with --overwrite."
            )
            raise UserError("other_num_processes", what, expected=expected, found=found, remedy=remedy, file=chosen)
        if chosen is not None and (was_sharded := manifests[step].is_sharded) != is_sharded:
            kinds = {True: "weights shared out over processes (FSDP)", False: "the whole model in each process"}
            what = "the checkpoint was saved by processes that hold the model in another way"
            remedy = "Resume with the launcher that started the run, or start anew with --overwrite."
            expected, found = kinds[was_sharded], kinds[is_sharded]
            raise UserError("other_sharding", what, expected=expected, found=found, remedy=remedy, file=chosen)
        cut_off = [f"{path.name} was cut off while it was saved" for path in sorted(self.partial.glob("checkpoint-*"))]
        self.clear_partial()
        # One without a manifest is another version's; it stays.
        for step in manifests.keys() & unusable:
            self._remove(step)
        return ResumePoint(chosen, cut_off + skipped)

    def _steps(self) -> list[int]:
        """List the steps of which there is a folder, the newest first."""
        names = [path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*/")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _manifests(self) -> dict[int, CheckpointManifest]:
        """Read the manifests of the steps that have one, the newest first."""
        read = {step: _read_manifest(self.path(step)) for step in self._steps()}
        return {step: manifest for step, manifest in read.items() if manifest is not None}

    def _remove(self, step: int) -> None:
        """Remove a checkpoint; a kill half-way leaves it in ``partial``, where it does not count."""
        self.partial.mkdir(exist_ok=True)
        aside = self.partial / f"removed-{step}"
        with suppress(FileNotFoundError):
            shutil.rmtree(aside)
        self.path(step).rename(aside)
        shutil.rmtree(aside)

    @contextmanager
    def saving(self, what: str) -> Iterator[None]:
        """Turn what fails while a block writes into ``partial`` into one sentence, and remove what it wrote.

        Raises:
            SavingFailedError: If the disk is full, or the writing fails otherwise.
        """
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            raise self.failure(what, error) from error

    def failure(self, what: str, error: Exception) -> SavingFailedError:
        """Remove what is half-written; say what was not saved and why, which checkpoint is left, and what to do."""
        is_full = is_full_disk(error) or shutil.disk_usage(self.folder).free < FULL_BELOW_BYTES
        with suppress(OSError):
            self.clear_partial()
        if is_full:
            newest = next(iter(self._manifests().values()), None)
            needed = f"; a checkpoint takes {_amount(sum(newest.files.values()))}" if newest else ""
            free = _amount(shutil.disk_usage(self.folder).free)
            cause = f"the disk of {str(self.folder.parent)!r} is full ({free} are free without it{needed})"
        else:
            cause = f"{type(error).__name__}, {reason(error)}"
        remedy = "Free some space" if is_full else "Fix that"
        return SavingFailedError(
            f"{what} could not be saved: {cause}. {self.last_good()} {remedy}, then continue with --resume."
        )


def is_full_disk(error: Exception) -> bool:
    """Tell whether an error of Python, safetensors or torch means that there is no space left."""
    number = getattr(error, "errno", None)
    return number in FULL_DISK_NUMBERS or any(words in str(error) for words in FULL_DISK_WORDS)


def _missing_parts(checkpoint: Path, num_processes: int) -> list[str]:
    """Name what a checkpoint lacks; transformers would resume from less without a word."""
    states = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{i}.pth" for i in range(num_processes)]
    patterns = {name: [name] for name in ("trainer_state.json", "scheduler.pt", *states)}
    # Sharded runs (FSDP) keep optimizer and weights in folders of their own.
    patterns |= {"optimizer.pt": ["optimizer*"], "model.safetensors": ["*.safetensors*", "pytorch_model*"]}
    return [name for name, known in patterns.items() if not any(any(checkpoint.glob(pattern)) for pattern in known)]


def _read_manifest(checkpoint: Path) -> CheckpointManifest | None:
    try:
        return CheckpointManifest.model_validate_json((checkpoint / MANIFEST_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.1f} MiB"
