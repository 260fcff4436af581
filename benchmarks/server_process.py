"""What the benchmarks of the task server share: a server of their own, made-up tasks, and how times are written."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

PROGRAM = "import sys; from manyicl.cli.main import main; sys.exit(main())"
START_SECONDS, STOP_SECONDS = 600.0, 60.0
# Words that every model here knows, those of the tiny one among them.
THINGS = {
    "animal": ("fox", "goat", "hen", "horse", "mouse", "sheep", "wolf", "bear", "frog", "duck"),
    "food": ("bread", "cake", "cheese", "honey", "milk", "rice", "soup", "pear", "plum", "corn"),
    "object": ("lamp", "key", "pen", "ring", "clock", "chair", "bag", "knife", "spoon", "box"),
    "place": ("oslo", "paris", "rome", "berlin", "cairo", "lima", "riga", "prague", "dublin", "madrid"),
}
LABELS = tuple(THINGS)
NAMES = ("anna", "ben", "carl", "dora", "emil", "fay", "gus", "hanna", "ivan", "jill", "lena", "max", "nina", "otto")
VERBS = ("saw", "found", "likes", "hates", "lost", "painted")
COLOURS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey", "yellow", "purple", "orange", "golden")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

Pair = tuple[str, str]


def make_pair(rng: random.Random) -> Pair:
    """Make a query and its answer: what kind of thing somebody saw."""
    label = rng.choice(LABELS)
    thing = rng.choice(THINGS[label])
    words = (rng.choice(NAMES), rng.choice(VERBS), "the", rng.choice(COLOURS), thing, "on", rng.choice(DAYS))
    return " ".join(words), label


def make_pairs(seed: int, num_pairs: int) -> list[Pair]:
    """Make queries and answers; the first ones have all labels."""
    rng = random.Random(seed)
    found = {label: (f"anna saw the red {things[seed % len(things)]}", label) for label, things in THINGS.items()}
    return [*found.values(), *(make_pair(rng) for _ in range(num_pairs))][:num_pairs]


def as_rows(pairs: Iterable[Pair]) -> list[dict[str, str]]:
    return [{"query": query, "answer": answer} for query, answer in pairs]


def new_task(name: str, pairs: Iterable[Pair]) -> dict[str, Any]:
    """Return what makes a task, as the server takes it."""
    return {"name": name, "task": {"labels": list(LABELS)}, "demonstrations": as_rows(pairs)}


@dataclass
class ServerProcess:
    """A server in a process of its own, on a free port.

    Attributes:
        model: Model that answers.
        data: Its data folder.
        threads: Threads of a forward pass.
        options: Further words of its command.
        key: API key for the requests of this object; None for a server without keys.
        environment: Variables of its environment, beside those of this process.
    """

    model: str
    data: Path
    threads: int
    options: Sequence[str] = ()
    key: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    health: ClassVar[str] = "/healthz"
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        self.start()
        self.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a request."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    @property
    def log(self) -> Path:
        """File that it writes its log to."""
        return self.data.with_name(f"{self.data.name}.log")

    def start(self) -> None:
        """Start it on the port it had before, or else a free one."""
        self.port = self.port or free_port()
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), **self.environment}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=subprocess.STDOUT, env=environment)

    def command(self) -> list[str]:
        """Return the command that starts it."""
        words = ["serve", "--model", self.model, "--data", str(self.data), "--port", str(self.port), *self.options]
        return [sys.executable, "-W", "ignore", "-c", PROGRAM, *words]

    def wait(self) -> None:
        """Wait until it answers."""
        self.wait_for(self.health)

    def wait_for(self, path: str, body: Any = None) -> Any:
        """Send a request again and again until the server is there, and return the answer."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process is not None, "start comes first"
            if self.process.poll() is not None:
                raise SystemExit(f"The server ended with {self.process.returncode}:\n{self.log_tail()}")
            try:
                return self.request(path, body)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.01)
        raise SystemExit(f"The server did not start within {START_SECONDS:g} s:\n{self.log_tail()}")

    def request(self, path: str, body: Any = None) -> Any:
        """Send one request, POST with a body, GET without, and return its JSON."""
        content = None if body is None else json.dumps(body).encode()
        headers = self.headers | ({} if body is None else {"Content-Type": "application/json"})
        request = urllib.request.Request(self.url + path, content, headers)
        with urllib.request.urlopen(request, timeout=START_SECONDS) as response:
            return json.loads(response.read() or b"null")

    def wait_until_ready(self, task: str, timeout: float = 3600.0) -> dict[str, Any]:
        """Wait until the newest version of a task is compiled, and return the task."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found: dict[str, Any] = self.request(f"/v1/tasks/{task}")
            if found["state"] == "ready":
                return found
            if found["state"] == "failed":
                raise SystemExit(f"Task {task} failed: {found['problem']}")
            time.sleep(0.1)
        raise SystemExit(f"Task {task} was not compiled within {timeout:g} s.")

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        assert self.process is not None, "start comes first"
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Let it finish, and end it."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def memory_mib(self) -> dict[str, float]:
        """Return its resident memory, all of it and the part that is in no file."""
        assert self.process is not None, "start comes first"
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return {name: int(sizes[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")}

    def log_tail(self) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed; not a number for none.

    >>> percentile([3.0, 1.0, 2.0], 0.5), percentile([1.0], 0.95)
    (2.0, 1.0)
    """
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)] if values else math.nan


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Write rows as a Markdown table; all but the first column are numbers."""
    rows = list(rows)
    names = list(rows[0])
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """Describe what it was measured on."""
    import platform
    from importlib.metadata import version

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "fastapi", "uvicorn"))
    return f"Python {platform.python_version()}, {libraries}; {os.cpu_count()} cores"
