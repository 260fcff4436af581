"""A cache of the token ids of recurring texts, with a bound on its memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable
from threading import Lock

# Roughly what a dictionary needs for one text in addition to its characters and ids.
BYTES_OF_AN_ENTRY = 250


class TokenCache:
    """Remembers what a function encodes, the newest texts up to a number of bytes; threads may share it.

    It pickles without its content.

    Attributes:
        num_bytes: Memory in use, roughly: 4 bytes an id and what Python needs for the text.
    """

    def __init__(self, encode: Callable[..., tuple[int, ...]], max_bytes: int) -> None:
        """Remember what ``encode`` returns, in at most ``max_bytes``."""
        self._encode = encode
        self._max_bytes = max_bytes
        self._known: dict[tuple[Hashable, ...], array[int]] = {}
        self._lock = Lock()
        self.num_bytes = 0

    def __call__(self, text: str, *others: Hashable) -> tuple[int, ...]:
        """Return the token ids of a text, encoded only if they are not known."""
        key = (text, *others)
        known = self._known.get(key)
        if known is not None:
            return tuple(known)
        token_ids = self._encode(*key)
        entry = array("i", token_ids)
        with self._lock:
            if key not in self._known:
                self._known[key] = entry
                self.num_bytes += _size(text, entry)
            while self.num_bytes > self._max_bytes:
                oldest = next(iter(self._known))
                self.num_bytes -= _size(str(oldest[0]), self._known.pop(oldest))
        return token_ids

    def __reduce__(self) -> tuple[type[TokenCache], tuple[Callable[..., tuple[int, ...]], int]]:
        return TokenCache, (self._encode, self._max_bytes)


def _size(text: str, token_ids: array[int]) -> int:
    return BYTES_OF_AN_ENTRY + text.__sizeof__() + token_ids.itemsize * len(token_ids)
