"""Check an output path before anything is computed: it can be written, and no file of the user's is lost."""

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
        is_ours: Tells whether an existing file was written by the same command, so that it may be replaced; without
            it, only an empty file is replaced.
        inputs: Files that are read, by the option that names them, none of which may be the output.
        with_parents: True if missing folders will be made.

    Raises:
        UserError: If it is a folder or another special file, has a wrong ending or too long a name, is one of the
            inputs, its folder does not exist, the machine does not let it be written, or it would replace what is
            not ours.
    """
    if endings:
        require_ending(path, endings)
    require_writable(path)
    if path.is_dir():
        raise UserError("output_is_folder", "the output is a folder", expected="a file name", file=path)
    if not with_parents and not path.absolute().parent.is_dir():
        what = f"the folder {str(path.parent)!r} does not exist"
        raise UserError("output_folder_missing", what, remedy="Make it first.", file=path)
    for option, source in (inputs or {}).items():
        if source is not None and path.resolve() == source.resolve():
            raise UserError("output_is_input", f"{option} and the output are the same file", file=path)
    is_new = not path.exists() or (path.is_file() and not path.stat().st_size)
    if not is_new and not (path.is_file() and is_ours and is_ours(path)):
        what = "the output exists and was not written by this command"
        raise UserError("output_exists", what, remedy="Give another name, or remove it.", file=path)


def require_ending(path: Path, endings: Sequence[str]) -> None:
    """Refuse a file name with none of these endings."""
    if path.suffix.lower() not in endings:
        found = shortened(repr(str(path)))
        raise UserError("wrong_ending", "wrong file name", expected=" or ".join(endings), found=found)


def require_output_folder(path: Path, *, empty: bool = False) -> None:
    """Refuse a path that cannot become a folder with files of ours. Nothing is changed.

    Args:
        path: Folder to be made or filled; missing ones above it are made, too.
        empty: True if it is written as a whole, so that nothing may be in it yet.

    Raises:
        UserError: If it is a file, or is not empty and should be, or the machine does not let it be written.
    """
    require_writable(path, as_a_whole=empty)
    if path.exists() and not path.is_dir():
        raise UserError("output_is_file", "the output is a file", expected="a folder", file=path)
    if empty and path.is_dir() and any(path.iterdir()):
        raise UserError("output_exists", "the output is not empty", remedy="Give a new or an empty folder.", file=path)


def require_writable(path: Path, *, as_a_whole: bool = False) -> None:
    """Refuse a file or folder that cannot be written, by trying a temporary file; nothing of it stays.

    It is tried in the folder of the output, or in the nearest one above it that exists.

    Args:
        path: File or folder to be written.
        as_a_whole: Try next to an existing folder rather than in it, because it will be replaced as a whole.

    Raises:
        UserError: If the machine refuses, the name is too long, or there is a file where a folder is needed.
    """
    if (num_bytes := len(os.fsencode(path.name))) > MOST_NAME_BYTES:
        what = f"the output {shortened(repr(str(path)))} has too long a name"
        raise UserError("output_name_too_long", what, expected=f"at most {MOST_NAME_BYTES} bytes", found=str(num_bytes))
    absolute = path.absolute()
    try:
        nearest = next(place for place in (absolute, *absolute.parents) if place.exists())
        if nearest != absolute and not nearest.is_dir():
            what = f"{nearest.name!r} above it is a file"
            raise UserError("output_below_file", what, remedy="Name another place.", file=path)
        if not nearest.is_dir() and not os.access(nearest, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        is_parent_tried = not nearest.is_dir() or (as_a_whole and nearest == absolute)
        with TemporaryFile(dir=nearest.parent if is_parent_tried else nearest):
            pass
    except OSError as error:
        what = f"the output cannot be written, {reason(error)}"
        file = shortened(str(path))
        raise UserError("output_not_writable", what, remedy="Name another place.", file=file) from error
