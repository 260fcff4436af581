"""A long command says what it is doing: in plain lines where nobody looks at a terminal, and never after it ended."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from manyicl.activity import Activity


def lines_of(seconds: float, *, quiet: bool = False, terminal: bool = False) -> tuple[Activity, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=terminal)
    return Activity(console, quiet=quiet, seconds=seconds), screen


def began_earlier(activity: Activity, seconds: float) -> None:
    activity._work = replace(activity._work, started=activity._work.started - seconds)


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
    began_earlier(activity, 30)
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
        activity.advance(place="[bold]tickets")
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


def test_steps_that_were_done_before_say_nothing_of_the_time_left() -> None:
    activity, _ = lines_of(60)
    activity.begin("training", total=100, found=40)
    began_earlier(activity, 30)
    assert activity.line() == "training: 40 of 100; 30 s so far"
    activity.advance(found=True)
    activity.advance(9)
    assert activity.line() == "training: 50 of 100; 30 s so far, about 2 min 47 s left"
    assert activity.time_left() == "about 2 min 47 s left"
    activity.restart()
    activity.show(60, 100)
    began_earlier(activity, 10)
    assert activity.line() == "training: 60 of 100; 10 s so far, about 40 s left"


def test_it_says_what_is_done_now_and_how_far_that_is() -> None:
    activity, _ = lines_of(60)
    activity.begin("evaluating", total=2)
    activity.now("tickets, 4 shots, seed 0")
    activity.prefill(1024, 4096)
    assert activity.line() == "evaluating: 0 of 2, tickets, 4 shots, seed 0, prefix: 1,024 of 4,096 tokens; 0 s so far"
    activity.prefill(4096, 4096)
    assert activity.line() == "evaluating: 0 of 2, tickets, 4 shots, seed 0; 0 s so far"
    assert list(activity.counting("ab")) == ["a", "b"]
    assert activity.line().startswith("evaluating: 2 of 2, ")


def test_a_line_that_was_said_takes_the_place_of_one_about_progress() -> None:
    activity, screen = lines_of(0.2)
    with activity:
        for _ in range(8):
            time.sleep(0.05)
            activity.say("step 1 \x1b[31m")
    assert screen.getvalue().splitlines() == ["step 1 \\x1b[31m"] * 8


def test_without_a_console_nothing_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with Activity(seconds=0.01) as activity:
        activity.begin("answering", total=2)
        activity.say("answers")
        time.sleep(0.05)
        activity.advance()
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_standard_error_leaves_standard_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    activity, screen = lines_of(60, terminal=True)
    with activity:
        activity.begin("answering", total=2)
        print("an answer", file=sys.stdout)
    assert capsys.readouterr().out == "an answer\n"
    assert "an answer" not in screen.getvalue()
