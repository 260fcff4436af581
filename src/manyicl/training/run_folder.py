"""The folder of a run: what stands in it, when it may be used, and which checkpoint counts.

::

    runs/x/
      recipe.yaml            resolved, written when the run starts
      checkpoints/           transformers' checkpoints, and run.json: what the run is made of
      logs/                  TensorBoard
      config.json …          the finished model or adapter with its tokenizer
      manyicl.json           written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyicl.errors import UserError
from manyicl.model.manifest import FILE_NAME, Manifest
from manyicl.tasks.files import task_places
from manyicl.training.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
IDENTITY_FILE = "run.json"

# What may differ when a run is resumed, because neither the weights nor what the best score means depend on it. The
# training tasks themselves are compared by name, data and order.
FREE_TO_CHANGE = frozenset(
    {
        "output",
        "tasks.train",
        "tasks.data_root",
        "training.log_every",
        "training.evaluate_every",
        "training.save_every",
        "training.keep_checkpoints",
        "training.num_threads",
    }
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints stand."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Where TensorBoard files stand."""
        return self.path / "logs"

    @property
    def is_finished(self) -> bool:
        """True once the finished model stands here."""
        return (self.path / FILE_NAME).is_file()

    @property
    def is_run(self) -> bool:
        """True if a run of ours was begun here; a recipe alone may lie in anybody's project."""
        return (self.path / RECIPE_FILE).is_file() and (self._identity_file.is_file() or self.is_finished)

    def require_free(self, recipe: Recipe, *, overwrite: bool) -> None:
        """Refuse a folder in which this run cannot begin.

        Raises:
            UserError: If something stands there already and ``overwrite`` is not asked for, is no run, or is
                what the new run would read.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {str(self.path)!r} is a file; expected a folder.")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not overwrite:
            remedies = "--resume to go on, --overwrite to start anew, or " if self.is_run else ""
            what = "holds a run already" if self.is_run else "is not empty"
            raise UserError(f"output {str(self.path)!r} {what}. Use {remedies}another output.")
        if not self.is_run:
            raise UserError(
                f"output {str(self.path)!r} holds no run of manyicl, which is {RECIPE_FILE} with "
                f"checkpoints/{IDENTITY_FILE} or {FILE_NAME}; --overwrite leaves it alone. Use another output."
            )
        for key, path in _read_paths(recipe):
            if path.resolve().is_relative_to(self.path.resolve()):
                raise UserError(
                    f"--overwrite would delete {str(path)!r}, which {key} names and which lies in the output "
                    f"{str(self.path)!r}. Use another output."
                )

    def begin(self, recipe: Recipe, manifest: Manifest, *, overwrite: bool) -> None:
        """Make the folder and write what the run is made of.

        Raises:
            UserError: As `require_free` does.
        """
        self.require_free(recipe, overwrite=overwrite)
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.checkpoints.mkdir(parents=True)
        (self.path / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        self._identity_file.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def require_same_recipe(self, recipe: Recipe) -> None:
        """Refuse to resume what is not there, is finished, or would go on by another recipe.

        Raises:
            UserError: If so.
        """
        if not (self.path / RECIPE_FILE).is_file() or not self._identity_file.is_file():
            raise UserError(f"--resume: output {str(self.path)!r} holds no run. Start it without --resume.")
        if self.is_finished:
            raise UserError(f"--resume: the run in {str(self.path)!r} is finished. Use --overwrite to start anew.")
        begun = Recipe.read(self.path / RECIPE_FILE)
        difference = first_difference(begun.model_dump(mode="json"), recipe.model_dump(mode="json"))
        if difference is not None:
            key, old, new = difference
            raise UserError(
                f"--resume: the run in {str(self.path)!r} began with {key} {old!r}; the recipe now says {new!r}. "
                "Restore it, or start anew with --overwrite."
            )

    def require_same_start(self, manifest: Manifest) -> None:
        """Refuse to resume over other tasks or another base than the run began with.

        Raises:
            UserError: If so.
        """
        known = Manifest.model_validate_json(self._identity_file.read_text(encoding="utf-8"))
        if known.base_fingerprint != manifest.base_fingerprint:
            raise UserError(f"--resume: the weights of the base {manifest.base!r} changed since the run began.")
        began = [(task.name, task.data_hash) for task in known.tasks]
        now = [(task.name, task.data_hash) for task in manifest.tasks]
        if began != now:
            raise UserError(f"--resume: {_changed_tasks(began, now)}. Restore that, or start anew with --overwrite.")

    @property
    def _identity_file(self) -> Path:
        return self.checkpoints / IDENTITY_FILE

    def last_whole_checkpoint(self, num_processes: int) -> Path | None:
        """Return the newest checkpoint from which a run goes on exactly; None where there is none."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if _is_whole(path, num_processes)]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _read_paths(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Yield what a run reads from this machine, with the key of the recipe that names it."""
    if recipe.model.base is not None and Path(recipe.model.base).is_dir():
        yield "model.base", Path(recipe.model.base)
    if recipe.tasks.data_root is not None:
        yield "tasks.data_root", recipe.tasks.data_root
    for key, patterns in (("tasks.train", recipe.tasks.train), ("tasks.evaluate", recipe.tasks.evaluate)):
        for pattern in patterns:
            yield key, Path(pattern)
            # A pattern that stands for nothing is not read: whoever calls brings tasks of their own.
            with suppress(UserError):
                yield from ((key, Path(place)) for place in task_places(pattern))


def _changed_tasks(began: Sequence[tuple[str, str]], now: Sequence[tuple[str, str]]) -> str:
    """Say how the tasks of a run, name and hash of data in order, differ from those it began with."""
    before, after = dict(began), dict(now)
    for name in before:
        if name not in after:
            return f"the run began with task {name!r}, which is missing now"
    for name in after:
        if name not in before:
            return f"task {name!r} was not there when the run began"
        if before[name] != after[name]:
            return f"the data of task {name!r} changed since the run began"
    old, new = next((old, new) for old, new in zip(before, after, strict=True) if old != new)
    return f"task {new!r} stands now where {old!r} stood when the run began, and rows depend on the order of tasks"


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """Find the first dotted key in which two resolved recipes differ in a way that changes the weights."""
    for key in {**old, **new}:
        name = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if name in FREE_TO_CHANGE or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            inner = first_difference(before, after, f"{name}.")
            if inner is not None:
                return inner
        else:
            return name, before, after
    return None


def _is_whole(checkpoint: Path, num_processes: int) -> bool:
    """Tell whether a checkpoint has all its parts; transformers would resume from less without a word."""
    states = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{i}.pth" for i in range(num_processes)]
    if not all((checkpoint / name).is_file() for name in ("scheduler.pt", *states)):
        return False
    # Sharded runs (FSDP) keep optimizer and weights in folders of their own.
    if not any(checkpoint.glob("optimizer*")) or not (
        any(checkpoint.glob("*.safetensors*")) or any(checkpoint.glob("pytorch_model*"))
    ):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
