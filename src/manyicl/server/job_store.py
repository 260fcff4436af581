"""Jobs, their rows and results, as the database keeps them: a job that was interrupted resumes with the next row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, bindparam, delete, func, insert, select, update

from manyicl.errors import UserError, quoted
from manyicl.server.database import Database
from manyicl.server.idempotency import Made, key_of_another_request, made_before, remember
from manyicl.server.pages import page_of, position_of
from manyicl.server.records import NO_LIMITS, Idempotency, JobKind, JobRecord, StoreLimits, VersionKey
from manyicl.server.store_limits import require_few_jobs, require_version
from manyicl.server.tables import is_number, is_storable, job_rows, jobs, new_id, utc_now

ROWS_AT_ONCE = 1_000
_UNFINISHED = jobs.c.state.in_(("waiting", "running"))


class JobStore:
    """Reads and writes jobs. Another owner's job is unknown, just as one that does not exist."""

    def __init__(
        self, database: Database, clock: Callable[[], datetime] = utc_now, limits: StoreLimits = NO_LIMITS
    ) -> None:
        """Take the database, and a clock, of which no order depends.

        Args:
            database: Open database.
            clock: Gives the time in UTC.
            limits: How much is kept.
        """
        self._database = database
        self._clock = clock
        self._limits = limits

    def create(
        self,
        owner: str,
        kind: JobKind,
        key: VersionKey,
        options: Mapping[str, Any],
        rows: Iterable[Mapping[str, Any]],
        idempotency: Idempotency | None = None,
    ) -> tuple[JobRecord, bool]:
        """Make a job, or return the one that the same request made before.

        Args:
            owner: Whose it is.
            kind: What is done with the rows.
            key: Version of a task of the owner.
            options: Options of the predictions.
            rows: Rows, whatever JSON holds; numbered from 1.
            idempotency: Key of the request, and what it was.

        Returns:
            The job, and whether it was there.

        Raises:
            UserError: If the version does not exist, the owner has too many jobs or rows of jobs, or another request
                had the idempotency key.
        """
        with self._database.writing() as connection:
            now = self._clock()
            if made := made_before(connection, owner, idempotency, now):
                return _job_made_before(connection, owner, made), True
            require_version(connection, key)
            job_id = new_id("job")
            values = {"id": job_id, "owner": owner, "kind": kind, **key._asdict(), "options": dict(options)}
            counts = {"state": "waiting", "num_rows": 0, "num_done": 0, "num_problems": 0, "created_at": now}
            connection.execute(insert(jobs).values(**values, **counts))
            num_rows = _insert_rows(connection, job_id, rows)
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(num_rows=num_rows))
            require_few_jobs(connection, owner, self._limits)
            remember(connection, owner, idempotency, Made(job_id=job_id), now, self._limits.idempotency_keys)
            return _find(connection, owner, job_id), False

    def get(self, owner: str, job_id: str) -> JobRecord:
        """Return a job.

        Raises:
            UserError: If the job is unknown.
        """
        with self._database.reading() as connection:
            return _find(connection, owner, job_id)

    def page(self, owner: str, limit: int, after: str | None = None) -> tuple[list[JobRecord], str | None]:
        """Return some jobs of an owner, oldest first, and the cursor of the next page; None after the last one.

        Raises:
            UserError: If the cursor is wrong.
        """
        query = select(jobs).where(jobs.c.owner == owner, jobs.c.position > position_of(after))
        with self._database.reading() as connection:
            found = connection.execute(query.order_by(jobs.c.position).limit(limit + 1)).mappings().all()
        page, cursor = page_of(found, limit, lambda row: int(row[jobs.c.position]))
        return [_job_record(row) for row in page], cursor

    def replayed(self, owner: str, idempotency: Idempotency) -> JobRecord | None:
        """Return the job that the same request made before; None where it is new.

        Raises:
            UserError: If another request had the key, or the job was deleted meanwhile.
        """
        with self._database.reading() as connection:
            made = made_before(connection, owner, idempotency, self._clock())
            return None if made is None else _job_made_before(connection, owner, made)

    def cancel(self, owner: str, job_id: str) -> JobRecord:
        """End a job that is not finished; one that is stays as it is. Its results so far are kept.

        Raises:
            UserError: If the job is unknown.
        """
        with self._database.writing() as connection:
            _find(connection, owner, job_id)
            self._end(connection, job_id, "cancelled")
            return _find(connection, owner, job_id)

    def unfinished(self) -> list[JobRecord]:
        """Return the jobs of all owners that wait or run, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(select(jobs).where(_UNFINISHED).order_by(jobs.c.position)).mappings()
            return [_job_record(row) for row in rows]

    def num_unfinished(self, owner: str) -> int:
        """Count the jobs of an owner that wait or run."""
        counting = select(func.count()).select_from(jobs).where(jobs.c.owner == owner, _UNFINISHED)
        with self._database.reading() as connection:
            return connection.execute(counting).scalar_one()

    def start(self, job_id: str) -> bool:
        """Note that a job runs. False where it is finished, cancelled or gone."""
        starting = update(jobs).where(jobs.c.id == job_id, _UNFINISHED).values(state="running")
        with self._database.writing() as connection:
            return connection.execute(starting).rowcount > 0

    def waiting_rows(self, job_id: str, limit: int) -> list[tuple[int, Mapping[str, Any]]]:
        """Return the next rows without a result, by number."""
        columns = job_rows.c
        query = select(columns.number, columns.columns).where(columns.job_id == job_id, columns.result.is_(None))
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(columns.number).limit(limit))
            return [(number, values) for number, values in rows]

    def put_results(self, job_id: str, results: Sequence[tuple[int, Mapping[str, Any]]], num_problems: int) -> bool:
        """Keep results of rows that had none.

        Args:
            job_id: Id of the job.
            results: Number and result of rows, whatever JSON holds.
            num_problems: How many of them are problems.

        Returns:
            False, and nothing is kept, where the job is finished, cancelled or gone.

        Raises:
            ValueError: If a row has a result already, or there is no such row; nothing is kept then.
        """
        counting = update(jobs).where(jobs.c.id == job_id, _UNFINISHED)
        new = {"num_done": jobs.c.num_done + len(results), "num_problems": jobs.c.num_problems + num_problems}
        with self._database.writing() as connection:
            if not connection.execute(counting.values(state="running", **new)).rowcount:
                return False
            _keep_results(connection, job_id, results)
        return True

    def results(self, job_id: str, after: int, limit: int) -> list[tuple[int, Mapping[str, Any]]]:
        """Return results by the number of the row, up to the first row that has none yet.

        Args:
            job_id: Id of a job of the owner.
            after: Number of the last row that is known; 0 begins with the first.
            limit: Most results.
        """
        columns = job_rows.c
        first_waiting = select(func.min(columns.number)).where(columns.job_id == job_id, columns.result.is_(None))
        query = select(columns.number, columns.result).where(columns.job_id == job_id, columns.number > after)
        if not is_number(after + 1):
            return []
        with self._database.reading() as connection:
            end = connection.execute(first_waiting).scalar_one()
            if end is not None:
                query = query.where(columns.number < end)
            rows = connection.execute(query.order_by(columns.number).limit(limit))
            return [(number, result) for number, result in rows]

    def finish(
        self,
        job_id: str,
        state: Literal["done", "failed"],
        problem: Mapping[str, Any] | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> bool:
        """End a job, with why it failed or its scores. False where it is finished, cancelled or gone."""
        with self._database.writing() as connection:
            return self._end(connection, job_id, state, problem, summary)

    def delete(self, owner: str, job_id: str) -> JobRecord:
        """Delete a job with its rows and results, and return what it was.

        Raises:
            UserError: If the job is unknown.
        """
        with self._database.writing() as connection:
            found = _find(connection, owner, job_id)
            connection.execute(delete(jobs).where(jobs.c.id == job_id))
        self._database.take_out_deleted()
        return found

    def forget_older_than(self, days: float) -> int:
        """Delete the jobs of all owners that ended so many days ago, and return how many."""
        ended_before = self._clock() - timedelta(days=days)
        with self._database.writing() as connection:
            count = connection.execute(delete(jobs).where(jobs.c.finished_at < ended_before)).rowcount
        if count:
            self._database.take_out_deleted()
        return count

    def _end(
        self,
        connection: Connection,
        job_id: str,
        state: str,
        problem: Mapping[str, Any] | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> bool:
        values = {"state": state, "finished_at": self._clock(), "problem": problem, "summary": summary}
        return connection.execute(update(jobs).where(jobs.c.id == job_id, _UNFINISHED).values(**values)).rowcount > 0


def _insert_rows(connection: Connection, job_id: str, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows in portions, so that a long job is never in memory at once, and return how many."""
    numbered = ({"job_id": job_id, "number": number, "columns": dict(row)} for number, row in enumerate(rows, 1))
    num_rows = 0
    for portion in _portions(numbered):
        connection.execute(insert(job_rows), portion)
        num_rows += len(portion)
    return num_rows


def _portions(values: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while portion := list(islice(values, ROWS_AT_ONCE)):
        yield portion


def _keep_results(connection: Connection, job_id: str, results: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    columns = job_rows.c
    row = [columns.job_id == job_id, columns.number == bindparam("of_number"), columns.result.is_(None)]
    keeping = update(job_rows).where(*row).values(result=bindparam("new_result"))
    for number, result in results:
        if not connection.execute(keeping, {"of_number": number, "new_result": dict(result)}).rowcount:
            raise ValueError(f"Row {number} of {job_id} has a result already, or does not exist.")


def _job_made_before(connection: Connection, owner: str, made: Made) -> JobRecord:
    if made.job_id is None:
        raise key_of_another_request()
    return _find(connection, owner, made.job_id)


def _find(connection: Connection, owner: str, job_id: str) -> JobRecord:
    row = None
    if is_storable(job_id):
        row = (
            connection.execute(select(jobs).where(jobs.c.owner == owner, jobs.c.id == job_id)).mappings().one_or_none()
        )
    if row is None:
        raise UserError("unknown_job", f"there is no job {quoted(job_id)}", field="job")
    return _job_record(row)


def _job_record(row: RowMapping) -> JobRecord:
    values = {name: row[name] for name in JobRecord.__slots__ if name != "key"}
    return JobRecord(key=VersionKey(row["task_id"], row["version"]), **values)
