"""The folder of a run: what it contains, and when it may be used.

::

    runs/x/
      recipe.yaml            resolved, written when the run starts
      checkpoints/           complete checkpoints; run.json: what the run is made of; base.json: files of its base
      logs/                  TensorBoard
      config.json …          the finished model or adapter with its tokenizer
      manyicl.json           written last

A run has started once run.json exists and is finished once manyicl.json does; each appears in one step. While an old
run is being replaced, ``.replacing`` exists too and nothing else counts.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from manyicl.atomic import is_leftover, sync_folder, sync_tree, write_atomically
from manyicl.checked import validated
from manyicl.errors import UserError
from manyicl.model.manifest import FILE_NAME, Manifest, TrainedTask
from manyicl.outputs import require_output_folder
from manyicl.training.checkpoint import Checkpoints, RunInterrupted
from manyicl.training.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
IDENTITY_FILE = "run.json"
BASE_FILE = "base.json"
REPLACING_FILE = ".replacing"
LOCK_FILE = ".lock"
RESTORE = "Restore that, start anew with --overwrite, or use another output."

# What a run writes into its folder and the folders in it, so that --overwrite removes nothing else. In the folder of a
# run these names are taken.
WRITTEN = {
    "": re.compile(
        rf"{FILE_NAME}|{RECIPE_FILE}|(generation_|adapter_)?config\.json|(adapter_)?model.*\.safetensors(\.index\.json)?|"
        r"tokenizer(_config)?\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
        r"spiece\.model|chat_template\.jinja|additional_chat_templates"
    ),
    "checkpoints": re.compile(rf"{IDENTITY_FILE}|{BASE_FILE}|checkpoint-\d+|partial"),
    "logs": re.compile(r"events\.out\.tfevents\..*"),
}

# What may differ when a run is resumed, because neither the weights nor what the best score means depend on it. The
# training tasks themselves are compared by name, data and order, a text that is replayed by its hash.
FREE_TO_CHANGE = frozenset(
    {"output", "tasks.train", "tasks.data_root", "sequences.replay.text"}
    | {"training.log_every", "training.num_threads"}
    | {"training.num_processes"}
    | {"training.evaluate_every", "training.save_every", "training.keep_checkpoints"}
)


class RunState(Enum):
    """What a folder holds."""

    EMPTY = "nothing, or what a kill at the very start of a run leaves"
    FOREIGN = "files that are no run"
    REPLACING = "a run that was being replaced, and no new one yet"
    STARTED = "a run that can resume"
    FINISHED = "a finished model"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def state(self) -> RunState:
        """Look at what the folder holds.

        Raises:
            UserError: If it is a file.
        """
        if not os.path.isdir(self.path):  # noqa: PTH112  # the other one raises where the name is too long
            if os.path.exists(self.path):  # noqa: PTH110
                require_output_folder(self.path)
            return RunState.EMPTY
        if (self.path / REPLACING_FILE).is_file():
            return RunState.REPLACING
        has_model = (self.path / FILE_NAME).is_file()
        # A kill just after the start leaves no recipe yet, and a recipe alone may be in anybody's project.
        has_recipe = (self.path / RECIPE_FILE).is_file()
        if self._identity() is not None or (has_recipe and (has_model or self._identity_file.is_file())):
            return RunState.FINISHED if has_model else RunState.STARTED
        inside = [*self.path.glob("*"), *self.checkpoints.glob("*")]
        is_empty = all(path in (self.path / LOCK_FILE, self.checkpoints) or is_leftover(path) for path in inside)
        return RunState.EMPTY if is_empty else RunState.FOREIGN

    def began_at(self) -> int | None:
        """Return when the run here was started, in nanoseconds of the file system's clock; None if there is none.

        Where it does not change, a command has not started a run of its own.
        """
        try:
            return self._identity_file.stat().st_mtime_ns
        except OSError:  # what is wrong with the path is said where the folder is looked at
            return None

    def interruption(self) -> KeyboardInterrupt:
        """Return how a run here that is ended at once says what it leaves; a plain one if none has started."""
        if self.state() not in (RunState.STARTED, RunState.FINISHED):
            return KeyboardInterrupt()
        return RunInterrupted(Checkpoints(self.checkpoints).newest())

    def require_free(self, recipe: Recipe, *, overwrite: bool) -> None:
        """Refuse a folder in which this run cannot start.

        Raises:
            UserError: If it holds a run already and ``overwrite`` is false, holds something else, or
                holds the base of the run that would replace it.
        """
        state, base = self.state(), recipe.model.base
        if state is RunState.EMPTY:
            return
        if state is RunState.FOREIGN:
            what = "the output is not empty and holds no run of manyicl"
            raise self._error("output_exists", what, "Use another output.")
        if not overwrite:
            remedy = "Use --resume to continue it, --overwrite to start anew, or another output."
            raise self._error("run_exists", "the output holds a run already", remedy)
        if base is not None and Path(base).resolve().is_relative_to(self.path.resolve()):
            what = f"--overwrite would delete the base of the run, {base!r}"
            raise self._error("output_is_input", what, "Use another output.", field="model.base")

    def _error(self, code: str, what: str, remedy: str, **fields: Any) -> UserError:
        return UserError(code, what, remedy=remedy, file=self.path, **fields)

    def begin(self, recipe: Recipe, manifest: Manifest, *, overwrite: bool) -> None:
        """Make the folder and write what the run is made of.

        Raises:
            UserError: As `require_free` does.
        """
        self.require_free(recipe, overwrite=overwrite)
        if self.state() is not RunState.EMPTY:
            self._remove_run()
        self.clean_up()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self._identity_file, manifest.model_dump_json(indent=2) + "\n")
        write_atomically(self.path / RECIPE_FILE, recipe.to_yaml())
        (self.path / REPLACING_FILE).unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out while a run writes here; a kill lets go, too.

        Raises:
            UserError: If another process trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / LOCK_FILE, timeout=0):
                yield
                (self.path / LOCK_FILE).unlink(missing_ok=True)
        except Timeout as error:
            what = "another process is training in this output"
            raise self._error("run_in_progress", what, "Wait for it, or use another output.") from error

    def put_in_place(self, model: Path) -> None:
        """Move the files of a finished model here, manyicl.json last: where that is, the others are complete."""
        sync_tree(model)
        for path in sorted(model.iterdir(), key=lambda path: (path.name == FILE_NAME, path.name)):
            target = self.path / path.name
            if target.is_dir():
                shutil.rmtree(target)
            if path.name == FILE_NAME:
                sync_folder(self.path)
            path.replace(target)
        sync_folder(self.path)

    def clean_up(self) -> None:
        """Remove files that a kill left half-written, and write recipe.yaml where a kill came before it."""
        for path in (*self.path.glob("*.yaml"), *self.checkpoints.glob("*")):
            if is_leftover(path):
                path.unlink()
        if self._identity_file.is_file() and not (self.path / RECIPE_FILE).is_file():
            write_atomically(self.path / RECIPE_FILE, self._recipe().to_yaml())

    def _remove_run(self) -> None:
        """Remove what a run wrote, so that a kill at any moment leaves what --overwrite can remove, and no half model.

        The marker stays until the new run has started. Files that no run writes stay.
        """
        (self.path / REPLACING_FILE).touch()
        sync_folder(self.path)
        for name, pattern in WRITTEN.items():
            folder = self.path / name
            for path in [path for path in folder.glob("*") if pattern.fullmatch(path.name)]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            if name:
                with suppress(OSError):  # it holds something of the user's
                    folder.rmdir()

    def require_resumable(self, recipe: Recipe) -> None:
        """Refuse to resume what does not exist, is finished, or would continue by another recipe.

        Raises:
            UserError: If so.
        """
        state = self.state()
        if state is RunState.STARTED:
            self.require_same_recipe(recipe)
            return
        what, remedy = {
            RunState.REPLACING: ("the run was being replaced and the new one has not started", "Use --overwrite."),
            RunState.FINISHED: ("the run is finished", "Use --overwrite to start anew."),
        }.get(state, ("the output holds no run", "Start it without --resume."))
        raise self._error("not_resumable", f"--resume: {what}", remedy)

    def require_same_recipe(self, recipe: Recipe) -> None:
        """Refuse a run that was started by another recipe.

        Raises:
            UserError: If so.
        """
        try:
            known = self._recipe()
        except UserError as error:
            what = f"the run was started by a recipe that this version does not read: {error}"
            raise self._error("another_run", what, "Use --overwrite.") from error
        then, now = _leaves(known.model_dump(mode="json")), _leaves(recipe.model_dump(mode="json"))
        for key in {**then, **now}:
            if key not in FREE_TO_CHANGE and then.get(key) != now.get(key):
                values = {"expected": repr(then.get(key)), "found": f"{now.get(key)!r} in the recipe", "field": key}
                raise self._error("another_run", f"the run started with another {key}", RESTORE, **values)

    def require_same_start(self, manifest: Manifest) -> None:
        """Refuse a run that was started with other tasks, another base, chat template or text to replay.

        Raises:
            UserError: If so.
        """
        known = Manifest.read(self.path) or self._identity()
        if known is None:
            remedy = "Resume with the version that started the run, or start anew with --overwrite."
            what = "the file is not what this version of manyicl writes"
            raise UserError("wrong_version", what, remedy=remedy, file=self._identity_file)
        changed = None
        if known.base_fingerprint != manifest.base_fingerprint:
            changed = f"the weights of the base {manifest.base!r} changed since the run started"
        elif known.text_format != manifest.text_format:
            changed = "the chat template changed since the run started"
        elif known.replay_sha256 != manifest.replay_sha256:
            changed = "the text that is replayed changed since the run started"
        for before, now in ((known.tasks, manifest.tasks), (known.held_out, manifest.held_out)):
            if changed is None and before != now:
                changed = _changed_tasks(before, now)
        if changed is not None:
            raise self._error("another_run", changed, RESTORE)

    def remember_base(self, files: str | None) -> None:
        """Write down which files the base has, as `base_files` lists them."""
        if files is not None:
            write_atomically(self.checkpoints / BASE_FILE, files)

    def has_same_base(self, files: str | None) -> bool:
        """Tell whether the base has the files that were written down."""
        path = self.checkpoints / BASE_FILE
        return files is not None and path.is_file() and path.read_text(encoding="utf-8") == files

    def _recipe(self) -> Recipe:
        """Return the recipe that the run started with; a kill may have come before its own file was written."""
        path = self.path / RECIPE_FILE
        identity = self._identity()
        if path.is_file() or identity is None:
            return Recipe.read(path)
        return validated(Recipe, identity.recipe, str(path))

    @property
    def _identity_file(self) -> Path:
        return self.checkpoints / IDENTITY_FILE

    def _identity(self) -> Manifest | None:
        try:
            return Manifest.model_validate_json(self._identity_file.read_bytes())
        except (OSError, ValidationError):
            return None


def _changed_tasks(before: Sequence[TrainedTask], now: Sequence[TrainedTask]) -> str:
    """Say how the tasks of a run, with their data and order, differ from those it started with."""
    old, new = next((old, new) for old, new in zip_longest(before, now) if old != new)
    if old is not None and new is not None and old.name == new.name:
        return f"the data of task {old.name!r} changed since the run started"
    then, today = (f"task {task.name!r}" if task else "no task" for task in (old, new))
    return f"the run started with {then} where now is {today}, and packed sequences depend on the order of tasks"


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """List the values of a resolved recipe by their dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    inner = [_leaves(part, f"{name}.{key}" if name else key) for key, part in value.items()]
    return {key: leaf for leaves in inner for key, leaf in leaves.items()}
