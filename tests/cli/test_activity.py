"""A long command says what it is doing: in plain lines where nobody looks at a terminal, and never after it ended."""

from __future__ import annotations

import io
import time

from rich.console import Console

from manyicl.cli.activity import Activity


def lines_of(seconds: float, *, quiet: bool = False, terminal: bool = False) -> tuple[Activity, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=terminal)
    return Activity(console, quiet=quiet, seconds=seconds), screen


def test_a_plain_line_comes_again_and_again_while_one_call_takes_long() -> None:
    activity, screen = lines_of(0.05)
    with activity:
        activity.begin("loading builtin:one")
        time.sleep(0.4)
    lines = screen.getvalue().splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("loading builtin:one; ") and line.endswith(" so far") for line in lines)
    time.sleep(0.15)
    assert screen.getvalue().splitlines() == lines, "it ended with the command"


def test_it_says_how_much_is_done_and_how_long_the_rest_takes() -> None:
    activity, _ = lines_of(60)
    activity.begin("answering", total=100)
    assert activity.line() == "answering: 0 of 100; 0 s so far"
    activity._started -= 30
    activity.advance(25, "tickets, 16 shots")
    assert activity.line() == "answering: 25 of 100, tickets, 16 shots; 30 s so far, about 1 min 30 s left"


def test_a_short_command_prints_nothing_and_a_quiet_one_never_does() -> None:
    for quiet, seconds, slept in ((False, 60, 0.0), (True, 0.02, 0.1)):
        activity, screen = lines_of(seconds, quiet=quiet)
        with activity:
            activity.begin("answering", total=2)
            time.sleep(slept)
            activity.advance()
        assert screen.getvalue() == ""


def test_a_terminal_gets_a_bar_and_no_lines() -> None:
    activity, screen = lines_of(0.02, terminal=True)
    with activity:
        activity.begin("answering", total=2)
        activity.advance(detail="[bold]tickets")
        time.sleep(0.3)
    assert "so far" not in screen.getvalue()
    assert "answering" in screen.getvalue()


def test_an_error_ends_the_lines() -> None:
    activity, screen = lines_of(0.02)
    try:
        with activity:
            raise ValueError
    except ValueError:
        pass
    before = screen.getvalue()
    time.sleep(0.1)
    assert screen.getvalue() == before
