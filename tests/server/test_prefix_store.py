"""A bounded memory: who stays, who goes, what comes back; beside a store so simple that it is obviously right."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manyicl.engine.engine import Engine
from manyicl.engine.label_trie import num_shared_tokens
from manyicl.engine.local import LocalBackend
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.server.prefix_store import PrefixStore, PrefixUsage
from manyicl.server.records import VersionKey
from tests.builders import make_task, tiny_loaded
from tests.engine.parts import backend_of, blocks_of
from tests.server.synthetic_prefixes import prefix_of, require_right
from tests.server.test_segment_files import PLENTY, full_disk, tokens, written

A1, A2, B1, C1 = VersionKey("tsk_a", 1), VersionKey("tsk_a", 2), VersionKey("tsk_b", 1), VersionKey("tsk_c", 1)


@pytest.fixture(scope="module", name="backend")
def _backend() -> LocalBackend:
    return LocalBackend(tiny_loaded())


@pytest.fixture(name="store")
def _store(tmp_path: Path, backend: LocalBackend) -> Iterator[PrefixStore]:
    """A store with memory for three prefixes of 100 tokens."""
    budget = 3 * num_bytes(prefix_of(backend, tokens(100)))
    with PrefixStore(tmp_path, backend, memory_bytes=budget, disk_bytes=PLENTY) as store:
        yield store


def num_bytes(*prefixes: TaskPrefix) -> int:
    """Count the memory of keys and values, from nothing but their addresses."""
    storages = {}
    for prefix in prefixes:
        for block in blocks_of(prefix):
            for states in (*block.keys, *block.values):
                storages[states.untyped_storage().data_ptr()] = states.untyped_storage().nbytes()
    return sum(storages.values())


def put(store: PrefixStore, key: VersionKey, prefix: TaskPrefix, *, pinned: bool = False) -> None:
    store.put(key, prefix, pinned=pinned)
    store.flush()


def test_the_least_recently_used_prefix_goes(store: PrefixStore, backend: LocalBackend) -> None:
    keys = [VersionKey(f"tsk_{n}", 1) for n in range(4)]
    for n, key in enumerate(keys[:3]):
        put(store, key, prefix_of(backend, tokens(100, n)))
    assert store.get(keys[0]) is not None
    put(store, keys[3], prefix_of(backend, tokens(100, 3)))
    assert store.residents() == [keys[2], keys[0], keys[3]]
    assert store.get(keys[1]) is None
    assert store.usage().num_evicted == 1
    assert store.usage().memory_bytes <= store.usage().memory_budget
    assert require_right(backend, store.longest(tokens(100, 1), keys[1].task_id), tokens(100, 1)) == 100
    assert store.usage().num_loaded == 1


def test_blocks_that_versions_share_count_once(store: PrefixStore, backend: LocalBackend) -> None:
    first = prefix_of(backend, tokens(90))
    second = prefix_of(backend, tokens(90) + tokens(10, 1), store.longest(tokens(90), "tsk_a"))
    put(store, A1, first)
    reuse = store.longest(tokens(90) + tokens(10, 1), "tsk_a")
    second = prefix_of(backend, tokens(90) + tokens(10, 1), reuse)
    put(store, A2, second)
    assert store.usage().memory_bytes == num_bytes(first, second) < num_bytes(first) + num_bytes(second)
    assert store.num_bytes(A2) == num_bytes(second)
    store.forget("tsk_a")
    assert store.usage().memory_bytes == store.usage().disk_bytes == 0
    assert store.num_bytes(A2) is None


def test_a_prefix_larger_than_the_budget_is_there_alone(tmp_path: Path, backend: LocalBackend) -> None:
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        put(store, A1, prefix_of(backend, tokens(100)))
        put(store, B1, prefix_of(backend, tokens(100)))
        assert store.residents() == [B1]
        assert store.usage().memory_bytes > store.usage().memory_budget


def test_of_a_pinned_task_the_newest_version_stays(tmp_path: Path, backend: LocalBackend) -> None:
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        put(store, A1, prefix_of(backend, tokens(50)), pinned=True)
        put(store, B1, prefix_of(backend, tokens(50)))
        assert store.residents() == [A1, B1]
        put(store, A2, prefix_of(backend, tokens(60)), pinned=True)
        assert store.residents() == [A2]
        put(store, C1, prefix_of(backend, tokens(50)))
        assert store.residents() == [A2, C1]
        store.set_pinned("tsk_a", False)
        assert store.residents() == [C1]


def test_what_is_in_use_is_not_evicted_until_it_no_longer_is(tmp_path: Path, backend: LocalBackend) -> None:
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        put(store, A1, prefix_of(backend, tokens(50)))
        with store.using(A1) as prefix, store.using(A1):
            assert prefix is not None
            put(store, B1, prefix_of(backend, tokens(50)))
            assert store.residents() == [A1, B1]
        assert store.residents() == [B1]
        with store.using(A1) as prefix:
            assert prefix is None


def test_what_waits_for_the_disk_is_not_evicted_and_no_more_than_two_wait(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_one, may_write = threading.Event(), threading.Event()

    def slow(*_: object) -> bool:
        written_one.set()
        assert may_write.wait(20)
        return True

    monkeypatch.setattr("manyicl.server.segment_files.SegmentFiles.store", slow)
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        store.put(A1, prefix_of(backend, tokens(50)), pinned=False)
        assert written_one.wait(20)
        store.put(B1, prefix_of(backend, tokens(50)), pinned=False)
        assert store.residents() == [A1, B1]
        third = threading.Thread(target=store.put, args=(C1, prefix_of(backend, tokens(50))), kwargs={"pinned": False})
        third.start()
        third.join(0.2)
        assert third.is_alive()
        # Reading goes on meanwhile.
        assert store.get(A1) is not None
        assert store.usage().num_resident == 3
        may_write.set()
        third.join(20)
        store.flush()
        assert len(store.residents()) == 1


def test_a_full_disk_is_no_error_of_the_request(
    store: PrefixStore, backend: LocalBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with full_disk(1000), caplog.at_level(logging.WARNING):
        put(store, A1, prefix_of(backend, tokens(80)))
    assert store.get(A1) is not None
    assert store.usage().num_unwritten == 1
    assert "could not be written: " in caplog.text
    assert written(tmp_path) == {}
    put(store, A2, prefix_of(backend, tokens(80)))
    assert store.usage().num_unwritten == 1
    assert len(written(tmp_path)) == 1


def test_a_failure_that_nobody_thought_of_stops_neither_the_writer_nor_the_request(
    store: PrefixStore, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("manyicl.server.segment_files.SegmentFiles._write", lambda *_: 1 / 0)
        for key in (A1, B1, C1):
            put(store, key, prefix_of(backend, tokens(80)))
    assert store.usage().num_unwritten == 3
    assert "could not be written" in caplog.text
    put(store, A2, prefix_of(backend, tokens(80)))
    assert store.usage().disk_bytes > 0


def test_a_damaged_file_is_counted_deleted_and_what_is_left_is_used(
    tmp_path: Path, backend: LocalBackend, caplog: pytest.LogCaptureFixture
) -> None:
    token_ids = tokens(800) + tokens(100, 1)
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        put(store, A1, prefix_of(backend, tokens(800)))
        before = written(tmp_path)
        put(store, A2, prefix_of(backend, token_ids))
    (path,) = written(tmp_path).keys() - before.keys()
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        assert require_right(backend, store.longest(token_ids, "tsk_a"), token_ids) == 800
        assert store.usage().num_damaged == 1
        assert not path.exists()
        assert "altered" in caplog.text
        put(store, A2, prefix_of(backend, token_ids))
        store.forget("tsk_b")
        assert require_right(backend, store.longest(token_ids, "tsk_a"), token_ids) == 900


def test_nothing_of_a_forgotten_task_is_kept_or_comes_back(
    store: PrefixStore, backend: LocalBackend, tmp_path: Path
) -> None:
    put(store, A1, prefix_of(backend, tokens(80)), pinned=True)
    store.forget("tsk_a")
    assert store.residents() == []
    assert list(tmp_path.iterdir()) == []
    put(store, A2, prefix_of(backend, tokens(80)))
    assert store.residents() == []
    assert list(tmp_path.iterdir()) == []
    assert store.longest(tokens(80), "tsk_a") is None


def test_files_of_tasks_that_are_gone_are_deleted_at_the_start(tmp_path: Path, backend: LocalBackend) -> None:
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        put(store, A1, prefix_of(backend, tokens(80)))
        put(store, B1, prefix_of(backend, tokens(80)))
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        store.forget_others({"tsk_b", "tsk_new"})
        assert [path.name for path in tmp_path.iterdir()] == ["tsk_b"]


def test_an_empty_prefix_needs_no_file(store: PrefixStore, backend: LocalBackend, tmp_path: Path) -> None:
    put(store, A1, prefix_of(backend, ()))
    assert store.get(A1) is not None
    assert store.usage() == PrefixUsage(1, 0, store.usage().memory_budget, 0, PLENTY, 0, 0, 0, 0)
    assert store.longest([], "tsk_a") is None
    assert written(tmp_path) == {}


def test_what_is_in_memory_is_not_read_from_the_disk(store: PrefixStore, backend: LocalBackend) -> None:
    token_ids = tokens(100)
    prefix = prefix_of(backend, token_ids)
    put(store, A1, prefix)
    cache = store.longest([*token_ids[:50], 299], "tsk_a")
    # Token by token, where the disk knows multiples of 32.
    assert require_right(backend, cache, [*token_ids[:50], 299]) == 50
    assert cache is not None
    assert cache.blocks[0].keys[0].data_ptr() == blocks_of(prefix)[0].keys[0].data_ptr()
    assert store.usage().num_loaded == 0


def test_a_version_of_which_the_beginning_is_in_memory_comes_from_the_disk_whole(
    tmp_path: Path, backend: LocalBackend
) -> None:
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        put(store, A1, prefix_of(backend, tokens(100)))
        put(store, A2, prefix_of(backend, tokens(50)))
        assert store.residents() == [A2]
        assert require_right(backend, store.longest(tokens(100), "tsk_a"), tokens(100)) == 100


def test_a_version_from_the_disk_shares_what_another_one_has_in_memory(tmp_path: Path, backend: LocalBackend) -> None:
    first = tokens(800)
    second = first[:640] + tokens(200, 1)
    with PrefixStore(tmp_path, backend, memory_bytes=PLENTY, disk_bytes=PLENTY) as store:
        put(store, A1, prefix_of(backend, first))
        put(store, A2, prefix_of(backend, second))
    with PrefixStore(tmp_path, backend, memory_bytes=PLENTY, disk_bytes=PLENTY) as store:
        for key, token_ids in ((A1, first), (A2, second)):
            cache = store.longest(token_ids, "tsk_a")
            assert require_right(backend, cache, token_ids) == len(token_ids)
            assert cache is not None
            put(store, key, replace(prefix_of(backend, ()), cache=cache))
        one, two = store.get(A1), store.get(A2)
        assert one is not None
        assert two is not None
        assert store.usage().memory_bytes == num_bytes(one, two) < 1.1 * num_bytes(one) * 1000 / 800


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_a_prefix_that_comes_back_answers_exactly_as_the_one_that_was_stored(architecture: str, tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded(architecture))
    backend, task = backend_of(engine), make_task()
    compiled = engine.compile(task, task.train[:8])
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        put(store, A1, compiled)
    with PrefixStore(tmp_path, backend, memory_bytes=10, disk_bytes=PLENTY) as store:
        cache = store.longest(compiled.token_ids, "tsk_a")
    assert cache is not None
    assert cache.token_ids == compiled.token_ids
    loaded = replace(compiled, cache=cache)
    queries = [example.query for example in task.test]
    assert list(engine.predict(loaded, queries, scores="all")) == list(engine.predict(compiled, queries, scores="all"))
    one, other = blocks_of(compiled)[0].keys[0], blocks_of(loaded)[0].keys[0]
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_threads_may_share_a_store(tmp_path: Path, backend: LocalBackend) -> None:
    prefixes = {VersionKey(f"tsk_{n}", 1): prefix_of(backend, tokens(60, n)) for n in range(6)}
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(40):
                key = rng.choice(list(prefixes))
                token_ids = prefixes[key].token_ids
                action = rng.randrange(5)
                if action == 0:
                    store.put(key, prefixes[key], pinned=rng.random() < 0.2)
                elif action == 1:
                    require_right(backend, store.longest(token_ids, key.task_id), token_ids)
                elif action == 2:
                    with store.using(key) as prefix:
                        assert prefix is None or prefix.token_ids == token_ids
                elif action == 3:
                    store.usage()
                elif rng.random() < 0.1:
                    store.forget(key.task_id)
        except BaseException as error:
            problems.append(error)

    budget = 3 * num_bytes(prefix_of(backend, tokens(60)))
    with PrefixStore(tmp_path, backend, memory_bytes=budget, disk_bytes=PLENTY) as store:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.flush()
        assert problems == []
        alive = [prefix for key, prefix in prefixes.items() if store.get(key) is not None]
        assert store.usage().memory_bytes == num_bytes(*alive)
        assert store.usage().num_damaged == 0


class StoreBesideASlowOne(RuleBasedStateMachine):
    """Puts, gets, uses, deletions, restarts and damage in any order; the other store is a few lists."""

    backend = LocalBackend(tiny_loaded())

    @initialize(budget=st.sampled_from([0, 150, 300]), disk=st.sampled_from([PLENTY, 120_000, 0]))
    def start(self, budget: int, disk: int) -> None:
        self.folder = TemporaryDirectory()
        self.disk = disk
        self.budget = budget * num_bytes(prefix_of(self.backend, tokens(10))) // 10
        self.resident: list[tuple[VersionKey, TaskPrefix]] = []
        self.in_use: list[tuple[VersionKey, AbstractContextManager[TaskPrefix | None]]] = []
        self.pinned: set[str] = set()
        self.forgotten: set[str] = set()
        self.stored: dict[str, list[tuple[int, ...]]] = {}
        self.open()

    def open(self) -> None:
        self.store = PrefixStore(Path(self.folder.name), self.backend, memory_bytes=self.budget, disk_bytes=self.disk)

    def evict(self) -> None:
        """Remove the first that may go until all is well, and start again from the first."""
        while num_bytes(*(prefix for _, prefix in self.resident)) > self.budget:
            may_go = [
                i
                for i, (key, _) in enumerate(self.resident[:-1])
                if key not in [used for used, _ in self.in_use]
                and not (
                    key.task_id in self.pinned
                    and key.version == max(one.version for one, _ in self.resident if one.task_id == key.task_id)
                )
            ]
            if not may_go:
                break
            del self.resident[may_go[0]]

    def found(self, key: VersionKey) -> TaskPrefix | None:
        for i, (one, prefix) in enumerate(self.resident):
            if one == key:
                self.resident.append(self.resident.pop(i))
                return prefix
        return None

    keys = st.builds(VersionKey, st.sampled_from(["tsk_a", "tsk_b", "tsk_c"]), st.integers(1, 4))
    # Few choices, so that prefixes begin alike.
    texts = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([1, 7, 33, 40])), min_size=1, max_size=4).map(
        lambda parts: [token for seed, length in parts for token in tokens(length, seed)]
    )

    @rule(key=keys, token_ids=texts, pinned=st.booleans(), reuse=st.booleans())
    def put(self, key: VersionKey, token_ids: list[int], pinned: bool, reuse: bool) -> None:
        if key in [used for used, _ in self.in_use]:
            return
        cache = self.store.longest(token_ids, key.task_id) if reuse else None
        prefix = prefix_of(self.backend, token_ids, cache)
        put(self.store, key, prefix, pinned=pinned)
        if key.task_id in self.forgotten:
            return
        (self.pinned.add if pinned else self.pinned.discard)(key.task_id)
        self.resident = [one for one in self.resident if one[0] != key] + [(key, prefix)]
        self.stored.setdefault(key.task_id, []).append(tuple(token_ids))
        self.evict()

    @rule(key=keys)
    def get(self, key: VersionKey) -> None:
        assert self.store.get(key) is self.found(key)

    @rule(key=keys)
    def use(self, key: VersionKey) -> None:
        using = self.store.using(key)
        prefix = using.__enter__()
        assert prefix is self.found(key)
        if prefix is None:
            using.__exit__(None, None, None)
        else:
            self.in_use.append((key, using))

    @precondition(lambda self: self.in_use)
    @rule(data=st.data())
    def use_no_longer(self, data: st.DataObject) -> None:
        _, using = self.in_use.pop(data.draw(st.integers(0, len(self.in_use) - 1)))
        using.__exit__(None, None, None)
        self.evict()

    @rule(task_id=st.sampled_from(["tsk_a", "tsk_b", "tsk_c"]), pinned=st.booleans())
    def pin(self, task_id: str, pinned: bool) -> None:
        self.store.set_pinned(task_id, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(task_id)
        self.evict()

    @rule(task_id=st.sampled_from(["tsk_a", "tsk_b", "tsk_c"]))
    def forget(self, task_id: str) -> None:
        self.store.forget(task_id)
        self.forgotten.add(task_id)
        self.pinned.discard(task_id)
        self.stored.pop(task_id, None)
        self.resident = [one for one in self.resident if one[0].task_id != task_id]
        self.in_use = [one for one in self.in_use if one[0].task_id != task_id]
        assert not (Path(self.folder.name) / task_id).exists()

    @rule(key=keys, token_ids=texts)
    def look_for(self, key: VersionKey, token_ids: list[int]) -> None:
        num_found = require_right(self.backend, self.store.longest(token_ids, key.task_id), token_ids)
        of_task = [prefix.token_ids for one, prefix in self.resident if one.task_id == key.task_id]
        least = max((num_shared_tokens(token_ids, own) for own in of_task), default=0)
        for own in self.stored.get(key.task_id, []) if self.disk == PLENTY else ():
            shared = num_shared_tokens(token_ids, own)
            least = max(least, shared if shared == len(own) else shared // 32 * 32)
        everything = [*of_task, *self.stored.get(key.task_id, [])]
        assert least <= num_found <= max((num_shared_tokens(token_ids, own) for own in everything), default=0)

    @precondition(lambda self: not self.in_use)
    @rule()
    def restart(self) -> None:
        self.store.close()
        self.open()
        self.resident, self.pinned, self.forgotten = [], set(), set()

    @precondition(lambda self: not self.in_use)
    @rule(data=st.data(), damage=st.sampled_from(["missing", "truncated", "flipped", "empty", "half-written"]))
    def damage(self, data: st.DataObject, damage: str) -> None:
        """Damage a file while the server is down; what is found after that is right, and the task is forgotten."""
        paths = sorted(written(Path(self.folder.name)))
        if not paths:
            return
        path = data.draw(st.sampled_from(paths))
        content = path.read_bytes()
        self.store.close()
        if damage == "missing":
            path.unlink()
        elif damage == "half-written":
            path.with_name(".manyicl-part-00.segment").write_bytes(content[:1000])
        elif damage == "flipped":
            place = data.draw(st.integers(0, len(content) - 1))
            path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        else:
            path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
        self.open()
        if damage != "half-written":
            for token_ids in self.stored.pop(path.parent.name, []):
                require_right(self.backend, self.store.longest(token_ids, path.parent.name), token_ids)
            self.store.forget_others(set(self.stored))
        self.restart()

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.residents() == [key for key, _ in self.resident]
        usage = self.store.usage()
        assert usage.memory_bytes == num_bytes(*(prefix for _, prefix in self.resident))
        assert usage.disk_bytes == sum(written(Path(self.folder.name)).values()) <= self.disk

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


TestStoreBesideASlowOne = StoreBesideASlowOne.TestCase
TestStoreBesideASlowOne.settings = settings(deadline=None, max_examples=30, stateful_step_count=25)
