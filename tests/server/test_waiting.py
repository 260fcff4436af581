"""Rows wait in groups; turns follow the oldest row; a large ticket keeps nobody waiting for longer than a pass."""

from __future__ import annotations

import random

from manyicl.server.records import VersionKey
from manyicl.server.waiting import Group, Portion, WaitingRows

A, B, C = (Group(VersionKey(f"tsk_{name}", 1)) for name in "abc")


def test_the_group_whose_oldest_row_has_waited_longest_comes_first() -> None:
    waiting: WaitingRows[str] = WaitingRows()
    assert waiting.oldest() is None
    for now, (group, ticket) in enumerate([(B, "one"), (A, "two"), (B, "three"), (C, "four")]):
        waiting.add(group, ticket, 1, now)
    assert waiting.groups(until=9) == [B, A, C]
    assert waiting.groups(until=1) == [B, A]
    assert waiting.oldest() == 0
    assert waiting.take(B, 10, 10) == [Portion("one", 0, 1), Portion("three", 0, 1)]
    assert waiting.groups(until=9) == [A, C]
    assert waiting.num_rows == 2


def test_other_options_are_another_group() -> None:
    waiting: WaitingRows[str] = WaitingRows()
    waiting.add(A, "one", 1, 0)
    waiting.add(A._replace(options=(("scores", "all"),)), "two", 1, 1)
    waiting.add(A._replace(num_retrieved=4), "three", 1, 2)
    waiting.add(A._replace(version=VersionKey("tsk_a", 2)), "four", 1, 3)
    assert [waiting.take(group, 9, 9) for group in waiting.groups(9)] == [
        [Portion(ticket, 0, 1)] for ticket in ("one", "two", "three", "four")
    ]


def test_a_ticket_of_many_rows_waits_anew_after_each_pass_and_for_the_end_of_it() -> None:
    waiting: WaitingRows[str] = WaitingRows()
    waiting.add(A, "large", 25, 0)
    waiting.add(A, "small", 1, 1)
    waiting.add(B, "other", 1, 2)
    assert waiting.take(A, 10, 10) == [Portion("large", 0, 10)]
    assert waiting.take(A, 10, 10) == [Portion("small", 0, 1)]
    assert waiting.take(A, 10, 10) == []
    assert waiting.num_rows == 16
    waiting.give_back("small", 3)
    waiting.give_back("large", 3)
    assert waiting.groups(until=9) == [B, A]
    assert waiting.groups(until=2) == [B]
    waiting.add(A, "late", 1, 4)
    assert waiting.take(A, 12, 12) == [Portion("large", 10, 22)]
    waiting.give_back("large", 5)
    assert waiting.take(A, 12, 12) == [Portion("late", 0, 1), Portion("large", 22, 25)]
    waiting.give_back("large", 6)
    waiting.give_back("late", 6)
    assert waiting.tickets() == ["other"]


def test_a_ticket_that_is_removed_is_gone_wherever_it_is() -> None:
    waiting: WaitingRows[str] = WaitingRows()
    waiting.add(A, "one", 5, 0)
    waiting.add(A, "two", 5, 1)
    waiting.add(B, "three", 5, 2)
    assert waiting.take(A, 2, 2) == [Portion("one", 0, 2)]
    waiting.remove("one")
    waiting.give_back("one", 3)
    waiting.remove("two")
    waiting.remove("two")
    assert waiting.groups(9) == [B]
    assert waiting.num_rows == 5
    assert waiting.tickets(version=A.version) == waiting.tickets(task_id="tsk_a") == []
    assert waiting.tickets(task_id="tsk_b") == ["three"]


def test_every_row_is_taken_once_in_any_order_of_events() -> None:
    for seed in range(30):
        draw = random.Random(seed)
        waiting: WaitingRows[int] = WaitingRows()
        sizes: dict[int, int] = {}
        taken: dict[int, list[int]] = {}
        out: list[int] = []
        removed: set[int] = set()
        for now in range(200):
            event = draw.random()
            if event < 0.3 and now < 150:
                sizes[now] = draw.randint(1, 20)
                taken[now] = []
                waiting.add(draw.choice([A, B, C]), now, sizes[now], now)
            elif event < 0.6 and (groups := waiting.groups(now)):
                most = draw.randint(1, 12)
                portions = waiting.take(groups[0], most, most)
                assert 0 < sum(end - start for _, start, end in portions) <= most
                for ticket, start, end in portions:
                    taken[ticket] += range(start, end)
                    out.append(ticket)
            elif event < 0.65 and sizes:
                removed.add(ticket := draw.choice(list(sizes)))
                waiting.remove(ticket)
            elif out:
                waiting.give_back(out.pop(draw.randrange(len(out))), now)
            left = sum(sizes[one] - len(taken[one]) for one in sizes if one not in removed)
            assert waiting.num_rows == left
        while out or waiting.groups(999):
            for ticket in out:
                waiting.give_back(ticket, 500)
            out = []
            for group in waiting.groups(999):
                for ticket, start, end in waiting.take(group, 7, 7):
                    taken[ticket] += range(start, end)
                    out.append(ticket)
        assert all(taken[one] == list(range(sizes[one])) for one in sizes if one not in removed)
        assert waiting.num_rows == 0
        assert waiting.tickets() == []


def test_a_large_ticket_leaves_room_for_the_small_ones_behind_it() -> None:
    waiting: WaitingRows[str] = WaitingRows()
    waiting.add(A, "large", 100, 1)
    waiting.add(A, "one", 1, 2)
    waiting.add(A, "two", 1, 3)
    assert waiting.take(A, 10, 8) == [Portion("large", 0, 8), Portion("one", 0, 1), Portion("two", 0, 1)]
