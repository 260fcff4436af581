"""Connections on which no request comes, or no answer is read, are closed, so that they do not keep others out."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

# A client has this long to send the headers of a request; for its body, see `manyicl.server.middleware.BodyLimit`.
HEADER_SECONDS = 30.0
# A client that reads nothing of its answer for so long, where more is to be sent, is taken to have gone.
READ_SECONDS = 60.0


class Connection(H11Protocol):
    """Ends where nothing moves: uvicorn waits forever for headers that began, bodies it refused, and slow readers."""

    _unread: asyncio.TimerHandle | None = None
    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # the newest request, None before the first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch."""
        super().connection_made(transport)
        self._look_later((None, 0))

    def _look_later(self, before: tuple[RequestResponseCycle | None, int] | None) -> None:
        self.loop.call_later(HEADER_SECONDS, self._look, before)

    def _look(self, before: tuple[RequestResponseCycle | None, int] | None) -> None:
        """Close the connection if nothing was answered, and nothing of the last answer was read, since ``before``."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._look_later(None)
            return
        now = (self.cycle, self.transport.get_write_buffer_size())
        if now == before:
            self.transport.abort()
        else:
            self._look_later(now)

    def pause_writing(self) -> None:
        """Begin to wait until the client has read some of its answer."""
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Note that it has."""
        self._stop_waiting()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
