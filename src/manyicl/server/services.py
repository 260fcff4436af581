"""What the routes of one server work with, put together once at its start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request

from manyicl.server.interfaces import Worker
from manyicl.server.job_runner import ROWS_PER_PORTION, JobRunner
from manyicl.server.job_service import JobService
from manyicl.server.metrics import ServerMetrics
from manyicl.server.problems import too_busy
from manyicl.server.rate_limits import RateLimits
from manyicl.server.records import VersionKey
from manyicl.server.settings import ServerSettings
from manyicl.server.task_service import TaskService
from manyicl.server.turns import Places

if TYPE_CHECKING:
    from manyicl.server.job_store import JobStore
    from manyicl.server.keys import KeyStore
    from manyicl.server.task_store import TaskStore

# Requests whose rows are parsed and rendered at the same time; others wait for them, and small requests go past.
MOST_RENDERING = 2
# Writes and deletions in progress, in all and of one owner; of one task one at a time. Reads go past.
MOST_WRITING, MOST_WRITING_OF_OWNER = 16, 4


@dataclass
class Services:
    """Parts of a running server.

    Attributes:
        settings: Its settings.
        tasks: Tasks in the database.
        jobs: Jobs in the database.
        keys: API keys; None for a server without.
        worker: The thread that owns the engine.
        service: Rules of tasks.
        prefix_bytes: Gives the size of a version's prefix in memory; None where it is not there.
        was_rebuilt: Tells whether a version that was ready had to be computed again.
        metrics: What is counted.
        limits: Limits of callers.
        job_service: Rules of jobs.
        runner: The thread that works on jobs.
        rendering: Bounds the requests that are parsed and rendered at the same time.
        writing: Bounds the writes that are in progress at the same time.
        writing_of_owner: Bounds those of each owner.
        writing_of_task: Bounds those of each task.
        is_stopping: Whether the server ends; requests that would wait long are refused.
    """

    settings: ServerSettings
    tasks: TaskStore
    jobs: JobStore
    keys: KeyStore | None
    worker: Worker
    service: TaskService
    prefix_bytes: Callable[[VersionKey], int | None] = lambda _: None
    was_rebuilt: Callable[[VersionKey], bool] = lambda _: False
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    limits: RateLimits = field(init=False)
    job_service: JobService = field(init=False)
    runner: JobRunner = field(init=False)
    rendering: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MOST_RENDERING))
    writing: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MOST_WRITING))
    writing_of_owner: Places = field(default_factory=lambda: Places(MOST_WRITING_OF_OWNER))
    writing_of_task: Places = field(default_factory=lambda: Places(1))
    is_stopping: bool = False

    def __post_init__(self) -> None:
        """Make the limits that the settings say, and the thread that works on jobs, which is not started."""
        self.limits = RateLimits(self.settings.requests_per_minute, self.settings.rows_per_minute)
        self.job_service = JobService(self.jobs, self.service)
        self.runner = JobRunner(
            self.jobs,
            self.worker,
            self.job_service.plan,
            self.job_service.render,
            kept_days=self.settings.kept_days,
            rows_per_portion=min(ROWS_PER_PORTION, self.settings.max_waiting_rows),
        )

    def require_running(self) -> None:
        """Refuse what would wait long while the server ends.

        Raises:
            BusyError: If it does.
        """
        if self.is_stopping:
            raise too_busy("stopping", "the server is stopping", 5)


def services_of(request: Request) -> Services:
    """Return the parts of the server that a request came to."""
    services: Services = request.app.state.services
    return services


async def _given(request: Request) -> Services:
    """Give them to a route; FastAPI would call a function that is not async in a thread."""
    return services_of(request)


# A route's parameter of this type is the parts of its server.
App = Annotated[Services, Depends(_given)]
