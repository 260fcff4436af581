"""A mapping that keeps what was used last, for what can be made again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from typing import TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class Recent(MutableMapping[KeyT, ValueT]):
    """A mapping of bounded size; the least recently used entry makes room for a new one.

    >>> recent = Recent(2)
    >>> recent["a"], recent["b"] = 1, 2
    >>> recent["a"]
    1
    >>> recent["c"] = 3
    >>> sorted(recent)
    ['a', 'c']
    """

    def __init__(self, most: int) -> None:
        """Begin without entries; ``most`` is how many are kept."""
        self._most = most
        self._entries: OrderedDict[KeyT, ValueT] = OrderedDict()

    def __getitem__(self, key: KeyT) -> ValueT:
        """Return an entry, which counts as used."""
        self._entries.move_to_end(key)
        return self._entries[key]

    def __setitem__(self, key: KeyT, value: ValueT) -> None:
        """Add or replace an entry."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._most:
            self._entries.popitem(last=False)

    def __delitem__(self, key: KeyT) -> None:
        """Remove an entry."""
        del self._entries[key]

    def __iter__(self) -> Iterator[KeyT]:
        """Yield the keys, those least recently used first."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        """Tell whether there is an entry, which does not count as a use."""
        return key in self._entries

    def discard(self, is_meant: Callable[[KeyT], bool]) -> None:
        """Remove all entries with such keys."""
        for key in [key for key in self._entries if is_meant(key)]:
            del self._entries[key]
