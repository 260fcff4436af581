from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from manyicl.errors import UserError
from manyicl.model.manifest import Manifest
from manyicl.training.checkpoint import Checkpoints, SavingFailedError, is_full_disk
from manyicl.training.run_folder import RunFolder, RunState
from tests.training.recipes import small_recipe


def save(
    checkpoints: Checkpoints, step: int, best_step: int | None = None, num_processes: int = 1, kept: int = 9
) -> None:
    """Do what a run does, with files of a few bytes."""
    checkpoints.clear_partial()
    part = checkpoints.partial / f"checkpoint-{step}"
    (part / "folder").mkdir(parents=True)
    states = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{i}.pth" for i in range(num_processes)]
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "folder/more", *states):
        (part / name).write_text(f"{name} {step}", encoding="utf-8")
    checkpoints.complete(step, num_processes, best_step)
    checkpoints.rotate(kept)


def steps(checkpoints: Checkpoints) -> set[int]:
    return {int(path.name.partition("-")[2]) for path in checkpoints.folder.glob("checkpoint-*")}


@pytest.fixture(name="checkpoints")
def _checkpoints(tmp_path: Path) -> Checkpoints:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return Checkpoints(folder)


@pytest.fixture(name="no_waiting")
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk, hundreds of times."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class Cut(BaseException):
    """The power is gone."""


class Cutter:
    """Ends a block at a chosen operation on a file, without any of it being done."""

    def __init__(self) -> None:
        self.is_on = False
        self.left = 0
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        self.left -= 1
        if self.left == 0:
            raise Cut

    @contextmanager
    def at(self, moment: int) -> Iterator[None]:
        self.left, self.is_on = moment, True
        try:
            yield
        finally:
            self.is_on = False


CUTTER = Cutter()


def was_cut(moment: int, block: Callable[[], object]) -> bool:
    try:
        with CUTTER.at(moment):
            block()
    except Cut:
        return True
    return False


def test_the_newest_complete_checkpoint_is_taken(checkpoints: Checkpoints) -> None:
    assert checkpoints.resume_point(1).checkpoint is None
    for step in (1, 2, 10):
        save(checkpoints, step)
    point = checkpoints.resume_point(1)
    assert (point.checkpoint, point.skipped) == (checkpoints.path(10), [])
    assert point.sentence() == f"Resuming from {checkpoints.path(10)}."


def damage_size(path: Path) -> None:
    path.write_text("short", encoding="utf-8")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "folder/more"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(Path.unlink, "lacks"), (damage_size, "differs from its manifest in the size of")],
)
def test_a_damaged_checkpoint_is_left_out_with_the_reason_and_the_one_before_it_is_taken(
    checkpoints: Checkpoints, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    damage(checkpoints.path(2) / name)
    point = checkpoints.resume_point(1)
    assert point.checkpoint == checkpoints.path(1)
    assert point.sentence() == (
        f"Resuming from {checkpoints.path(1)}; 1 checkpoint skipped: checkpoint-2 {reason} {name}."
    )
    assert checkpoints.newest() == checkpoints.path(1), "what cannot be used is not called good later on"


def test_a_checkpoint_without_a_manifest_is_never_taken_and_always_named(
    checkpoints: Checkpoints,
) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    (checkpoints.path(2) / "manifest.json").unlink()
    assert "checkpoint-2 has no manifest.json: an older version made it" in checkpoints.resume_point(1).sentence()
    (checkpoints.path(1) / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"no checkpoint can be used: checkpoint-2 has no manifest\.json: an older"):
        checkpoints.resume_point(1)
    assert steps(checkpoints) == {1, 2}, "they may be all that the person has"


def test_a_checkpoint_that_was_being_saved_does_not_count_and_is_swept_away(checkpoints: Checkpoints) -> None:
    (checkpoints.partial / "checkpoint-1").mkdir(parents=True)
    point = checkpoints.resume_point(1)
    assert point.sentence() == (
        "Resuming from the beginning, because there is no complete checkpoint yet; 1 checkpoint skipped: checkpoint-1 "
        "was cut off while it was saved."
    )
    assert not checkpoints.partial.exists()


def test_a_checkpoint_of_another_number_of_processes_is_refused(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1, num_processes=2)
    with pytest.raises(
        UserError,
        match=r"checkpoint-1: the checkpoint was saved by another number .* 2, found 1\. Resume",
    ):
        checkpoints.resume_point(1)
    assert checkpoints.resume_point(2).checkpoint == checkpoints.path(1)


def test_a_checkpoint_that_lacks_a_part_is_not_completed(checkpoints: Checkpoints) -> None:
    for name in ("rng_state.pth", "optimizer.pt", "model.safetensors", "scheduler.pt"):
        shutil.rmtree(checkpoints.partial, ignore_errors=True)
        save(checkpoints, 1)
        checkpoints.partial.mkdir(exist_ok=True)
        checkpoints.path(1).rename(checkpoints.partial / "checkpoint-2")
        (checkpoints.partial / "checkpoint-2" / name).unlink()
        with pytest.raises(SavingFailedError, match=f"checkpoint-2 lacks {name}"):
            checkpoints.complete(2, 1, None)


def test_the_newest_checkpoints_and_the_best_of_each_outlive_the_rotation(checkpoints: Checkpoints) -> None:
    for step, best, expected in ((1, 1, {1}), (2, 1, {1, 2}), (3, 1, {1, 2, 3}), (4, 4, {1, 3, 4}), (5, 4, {4, 5})):
        save(checkpoints, step, best, kept=2)
        assert steps(checkpoints) == expected
    for step in (6, 7, 8):
        save(checkpoints, step, 4, kept=3)
    assert steps(checkpoints) == {4, 6, 7, 8}


def test_a_checkpoint_whose_best_model_is_damaged_is_not_taken(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1, 1)
    save(checkpoints, 2, 1)
    damage_size(checkpoints.path(1) / "model.safetensors")
    with pytest.raises(
        UserError, match="checkpoint-2 needs checkpoint-1, the best model, which differs from its manifest"
    ):
        checkpoints.resume_point(1)


def test_damage_to_a_newer_best_never_costs_the_one_before_it_however_often_a_run_goes_on(
    checkpoints: Checkpoints,
) -> None:
    for step, best in ((3, 3), (5, 3), (6, 6)):
        save(checkpoints, step, best, kept=2)
    damage_size(checkpoints.path(6) / "optimizer.pt")
    for _ in range(2):
        assert checkpoints.resume_point(1).checkpoint == checkpoints.path(5)
        assert checkpoints.integrity_error(3) is None


@pytest.mark.usefixtures("no_waiting")
def test_whenever_saving_is_cut_off_a_whole_checkpoint_stands_and_the_step_can_be_saved_again(tmp_path: Path) -> None:
    moment, is_cut = 0, True
    while is_cut:
        moment += 1
        checkpoints = Checkpoints(tmp_path / str(moment))
        checkpoints.folder.mkdir()
        for step in (1, 2):
            save(checkpoints, step, 1)
        # The third one replaces what stands there, and makes the second one go.
        shutil.copytree(checkpoints.path(2), checkpoints.path(3))
        is_cut = was_cut(moment, lambda checkpoints=checkpoints: save(checkpoints, 3, 1, kept=1))  # type: ignore[misc]
        found = checkpoints.resume_point(1).checkpoint
        assert found in (checkpoints.path(2), checkpoints.path(3))
        assert (found / "model.safetensors").read_text(encoding="utf-8").endswith(found.name[-1])
        save(checkpoints, 3, 1, kept=1)
        assert steps(checkpoints) == {1, 3}
        assert checkpoints.resume_point(1) == checkpoints.resume_point(1)
        assert checkpoints.integrity_error(3) is None
    assert moment > 30


def test_a_finished_model_is_put_in_place_with_its_manifest_last_whenever_it_is_cut_off(tmp_path: Path) -> None:
    moment, is_cut = 0, True
    while is_cut:
        moment += 1
        source, target = tmp_path / f"{moment}a", tmp_path / f"{moment}b"
        for name in ("a.json", "manyicl.json", "z.json", "folder/inner"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text("new", encoding="utf-8")
        (target / "folder").mkdir(parents=True)
        (target / "folder" / "old").touch()
        is_cut = was_cut(moment, lambda: RunFolder(target).put_in_place(source))  # noqa: B023
        if (target / "manyicl.json").exists():
            names = sorted(path.name for path in target.rglob("*"))
            assert names == ["a.json", "folder", "inner", "manyicl.json", "z.json"]
    assert moment > 5


def test_a_byte_that_changed_does_not_show_because_files_are_not_hashed(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    changed = checkpoints.path(1) / "optimizer.pt"
    changed.write_bytes(changed.read_bytes()[::-1])
    assert checkpoints.integrity_error(1) is None


def manifest_of(folder: RunFolder, *overrides: str) -> Manifest:
    return Manifest(max_context_tokens=60, recipe=small_recipe(folder.path, *overrides).model_dump(mode="json"))


@pytest.mark.usefixtures("no_waiting")
def test_whenever_a_beginning_is_cut_off_the_run_begins_again_or_goes_on(tmp_path: Path) -> None:
    moment, is_cut = 0, True
    while is_cut:
        moment += 1
        folder = RunFolder(tmp_path / str(moment))
        recipe, manifest = small_recipe(folder.path), manifest_of(folder)
        is_cut = was_cut(moment, lambda: folder.begin(recipe, manifest, overwrite=False))  # noqa: B023
        if folder.state() is RunState.STARTED:
            folder.require_resumable(recipe)
            folder.clean_up()
        else:
            with pytest.raises(UserError, match="holds no run"):
                folder.require_resumable(recipe)
            folder.begin(recipe, manifest, overwrite=False)
        assert (folder.path / "recipe.yaml").read_text(encoding="utf-8") == recipe.to_yaml()
    assert moment > 5


@pytest.mark.usefixtures("no_waiting")
def test_whenever_a_replacement_is_cut_off_it_can_be_taken_up_and_no_half_model_stands(tmp_path: Path) -> None:
    moment, is_cut = 0, True
    while is_cut:
        moment += 1
        folder = RunFolder(tmp_path / str(moment))
        old, new = small_recipe(folder.path), small_recipe(folder.path, "training.seed=7")
        folder.begin(old, manifest_of(folder), overwrite=False)
        save(Checkpoints(folder.checkpoints), 1)
        (folder.path / "model.safetensors").touch()
        manifest_of(folder).write(folder.path)
        manifest = manifest_of(folder, "training.seed=7")
        is_cut = was_cut(moment, lambda: folder.begin(new, manifest, overwrite=True))  # noqa: B023
        if folder.state() is RunState.FINISHED:
            assert Checkpoints(folder.checkpoints).newest() is not None
        elif folder.state() is RunState.STARTED:
            folder.require_resumable(new)
            assert Checkpoints(folder.checkpoints).resume_point(1).checkpoint is None
        else:
            with pytest.raises(UserError, match="was being replaced and the new one has not started"):
                folder.require_resumable(new)
        folder.begin(new, manifest, overwrite=True)
        assert sorted(path.name for path in folder.path.rglob("*")) == ["checkpoints", "recipe.yaml", "run.json"]
    assert moment > 10


def save_in_vain(checkpoints: Checkpoints, error: Exception) -> None:
    with checkpoints.saving("checkpoint-2"):
        (checkpoints.partial / "checkpoint-2").mkdir(parents=True)
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_however_it_is_said_and_leaves_the_last_good_checkpoint(
    checkpoints: Checkpoints, error: Exception
) -> None:
    save(checkpoints, 1)
    expected = (
        r"^checkpoint-2 could not be saved: the disk of '.*' is full \(.* are free without it; a checkpoint takes "
        r"0\.0 MiB\)\. The last good checkpoint is .*checkpoint-1\. Free some space, then continue with --resume\.$"
    )
    with pytest.raises(SavingFailedError, match=expected):
        save_in_vain(checkpoints, error)
    assert is_full_disk(error)
    assert not checkpoints.partial.exists()


def test_another_failure_is_said_as_it_is(checkpoints: Checkpoints) -> None:
    expected = r"saved: PermissionError, permission denied\. There is no checkpoint yet\. Fix that, then"
    with pytest.raises(SavingFailedError, match=expected):
        save_in_vain(checkpoints, PermissionError(errno.EACCES, "Permission denied"))


def test_a_run_of_an_older_version_with_another_identity_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    recipe, manifest = small_recipe(folder.path), manifest_of(folder)
    folder.begin(recipe, manifest, overwrite=False)
    identity = folder.checkpoints / "run.json"
    identity.write_text(json.dumps({**json.loads(identity.read_text(encoding="utf-8")), "new": 1}), encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json: the file is not what this version of manyicl writes"):
        folder.require_same_start(manifest)
