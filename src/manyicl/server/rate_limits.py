"""Limits on the requests and rows of a caller in a minute."""

from __future__ import annotations

import time
from collections.abc import Mapping

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from manyicl.errors import pluralized
from manyicl.server.problems import BusyError, too_busy
from manyicl.server.records import Caller


class RateLimits:
    """Counts the requests and rows of each caller over the last minute.

    The window slides between two counters, so that a caller takes as little memory at a thousand requests a second as
    at one; a list of all times, the exact window, would take megabytes.
    """

    def __init__(self, requests_per_minute: int | None, rows_per_minute: int | None) -> None:
        """Take the limits of callers whose keys have none of their own; None for no limit."""
        self._requests_per_minute = requests_per_minute
        self._rows_per_minute = rows_per_minute
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def count_request(self, caller: Caller) -> Mapping[str, str]:
        """Count a request.

        Returns:
            Headers that say how many are left; none without a limit.

        Raises:
            BusyError: If there were too many.
        """
        most = caller.requests_per_minute or self._requests_per_minute
        return {} if most is None else self._count(caller, "request", most, 1)

    def count_rows(self, caller: Caller, number: int) -> None:
        """Count rows to predict.

        Raises:
            BusyError: If there were too many.
        """
        most = caller.rows_per_minute or self._rows_per_minute
        if most is not None:
            self._count(caller, "row", most, number)

    def _count(self, caller: Caller, what: str, most: int, number: int) -> Mapping[str, str]:
        limit, identity = RateLimitItemPerMinute(most), (what, caller.owner, caller.key_id or "")
        is_allowed = self._limiter.hit(limit, *identity, cost=number)
        reset_time, remaining = self._limiter.get_window_stats(limit, *identity)
        seconds = max(1, round(reset_time - time.time()))
        if not is_allowed:
            raise _too_many(what, most, number, seconds)
        return {
            "RateLimit-Limit": str(most),
            "RateLimit-Remaining": str(max(0, remaining)),
            "RateLimit-Reset": str(seconds),
        }


def _too_many(what: str, most: int, number: int, seconds: int) -> BusyError:
    sentence = f"this key is allowed {pluralized(most, what)} a minute"
    remedy = f"Send at most {most:,} at once." if number > most else f"Try again in {pluralized(seconds, 'second')}."
    return too_busy("too_many_requests", sentence, seconds, remedy)
