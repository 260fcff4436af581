"""Send requests to a task server: tried again while it is away or busy, its problem documents as errors."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from manyicl.errors import MachineError, UserError, quoted
from manyicl.library_errors import reason
from manyicl.served import parsed, refusal_of

if TYPE_CHECKING:
    import httpx

# Too many requests, a full queue, a server that starts or stops, and a proxy that does not reach it.
TRIED_AGAIN = frozenset({429, 502, 503, 504})
# Those after which it is certain that the server has done nothing, unless its machine failed.
NOTHING_DONE = frozenset({429, 503})
MACHINE_FAILED = "machine_failed"
CONNECT_SECONDS = 10.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
FIRST_WAIT_SECONDS = 0.25
MOST_WAIT_SECONDS = 8.0


class Requests:
    """Requests to one server with one key. Threads may share it."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        *,
        timeout: float,
        retry_seconds: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take the address and the key, and connect to nothing yet.

        Args:
            url: Address of the server, as in ``http://127.0.0.1:8000``.
            api_key: Key to send; None for none.
            timeout: Longest wait for an answer, in seconds.
            retry_seconds: How long a request is tried again, in seconds, while the server is away or busy.
            sleep: Replacement of ``time.sleep``.

        Raises:
            UserError: If the address or the key cannot be one, or httpx is not installed.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            expected = "an address such as http://127.0.0.1:8000"
            raise UserError("bad_url", "this is no address of a server", expected=expected, found=quoted(url))
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
            raise UserError("bad_key", "this is no API key", expected="mk_… as `manyicl keys create` printed it")
        try:
            import httpx
        except ModuleNotFoundError as error:
            remedy = "pip install 'manyicl[client]' brings it."
            raise UserError("missing_library", "a client needs httpx, which is not installed", remedy=remedy) from error
        self.url, self.retry_seconds, self._sleep = url.rstrip("/"), retry_seconds, sleep
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx.Timeout(timeout, connect=CONNECT_SECONDS)
        # A key is never sent to where a server redirects, nor to a proxy on the way to this very machine.
        own_machine = parts.hostname in LOOPBACK
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=limits, follow_redirects=False, trust_env=not own_machine
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, method: str, path: str, *, repeatable: bool = True, **request: Any) -> httpx.Response:
        """Send a request and return its answer, read whole.

        Args:
            method: Method.
            path: Path of the route.
            repeatable: Whether it may be sent again where nobody knows whether it was carried out.
            **request: Arguments of `httpx.Client.request`.

        Raises:
            UserError: If the server refuses it, as `RefusedRequestError`.
            MachineError: If the server cannot be reached, fails or does not answer in time.
        """
        return self._answered(method, path, repeatable, request, whole=True)

    @contextmanager
    def stream(self, method: str, path: str, *, repeatable: bool = True, **request: Any) -> Iterator[httpx.Response]:
        """Send a request, and give its answer to be read while it comes; arguments and errors are those of `send`.

        It is tried again only up to where an answer begins.
        """
        response = self._answered(method, path, repeatable, request, whole=False)
        try:
            yield response
        finally:
            response.close()

    def lines(self, response: httpx.Response) -> Iterator[str]:
        """Yield the lines of an answer as they come.

        Raises:
            MachineError: If it breaks off.
        """
        import httpx

        rest = ""
        try:
            for text in response.iter_text():
                # Not `iter_lines`: it cuts at U+2028 and others, which a text may hold.
                *lines, rest = (rest + text).split("\n")
                yield from (line.removesuffix("\r") for line in lines)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if rest:
            yield rest

    def _answered(
        self, method: str, path: str, repeatable: bool, request: dict[str, Any], *, whole: bool
    ) -> httpx.Response:
        """Send a request until it is answered by something other than "try again", or time is up."""
        import httpx

        give_up, wait = time.monotonic() + self.retry_seconds, FIRST_WAIT_SECONDS
        while True:
            wished: float | None = None
            try:
                response = self._http.send(self._http.build_request(method, path, **request), stream=not whole)
            except httpx.TransportError as error:
                failure: Exception = self._unreachable(error)
                may_repeat = repeatable and not isinstance(error, httpx.TimeoutException)
                again = may_repeat or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            else:
                if response.is_success:
                    return response
                failure = self._failure(response)
                wished = _retry_after(response)
                is_safe = response.status_code in NOTHING_DONE and not _may_be_done(response)
                again = response.status_code in TRIED_AGAIN if repeatable else is_safe
            # Not all clients at the same moment.
            pause = wished if wished is not None else wait * random.uniform(0.5, 1)
            if not again or time.monotonic() + pause > give_up:
                raise failure
            self._sleep(pause)
            wait = min(2 * wait, MOST_WAIT_SECONDS)

    def _failure(self, response: httpx.Response) -> UserError | MachineError:
        """Read an answer that is no success, and make the error of it."""
        import httpx

        try:
            response.read()
        except httpx.TransportError as error:
            return self._unreachable(error)
        status = response.status_code
        if response.is_redirect:
            what, found = f"the server {self.url} redirects", quoted(response.headers.get("location"))
            return UserError("redirected", what, found=found, remedy="Give the address of the server itself.")
        try:
            problem = parsed(response.text)
        except MachineError:
            problem = None
        if not isinstance(problem, Mapping):
            problem = {"detail": f"The server {self.url} answered with status {status}"}
        refusal = refusal_of(status, problem)
        if status >= 500:
            request_id = "" if refusal.request_id is None else f" Its log names the request {refusal.request_id}."
            return MachineError(f"{refusal}{request_id}")
        return refusal

    def _unreachable(self, error: httpx.TransportError) -> MachineError:
        """Make the error of a connection that failed."""
        import httpx

        why = f"broke off, {reason(error)}"
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            why = f"cannot be reached, {reason(error)}"
        elif isinstance(error, httpx.TimeoutException):
            why = "took longer to answer than the timeout"
        return MachineError(f"The server {self.url} {why}.")


def _may_be_done(response: httpx.Response) -> bool:
    """Tell whether a server whose machine failed may have carried out the request, such as in a commit."""
    import httpx

    try:
        problem = parsed(response.text)
    except httpx.ResponseNotRead:
        return True
    except MachineError:
        return False
    return isinstance(problem, Mapping) and problem.get("code") == MACHINE_FAILED


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds after which the server wishes to be tried again, if it says so."""
    written = response.headers.get("retry-after", "")
    return float(written) if written.isdecimal() else None
