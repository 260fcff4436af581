"""Starts the processes of a run on a CPU, waits for them, and leaves none alive; imports no torch itself.

The process of the command computes nothing: it passes signals on, returns what the first process returns, and raises
what the process raises that failed first, not what others raise because it is gone. ``torchrun`` would do less: it ends
processes 30 seconds after Ctrl-C, though a step and its checkpoint may take longer, ends with 1 whatever happened, and
listens on all network interfaces.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar, cast

from manyicl.errors import MachineError
from manyicl.printing import new_console
from manyicl.training.processes import SECONDS_WAITED, end_processes, is_consequence, loopback_interface
from manyicl.training.stopping import SECONDS_OF_ONE_REQUEST, taking_signals

Outcome = TypeVar("Outcome")

# A terminal sends these to all processes of a command. The one that started them alone takes them.
OF_THE_TERMINAL = frozenset(getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name))
# One that is killed is missed by another, which fails as well: for so long the true cause is awaited.
SECONDS_FOR_THE_CAUSE = 1.0
SECONDS_TO_END = 10.0


class ProcessLostError(MachineError):
    """A process of a run ended without a word, as one that the system kills."""


class _Report(NamedTuple):
    """What a process sends when its job is done, before it leaves the others.

    Attributes:
        outcome: What the job returned.
        error: What it raised instead; KeyboardInterrupt where it was ended at once.
        is_consequence: Whether it was raised only because another process had failed.
        sent_at: Seconds on the clock that all processes of a machine share.
    """

    outcome: Any
    error: BaseException | None
    is_consequence: bool
    sent_at: float


class _Loss(NamedTuple):
    """What is noted of a process that ended without a report.

    Attributes:
        noticed_at: Seconds on the same clock.
    """

    noticed_at: float


class _Meeting(NamedTuple):
    """How the processes of a run find each other.

    Attributes:
        file: File that does not exist yet, in a folder of the run's own.
        interface: Network interface of the loopback address.
        num_processes: How many there are.
        num_threads: CPU threads of each.
    """

    file: Path
    interface: str
    num_processes: int
    num_threads: int


class _Member(NamedTuple):
    process: SpawnProcess
    receiver: Connection


def in_processes(job: Callable[[], Outcome], num_processes: int, num_threads: int) -> Outcome:
    """Run a job in several new processes that form a gloo group over the loopback interface.

    The first Ctrl-C or SIGTERM is passed on as SIGTERM; a later one ends everything at once.

    Args:
        job: Called in each of them; must pickle, and what it returns as well.
        num_processes: Number of processes.
        num_threads: CPU threads of each.

    Returns:
        What it returned in the first process.

    Raises:
        ProcessLostError: If a process ended without a word.
        KeyboardInterrupt: If they were ended at once.
        Exception: What a process raised; of several, the first that raised it of its own accord.
    """
    # They meet in a file of their own, so that no port is taken and two runs never meet.
    interface = loopback_interface()
    with tempfile.TemporaryDirectory(prefix="manyicl-") as folder:
        meeting = _Meeting(Path(folder) / "processes", interface, num_processes, num_threads)
        with _started(job, meeting) as members:
            requests = _Requests(members)
            with taking_signals(requests):
                reports = _reports(members)
            return cast(Outcome, _outcome(members, reports, is_stopping=requests.first_at is not None))


class _Requests:
    """Passes on to the processes what a user asks of the command by signals."""

    def __init__(self, members: Sequence[_Member]) -> None:
        self._members = members
        self.first_at: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first_at is None:
            self.first_at = now
            for member in self._members:
                member.process.terminate()
        elif now - self.first_at > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt


@contextmanager
def _started(job: Callable[[], object], meeting: _Meeting) -> Iterator[list[_Member]]:
    """Start the processes, and kill those that are still there at the end."""
    context = multiprocessing.get_context("spawn")
    members: list[_Member] = []
    # Otherwise the first start would begin it, and unblock the signals.
    resource_tracker.ensure_running()
    # A process inherits what is blocked, from its very first instruction.
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_TERMINAL)
    try:
        for rank in range(meeting.num_processes):
            receiver, sender = context.Pipe(duplex=False)
            # As a daemon it ends with this process even if it is not among the members yet.
            process = context.Process(target=_run, args=(job, rank, meeting, sender), daemon=True)
            process.start()
            members.append(_Member(process, receiver))
            sender.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        yield members
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        _end(members)


def _end(members: Sequence[_Member]) -> None:
    for process, _ in members:
        process.kill()  # which does nothing where it has ended
    for process, receiver in members:
        process.join()
        receiver.close()
    console = new_console(stderr=True)
    if console.is_terminal and any(process.exitcode for process, _ in members):
        # A progress bar that was cut off has hidden it.
        console.show_cursor()
        console.line()


def _reports(members: Sequence[_Member]) -> dict[int, _Report | _Loss]:
    """Wait for all processes, or until one fails and the others had a moment to say what they saw of it."""
    reports: dict[int, _Report | _Loss] = {}
    deadline: float | None = None
    while len(reports) < len(members) and (deadline is None or time.monotonic() < deadline):
        waiting = {member.receiver: rank for rank, member in enumerate(members) if rank not in reports}
        timeout = None if deadline is None else deadline - time.monotonic()
        for receiver in connection.wait(list(waiting), timeout):
            rank = waiting[cast(Connection, receiver)]
            report: _Report | _Loss
            try:
                report = cast(Connection, receiver).recv()
            except (EOFError, OSError):  # the second where it was killed in the middle of its report
                report = _Loss(time.monotonic())
            reports[rank] = report
            if (isinstance(report, _Loss) or report.error is not None) and deadline is None:
                deadline = time.monotonic() + SECONDS_FOR_THE_CAUSE
    if deadline is None:
        for member in members:
            member.process.join(SECONDS_TO_END)
    return reports


def _outcome(members: Sequence[_Member], reports: dict[int, _Report | _Loss], *, is_stopping: bool) -> object:
    """Return what the first process returned, or raise why the run failed."""
    failed = [each for each in reports.values() if isinstance(each, _Report) and each.error is not None]
    lost = {rank: each.noticed_at for rank, each in reports.items() if isinstance(each, _Loss)}
    for rank in lost:
        members[rank].process.join(SECONDS_TO_END)
    exit_codes = {rank: members[rank].process.exitcode for rank in lost}
    if any(isinstance(report.error, KeyboardInterrupt) for report in failed) or (
        # Before a process takes signals itself, one ends it.
        is_stopping and -signal.SIGTERM in exit_codes.values()
    ):
        raise KeyboardInterrupt
    causes = {report.sent_at: report.error for report in failed if not report.is_consequence}
    if lost:
        # No process kills itself because another one is gone, though it may abort.
        rank = min(lost, key=lambda each: (exit_codes[each] != -signal.SIGKILL, lost[each]))
        ending = f"One of the {len(members)} processes of the run {_end_of(exit_codes[rank])}."
        causes[lost[rank]] = ProcessLostError(ending)
    causes = causes or {report.sent_at: report.error for report in failed}
    if causes:
        error = causes[min(causes)]
        assert error is not None
        raise error
    first = reports[0]
    assert isinstance(first, _Report)
    return first.outcome


def _end_of(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended by itself with status {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _run(job: Callable[[], object], rank: int, meeting: _Meeting, sender: Connection) -> None:
    """Do the job in a new process and report what became of it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_TERMINAL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if rank > 0:
        warnings.simplefilter("ignore")
    # What this process leaves in it goes when the run ends, even if this process is killed.
    tempfile.tempdir = str(meeting.file.parent)
    # torch reads some of it when it is imported, accelerate the rest.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(meeting.num_processes),
        "LOCAL_WORLD_SIZE": str(meeting.num_processes),
        "OMP_NUM_THREADS": str(meeting.num_threads),
        "GLOO_SOCKET_IFNAME": meeting.interface,
    }
    outcome: object = None
    error: BaseException | None = None
    try:
        with taking_signals(signal.default_int_handler):
            _form_group(rank, meeting)
            outcome = job()
    except KeyboardInterrupt:
        error = KeyboardInterrupt()
    except Exception as failure:
        error = failure
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sender.send_bytes(_pickled(outcome, error))
    sender.close()
    if error is None:
        end_processes()
    else:
        # Others may wait for this process; no library is to wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _form_group(rank: int, meeting: _Meeting) -> None:
    """Let the processes find each other through a file: no port is chosen."""
    import torch

    # The job may have imported torch before the environment said how many.
    torch.set_num_threads(meeting.num_threads)
    torch.distributed.init_process_group(
        "gloo",
        store=cast(Any, torch.distributed).FileStore(str(meeting.file), meeting.num_processes),
        rank=rank,
        world_size=meeting.num_processes,
        timeout=timedelta(seconds=SECONDS_WAITED),
    )


def _pickled(outcome: object, error: BaseException | None) -> bytes:
    """Write a report; an error that does not pickle becomes one that says the same."""
    sent_at = time.monotonic()
    if error is None:
        return pickle.dumps(_Report(outcome, None, False, sent_at))
    # Its causes do not pickle.
    report = _Report(None, error, is_consequence(error), sent_at)
    note = "".join(traceback.format_exception(error))
    error.add_note(note)
    try:
        written = pickle.dumps(report)
        pickle.loads(written)
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
        error.add_note(note)
        written = pickle.dumps(report._replace(error=error))
    return written


def _end_with_parent() -> None:
    """End this process once the one that started it has ended, however that happened."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
