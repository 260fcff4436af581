"""A table of 300 support tickets as a help desk exports it, with the faults that such tables have.

The sentences are put together from parts written for this test, by a fixed generator.
"""

from __future__ import annotations

import csv
import io
import random
from typing import NamedTuple

LABELS = ("billing", "delivery", "login", "returns")
_OPENINGS = ("Hello,", "Hi there,", "Good morning!", "Dear team,", "", "", "Again:", "Urgent!")
_CLOSINGS = (
    "Thanks, Zoë",
    "Best regards from Málaga",
    "Please call me back.",
    "",
    "",
    "Merci d'avance",
    "It's the third time.",
)
_PROBLEMS = {
    "billing": (
        "you charged me {n} € twice for order {n}",
        "the invoice {n} has the wrong address on it",
        "my card was charged although I cancelled order {n}",
        "the voucher over {n} € was not taken off",
        "I need a receipt with VAT for order {n}",
    ),
    "delivery": (
        "parcel {n} says delivered but nobody here has seen it",
        "the driver left box {n} at the wrong door",
        "order {n} has been in the same depot since Monday",
        "can you send parcel {n} to my office instead?",
        "two of the {n} things I ordered are missing",
    ),
    "login": (
        "the reset link number {n} never arrives",
        "the app logs me out after {n} seconds",
        "it says user {n} does not exist, but that's me",
        "I changed my phone and code {n} is refused",
        "my account was locked after {n} attempts",
    ),
    "returns": (
        "I'd like to send article {n} back, it is too small",
        "where do I find the return label for order {n}?",
        "the shop refused to take back number {n}",
        "I returned {n} weeks ago and have heard nothing",
        "article {n} arrived broken, do you want it back?",
    ),
}


class Ticket(NamedTuple):
    """A row of the table."""

    number: str
    text: str
    team: str


def tickets() -> list[Ticket]:
    """Make the 300 rows of the table, faults among them: see `FAULTS`."""
    rows = new_tickets(300, seed=0)
    texts = [row.text for row in rows]
    for place in FAULTS["no team"]:
        rows[place] = rows[place]._replace(team="")
    for place in FAULTS["no text"]:
        rows[place] = rows[place]._replace(text="  ")
    for place in FAULTS["another case"]:
        rows[place] = rows[place]._replace(team="Billing")
    for place in FAULTS["white space"]:
        rows[place] = rows[place]._replace(team=f" {rows[place].team}  ")
    for place in FAULTS["duplicate"]:
        rows[place] = rows[place]._replace(text=texts[place - 100], team=rows[place - 100].team)
    for place in FAULTS["two teams"]:
        other = LABELS[(LABELS.index(rows[place - 100].team) + 1) % len(LABELS)]
        rows[place] = rows[place]._replace(text=texts[place - 100], team=other)
    return rows


# Fault -> the rows that have it, from 0. Those with the text of another row have that of 100 rows before.
FAULTS: dict[str, tuple[int, ...]] = {
    "no team": (17, 88, 171, 260),
    "no text": (40, 233),
    "another case": (5, 61, 130),
    "white space": (12, 199),
    "duplicate": (104, 150, 207, 290),
    "two teams": (111, 245),
}


def new_tickets(num_rows: int, seed: int) -> list[Ticket]:
    """Make rows without those faults."""
    rng = random.Random(seed)
    return [_ticket(rng, f"{number:05}") for number in range(1, num_rows + 1)]


def _ticket(rng: random.Random, number: str) -> Ticket:
    # Faults that belong to one team, as in real tables: the first hundred rows go round the teams.
    team = LABELS[int(number) % len(LABELS)] if int(number) <= 100 else rng.choice(LABELS)
    problem = rng.choice(_PROBLEMS[team]).format(n=rng.randrange(2, 900))
    if rng.random() < 0.15:
        problem = f'they told me "{problem}"'
    separator = "\n" if rng.random() < 0.2 else " "
    parts = filter(None, (rng.choice(_OPENINGS), problem, rng.choice(_CLOSINGS)))
    return Ticket(number, separator.join(parts), team)


def as_csv(rows: list[Ticket], *, with_team: bool = True) -> bytes:
    """Write rows as an old spreadsheet program does: semicolons, cp1252, CRLF."""
    text = io.StringIO()
    table = csv.writer(text, delimiter=";")
    columns = Ticket._fields if with_team else Ticket._fields[:-1]
    table.writerow(columns)
    table.writerows(row[: len(columns)] for row in rows)
    return text.getvalue().encode("cp1252")


def lines_of(rows: list[Ticket]) -> list[int]:
    """Return the line on which each row begins."""
    lines, line = [], 2
    for row in rows:
        lines.append(line)
        line += 1 + row.text.count("\n")
    return lines
