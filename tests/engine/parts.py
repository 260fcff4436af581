"""What tests need of the inside of an engine: its network, keys and values, answers token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
from transformers import PreTrainedModel

from manyicl.engine.answers import AnswerEnd
from manyicl.engine.backend import GeneratedToken
from manyicl.engine.engine import Engine
from manyicl.engine.local import LocalBackend
from manyicl.engine.prefix_cache import PrefixCache
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.errors import UserError
from manyicl.model.continuation import Block


def backend_of(engine: Engine) -> LocalBackend:
    assert isinstance(engine.backend, LocalBackend)
    return engine.backend


def model_of(engine: Engine) -> PreTrainedModel:
    return backend_of(engine).model


def blocks_of(prefix: TaskPrefix) -> tuple[Block, ...]:
    assert isinstance(prefix.cache, PrefixCache)
    return prefix.cache.blocks


def written(end: AnswerEnd, token_ids: Iterable[int]) -> tuple[int, str | None, float]:
    """Write tokens of -0.5 nats each until the answer ends: how many were needed, its text if it ended, its score."""
    tokens: list[GeneratedToken] = []
    for token_id in token_ids:
        tokens.append(GeneratedToken(0, token_id, -0.5, stopped=False, is_last=False))
        if end.ended([token.token_id for token in tokens]):
            return len(tokens), *end.text_of(tokens)
    return len(tokens), None, 0.0


@contextmanager
def refused(code: str, **fields: object) -> Iterator[None]:
    """Expect an error with this code and these fields; a string may be a part of the value."""
    with pytest.raises(UserError) as caught:
        yield
    known = caught.value.fields()
    assert known["code"] == code, known
    for name, value in fields.items():
        found = known.get(name)
        assert found == value or (isinstance(value, str) and value in str(found)), (name, known)
