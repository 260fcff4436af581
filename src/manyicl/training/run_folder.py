"""The folder of a run: what stands in it, and when it may be used.

::

    runs/x/
      recipe.yaml            resolved, written when the run starts
      checkpoints/           whole checkpoints, and run.json: what the run is made of
      logs/                  TensorBoard
      config.json …          the finished model or adapter with its tokenizer
      manyicl.json           written last

A run has begun once run.json stands there and is finished once manyicl.json does; each appears in one step. While an
old run is being replaced, ``.replacing`` stands there too and nothing else counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from manyicl.checked import validated
from manyicl.errors import UserError
from manyicl.model.manifest import FILE_NAME, Manifest, TrainedTask
from manyicl.tasks.files import task_places
from manyicl.training.durable import sync_folder, write_whole
from manyicl.training.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
IDENTITY_FILE = "run.json"
REPLACING_FILE = ".replacing"
LOCK_FILE = ".lock"

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
        return (self.path / FILE_NAME).is_file() and not self._is_being_replaced

    @property
    def is_begun(self) -> bool:
        """True once a run can go on from here."""
        return self._identity_file.is_file() and not self._is_being_replaced

    @property
    def is_run(self) -> bool:
        """True if a run of ours was begun here; a recipe alone may lie in anybody's project."""
        if (self.path / RECIPE_FILE).is_file():
            return self._identity_file.is_file() or (self.path / FILE_NAME).is_file() or self._is_being_replaced
        # A kill just after the beginning leaves only this, in the middle of a replacement only the marker.
        return self._identity() is not None or self._is_being_replaced

    def require_free(self, recipe: Recipe, *, overwrite: bool) -> None:
        """Refuse a folder in which this run cannot begin.

        Raises:
            UserError: If something stands there already and ``overwrite`` is not asked for, is no run, or is
                what the new run would read.
        """
        _require_possible(self.path)
        if not self.path.is_dir() or self._is_empty:
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
        for inner in self.path.iterdir():
            if inner.is_dir() and inner not in (self.checkpoints, self.logs):
                raise UserError(
                    f"--overwrite would delete the folder {str(inner)!r}, which no run writes. Move it, or use another "
                    "output."
                )

    def begin(self, recipe: Recipe, manifest: Manifest, *, overwrite: bool) -> None:
        """Make the folder and write what the run is made of.

        Raises:
            UserError: As `require_free` does.
        """
        self.require_free(recipe, overwrite=overwrite)
        if self.path.is_dir() and not self._is_empty:
            self._remove_run()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_whole(self._identity_file, manifest.model_dump_json(indent=2) + "\n")
        write_whole(self.path / RECIPE_FILE, recipe.to_yaml())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out while a run writes here; a kill lets go, too.

        Raises:
            UserError: If another process trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"Another process is training in output {str(self.path)!r}. Wait for it, or use another output."
            ) from error
        try:
            yield
            (self.path / LOCK_FILE).unlink(missing_ok=True)
        finally:
            lock.release()

    def _remove_run(self) -> None:
        """Empty the folder so that a kill at any moment leaves what --overwrite takes up again, and no half model."""
        marker = self.path / REPLACING_FILE
        marker.touch()
        sync_folder(self.path)
        (self.path / FILE_NAME).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in (marker, self.path / LOCK_FILE):
                path.unlink()
        marker.unlink()

    def require_same_recipe(self, recipe: Recipe) -> None:
        """Refuse to resume what is not there, is finished, or would go on by another recipe.

        Raises:
            UserError: If so.
        """
        if self._is_being_replaced:
            raise UserError(
                f"--resume: the run in {str(self.path)!r} was being replaced and the new one has not begun. Start it "
                "with --overwrite."
            )
        if not self.is_begun:
            raise UserError(f"--resume: output {str(self.path)!r} holds no run. Start it without --resume.")
        if self.is_finished:
            raise UserError(f"--resume: the run in {str(self.path)!r} is finished. Use --overwrite to start anew.")
        begun = self._recipe()
        difference = first_difference(begun.model_dump(mode="json"), recipe.model_dump(mode="json"))
        if difference is not None:
            key, old, new = difference
            raise UserError(
                f"--resume: the run in {str(self.path)!r} began with {key} {old!r}; the recipe now says {new!r}. "
                "Restore it, or start anew with --overwrite."
            )

    def require_same_start(self, manifest: Manifest) -> None:
        """Refuse to resume over other tasks, another base or another chat template than the run began with.

        Raises:
            UserError: If so.
        """
        known = self._require_identity()
        if known.base_fingerprint != manifest.base_fingerprint:
            raise UserError(f"--resume: the weights of the base {manifest.base!r} changed since the run began.")
        if known.text_format != manifest.text_format:
            raise UserError(
                "--resume: the chat template changed since the run began. Restore it, or start anew with --overwrite."
            )
        for began, now in ((known.tasks, manifest.tasks), (known.held_out, manifest.held_out)):
            if began != now:
                raise UserError(
                    f"--resume: {_changed_tasks(began, now)}. Restore that, or start anew with --overwrite."
                )

    def _recipe(self) -> Recipe:
        """Return the recipe that the run began with; a kill may have come before its own file was written."""
        path = self.path / RECIPE_FILE
        return Recipe.read(path) if path.is_file() else validated(Recipe, self._require_identity().recipe, str(path))

    def write_recipe_if_missing(self) -> None:
        """Write recipe.yaml where a kill came before it."""
        if not (self.path / RECIPE_FILE).is_file():
            write_whole(self.path / RECIPE_FILE, self._recipe().to_yaml())

    @property
    def _identity_file(self) -> Path:
        return self.checkpoints / IDENTITY_FILE

    def _identity(self) -> Manifest | None:
        try:
            return Manifest.model_validate_json(self._identity_file.read_bytes())
        except (OSError, ValidationError):
            return None

    def _require_identity(self) -> Manifest:
        known = self._identity()
        if known is None:
            raise UserError(
                f"--resume: {str(self._identity_file)!r} is not what this version of manyicl writes. Resume with the "
                "version that began the run, or start anew with --overwrite."
            )
        return known

    @property
    def _is_being_replaced(self) -> bool:
        return (self.path / REPLACING_FILE).is_file()

    @property
    def _is_empty(self) -> bool:
        """True if nothing stands here, or only what a kill at the very beginning of a run leaves."""
        part = self._identity_file.with_name(f"{IDENTITY_FILE}.part")
        return all(
            path == self.checkpoints and path.is_dir() and all(inner == part for inner in path.iterdir())
            for path in self.path.iterdir()
            if path.name != LOCK_FILE
        )


def _require_possible(path: Path) -> None:
    """Refuse a path that cannot become a folder, and checkpoints that could not be moved into it."""
    for part in (path, *path.parents):
        try:
            if part.exists() and not part.is_dir():
                below = "" if part == path else f", so {str(path)!r} cannot stand below it"
                raise UserError(f"output {str(part)!r} is a file{below}; expected a folder.")
        except OSError as error:
            raise UserError(f"output {str(path)!r} cannot be a folder: {str(error.strerror).lower()}.") from error


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


def _changed_tasks(began: Sequence[TrainedTask], now: Sequence[TrainedTask]) -> str:
    """Say how the tasks of a run, with their data and order, differ from those it began with."""
    before, after = ({task.name for task in tasks} for tasks in (began, now))
    for old, new in zip_longest(began, now):
        if new is None or (old is not None and old.name not in after):
            return f"the run began with task {old.name!r}, which is missing now"
        if old is None or new.name not in before:
            return f"task {new.name!r} was not there when the run began"
        if old.name == new.name and old != new:
            return f"the data of task {old.name!r} changed since the run began"
        if old.name != new.name:
            break
    return (
        f"task {new.name!r} stands now where {old.name!r} stood when the run began, and sequences depend on "
        "the order of tasks"
    )


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
