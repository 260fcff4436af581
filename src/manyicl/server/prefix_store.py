"""Prefixes of many tasks in a bounded memory, and back from the disk when they are needed again."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from manyicl.engine.label_trie import num_shared_tokens
from manyicl.engine.local import LocalBackend
from manyicl.engine.prefix_cache import PrefixCache, shared_beginning
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.model.continuation import Block
from manyicl.server.records import VersionKey
from manyicl.server.segment_files import SegmentFiles

_LOG = logging.getLogger(__name__)
# Prefixes that may wait for the disk, besides the one that is being written; their keys and values stay in memory.
MOST_WAITING_WRITES = 1


@dataclass(frozen=True, slots=True)
class PrefixUsage:
    """How much a `PrefixStore` uses, and what happened since it was made.

    Attributes:
        num_resident: Prefixes in memory.
        memory_bytes: Their keys and values; what several share counts once.
        memory_budget: What they should use at most. One prefix alone, pinned ones and those in use may exceed it.
        disk_bytes: Size of the files.
        disk_budget: What they use at most.
        num_evicted: Prefixes that left memory for others.
        num_loaded: Times that keys and values came from the disk.
        num_damaged: Files that were not as they were written, and were deleted.
        num_unwritten: Prefixes that the disk had no space for.
    """

    num_resident: int
    memory_bytes: int
    memory_budget: int
    disk_bytes: int
    disk_budget: int
    num_evicted: int
    num_loaded: int
    num_damaged: int
    num_unwritten: int


@dataclass(eq=False)
class _Resident:
    """A prefix in memory.

    Attributes:
        prefix: The prefix.
        storages: Address -> bytes of the memory that its keys and values are in.
        num_users: Who uses it now: passes of the engine, and the write to the disk.
    """

    prefix: TaskPrefix
    storages: dict[int, int]
    num_users: int = 0


class PrefixStore:
    """Keeps prefixes in memory under a budget, the most recently used ones, and all within another one on the disk.

    A prefix is written by a thread of its own, so that nobody waits for the disk. What comes back is mapped into memory
    and equal to what was stored, bit by bit. Threads may share a store.

    In memory, the newest version of a pinned task stays, and so does what is in use and what was used last: a prefix
    that is larger than the budget can be used, alone.
    """

    def __init__(self, folder: Path, backend: LocalBackend, *, memory_bytes: int, disk_bytes: int) -> None:
        """Look at what an earlier process left.

        Args:
            folder: Folder of its own; made where it is missing.
            backend: Made the prefixes, and will use them.
            memory_bytes: Budget of keys and values in memory.
            disk_bytes: Budget of the files.

        Raises:
            MachineError: If the folder cannot be used.
        """
        self._backend = backend
        self._files = SegmentFiles(folder, backend, disk_bytes)
        self._memory_budget = memory_bytes
        self._memory_bytes = 0
        # The least recently used one first.
        self._residents: OrderedDict[VersionKey, _Resident] = OrderedDict()
        # Address of a piece of memory -> prefixes that have keys or values in it.
        self._storages: Counter[int] = Counter()
        self._pinned: set[str] = set()
        self._num_evicted = self._num_loaded = self._num_unwritten = 0
        self._lock = threading.RLock()
        self._writer = ThreadPoolExecutor(1, "prefix-writer")
        self._may_wait = threading.BoundedSemaphore(1 + MOST_WAITING_WRITES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: VersionKey) -> TaskPrefix | None:
        """Return a prefix that is in memory, and mark it as used."""
        with self._lock:
            resident = self._touched(key)
            return resident.prefix if resident else None

    def put(self, key: VersionKey, prefix: TaskPrefix, *, pinned: bool) -> None:
        """Keep a prefix in memory, and write to the disk what is not there yet.

        The write follows in a thread of its own; where one more is waiting already, this waits. A disk that is full or
        broken is counted and logged, the prefix stays in memory. Nothing of a task that was forgotten is kept.

        Args:
            key: Which version of which task.
            prefix: Made by the backend.
            pinned: Whether the task is pinned.
        """
        cache = _cache_of(prefix)
        resident = _Resident(prefix, _storages_of(cache.blocks))
        with self._lock:
            if self._files.is_forgotten(key.task_id):
                return
            self._remove(key)
            self._residents[key] = resident
            for address, num_bytes in resident.storages.items():
                self._memory_bytes += 0 if self._storages[address] else num_bytes
                self._storages[address] += 1
            resident.num_users += 1
            self.set_pinned(key.task_id, pinned)
        self._may_wait.acquire()
        self._writer.submit(self._write, key.task_id, resident, cache)

    @contextmanager
    def using(self, key: VersionKey) -> Iterator[TaskPrefix | None]:
        """Yield a prefix that is in memory, or None, and keep it there meanwhile; marks it as used."""
        with self._lock:
            resident = self._touched(key)
            if resident is not None:
                resident.num_users += 1
        try:
            yield resident.prefix if resident else None
        finally:
            if resident is not None:
                self._release(resident)

    def longest(self, token_ids: Sequence[int], task_id: str) -> PrefixCache | None:
        """Return the keys and values of the longest beginning of some tokens that the task has, in any of its versions.

        They are views of those in memory, or mapped from the disk; the first use of a file since the start reads all of
        it, to compare it with its hash, which takes about a second per GB. A damaged file is deleted and not used. On
        the disk a beginning is found up to a multiple of 32 tokens.

        Args:
            token_ids: A prefix that is wanted, (P,).
            task_id: Its task; tasks share nothing with each other.

        Returns:
            Keys and values of at least one token, up to all of them; None where there are none.
        """
        in_memory, num_in_memory = self._longest_in_memory(token_ids, task_id)
        while True:
            pieces = self._files.longest(task_id, token_ids)
            if not pieces or pieces[-1].end <= num_in_memory:
                return self._cache(token_ids, shared_beginning(in_memory, num_in_memory))
            # What is in memory is used for all pieces that it covers as a whole, so that there are as few parts.
            missing = [piece for piece in pieces if piece.end > num_in_memory]
            blocks = list(shared_beginning(in_memory, missing[0].start))
            for piece in missing:
                block = self._files.load(piece)
                if block is None:
                    break
                blocks.append(block)
            else:
                self._files.mark_used(pieces)
                with self._lock:
                    self._num_loaded += 1
                return self._cache(token_ids, tuple(blocks))

    def forget(self, task_id: str) -> None:
        """Delete all prefixes of a task, from memory and from the disk; it gets none any more."""
        self._files.forget(task_id)
        with self._lock:
            self._pinned.discard(task_id)
            for key in [key for key in self._residents if key.task_id == task_id]:
                self._remove(key)

    def forget_others(self, task_ids: Collection[str]) -> None:
        """Delete the files of all tasks but these: of those whose deletion a killed process did not complete."""
        for task_id in self._files.task_ids():
            if task_id not in task_ids:
                self.forget(task_id)

    def set_pinned(self, task_id: str, pinned: bool) -> None:
        """Keep the newest version of a task that is in memory there, or no longer."""
        with self._lock:
            if pinned:
                self._pinned.add(task_id)
            else:
                self._pinned.discard(task_id)
            self._evict()

    def num_bytes(self, key: VersionKey) -> int | None:
        """Return the memory of a prefix, with what it shares with others; None where it is not in memory."""
        with self._lock:
            resident = self._residents.get(key)
            return sum(resident.storages.values()) if resident else None

    def residents(self) -> list[VersionKey]:
        """Return the versions whose prefixes are in memory, the least recently used one first."""
        with self._lock:
            return list(self._residents)

    def usage(self) -> PrefixUsage:
        """Tell how much is used, and what happened."""
        disk_bytes = self._files.bytes_used()
        with self._lock:
            return PrefixUsage(
                num_resident=len(self._residents),
                memory_bytes=self._memory_bytes,
                memory_budget=self._memory_budget,
                disk_bytes=disk_bytes,
                disk_budget=self._files.num_bytes,
                num_evicted=self._num_evicted,
                num_loaded=self._num_loaded,
                num_damaged=self._files.num_damaged,
                num_unwritten=self._num_unwritten,
            )

    def flush(self) -> None:
        """Wait until all that was put is on the disk."""
        self._writer.submit(int).result()

    def close(self) -> None:
        """Wait until all that was put is on the disk, and put no more."""
        self._writer.shutdown(wait=True)

    def _touched(self, key: VersionKey) -> _Resident | None:
        resident = self._residents.get(key)
        if resident is not None:
            self._residents.move_to_end(key)
        return resident

    def _longest_in_memory(self, token_ids: Sequence[int], task_id: str) -> tuple[tuple[Block, ...], int]:
        """Find the prefix of the task in memory that shares most tokens; return its blocks and how many tokens."""
        with self._lock:
            caches = [_cache_of(one.prefix) for key, one in self._residents.items() if key.task_id == task_id]
        shared = [(num_shared_tokens(token_ids, cache.token_ids), cache.blocks) for cache in caches]
        num_tokens, blocks = max(shared, key=lambda one: one[0], default=(0, ()))
        return blocks, num_tokens

    def _cache(self, token_ids: Sequence[int], blocks: tuple[Block, ...]) -> PrefixCache | None:
        """Put keys and values together with their tokens."""
        if not blocks:
            return None
        return PrefixCache(self._backend.identity, tuple(token_ids[: blocks[-1].end]), blocks)

    def _write(self, task_id: str, resident: _Resident, cache: PrefixCache) -> None:
        """Write a prefix; in the thread of the writer."""
        try:
            is_written = not cache.blocks or self._files.store(task_id, cache.token_ids, cache.blocks)
        except Exception:
            _LOG.exception("A prefix stays in memory alone, it could not be written")
            is_written = False
        self._may_wait.release()
        with self._lock:
            self._num_unwritten += not is_written
            self._release(resident)

    def _release(self, resident: _Resident) -> None:
        """End a use of a prefix, which may be evicted now."""
        with self._lock:
            resident.num_users -= 1
            self._evict()

    def _evict(self) -> None:
        """Remove the least recently used prefixes until the rest is within the budget; never the last one used."""
        for key in list(self._residents)[:-1]:
            if self._memory_bytes <= self._memory_budget:
                break
            if not self._residents[key].num_users and not self._is_pinned(key):
                self._remove(key)
                self._num_evicted += 1

    def _is_pinned(self, key: VersionKey) -> bool:
        """Tell whether a version is the newest in memory of a pinned task; older ones would add up."""
        newer = (one.task_id == key.task_id and one.version > key.version for one in self._residents)
        return key.task_id in self._pinned and not any(newer)

    def _remove(self, key: VersionKey) -> None:
        """Take a prefix out of memory; who uses it now may finish."""
        resident = self._residents.pop(key, None)
        for address, num_bytes in resident.storages.items() if resident else ():
            self._storages[address] -= 1
            if not self._storages[address]:
                del self._storages[address]
                self._memory_bytes -= num_bytes


def _cache_of(prefix: TaskPrefix) -> PrefixCache:
    """Return the keys and values of a prefix of the backend in this process."""
    assert isinstance(prefix.cache, PrefixCache), "the server's own backend made the prefix"
    return prefix.cache


def _storages_of(blocks: Sequence[Block]) -> dict[int, int]:
    """Find the memory that keys and values are in, address -> bytes; a view is in that of the whole."""
    storages = [states.untyped_storage() for block in blocks for states in (*block.keys, *block.values)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
