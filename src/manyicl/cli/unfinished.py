"""The answers of a run until they are complete: `OUTPUT.part`, what they were made of, and the lock of the run.

::

    answers.csv.part        answers so far, in the form of the output
    answers.csv.part.json   hashes of what they were made of: input, model, task, options, device, versions
    answers.csv.part.lock   held by the run that writes them; the lock dies with its process
    answers.csv.part.old    answers of an interrupted run that was not continued, until the next one that is not

Nobody has to remove any of them: the next run continues the answers, or says why it starts anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import typer
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyicl.atomic import sync_folder, write_atomically
from manyicl.cli.answers import STANDARD_STREAM, Columns, Earlier, JsonLinesForm, Row, form_of, has_answers
from manyicl.errors import UserError, pluralized
from manyicl.outputs import require_output_file


class MadeOf(BaseModel):
    """What answers depend on, as the run that writes them keeps it next to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = 2
    input: str = Field(description="Hash of the file of queries.")
    read_as: dict[str, str] = Field(description="Suffix, delimiter, quotes and encoding of the queries -> its value.")
    model: str = Field(description="Weights, configuration, precision, text format and tokens that end a text.")
    task: str = Field(description="Hash of the task and its examples, or of the compiled task.")
    options: dict[str, str] = Field(description="Option of the command -> its value.")
    device: str = Field(description="Device, and on a CPU the number of threads.")
    max_context_tokens: int = Field(description="Limit for prefix, query and answer together.")
    versions: dict[str, str] = Field(description="Library -> its version.")

    def difference(self, earlier: MadeOf) -> str | None:
        """Say in a few words what an earlier run had otherwise; None where answers of both are the same."""
        for name, words in (
            ("input", "another input"),
            ("read_as", "another {} of the queries"),
            ("model", "another model"),
            ("task", "another task"),
            ("options", "another --{}"),
            ("device", "another device or number of threads"),
            ("max_context_tokens", "another limit of the context"),
            ("versions", "another version of {}"),
        ):
            now, before = getattr(self, name), getattr(earlier, name)
            if now != before:
                keys = sorted({*now, *before}) if isinstance(now, dict) else ()
                changed = next((key for key in keys if now.get(key) != before.get(key)), "")
                return words.format(changed.replace("_", "-"))
        return None


class UnfinishedAnswers:
    """Answers on their way to their file: written next to it, continued where a run was interrupted, renamed at last.

    Attributes:
        output: File that they become.
        part: File in which they are until all are there.
        old: File in which those of an interrupted run are kept that cannot be continued.
    """

    def __init__(self, output: Path) -> None:
        """Take the name of the output; nothing is read or written."""
        self.output = output
        self.part = output.with_name(f"{output.name}.part")
        self.old = output.with_name(f"{output.name}.part.old")
        self._earlier = Earlier()
        self._record = output.with_name(f"{output.name}.part.json")
        self._form = form_of(output)
        self._stream: IO[str] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out; a kill lets go, too.

        Raises:
            UserError: If another run writes this output.
        """
        lock = self.output.with_name(f"{self.output.name}.part.lock")
        try:
            with FileLock(lock, timeout=0):
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
        except Timeout as error:
            what, remedy = "another run is writing these answers", "Wait for it, or name another output."
            raise UserError("output_in_progress", what, remedy=remedy, file=self.output) from error

    def begin(self, made_of: MadeOf | None, say: Callable[[str], object]) -> Iterable[Row]:
        """Open the file of answers, after those of an interrupted run that was the same as this one.

        Args:
            made_of: What the answers depend on; None where that cannot be known, as of standard input.
            say: Prints one line: that answers are continued, or why not.

        Returns:
            The answers that are continued.
        """
        why_anew = self._why_anew(made_of)
        if why_anew is None and self._is_begun():
            num_rows, num_bytes = self._form.complete_rows(self.part)
            os.truncate(self.part, num_bytes)
            self._earlier = Earlier(num_rows, self._form.columns(self.part))
            if num_rows:
                say(f"Continuing after {pluralized(num_rows, 'answer')} of an interrupted run.")
        else:
            if self._is_begun():
                say(f"Starting anew: {why_anew}.{self._put_aside()}")
            self.part.unlink(missing_ok=True)
            self._record.unlink(missing_ok=True)
            if made_of is not None:
                write_atomically(self._record, made_of.model_dump_json(indent=2) + "\n")
        # CSV has no escape for half a character.
        self._stream = self.part.open("a", encoding="utf-8", errors="backslashreplace", newline="")
        return self._form.rows(self.part) if self._earlier.num_rows else ()

    def _put_aside(self) -> str:
        """Rename the answers of an interrupted run, where there are complete ones, and say so in a sentence."""
        if not self._form.complete_rows(self.part)[0]:
            return ""
        self.part.replace(self.old)
        return f" Its answers are kept in {self.old}."

    def write(self, rows: Iterable[Row], columns_without_rows: Columns = tuple) -> int:
        """Write rows as they come, and count them together with those that are continued."""
        assert self._stream is not None, "begin opens it"
        return self._form.write(self._stream, rows, self._earlier, columns_without_rows)

    def finish(self) -> None:
        """Give the answers their name, once they are on the disk."""
        assert self._stream is not None, "begin opens it"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._form.finish(self.part, self.output)
        self._record.unlink(missing_ok=True)
        sync_folder(self.output.absolute().parent)

    def give_up(self, error: BaseException) -> None:
        """Keep the answers so far and say where they are; remove a file without any."""
        if self._stream is not None:
            self._stream.close()
            if not self._is_begun():
                self.part.unlink(missing_ok=True)
                self._record.unlink(missing_ok=True)
        is_begun = self._is_begun()
        if isinstance(error, UserError) and is_begun and self._stream is not None:
            error.remedy = " ".join(filter(None, [error.remedy, f"The answers before it are in {self.part}."]))
        elif isinstance(error, KeyboardInterrupt):
            continued = "; the same command continues them" if self._record.exists() else ""
            left = f"the answers so far are in {self.part}{continued}" if is_begun else "no answer yet"
            typer.echo(f"Stopped; {left}.", err=True)

    def require_replaceable(self) -> None:
        """Refuse a file in the place of `OUTPUT.part` or `OUTPUT.part.old` that no run has written.

        Raises:
            UserError: If there is one.
        """
        is_foreign = {
            self.part: self._is_begun() and not self._record.exists() and not has_answers(self.part),
            self.old: self._is_begun() and self.old.exists() and not has_answers(self.old),
        }
        for path, is_theirs in is_foreign.items():
            if is_theirs or path.is_dir():
                what = "answers of an interrupted run are kept there, and it was not written by this command"
                raise UserError("output_exists", what, remedy="Give another name, or remove it.", file=path)

    def _is_begun(self) -> bool:
        return self.part.is_file() and self.part.stat().st_size > 0

    def _why_anew(self, made_of: MadeOf | None) -> str | None:
        """Say why the answers of an interrupted run cannot be continued; None to continue them."""
        if made_of is None:
            return f"the rows that {self.part} answers cannot be told from those of standard input"
        try:
            difference = made_of.difference(MadeOf.model_validate_json(self._record.read_bytes()))
        except (OSError, ValidationError):
            difference = "nothing that says what it was made of"
        return difference and f"{self.part} is of an interrupted run with {difference}"


class StandardOutput:
    """JSON lines on standard output, which nothing continues."""

    def begin(self, made_of: MadeOf | None, say: Callable[[str], object]) -> Iterable[Row]:
        """Do nothing; see `UnfinishedAnswers.begin`."""
        return ()

    def write(self, rows: Iterable[Row], columns_without_rows: Columns = tuple) -> int:
        """Write rows as they come, and count them."""
        return JsonLinesForm().write(sys.stdout, rows, Earlier(), columns_without_rows)


@contextmanager
def answers_written(output: Path, inputs: Mapping[str, Path | None]) -> Iterator[UnfinishedAnswers | StandardOutput]:
    """Check an output before anything is computed, keep other runs out, and yield what takes the answers.

    A mistake half-way leaves an earlier output as it was, and the answers so far next to it.

    Args:
        output: ``.jsonl``, ``.csv`` (either packed as ``.gz``) or ``.xlsx`` file, or ``-`` for JSON lines on standard
            output.
        inputs: Files that are read, by the option that names them.

    Raises:
        UserError: If the output cannot be written, would replace another file, another run writes it, or rows differ
            in a CSV file.
    """
    if output == STANDARD_STREAM:
        if sys.stdout is None:
            raise UserError("closed_stream", "standard output is closed", remedy="Name a file with --output.")
        yield StandardOutput()
        return
    form_of(output)
    require_output_file(output, is_ours=has_answers, inputs=inputs)
    # A link stays a link, and what is written until the end lies beside the file that it leads to.
    answers = UnfinishedAnswers(output.resolve() if output.is_symlink() else output)
    answers.require_replaceable()
    with answers.held():
        try:
            yield answers
        except BaseException as error:
            answers.give_up(error)
            raise
        answers.finish()
