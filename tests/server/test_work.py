"""Tickets: all answers in order, one error, cancelled; parts of an answer in threads and coroutines."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import CancelledError
from contextlib import nullcontext

import pytest

from manyicl.engine.prediction import AnswerPart, Prediction
from manyicl.errors import UserError
from manyicl.server.work import StreamTicket, Ticket

PARTS = [AnswerPart(1, "a"), AnswerPart(1, " red"), AnswerPart(1, " box", Prediction("a red box", -1.0))]


def bad() -> Prediction:
    return Prediction("", math.nan, problem=UserError("empty_query", "it is empty"))


def test_answers_come_in_the_order_of_the_rows() -> None:
    ticket = Ticket(["one", "two", "three"])
    for position in (2, 0):
        ticket.put(position, Prediction(str(position), -1.0))
        assert ticket.is_open
    ticket.put(0, Prediction("0", -2.0))
    assert ticket.is_open
    ticket.put(1, Prediction("1", -1.0))
    assert [one.answer for one in ticket.future.result(0)] == ["0", "1", "2"]


@pytest.mark.parametrize("reports", [True, False])
def test_a_bad_row_is_reported_or_fails_the_ticket_with_its_number(reports: bool) -> None:
    ticket = Ticket(["one", "", ""], reports, first_number=101)
    ticket.put(0, Prediction("good", -1.0))
    ticket.put(1, bad())
    ticket.put(2, bad())
    if reports:
        assert [one.problem is None for one in ticket.future.result(0)] == [True, False, False]
    else:
        with pytest.raises(UserError) as caught:
            ticket.future.result(0)
        assert (caught.value.code, caught.value.row) == ("empty_query", 102)


def test_what_comes_after_the_end_is_ignored() -> None:
    ticket = Ticket(["one"])
    ticket.cancel()
    assert not ticket.is_open
    ticket.put(0, Prediction("good", -1.0))
    ticket.fail(ValueError())
    with pytest.raises(CancelledError):
        ticket.future.result(0)


def in_time(ticket: StreamTicket, how_it_ends: str) -> threading.Thread:
    """Hand in the parts from another thread."""

    def hand_in() -> None:
        for part in PARTS[: 3 if how_it_ends == "whole" else 2]:
            threading.Event().wait(0.01)
            ticket.put_part(part)
        if how_it_ends == "cancelled":
            ticket.cancel()
        elif how_it_ends == "failed":
            ticket.fail(UserError("queue_full", "it is full"))
        else:
            ticket.put(0, Prediction("a red box", -1.0))

    thread = threading.Thread(target=hand_in)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("how_it_ends", "error"), [("whole", None), ("cancelled", CancelledError), ("failed", UserError)]
)
@pytest.mark.parametrize("is_async", [False, True])
def test_parts_are_waited_for_in_threads_and_coroutines(
    how_it_ends: str, error: type[Exception] | None, is_async: bool
) -> None:
    found: list[AnswerPart] = []

    async def gather() -> None:
        async for part in ticket:
            found.append(part)

    def listen() -> None:
        for part in ticket:
            found.append(part)

    ticket = StreamTicket(["row"])
    thread = in_time(ticket, how_it_ends)
    with pytest.raises(error) if error else nullcontext():
        asyncio.run(gather()) if is_async else listen()
    thread.join()
    assert found == PARTS[: 2 if error else 3]
    # Who comes late gets all at once.
    if error is None:
        assert list(ticket) == PARTS


def test_many_listeners_get_all_parts() -> None:
    ticket = StreamTicket(["row"])
    found: dict[int, list[AnswerPart]] = {}

    def listen(number: int) -> None:
        found[number] = list(ticket)

    listeners = [threading.Thread(target=listen, args=(number,)) for number in range(5)]
    for listener in listeners:
        listener.start()
    in_time(ticket, "whole").join()
    for listener in listeners:
        listener.join()
    assert found == dict.fromkeys(range(5), PARTS)
