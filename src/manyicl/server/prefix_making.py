"""The prefix of a version of a task: from keys and values that are stored, as far as they go, otherwise compiled.

A compilation records how well each demonstration was predicted. Stored keys and values do not say that, so that they
are of use only as far as the records are known: from an earlier compilation of this version, or of another version of
the task that begins with the same demonstrations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from manyicl.engine.backend import BetweenChunks, Prefix
from manyicl.engine.engine import Engine
from manyicl.engine.label_trie import num_shared_tokens
from manyicl.engine.observed import ObservedAnswer
from manyicl.engine.task_prefix import FittedPrefix, TaskPrefix
from manyicl.errors import UserError
from manyicl.server.records import VersionKey
from manyicl.server.work import Compiled, TaskSource
from manyicl.tasks.task import Example, Task

Load = Callable[[VersionKey], TaskSource]


class _Records(NamedTuple):
    """How well the first demonstrations of a prefix were predicted, and of which task they are."""

    task: Task
    demonstrations: tuple[Example, ...]
    answers: tuple[ObservedAnswer, ...]


class Usage(Protocol):
    """What prefixes take up."""

    @property
    def num_resident(self) -> int:
        """Prefixes in memory."""

    @property
    def memory_bytes(self) -> int:
        """Their keys and values, those that several share counted once."""


class Prefixes(Protocol):
    """Where prefixes are kept; see `manyicl.server.prefix_store.PrefixStore`."""

    def get(self, key: VersionKey) -> TaskPrefix | None:
        """Return a prefix that is in memory."""

    def put(self, key: VersionKey, prefix: TaskPrefix, *, pinned: bool) -> None:
        """Keep a prefix."""

    def using(self, key: VersionKey) -> AbstractContextManager[object]:
        """Keep a prefix in memory meanwhile."""

    def longest(self, token_ids: Sequence[int], task_id: str) -> Prefix | None:
        """Return the keys and values of the longest beginning of these tokens that the task has."""

    def forget(self, task_id: str) -> None:
        """Delete all of a task."""

    def set_pinned(self, task_id: str, pinned: bool) -> None:
        """Say whether the prefixes of a task always stay in memory."""

    def usage(self) -> Usage:
        """Return what is kept."""


def model_hash(engine: Engine) -> str:
    """Hash all that a compiled prefix depends on besides its task: network, tokenizer, text format, context."""
    identity = engine.identity
    parts = [identity.fingerprint, identity.config_hash, identity.dtype, engine.encoder.text_hash]
    return hashlib.sha256(json.dumps([*parts, engine.max_context_tokens]).encode()).hexdigest()[:32]


class NotStoredError(Exception):
    """A prefix is not stored as a whole, and was not to be computed."""


def make_prefix(
    engine: Engine,
    prefixes: Prefixes,
    source: TaskSource,
    load: Load,
    between_chunks: BetweenChunks | None = None,
    *,
    may_compute: bool = True,
) -> TaskPrefix:
    """Compile a version of a task; what is stored and recorded already is taken over.

    Args:
        engine: Compiles.
        prefixes: Where keys and values are stored.
        source: The version.
        load: Reads another version, for its records.
        between_chunks: As for `Engine.compile`.
        may_compute: Whether the network may run; otherwise all of the prefix must be stored.

    Raises:
        UserError: If the task cannot be compiled.
        NotStoredError: If the network would have to run, and may not.
    """
    fitted = _fitted(engine, source, between_chunks)
    reuse = _reusable(engine, prefixes, source, fitted, load, between_chunks)
    if not may_compute and not _is_stored(engine, fitted, reuse):
        raise NotStoredError
    return engine.compile_fitted(fitted, reuse=reuse, between_chunks=between_chunks)


def compiled_of(prefix: TaskPrefix, model: str, seconds: float = 0.0) -> Compiled:
    """Return what the record of a version holds of its prefix."""
    answers = tuple((one.num_shots, one.log_probability, int(one.is_right)) for one in prefix.answers)
    return Compiled(prefix.num_tokens, prefix.num_shots, prefix.num_dropped, answers, model, seconds)


def _fitted(engine: Engine, source: TaskSource, between_chunks: BetweenChunks | None) -> FittedPrefix:
    demonstrations = source.task.train[: source.num_shots]
    try:
        return engine.fit_prefix(
            source.task, demonstrations, num_retrieved=source.num_retrieved, between_chunks=between_chunks
        )
    except UserError as error:
        # A small task has all of its demonstrations in the prefix, and none to retrieve until it grows.
        if error.code != "no_example_left":
            raise
        return engine.fit_prefix(source.task, demonstrations, between_chunks=between_chunks)


def _reusable(
    engine: Engine,
    prefixes: Prefixes,
    source: TaskSource,
    fitted: FittedPrefix,
    load: Load,
    between_chunks: BetweenChunks | None,
) -> TaskPrefix | None:
    """Put together what is known of the beginning of a prefix: keys and values, and records."""
    cache = prefixes.longest(fitted.token_ids, source.key.task_id)
    if cache is None:
        return None
    records = _records(source, fitted) or _earlier_records(engine, prefixes, source, load, between_chunks)
    task, demonstrations, answers = records or _Records(source.task, (), ())
    return TaskPrefix(task, demonstrations, 0, engine.encoder.text_hash, cache, answers=answers)


def _is_stored(engine: Engine, fitted: FittedPrefix, known: TaskPrefix | None) -> bool:
    """Tell whether the network need not run: all keys and values are known, and all records."""
    if known is None or num_shared_tokens(fitted.token_ids, known.token_ids) < len(fitted.token_ids):
        return False
    is_recorded = len(known.answers) == len(fitted.demonstrations) and known.demonstrations == fitted.demonstrations
    return engine.is_channel or is_recorded


def _earlier_records(
    engine: Engine, prefixes: Prefixes, source: TaskSource, load: Load, between_chunks: BetweenChunks | None
) -> _Records | None:
    key = source.earlier or VersionKey(source.key.task_id, source.key.version - 1)
    if key.version < 1:
        return None
    if (prefix := prefixes.get(key)) is not None:
        return _Records(prefix.task, prefix.demonstrations, prefix.answers)
    try:
        other = load(key)
        return _records(other, _fitted(engine, other, between_chunks)) if other.answers else None
    except UserError:
        return None


def _records(source: TaskSource, fitted: FittedPrefix) -> _Records | None:
    """Return the records of a version; None where it has none, or they are of other demonstrations."""
    if source.answers is None or len(source.answers) != len(fitted.demonstrations):
        return None
    answers = tuple(ObservedAnswer(shots, score, bool(is_right)) for shots, score, is_right in source.answers)
    return _Records(source.task, fitted.demonstrations, answers)
