"""Prefixes in two dictionaries, memory and "disk", for tests of the worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from manyicl.engine.backend import Prefix
from manyicl.engine.label_trie import num_shared_tokens
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.server.records import VersionKey


@dataclass
class UsageInMemory:
    """What `PrefixesInMemory` holds."""

    num_resident: int
    memory_bytes: int


@dataclass
class PrefixesInMemory:
    """Prefixes; a test evicts by removing them from ``memory``."""

    memory: dict[VersionKey, TaskPrefix] = field(default_factory=dict)
    disk: dict[VersionKey, Prefix] = field(default_factory=dict)
    pinned: dict[str, bool] = field(default_factory=dict)
    in_use: list[VersionKey] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def get(self, key: VersionKey) -> TaskPrefix | None:
        return self.memory.get(key)

    def put(self, key: VersionKey, prefix: TaskPrefix, *, pinned: bool) -> None:
        self.memory[key] = prefix
        self.disk[key] = prefix.cache
        self.pinned[key.task_id] = pinned

    @contextmanager
    def using(self, key: VersionKey) -> Iterator[None]:
        self.in_use.append(key)
        yield
        self.in_use.remove(key)

    def longest(self, token_ids: Sequence[int], task_id: str) -> Prefix | None:
        caches = [cache for key, cache in self.disk.items() if key.task_id == task_id]
        best = max(caches, key=lambda cache: num_shared_tokens(token_ids, cache.token_ids), default=None)
        return best if best and num_shared_tokens(token_ids, best.token_ids) else None

    def forget(self, task_id: str) -> None:
        self.forgotten.append(task_id)
        for key in [key for key in self.disk if key.task_id == task_id]:
            self.memory.pop(key, None)
            del self.disk[key]

    def set_pinned(self, task_id: str, pinned: bool) -> None:
        self.pinned[task_id] = pinned

    def usage(self) -> UsageInMemory:
        return UsageInMemory(len(self.memory), 0)
