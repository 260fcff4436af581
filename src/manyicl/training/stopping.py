"""The signals that stop a run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Under a launcher one Ctrl-C arrives twice: from the terminal, and handed on by the launcher.
SECONDS_OF_ONE_REQUEST = 2.0


def stopping_signals() -> list[int]:
    """List the signals that stop a run: Ctrl-C, SIGTERM, and a closed terminal unless that is ignored (nohup)."""
    stopping: list[int] = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        stopping.append(hang_up)
    return stopping


@contextmanager
def taking_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let a function take the signals that stop a run while the block runs; outside the main thread, it takes none."""
    try:
        previous = {number: signal.signal(number, handler) for number in stopping_signals()}
    except ValueError:
        previous = {}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
