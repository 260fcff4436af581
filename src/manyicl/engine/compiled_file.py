"""The file of a compiled task, as far as it can be looked at without torch: is it one, may it be written."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from manyicl.errors import UserError
from manyicl.outputs import require_output_file

HEADER_KEY, HASH_KEY = "manyicl_compiled_task", "sha256"


def require_output(path: Path) -> None:
    """Refuse a path at which a compiled task cannot be written, or would replace something else.

    Raises:
        UserError: If so.
    """
    require_output_file(path, is_ours=_is_compiled)


def _is_compiled(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            return HEADER_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def require_compiled_file(path: Path) -> None:
    """Refuse a path at which no compiled task can be.

    Raises:
        UserError: If there is no file.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise not_compiled(f"the compiled task {what}").at(file=path)


def not_compiled(what: str) -> UserError:
    """Return the error of a file that `manyicl compile` did not write."""
    return UserError("not_a_compiled_task", what, expected="a file written by `manyicl compile`")


def content_hash(path: Path) -> str:
    """Return the hash that a compiled task was written with, which loading it has compared with its content."""
    with safe_open(path, framework="np") as file:
        return str((file.metadata() or {})[HASH_KEY])
