"""Rows that wait for their answers, in groups of which each can be answered in one pass, taken in turns.

A group whose oldest row has waited longest comes first. Within a group, tickets come in the order of their arrival; one
whose rows do not all fit a pass waits anew for its next turn once that pass is done, so that thousands of rows keep
nobody else waiting for longer than a pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from manyicl.server.records import VersionKey

TicketT = TypeVar("TicketT", bound=Hashable)


class Group(NamedTuple):
    """What rows must have in common to be answered in one pass.

    Attributes:
        version: Version of the task that answers.
        options: Names and values of the options of the answers, sorted.
        num_retrieved: Demonstrations to put before each query.
    """

    version: VersionKey
    options: tuple[tuple[str, Hashable], ...] = ()
    num_retrieved: int = 0


class Portion(NamedTuple, Generic[TicketT]):
    """Rows of one ticket that a pass answers.

    Attributes:
        ticket: Whose rows they are.
        start: The first of them, from 0.
        end: Position after the last.
    """

    ticket: TicketT
    start: int
    end: int


@dataclass(slots=True)
class _Entry:
    """What is known of a ticket: its group, how many rows it has and how many were taken, and since when it waits."""

    group: Group
    num_rows: int
    since: float
    num_taken: int = 0


class WaitingRows(Generic[TicketT]):
    """Tickets with rows that no pass has answered yet. Not safe for threads: its user holds a lock."""

    def __init__(self) -> None:
        """Begin with none."""
        self.num_rows = 0
        self._entries: dict[TicketT, _Entry] = {}
        # Group -> its tickets that can be taken now, those that wait longest first; none of the values is empty.
        self._queues: dict[Group, dict[TicketT, None]] = {}

    def add(self, group: Group, ticket: TicketT, num_rows: int, now: float) -> None:
        """Let a ticket with at least one row wait; ``now`` never falls from call to call."""
        self._entries[ticket] = _Entry(group, num_rows, now)
        self._queues.setdefault(group, {})[ticket] = None
        self.num_rows += num_rows

    def remove(self, ticket: TicketT) -> None:
        """Forget a ticket, if it is here."""
        if (entry := self._entries.pop(ticket, None)) is not None:
            self.num_rows -= entry.num_rows - entry.num_taken
            self._leave_queue(entry.group, ticket)

    def oldest(self) -> float | None:
        """Return since when the row waits that waits longest; None where none can be taken."""
        return min(map(self._since, self._queues), default=None)

    def groups(self, until: float) -> list[Group]:
        """Return the groups with rows that have waited since ``until`` or longer, in the order of their turns."""
        waited = [group for group in self._queues if self._since(group) <= until]
        return sorted(waited, key=self._since)

    def tickets(self, version: VersionKey | None = None, task_id: str | None = None) -> list[TicketT]:
        """Return the tickets of a version or of a task, or all."""
        return [
            ticket
            for ticket, entry in self._entries.items()
            if version in (None, entry.group.version) and task_id in (None, entry.group.version.task_id)
        ]

    def num_tickets(self, group: Group | None = None) -> int:
        """Return how many tickets of a group, or of all, can be taken now."""
        return len(self._queues.get(group, ())) if group is not None else sum(map(len, self._queues.values()))

    def take(self, group: Group, most_rows: int, most_of_one: int) -> list[Portion[TicketT]]:
        """Take rows of a group, up to ``most_of_one`` of a ticket, which cannot be taken again before `give_back`."""
        portions: list[Portion[TicketT]] = []
        waiting = deque(self._queues.get(group, ()))
        while most_rows > 0 and waiting:
            ticket = waiting.popleft()
            entry = self._entries[ticket]
            start, end = entry.num_taken, min(entry.num_rows, entry.num_taken + min(most_rows, most_of_one))
            portions.append(Portion(ticket, start, end))
            entry.num_taken = end
            most_rows -= end - start
            self.num_rows -= end - start
            self._leave_queue(group, ticket)
        return portions

    def give_back(self, ticket: TicketT, now: float) -> None:
        """Say that the rows that were taken from a ticket are answered; it waits on if it has further ones."""
        if (entry := self._entries.get(ticket)) is None:
            return
        if entry.num_taken == entry.num_rows:
            del self._entries[ticket]
        else:
            entry.since = now
            self._queues.setdefault(entry.group, {})[ticket] = None

    def _since(self, group: Group) -> float:
        return self._entries[next(iter(self._queues[group]))].since

    def _leave_queue(self, group: Group, ticket: TicketT) -> None:
        queue = self._queues.get(group, {})
        queue.pop(ticket, None)
        if not queue:
            self._queues.pop(group, None)
