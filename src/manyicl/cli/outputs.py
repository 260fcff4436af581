"""Outputs of `manyicl predict` are refused before anything is loaded where something would be lost."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from manyicl.errors import UserError
from manyicl.outputs import require_writable as require_writable

ANSWER_COLUMNS = frozenset({"answer", "log_probability"})


def require_earlier_answers(output: Path) -> None:
    """Refuse to write answers over a file that `manyicl predict` did not write, or where an interrupted run left some.

    Raises:
        UserError: If the file is there and its first row has no columns of ours, or its ``.part`` holds answers.
    """
    if output.exists() and output.stat().st_size and not ANSWER_COLUMNS.issubset(_first_columns(output)):
        raise UserError(
            "output_exists",
            "the output exists and holds no answers of `manyicl predict`",
            remedy="Give another name, or remove it.",
            file=output,
        )
    part = part_of(output)
    if part.exists() and part.stat().st_size:
        raise UserError(
            "output_in_progress",
            "it holds the answers of a run that was interrupted, or of one that still writes them",
            remedy="Give it another name, or remove it; then start again.",
            file=part,
        )


def part_of(output: Path) -> Path:
    """Return the file that holds answers until all of them are there."""
    return output.with_name(f"{output.name}.part")


def _first_columns(path: Path) -> set[str]:
    """Return the columns of the first row, none where there is no such row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return set(next(csv.reader(file), ()))
            row = json.loads(file.readline())
    except (OSError, ValueError, RecursionError, csv.Error):
        return set()
    return set(row) if isinstance(row, dict) else set()
