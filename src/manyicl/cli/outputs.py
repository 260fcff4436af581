"""Outputs are refused before anything is loaded: where nothing can be written, and where something would be lost."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path
from tempfile import TemporaryFile

from manyicl.errors import UserError, shortened

ANSWER_COLUMNS = frozenset({"answer", "log_probability"})


def require_writable(path: Path, *, beside: bool = False) -> None:
    """Refuse a file or folder that cannot be written, by trying a temporary file; nothing of it stays.

    It is tried in the folder where the output will stand, or in the nearest one above it that exists.

    Args:
        path: The output.
        beside: Try beside a folder that exists rather than in it, because it will be replaced as a whole.

    Raises:
        UserError: If the machine refuses, or a file stands where a folder is needed.
    """
    try:
        taken = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        if taken != path.absolute() and not taken.is_dir():
            raise UserError(
                f"The output {str(path)!r} would lie below {taken.name!r}, which is a file; name another place."
            )
        if not taken.is_dir() and not os.access(taken, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replaced = beside and taken == path.absolute()
        with TemporaryFile(dir=taken if taken.is_dir() and not replaced else taken.parent):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"output {shortened(repr(str(path)))}: cannot be written, {reason}; name another place."
        ) from error


def require_earlier_answers(output: Path) -> None:
    """Refuse to write answers over a file that `manyicl predict` did not write, or where an interrupted run left some.

    Raises:
        UserError: If the file is there and its first row has no columns of ours, or its ``.part`` holds answers.
    """
    if output.exists() and output.stat().st_size and not ANSWER_COLUMNS.issubset(_first_columns(output)):
        raise UserError(
            f"The output {str(output)!r} is there and holds no answers of `manyicl predict`; give another name, or "
            "remove it."
        )
    part = part_of(output)
    if part.exists() and part.stat().st_size:
        raise UserError(
            f"{part} holds the answers of a run that was interrupted, or of one that still writes them. Give it "
            "another name, or remove it; then start again."
        )


def part_of(output: Path) -> Path:
    """Return the file that answers stand in until all of them are there."""
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
