"""Compressed files, read within bounds: a small file may claim to hold more than any machine has room for."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from manyicl.checked import GZIP_START
from manyicl.errors import UserError
from manyicl.library_errors import reason

# Tables shrink to a twentieth or so. Small ones may shrink further, and harm nothing.
MOST_TIMES_LARGER = 100
ALWAYS_ALLOWED_BYTES = 64 * 2**20


def most_unpacked_bytes(path: Path) -> int:
    """Return how many bytes a packed file may hold."""
    return max(ALWAYS_ALLOWED_BYTES, MOST_TIMES_LARGER * path.stat().st_size)


def too_large(path: Path, most: int) -> UserError:
    """Make the error for a packed file that holds more."""
    what = f"it unpacks to more than {most:,} bytes, over {MOST_TIMES_LARGER} times its size"
    return UserError("unpacks_too_large", what, remedy="If that is meant, unpack it first.", file=path)


def unpacked_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file packed with gzip.

    Raises:
        UserError: If it cannot be read, is broken or no gzip, or unpacks to more than `most_unpacked_bytes`.
    """
    try:
        most = num_left = most_unpacked_bytes(path)
        with gzip.open(path) as file:
            while line := file.readline(num_left + 1):
                num_left -= len(line)
                if num_left < 0:
                    raise too_large(path, most)
                yield line
    except gzip.BadGzipFile as error:
        with path.open("rb") as file:
            is_packed = file.read(2) == GZIP_START
        if is_packed:
            raise UserError("broken_gzip", f"the packed file is damaged, {reason(error)}", file=path) from error
        remedy = "Take .gz off its name, if it is not packed."
        raise UserError("broken_gzip", "not a gzip file", remedy=remedy, file=path) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("broken_gzip", f"cannot be unpacked, {reason(error)}", file=path) from error
