"""Text that is no task: what a model read before it was fine-tuned, replayed in training or held out to measure it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from manyicl.checked import read_text, require_whole_characters
from manyicl.errors import UserError, located, quoted
from manyicl.paths import exists, expanded, nearest_path, sha256_of_file

BETWEEN_DOCUMENTS = "\n\n"


@dataclass(frozen=True)
class GeneralText:
    """A text and its identity.

    Attributes:
        name: The file, or what else the text is called.
        text: The text; documents of a JSONL file have a blank line between them.
        sha256: Hash of the file, or of the text in UTF-8 where there is no file.
    """

    name: str
    text: str
    sha256: str

    @classmethod
    def of(cls, text: str, name: str) -> GeneralText:
        """Take a text that is in no file."""
        return cls(name, text, hashlib.sha256(text.encode()).hexdigest())


def read_general_text(path: Path | str, field: str | None = None) -> GeneralText:
    """Read a text in UTF-8: plain, or the values of ``text`` in the lines of a ``.jsonl`` file.

    Args:
        path: The file; a leading ``~`` is the home folder.
        field: The key that names it, for errors.

    Raises:
        UserError: If the file is missing, empty or not UTF-8, or a line of it has no text.
    """
    file = Path(expanded(path))
    require_text_file(file, field)
    with located(file=file):
        content = read_text(file)
        text = BETWEEN_DOCUMENTS.join(_documents(content)) if file.suffix == ".jsonl" else content
        if not text.strip():
            raise UserError("empty_text", "the file holds no text", remedy="Give one with some.", field=field)
    return GeneralText(str(path), text, sha256_of_file(file))


def require_text_file(path: Path | str, field: str | None = None) -> None:
    """Refuse a path that is no file.

    Raises:
        UserError: If so, with the nearest name that exists.
    """
    file = Path(expanded(path))
    if not exists(file):
        remedy = nearest_path(file).strip() or "Name a file of plain text in UTF-8."
        raise UserError("missing_file", "the text does not exist", remedy=remedy, file=file, field=field)
    if not file.is_file():
        expected = "a file of plain text in UTF-8"
        raise UserError("not_a_file", "this is no file", expected=expected, file=file, field=field)


def _documents(content: str) -> Iterator[str]:
    for row, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            document = None
        if not isinstance(document, str):
            expected = 'an object with a text, such as {"text": "…"}'
            raise UserError("no_text", "a line holds no text", expected=expected, found=quoted(line), row=row)
        with located(row=row, field="text"):
            require_whole_characters(document)
        yield document


_WORD = re.compile(r"\s(?=\S)")


def next_word(text: str, position: int) -> int:
    """Return where the first word begins that starts after a position; 0 where none does.

    >>> next_word("one two three", 1), next_word("one two three", 10)
    (4, 0)
    """
    found = _WORD.search(text, position)
    return found.end() if found else 0
