"""What routes and services need of the thread that owns the engine, so that neither loads its libraries."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from manyicl.server.records import VersionKey
from manyicl.server.work import StreamTicket, Ticket, WorkerState

if TYPE_CHECKING:
    from manyicl.engine.queries import AnswerOptions, StreamedRow


class Worker(Protocol):
    """The thread that owns the engine; `manyicl.server.engine_worker.EngineWorker` is one."""

    def compile(self, key: VersionKey) -> None:
        """Compile a version when there is time; to say so again has no effect."""

    def predict(
        self,
        key: VersionKey,
        rows: Sequence[StreamedRow],
        options: AnswerOptions,
        num_retrieved: int = 0,
        *,
        first_number: int = 1,
    ) -> Ticket:
        """Answer rows; raises `UserError` ``queue_full`` at once where too many wait."""

    def stream(self, key: VersionKey, row: StreamedRow, options: AnswerOptions, num_retrieved: int = 0) -> StreamTicket:
        """Answer one row in parts."""

    def forget(self, task_id: str) -> Future[None]:
        """Drop all that is known of a task, which is gone from the database; the result says when that is done."""

    def set_pinned(self, task_id: str, pinned: bool) -> Future[None]:
        """Keep the prefixes of a task in memory, or no longer."""

    def state(self) -> WorkerState:
        """Say what it does."""
