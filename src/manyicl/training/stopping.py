"""The signals that stop a run."""

from __future__ import annotations

import signal


def stopping_signals() -> list[int]:
    """List what stops a run: Ctrl-C, a polite kill, and a closed terminal unless it was told not to matter (nohup)."""
    stopping: list[int] = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        stopping.append(hang_up)
    return stopping
