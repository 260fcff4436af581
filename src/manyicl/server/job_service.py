"""Jobs as the routes use them: rules checked before one is made, and how its rows are answered later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from manyicl.errors import UserError
from manyicl.server.answer_options import HowToAnswer, how_to_answer
from manyicl.server.evaluation import require_evaluable
from manyicl.server.job_runner import JobPlan, stored_row
from manyicl.server.problems import too_busy
from manyicl.server.records import Idempotency, JobKind, JobRecord
from manyicl.server.schemas import AnswerChoices
from manyicl.server.task_service import TaskService, task_without_rows

if TYPE_CHECKING:
    from manyicl.server.job_store import JobStore
    from manyicl.tasks.rows import LocatedRow
    from manyicl.tasks.task import Query, Task

# Unfinished jobs of one owner; more would fill the disk while the model is busy.
MOST_UNFINISHED = 100
# What may change between two portions of a job, and is fixed when it is made.
_FIXED = ("abstain_below", "blend", "retrieve")


class JobService:
    """Makes jobs, and plans them for `manyicl.server.job_runner.JobRunner`."""

    def __init__(self, jobs: JobStore, tasks: TaskService) -> None:
        """Take jobs in the database, and the rules of tasks."""
        self._jobs, self._tasks = jobs, tasks

    def create(
        self,
        owner: str,
        kind: JobKind,
        task: str,
        choices: AnswerChoices,
        rows: Sequence[LocatedRow | UserError],
        idempotency: Idempotency | None = None,
    ) -> tuple[JobRecord, bool]:
        """Make a job, or return the one that the same request made before, and whether there was one.

        Args:
            owner: Whose it is.
            kind: What is done with the rows.
            task: Id or name of the task.
            choices: How rows are answered, and by which version.
            rows: Rows, and errors in place of bad ones, which become problems of their results.
            idempotency: Idempotency key of the request.

        Raises:
            UserError: If there is no such task or version, the version failed, the options do not suit it, or too many
                jobs of the owner are unfinished.
        """
        if idempotency is not None and (made := self._jobs.replayed(owner, idempotency)) is not None:
            return made, True
        record, version = self._tasks.version_that_answers(owner, task, choices.version)
        self._tasks.require_ready_or_compiling(version.key)
        without_rows = task_without_rows(record, version)
        how = how_to_answer(choices, record.settings, without_rows)
        if kind == "evaluate":
            require_evaluable(without_rows)
        self._require_few(owner)
        options = choices.model_dump(exclude_unset=True, exclude={"version"}) | _fixed(how)
        return self._jobs.create(owner, kind, version.key, options, map(stored_row, rows), idempotency)

    def plan(self, job: JobRecord) -> JobPlan:
        """Say how the rows of a job are answered.

        Raises:
            UserError: If its task is gone, or the version failed.
        """
        version = self._tasks.require_ready_or_compiling(job.key)
        record = self._tasks.tasks.get(job.owner, job.key.task_id)
        without_rows = task_without_rows(record, version)
        how = how_to_answer(AnswerChoices.model_validate(dict(job.options)), record.settings, without_rows)
        return JobPlan(without_rows, how.options, how.num_retrieved)

    def render(self, task: Task, rows: Iterable[LocatedRow | UserError]) -> list[Query | UserError]:
        """Render rows to queries within the time that the templates of one request have."""
        return self._tasks.rendered(task, rows)

    def _require_few(self, owner: str) -> None:
        num_unfinished = self._jobs.num_unfinished(owner)
        if num_unfinished >= MOST_UNFINISHED:
            what = f"{num_unfinished} jobs are unfinished"
            raise too_busy("too_many_jobs", what, 60, "Wait until one is done, or cancel some.")


def _fixed(how: HowToAnswer) -> dict[str, object]:
    """Return the options that come from the settings of the task where the request does not say."""
    options = how.options
    found = options.get("abstain_below"), options.get("blend", False), how.num_retrieved
    return dict(zip(_FIXED, found, strict=True))
