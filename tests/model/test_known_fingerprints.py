"""A fingerprint is remembered for weights that were just read, and taken anew after any change of their files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from manyicl.errors import UserError
from manyicl.model import known_fingerprints, load, passed_checks, pretrained
from manyicl.model.known_fingerprints import Origin, remembered_fingerprint
from manyicl.model.load import LoadedModel, fingerprint
from manyicl.model.pretrained import BASES
from tests.model.exports import save_adapter, save_model

# peft 0.21 asks transformers 5.23 for a property by its deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _settled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once, for these were written just now."""
    monkeypatch.setattr(known_fingerprints, "SECONDS_UNTIL_SETTLED", -60.0)


@pytest.fixture(name="taken")
def _taken(monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
    """The networks whose fingerprint was taken from their weights."""
    networks: list[PreTrainedModel] = []

    def take(model: PreTrainedModel) -> str:
        networks.append(model)
        return fingerprint(model)

    monkeypatch.setattr(load, "fingerprint", take)
    return networks


def load_model(folder: Path | str, dtype: str = "float32") -> LoadedModel:
    """Load a model, whose fingerprint is always that of its weights in memory."""
    loaded = load.load_model(folder, dtype=dtype, device="cpu", check_isolation=False)
    assert loaded.fingerprint == fingerprint(loaded.model)
    return loaded


def test_it_is_taken_once(tmp_path: Path, cache: Path, taken: list[PreTrainedModel]) -> None:
    folder = save_model(tmp_path / "model")
    first, again = load_model(folder), load_model(folder)
    assert len(taken) == 1
    assert again.fingerprint == first.fingerprint
    assert len(list((cache / "fingerprints").iterdir())) == 1
    load.load_model(folder, check_isolation=False, use_known_fingerprint=False)
    assert len(taken) == 2, "where it is not to be taken from the cache folder"


def other_weights(folder: Path) -> None:
    """Write other weights in a file of the same size."""
    size = (folder / WEIGHTS).stat().st_size
    other = {name: values + 1 for name, values in load_file(folder / WEIGHTS).items()}
    save_file(other, folder / WEIGHTS, {"format": "pt"})
    assert (folder / WEIGHTS).stat().st_size == size


def other_weights_at_the_same_time(folder: Path) -> None:
    """Write other weights, and set the time of the file back."""
    before = (folder / WEIGHTS).stat()
    other_weights(folder)
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))


def later(folder: Path) -> None:
    now = (folder / WEIGHTS).stat().st_mtime_ns
    os.utime(folder / WEIGHTS, ns=(now, now + 1))


def longer(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


@pytest.mark.parametrize("change", [other_weights, other_weights_at_the_same_time, later, longer])
def test_it_is_taken_again_after_a_change_of_any_file(
    tmp_path: Path, taken: list[PreTrainedModel], change: Callable[[Path], None]
) -> None:
    folder = save_model(tmp_path / "model")
    load_model(folder)
    change(folder)
    load_model(folder)
    assert len(taken) == 2


def test_a_change_while_the_file_is_read_is_noticed(
    tmp_path: Path, taken: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model")
    load_model(folder)
    read = load._load_weights

    def changed_before_it_is_read(*arguments: object) -> PreTrainedModel:
        other_weights(folder)
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(load, "_load_weights", changed_before_it_is_read)
    load_model(folder)
    monkeypatch.setattr(load, "_load_weights", read)
    load_model(folder)
    assert len(taken) == 3


def test_files_that_were_written_just_now_are_not_relied_on(
    tmp_path: Path, cache: Path, taken: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_fingerprints, "SECONDS_UNTIL_SETTLED", 60.0)
    folder = save_model(tmp_path / "model")
    load_model(folder)
    load_model(folder)
    assert len(taken) == 2
    assert not (cache / "fingerprints").exists()


def test_of_weights_in_memory_nothing_is_known(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    loaded = load_model(folder)
    with torch.no_grad():
        next(iter(loaded.model.parameters())).add_(1)
    assert fingerprint(loaded.model) != loaded.fingerprint
    assert load_model(folder).fingerprint == loaded.fingerprint


def test_every_precision_and_place_has_its_own(tmp_path: Path, taken: list[PreTrainedModel]) -> None:
    folder = save_model(tmp_path / "model")
    found = {load_model(folder, dtype).fingerprint for dtype in ("float32", "bfloat16") * 2}
    assert len(found) == len(taken) == 2
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert load_model(copy).fingerprint in found
    assert len(taken) == 3


def test_an_adapter_depends_on_its_base_and_its_own_files(tmp_path: Path, taken: list[PreTrainedModel]) -> None:
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    taken.clear()
    first = load_model(adapter)
    assert len(taken) == 1, "that of the base is known since the adapter was saved"
    assert load_model(adapter).fingerprint == first.fingerprint
    assert load_model(base).fingerprint not in (first.fingerprint, load_model(adapter, "bfloat16").fingerprint)
    assert len(taken) == 2
    weights = load_file(adapter / "adapter_model.safetensors")
    other = {name: values + 1 for name, values in weights.items()}
    save_file(other, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert load_model(adapter).fingerprint != first.fingerprint
    assert len(taken) == 3
    other_weights(base)
    with pytest.raises(UserError) as refused:
        load_model(adapter)
    assert refused.value.code == "another_base"


def test_of_an_adapter_whose_first_weights_come_from_its_base_nothing_is_remembered(
    tmp_path: Path, taken: list[PreTrainedModel]
) -> None:
    adapter = save_adapter(tmp_path / "adapter", save_model(tmp_path / "base"))
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "gaussian"}))
    taken.clear()
    load_model(adapter)
    load_model(adapter)
    assert len(taken) == 2


def test_a_base_that_is_damaged_after_it_was_loaded_is_refused(
    tmp_path: Path, taken: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model")
    base = replace(next(iter(BASES.values())), fingerprint=load_model(folder).fingerprint)
    monkeypatch.setitem(BASES, "tiny", base)
    monkeypatch.setattr(pretrained.PretrainedBase, "folder", folder)
    load_model("builtin:tiny")
    assert len(taken) == 1
    other_weights(folder)
    with pytest.raises(UserError) as refused:
        load_model("builtin:tiny")
    assert refused.value.code == "damaged_base"


def test_weights_that_an_index_names_in_another_folder_are_not_relied_on(
    tmp_path: Path, taken: list[PreTrainedModel]
) -> None:
    folder = save_model(tmp_path / "model")
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    for place, num_taken in ((f"../{WEIGHTS}", 2), ("model-1.safetensors", 1)):
        (tmp_path / WEIGHTS).replace(folder / place)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")
        taken.clear()
        load_model(folder)
        load_model(folder)
        assert len(taken) == num_taken


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another(path: Path) -> None:
    """Put the fingerprint of another model there, as a file that was copied by hand."""
    path.write_bytes(known_fingerprints._written("0" * 64, "0" * 64))


def other_digit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes((b"0" if content[:1] != b"0" else b"1") + content[1:])


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\x00" + path.read_bytes())


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, empty, of_another, other_digit, no_text, folder_instead])
def test_a_damaged_file_costs_time_alone(
    tmp_path: Path, cache: Path, taken: list[PreTrainedModel], damage: Callable[[Path], None]
) -> None:
    folder = save_model(tmp_path / "model")
    load_model(folder)
    (file,) = (cache / "fingerprints").iterdir()
    damage(file)
    load_model(folder)
    assert len(taken) == 2
    if file.is_file():
        load_model(folder)
        assert len(taken) == 2, "it is written again"


@pytest.mark.parametrize("place", ["", "fingerprints"])
def test_a_cache_folder_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, cache: Path, taken: list[PreTrainedModel], place: str
) -> None:
    file = cache / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"no folder")
    folder = save_model(tmp_path / "model")
    load_model(folder)
    load_model(folder)
    assert len(taken) == 2


def test_many_at_once_leave_one_whole_file(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"weights")
    origin = Origin.of(folder, "read")
    with ThreadPoolExecutor(8) as workers:
        found = list(workers.map(lambda _: remembered_fingerprint(origin, lambda: "f" * 64), range(64)))
    assert set(found) == {"f" * 64}
    (file,) = (cache / "fingerprints").iterdir()
    assert origin is not None
    assert file.read_bytes() == known_fingerprints._written(origin.key, "f" * 64)


def test_other_versions_have_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / WEIGHTS).write_bytes(b"weights")
    origin = Origin.of(tmp_path / "model", "read")
    assert remembered_fingerprint(origin, lambda: "of these") == "of these"
    monkeypatch.setattr(passed_checks, "library_versions", lambda: {"torch": "0"})
    assert remembered_fingerprint(origin, lambda: "of others") == "of others"


def test_what_is_no_folder_has_no_origin(tmp_path: Path) -> None:
    assert Origin.of(tmp_path / "nowhere", "read") is None
    assert Origin.of("owner/name", "read") is None
    assert remembered_fingerprint(None, lambda: "taken") == "taken"
