"""How an output path is checked before anything is computed: it can be written, and nothing of the user's is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile

from manyicl.errors import UserError, shortened
from manyicl.library_errors import reason

# File systems take 255 bytes; files aside are named after the output.
MOST_NAME_BYTES = 240


def require_output_file(
    path: Path,
    *,
    endings: Sequence[str] = (),
    is_ours: Callable[[Path], bool] | None = None,
    inputs: Mapping[str, Path | None] | None = None,
    with_parents: bool = False,
) -> None:
    """Refuse a path at which a file cannot be written, or would replace what is not ours. Nothing is changed.

    Args:
        path: File to be written.
        endings: Endings of which the name has one, such as ``.html``; none for any name.
        is_ours: Tells whether a file that exists is of the kind that is written and may be replaced; without it, no
            file is replaced unless it is empty.
        inputs: Files that are read, by the option that names them, none of which may be the output.
        with_parents: True if missing folders will be made.

    Raises:
        UserError: If it is a folder or another special file, has a wrong ending or too long a name, is one of the
            inputs, its folder does not exist, the machine does not let it be written, or it would replace what is
            not ours.
    """
    if endings and path.suffix.lower() not in endings:
        raise UserError("wrong_ending", "wrong file name", expected=" or ".join(endings), found=_shown(path))
    require_writable(path)
    if path.is_dir():
        raise UserError("output_is_folder", "the output is a folder", expected="a file name", file=path)
    if not with_parents and not path.absolute().parent.is_dir():
        folder = str(path.parent)
        raise UserError(
            "output_folder_missing", f"the folder {folder!r} does not exist", remedy="Make it first.", file=path
        )
    for option, source in (inputs or {}).items():
        if source is not None and path.resolve() == source.resolve():
            raise UserError(
                "output_is_input", f"{option} and the output are the same file", remedy=_ANOTHER_NAME, file=path
            )
    if not path.exists():
        return
    if not path.is_file() or (path.stat().st_size and not (is_ours and is_ours(path))):
        raise UserError(
            "output_exists",
            "the output exists and is no earlier output of this command",
            remedy="Give another name, or remove it.",
            file=path,
        )


def require_output_folder(path: Path, *, empty: bool = False) -> None:
    """Refuse a path that cannot become a folder with files of ours. Nothing is changed.

    Args:
        path: Folder to be made or filled; missing ones above it are made, too.
        empty: True if it is written as a whole, so that nothing may be in it yet.

    Raises:
        UserError: If it is a file, or is not empty and should be, or the machine does not let it be written.
    """
    require_writable(path, beside=empty)
    if path.exists() and not path.is_dir():
        raise UserError("output_is_file", "the output is a file", expected="a folder", file=path)
    if empty and path.is_dir() and any(path.iterdir()):
        raise UserError("output_exists", "the output is not empty", remedy="Give a new or an empty folder.", file=path)


def require_writable(path: Path, *, beside: bool = False) -> None:
    """Refuse a file or folder that cannot be written, by trying a temporary file; nothing of it stays.

    It is tried in the folder of the output, or in the nearest one above it that exists.

    Args:
        path: File or folder to be written.
        beside: Try beside a folder that exists rather than in it, because it will be replaced as a whole.

    Raises:
        UserError: If the machine refuses, the name is too long, or a file stands where a folder is needed.
    """
    if len(os.fsencode(path.name)) > MOST_NAME_BYTES:
        raise UserError(
            "output_name_too_long",
            f"the output {_shown(path)} has too long a name",
            expected=f"at most {MOST_NAME_BYTES} bytes",
            found=str(len(os.fsencode(path.name))),
            remedy="Give a shorter one.",
        )
    absolute = path.absolute()
    try:
        nearest = next(place for place in (absolute, *absolute.parents) if place.exists())
        if nearest != absolute and not nearest.is_dir():
            raise UserError(
                "output_below_file", f"{nearest.name!r} above it is a file", remedy="Name another place.", file=path
            )
        if not nearest.is_dir() and not os.access(nearest, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        is_parent_tried = not nearest.is_dir() or (beside and nearest == absolute)
        with TemporaryFile(dir=nearest.parent if is_parent_tried else nearest):
            pass
    except OSError as error:
        raise UserError(
            "output_not_writable",
            f"the output cannot be written, {reason(error)}",
            remedy="Name another place.",
            file=shortened(str(path)),
        ) from error


_ANOTHER_NAME = "Write to another file."


def _shown(path: Path) -> str:
    return shortened(repr(str(path)))
