"""Keys and values of prefixes on disk, in files that the versions of a task share.

::

    version 1    |------------ A ------------|--- B ---|          B was added later
    version 2    |------ A ------:---------- C ------------|      a demonstration in the middle of A was corrected

A *segment* is a file with the keys and values of consecutive tokens of one prefix. They depend on the model and the
tokens up to there alone, so any prefix of the task that begins with the same tokens can use the segment as far as it
agrees, here version 2 the beginning of A. A segment records hashes of the tokens up to some positions in it, and it is
found by these. It holds neither text nor token ids, nothing else refers to it, and it may be deleted at any time.

Tasks share nothing with each other: what one costs tells no one what another holds, and all of a task can be deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from manyicl.atomic import is_leftover, write_atomically
from manyicl.engine.backend import Identity
from manyicl.engine.compiled import block_of, content_digest
from manyicl.engine.local import LocalBackend
from manyicl.errors import MachineError, UserError
from manyicl.library_errors import reason
from manyicl.model.continuation import Block

_LOG = logging.getLogger(__name__)
SUFFIX = ".segment"
_ID = re.compile(r"[A-Za-z0-9_-]+")
HEADER_KEY, HASH_KEY = "manyicl_prefix_segment", "sha256"
# A segment can be used up to every multiple of it, and up to its end. Each costs 64 bytes of the header.
TOKENS_BETWEEN_HASHES = 32
# What follows a whole segment of at most so many tokens is written together with it, so that demonstrations that are
# added one by one end in few files; each segment of a prefix costs a call of the attention kernel per layer.
SMALL_SEGMENT_TOKENS = 512
# A prefix in so many segments is joined with larger ones, too.
MANY_SEGMENTS = 8
# Bytes of a header, about: hashes, names and shapes of the tensors.
HEADER_BYTES, HEADER_BYTES_PER_TOKEN = 20_000, 4
# Ids of deleted tasks that are remembered, so that a prefix compiled meanwhile is not written.
REMEMBERED_TASKS = 10_000


class Header(BaseModel):
    """Content of the header of a segment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    start: int = Field(ge=0, description="Position of its first token.")
    end: int = Field(gt=0, description="Position after its last token.")
    hashes: dict[int, str] = Field(description="Position -> hash of model and tokens up to there, from start to end.")


@dataclass(eq=False)
class Segment:
    """A segment on the disk.

    Attributes:
        path: Its file.
        header: What it holds.
        num_bytes: Size of the file.
        used: When it was last used, in nanoseconds; rises with every use, whatever the clock does.
        is_verified: Whether its content was compared with its hash since the server started.
    """

    path: Path
    header: Header
    num_bytes: int
    used: int
    is_verified: bool = False

    @property
    def start(self) -> int:
        """Position of its first token."""
        return self.header.start

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.header.end

    def agrees_until(self, hashes: dict[int, str]) -> int:
        """Return up to which position a prefix can use it, given the prefix's hashes; its start where not at all."""
        own = self.header.hashes
        return max((position for position in own if hashes.get(position) == own[position]), default=self.start)


@dataclass(frozen=True)
class Piece:
    """The beginning of a segment that a prefix uses.

    Attributes:
        segment: The segment.
        end: Position up to which it is used.
    """

    segment: Segment
    end: int

    @property
    def start(self) -> int:
        """Position of its first token."""
        return self.segment.start

    @property
    def num_tokens(self) -> int:
        """Tokens that are used."""
        return self.end - self.start

    @property
    def is_whole(self) -> bool:
        """Whether the prefix uses all of the segment."""
        return self.end == self.segment.end


def hashed_positions(start: int, end: int) -> list[int]:
    """Return the positions at which a segment has a hash in any case: its start, multiples of 32 and its end.

    >>> hashed_positions(10, 70), hashed_positions(0, 32)
    ([10, 32, 64, 70], [0, 32])
    """
    first = (start // TOKENS_BETWEEN_HASHES + 1) * TOKENS_BETWEEN_HASHES
    return [start, *range(first, end, TOKENS_BETWEEN_HASHES), end]


def prefix_hashes(identity: Identity, token_ids: Sequence[int], positions: Iterable[int]) -> dict[int, str]:
    """Hash the network and the tokens up to each of some positions, in one pass; those beyond the end are omitted."""
    network = json.dumps([identity.fingerprint, identity.config_hash, identity.dtype])
    state = hashlib.sha256(network.encode())
    tokens = np.asarray(token_ids, dtype="<i8").tobytes()
    hashes: dict[int, str] = {}
    done = 0
    for position in sorted(positions):
        if position <= len(token_ids):
            state.update(tokens[8 * done : 8 * position])
            hashes[position] = state.hexdigest()
            done = position
    return hashes


class SegmentFiles:
    """Segments in a folder per task, within a budget: the least recently used ones go. Threads may share it."""

    def __init__(self, folder: Path, backend: LocalBackend, num_bytes: int) -> None:
        """Look at what is there; what a killed process left half-written is removed, and so is what is damaged.

        Args:
            folder: Folder of its own; made where it is missing.
            backend: Made the keys and values, and will use them.
            num_bytes: Most bytes of all files together.

        Raises:
            MachineError: If the folder cannot be used.
        """
        self.folder = folder
        self.num_bytes = num_bytes
        self.num_damaged = 0
        self._backend = backend
        self._lock = threading.RLock()
        self._tasks: dict[str, list[Segment]] = {}
        self._deleted: dict[str, None] = {}
        self._last_used = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for task in folder.iterdir():
                if task.is_dir():
                    self._look_at(task)
        except OSError as error:
            raise MachineError(f"The folder of prefixes {str(folder)!r} cannot be used: {reason(error)}.") from error

    def bytes_used(self) -> int:
        """Return the size of all files."""
        with self._lock:
            return sum(segment.num_bytes for segment in self._all())

    def longest(self, task_id: str, token_ids: Sequence[int]) -> list[Piece]:
        """Find the segments that hold the longest beginning of a prefix, as few as possible.

        Returns:
            Consecutive beginnings of segments, from position 0; nothing where there are none.
        """
        with self._lock:
            segments = self._tasks.get(task_id, [])
            positions = {position for one in segments for position in one.header.hashes}
            hashes = prefix_hashes(self._backend.identity, token_ids, positions)
            usable = [Piece(segment, segment.agrees_until(hashes)) for segment in segments]
            return fewest([piece for piece in usable if piece.num_tokens])

    def load(self, piece: Piece) -> Block | None:
        """Map the keys and values of a piece into memory; nothing is copied on a CPU.

        The first time since the start, the whole file is read and compared with its hash, about a second per GB. A
        damaged file is deleted.

        Returns:
            None where the file is damaged or gone.
        """
        segment = piece.segment
        try:
            block = self._read(segment)
        except (OSError, SafetensorError, UserError) as error:
            with self._lock:
                if not isinstance(error, FileNotFoundError):
                    self.num_damaged += 1
                    _LOG.warning("A stored prefix is computed again: %s", reason(error))
                self._delete(segment)
            return None
        return block if piece.is_whole else block.first(piece.num_tokens)

    def mark_used(self, pieces: Sequence[Piece]) -> None:
        """Remember that segments of one prefix were used just now, the first one last: others need it to be of use."""
        with self._lock:
            for piece in reversed(pieces):
                segment = piece.segment
                segment.used = self._last_used = max(time.time_ns(), self._last_used + 1)
                with suppress(OSError):
                    os.utime(segment.path, ns=(segment.used, segment.used))

    def store(self, task_id: str, token_ids: Sequence[int], blocks: Sequence[Block]) -> bool:
        """Write what is not there yet of a prefix; one thread at a time may call it.

        Returns:
            False where the budget or the disk has no space for it.
        """
        with self._lock:
            if task_id in self._deleted:
                return True
            pieces = self.longest(task_id, token_ids)
            self.mark_used(pieces)
            start = first_to_write(pieces, len(token_ids))
            if start == len(token_ids):
                return True
            num_bytes = HEADER_BYTES + HEADER_BYTES_PER_TOKEN * (len(token_ids) - start)
            num_bytes += sum(block.num_bytes for block in blocks_from(blocks, start))
            if not self._make_space(num_bytes, pieces):
                _LOG.warning("A prefix stays in memory alone, the budget on the disk is too small for it")
                return False
        try:
            # What follows a segment that is joined into the new one begins at a position of its own.
            joined = [piece.segment for piece in pieces if piece.is_whole and piece.start >= start]
            positions = {position for one in joined for position in one.header.hashes}
            segment = self._write(task_id, token_ids, positions.union(hashed_positions(start, len(token_ids))), blocks)
        except (OSError, SafetensorError) as error:
            if self.is_forgotten(task_id):
                self.forget(task_id)
                return True
            _LOG.warning("A prefix stays in memory alone, it could not be written: %s", reason(error))
            return False
        with self._lock:
            if task_id in self._deleted:
                self.forget(task_id)
                return True
            self._tasks.setdefault(task_id, []).append(segment)
            self.mark_used([*(piece for piece in pieces if piece.start < start), Piece(segment, segment.end)])
            for one in joined:
                self._delete(one)
        return True

    def forget(self, task_id: str) -> None:
        """Delete all of a task, and store nothing of it any more."""
        folder = self._task_folder(task_id)
        with self._lock:
            self._deleted[task_id] = None
            while len(self._deleted) > REMEMBERED_TASKS:
                del self._deleted[next(iter(self._deleted))]
            self._tasks.pop(task_id, None)
        # What is written to it meanwhile is deleted once that has ended.
        shutil.rmtree(folder, ignore_errors=True)

    def is_forgotten(self, task_id: str) -> bool:
        """Tell whether a task was deleted."""
        with self._lock:
            return task_id in self._deleted

    def task_ids(self) -> list[str]:
        """Return the tasks of which something is stored."""
        with self._lock:
            return list(self._tasks)

    def _all(self) -> Iterator[Segment]:
        for segments in self._tasks.values():
            yield from segments

    def _task_folder(self, task_id: str) -> Path:
        if not _ID.fullmatch(task_id):
            raise ValueError(f"{task_id!r} is no id of a task")
        return self.folder / task_id

    def _look_at(self, task: Path) -> None:
        """Take the segments of one task's folder; files of other names are left alone."""
        for path in task.iterdir():
            if is_leftover(path):
                path.unlink()
            elif path.suffix == SUFFIX and path.is_file():
                try:
                    with safe_open(path, framework="pt") as file:
                        header = _header(file.metadata())
                except (OSError, SafetensorError, UserError):
                    self.num_damaged += 1
                    with suppress(OSError):
                        path.unlink()
                    continue
                status = path.stat()
                self._tasks.setdefault(task.name, []).append(
                    Segment(path, header, status.st_size, used=status.st_mtime_ns)
                )
                self._last_used = max(self._last_used, status.st_mtime_ns)
        if task.name not in self._tasks:
            with suppress(OSError):
                task.rmdir()

    def _read(self, segment: Segment) -> Block:
        """Map a file, and refuse it where it is not as it was written."""
        with safe_open(segment.path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = _header(metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header != segment.header:
            raise UserError("altered_file", "it is another file than it was")
        if not segment.is_verified and metadata.get(HASH_KEY) != content_digest(metadata[HEADER_KEY], tensors):
            raise UserError("altered_file", "it was altered after it was written")
        segment.is_verified = True
        return block_of(tensors, segment.start, segment.end - segment.start, self._backend.model)

    def _write(
        self, task_id: str, token_ids: Sequence[int], positions: Collection[int], blocks: Sequence[Block]
    ) -> Segment:
        """Write the keys and values from the first of some positions to the last, the end, to a new file."""
        start = min(positions)
        hashes = prefix_hashes(self._backend.identity, token_ids, positions)
        header = Header(start=start, end=len(token_ids), hashes=hashes)
        parts = blocks_from(blocks, start)
        tensors = {}
        for layer in range(len(parts[0].keys)):
            tensors[f"keys.{layer}"] = _joined([part.keys[layer] for part in parts])
            tensors[f"values.{layer}"] = _joined([part.values[layer] for part in parts])
        text = header.model_dump_json()
        metadata = {HEADER_KEY: text, HASH_KEY: content_digest(text, tensors)}
        path = self._task_folder(task_id) / f"{_name(header)}{SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda aside: save_file(tensors, aside, metadata))
        return Segment(path, header, path.stat().st_size, used=0)

    def _make_space(self, num_bytes: int, kept: Sequence[Piece]) -> bool:
        """Delete what was not used for longest until so many bytes are free; False, and nothing, where it cannot be."""
        free = self.num_bytes - self.bytes_used()
        needed = {piece.segment.path for piece in kept}
        others = sorted((one for one in self._all() if one.path not in needed), key=lambda segment: segment.used)
        if free + sum(segment.num_bytes for segment in others) < num_bytes:
            return False
        for segment in others:
            if free >= num_bytes:
                break
            free += segment.num_bytes
            self._delete(segment)
        return True

    def _delete(self, segment: Segment) -> None:
        """Delete a file; where it is mapped into memory, it stays readable there."""
        task_id = segment.path.parent.name
        segments = self._tasks.get(task_id, [])
        if segment not in segments:
            return
        segments.remove(segment)
        with suppress(OSError):
            segment.path.unlink()
        if not segments:
            del self._tasks[task_id]
            with suppress(OSError):
                segment.path.parent.rmdir()


def fewest(pieces: Sequence[Piece]) -> list[Piece]:
    """Choose as few pieces as possible that together hold the longest beginning, each shortened to where the next is.

    Taking the one that reaches farthest, among those that begin where the beginning is held so far, is best.
    """
    chosen: list[Piece] = []
    reached = 0
    while True:
        following = [piece for piece in pieces if piece.start <= reached < piece.end]
        if not following:
            break
        chosen.append(max(following, key=lambda piece: (piece.end, piece.start)))
        reached = chosen[-1].end
    starts = [piece.start for piece in chosen] + [reached]
    return [Piece(piece.segment, end) for piece, end in zip(chosen, starts[1:], strict=True)]


def first_to_write(pieces: Sequence[Piece], num_tokens: int) -> int:
    """Return the position from which a prefix of so many tokens is written, given the pieces of it that are there.

    That is where they end, or before the last of them where they are small, or many. A piece is written again only
    together with at least half as many new tokens, so that a token is written few times however small the steps.
    """
    start = pieces[-1].end if pieces else 0
    are_many = len(pieces) >= MANY_SEGMENTS
    for piece in reversed(pieces) if start < num_tokens else ():
        is_small = piece.is_whole and piece.num_tokens <= SMALL_SEGMENT_TOKENS
        if not (are_many or is_small) or piece.num_tokens >= 2 * (num_tokens - start):
            break
        start = piece.start
    return start


def blocks_from(blocks: Sequence[Block], start: int) -> list[Block]:
    """Return views of the blocks from a position on."""
    parts = []
    for block in blocks:
        skipped = max(start - block.start, 0)
        if skipped < block.num_tokens:
            keys = tuple(keys[:, :, skipped:] for keys in block.keys)
            values = tuple(values[:, :, skipped:] for values in block.values)
            parts.append(Block(block.start + skipped, keys, values))
    return parts


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join keys or values as a file needs them, without a copy where they are that already."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)
    return joined.detach().cpu().contiguous()


def _header(metadata: dict[str, str] | None) -> Header:
    """Read the header of a segment, and refuse the file of something else."""
    try:
        header = Header.model_validate_json((metadata or {}).get(HEADER_KEY, ""))
    except ValidationError as error:
        raise UserError("altered_file", f"it is no segment of a prefix, {reason(error)}") from error
    if not header.start < header.end or not {header.start, header.end} <= header.hashes.keys():
        raise UserError("altered_file", "it is no segment of a prefix")
    return header


def _name(header: Header) -> str:
    """Name a segment by what its content depends on: network, tokens up to its end, start."""
    return hashlib.sha256(f"{header.hashes[header.end]} {header.start}".encode()).hexdigest()
