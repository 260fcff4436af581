"""Sequences of stored tokens equal those that are encoded from the rows; a damaged file is made again."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from manyicl.episodes import token_store
from manyicl.episodes.chat_template import chosen_format
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.episodes.sampling import EpisodeSettings, Mixture
from manyicl.episodes.task_shots import ShotsInMemory, TaskShots
from manyicl.episodes.text_format import FormatSettings, PlainFormat
from manyicl.episodes.token_store import StoredShots, TokenStore
from manyicl.errors import MachineError, UserError
from manyicl.tasks import task_cache
from manyicl.tasks.files import load_task
from manyicl.tasks.starter_tables import STARTER_TABLES
from manyicl.tasks.task import Task
from manyicl.tasks.task_cache import load_known
from tests.builders import byte_level_bpe, make_task, sentencepiece_bpe, unigram
from tests.episodes.chat_templates import FAMILIES

NAMES = ("tickets", "titles", "urgency")
FREE = """
family: generation
query: 'Say {{ text }}'
answer: 'it is {{ text }} {{ label }}'
data: {train: train.jsonl}
"""
# Its instruction is empty with the labels of the task, and there with any others.
RENAMED = """
family: classification
instruction: '{% if "a" not in labels %}{{ labels | join(" or ") }}{% endif %}'
query: '{{ text }}'
answer: '{{ label }}'
labels: [a, b]
data: {train: train.jsonl}
"""


def write_task(folder: Path, text: str = FREE, num_rows: int = 30) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.yaml").write_text(text, encoding="utf-8")
    rows = "".join(json.dumps({"text": f"the film {row}", "label": "ab"[row % 2]}) + "\n" for row in range(num_rows))
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    return folder / "task.yaml"


def places(tmp_path: Path) -> list[Path]:
    own = [write_task(tmp_path / "free"), write_task(tmp_path / "renamed", RENAMED)]
    return [*(STARTER_TABLES / name / "task.yaml" for name in NAMES), *own]


def sequences(tasks: list[Task], encoder: Encoder, shots: list[TaskShots] | None, **changes: Any) -> PackedSequences:
    settings: dict[str, Any] = {"max_context_tokens": 900, "num_sequences": 12, "seed": 3, **changes}
    return PackedSequences(tasks, encoder, shots=shots, **settings)


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """Every test begins without tokens."""


@pytest.mark.parametrize("make_tokenizer", [byte_level_bpe, sentencepiece_bpe, unigram])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rename_labels": 0.5},
        {"sampling": "balanced", "examples_per_episode": (1, 9), "rename_labels": 0.5},
        {"examples_per_episode": 7},
    ],
)
def test_sequences_with_the_store_equal_those_without(
    tmp_path: Path, make_tokenizer: Callable[[], PreTrainedTokenizerFast], settings: Mapping[str, Any]
) -> None:
    encoder = Encoder(make_tokenizer(), PlainFormat(end_of_answer="</s>"))
    changes = {"episodes": EpisodeSettings.model_validate(settings), "mixture": Mixture(kind="size")}
    # The small Unigram vocabulary does not know the words of the tables.
    paths = places(tmp_path)[3 if make_tokenizer is unigram else 0 :]
    expected = list(sequences([load_task(path) for path in paths], encoder, None, **changes))
    tasks = [load_known(path, None) for path in paths]
    for _ in range(2):  # written, then read
        shots = TokenStore(encoder).shots_of(tasks)
        assert all(isinstance(each, StoredShots) for each in shots)
        assert list(sequences(tasks, encoder, shots, **changes)) == expected


@pytest.mark.parametrize("name", ["Llama 3", "Mistral (v0.1)", "Gemma"])
@pytest.mark.parametrize("settings", [{"rename_labels": 0.5}, {"rename_labels": 0.5, "omit_instruction": 0.5}])
def test_sequences_of_turns_with_the_store_equal_those_without(
    tmp_path: Path, name: str, settings: Mapping[str, Any]
) -> None:
    name = next(known for known in FAMILIES if known.startswith(name.split()[0]) and FAMILIES[known].refused is None)
    tokenizer = FAMILIES[name].tokenizer()
    chat = FormatSettings(kind="chat", template_arguments=dict(FAMILIES[name].arguments))
    encoder = Encoder(tokenizer, chosen_format(chat, tokenizer))
    changes = {"episodes": EpisodeSettings.model_validate(settings)}
    paths = places(tmp_path)
    expected = list(sequences([load_task(path) for path in paths], encoder, None, **changes))
    tasks = [load_known(path, None) for path in paths]
    assert list(sequences(tasks, encoder, TokenStore(encoder).shots_of(tasks), **changes)) == expected


def test_of_a_task_that_is_stored_no_row_is_read_and_nothing_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, checked = places(tmp_path), list[str]()
    encoder, settings = Encoder(byte_level_bpe()), EpisodeSettings(sampling="balanced", rename_labels=0.5)
    tasks = [load_known(path, None) for path in paths]
    store = TokenStore(encoder, check=lambda task: checked.append(task.name))
    expected = list(sequences(tasks, encoder, store.shots_of(tasks), episodes=settings))
    assert checked == [task.name for task in tasks]

    def fail(*arguments: object) -> None:
        raise AssertionError("rows were read")

    monkeypatch.setattr(task_cache, "_HELD", task_cache._HeldTasks())
    monkeypatch.setattr(task_cache, "load_place", fail)
    tasks = [load_known(path, None) for path in paths]
    told: list[tuple[int, int]] = []
    shots = TokenStore(encoder, check=fail).shots_of(tasks, lambda *counts: told.append(counts))
    # The instruction that new names fill is rare, and the one case in which a text is encoded anew.
    with_rows = [each for each in tasks if each.name != "renamed"]
    chosen = [each for each in shots if each.task.name != "renamed"]
    assert len(list(sequences(with_rows, encoder, chosen, episodes=settings))) == len(expected)
    assert told == []


def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Note which files of tokens are opened."""
    opened: list[Path] = []
    kind = token_store._File

    def note(path: Path) -> token_store._File:
        opened.append(path)
        return kind(path)

    monkeypatch.setattr(token_store, "_File", note)
    return opened


def _without_words(path: Path) -> None:
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: record[name] for name in ("num_bytes", "sha256", "fewest_tokens")}))


def _with_another_word(path: Path) -> None:
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, "plain_words": record["plain_words"] + " zzz"}))


def test_where_labels_are_renamed_no_file_is_opened_before_a_sequence_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, changes = Encoder(byte_level_bpe()), {"episodes": EpisodeSettings(rename_labels=0.5)}
    paths = places(tmp_path)
    expected = list(sequences([load_task(path) for path in paths], encoder, None, **changes))
    tasks = [load_known(path, None) for path in paths]
    assert _stored(tasks, encoder)
    opened = opened_files(monkeypatch)
    drawn = sequences(tasks, encoder, TokenStore(encoder).shots_of(tasks), **changes)
    assert opened == []
    assert list(drawn) == expected
    assert opened


@pytest.mark.parametrize("change", [_without_words, _with_another_word])
def test_words_that_a_record_lacks_or_that_are_damaged_are_read_from_the_file_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    encoder, changes = Encoder(byte_level_bpe()), {"episodes": EpisodeSettings(rename_labels=0.5)}
    tasks = [load_known(path, None) for path in places(tmp_path)]
    expected = list(sequences(tasks, encoder, TokenStore(encoder).shots_of(tasks), **changes))
    records = {path: path.read_bytes() for path in (cache / "tokens").glob("*/*.json")}
    assert len(records) == len(tasks)
    for path in records:
        change(path)
    opened = opened_files(monkeypatch)
    assert list(sequences(tasks, encoder, TokenStore(encoder).shots_of(tasks), **changes)) == expected
    assert len(opened) == len(tasks)
    assert {path: path.read_bytes() for path in records} == records
    opened.clear()
    sequences(tasks, encoder, TokenStore(encoder).shots_of(tasks), **changes)
    assert opened == []


def test_words_that_cannot_be_kept_are_read_each_time(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, changes = Encoder(byte_level_bpe()), {"episodes": EpisodeSettings(rename_labels=0.5)}
    tasks = [load_known(path, None) for path in places(tmp_path)]
    expected = list(sequences(tasks, encoder, TokenStore(encoder).shots_of(tasks), **changes))
    for path in (cache / "tokens").glob("*/*.json"):
        _without_words(path)

    def locked(path: Path) -> FileLock:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(token_store, "FileLock", locked)
    for _ in range(2):
        assert list(sequences(tasks, encoder, TokenStore(encoder).shots_of(tasks), **changes)) == expected


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_read_the_same_sequences_however_they_are_started(tmp_path: Path, method: str) -> None:
    encoder = Encoder(byte_level_bpe())
    tasks = [load_known(path, None) for path in places(tmp_path)]
    stored = sequences(tasks, encoder, TokenStore(encoder).shots_of(tasks))
    expected = [stored[index] for index in range(3)]
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as workers:
        assert list(workers.map(stored.__getitem__, range(3))) == expected


def test_what_workers_are_given_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    sizes = []
    for num_rows in (100, 900):
        encoder = Encoder(byte_level_bpe())
        tasks = [load_known(write_task(tmp_path / str(num_rows), num_rows=num_rows), None)]
        stored = sequences(tasks, encoder, TokenStore(encoder).shots_of(tasks))
        assert len(stored[0].episodes)  # files are open now, and stay here
        sizes.append(len(pickle.dumps(stored)))
    assert abs(sizes[0] - sizes[1]) < 20


def _stored(tasks: list[Task], encoder: Encoder) -> list[Any]:
    return list(sequences(tasks, encoder, TokenStore(encoder).shots_of(tasks)))


def test_processes_that_start_together_find_the_same_store(tmp_path: Path, cache: Path) -> None:
    encoder = Encoder(byte_level_bpe())
    tasks = [load_known(path, None) for path in places(tmp_path)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers:
        together = [workers.submit(_stored, tasks, encoder) for _ in range(2)]
        results = [each.result() for each in together]
    assert results[0] == results[1] == _stored(tasks, encoder)
    (folder,) = (cache / "tokens").iterdir()
    assert {path.suffix for path in folder.iterdir() if path.name != ".lock"} == {".arrow", ".json"}
    assert len(list(folder.glob("*.arrow"))) == len(tasks)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("suffix", "damage", "is_found_at_start"),
    [
        ("arrow", _flip, False),
        ("arrow", lambda path: path.write_bytes(path.read_bytes()[:-9]), True),
        ("arrow", lambda path: path.unlink(), True),
        ("json", lambda path: path.write_bytes(b"{}"), True),
        ("json", lambda path: path.write_bytes(b""), True),
        ("json", lambda path: path.write_text(json.dumps({"num_bytes": 1, "sha256": "", "fewest_tokens": 1})), True),
    ],
)
def test_a_damaged_file_is_made_again_and_said_to_be(
    tmp_path: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    suffix: str,
    damage: Callable[[Path], None],
    is_found_at_start: bool,
) -> None:
    encoder, tasks = Encoder(byte_level_bpe()), [load_known(write_task(tmp_path / "free"), None)]
    expected = _stored(tasks, encoder)
    (path,) = (cache / "tokens").glob(f"*/*.{suffix}")
    whole = path.read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING):
        shots = TokenStore(encoder).shots_of(tasks)
        assert bool(caplog.messages) == is_found_at_start
        assert list(sequences(tasks, encoder, shots)) == expected
    (message,) = caplog.messages
    assert "The tokens of task 'free' in " in message
    assert "are damaged; they are made again." in message
    assert path.read_bytes() == whole


def test_another_instruction_format_or_tokenizer_has_tokens_of_its_own(tmp_path: Path) -> None:
    task = load_known(write_task(tmp_path / "free"), None)
    other = task.with_spec(instruction_template="Say it.")
    part = Task(task.spec, task.train[:5])
    for encoder in (Encoder(byte_level_bpe()), Encoder(byte_level_bpe(), PlainFormat(separator=" -> "))):
        for each in (task, other, part, Task(task.spec, tuple(task.train))):
            plain = Task(each.spec, tuple(each.train))
            assert _stored([each], encoder) == list(sequences([plain], encoder, None))
    assert isinstance(TokenStore(Encoder(byte_level_bpe())).shots_of([make_task()])[0], ShotsInMemory)


def test_a_task_that_cannot_be_encoded_is_refused_every_time(tmp_path: Path, cache: Path) -> None:
    answer = '"it {{ label }}\\n\\nis {{ text }}"'
    text = FREE.replace("'it is {{ text }} {{ label }}'", answer)
    task = load_known(write_task(tmp_path / "free", text), None)
    for _ in range(2):
        with pytest.raises(UserError, match="end-of-answer"):
            TokenStore(Encoder(byte_level_bpe())).shots_of([task])
    assert not list((cache / "tokens").glob("*/*.json"))


def test_a_task_of_which_nothing_fits_is_refused_as_without_the_store(tmp_path: Path) -> None:
    encoder, place = Encoder(sentencepiece_bpe()), write_task(tmp_path / "free")
    task = load_known(place, None)
    said = []
    for tasks, shots in (([load_task(place)], None), ([task], TokenStore(encoder).shots_of([task]))):
        with pytest.raises(UserError) as raised:
            sequences(tasks, encoder, shots, max_context_tokens=8)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_a_full_disk_is_one_sentence_that_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    task = load_known(write_task(tmp_path / "free"), None)
    monkeypatch.setattr(token_store, "write_atomically", full)
    with pytest.raises(MachineError, match=r"tokens of task 'free' could be written neither to.*MANYICL_CACHE"):
        TokenStore(Encoder(byte_level_bpe())).shots_of([task])
    monkeypatch.setattr(token_store, "mkdtemp", full)
    with pytest.raises(MachineError, match=r"tokens of tasks cannot be written to .*no space left on.*MANYICL_CACHE"):
        TokenStore(Encoder(byte_level_bpe())).shots_of([task])


@pytest.fixture(name="temporary")
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which temporary ones are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_where_the_folder_cannot_be_written_tokens_are_kept_in_a_temporary_one_until_the_end(
    tmp_path: Path, cache: Path, temporary: Path
) -> None:
    encoder, said = Encoder(byte_level_bpe()), list[str]()
    paths = places(tmp_path)
    expected = list(sequences([load_task(path) for path in paths], encoder, None))
    tasks = [load_known(path, None) for path in paths]
    (cache / "tokens").write_text("no folder", encoding="utf-8")
    store = TokenStore(encoder, say=said.append)
    shots = store.shots_of(tasks)
    assert all(isinstance(each, StoredShots) for each in shots)
    assert list(sequences(tasks, encoder, shots)) == expected
    (folder,) = temporary.iterdir()
    assert len(list(folder.glob("*.arrow"))) == len(tasks)
    (sentence,) = said
    for part in (f"cannot be written to {str(store.folder)!r}", f"temporary folder {str(folder)!r}", "MANYICL_CACHE"):
        assert part in sentence
    # A process to which they are given reads them, and leaves them there.
    again = pickle.loads(pickle.dumps(sequences(tasks, encoder, shots)))
    assert list(again) == expected
    del again
    assert folder.exists()
    del store, shots
    gc.collect()
    assert not folder.exists()


def test_tokens_that_are_there_are_used_where_others_cannot_be_added(
    tmp_path: Path, cache: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, said = Encoder(byte_level_bpe()), list[str]()
    tasks = [load_known(path, None) for path in places(tmp_path)]
    expected = _stored(tasks[:-1], encoder)

    def locked(path: Path) -> FileLock:
        if cache in path.parents:
            raise PermissionError(13, "Permission denied")
        return FileLock(path)

    monkeypatch.setattr(token_store, "FileLock", locked)
    (flipped, *_) = (cache / "tokens").glob("*/*.arrow")
    _flip(flipped)
    shots = TokenStore(encoder, say=said.append).shots_of(tasks)
    assert len(list(temporary.glob("*/*.arrow"))) == len(said) == 1, "the last task"
    assert list(sequences(tasks[:-1], encoder, shots[:-1])) == expected
    assert len(list(temporary.glob("*/*.arrow"))) == 2, "and the one whose tokens are damaged"
    assert len(said) == 1


def test_tokens_of_a_tokenizer_that_was_not_used_for_long_are_removed(tmp_path: Path, cache: Path) -> None:
    task = load_known(write_task(tmp_path / "free"), None)
    old, recent = cache / "tokens" / "old", cache / "tokens" / "recent"
    for folder in (old, recent):
        folder.mkdir(parents=True)
    os.utime(old, (0, time.time() - token_store.SECONDS_KEPT - 60))
    TokenStore(Encoder(byte_level_bpe())).shots_of([task])
    assert (old.exists(), recent.exists()) == (False, True)


def test_opening_a_file_of_tokens_does_not_import_pandas(tmp_path: Path, cache: Path) -> None:
    assert _stored([load_known(write_task(tmp_path / "free"), None)], Encoder(byte_level_bpe()))
    (path,) = (cache / "tokens").glob("*/*.arrow")
    program = (
        "import sys; from pathlib import Path; from manyicl.episodes.token_store import _File; "
        f"print(_File(Path({str(path)!r})).given_ids(0), 'pandas' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert ended.stdout == f"{token_store._File(path).given_ids(0)} False\n"


def test_files_that_were_not_used_lately_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "MOST_FILES_OPEN", 2)
    encoder = Encoder(byte_level_bpe())
    tasks = [load_known(path, None) for path in places(tmp_path)]
    store = TokenStore(encoder)
    assert list(sequences(tasks, encoder, store.shots_of(tasks)))
    assert len(store._open) == 2
