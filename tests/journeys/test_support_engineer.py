"""A support engineer's week: a table from the help desk is checked, measured, compiled, used every night, corrected.

The steps build on one another and are taken once; each test asks for the step that it is about. The model is a random
one with a byte-level tokenizer, since `builtin:nano` does not know the words: what is shown here is that files come out
as they should, not that answers are right.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

from manyicl.cli.main import main
from tests.builders import byte_level_bpe_of, tiny_model
from tests.cli.test_unfinished import in_a_process
from tests.journeys.tickets import FAULTS, LABELS, Ticket, as_csv, lines_of, new_tickets, tickets

TASK = """family: classification
instruction: "Which team? One of: {{ labels | join(', ') }}"
query: "{{ text }}"
answer: "{{ team | lower }}"
labels: [billing, delivery, login, returns]
bad_rows: drop
data: {file: ../tickets.csv, encoding: cp1252, test_fraction: FRACTION}
"""
NUM_NEW = 150
BAD_NEW = {3: "  ", 50: "", 120: "far too long " * 9000}
CORRECTED, ADDED = "returns", Ticket("90001", "the parcel for my neighbour is here, what now?", "delivery")


class Ended(NamedTuple):
    """What a command left: its exit code, and what it printed, white space made one."""

    code: int
    out: str
    err: str


def command(folder: Path, *words: object) -> Ended:
    """Run a command in a folder, as a shell would."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = patch("sys.argv", ["manyicl", *map(str, words)])
    # As in the process that is killed: few queries together, so that it can be caught between them.
    few = patch.multiple("manyicl.engine.engine", FITTED_QUERIES=32, READ_AHEAD_QUERIES=8)
    with chdir(folder), redirect_stdout(out), redirect_stderr(err), argv, few:
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
    return Ended(code, " ".join(out.getvalue().split()), " ".join(err.getvalue().split()))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Desk:
    """The engineer's folder, and each step in it, taken when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = tickets()
        self.lines = lines_of(self.rows)
        self.write_table()
        # One that keeps rows back to measure, one that uses all rows every night.
        self.write_task("support", TASK.replace("FRACTION", "0.2"))
        self.write_task("nightly", TASK.replace("FRACTION", "0"))
        # A vocabulary of these texts, so that all rows fit in a context that is computed in a second.
        tokenizer = byte_level_bpe_of([row.text for row in self.rows], 1_000)
        model = tiny_model("llama", len(tokenizer))
        model.config.max_position_embeddings = 16_384
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")

    def write_task(self, name: str, text: str) -> None:
        (self.folder / name).mkdir()
        (self.folder / name / "task.yaml").write_text(text, encoding="utf-8")

    def run(self, *words: object) -> Ended:
        return command(self.folder, *words)

    def write_table(self) -> None:
        (self.folder / "tickets.csv").write_bytes(as_csv(self.rows))

    def origin(self, place: int) -> str:
        return f"tickets.csv:{self.lines[place]}"

    @cached_property
    def first_check(self) -> Ended:
        return self.run("tasks", "check", "support")

    @cached_property
    def second_check(self) -> Ended:
        """The texts with two teams get the first one in both rows."""
        assert self.first_check.code == 0, self.first_check.err
        for place in FAULTS["two teams"]:
            self.rows[place] = self.rows[place]._replace(team=self.rows[place - 100].team)
        self.write_table()
        return self.run("tasks", "check", "support")

    @cached_property
    def evaluated(self) -> Ended:
        assert self.second_check.code == 0, self.second_check.err
        words = ("--shots", "0,8", "--seeds", 1, "--queries", 40, "--output", "results")
        return self.run("evaluate", "-m", "model", "--tasks", "support", *words)

    @cached_property
    def reported(self) -> Ended:
        assert self.evaluated.code == 0, self.evaluated.err
        return self.run("report", "results", "--errors", "wrong.csv")

    @cached_property
    def compiled(self) -> Ended:
        assert self.second_check.code == 0, self.second_check.err
        return self.run("compile", "-m", "model", "--task", "nightly", "--output", "nightly.prefix")

    @property
    def predict(self) -> tuple[object, ...]:
        return self.predict_of("new.csv")

    def predict_of(self, queries: str) -> tuple[object, ...]:
        folder = self.folder
        task = ("--task", folder / "nightly", "--prefix", folder / "nightly.prefix")
        return ("-m", folder / "model", *task, "--input", folder / queries, "--output")

    @cached_property
    def first_night(self) -> Ended:
        assert self.compiled.code == 0, self.compiled.err
        self.new = new_tickets(NUM_NEW, seed=1)
        for place, text in BAD_NEW.items():
            self.new[place] = self.new[place]._replace(text=text)
        (self.folder / "new.csv").write_bytes(as_csv(self.new, with_team=False))
        return self.run("predict", *self.predict, "answers.csv")

    @cached_property
    def killed(self) -> tuple[int, bool, Ended]:
        """The same night again, killed half-way: how that ended, whether it left answers, the next run."""
        assert self.first_night.code == 3, self.first_night.err
        output = self.folder / "killed.csv"
        code = in_a_process([*self.predict, output], 4_000, self.folder / "killed.csv.part")
        return code, output.exists(), self.run("predict", *self.predict, output)

    @cached_property
    def corrections(self) -> tuple[dict[str, str], Ended]:
        """The surest error turns out to be a wrong label in the table; a ticket is added at the end."""
        assert self.killed[2].code == 3, self.killed[2].err
        assert self.reported.code == 0, self.reported.err
        surest = rows_of(self.folder / "wrong.csv")[0]
        place = self.lines.index(int(surest["origin"].rpartition(":")[2]))
        self.rows[place] = self.rows[place]._replace(team=surest["answer"])
        self.rows.append(ADDED)
        self.write_table()
        shutil.copy(self.folder / "answers.csv", self.folder / "first.csv")
        return surest, self.run("predict", *self.predict, "answers.csv")

    @cached_property
    def updated(self) -> Ended:
        assert self.corrections[1].code == 2, self.corrections[1].err
        return self.run("compile", "-m", "model", "--task", "nightly", "--output", "nightly.prefix", "--update")

    @cached_property
    def scored(self) -> Ended:
        """A week later the tickets of that night have their teams, and the same command says how often it was right."""
        assert self.updated.code == 0, self.updated.err
        (self.folder / "solved.csv").write_bytes(as_csv(self.new))
        return self.run("predict", "--json", *self.predict_of("solved.csv"), "scored.csv")


@pytest.fixture(name="desk", scope="module")
def _desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


def test_the_table_has_the_faults_that_real_tables_have(desk: Desk) -> None:
    content = as_csv(tickets())
    assert len(tickets()) == 300
    for sign in (b";", b'""', b"\xeb", b"\x80", b"\r\n"):
        assert sign in content
    with pytest.raises(UnicodeDecodeError):
        content.decode("utf-8")
    assert sum("\n" in row.text for row in tickets()) > 30
    assert {row.team for row in tickets()} > {*LABELS, "", "Billing"}


def test_the_table_alone_is_answered_with_the_two_columns_and_the_encoding(desk: Desk) -> None:
    ended = desk.run("tasks", "check", "tickets.csv")
    assert ended.code == 2
    assert "tickets.csv: a table is no task by itself; found text that looks like cp1252." in ended.err
    assert "as in tickets.csv:text:team,encoding=cp1252, for queries from 'text'" in ended.err


def test_a_row_that_cannot_be_used_is_named_with_the_remedy(desk: Desk) -> None:
    ended = desk.run("tasks", "check", "tickets.csv:text:team,encoding=cp1252")
    assert ended.code == 2
    assert f"{desk.origin(40)}: " in ended.err
    assert "bad_rows: drop" in ended.err


def test_the_check_names_every_fault_of_the_table_with_its_line(desk: Desk) -> None:
    ended = desk.first_check
    assert ended.code == 0, ended.err
    assert f"Dropped: {len(FAULTS['no team'])} " in ended.out
    for fault in ("no team", "no text", "two teams"):
        for place in FAULTS[fault]:
            assert desk.origin(place) in ended.out, fault
    assert ended.out.count("has 2 different answers") == len(FAULTS["two teams"])
    for label in LABELS:
        assert label in ended.out
    # The template of the answer has united the two ways to write it.
    assert "Billing" not in ended.out


def test_labels_that_differ_by_case_are_shown_with_the_template_that_unites_them(desk: Desk) -> None:
    as_written = TASK.replace("FRACTION", "0.2").replace(" | lower", "")
    desk.write_task("as_written", re.sub(r"labels: .*", "labels: from_train", as_written))
    ended = desk.run("tasks", "check", "as_written")
    assert "'Billing' and 'billing' are two, and differ only in" in ended.out
    assert "label | lower" in ended.out


def test_after_the_corrections_no_text_has_two_teams(desk: Desk) -> None:
    assert "different answers" in desk.first_check.out
    assert "different answers" not in desk.second_check.out


def test_the_report_opens_with_its_message_and_lists_every_error(desk: Desk) -> None:
    assert desk.reported.code == 0, desk.reported.err
    page = (desk.folder / "results" / "report.html").read_text(encoding="utf-8")
    message = re.search(r'<p class="message">(.*?)</p>', page, re.DOTALL)
    assert message is not None
    assert "%" in message[1]
    assert page.index("message") < page.index("<svg")
    wrong = rows_of(desk.folder / "wrong.csv")
    assert wrong
    sure = [float(row["confidence"]) for row in wrong if row["shots"] == "8"]
    assert sure
    assert sure == sorted(sure, reverse=True)
    text_of = {desk.origin(place): row for place, row in enumerate(tickets())}
    for row in wrong:
        assert text_of[row["origin"]].text.strip() == row["query"].strip()
        assert row["expected"] != row["answer"]


def test_compile_says_how_well_it_will_work_and_that_the_file_holds_the_texts(desk: Desk) -> None:
    assert desk.compiled.code == 0, desk.compiled.err
    assert "demonstrations of 'nightly'" in desk.compiled.out
    assert "It contains the demonstrations in recoverable form." in desk.compiled.out
    # All rows but those without text or team, and those that only repeat another one stay.
    num_used = 300 - len(FAULTS["no team"]) - len(FAULTS["no text"])
    assert f"{num_used} demonstrations" in desk.compiled.out


def test_the_nightly_run_answers_all_rows_but_the_bad_ones_and_ends_with_3(desk: Desk) -> None:
    ended = desk.first_night
    assert ended.code == 3, ended.err
    assert f"3 of {NUM_NEW} rows could not be answered; the column `problem` says why." in ended.err
    answers = rows_of(desk.folder / "answers.csv")
    assert [row["number"] for row in answers] == [row.number for row in desk.new]
    assert [row["text"] for row in answers] == [row.text.replace("\r\n", "\n") for row in desk.new]
    for place, row in enumerate(answers):
        assert bool(row["problem"]) is (place in BAD_NEW), place
        assert (row["answer"] in LABELS) is (place not in BAD_NEW)
        assert row["problem"] or 0 <= float(row["second_probability"]) <= float(row["probability"]) <= 1


def test_a_run_that_is_killed_is_continued_to_the_same_answers(desk: Desk) -> None:
    code, is_written, ended = desk.killed
    assert code == -signal.SIGKILL
    assert not is_written
    assert ended.code == 3
    assert re.search(r"Continuing after \d+ answers of an interrupted run", ended.err)
    assert (desk.folder / "killed.csv").read_bytes() == (desk.folder / "answers.csv").read_bytes()
    assert sorted(path.name for path in desk.folder.glob("killed.csv*")) == ["killed.csv"]


def test_after_corrections_the_stale_prefix_is_refused_and_the_answers_stay(desk: Desk) -> None:
    surest, ended = desk.corrections
    assert surest["answer"] in LABELS
    assert ended.code == 2
    assert "task 'nightly' has changed since it was compiled" in ended.err
    assert "manyicl compile --update" in ended.err
    assert (desk.folder / "answers.csv").read_bytes() == (desk.folder / "first.csv").read_bytes()


def test_an_update_encodes_what_changed_and_the_next_night_works(desk: Desk) -> None:
    assert desk.updated.code == 0, desk.updated.err
    encoded = re.search(r"([\d,]+) of ([\d,]+) tokens encoded; the others were kept", desk.updated.out)
    assert encoded is not None, desk.updated.out
    num_encoded, num_tokens = (int(number.replace(",", "")) for number in encoded.groups())
    assert num_encoded < num_tokens
    ended = desk.run("predict", *desk.predict, "answers.csv")
    assert ended.code == 3, ended.err
    assert len(rows_of(desk.folder / "answers.csv")) == NUM_NEW
    again = desk.run("compile", "-m", "model", "--task", "nightly", "--output", "nightly.prefix", "--update")
    assert again.out.startswith("0 of ")


def test_rows_that_have_their_team_are_scored(desk: Desk) -> None:
    assert desk.scored.code == 3, desk.scored.err
    scores = json.loads(desk.scored.out)["scores"]
    answered = [row for row in rows_of(desk.folder / "scored.csv") if not row["problem"]]
    num_right = sum(row["answer"] == row["team"] for row in answered)
    assert (scores["num_rows"], scores["num_scored"], scores["num_problems"]) == (NUM_NEW, len(answered), len(BAD_NEW))
    assert scores["accuracy"] == pytest.approx(num_right / len(answered))
    assert {label["label"] for label in scores["labels"]} == set(LABELS)
