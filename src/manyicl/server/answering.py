"""Rows -> answers, portion by portion, as long as somebody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from manyicl.errors import UserError
from manyicl.server.bad_rows import require_all
from manyicl.server.bodies import quickly
from manyicl.server.problems import BusyError, too_busy
from manyicl.server.records import VersionKey, VersionRecord
from manyicl.server.services import Services
from manyicl.server.work import StreamTicket, Ticket, WorkerState

if TYPE_CHECKING:
    from manyicl.engine.prediction import AnswerPart, Prediction
    from manyicl.server.task_service import Question
    from manyicl.tasks.task import Query

# Rows that are handed to the worker together; a request has at most two such portions in its queue.
ROWS_AT_ONCE = 256
# How often a portion after the first is tried again where too many rows wait.
SECONDS_BETWEEN_TRIES = 0.2
ResultT = TypeVar("ResultT")


class Client:
    """Waits for work as long as the client is there."""

    def __init__(self, request: Request, seconds: float) -> None:
        """Watch the connection of a request whose body was read."""
        self._seconds = seconds
        self._gone = asyncio.ensure_future(_until_gone(request))

    async def wait_for(self, future: asyncio.Future[ResultT]) -> ResultT:
        """Wait for a result.

        Raises:
            ClientDisconnect: If the client has gone.
            BusyError: If it takes too long.
        """
        waiting: set[asyncio.Future[object]] = {future, self._gone}  # type: ignore[arg-type]
        await asyncio.wait(waiting, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
        if future.done() and not future.cancelled():
            return future.result()
        if self._gone.done():
            raise ClientDisconnect
        if future.cancelled():
            raise too_busy("stopping", "the server gave the rows up, as it is stopping", 1)
        raise _no_answer(self._seconds)

    def cancels(self, ticket: Ticket) -> None:
        """Let a ticket be cancelled when the client has gone."""
        self._gone.add_done_callback(lambda _: ticket.cancel())

    def close(self) -> None:
        """Watch no longer."""
        self._gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def client_of(request: Request, services: Services) -> AsyncIterator[Client]:
    """Watch the connection of a request while it is answered."""
    client = Client(request, services.settings.request_seconds)
    try:
        yield client
    finally:
        client.close()


async def require_answerable(services: Services, version: VersionRecord) -> VersionRecord:
    """Return a version as it is now; one that is not ready is compiled before all others once rows wait for it.

    Raises:
        UserError: If it failed, or is gone.
        BusyError: If it is not ready and the server ends.
    """
    if version.state == "ready" and version.model == services.service.model:
        return version
    if version.state != "ready":
        services.require_running()
    return await quickly(services.service.require_ready_or_compiling, version.key)


def require_all_rows(question: Question) -> None:
    """Refuse a request if any of its rows cannot be rendered.

    Raises:
        UserError: If so; it names all such rows.
    """
    require_all([row for row in question.rows if isinstance(row, UserError)], len(question.rows))


def require_all_answers(question: Question, predictions: Sequence[Prediction]) -> None:
    """Refuse a request if any of its rows could not be answered.

    Raises:
        UserError: If so; it names all such rows.
    """
    numbered = zip(question.numbers, predictions, strict=True)
    require_all([one.problem.at(row=number) for number, one in numbered if one.problem is not None], len(predictions))


async def answers(services: Services, client: Client, question: Question) -> AsyncIterator[Prediction]:
    """Yield the predictions of the rows in order; what no one waits for any more leaves the queue.

    Raises:
        UserError: If the rows cannot be answered at all.
        BusyError: If too many rows wait.
        ClientDisconnect: If the client has gone.
    """
    rows = question.rows
    portions = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    tickets: list[Ticket] = [await _ticket(services, question, portions[0])]
    try:
        for number in range(len(portions)):
            if number + 1 < len(portions):
                tickets.append(await _ticket(services, question, portions[number + 1], number + 1))
            ticket = tickets.pop(0)
            try:
                predictions = await client.wait_for(asyncio.wrap_future(ticket.future))
            except UserError as error:
                await _explain(services, question.version.key, error)
                raise
            finally:
                ticket.cancel()  # of no effect once it is done
            services.metrics.count_rows(len(predictions))
            for prediction in predictions:
                yield prediction
    finally:
        for ticket in tickets:
            ticket.cancel()


async def _ticket(
    services: Services,
    question: Question,
    rows: Sequence[Query | UserError],
    number: int = 0,
) -> Ticket:
    """Hand a portion to the worker; one after the first waits where the queue is full, as the answer has started.

    Raises:
        BusyError: If the queue is full.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + services.settings.request_seconds
    first_number = number * ROWS_AT_ONCE + 1
    while True:
        try:
            return services.worker.predict(
                question.version.key,
                rows,
                question.how.options,
                question.how.num_retrieved,
                first_number=first_number,
            )
        except UserError as error:
            if error.code != "queue_full":
                raise
            if number == 0 or loop.time() > end:
                raise queue_full(error, services.worker.state()) from error
        await asyncio.sleep(SECONDS_BETWEEN_TRIES)


async def parts_of(request: Request, services: Services, question: Question) -> AsyncIterator[AnswerPart]:
    """Yield the parts of one free answer as it is written; the last one has the prediction.

    Args:
        request: The request, whose client may go meanwhile.
        services: Parts of the server.
        question: One row.

    Raises:
        UserError: If the row cannot be answered.
        BusyError: If too many rows wait.
        ClientDisconnect: If the client has gone.
    """
    (row,), how = question.rows, question.how
    try:
        ticket = services.worker.stream(question.version.key, row, how.options, how.num_retrieved)
    except UserError as error:
        raise queue_full(error, services.worker.state()) if error.code == "queue_full" else error from error
    async with client_of(request, services) as client:
        client.cancels(ticket)
        try:
            async for part in _in_time(ticket, services.settings.request_seconds):
                if part.prediction is not None:
                    services.metrics.count_rows(1)
                    if part.prediction.problem is not None:
                        raise part.prediction.problem
                yield part
        except CancelledError as error:
            raise ClientDisconnect from error
        except UserError as error:
            await _explain(services, question.version.key, error)
            raise
        finally:
            ticket.cancel()


async def _in_time(ticket: StreamTicket, seconds: float) -> AsyncIterator[AnswerPart]:
    """Yield the parts of an answer.

    Raises:
        BusyError: If the next one takes too long.
    """
    parts = aiter(ticket)
    while True:
        try:
            async with asyncio.timeout(seconds):
                part = await anext(parts, None)
        except TimeoutError as error:
            raise _no_answer(seconds) from error
        if part is None:
            return
        yield part


def _no_answer(seconds: float) -> BusyError:
    return too_busy("not_ready", f"there was no answer within {seconds:g} seconds", 5, "Try again later.")


async def _explain(services: Services, key: VersionKey, error: UserError) -> None:
    """Find out whether the state of the version is why its rows were not answered; if not, the error says enough.

    Raises:
        UserError: If the version failed, or is gone.
        BusyError: If it is not compiled yet.
    """
    if isinstance(error, BusyError) and error.code != "not_ready":
        return
    version = await quickly(services.service.require_ready_or_compiling, key)
    if error.code == "not_ready" and version.state != "ready":
        what = f"the task is not compiled yet; {error.what}"
        raise too_busy("not_ready", what, 5, "Read the task until its `state` is ready, and try again.") from error


async def started(parts: AsyncIterator[bytes], as_part: Callable[[UserError], bytes]) -> AsyncIterator[bytes]:
    """Wait for the first part of a stream, so that what fails before it has a status of its own.

    Args:
        parts: The stream.
        as_part: Writes what fails after the first part, as the last one.

    Raises:
        UserError: If it fails before the first part.
    """
    first = await anext(parts, None)

    async def all_parts() -> AsyncIterator[bytes]:
        if first is None:
            return
        yield first
        try:
            async for part in parts:
                yield part
        except UserError as error:
            yield as_part(error)

    return all_parts()


def queue_full(error: UserError, state: WorkerState) -> BusyError:
    """Say when there will be room, from how long the waiting rows will take."""
    busy = too_busy("queue_full", error.what, max(1.0, state.num_waiting_rows * state.seconds_per_row), error.remedy)
    busy.expected, busy.found = error.expected, error.found
    return busy
