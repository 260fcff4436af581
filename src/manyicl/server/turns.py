"""Turns of threads that change the same thing, such as one task, while other things are changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
