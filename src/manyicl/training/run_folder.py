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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyicl.errors import UserError
from manyicl.model.manifest import FILE_NAME, Manifest
from manyicl.training.recipe import Recipe

RECIPE_FILE = "recipe.yaml"

# What may differ when a run is resumed, because the weights do not depend on it.
FREE_TO_CHANGE = frozenset(
    {
        "output",
        "tasks.train",
        "tasks.evaluate",
        "tasks.data_root",
        "training.log_every",
        "training.evaluate_every",
        "training.evaluate_shots",
        "training.evaluate_queries",
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

    def begin(self, recipe: Recipe, manifest: Manifest, *, overwrite: bool) -> None:
        """Make the folder and write what the run is made of.

        Raises:
            UserError: If something stands there already and ``overwrite`` is not asked for, or is no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {str(self.path)!r} is a file; expected a folder.")
        if self.path.is_dir() and any(self.path.iterdir()):
            is_run = (self.path / RECIPE_FILE).is_file()
            if not overwrite:
                remedies = "--resume to go on, --overwrite to start anew, or " if is_run else ""
                what = "holds a run already" if is_run else "is not empty"
                raise UserError(f"output {str(self.path)!r} {what}. Use {remedies}another output.")
            if not is_run:
                raise UserError(
                    f"output {str(self.path)!r} holds no {RECIPE_FILE}, so it is not a run of manyicl and "
                    "--overwrite leaves it alone. Use another output."
                )
            shutil.rmtree(self.path)
        self.checkpoints.mkdir(parents=True)
        (self.path / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        self._identity_file.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def require_same_run(self, recipe: Recipe, manifest: Manifest) -> None:
        """Refuse to resume what is not there, is finished, or would go on as something else.

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
        known = Manifest.model_validate_json(self._identity_file.read_text(encoding="utf-8"))
        hashes = {task.name: task.data_hash for task in known.tasks}
        for task in manifest.tasks:
            if hashes.pop(task.name, None) != task.data_hash:
                raise UserError(f"--resume: the data of task {task.name!r} changed since the run began.")
        if hashes:
            raise UserError(f"--resume: the run began with task {next(iter(hashes))!r}, which is missing now.")
        if known.base_fingerprint != manifest.base_fingerprint:
            raise UserError(f"--resume: the weights of the base {manifest.base!r} changed since the run began.")

    @property
    def _identity_file(self) -> Path:
        return self.checkpoints / "run.json"

    def last_whole_checkpoint(self, num_processes: int) -> Path | None:
        """Return the newest checkpoint from which a run goes on exactly; None where there is none."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if _is_whole(path, num_processes)]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


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
