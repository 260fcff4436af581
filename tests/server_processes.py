"""Servers in processes of their own that tests can kill; the libraries are loaded once and each server is a fork."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

START_SECONDS = 120


class ServerProcess:
    """A server that is started, killed and started again at the same address.

    Attributes:
        url: Its address.
        pid: Id of the process that runs; None while there is none.
    """

    def __init__(self, launcher: subprocess.Popen[str], arguments: Sequence[str], log: Path) -> None:
        """Choose a port; nothing is started yet."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.pid: int | None = None
        self._launcher, self._log = launcher, log
        self._arguments = [*arguments, "--port", str(port)]

    def start(self, *, waits: bool = True) -> None:
        """Start it, and wait until it answers."""
        assert self.pid is None
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        self._launcher.stdin.write(json.dumps([str(self._log), self._arguments]) + "\n")
        self._launcher.stdin.flush()
        self.pid = int(self._launcher.stdout.readline())
        if waits:
            self.wait()

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/healthz", timeout=10, trust_env=False).status_code == 200:
                    return
            assert self.is_alive(), self._log.read_text(encoding="utf-8")[-3000:]
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.02)

    def is_alive(self) -> bool:
        """Whether the process runs; one that ended and was not waited for does not."""
        if self.pid is None:
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in "ZX"

    def kill(self) -> None:
        """End it at once, wherever it is."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Let it end as a service manager does."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self.pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        deadline = time.monotonic() + START_SECONDS
        while self.is_alive():
            assert time.monotonic() < deadline, "the server does not end"
            time.sleep(0.005)
        self.pid = None


@contextmanager
def server_process(data: Path, log: Path, *options: str, model: str = "builtin:nano") -> Iterator[ServerProcess]:
    """Yield a server on a data folder, which is not started yet, and kill what is left of it in the end."""
    command = [sys.executable, "-c", "from tests.server_processes import launch; launch()"]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    pipe = subprocess.PIPE
    launcher = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=root)
    server = ServerProcess(launcher, ["serve", "--model", model, "--data", str(data), *options], log)
    try:
        yield server
    finally:
        server.kill()
        launcher.communicate(timeout=60)


def launch() -> None:
    """Load the libraries of a server, then fork one for each line of standard input: a log file, and arguments."""
    import manyicl.engine.engine
    import manyicl.model.load
    import manyicl.server.app  # noqa: F401
    from manyicl.cli.main import main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        log, arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with Path(log).open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = ["manyicl", *arguments]
            code = 0
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            os._exit(code)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
