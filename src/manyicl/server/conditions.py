"""Headers that make a write safe to repeat: `If-Match` and `Idempotency-Key`."""

from __future__ import annotations

import hashlib
import re

from manyicl.errors import UserError, quoted
from manyicl.server.records import Idempotency, TaskRecord

MOST_KEY_CHARACTERS = 255
_TAG = re.compile(r'\s*(W/)?"([^"]*)"\s*')


def entity_tag(task: TaskRecord) -> str:
    """Return the ETag of a task: its revision."""
    return f'"{task.revision}"'


def matching_revisions(header: str | None) -> frozenset[int] | None:
    """Read the header ``If-Match``.

    Returns:
        Revisions that it allows; weak tags never match. None where any revision will do.

    Raises:
        UserError: If it is no list of tags.
    """
    if header is None or header.strip() == "*":
        return None
    revisions = set()
    for part in header.split(","):
        tag = _TAG.fullmatch(part)
        if tag is None:
            what, expected = "the header If-Match is no list of ETags", 'the ETag of the task, as in "3"'
            raise UserError("wrong_value", what, expected=expected, found=quoted(header), field="If-Match")
        if not tag[1] and tag[2].isascii() and tag[2].isdecimal() and len(tag[2]) <= 18:
            revisions.add(int(tag[2]))
    return frozenset(revisions)


def require_matching(task: TaskRecord, revisions: frozenset[int] | None) -> None:
    """Refuse a write for another revision than that of the task.

    Raises:
        UserError: If so.
    """
    if revisions is not None and task.revision not in revisions:
        what, found = f"task {task.name!r} was changed meanwhile", f"the ETag {entity_tag(task)}"
        raise UserError("changed_meanwhile", what, found=found, remedy="Read the task, and decide again.")


def idempotency_of(header: str | None, method: str, target: str, content_type: str, body: bytes) -> Idempotency | None:
    """Read the header ``Idempotency-Key``.

    Args:
        header: Value of the header.
        method: Method of the request.
        target: Path and query of the request.
        content_type: Its content type.
        body: Its whole body.

    Raises:
        UserError: If the key is empty, too long, or no printable ASCII.
    """
    if header is None:
        return None
    if not 0 < len(header) <= MOST_KEY_CHARACTERS or not (header.isascii() and header.isprintable()):
        expected = f"1 to {MOST_KEY_CHARACTERS} printable ASCII characters, as of a UUID"
        what = "the header Idempotency-Key cannot be used"
        raise UserError("wrong_value", what, expected=expected, found=quoted(header), field="Idempotency-Key")
    kind, _, boundary = content_type.partition("boundary=")
    if boundary:  # another one is drawn for every try
        body = body.replace(boundary.split(";")[0].strip(' "').encode(), b"")
    digest = hashlib.sha256()
    for part in (method.encode(), target.encode(), kind.encode(), body):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return Idempotency(header, digest.hexdigest())
