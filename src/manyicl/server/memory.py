"""How the process of a server takes memory from the system."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

MOST_ARENAS = 2
_M_ARENA_MAX = -8


def share_arenas() -> None:
    """Let all threads of this process share two arenas of the allocator, where it is that of glibc.

    By default each thread has an arena of its own, up to eight for each core, which keeps what it needed once, so that
    the memory of a server with many threads grows for hours. Call it before threads start.

    Source: `mallopt(3)`, ``M_ARENA_MAX``.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library has no such function
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, MOST_ARENAS)
