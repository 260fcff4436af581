"""Turns of those that change the same thing, such as one task, while other things are changed."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from anyio import CapacityLimiter


class Turns:
    """Lets one thread at a time change the thing of a name. There are as many locks as names in use at the moment."""

    def __init__(self) -> None:
        # Name -> its lock, and how many threads have it or wait for it.
        self._locks: dict[str, tuple[threading.Lock, int]] = {}
        self._guard = threading.Lock()

    def __len__(self) -> int:
        """Count the names in use."""
        return len(self._locks)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Wait until no other thread has the turn of a name, and have it."""
        with self._guard:
            lock, num_users = self._locks.get(name) or (threading.Lock(), 0)
            self._locks[name] = lock, num_users + 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                _, num_users = self._locks[name]
                if num_users > 1:
                    self._locks[name] = lock, num_users - 1
                else:
                    del self._locks[name]


class Places:
    """Lets so many requests at a time into what a name stands for. Others wait in the event loop, without a thread."""

    def __init__(self, most: int) -> None:
        """Begin without names; ``most`` is how many places each has."""
        self._most = most
        # Name -> its places, and how many requests have one or wait for one.
        self._places: dict[str, tuple[CapacityLimiter, int]] = {}

    def __len__(self) -> int:
        """Count the names in use."""
        return len(self._places)

    @asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[None]:
        """Wait for a place of a name, and have it."""
        places, num_users = self._places.get(name) or (CapacityLimiter(self._most), 0)
        self._places[name] = places, num_users + 1
        try:
            async with places:
                yield
        finally:
            _, num_users = self._places[name]
            if num_users > 1:
                self._places[name] = places, num_users - 1
            else:
                del self._places[name]
